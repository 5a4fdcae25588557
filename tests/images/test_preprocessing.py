"""Preprocessing gives the pixels of the library's own processor, and the box from which they came."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vitscope.errors import CallError
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.backends.transformers.backend import read_processor

# (width, height): landscape, portrait, square, strips, smaller and larger than the input, one pixel more.
SIZES = [(451, 300), (300, 451), (100, 100), (37, 211), (523, 65), (33, 31), (224, 224), (225, 224), (257, 256)]

# Both resize uint8 with Pillow. The only difference is the rounding of (x / 255 − mean) / std in float32.
ATOL = 1e-5


def photo(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def assert_same_pixels(preprocessing: Preprocessing, library: Any) -> None:
    for size in SIZES:
        expected: Tensor = library(photo(size))
        actual, _ = preprocessing(photo(size))
        assert actual.dtype == torch.float32
        torch.testing.assert_close(
            actual, expected.float(), atol=ATOL, rtol=0, msg=lambda text, size=size: f"{size}: {text}"
        )


# transformers


def processor(name: str, **options: Any) -> Any:
    import transformers

    instance = getattr(transformers, name)(**options)

    def library(image: Image.Image) -> Tensor:
        return instance(image, return_tensors="pt")["pixel_values"][0]

    library.settings = instance.to_dict()
    return library


PROCESSORS = ["ViT", "DeiT", "Bit", "Beit", "CLIP", "Siglip"]
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PROCESSORS),
    ("Bit", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),  # DINOv2's
    ("ViT", {"size": {"height": 48, "width": 80}, "resample": 3}),
    ("Bit", {"size": {"shortest_edge": 71}, "crop_size": {"height": 48, "width": 64}, "resample": 2}),
    ("DeiT", {"size": {"height": 97, "width": 65}, "crop_size": {"height": 64, "width": 64}}),
    ("ViT", {"do_normalize": False}),
    ("ViT", {"rescale_factor": 1 / 127.5}),
    # A crop larger than the resized image, which is padded with black.
    ("Bit", {"size": {"shortest_edge": 40}, "crop_size": {"height": 65, "width": 65}}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
def test_pixels_equal_those_of_transformers(name: str, options: dict[str, Any]) -> None:
    library = processor(f"{name}ImageProcessorPil", **options)
    assert_same_pixels(read_processor(library.settings), library)


CROPPED = {"size": 256, "crop_size": 224, "do_center_crop": True}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
@pytest.mark.parametrize(
    ("name", "options"),
    # SigLIP takes one number as the shorter side, which does not fix the size without a crop.
    [*((name, CROPPED) for name in PROCESSORS), *((name, {"size": 224}) for name in PROCESSORS if name != "Siglip")],
    ids=str,
)
def test_old_settings_with_one_number_are_read_as_their_class_reads_them(
    name: str, key: str, options: dict[str, Any]
) -> None:
    """256 stands for both sides in DeiT and for the shorter side in CLIP."""
    library = processor(f"{name}ImageProcessorPil", **options)
    saved = {
        key: value
        for key, value in library.settings.items()
        if key not in ("size", "crop_size", "image_processor_type")
    }
    kind = name + ("ImageProcessor" if key == "image_processor_type" else "FeatureExtractor")
    assert_same_pixels(read_processor({**saved, **options, key: kind}), library)


def test_old_settings_without_a_class() -> None:
    legacy = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
    preprocessing = read_processor(legacy)
    assert_same_pixels(preprocessing, processor("ViTImageProcessorPil", size=224))
    assert (preprocessing.size, preprocessing.fit) == ((224, 224), "squash")


def test_missing_settings_come_from_the_processor_class_that_saved_them(tmp_path: Path) -> None:
    """A DINOv2 saved with ViT's processor, which does not crop, must not be cropped as by DINOv2's processor."""
    import transformers

    import vitscope as vs

    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    settings = '{"image_processor_type": "ViTImageProcessor", "size": {"height": 252, "width": 252}}'
    (tmp_path / "preprocessor_config.json").write_text(settings)
    preprocessing = vs.load(tmp_path).preprocessing
    assert preprocessing is not None
    assert_same_pixels(preprocessing, processor("ViTImageProcessorPil", size={"height": 252, "width": 252}))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"size": {"longest_edge": 224}},
        {"size": {"max_height": 9, "max_width": 9}},
        {"size": None},
    ],
    ids=str,
)
def test_settings_without_a_fixed_size_are_refused(settings: Mapping[str, Any]) -> None:
    with pytest.raises(CallError, match="pass image_size"):
        read_processor({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224, **settings})


def test_a_size_that_was_not_saved_can_be_passed(tmp_path: Path) -> None:
    import transformers

    import vitscope as vs

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    transformers.ViTModel(transformers.ViTConfig(**sizes)).save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(do_resize=False, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    with pytest.raises(CallError, match="pass image_size"):
        vs.load(tmp_path)
    preprocessing = vs.load(tmp_path, image_size=(32, 48)).preprocessing
    assert preprocessing is not None
    size = {"height": 32, "width": 48}
    assert_same_pixels(preprocessing, processor("ViTImageProcessorPil", size=size, image_mean=[0.1, 0.2, 0.3]))


# timm

TIMM = [
    {},
    {"crop_pct": 0.875, "interpolation": "bilinear"},
    {"crop_pct": 1.0, "mean": (0.48, 0.45, 0.4), "std": (0.2, 0.3, 0.25)},
    {"crop_pct": 0.95, "crop_mode": "squash"},
    {"crop_pct": 0.9, "interpolation": "lanczos"},
]


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, (64, 64), (48, 80), (80, 48)], ids=str)
@pytest.mark.parametrize("config", TIMM, ids=str)
def test_pixels_equal_those_of_timm(config: dict[str, Any], size: tuple[int, int] | None) -> None:
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config, resolve_model_data_config

    import vitscope as vs

    module = timm.create_model("test_vit", **({} if size is None else {"img_size": size}))
    module.pretrained_cfg = {**module.pretrained_cfg, **config}
    if size is None:
        resolved = resolve_model_data_config(module)
    else:
        resolved = resolve_data_config({"input_size": (3, *size)}, model=module)
    preprocessing = vs.load(module).preprocessing
    assert preprocessing is not None
    assert preprocessing.size == resolved["input_size"][1:] == (size or (160, 160))
    assert_same_pixels(preprocessing, create_transform(**resolved, is_training=False))


def test_timms_padding_mode_takes_tensors_and_refuses_photos() -> None:
    timm = pytest.importorskip("timm")
    import vitscope as vs

    module = timm.create_model("test_vit")
    module.pretrained_cfg = {**module.pretrained_cfg, "crop_mode": "border"}
    model = vs.load(module)
    assert len(model.predict(torch.zeros(1, 3, 160, 160))) == 1
    with pytest.raises(CallError, match=r"'border' pads the image, which is not supported.*pass a tensor"):
        model.predict(photo((160, 160)))


# torchvision


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ViT_B_16_Weights.IMAGENET1K_V1",
        "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",
        "ResNet18_Weights.IMAGENET1K_V1",
        "Swin_T_Weights.IMAGENET1K_V1",
        "Swin_V2_B_Weights.IMAGENET1K_V1",
    ],
)
def test_pixels_equal_those_of_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    from vitscope.models.backends.torchvision.backend import wrap

    weights = torchvision.models.get_weight(name)
    preprocessing = wrap(torch.nn.Sequential(), image_size=None, weights=weights).preprocessing
    assert preprocessing is not None
    assert_same_pixels(preprocessing, weights.transforms())


def test_padding_equals_that_of_torchvision() -> None:
    transforms = pytest.importorskip("torchvision").transforms
    library = transforms.Compose(
        [
            transforms.Resize(40),
            transforms.CenterCrop(65),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    assert_same_pixels(Preprocessing((65, 65), fit="crop", resize_to=(40, 40), round_half_even=True), library)


# The way back to the photo

PREPROCESSINGS = {
    "squash": Preprocessing((64, 64)),
    "squash and crop": Preprocessing((48, 64), resize_to=(64, 96)),
    "crop": Preprocessing((64, 64), fit="crop"),
    "resize and crop": Preprocessing((64, 64), fit="crop", resize_to=(73, 73), round_half_even=True),
    "rectangle": Preprocessing((48, 96), fit="crop", resize_to=(54, 107)),
    "padded": Preprocessing((96, 96), fit="crop", resize_to=(64, 64)),
}


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (333, 320), (50, 40)], ids=str)
@pytest.mark.parametrize("kind", PREPROCESSINGS)
def test_a_marked_region_is_painted_back_at_its_place(kind: str, size: tuple[int, int]) -> None:
    """The model's input, painted back pixel by pixel, lies on the region of the photo that it shows."""
    width, height = size
    marked = np.zeros((height, width, 3), dtype=np.uint8)
    rows, columns = slice(height // 3, height // 2), slice(int(width * 0.45), int(width * 0.7))
    marked[rows, columns] = 255
    values, image = PREPROCESSINGS[kind](Image.fromarray(marked))
    painted = image.paint(values[0].numpy(), smooth=False)
    seen = ~np.isnan(painted)
    bright, expected = painted > 0, marked[..., 0] > 0
    assert seen[expected].all()
    # The edges may differ by the number of pixels that became one pixel of the input.
    scale = max(1.0, (image.box[2] - image.box[0]) / values.shape[2], (image.box[3] - image.box[1]) / values.shape[1])
    edge = int(np.ceil(scale))
    inner, outer = np.zeros_like(expected), np.zeros_like(expected)
    inner[rows.start + edge : rows.stop - edge, columns.start + edge : columns.stop - edge] = True
    outer[rows.start - edge : rows.stop + edge, columns.start - edge : columns.stop + edge] = True
    assert inner.any()
    assert bright[inner].all()
    assert not bright[~outer].any()


@pytest.mark.parametrize("kind", PREPROCESSINGS)
def test_the_box_is_the_region_that_the_model_saw(kind: str) -> None:
    """The colours of the photo are its coordinates, so that the input shows from where its pixels came."""
    width, height = 600, 450
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    preprocessing = PREPROCESSINGS[kind]
    values, image = preprocessing(Image.fromarray(ramp))
    units = (
        values * torch.tensor(preprocessing.std).view(3, 1, 1) + torch.tensor(preprocessing.mean).view(3, 1, 1)
    ).numpy()
    left, top, right, bottom = image.box
    column, row = values.shape[2] // 2, values.shape[1] // 2
    x = left + (column + 0.5) / values.shape[2] * (right - left)
    y = top + (row + 0.5) / values.shape[1] * (bottom - top)
    assert abs(units[0, row, column] * width - x) < width / 100
    assert abs(units[1, row, column] * height - y) < height / 100
    if kind == "padded":
        assert (left, right) == pytest.approx((width / 2 - height * 0.75, width / 2 + height * 0.75), abs=5)
        assert top < 0 < height < bottom
        assert (units[:, :10] == 0).all()
        return
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    quarter = values.shape[2] // 4
    x = left + (quarter + 0.5) / values.shape[2] * (right - left)
    assert abs(units[0, row, quarter] * width - x) < width / 100


def test_another_size_keeps_the_cropped_fraction() -> None:
    preprocessing = Preprocessing((224, 224), fit="crop", resize_to=(256, 256))
    larger = preprocessing.resized((448, 336))
    assert larger.size == (448, 336)
    assert larger.resize_to == (512, 384)
    _, before = preprocessing(photo((800, 800)))
    _, after = preprocessing.resized((448, 448))(photo((800, 800)))
    assert after.box == pytest.approx(before.box)


def test_the_image_of_a_tensor_equals_the_photo_it_was_made_from() -> None:
    preprocessing = Preprocessing((32, 48), mean=(0.48, 0.45, 0.4), std=(0.2, 0.3, 0.25))
    original = photo((48, 32))
    image = preprocessing.image_of(preprocessing(original)[0])
    assert np.array_equal(np.asarray(image.photo), np.asarray(original))
    assert image.box == (0, 0, 48, 32)
