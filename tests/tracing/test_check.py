"""check() rejects wrong layouts and confirms correct ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import vitscope as vs
from tests.attention.test_flow import homemade_ensemble, random, timm_parallel
from tests.helpers.families import Family, every_family
from tests.tracing.test_foreign import LAYOUT, Homemade
from vitscope.errors import UnsupportedModelError
from vitscope.models.layout import Layout


@pytest.mark.slow
@every_family
def test_the_layout_of_a_known_class_is_confirmed(family: Family) -> None:
    report = vs.check(family.model(), family.pixels(1))
    assert report.grid == family.grid
    assert report.readout == family.readout
    assert (report.layers, report.chained) == (3, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit-nano", "swin-nano"])
def test_bundled_models_are_checked_without_images(name: str) -> None:
    model = vs.load(name)
    state = torch.get_rng_state()
    report = vs.check(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.chained
    assert report.readout == model.layout.readout
    assert repr(report).startswith(f"<CheckReport {name}: ")
    assert "\n" not in repr(report)


@pytest.mark.slow
@every_family
def test_a_wrong_readout_is_rejected(family: Family) -> None:
    model = family.model()
    names = {"cls", "patches"} if "cls" in family.prefix_names else {"patches"}
    for readout in names - (names if set(family.readout) == names else set(family.readout)):
        wrong = replace(model, layout=replace(model.layout, readout={readout: 1.0}))
        if family.readout == {"pooling": 1.0}:
            continue  # pooling reads the patches too
        with pytest.raises(UnsupportedModelError, match=f"says that the classifier reads {readout}, but changing"):
            vs.check(wrong, family.pixels(1))


def test_a_readout_that_omits_the_cls_token_is_rejected() -> None:
    model = vs.load(Homemade("fused").eval(), **LAYOUT)
    assert vs.check(model, random(1, 3, 32, 32)).readout == {"cls": 1.0}
    wrong = vs.load(Homemade("fused").eval(), patch_size=8, prefix=("cls",), readout="patches")
    with pytest.raises(UnsupportedModelError, match="changing cls after the last attention block changes the output"):
        vs.check(wrong, random(1, 3, 32, 32))


WRONG_GRIDS: dict[str, Any] = {
    "prefix after the patches": (
        (8, 8),
        (),
        {"patches": 1.0},
        "attends among 17 tokens .*, but its layout says 16 tokens",
    ),
    "patches of another shape": ((4, 16), ("cls",), {"cls": 1.0}, r"says 8×2 patches .* but changing it changes token"),
}


@pytest.mark.parametrize("case", WRONG_GRIDS.values(), ids=WRONG_GRIDS)
def test_a_wrong_grid_is_rejected(case: Any) -> None:
    """A grid may be wrong although the readout and the number of tokens are correct."""
    patch, prefix, readout, message = case
    model = vs.load(Homemade("fused").eval(), **LAYOUT)
    with pytest.raises(UnsupportedModelError, match=message):
        vs.check(replace(model, layout=Layout(patch, prefix, readout)), random(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["ensemble", "timm"])
def test_parallel_blocks_are_reported(kind: str) -> None:
    torch.manual_seed(0)
    size = (32, 32) if kind == "ensemble" else (32, 48)
    model = vs.load(homemade_ensemble().eval(), **LAYOUT) if kind == "ensemble" else vs.load(timm_parallel().eval())
    report = vs.check(replace(model, layout=None) if kind == "timm" else model, random(1, 3, *size))
    assert not report.chained
    assert "run in parallel" in report.unchained
    assert "4 attention blocks that are not a chain" in repr(report)


def test_a_model_without_a_layout_needs_images_and_has_an_unknown_grid() -> None:
    model = vs.load(Homemade("fused").eval())
    with pytest.raises(vs.CallError, match="input size of Homemade is unknown: pass images"):
        vs.check(model)
    report = vs.check(model, random(1, 3, 32, 32))
    assert (report.grid, report.readout, report.layers) == (None, None, 2)
    expected = "2 attention blocks in a chain, unknown token grid, classifier reads unknown tokens"
    assert repr(report) == f"<CheckReport Homemade: {expected}>"
