"""Segments, fillings, rendering and sampling; and evaluations that are interrupted, out of memory or not finite."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.filters import gaussian
from torch import Tensor

import vitscope as vs
from tests.contracts.test_leaks import assert_same, mixed, state
from tests.helpers import families
from tests.reference import lime as slow
from vitscope.images.image import InputImage
from vitscope.images.preprocessing import Preprocessing
from vitscope.methods.lime import kernel
from vitscope.perturb.baselines import fill
from vitscope.perturb.masked_model import MaskedModel
from vitscope.perturb.masks import KernelSampler, PairedSampler, PixelMasks, SegmentMasks, UniformSampler
from vitscope.perturb.options import PerturbationOptions
from vitscope.perturb.rendering import Renderer, Subject, subjects
from vitscope.perturb.segments import Segments, patch_points, segment


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def view_of(photo: np.ndarray, box: tuple[float, float, float, float] | None = None) -> InputImage:
    height, width = photo.shape[:2]
    return InputImage(Image.fromarray(photo), box or (0.0, 0.0, float(width), float(height)))


def squares(height: int, width: int, side: int) -> np.ndarray:
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return rows[:, None] * (columns[-1] + 1) + columns


def cut(photo: np.ndarray, segmentation: Any, cells: vs.Grid | None = None) -> Segments:
    return segment(photo, segmentation, view_of(photo), cells)


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    import skimage.data

    return np.asarray(Image.fromarray(skimage.data.chelsea()).resize((90, 60)))


def family(name: str) -> families.Family:
    return next(family for family in families.ALL if family.name == name)


# Segments


def test_quickshift_equals_limes(cat: np.ndarray) -> None:
    lime = pytest.importorskip("lime.wrappers.scikit_image", reason="the reference is PyPI's lime 0.2.0.1")
    algorithm = lime.SegmentationAlgorithm("quickshift", kernel_size=4, max_dist=200, ratio=0.2, random_seed=5)
    expected = algorithm(cat)
    segments = cut(cat, "quickshift")
    assert np.array_equal(segments.labels, expected)
    assert np.array_equal(segments.index, expected)
    assert (segments.count, segments.name) == (len(np.unique(expected)), "quickshift")


def test_quickshift_is_called_with_limes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "vitscope.perturb.segments.quickshift", lambda _, **options: calls.append(options) or squares(6, 9, 3)
    )
    assert cut(noise(6, 9), "quickshift").count == 6
    assert calls == [{"kernel_size": 4, "max_dist": 200, "ratio": 0.2}]


def test_slic_makes_about_a_hundred_segments(cat: np.ndarray) -> None:
    segments = cut(cat, "slic")
    assert 40 <= segments.count <= 130
    assert segments.labels.min() == 0
    assert np.array_equal(np.unique(segments.index), np.arange(segments.count))
    assert segments.name == "slic"


@pytest.mark.parametrize("algorithm", ["quickshift", "slic"])
def test_a_large_photo_is_segmented_on_a_smaller_copy(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.perturb.segments.MAX_SEGMENTED_PIXELS", 1500)
    photo = np.zeros((60, 100, 3), np.uint8)
    photo[:, 50:] = 255
    segments = cut(photo, algorithm)
    assert segments.labels.shape == (60, 100)
    # No segment lies on both sides of the edge, which has the same place in the smaller copy.
    assert not set(np.unique(segments.index[:, :48])) & set(np.unique(segments.index[:, 52:]))


def test_given_labels_are_kept_and_counted() -> None:
    photo = noise(6, 9)
    labels = np.array([7, -3, 100])[np.arange(9) // 3] * np.ones((6, 1), dtype=int)
    for segmentation in (labels, labels.tolist(), labels.astype(float), labels.astype(np.int16), lambda _: labels):
        segments = cut(photo, segmentation)
        assert np.array_equal(segments.labels, labels)
        assert segments.count == 3
        # −3, 7, 100: in the order of the labels, not of their positions.
        assert np.array_equal(segments.index[0], [1, 1, 1, 0, 0, 0, 2, 2, 2])
        assert segments.sizes.tolist() == [18, 18, 18]


def test_a_function_receives_the_photo() -> None:
    photo, photos = noise(6, 9), []

    def halves(image: np.ndarray) -> np.ndarray:
        photos.append(image)
        return squares(6, 9, 5)

    assert cut(photo, halves).name == "halves"
    assert np.array_equal(photos[0], photo)


def test_segments_of_a_smaller_copy_have_the_same_positions() -> None:
    segments = cut(noise(8, 12), squares(8, 12, 4))
    assert segments.resized((8, 12)) is segments
    small = segments.resized((4, 6))
    assert np.array_equal(small.index, squares(4, 6, 2))
    assert small.count == segments.count


CROPS = {
    "squash": Preprocessing((32, 48)),
    "crop": Preprocessing((32, 48), fit="crop", resize_to=(40, 60)),
    "crop, rounded": Preprocessing((32, 48), fit="crop", resize_to=(37, 55), round_half_even=True),
    "padded": Preprocessing((32, 48), fit="crop", resize_to=(24, 40)),
}


@pytest.mark.parametrize("size", [(64, 96), (90, 60), (33, 47), (40, 60)], ids=str)
@pytest.mark.parametrize("recipe", CROPS.values(), ids=CROPS)
def test_patches_lie_on_the_token_grid(recipe: Preprocessing, size: tuple[int, int]) -> None:
    """The colour of each pixel encodes its patch, and the model's input has that colour in the patch."""
    base = family("timm-vit").model()
    model = dataclasses.replace(base, preprocessing=dataclasses.replace(recipe, resample=Image.Resampling.NEAREST))
    (subject,) = subjects(model, noise(*size))
    segments = segment(subject.values, "patches", subject.view, vs.Grid(4, 6))
    assert (segments.count, segments.name) == (24, "patches")
    painted = np.repeat((segments.index + 1)[..., None].astype(np.uint8) * 5, 3, axis=2)
    recipe_of_bytes = dataclasses.replace(model.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = (recipe_of_bytes(Image.fromarray(painted))[0][0].numpy() * 255).round() / 5 - 1
    expected = squares(32, 48, 8)
    inside = np.zeros((32, 48), dtype=bool)
    inside[2:-2, 2:-2] = True
    # The input is black beyond the photo. Away from borders the nearest pixels belong to the patch.
    for row in range(4):
        for column in range(6):
            centre = seen[8 * row + 3 : 8 * row + 5, 8 * column + 3 : 8 * column + 5]
            assert set(centre.ravel().tolist()) <= {float(expected[8 * row + 4, 8 * column + 4]), -1.0}
    if recipe is not CROPS["padded"]:
        assert np.mean(seen == expected) > 0.6
    # Outside the model's view no pixel has a patch, and inside every pixel has one.
    left, top, right, bottom = subject.view.box
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    visible = ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))
    assert np.array_equal(segments.index >= 0, visible)


def test_pixels_that_the_model_does_not_see_are_never_hidden() -> None:
    model = family("timm-vit").model()
    photo = noise(40, 90)
    result = vs.lime(model, photo, target=0, num_samples=60, segments="patches")
    unseen = result.index < 0
    assert bool(unseen.any())
    assert not unseen.all()
    assert not result.values[0][unseen].any()
    assert not result.regions(24, sign="both")[unseen].any()
    rows = np.zeros((1, 24), dtype=bool)
    visible = SegmentMasks(rows, Segments(result.index.numpy(), result.index.numpy(), 24, "patches")).visible(0)
    assert np.array_equal(visible, unseen.numpy())


def test_patches_that_do_not_fill_the_input_leave_a_margin() -> None:
    """37 pixels hold four patches of 8: the model does not see the rest."""
    model = dataclasses.replace(family("timm-vit").model(), preprocessing=Preprocessing((37, 50)))
    (subject,) = subjects(dataclasses.replace(model, forward=lambda pixels: pixels.mean((2, 3))), noise(37, 50))
    segments = segment(subject.values, "patches", subject.view, vs.Grid(4, 6))
    assert np.array_equal(segments.index[:32, :48], squares(32, 48, 8))
    assert (segments.index[32:] == -1).all()
    assert (segments.index[:, 48:] == -1).all()


def test_points_of_a_patch_lie_inside_it() -> None:
    photo = noise(64, 96)
    points = patch_points((64, 96), view_of(photo), vs.Grid(4, 6))
    assert points.shape == (24, 64)
    inside = squares(64, 96, 16).ravel()[points]
    assert np.array_equal(inside, np.arange(24)[:, None].repeat(64, 1))
    rows, columns = np.divmod(patch_points((24, 24), view_of(noise(24, 24)), vs.Grid(1, 1)), 24)
    assert (rows.mean(), columns.mean()) == (11.5, 11.5)
    half = patch_points((32, 48), view_of(photo), vs.Grid(4, 6))
    assert np.array_equal(squares(32, 48, 8).ravel()[half], inside)


def test_coverage_is_the_share_of_a_patch_in_each_segment() -> None:
    photo, labels = noise(16, 16), np.zeros((16, 16), int)
    labels[:, 4:] = 1
    labels[8:, 12:] = 2
    segments, points = cut(photo, labels), patch_points((16, 16), view_of(photo), vs.Grid(2, 2))
    expected = [[0.5, 0.5, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert segments.coverage(points).tolist() == expected
    masks = SegmentMasks(np.array([[True, False, True], [False, True, False]]), segments)
    assert masks.patch_shares([0, 1], points).tolist() == [[0.5, 0, 0.5, 0.5], [0.5, 1, 0.5, 0.5]]
    pixels = PixelMasks(2, lambda index: masks.visible(index).astype(np.float32))
    assert pixels.patch_shares([0, 1], points).tolist() == masks.patch_shares([0, 1], points).tolist()


WRONG_SEGMENTS: list[tuple[Any, str]] = [
    ("voronoi", "unknown segments 'voronoi': choose quickshift, slic, patches"),
    ("patches", "the patches of this model are unknown"),
    (np.zeros((6, 9), int), "one segment only"),
    (lambda _: np.ones((6, 9), int), "one segment only"),
    (squares(9, 6, 3), "segment labels are 9×6, but the image is 6×9"),
    (np.arange(54), "segment labels are 54, but the image is 6×9"),
    (3, "segment labels are one number, but the image"),
    (squares(6, 9, 3) + 0.5, "segment labels are float64, whole numbers are expected"),
    (squares(6, 9, 3) > 2, "segment labels are bool, whole numbers are expected"),
    (np.full((6, 9), np.nan), "whole numbers are expected"),
]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    WRONG_SEGMENTS,
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_invalid_segments_are_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        cut(noise(6, 9), segmentation)
    assert "\n" not in str(caught.value)


# Fillings of hidden parts


def test_the_mean_of_each_segment_is_truncated_to_bytes() -> None:
    photo, labels = noise(12, 12), squares(12, 12, 5)
    filling = fill(photo, "mean", cut(photo, labels), 0)
    assert filling.dtype == np.uint8
    assert np.array_equal(filling, slow.hidden(photo, labels, np.zeros(9, dtype=bool)))


def test_the_mean_without_segments_is_that_of_the_image() -> None:
    photo = noise(5, 7)
    filling = fill(photo, "mean", None, 0)
    assert np.array_equal(filling, np.broadcast_to(photo.mean((0, 1)).astype(np.uint8), photo.shape))


def test_the_mean_does_not_change_pixels_outside_all_segments() -> None:
    photo, index = noise(4, 4), np.full((4, 4), -1)
    index[:2], index[2] = 0, 1
    filling = fill(photo, "mean", Segments(index, index, 2, "labels"), 0)
    assert np.array_equal(filling[3], photo[3])
    assert np.array_equal(filling[0, 0], photo[:2].reshape(-1, 3).mean(0).astype(np.uint8))


@pytest.mark.parametrize(
    ("hide", "colour"),
    [
        ("black", (0, 0, 0)),
        ("grey", (128, 128, 128)),
        (0, (0, 0, 0)),
        (7, (7, 7, 7)),
        (255.0, (255, 255, 255)),
        ((1, 2, 3), (1, 2, 3)),
        ([9, 8, 7], (9, 8, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_colour_fills_the_image(hide: Any, colour: tuple[int, int, int], dtype: type) -> None:
    photo = noise(4, 6).astype(dtype)
    filling = fill(photo, hide, None, 0)
    assert filling.dtype == dtype
    assert np.array_equal(filling, np.broadcast_to(np.array(colour, dtype=dtype), photo.shape))


def test_noise_depends_on_the_seed() -> None:
    photo = np.zeros((20, 20, 3), np.uint8)
    first, again, reseeded = (fill(photo, "noise", None, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, reseeded)
    assert abs(first.mean() - 127.5) < 8
    assert (first.min(), first.max()) == (0, 255)


def test_blur_is_gaussian_relative_to_the_shorter_side() -> None:
    photo = noise(112, 150)
    expected = gaussian(photo.astype(float), sigma=2.5, channel_axis=-1)
    assert np.array_equal(fill(photo, "blur", None, 0), expected.astype(np.uint8))
    flat = np.full((30, 30, 3), 77, np.uint8)
    assert np.abs(fill(flat, "blur", None, 0).astype(int) - 77).max() <= 1


def test_another_image_is_resized_to_the_photo(tmp_path: Any) -> None:
    photo, larger = noise(10, 14), noise(20, 28, seed=1)
    expected = np.asarray(Image.fromarray(larger).resize((14, 10), Image.Resampling.BICUBIC))
    Image.fromarray(larger).save(tmp_path / "other.png")
    for hide in (larger, Image.fromarray(larger), tmp_path / "other.png", str(tmp_path / "other.png")):
        assert np.array_equal(fill(photo, hide, None, 0), expected)
    same = noise(10, 14, seed=2)
    assert np.array_equal(fill(photo, same, None, 0), same)


WRONG_HIDES: list[tuple[Any, str]] = [
    ("gray", "hide is 'gray': choose mean, black, grey, blur, noise, drop, a colour"),
    (256, "hide is 256: a colour is one number or three, each from 0 to 255"),
    (-1, "each from 0 to 255"),
    (float("nan"), "each from 0 to 255"),
    (True, "each from 0 to 255"),
    ((1, 2), "each from 0 to 255"),
    ((0, 0, 300), "each from 0 to 255"),
    (None, "hide is None: choose mean"),
    (np.zeros((4, 4), float), "choose mean"),
]


@pytest.mark.parametrize(("hide", "message"), WRONG_HIDES, ids=str)
def test_invalid_hides_are_refused(hide: Any, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        fill(noise(4, 6), hide, None, 0)
    assert "\n" not in str(caught.value)


# Rendering


def rendered(renderer: Renderer, masks: Any, indices: list[int]) -> Tensor:
    with ThreadPoolExecutor(2) as threads:
        return renderer.finish(renderer.start(threads, masks, indices))


def with_recipe(recipe: Preprocessing) -> vs.VisionModel:
    return dataclasses.replace(family("timm-vit").model(), preprocessing=recipe)


HIDES: list[Any] = ["mean", "black", "grey", "blur", "noise", 40, (10, 200, 30), noise(9, 9, seed=3)]


@pytest.mark.parametrize("size", [(32, 48), (40, 60), (41, 61), (37, 55), (64, 90), (24, 40)], ids=str)
@pytest.mark.parametrize("recipe", CROPS.values(), ids=CROPS)
def test_the_input_equals_that_of_the_perturbed_photo(recipe: Preprocessing, size: tuple[int, int]) -> None:
    """To the bit, whether preprocessing resizes the photo or not."""
    model, photo, labels = with_recipe(recipe), noise(*size), squares(*size, 7)
    (subject,) = subjects(model, photo)
    segments = segment(photo, labels, subject.view, None)
    rows = np.random.default_rng(0).integers(0, 2, (4, segments.count)).astype(bool)
    rows[0] = True
    for hide in HIDES:
        filling = fill(photo, hide, segments, 3)
        got = rendered(Renderer(model, subject, hide, segments, 3), SegmentMasks(rows, segments), [0, 1, 3])
        mixed_photos = [np.where(rows[index][segments.index][..., None], photo, filling) for index in (0, 1, 3)]
        assert torch.equal(got, model.prepare(mixed_photos)[0])
    assert torch.equal(got[0], subject.pixels[0])


def test_a_photo_that_keeps_its_size_is_perturbed_after_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is preprocessed for each mask then."""
    calls = []
    cut_photo = Preprocessing.cut
    monkeypatch.setattr(
        Preprocessing, "cut", lambda self, photo, name="": calls.append(1) or cut_photo(self, photo, name)
    )
    for size, expected in (((32, 48), 0), ((33, 48), 3)):
        model, photo = with_recipe(CROPS["squash"]), noise(*size)
        (subject,) = subjects(model, photo)
        segments = segment(photo, squares(*size, 8), subject.view, None)
        renderer = Renderer(model, subject, "mean", segments, 0)
        calls.clear()
        rendered(renderer, SegmentMasks(np.zeros((3, segments.count), dtype=bool), segments), [0, 1, 2])
        assert len(calls) == expected


@pytest.mark.parametrize("size", [(32, 48), (41, 61)], ids=str)
def test_soft_masks_mix_the_photo_with_the_filling(size: tuple[int, int]) -> None:
    model, photo = with_recipe(CROPS["squash"]), noise(*size)
    (subject,) = subjects(model, photo)
    soft = np.random.default_rng(0).random(size, dtype=np.float32)
    renderer = Renderer(model, subject, "black", None, 0)
    (got,) = rendered(renderer, PixelMasks(1, lambda _: soft), [0])
    share = soft[..., None].astype(float)
    (expected,) = model.prepare((share * photo).round().astype(np.uint8))[0]
    # Half a byte, if the photo is not perturbed in bytes.
    assert float((got - expected).abs().max()) <= 0.51 / 255 / 0.5


@pytest.mark.parametrize("name", ["timm-vit", "foreign"])
def test_visible_pixels_of_a_tensor_are_unchanged_to_the_bit(name: str) -> None:
    module = slow.linear(slow.stripes(4, (32, 48)), np.ones((4, 2)))
    model = vs.load(module) if name == "foreign" else family(name).model()
    pixels = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 3
    (subject,) = subjects(model, pixels)
    labels = squares(32, 48, 8)
    segments = segment(subject.values, labels, subject.view, None)
    rows = np.random.default_rng(1).integers(0, 2, (3, 24)).astype(bool)
    for hide in ["mean", "black", "grey", "blur", "noise", 9]:
        renderer = Renderer(model, subject, hide, segments, 0)
        got = rendered(renderer, SegmentMasks(rows, segments), [0, 1, 2])
        for image, row in zip(got, rows, strict=True):
            visible = torch.from_numpy(row[labels])
            assert torch.equal(image[:, visible], pixels[0, :, visible])
            assert not torch.equal(image[:, ~visible], pixels[0, :, ~visible])
            if hide == "mean":
                for label in np.flatnonzero(~row):
                    inside = torch.from_numpy(labels == label)
                    means = pixels[0, :, inside].mean(1, keepdim=True)
                    torch.testing.assert_close(image[:, inside], means.expand(-1, 64), atol=1e-5, rtol=1e-5)


def test_a_tensor_is_filled_with_the_same_colour_as_a_photo() -> None:
    model = family("timm-vit").model()
    assert model.preprocessing is not None
    (subject,) = subjects(model, torch.randn(1, 3, 32, 48))
    segments = segment(subject.values, squares(32, 48, 16), subject.view, None)
    masks = SegmentMasks(np.zeros((1, segments.count), dtype=bool), segments)
    for colour in (0, (10, 20, 30)):
        got = rendered(Renderer(model, subject, colour, segments, 0), masks, [0])
        photo = np.broadcast_to(np.array(colour, np.uint8), (32, 48, 3)).copy()
        plain = dataclasses.replace(model.preprocessing, fit="squash", resize_to=None)
        expected = plain(Image.fromarray(photo))[0]
        torch.testing.assert_close(got[0], expected, atol=1e-5, rtol=1e-5)


def test_a_huge_photo_is_perturbed_on_a_smaller_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.perturb.rendering.MAX_PERTURBED_PIXELS", 8000)
    model, photo = family("timm-vit").model(), noise(160, 200)
    (subject,) = subjects(model, photo)
    assert subject.size == (80, 100)
    assert subject.view.photo.size == (200, 160)
    _, (original,) = model.prepare(photo)
    assert subject.view.box == pytest.approx(original.box, abs=3.0)
    result = vs.lime(model, photo, target=0, num_samples=60, segments=squares(160, 200, 50), hide="black")
    assert result.values.shape == (1, 160, 200)
    assert result.index.shape == (160, 200)
    assert result.overlay().size == (200, 160)


def test_a_copy_is_never_smaller_than_twice_the_models_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.perturb.rendering.MAX_PERTURBED_PIXELS", 10)
    (subject,) = subjects(family("timm-vit").model(), noise(160, 200))
    assert 0.9 < subject.size[0] * subject.size[1] / (2 * 32 * 48) < 1.1


# Sampling


def test_uniform_masks_equal_those_of_lime() -> None:
    random = np.random.RandomState(11)
    random.randint(0, 1000)
    expected = random.randint(0, 2, 40 * 7).reshape(40, 7)
    expected[0] = 1
    assert np.array_equal(UniformSampler(7, 11).draw(40), expected.astype(bool))


def kernel_sampler(segments: int, seed: int) -> KernelSampler:
    return KernelSampler(segments, seed, lambda counts: kernel(counts / segments, 0.25))


@pytest.mark.parametrize("make", [UniformSampler, PairedSampler])
@pytest.mark.parametrize("sizes", [[1, 39], [17, 23], [2, 2, 36], [1] * 40, [0, 40]], ids=str)
def test_masks_drawn_in_chunks_equal_those_drawn_at_once(make: Callable[..., Any], sizes: list[int]) -> None:
    expected, sampler = make(5, 3).draw(40), make(5, 3)
    chunks = [sampler.draw(chunk) for chunk in sizes]
    assert [len(chunk) for chunk in chunks] == sizes
    assert np.array_equal(np.concatenate(chunks), expected)


@pytest.mark.parametrize("make", [UniformSampler, PairedSampler, kernel_sampler])
def test_only_the_first_mask_shows_everything(make: Callable[..., Any]) -> None:
    sampler = make(12, 0)
    assert sampler.draw(1).all()
    rest = sampler.draw(500)
    assert rest.shape == (500, 12)
    assert not rest.all(1).all()
    assert rest.mean() == pytest.approx(0.5 if make is not kernel_sampler else 0.58, abs=0.08)


def test_each_even_mask_is_the_complement_of_the_one_before() -> None:
    rows = PairedSampler(9, 4).draw(101)
    assert rows[0].all()
    assert np.array_equal(rows[2::2], ~rows[1::2])
    assert len(np.unique(rows[1::2], axis=0)) > 40


@pytest.mark.parametrize("segments", [4, 10, 300])
def test_masks_are_drawn_in_proportion_to_the_kernel(segments: int) -> None:
    rows = kernel_sampler(segments, 0).draw(20_001)[1:]
    counts = np.arange(segments + 1)
    logs = [math.log(math.comb(segments, int(k))) for k in counts]
    shares = np.exp(np.array(logs) - max(logs)) * np.array([slow.kernel(counts[:segments] < k) for k in counts])
    expected = shares / shares.sum()
    frequencies = np.bincount(rows.sum(1), minlength=segments + 1) / len(rows)
    assert np.abs(frequencies - expected).max() < 4 * np.sqrt(expected.max() / len(rows))
    # Which segments are visible is random.
    assert rows.mean(0) == pytest.approx(np.full(segments, rows.mean()), abs=0.02)
    assert abs(np.corrcoef(rows[:, 0], rows[:, -1])[0, 1]) < 0.35


# Evaluation


LABELS = slow.stripes(4)


def model_of(logits: Callable[[Tensor], Tensor]) -> vs.VisionModel:
    """Return a model whose logits are a function of the visible stripes of four."""
    return vs.load(slow.Known(LABELS, logits), image_size=(8, 16))


LINEAR = torch.tensor([[1.0, 0.0], [0.5, 0.0], [-1.0, 0.5], [0.25, 0.0]])


def linear() -> vs.VisionModel:
    return model_of(lambda visible: visible @ LINEAR)


OPTIONS: dict[str, Any] = {"segments": LABELS, "hide": "black", "output": "logit"}

METHODS: dict[str, Callable[..., Any]] = {
    "lime": lambda model, **more: vs.lime(model, slow.WHITE, num_samples=40, target=0, **OPTIONS, **more),
    "kernel_shap": lambda model, **more: vs.kernel_shap(model, slow.WHITE, num_samples=14, target=0, **OPTIONS, **more),
    "rise": lambda model, **more: vs.rise(model, slow.WHITE, num_samples=40, target=0, output="logit", **more),
}

every_method = pytest.mark.parametrize("explain", METHODS.values(), ids=METHODS)


class CtrlC:
    """A progress callback that raises KeyboardInterrupt after this number of batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self, _: vs.Progress) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@every_method
def test_ctrl_c_returns_a_result_of_the_samples_so_far(explain: Callable[..., Any]) -> None:
    with pytest.warns(vs.VitscopeWarning, match=r"interrupted: the result is based on 12") as caught:
        result = explain(linear(), batch_size=4, progress=CtrlC(3))
    assert "\n" not in str(caught[0].message)
    assert result.provenance["interrupted"] is True
    assert result.provenance["samples"] == 12
    assert torch.isfinite(result.values).all()


def test_after_ctrl_c_the_weights_are_those_of_fewer_samples() -> None:
    with pytest.warns(vs.VitscopeWarning, match="interrupted"):
        interrupted = METHODS["lime"](linear(), batch_size=10, progress=CtrlC(2))
    complete = vs.lime(linear(), slow.WHITE, num_samples=20, batch_size=10, target=0, **OPTIONS)
    torch.testing.assert_close(interrupted.weights, complete.weights)
    assert complete.provenance["interrupted"] is False


def test_ctrl_c_ends_automatic_sampling_too() -> None:
    options = OPTIONS | {"num_samples": "auto", "batch_size": 32}
    with pytest.warns(vs.VitscopeWarning, match=r"^interrupted: the result is based on 96 samples$"):
        result = vs.lime(linear(), slow.WHITE, progress=CtrlC(3), **options)
    assert result.provenance["samples"] == 96
    assert result.provenance["interrupted"] is True


@every_method
def test_ctrl_c_before_two_samples_is_raised(explain: Callable[..., Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        explain(linear(), batch_size=1, progress=CtrlC(1))


def test_interrupted_occlusion_has_values_of_the_evaluated_windows() -> None:
    model = family("timm-vit").model()
    pixels = family("timm-vit").pixels(1)
    with pytest.warns(vs.VitscopeWarning, match="interrupted: the result is based on 10 of 24"):
        interrupted = vs.occlusion(model, pixels, target=0, batch_size=5, progress=CtrlC(2))
    complete = vs.occlusion(model, pixels, target=0, batch_size=5)
    torch.testing.assert_close(interrupted.values.flatten()[:10], complete.values.flatten()[:10])
    assert not interrupted.values.flatten()[10:].any()


def test_dropping_can_be_interrupted() -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels(1)
    with pytest.warns(vs.VitscopeWarning, match="interrupted"):
        result = vs.lime(
            model, pixels, target=0, num_samples=60, segments="patches", hide="drop", batch_size=4, progress=CtrlC(6)
        )
    assert 6 <= result.provenance["samples"] <= 24
    assert torch.isfinite(result.weights).all()


def out_of(error: Callable[[], BaseException], most: int, sizes: list[int]) -> vs.VisionModel:
    """Return a model with memory for this number of images only."""
    model = linear()

    def forward(pixels: Tensor) -> Tensor | None:
        sizes.append(len(pixels))
        if len(pixels) > most:
            raise error()
        return model.forward(pixels)

    return dataclasses.replace(model, forward=forward)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
    "python": MemoryError,
}


@every_method
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_batches_are_halved_until_the_memory_suffices(
    explain: Callable[..., Any], error: Callable[[], BaseException]
) -> None:
    plenty = explain(linear(), batch_size=16)
    sizes: list[int] = []
    with pytest.warns(vs.VitscopeWarning) as caught:
        little = explain(out_of(error, 5, sizes), batch_size=16)
    assert [str(warning.message) for warning in caught] == [
        "not enough memory for a batch of 16: continuing with 8",
        "not enough memory for a batch of 8: continuing with 4",
    ]
    assert max(sizes[3:]) == 4
    assert little.provenance["samples"] == plenty.provenance["samples"]
    torch.testing.assert_close(little.values, plenty.values, atol=1e-6, rtol=1e-5)


def test_too_little_memory_for_one_image_is_an_error() -> None:
    sizes: list[int] = []
    model = linear()

    def forward(pixels: Tensor) -> Tensor | None:
        sizes.append(len(pixels))
        if len(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return model.forward(pixels)

    with (
        pytest.warns(vs.VitscopeWarning),
        pytest.raises(vs.WorkError, match=r"not enough memory to run .* on a single image") as caught,
    ):
        METHODS["lime"](dataclasses.replace(model, forward=forward), batch_size=4)
    assert "\n" not in str(caught.value)
    assert sizes == [1, 4, 2, 1]


def test_other_errors_of_the_model_are_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        METHODS["lime"](out_of(lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 4, []))


def test_batches_are_halved_while_dropping_too() -> None:
    base, pixels = family("timm-vit").model(), family("timm-vit").pixels(1)

    def forward(batch: Tensor) -> Tensor | None:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return base.forward(batch)

    options: dict[str, Any] = {"target": 0, "num_samples": 40, "segments": "patches", "hide": "drop"}
    plenty = vs.lime(base, pixels, **options)
    with pytest.warns(vs.VitscopeWarning, match="not enough memory for a batch"):
        little = vs.lime(dataclasses.replace(base, forward=forward), pixels, **options)
    torch.testing.assert_close(little.weights, plenty.weights, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["lime", "kernel_shap"])
def test_constant_outputs_give_zero_weights(method: str) -> None:
    model = model_of(lambda visible: torch.full((len(visible), 2), 1 / 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = METHODS[method](model)
    assert not result.weights.any()
    assert not result.values.any()
    assert (result.intercept, result.score) == (pytest.approx(1 / 3), 1)
    assert result.intervals is None or not result.intervals.any()
    if method == "lime":
        (message,) = [str(warning.message) for warning in caught]
        assert message == "the output for 'class 0' is the same for all 40 masks: all weights are zero"


def test_constant_outputs_are_drawn_without_further_warnings(recwarn: pytest.WarningsRecorder) -> None:
    model = model_of(lambda visible: torch.zeros(len(visible), 2))
    with pytest.warns(vs.VitscopeWarning, match="is the same for all 40 masks"):
        result = METHODS["lime"](model)
    assert result.overlay().size == (16, 8)
    assert result.top() == []
    assert not result.regions().any()
    assert not recwarn.list


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("moment", ["original", "hidden"])
def test_an_output_that_is_not_finite_is_refused(explain: Callable[..., Any], bad: float, moment: str) -> None:
    def logits(visible: Tensor) -> Tensor:
        spoilt = torch.ones(len(visible)) if moment == "original" else (visible.sum(1) < 3).float()
        return visible @ LINEAR + torch.where(spoilt[:, None] > 0, bad, 0.0)

    with pytest.raises(vs.WorkError, match="came out as NaN or infinity: check the model's weights") as caught:
        explain(model_of(logits))
    assert "\n" not in str(caught.value)


def test_a_model_that_stops_returning_classes_is_refused() -> None:
    model, calls = linear(), []

    def forward(pixels: Tensor) -> Tensor | None:
        calls.append(1)
        return model.forward(pixels) if len(calls) == 1 else None

    with pytest.raises(vs.WorkError, match="returned classes for the original image, but none for a perturbed one"):
        METHODS["lime"](dataclasses.replace(model, forward=forward))


def test_memory_holds_at_most_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the next batch is rendered while the model runs on the current one."""
    rendered_indices: list[int] = []
    batch_sizes: list[int] = []
    render, model = Renderer._render, linear()
    monkeypatch.setattr(
        Renderer, "_render", lambda self, masks, index: rendered_indices.append(index) or render(self, masks, index)
    )

    def forward(pixels: Tensor) -> Tensor | None:
        batch_sizes.append(len(pixels))
        assert len(rendered_indices) <= sum(batch_sizes[1:]) + 8
        return model.forward(pixels)

    METHODS["lime"](dataclasses.replace(model, forward=forward), batch_size=8)
    assert sum(batch_sizes) == 41
    assert sorted(rendered_indices) == list(range(40))


# Models are unchanged


class TroubleError(Exception):
    pass


LEAVING = ["timm-vit", "transformers-beit", "transformers-dinov3", "torchvision-vit"]


def every_way(model: Any, pixels: Tensor) -> list[Callable[[], Any]]:
    bare = (model if isinstance(model, vs.VisionModel) else vs.load(model)).embed is not None
    common: dict[str, Any] = {"target": "similarity" if bare else 0}
    return [
        lambda: vs.lime(model, pixels, num_samples=30, segments="patches", hide="drop", **common),
        lambda: vs.lime(model, pixels, num_samples=30, segments="patches", hide="noise", **common),
        lambda: vs.kernel_shap(model, pixels, num_samples=50, segments="patches", **common),
        lambda: vs.occlusion(model, pixels, **common),
        lambda: vs.occlusion(model, pixels, hide="drop", **common),
        lambda: vs.rise(model, pixels, num_samples=10, **common),
        lambda: vs.rise(model, pixels, num_samples=10, hide="drop", **common),
    ]


# The type checks draw random numbers of their own.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LEAVING)
def test_methods_do_not_change_the_model(name: str) -> None:
    model, pixels = family(name).model(), family(name).pixels(1)
    mixed(model.module)
    before = state(model.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        for way in [*every_way(model, pixels), *every_way(model.module, pixels)]:
            way()
    assert_same(state(model.module), before)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_failing_methods_do_not_change_the_model(name: str, after: int) -> None:
    """The model raises in its second block, or Ctrl-C comes there before any output, after this number of runs."""
    model, pixels = family(name).model(), family(name).pixels(1)
    mixed(model.module)
    norms = [child for child in model.module.modules() if isinstance(child, torch.nn.LayerNorm)]
    ways = every_way(model, pixels)
    for error in (TroubleError, KeyboardInterrupt)[: 2 if after <= 2 else 1]:
        runs: list[int] = []

        def trouble(*_: Any, error: type[BaseException] = error, runs: list[int] = runs) -> None:
            runs.append(1)
            if len(runs) >= after:
                raise error

        handle = norms[2].register_forward_pre_hook(trouble)
        before = state(model.module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vs.VitscopeWarning)
            for way in ways if after <= 2 else ways[:1]:
                runs.clear()
                with pytest.raises(error):
                    way()
        assert_same(state(model.module), before)
        handle.remove()


def test_a_masked_model_equals_the_model_on_masked_photos() -> None:
    model, photo = family("timm-vit").model(), noise(50, 70)
    (subject,) = subjects(model, photo)
    assert isinstance(subject, Subject)
    masked_model = MaskedModel(
        model, subject, PerturbationOptions(hide="grey", output="logit", batch_size=3), segments="patches"
    )
    assert masked_model.segments is not None
    rows = np.random.default_rng(0).integers(0, 2, (7, masked_model.segments.count)).astype(bool)
    evaluations = masked_model.evaluate(masked_model.masks(rows), [5, 0])
    assert evaluations.evaluated.all()
    assert not evaluations.interrupted
    visible = [np.append(row, True)[masked_model.segments.index][..., None] for row in rows]
    photos = [np.where(mask, photo, np.uint8(128)) for mask in visible]
    with torch.no_grad(), model.running():
        expected = model.answer(model.prepare(photos)[0])
    assert expected is not None
    assert evaluations.outputs == pytest.approx(expected[:, [5, 0]].double().numpy(), abs=1e-5)


def test_progress_continues_over_several_evaluations() -> None:
    steps: list[tuple[int, int]] = []
    (subject,) = subjects(linear(), slow.WHITE)
    masked_model = MaskedModel(
        linear(),
        subject,
        PerturbationOptions(hide="black", batch_size=4),
        segments=LABELS,
        report=lambda step: steps.append((step.completed, step.total)),
    )
    masks = masked_model.masks(np.ones((6, 4), dtype=bool))
    masked_model.evaluate(masks, [0])
    masked_model.evaluate(masks, [0], before=6, total=12)
    assert steps == [(4, 6), (6, 6), (10, 12), (12, 12)]
    assert all(first[0] < second[0] for first, second in pairwise(steps))
