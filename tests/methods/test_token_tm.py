"""TokenTM equals its product of dense matrices, keeps the laws of gradient methods, and says what it cannot do."""

from typing import Any

import pytest
import torch

import vitscope as vs
from tests.helpers import gradient_laws as laws
from tests.helpers import swin_families as swin
from tests.helpers.block_streams import check_windows, streams_of
from tests.helpers.families import ALL, Family, every_family
from tests.helpers.gradients import assert_equal
from tests.reference import token_tm as reference


def family(name: str) -> Family:
    return next(family for family in ALL if family.name == name)


@every_family
def test_the_map_is_the_product_of_dense_matrices(family: Family) -> None:
    model, pixels = laws.in_float64(family.model()), family.pixels().double()
    readout = vs.capture(model, pixels).readout
    assert readout is not None
    run = streams_of(model, pixels)
    assert len(run.blocks) == len(run.inputs) == len(run.middles) == len(run.outputs) == len(run.maps) == 3
    for start in (0, 2):
        result = vs.token_tm(model, pixels, target=lambda output: output[:, 1], start_layer=start)
        expected = reference.token_tm(run, readout, 1, start)
        assert_equal(result.values, family.grid.patches(expected))
        assert result.provenance["row_sums"] == pytest.approx(expected.sum(-1).tolist(), rel=1e-6)
    assert result.provenance["parameters"]["start_layer"] == 2
    assert not result.signed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fitting", "padded", "odd"])
def test_windows_and_merging_equal_dense_matrices(kind: str) -> None:
    check_windows(vs.token_tm, reference.windowed_token_tm, kind)


@pytest.mark.slow
@every_family
def test_every_family(family: Family) -> None:
    result = laws.check_batch(vs.token_tm, laws.in_float64(family.model()), family.pixels().double(), 1e-6)
    assert result.values.shape == (2, family.grid.height, family.grid.width)


@pytest.mark.slow
@swin.each_size
def test_every_window_transformer(family: swin.SwinFamily, kind: str) -> None:
    size = family.sizes[kind]
    result = laws.check_batch(vs.token_tm, family.model(size), swin.pixels(size), 1e-4)
    grid = family.grid(size)
    assert result.values.shape == (2, grid.height, grid.width)


@pytest.mark.parametrize("name", ["timm-vit", "timm-vit-mean"])
def test_row_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laws.check_row_blocks(vs.token_tm, family(name).model(), family(name).pixels(), monkeypatch)


def test_the_callers_gradient_mode_changes_nothing() -> None:
    laws.check_gradient_modes(vs.token_tm, family("timm-vit").model(), family("timm-vit").pixels())


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-vit"])
def test_nothing_is_left_behind(name: str) -> None:
    laws.check_nothing_left(vs.token_tm, family(name).model(), family(name).pixels())


def test_a_token_of_length_0_passes_nothing_on() -> None:
    """A test-time register starts as a token of zeros."""
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels()
    with vs.test_time_registers(model, [(1, 3)]):
        result = vs.token_tm(model, pixels, target=1)
    assert bool(torch.tensor(result.provenance["row_sums"]).isfinite().all())
    assert float(result.values.min()) > 0


def test_a_block_that_normalises_behind_its_mlp_is_refused() -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model(
        "vit_relpos_small_patch16_rpn_224", depth=2, embed_dim=32, num_heads=4, num_classes=5, img_size=32
    )
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(vs.UnsupportedModelError, match="between the attention and the MLP of its blocks is unknown"):
        vs.token_tm(vs.load(module.eval(), patch_size=16, prefix=(), readout="patches"), pixels, target=1)


@pytest.mark.parametrize("method", [vs.token_tm, vs.generic_attention])
def test_a_model_that_changes_its_tokens_in_an_unknown_way_is_refused(method: Any) -> None:
    model, pixels = swin.MAXVIT.model(swin.MAXVIT_SIZES["fitting"]), swin.pixels(swin.MAXVIT_SIZES["fitting"], 1)
    with pytest.raises(vs.UnsupportedModelError, match=f"{method.__name__} is not supported for this model: how its"):
        method(model, pixels, target=1)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"start_layer": 3}, "start_layer is 3: the model has layers 0 to 2"),
        ({"rules": "lrp"}, "rules is 'lrp': choose plain, libra, attn_lrp"),
        ({"merge": "max"}, "unknown merge weights 'max'"),
        ({"output": "loss"}, "unknown output 'loss'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(vs.CallError, match=text):
        vs.token_tm(family("timm-vit").model(), family("timm-vit").pixels(), **options)
