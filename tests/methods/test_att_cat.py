"""AttCAT equals its sum over blocks, heads and tokens, keeps the laws of gradient methods, and refuses bad options."""

from typing import Any

import pytest
import torch

import vitscope as vs
from tests.helpers import gradient_laws as laws
from tests.helpers import swin_families as swin
from tests.helpers.block_streams import check_windows, streams_of
from tests.helpers.families import ALL, Family, every_family
from tests.reference import att_cat as reference


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


@every_family
def test_the_map_is_the_sum_over_blocks(family: Family) -> None:
    model, pixels = laws.in_float64(family.model()), family.pixels().double()
    readout = vs.capture(model, pixels).readout
    assert readout is not None
    run = streams_of(model, pixels)
    scale = float(reference.att_cat(run, readout, 1).abs().max())
    for start in (0, 1):  # a CLS readout leaves nothing behind the first of three blocks, so the scale is that of all
        result = vs.att_cat(model, pixels, target=lambda output: output[:, 1], start_layer=start)
        expected = family.grid.patches(reference.att_cat(run, readout, 1, start))
        torch.testing.assert_close(result.values.double(), expected, rtol=0, atol=1e-6 * scale)
    assert scale > 1e-5
    assert result.provenance["parameters"]["start_layer"] == 1
    assert result.signed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fitting", "padded", "odd"])
def test_windows_and_merging_equal_dense_matrices(kind: str) -> None:
    check_windows(vs.att_cat, reference.windowed_att_cat, kind)


@pytest.mark.slow
@every_family
def test_a_batch_is_its_images(family: Family) -> None:
    model, pixels = laws.in_float64(family.model()), family.pixels().double()
    target = laws.target_of(model)
    together = vs.att_cat(model, pixels, target=target).values
    for index in range(2):
        alone = vs.att_cat(model, pixels[index : index + 1], target=target).values[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-6, atol=1e-6 * float(alone.abs().max()))


@pytest.mark.slow
@swin.each_size
def test_every_window_transformer(family: swin.SwinFamily, kind: str) -> None:
    size = family.sizes[kind]
    result, grid = vs.att_cat(family.model(size), swin.pixels(size), target=1), family.grid(size)
    assert result.values.shape == (2, grid.height, grid.width)
    assert bool(result.values.isfinite().all())


def test_the_last_two_blocks_of_a_cls_readout_add_nothing() -> None:
    """No gradient reaches the patches behind the last block; before it, a norm makes them independent of length."""
    model, pixels = laws.in_float64(family("timm-vit").model()), family("timm-vit").pixels().double()
    with pytest.warns(vs.VitscopeWarning, match="zero everywhere"):
        assert not bool(vs.att_cat(model, pixels, target=1, start_layer=-1).values.any())
    both, every = (vs.att_cat(model, pixels, target=1, start_layer=start).values for start in (-2, 0))
    assert float(both.abs().max()) < 1e-4 * float(every.abs().max())
    libra = vs.att_cat(model, pixels, target=1, start_layer=-2, rules="libra").values
    assert float(libra.abs().max()) > 0.1 * float(every.abs().max())


def test_row_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    laws.check_row_blocks(vs.att_cat, family("timm-vit").model(), family("timm-vit").pixels(), monkeypatch)


def test_the_callers_gradient_mode_changes_nothing() -> None:
    laws.check_gradient_modes(vs.att_cat, family("timm-vit").model(), family("timm-vit").pixels())


@pytest.mark.parametrize("name", ["timm-vit", "transformers-vit"])
def test_nothing_is_left_behind(name: str) -> None:
    laws.check_nothing_left(vs.att_cat, family(name).model(), family(name).pixels())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start_layer": 3}, "start_layer is 3: the model has layers 0 to 2"),
        ({"rules": "lrp"}, "rules is 'lrp': choose plain, libra, attn_lrp"),
        ({"output": "loss"}, "unknown output 'loss'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(vs.CallError, match=text):
        vs.att_cat(family("timm-vit").model(), family("timm-vit").pixels(), **options)
