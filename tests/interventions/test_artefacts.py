"""Artefact tokens: norms, places and attention against a reference, a planted neuron, and models that have none."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import vitscope as vs
from tests.helpers.families import ALL, Family, every_family
from tests.helpers.planted_artefacts import BLOCK, Planted, planted
from tests.reference import artefacts as reference

REAL_VIT = os.environ.get("VITSCOPE_REAL_VIT")  # folder of a real ViT-S/14 of DINOv2, in transformers' layout


@pytest.fixture(scope="module")
def example() -> Planted:
    return planted()


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def test_the_planted_artefacts_are_found(example: Planted) -> None:
    result = vs.artefact_tokens(example.model, example.pixels)
    assert torch.equal(result.places, example.places)
    assert result.share == pytest.approx(4 / 96)
    assert result.first_layer == BLOCK
    assert result.layer == 2
    assert result.threshold == result.thresholds[2]
    assert result.thresholds[0] is None
    assert result.attention_share is not None
    assert result.attention_share > 1.5 * result.share
    assert repr(result) == (
        "<Artefacts of Dinov2WithRegistersForImageClassification: artefacts are 4.17% of patches and 8.2% of the "
        "attention of CLS: norm above 16.01 after block 3 (index 2), from block 2 (index 1) on>"
    )


def test_before_the_planted_block_there_are_none(example: Planted) -> None:
    result = vs.artefact_tokens(example.model, example.pixels, layer=0)
    assert result.threshold is None
    assert not result.places.any()
    assert (result.share, result.attention_share, result.first_layer) == (0.0, 0.0, None)
    assert "no valley between the norms after block 1 (index 0), highest 1.4 × median: no artefacts>" in repr(result)


@pytest.mark.parametrize("layer", [0, -1])
def test_norms_and_attention_are_those_of_the_reference(layer: int) -> None:
    family = next(each for each in ALL if each.name == "timm-vit")
    model = family.model()
    model.module.double()
    pixels = family.pixels().double()
    result = vs.artefact_tokens(model, pixels, layer=layer)
    assert result.attention is not None
    for index, image in enumerate(pixels):
        run = reference.Run(model.module, image)
        torch.testing.assert_close(result.norms[index].double(), torch.stack(run.norms), rtol=1e-6, atol=0)
        expected = run.cls_attention[layer][1:].view(4, 6).float()
        torch.testing.assert_close(result.attention[index], expected, rtol=1e-5, atol=1e-8)


def test_a_batch_of_two_is_two_of_one(example: Planted) -> None:
    both = vs.artefact_tokens(example.model, example.pixels[:2])
    for index in range(2):
        single = vs.artefact_tokens(example.model, example.pixels[index : index + 1])
        assert torch.equal(single.norms[0], both.norms[index])
        assert torch.equal(single.attention[0], both.attention[index])


@every_family
def test_every_family_has_norms_and_keeps_no_hooks(family: Family) -> None:
    model = family.model()
    before = hooks(model.module)
    result = vs.artefact_tokens(model, family.pixels())
    assert result.norms.shape == (2, 3, family.grid.num_tokens)
    assert result.places.shape == (2, family.grid.height, family.grid.width)
    assert result.attention is not None
    assert result.query == ("cls" if "cls" in family.prefix_names else "readout")
    assert hooks(model.module) == before


def test_without_a_readout_the_attention_is_unknown() -> None:
    family = next(each for each in ALL if each.name == "transformers-siglip-head")
    model = family.model()
    model = replace(model, layout=replace(model.layout, readout={}))
    result = vs.artefact_tokens(model, family.pixels())
    assert (result.attention, result.attention_share, result.query) == (None, None, "readout")


def test_refusals(chelsea) -> None:
    with pytest.raises(vs.UnsupportedModelError, match="not supported for swin-nano, a window transformer: pass"):
        vs.artefact_tokens(vs.load("swin-nano"), chelsea)
    model = vs.load("vit-nano")
    with pytest.raises(vs.UnsupportedModelError, match="whose tokens are unknown: pass patch_size"):
        vs.artefact_tokens(replace(model, layout=None), chelsea)
    with pytest.raises(vs.CallError, match="layer 6 is out of range: the model has layers 0 to 5"):
        vs.artefact_tokens(model, chelsea, layer=6)


def test_nothing_is_left_after_an_exception(example: Planted) -> None:
    module = example.model.module
    before = hooks(module)
    broken = example.pixels.clone()
    broken[:] = 1e38  # overflows
    with pytest.raises(vs.WorkError):
        vs.artefact_tokens(example.model, broken)
    assert hooks(module) == before


@pytest.mark.slow
@pytest.mark.skipif(REAL_VIT is None, reason="VITSCOPE_REAL_VIT does not name the folder of a real ViT-S/14")
def test_a_real_small_vit_has_no_artefacts() -> None:
    import skimage.data

    assert REAL_VIT is not None
    model = vs.load(Path(REAL_VIT))
    photos = [skimage.data.chelsea(), skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket()]
    result = vs.artefact_tokens(model, photos)
    assert result.thresholds == (None,) * 12
    assert "no valley" in repr(result)
    patches = result.norms[:, :, 1:].movedim(1, 0).flatten(1)
    ratio = patches.amax(1) / patches.median(1).values
    assert float(ratio.max()) < 2.5
