"""Colours of maps in overlays and in figures: none without contrast, and blocks for coarser patches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from vitscope.results.colours import is_flat
from vitscope.views.figure import render
from vitscope.views.scene import Panel

FLAT = {
    "zero": torch.zeros(1, 2, 3, device="cpu"),
    "positive": torch.full((1, 2, 3), 0.3, dtype=torch.float32, device="cpu"),
    "negative": torch.full((1, 2, 3), -7.0, dtype=torch.float32, device="cpu"),
    "rounding": 0.1 + torch.arange(6, dtype=torch.float32, device="cpu").view(1, 2, 3) * 1e-8,
}


def result(values: torch.Tensor, signed: bool, chelsea: np.ndarray) -> vs.Attribution:
    image = vs.InputImage(Image.fromarray(chelsea), (0.0, 0.0, 451.0, 300.0))
    return vs.Attribution(values, vs.Grid(*values.shape[1:]), [image], {}, "cat", signed)


def colourfulness(image: Image.Image) -> int:
    return int(np.ptp(np.asarray(image).astype(int), axis=-1).max())


@pytest.mark.slow
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("values", [*FLAT.values(), FLAT["positive"][:, :1, :1]], ids=[*FLAT, "one patch"])
def test_a_flat_map_leaves_the_photo_grey(chelsea: np.ndarray, values: torch.Tensor, signed: bool) -> None:
    flat = result(values, signed, chelsea)
    for alpha in (0.1, 0.6, 0.9):
        image = flat.overlay(alpha)
        assert colourfulness(image) == 0
        assert np.asarray(image).std() > 5, "the photo can still be recognised"
    panel = Panel(flat.images[0], values[0].numpy(), signed=signed)
    assert colourfulness(render(panel, (90, 60))) == 0
    if not signed:
        assert np.array_equal(np.asarray(flat.overlay(0.0)), chelsea)
    assert np.ptp(np.asarray(flat.overlay(1.0)).astype(int), axis=(0, 1)).max() == 0, "the map alone is one colour"


@pytest.mark.parametrize("signed", [False, True])
def test_a_map_with_contrast_is_coloured(chelsea: np.ndarray, signed: bool) -> None:
    values = 0.1 + torch.arange(6, dtype=torch.float32, device="cpu").view(1, 2, 3) * 1e-5
    assert colourfulness(result(values, signed, chelsea).overlay()) > 30


def test_a_flat_map_is_coloured_if_limits_are_given(chelsea: np.ndarray) -> None:
    image = vs.InputImage(Image.fromarray(chelsea), (0.0, 0.0, 451.0, 300.0))
    values = np.full((2, 3), 0.9, dtype=np.float32)
    assert colourfulness(render(Panel(image, values, limits=(0.0, 1.0)), (90, 60))) > 30


def test_flatness_ignores_unseen_pixels() -> None:
    assert is_flat(np.array([np.nan, 0.5, 0.5]))
    assert is_flat(np.array([np.nan, np.nan]))
    assert not is_flat(np.array([np.nan, 0.5, 0.6]))
    assert not is_flat(np.array([0.0, 1e-30]))


def test_a_map_that_repeats_coarser_patches_is_drawn_in_blocks(chelsea: np.ndarray) -> None:
    coarse = torch.tensor([[[1.0, -2.0], [0.5, 3.0]]], device="cpu")
    blocks = result(coarse.repeat_interleave(2, 1).repeat_interleave(2, 2), True, chelsea)
    colours = np.asarray(blocks.overlay(1.0)).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == 4
    panel = Panel(blocks.images[0], blocks.values[0].numpy(), signed=True)
    flat = replace(panel, flat=True)
    assert np.array_equal(render(panel, (90, 60)), render(flat, (90, 60)))
    interpolated = result(coarse, True, chelsea)
    assert len(np.unique(np.asarray(interpolated.overlay(1.0)).reshape(-1, 3), axis=0)) > 4
