"""The source of a model's preprocessing: the provenance is correct, and nothing is guessed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.live import PHOTO, SIZE, WithOutput, hf_vit, images, timm_vit, torchvision_vit
from vitscope.errors import CallError
from vitscope.images.preprocessing import Preprocessing

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def source(model: vs.VisionModel) -> str:
    """Return the source of the preprocessing in the provenance of a result."""
    record = vs.capture(model, PHOTO).provenance["preprocessing"]
    assert model.preprocessing is not None
    assert record["mean"] == pytest.approx(list(model.preprocessing.mean))
    return str(record["source"])


def processor() -> Any:
    import transformers

    return transformers.ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD)


def saved(tmp_path: Path) -> Path:
    hf_vit(5).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    return tmp_path / "saved"


SOURCES: dict[str, tuple[Callable[[], vs.VisionModel], str]] = {
    "timm": (lambda: vs.load(timm_vit(5)), "timm's pretrained_cfg"),
    "torchvision": (
        lambda: vs.load(torchvision_vit(5)),
        "torchvision's for ImageNet, because a live module does not state its own",
    ),
    "transformers": (
        lambda: vs.load(hf_vit(5)),
        "the default of the model's family, because the model does not come from a checkpoint",
    ),
    "bundled": (lambda: vs.load("vit-nano"), "preprocessor_config.json of vit-nano"),
    "random": (
        lambda: vs.load("timm:test_vit", pretrained=False),
        "timm's pretrained_cfg",
    ),
    "container": (lambda: vs.load(WithOutput()), "timm's pretrained_cfg of backbone"),
    "mean": (lambda: vs.load(timm_vit(5), mean=MEAN), "timm's pretrained_cfg; mean passed to load"),
    "mean and std": (
        lambda: vs.load(timm_vit(5), mean=MEAN, std=STD),
        "timm's pretrained_cfg; mean and std passed to load",
    ),
    "all passed": (
        lambda: vs.load(Plain(), image_size=SIZE, mean=MEAN, std=STD, output="logits"),
        "mean, std and image_size passed to load",
    ),
    "image_size alone": (
        lambda: vs.load(Plain(), image_size=SIZE, output="logits"),
        "image_size alone: pixels from -1 to 1 (mean 0.5, std 0.5)",
    ),
    "processor": (lambda: vs.load(timm_vit(5), processor=processor()), "the ViTImageProcessorPil passed to load"),
    "settings": (lambda: vs.load(timm_vit(5), processor=processor().to_dict()), "the processor passed to load"),
    "transforms": (
        lambda: vs.load(timm_vit(5, img_size=224), processor=transforms()),
        "torchvision's transforms passed to load",
    ),
}


class Plain(nn.Module):
    """A transformer from none of the libraries."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Conv2d(3, 16, 8, 8), nn.Linear(16, 5)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.block(self.embed(pixels).flatten(2).mT).mean(1))


def transforms() -> Any:
    from torchvision.models import ViT_B_16_Weights

    return ViT_B_16_Weights.IMAGENET1K_V1.transforms()


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
def test_the_provenance_names_the_source_of_the_preprocessing(kind: str) -> None:
    build, expected = SOURCES[kind]
    assert source(build()) == expected


def test_a_folder_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    processor().save_pretrained(path)
    assert source(vs.load(str(path))).startswith("preprocessor_config.json of ")
    assert vs.load(str(path)).preprocessing.mean == pytest.approx(MEAN)  # type: ignore[union-attr]


def test_a_folder_without_its_processor_takes_no_photos(tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = vs.load(str(path))
    assert model.preprocessing is None
    with pytest.raises(CallError) as caught:
        model.predict(PHOTO)
    message = str(caught.value)
    assert "\n" not in message
    assert "preprocessor_config.json" in message
    for argument in ("image_size", "mean", "std", "processor"):
        assert argument in message
    assert len(model.predict(images(1))) == 1
    described = vs.load(str(path), image_size=SIZE, mean=MEAN, std=STD)
    assert torch.allclose(described.prepare(PHOTO)[0], reference_pixels(PHOTO, MEAN, STD), atol=1e-5)
    assert source(described) == "mean, std and image_size passed to load"
    assert source(vs.load(str(path), processor=processor())) == "the ViTImageProcessorPil passed to load"


def test_image_size_alone_does_not_define_the_preprocessing_of_a_known_model(tmp_path: Path) -> None:
    model = vs.load(str(saved(tmp_path)), image_size=SIZE)
    with pytest.raises(CallError, match="came without preprocessing"):
        model.predict(PHOTO)


def reference_pixels(photo: Image.Image, mean: list[float], std: list[float]) -> Tensor:
    """Return the photo resized bilinearly by Pillow, scaled to [0, 1] and normalised."""
    small = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float64)
    small = small if small.ndim == 3 else small[..., None]
    return torch.from_numpy((small / 255 - mean) / std).permute(2, 0, 1)[None].float()


FORMS: dict[str, Callable[[Path], Any]] = {
    "object": lambda _: processor(),
    "settings": lambda _: processor().to_dict(),
    "folder": lambda path: (processor().save_pretrained(path), path)[1],
    "folder as text": lambda path: (processor().save_pretrained(path), str(path))[1],
    "file": lambda path: (processor().save_pretrained(path), path / "preprocessor_config.json")[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [timm_vit, torchvision_vit, hf_vit, WithOutput])
def test_a_processor_gives_the_same_pixels_as_the_library(
    build: Callable[[], nn.Module], form: str, tmp_path: Path
) -> None:
    expected = processor()(PHOTO, return_tensors="pt").pixel_values
    model = vs.load(build(), processor=FORMS[form](tmp_path))
    assert torch.allclose(model.prepare(PHOTO)[0], expected, atol=1e-5)


def test_timms_configuration_gives_the_same_pixels_as_timm() -> None:
    import timm.data

    config: dict[str, Any] = {"input_size": (3, SIZE, SIZE), "mean": tuple(MEAN), "std": tuple(STD), "crop_pct": 0.9}
    config |= {"interpolation": "bicubic", "crop_mode": "center"}
    expected = timm.data.create_transform(**config)(PHOTO)[None]
    model = vs.load(WithOutput(), processor=config)
    assert torch.allclose(model.prepare(PHOTO)[0], expected, atol=1e-5)


def test_torchvisions_transforms_give_the_same_pixels_as_torchvision() -> None:
    model = vs.load(timm_vit(5, img_size=224), processor=transforms())
    with_antialias = transforms()(PHOTO)[None]
    assert torch.allclose(model.prepare(PHOTO)[0], with_antialias, atol=1e-5)


def test_a_preprocessing_is_used_unchanged() -> None:
    prepared = Preprocessing((SIZE, SIZE), tuple(MEAN), tuple(STD))
    model = vs.load(timm_vit(5), processor=prepared)
    assert model.preprocessing == prepared
    assert torch.allclose(model.prepare(PHOTO)[0], reference_pixels(PHOTO, MEAN, STD), atol=1e-5)


def test_mean_and_std_replace_those_of_a_known_model() -> None:
    plain = vs.load(hf_vit(5)).prepare(PHOTO)[0]  # mean and std 0.5
    changed = vs.load(hf_vit(5), mean=MEAN, std=STD).prepare(PHOTO)[0]
    mean, std = (torch.tensor(values, device="cpu").view(1, 3, 1, 1) for values in (MEAN, STD))
    assert torch.allclose(changed, (plain * 0.5 + 0.5 - mean) / std, atol=1e-5)


def test_a_single_number_applies_to_all_channels() -> None:
    model = vs.load(Plain(), image_size=SIZE, mean=0.4, std=0.2, output="logits")
    assert torch.allclose(model.prepare(PHOTO)[0], reference_pixels(PHOTO, [0.4] * 3, [0.2] * 3), atol=1e-5)
    mixed = vs.load(Plain(), image_size=SIZE, mean=0.4, std=STD, output="logits")
    assert torch.allclose(mixed.prepare(PHOTO)[0], reference_pixels(PHOTO, [0.4] * 3, STD), atol=1e-5)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mean alone": ({"mean": MEAN, "image_size": SIZE}, "mean and std belong together"),
    "std alone": ({"std": STD, "image_size": SIZE}, "mean and std belong together"),
    "lengths": ({"mean": MEAN, "std": [0.5, 0.5], "image_size": SIZE}, "mean has 3 channels and std 2"),
    "zero": ({"mean": MEAN, "std": [0.5, 0, 0.5], "image_size": SIZE}, "none zero"),
    "words": ({"mean": "imagenet", "std": STD}, "pass one number for each channel"),
    "no processor": ({"processor": 7}, "processor is a int"),
    "no folder": ({"processor": "/nowhere"}, "processor: /nowhere cannot be read"),
    "empty": ({"processor": {}}, "contains no image processor settings"),
    "no size": ({"processor": {"do_resize": False}}, "pass image_size"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.usefixtures("unchecked")
def test_an_invalid_preprocessing_is_refused_in_one_line(kind: str) -> None:
    options, message = WRONG[kind]
    with pytest.raises(CallError) as caught:
        vs.load(Plain(), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


PHOTOS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_models_with_other_numbers_of_channels_take_tensors(library: str, channels: int) -> None:
    module = timm_vit(3, in_chans=channels) if library == "timm" else hf_vit(3, num_channels=channels)
    assert vs.rollout(vs.load(module), images(1, channels)).values.shape == (1, 4, 4)
    assert len(vs.load(module).predict(images(1, channels))[0]) == 3
    with pytest.raises(CallError, match=f"batch, {channels}, height") as caught:
        vs.load(module).predict(images(1, channels + 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_photos_are_converted_to_the_channels(channels: int) -> None:
    module = timm_vit(3, in_chans=channels)
    with pytest.raises(CallError, match="came without preprocessing"):
        vs.load(module).predict(PHOTO)
    mean, std = [0.4] * channels, [0.2] * channels
    model = vs.load(module, image_size=SIZE, mean=mean, std=std)
    if channels not in PHOTOS:
        with pytest.raises(CallError, match="this model takes 13 channels, a photo has 3: pass a tensor"):
            model.predict(PHOTO)
        return
    photo = PHOTO.convert("RGBA").convert(PHOTOS[channels])
    assert torch.allclose(model.prepare(photo)[0], reference_pixels(photo, mean, std), atol=1e-5)
