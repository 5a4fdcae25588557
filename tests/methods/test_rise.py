"""RISE: equal to a slow reference, and flat for constant outputs."""

from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.perturbed import noise
from tests.helpers.tiny import tiny_vit
from tests.reference import lime as slow
from tests.reference import rise as slow_rise
from vitscope.estimators.soft_masks import soft_mask


@pytest.mark.parametrize("size", [(8, 16), (9, 14)], ids=str)
@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_rise_equals_the_slow_reference(size: tuple[int, int], probability: float) -> None:
    labels = slow.stripes(4, size)
    model = vs.load(slow.Known(labels, lambda shares: torch.stack([shares[:, 1], shares.prod(1)], 1)), image_size=size)
    photo = np.full((*size, 3), 255, np.uint8)
    random = np.random.default_rng(6)
    bits, shifts = random.random((25, 3, 3)) < probability, random.random((25, 2))
    masks = slow_rise.masks(bits, shifts, size)
    outputs = []
    for mask in masks:
        shares = np.array([mask[labels == label].mean() for label in range(4)])
        outputs.append(shares[1])
    options: dict[str, Any] = {
        "num_samples": 25,
        "cells": 3,
        "keep_probability": probability,
        "seed": 6,
        "hide": "black",
        "output": "logit",
    }
    result = vs.rise(model, photo, target=0, **options)
    assert result.values[0].numpy() == pytest.approx(slow_rise.rise(outputs, masks, probability), abs=1e-5)
    assert not result.signed
    assert (result.grid.height, result.grid.width) == size


@pytest.mark.parametrize("size", [(7, 7), (20, 31), (224, 300)], ids=str)
def test_masks_of_rise_are_bilinear_and_shifted_by_less_than_a_cell(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    bits, shifts = random.random((3, 7, 7)) < 0.5, random.random((3, 2))
    shifts[1], shifts[2] = 0.0, np.nextafter(1, 0)
    for index in range(3):
        mask = soft_mask(bits[index], shifts[index], size)
        assert mask.shape == size
        assert mask.min() >= 0
        assert mask.max() <= 1
        if size[0] < 100:
            (expected,) = slow_rise.masks(bits[index : index + 1], shifts[index : index + 1], size)
            assert mask == pytest.approx(expected, abs=1e-5)


def test_hidden_pixels_have_the_mean_colour_of_the_image() -> None:
    """RISE has no segments whose mean they could have."""
    model, photo = vs.load(tiny_vit()), noise(32, 32)
    colour = photo.mean((0, 1)).astype(np.uint8).tolist()
    result = vs.rise(model, photo, target=0, num_samples=20)
    assert torch.equal(result.values, vs.rise(model, photo, target=0, num_samples=20, hide=colour).values)
    assert not torch.equal(result.values, vs.rise(model, photo, target=0, num_samples=20, hide="black").values)
    assert result.provenance["parameters"]["hide"] == "mean"


def test_rise_highlights_the_region_that_the_output_depends_on() -> None:
    labels = slow.stripes(4)
    model = vs.load(
        slow.Known(labels, lambda shares: torch.stack([shares[:, 2], 1 - shares[:, 2]], 1)), image_size=(8, 16)
    )
    values = (
        vs.rise(model, slow.WHITE, target=0, num_samples=600, cells=4, hide="black", output="logit").values[0].numpy()
    )
    means = [values[labels == label].mean() for label in range(4)]
    assert np.argmax(means) == 2
    assert means[2] > 1.1 * max(means[0], means[1])


@pytest.mark.slow
def test_a_constant_output_gives_a_flat_map() -> None:
    """The pattern of the masks, which explains nothing, is removed, with a warning."""
    model = vs.load(slow.Known(slow.stripes(4), lambda shares: torch.full((len(shares), 2), 0.7)), image_size=(8, 16))
    with pytest.warns(vs.VitscopeWarning, match="stays 0.7 for all 3000 masks, so the map shows nothing"):
        values = vs.rise(model, slow.WHITE, target=0, num_samples=3000, output="logit", keep_probability=0.3).values
    assert values.numpy() == pytest.approx(np.full((1, 8, 16), 0.7), abs=1e-6)


def test_outputs_that_differ_by_rounding_alone_count_as_constant() -> None:
    """Batches of other sizes may change the last bit of a float32."""
    labels, bit = slow.stripes(4), 2**-23
    model = vs.load(
        slow.Known(labels, lambda shares: (0.75 * (1 + bit * shares[:, 2].round()))[:, None].expand(-1, 2)),
        image_size=(8, 16),
    )
    with pytest.warns(vs.VitscopeWarning, match="so the map shows nothing"):
        values = vs.kernel_shap(model, slow.WHITE, target=0, segments=labels, hide="black", output="logit").weights
    assert values.tolist() == [0.0] * 4


def test_rise_of_a_large_photo_has_at_most_512_pixels_per_side() -> None:
    model = vs.load(tiny_vit())
    result = vs.rise(model, noise(300, 700), target=0, num_samples=2)
    assert result.values.shape == (1, 219, 512)
    assert result.overlay().size == (700, 300)
