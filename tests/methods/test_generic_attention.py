"""Attention times its gradient, folded over blocks, equals the product of dense matrices."""

from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import gradients, swin_families
from tests.helpers.gradients import assert_equal, case, transformers_vit
from tests.helpers.swin_families import SIZES
from tests.reference import explicit_functions
from tests.reference import gradients as reference
from tests.reference.swin_rollout import story
from vitscope.attention import recomputed_attention
from vitscope.errors import CallError

RULES = ("plain", "libra", "attn_lrp")


def score(logits: Tensor) -> Tensor:
    return logits[:, 1]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", ["timm-vit", "timm-vit-mean", "transformers"])
def test_both_folds_equal_dense_matrices(family: str, name: Any) -> None:
    model, pixels = transformers_vit() if family == "transformers" else case(family).in_float64()
    weights = (reference.from_transformers if family == "transformers" else reference.from_timm)(model.module)
    run = reference.run(weights, pixels, name)
    for start in (0, 1):
        generic = vs.generic_attention(model, pixels, target=1, rules=name, start_layer=start)
        assert_equal(generic.values.flatten(1), reference.generic_attention(run, score, start)[:, 1:])
        for ratio in (0.0, 0.6):
            rolled = vs.gradient_rollout(model, pixels, target=1, rules=name, start_layer=start, discard_ratio=ratio)
            expected = reference.gradient_rollout(run, score, start, ratio)
            assert_equal(rolled.values.flatten(1), expected[:, 1:])
            torch.testing.assert_close(rolled.provenance["row_sums"], [1.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", ["fitting", "padded", "odd"])
def test_windows_and_merging_equal_dense_matrices(kind: str, name: Any) -> None:
    family = swin_families.family("timm-swin")
    model, pixels = family.model(SIZES[kind]), swin_families.pixels(SIZES[kind]).double()
    model.module.double()
    plain = story(model.module, pixels, (model.layout.grid(*SIZES[kind]).height, SIZES[kind][1] // 2))  # type: ignore[union-attr]
    with explicit_functions.explicit_functions(model.module, name) as record:
        logits = model.module(pixels.clone().requires_grad_())
    maps = torch.autograd.grad(score(logits).sum(), record.maps)
    products = [weights.detach() * gradient for weights, gradient in zip(record.maps, maps, strict=True)]
    expected = explicit_functions.generic_attention(plain, products)
    result = vs.generic_attention(model, pixels, target=1, rules=name)
    assert_equal(result.values.flatten(1), expected[:, :-1])
    padding = torch.tensor(result.provenance["padding_mass"], dtype=torch.float64)
    torch.testing.assert_close(padding, expected[:, -1], rtol=1e-5, atol=1e-6)
    assert (kind == "fitting") == (float(padding.abs().max()) == 0)


@pytest.mark.parametrize("method", [vs.generic_attention, vs.gradient_rollout])
@pytest.mark.parametrize("name", ["timm-vit", "timm-swin-padded"])
def test_blocks_of_rows_change_nothing(method: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pixels = case(name).in_float64()
    for options in ({}, {"rules": "attn_lrp"}, {"rules": "libra"}):
        expected = method(model, pixels, target=1, **options).values
        with monkeypatch.context() as patched:
            patched.setattr(recomputed_attention, "CPU_BLOCK", 1)  # 16 rows, the least
            assert_equal(method(model, pixels, target=1, **options).values, expected)


def test_the_largest_of_four_shares_of_a_merged_token() -> None:
    model, pixels = case("timm-swin-fitting").in_float64()
    equal, norm = (vs.generic_attention(model, pixels, target=1, merge=merge).values for merge in ("equal", "norm"))  # type: ignore[arg-type]
    assert not torch.equal(equal, norm)
    torch.testing.assert_close(  # without padding, merging distributes the row and loses nothing
        *(
            torch.tensor(vs.gradient_rollout(model, pixels, target=1, merge=merge).provenance["row_sums"])  # type: ignore[arg-type]
            for merge in ("equal", "norm")
        )
    )


def test_values_are_not_negative_and_depend_on_the_class() -> None:
    model, pixels = gradients.transformers_vit()
    for method in (vs.generic_attention, vs.gradient_rollout):
        first, second = (method(model, pixels, target=target).values for target in (0, 1))
        assert float(first.min()) >= 0
        assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.usefixtures("unchecked")
def test_options_out_of_range() -> None:
    model, pixels = gradients.transformers_vit()
    for options, text in (
        ({"start_layer": 3}, "start_layer is 3: the model has layers 0 to 2"),
        ({"start_layer": 0.5}, "start_layer is 0.5"),
        ({"rules": "lrp"}, "rules is 'lrp': choose plain, libra, attn_lrp"),
        ({"merge": "max"}, "unknown merge weights 'max'"),
        ({"output": "loss"}, "unknown output 'loss'"),
    ):
        for method in (vs.generic_attention, vs.gradient_rollout):
            with pytest.raises(CallError, match=text):
                method(model, pixels, **options)  # type: ignore[arg-type]
    with pytest.raises(CallError, match="discard_ratio is 2"):
        vs.gradient_rollout(model, pixels, discard_ratio=2)
