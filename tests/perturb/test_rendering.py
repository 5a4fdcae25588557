"""The model's input for a mask equals that for the perturbed photo."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitscope as vs
from tests.helpers.perturbed import CROPS, family, noise, squares
from tests.reference import lime as slow
from vitscope.images.preprocessing import Preprocessing
from vitscope.perturb.baselines import fill
from vitscope.perturb.masks import PixelMasks, SegmentMasks
from vitscope.perturb.rendering import Renderer, subjects
from vitscope.perturb.segments import segment


def rendered(renderer: Renderer, masks: Any, indices: list[int]) -> Tensor:
    with ThreadPoolExecutor(2) as threads:
        return renderer.finish(renderer.start(threads, masks, indices))


def with_recipe(recipe: Preprocessing) -> vs.VisionModel:
    return dataclasses.replace(family("timm-vit").model(), preprocessing=recipe)


HIDES: list[Any] = ["mean", "black", "grey", "blur", "noise", 40, (10, 200, 30), noise(9, 9, seed=3)]


@pytest.mark.slow
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
    cut_photo = Preprocessing.resize_and_crop
    monkeypatch.setattr(
        Preprocessing, "resize_and_crop", lambda self, photo, name="": calls.append(1) or cut_photo(self, photo, name)
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
