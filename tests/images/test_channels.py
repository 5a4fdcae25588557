"""Models with one, two, four and thirteen channels: their input from a photo, and how it is hidden."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers.families import TINY
from tests.models.test_preprocessing_settings import defaults
from vitscope.errors import CallError, VitscopeError
from vitscope.images.image import InputImage, image_of_unit
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import read_photo
from vitscope.perturb.baselines import fill
from vitscope.perturb.masked_model import MaskedModel
from vitscope.perturb.masks import PixelMasks, SegmentMasks
from vitscope.perturb.options import PerturbationOptions
from vitscope.perturb.rendering import Renderer, Subject, pool, subjects
from vitscope.perturb.segments import segment

RANDOM = np.random.default_rng(0)
COLOUR = RANDOM.integers(0, 256, (45, 60, 3), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (45, 60), dtype=np.uint8)
CLEAR = RANDOM.integers(0, 256, (45, 60, 4), dtype=np.uint8)

# With and without resizing.
PREPROCESSINGS = {
    "squash": {"size": (32, 32)},
    "crop": {"size": (32, 32), "fit": "crop", "resize_to": (36, 36)},
    "unresized": {"size": (45, 60)},
}


def preprocessing(channels: int, kind: str = "squash") -> Preprocessing:
    mean, std = np.linspace(0.3, 0.6, channels), np.linspace(0.2, 0.4, channels)
    return Preprocessing(mean=tuple(mean.tolist()), std=tuple(std.tolist()), **PREPROCESSINGS[kind])


def vit(channels: int, kind: str = "squash") -> Any:
    import transformers

    torch.manual_seed(0)
    size = PREPROCESSINGS[kind]["size"]
    if kind == "unresized":
        size = (48, 64)
    config = transformers.ViTConfig(**(TINY | {"image_size": size, "patch_size": 8, "num_channels": channels}))
    model = vs.load(transformers.ViTForImageClassification(config).eval(), image_size=size)
    settings = dataclasses.replace(preprocessing(channels, kind), size=size)
    return dataclasses.replace(model, preprocessing=settings)


def expected(values: np.ndarray, settings: Preprocessing) -> torch.Tensor:
    """Return (height, width, channel) bytes, normalized by hand."""
    unit = torch.from_numpy(values.reshape(*values.shape[:2], -1).copy()).permute(2, 0, 1).double() / 255
    mean, std = (
        torch.tensor(values, dtype=torch.float64, device="cpu").view(-1, 1, 1)
        for values in (settings.mean, settings.std)
    )
    return ((unit - mean) / std).float()


# Photos


@pytest.mark.parametrize("source", ["array", "deep", "image", "deep image"])
def test_a_grey_photo_reaches_a_one_channel_model_unchanged(source: str) -> None:
    deep = (GREY.astype(np.uint16) << 8) + 77
    photo: Any = {"array": GREY, "deep": deep, "image": Image.fromarray(GREY), "deep image": Image.fromarray(deep)}[
        source
    ]
    settings = preprocessing(1, "unresized")
    pixels, image = settings(*read_photo(photo))
    assert pixels.shape == (1, 45, 60)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected(GREY, settings), atol=1e-6, rtol=0)
    assert image.photo.mode == "RGB"
    assert torch.equal(settings.read(photo)[0], pixels)


def test_a_grey_photo_is_resized_as_pillow_resizes_grey() -> None:
    settings = preprocessing(1)
    shrunk = Image.fromarray(GREY).resize((32, 32), Image.Resampling.BILINEAR)
    torch.testing.assert_close(settings.read(GREY)[0], expected(np.asarray(shrunk), settings), atol=1e-6, rtol=0)


def test_a_colour_photo_becomes_grey_as_in_pillow() -> None:
    settings = preprocessing(1, "unresized")
    red, green, blue = (COLOUR[..., i].astype(int) for i in range(3))
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16  # ITU-R 601, in fixed point with 16 bits
    torch.testing.assert_close(settings.read(COLOUR)[0], expected(luma.astype(np.uint8), settings), atol=1e-6, rtol=0)


def test_transparency_is_a_channel_if_the_model_has_one() -> None:
    four, two = preprocessing(4, "unresized"), preprocessing(2, "unresized")
    pixels, image = four.read(CLEAR)
    torch.testing.assert_close(pixels, expected(CLEAR, four), atol=1e-6, rtol=0)
    assert np.array_equal(np.asarray(image.photo), np.asarray(read_photo(CLEAR)[0]))
    grey = np.stack([GREY, CLEAR[..., 3]], axis=-1)
    torch.testing.assert_close(two.read(grey)[0], expected(grey, two), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("channels", "photo", "message"),
    [
        (13, COLOUR, "this model takes 13 channels, a photo has 3: pass a tensor (batch, 13, height, width)"),
        (5, CLEAR, "this model takes 5 channels, a photo has 3: pass a tensor (batch, 5, height, width)"),
        (4, COLOUR, "this model takes 4 channels (RGBA), the photo has no transparency"),
        (2, GREY, "this model takes 2 channels (LA), the photo has no transparency"),
    ],
    ids=["13", "5", "4", "2"],
)
def test_a_photo_that_does_not_fit_is_refused(channels: int, photo: np.ndarray, message: str) -> None:
    with pytest.raises(CallError) as caught:
        preprocessing(channels).read(photo)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_photos_for_three_channels_are_unchanged() -> None:
    settings = preprocessing(3, "unresized")
    pixels, image = settings(*read_photo(COLOUR))
    torch.testing.assert_close(pixels, expected(COLOUR, settings), atol=1e-6, rtol=0)
    assert np.array_equal(np.asarray(image.photo), COLOUR)


# Display of tensors


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
def test_a_tensor_of_any_number_of_channels_is_displayed(channels: int) -> None:
    values = RANDOM.random((channels, 6, 8)).astype(np.float32)
    settings = preprocessing(channels)
    colours = np.asarray(image_of_unit(torch.from_numpy(values)).photo).astype(int)
    channels_first = values[:3] if channels in (3, 4) else np.repeat(values.mean(0)[None], 3, axis=0)
    reference = channels_first.transpose(1, 2, 0)
    assert colours.shape == (6, 8, 3)
    assert np.abs(colours - (reference * 255).round()).max() <= 1
    normalized = (values - np.reshape(settings.mean, (-1, 1, 1))) / np.reshape(settings.std, (-1, 1, 1))
    again = np.asarray(settings.image_of(torch.from_numpy(normalized.astype(np.float32))).photo).astype(int)
    assert np.abs(again - colours).max() <= 1


# Hiding

MASK = np.zeros((45, 60), dtype=bool)
MASK[10:30, 20:50] = True
HIDES: list[Any] = ["mean", "black", "grey", "blur", "noise", 77, (200, 30, 90), np.full((5, 5, 3), 9, dtype=np.uint8)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PREPROCESSINGS)
@pytest.mark.parametrize("hide", HIDES, ids=lambda hide: str(hide)[:12])
@pytest.mark.parametrize("photo", [GREY, COLOUR], ids=["grey", "colour"])
def test_the_rendered_input_equals_the_input_of_the_perturbed_photo(photo: np.ndarray, hide: Any, kind: str) -> None:
    model = vit(1, kind)
    (subject,) = subjects(model, photo)
    labels = (np.arange(45)[:, None] // 15) * 4 + np.arange(60)[None] // 15
    segments = segment(np.asarray(subject.view.photo), labels, subject.view, None)
    renderer = Renderer(model, subject, hide, segments, 3)
    with pool() as threads:
        masks = PixelMasks(2, lambda index: MASK if index else ~MASK)
        rendered = renderer.finish(renderer.start(threads, masks, [0, 1]))
    colour = np.asarray(read_photo(photo)[0])
    filling = fill(colour, hide, segments, 3)
    for visible, pixels in zip((~MASK, MASK), rendered, strict=True):
        perturbed = np.where(visible[..., None], colour, filling)
        reference, _ = model.prepare(Image.fromarray(perturbed))
        assert pixels.shape[0] == 1
        assert torch.equal(pixels, reference[0])
    assert not torch.equal(rendered[0], subject.pixels[0])


@pytest.mark.slow
@pytest.mark.parametrize("hide", ["mean", "blur", 77, "drop"])
def test_every_method_explains_a_one_channel_model(hide: Any) -> None:
    model = vit(1)
    assert vs.lime(model, GREY, segments="patches", num_samples=80, hide=hide).values.isfinite().all()
    if hide != "drop":
        assert vs.rise(model, GREY, num_samples=4, hide=hide).values.isfinite().all()
        assert vs.occlusion(model, GREY, hide=hide, window=2, stride=2).values.isfinite().all()


def test_an_object_is_composed_for_a_one_channel_model() -> None:
    result = vs.compose(vit(1), GREY, {"thing": (10, 10, 12, 12)}, places=2, background=COLOUR)
    assert np.isfinite(result.outputs).all()
    assert len({tuple(row) for row in result.outputs.tolist()}) > 1


def tensor_subject(channels: int) -> Subject:
    """Return a subject as :func:`subjects` makes it from a tensor."""
    values = RANDOM.random((45, 60, channels)).astype(np.float32) * 255
    pixels = torch.from_numpy(values.transpose(2, 0, 1).copy())[None] / 255
    view = image_of_unit(pixels[0])
    factor = torch.full((channels,), 1 / 255, dtype=torch.float32, device="cpu")
    return Subject(values, view, pixels, (factor, torch.zeros(channels, dtype=torch.float32, device="cpu")))


@pytest.mark.slow
@pytest.mark.parametrize("hide", ["mean", "black", "grey", "blur", "noise", 51])
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_segments_of_a_tensor_are_hidden_in_every_channel(channels: int, hide: Any) -> None:
    subject = tensor_subject(channels)
    labels = np.arange(60)[None] // 30 + np.zeros((45, 1), dtype=int)
    segments = segment(subject.values, labels, subject.view, None)
    renderer = Renderer(vit(1), subject, hide, segments, 0)
    with pool() as threads:
        masks = SegmentMasks(np.array([[True, False]]), segments)
        rendered = renderer.finish(renderer.start(threads, masks, [0]))
    assert torch.equal(rendered[..., :30], subject.pixels[..., :30])
    hidden = rendered[0, :, :, 30:].permute(1, 2, 0).numpy()
    reference = {
        "mean": subject.values[:, 30:].mean((0, 1)) / 255,
        "black": 0,
        "grey": 128 / 255,
        51: 0.2,
    }.get(hide)
    if reference is None:
        assert hidden.std() > 0
        assert not np.array_equal(hidden, subject.values[:, 30:] / 255)
    else:
        np.testing.assert_allclose(hidden, np.broadcast_to(reference, hidden.shape), atol=1e-5)


@pytest.mark.parametrize("method", ["quickshift", "slic"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_a_tensor_of_any_number_of_channels_is_segmented(channels: int, method: str) -> None:
    subject = tensor_subject(channels)
    smooth = (
        np.repeat((np.arange(60)[None] > 30).astype(np.float32) * np.ones((45, 1), np.float32), channels).reshape(
            45, 60, channels
        )
        * 200
    )
    assert segment(smooth, method, subject.view, None).count > 1


@pytest.mark.parametrize("channels", [1, 13])
def test_a_colour_needs_one_number_per_channel(channels: int) -> None:
    values = tensor_subject(channels).values
    numbers = list(range(10, 10 + channels))
    assert np.array_equal(fill(values, numbers, None, 0)[0, 0], numbers)
    for hide in ([1, 2], [1, 2, 3] if channels == 13 else [1, 2, 3, 4], COLOUR if channels == 13 else "nowhere.png"):
        with pytest.raises(VitscopeError) as caught:
            fill(values, hide, None, 0)
        assert "\n" not in str(caught.value)


def test_a_colour_for_one_channel_becomes_its_grey() -> None:
    values = tensor_subject(1).values
    assert fill(values, (255, 0, 0), None, 0)[0, 0] == 76  # 0.299 of white


def test_hidden_segments_of_a_transparent_photo_are_opaque() -> None:
    for hide in ("black", "grey", "noise", 50, (1, 2, 3), COLOUR):
        assert (fill(CLEAR, hide, None, 0)[..., 3] == 255).all()
    assert fill(CLEAR, "mean", None, 0)[0, 0].tolist() == CLEAR.mean((0, 1)).astype(int).tolist()


def test_a_masked_model_of_one_channel_keeps_the_photo() -> None:
    model = vit(1)
    (subject,) = subjects(model, GREY)
    masked_model = MaskedModel(model, subject, PerturbationOptions(), segments="patches")
    asked = masked_model.evaluate(masked_model.masks(np.eye(16, dtype=bool)), [0])
    assert np.isfinite(asked.outputs).all()
    assert isinstance(masked_model.subject.view, InputImage)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("meta", None), (None, torch.float64), (None, torch.float16), ("meta", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["photo", "tensor", "tensor without preprocessing"])
def test_hidden_pixels_do_not_depend_on_the_defaults_of_torch(kind: str, device: Any, dtype: Any) -> None:
    model = vit(3)
    image: Any = COLOUR if kind == "photo" else model.prepare(COLOUR)[0]
    if kind == "tensor without preprocessing":
        model = dataclasses.replace(model, preprocessing=None)

    def rendered() -> np.ndarray:
        (subject,) = subjects(model, image)
        size = subject.size
        renderer = Renderer(model, subject, "blur", None, 3)
        with pool() as threads:
            soft = np.linspace(0, 1, size[1])[None].repeat(size[0], 0)
            masks = PixelMasks(2, lambda index: soft if index else soft > 0.5)
            return np.stack([renderer.finish(renderer.start(threads, masks, [index]))[0].numpy() for index in (0, 1)])

    before = rendered()
    with defaults(device, dtype):
        again = rendered()
    assert again.dtype == np.float32
    assert np.array_equal(again, before)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_an_object_of_a_tensor_is_composed_in_every_channel(channels: int) -> None:
    model, objects = vit(channels), {"thing": (4, 4, 10, 10)}
    pixels = torch.from_numpy(RANDOM.random((1, channels, 32, 32)).astype(np.float32))
    tests = ["size", "location", "split"]
    if channels == 13:
        with pytest.raises(CallError, match="cannot use a photo of 3 channels as the background of an input with 13"):
            vs.compose(model, pixels, objects, places=2, tests="controls")
    else:
        tests.append("controls")
    result = vs.compose(model, pixels, objects, places=2, tests=tests)
    assert np.isfinite(result.outputs).all()
    assert result.image(1).mode == "RGB"
    assert len({tuple(row) for row in result.outputs.tolist()}) > 3


@pytest.mark.parametrize("count", [0, 2])
def test_an_array_of_several_images_is_not_one_to_compose(count: int) -> None:
    with pytest.raises(CallError, match=r"compose takes one image, not 2|no image was given"):
        vs.compose(vit(1), np.zeros((count, 32, 32, 3), dtype=np.uint8), {"thing": (4, 4, 10, 10)})
