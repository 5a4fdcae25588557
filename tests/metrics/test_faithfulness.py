"""Deletion and insertion: equal to a plain loop, and the properties that such a metric must have."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.helpers.coloured import small_swin, small_vit
from tests.helpers.tiny import tiny_vit
from tests.reference import faithfulness as slow
from tests.tracing.test_foreign import LAYOUT, Homemade
from vitscope.images.preprocessing import Preprocessing

AREAS = ("deletion", "insertion")
CELLS = (4, 4)


def photos(count: int, height: int = 32, width: int = 32) -> list[np.ndarray]:
    """Return noise whose brightness differs from patch to patch."""
    generator = np.random.default_rng(3)
    coarse = generator.integers(0, 200, (count, 4, 4, 3)).repeat(height // 4, 1).repeat(width // 4, 2)
    return list((coarse + generator.integers(0, 56, coarse.shape)).astype(np.uint8))


def maps(count: int, side: int = 4) -> vs.Attribution:
    values = torch.rand(count, side, side, generator=torch.Generator().manual_seed(0))
    return vs.Attribution(values, vs.Grid(side, side))


def marking(patch: int) -> vs.Attribution:
    return vs.Attribution(torch.eye(16)[patch].view(1, 4, 4), vs.Grid(4, 4))


def amplified(model: vs.VisionModel) -> vs.VisionModel:
    """Scale the weights so that outputs differ from image to image."""
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(3) if parameter.ndim > 1 else None
    return model


class PatchReader(nn.Module):
    """Two classes: the brightness of one patch of sixteen, and zero."""

    def __init__(self, patch: int, strength: float = 2.0) -> None:
        super().__init__()
        self.row, self.column = divmod(patch, 4)
        self.strength = strength
        self.unused = nn.Linear(1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        patch = pixels[:, :, 8 * self.row : 8 * self.row + 8, 8 * self.column : 8 * self.column + 8]
        return torch.stack([self.strength * patch.mean((1, 2, 3)), torch.zeros(len(pixels))], dim=1)


def patch_reader(patch: int, strength: float = 2.0) -> vs.VisionModel:
    return vs.load(PatchReader(patch, strength), image_size=32, patch_size=8, readout="patches")


def evaluator(model: vs.VisionModel) -> slow.Answer:
    def probabilities(image: np.ndarray) -> np.ndarray:
        with torch.no_grad(), model.running():
            logits = model.logits(model.prepare(image)[0])
        assert logits is not None
        return logits[0].double().softmax(-1).numpy()

    return probabilities


BUILDS: dict[str, Any] = {
    "vit": lambda: amplified(small_vit()),
    "swin": lambda: dataclasses.replace(amplified(small_swin()), preprocessing=Preprocessing((32, 32))),
    "foreign": lambda: vs.load(Homemade("fused"), image_size=32, **LAYOUT),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "steps", "target"),
    [
        ("vit", (32, 32), 10, None),
        ("vit", (64, 96), 4, 2),
        ("vit", (32, 32), 1, None),
        ("swin", (32, 32), 5, None),
        ("swin", (48, 32), 16, 1),
        ("foreign", (32, 40), 3, None),
    ],
    ids=str,
)
def test_areas_equal_a_plain_loop(kind: str, size: tuple[int, int], steps: int, target: int | None) -> None:
    model, images = BUILDS[kind](), photos(2, *size)
    result = maps(2, 8 if kind == "swin" else 4)
    areas = vs.faithfulness(model, images, result, steps=steps, seed=7, target=target)
    generator, evaluate = np.random.default_rng(7), evaluator(model)
    for index, photo in enumerate(images):
        column = int(evaluate(photo).argmax()) if target is None else target
        orders = {
            "": slow.ranked(result.values[index].double().numpy(), CELLS),
            "random_": generator.permutation(16).tolist(),
        }
        for prefix, order in orders.items():
            expected = slow.areas(evaluate, photo, order, CELLS, column, steps)
            for name, area in zip(AREAS, expected, strict=True):
                assert getattr(areas, prefix + name)[index] == pytest.approx(area, abs=2e-5), prefix + name


@pytest.mark.slow
def test_the_outputs_of_the_plain_loop_vary() -> None:
    """Otherwise equal areas would prove nothing."""
    for build in BUILDS.values():
        model = build()
        areas = vs.faithfulness(model, photos(2), maps(2, 8 if model.library == "timm" else 4), target=0)
        assert abs(areas.deletion - areas.insertion).max() > 5e-4
        assert abs(areas.deletion - areas.random_deletion).max() > 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("patch", [0, 6, 15])
def test_the_patch_that_is_read_has_the_lowest_deletion_and_the_highest_insertion(patch: int) -> None:
    photo = np.full((32, 32, 3), 90, dtype=np.uint8)
    row, column = divmod(patch, 4)
    photo[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
    areas = [vs.faithfulness(patch_reader(patch), photo, marking(marked), steps=16, target=0) for marked in range(16)]
    deletions, insertions = ([float(getattr(area, name)[0]) for area in areas] for name in AREAS)
    assert np.argmin(deletions) == np.argmax(insertions) == patch
    assert sorted(deletions)[1] > deletions[patch] + 0.01
    assert sorted(insertions)[-2] < insertions[patch] - 1e-4


def test_a_constant_model_has_the_same_area_for_every_map() -> None:
    model = patch_reader(3, strength=0.0)
    areas = vs.faithfulness(model, photos(3), maps(3), steps=7)
    for name in (*AREAS, "random_deletion", "random_insertion"):
        np.testing.assert_allclose(getattr(areas, name), [0.5] * 3, atol=1e-12)


def test_a_constant_map_ranks_the_patches_in_order() -> None:
    model, photo = patch_reader(0), photos(1)
    constant = vs.Attribution(torch.ones(1, 4, 4), vs.Grid(4, 4))
    descending = vs.Attribution(torch.arange(16, 0, -1).float().view(1, 4, 4), vs.Grid(4, 4))
    first, second = (vs.faithfulness(model, photo, result, steps=5) for result in (constant, descending))
    assert (first.deletion, first.insertion) == (second.deletion, second.insertion)


@pytest.mark.slow
def test_the_random_order_depends_on_the_seed_and_not_on_the_map() -> None:
    model = amplified(small_vit())
    first, again, reseeded = (vs.faithfulness(model, photos(2), maps(2), seed=seed) for seed in (1, 1, 2))
    inverted = vs.faithfulness(model, photos(2), vs.Attribution(-maps(2).values, vs.Grid(4, 4)), seed=1)
    for name in AREAS:
        assert np.array_equal(getattr(first, f"random_{name}"), getattr(again, f"random_{name}"))
        assert np.array_equal(getattr(first, f"random_{name}"), getattr(inverted, f"random_{name}"))
        assert not np.array_equal(getattr(first, f"random_{name}"), getattr(reseeded, f"random_{name}"))
        assert np.array_equal(getattr(first, name), getattr(reseeded, name))
        assert not np.array_equal(getattr(first, name), getattr(inverted, name))


def test_each_image_is_shuffled_separately() -> None:
    areas = vs.faithfulness(amplified(small_vit()), photos(1) * 2, vs.Attribution.join([maps(1)] * 2))
    assert areas.deletion[0] == areas.deletion[1]
    assert areas.random_deletion[0] != areas.random_deletion[1]


def test_more_steps_than_patches_equal_one_step_per_patch() -> None:
    model = amplified(small_vit())
    many, all_of_them, few = (vs.faithfulness(model, photos(1), maps(1), steps=steps) for steps in (100, 16, 3))
    for name in AREAS:
        assert np.array_equal(getattr(many, name), getattr(all_of_them, name))
        assert not np.array_equal(getattr(many, name), getattr(few, name))


def test_the_batch_size_does_not_change_the_areas() -> None:
    model = amplified(small_vit())
    small, large = (vs.faithfulness(model, photos(1), maps(1), batch_size=size) for size in (3, 64))
    np.testing.assert_allclose(small.deletion, large.deletion, atol=1e-6)
    np.testing.assert_allclose(small.insertion, large.insertion, atol=1e-6)


def test_a_target_is_an_index_or_a_label() -> None:
    model = vs.load(tiny_vit())
    by_index, by_label = (vs.faithfulness(model, photos(1), maps(1), target=target) for target in (3, "thing 3"))
    assert by_index.deletion == by_label.deletion
    likeliest = vs.faithfulness(model, photos(1), maps(1))
    named = vs.faithfulness(model, photos(1), maps(1), target=model.predict(photos(1))[0][0].index)
    assert likeliest.deletion == named.deletion


def test_tensors_and_live_modules_are_evaluated_too() -> None:
    model = amplified(small_vit())
    pixels, _ = model.prepare(photos(2))
    result = vs.rollout(model, pixels)
    areas = vs.faithfulness(model.module, pixels, result, steps=4)
    assert areas.deletion.shape == areas.random_insertion.shape == (2,)
    for name in (*AREAS, "random_deletion", "random_insertion"):
        assert ((getattr(areas, name) >= 0) & (getattr(areas, name) <= 1)).all()
    by_photo = vs.faithfulness(model, photos(2), result, steps=4)
    np.testing.assert_allclose(areas.deletion, by_photo.deletion, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_images_is_refused(count: int) -> None:
    with pytest.raises(vs.CallError, match=f"^{count} images and an attribution of 2: pass the images"):
        vs.faithfulness(small_vit(), photos(count), maps(2))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(vs.CallError, match="steps is 0"):
        vs.faithfulness(small_vit(), photos(1), maps(1), steps=0)
    with pytest.raises(vs.CallError, match="seed is -1"):
        vs.faithfulness(small_vit(), photos(1), maps(1), seed=-1)
    with pytest.raises(vs.CallError):
        vs.faithfulness(small_vit(), photos(1), maps(1), target=99)
