"""Attention as users write it: equal to dense matrices under every rule set, or refused in one line."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vitscope as vs
from tests.helpers.attention_variants import CHANNELS, HEADS, PATCH, SIDE, TOKENS, Attention, Variant, Vit, patches
from vitscope.errors import UnsupportedModelError, VitscopeError

ROOT = math.sqrt(CHANNELS)
HIDDEN = torch.zeros(1, 1, 1, TOKENS, dtype=torch.bool, device="cpu")
HIDDEN[..., [3, 7, 11]] = True
PADDED = HIDDEN | HIDDEN.mT
LATER = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device="cpu").triu(1)
INFINITE = torch.zeros(HIDDEN.shape, dtype=torch.float64, device="cpu").masked_fill(HIDDEN, -torch.inf)
sdpa = F.scaled_dot_product_attention


def plain(module: Attention, q: Tensor, k: Tensor) -> Tensor:
    return module.product(q, k) / ROOT


def masked(mask: Tensor) -> Any:
    return lambda module, q, k: plain(module, q, k).masked_fill(mask, -torch.inf)


def with_bias(module: Attention, q: Tensor, k: Tensor) -> Tensor:
    return plain(module, q, k) + module.bias


def cosine(module: Attention, q: Tensor, k: Tensor) -> Tensor:
    return module.product(module.unit(q), module.unit(k)) * module.temperature


def talking(module: Attention, scores: Tensor) -> Tensor:
    return torch.einsum("bhqk,hg->bgqk", scores, module.talk)


def by_baddbmm(module: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = module.bias.repeat(len(q), 1, 1)
    weights = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=1 / ROOT).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (len(q), HEADS))


def by_einsum(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q, k).div(ROOT).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def flattened(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(*(tensor.flatten(0, 1) for tensor in (q, k, v))).unflatten(0, (len(q), HEADS))


FUSED = Variant(lambda _, q, k, v: sdpa(q, k, v), plain)
VARIANTS: dict[str, Variant] = {
    "fused": FUSED,
    "explicit": Variant(lambda _, q, k, v: (q @ k.mT / ROOT).softmax(-1) @ v, plain),
    "grouped queries": Variant(lambda _, q, k, v: sdpa(q, k, v, enable_gqa=True), plain, key_heads=2),
    "one key head": Variant(lambda _, q, k, v: sdpa(q, k, v), plain, key_heads=1),
    "one key head, explicit": Variant(lambda _, q, k, v: (q @ k.mT / ROOT).softmax(-1) @ v, plain, key_heads=1),
    "causal": Variant(lambda _, q, k, v: sdpa(q, k, v, is_causal=True), masked(LATER), readout="patches"),
    "boolean mask": Variant(lambda _, q, k, v: sdpa(q, k, v, attn_mask=~HIDDEN), masked(HIDDEN)),
    "additive mask": Variant(lambda _, q, k, v: sdpa(q, k, v, attn_mask=INFINITE), masked(HIDDEN)),
    "filled mask": Variant(
        lambda _, q, k, v: (q @ k.mT / ROOT).masked_fill(HIDDEN, -1e9).softmax(-1) @ v, masked(HIDDEN)
    ),
    "masked queries": Variant(lambda _, q, k, v: sdpa(q, k, v, attn_mask=~PADDED), masked(PADDED)),
    "relative bias": Variant(lambda m, q, k, v: sdpa(q, k, v, attn_mask=m.bias[None]), with_bias),
    "cosine": Variant(lambda m, q, k, v: sdpa(F.normalize(q, dim=-1) * m.temperature, F.normalize(k, dim=-1), v,
                                              scale=1.0), cosine),
    "cosine, explicit": Variant(
        lambda m, q, k, v: (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.temperature).softmax(-1) @ v, cosine
    ),
    "scale": Variant(lambda _, q, k, v: sdpa(q, k, v, scale=0.3), lambda m, q, k: m.product(q, k) * 0.3),
    "temperature": Variant(
        lambda m, q, k, v: torch.softmax(q @ k.mT / m.temperature, -1) @ v,
        lambda m, q, k: m.product(q, k) / m.temperature,
    ),
    "talking scores": Variant(
        lambda m, q, k, v: talking(m, q @ k.mT / ROOT).softmax(-1) @ v, lambda m, q, k: talking(m, plain(m, q, k))
    ),
    "baddbmm": Variant(by_baddbmm, with_bias),
    "einsum": Variant(by_einsum, plain),
    "heads in the batch": Variant(flattened, plain),
}  # fmt: skip


def elu_attention(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    return q @ (k.mT @ v) / (q @ k.sum(-2, keepdim=True).mT)


def with_sink(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(F.pad(q @ k.mT / ROOT, (1, 0)), -1)[..., 1:] @ v


def renormalised(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT / ROOT).softmax(-1) * HIDDEN.logical_not()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def differential(_: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT / ROOT).softmax(-1) - 0.5 * (k @ q.mT / ROOT).softmax(-1)) @ v


LINEAR = Variant(elu_attention, plain)
REFUSED: dict[str, tuple[Variant, str]] = {
    "linear": (LINEAR, "no attention that vitscope can observe"),
    "sigmoid": (Variant(lambda _, q, k, v: torch.sigmoid(q @ k.mT / ROOT - 3) @ v, plain), "no attention that"),
    "softmax over queries": (Variant(lambda _, q, k, v: (k @ q.mT / ROOT).softmax(-2).mT @ v, plain), "no attention"),
    "attention sink": (Variant(with_sink, plain), "no attention that vitscope can observe"),
    "talking weights": (
        Variant(lambda m, q, k, v: talking(m, (q @ k.mT / ROOT).softmax(-1)) @ v, plain),
        r"changes the result of its softmax \(einsum\)",
    ),
    "renormalised": (Variant(renormalised, plain), r"changes the result of its softmax"),
    "differential": (Variant(differential, plain), r"changes the result of its softmax"),
    "dropout": (Variant(lambda _, q, k, v: sdpa(q, k, v, dropout_p=0.3), plain), "at random"),
    "more keys": (
        Variant(lambda _, q, k, v: sdpa(q, F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))), plain),
        "none of the 2 attention calls",
    ),
}


def loaded(module: Vit) -> vs.VisionModel:
    return vs.load(module, patch_size=PATCH, prefix=("cls",), readout=module.readout, output="logits")


def pixels(batch: int = 2) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(1)
    return torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64, device="cpu")


def assert_equal(values: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", VARIANTS)
def test_maps_equal_those_of_dense_matrices(name: str) -> None:
    module, x = Vit(VARIANTS[name], VARIANTS[name]), pixels()
    model, kind = loaded(module), module.readout
    for rules in ("plain", "libra", "attn_lrp"):
        dense = module.dense(x, rules, 1)
        assert_equal(vs.input_x_gradient(model, x, target=1, rules=rules).values, patches(dense.relevance))
        assert_equal(vs.generic_attention(model, x, target=1, rules=rules).values, dense.generic(kind))
        if rules == "plain":
            assert_equal(vs.rollout(model, x).values, dense.rollout(kind))
            torch.testing.assert_close(module(x).detach(), dense.logits)
    result = vs.libra(model, x, target=1)
    assert max(abs(image["error"]) for image in result.provenance["completeness"]) < 1e-12


@pytest.mark.parametrize("name", REFUSED)
def test_attention_without_known_weights_is_refused(name: str) -> None:
    variant, message = REFUSED[name]
    model = loaded(Vit(variant, variant))
    for method in (vs.rollout, vs.generic_attention, vs.libra):
        with pytest.raises(VitscopeError, match=message) as caught:
            method(model, pixels(1))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("order", [(FUSED, LINEAR, FUSED), (LINEAR, FUSED, FUSED), (FUSED, FUSED, LINEAR)])
def test_a_block_whose_attention_is_not_observed_breaks_the_chain(order: tuple[Variant, ...]) -> None:
    model, place = loaded(Vit(*order)), order.index(LINEAR)
    for method in (vs.rollout, vs.generic_attention, vs.gradient_rollout, vs.transformer_attribution):
        with pytest.raises(UnsupportedModelError, match=rf"blocks\.{place} mixes tokens without attention that"):
            method(model, pixels(1))
    assert vs.attention_map(model, pixels(1)).values.isfinite().all()


def changed(change: Any) -> vs.VisionModel:
    """Return a model whose MLPs apply a function between their layers."""
    module = Vit(FUSED, FUSED)
    for block in module.blocks:
        block.mlp[1] = torch.nn.Identity()
        block.mlp[1].forward = change
    return loaded(module)


CONSTANT = torch.linspace(-1, 2, 32, dtype=torch.float64, device="cpu")
BATCH_NORM: dict[str, Any] = {
    "running_mean": CONSTANT, "running_var": CONSTANT**2 + 1, "weight": CONSTANT + 3, "bias": CONSTANT - 1
}  # fmt: skip
FUNCTIONS: dict[str, Any] = {
    "a number": lambda x: x + 1.0,
    "a number minus": lambda x: 2.0 - x,
    "alpha": lambda x: torch.add(x, CONSTANT, alpha=2),
    "alpha of the activation": lambda x: torch.sub(CONSTANT, x, alpha=3),
    "in place": lambda x: CONSTANT.expand_as(x).clone().sub_(x),
    "square": lambda x: x.square() - x**2 / 2,
    "root": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6) ** -0.5,
    "gated linear unit": lambda x: F.glu(torch.cat([x, x + CONSTANT], -1), -1),
    "group norm": lambda x: F.group_norm(x.mT, 4, CONSTANT, CONSTANT - 1).mT,
    "batch norm": lambda x: F.batch_norm(x.mT, **BATCH_NORM).mT,
    "convolution": lambda x: F.conv1d(x.mT, torch.eye(32, dtype=torch.float64, device="cpu")[..., None], CONSTANT).mT,
    "list of weights": lambda x: F.layer_norm(x, (32,)) * WEIGHTS[0] + WEIGHTS[1],
}
WEIGHTS = [(CONSTANT + shift).requires_grad_() for shift in (1, 2)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_libra_is_complete_with_more_functions(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = vs.libra(changed(FUNCTIONS[name]), pixels(1), target=1)
    image = result.provenance["completeness"][0]
    assert abs(image["error"]) < 1e-12 * max(1.0, abs(image["output"]), float(result.values.abs().max()))


def test_libra_says_that_a_function_has_no_rule() -> None:
    model = changed(F.softplus)
    with pytest.warns(
        vs.errors.VitscopeWarning, match=r"libra does not account for the whole output of Vit: 0\.\d+ of"
    ):
        vs.libra(model, pixels(1), target=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vs.libra(model, pixels(1), target=1, gamma=0.1)  # with γ, the law does not hold anyway


def test_a_map_of_rounding_is_zero() -> None:
    """With a CLS token, only the first of two blocks has a gradient behind it, and a norm follows."""
    module = Vit(FUSED, FUSED).float()
    module.norm.eps = module.blocks[1].norm1.eps = 1e-12
    for method, options in ((vs.att_cat, {}), (vs.grad_cam, {"variant": "hires_cam", "at": "block", "layer": 0})):
        with pytest.warns(vs.errors.VitscopeWarning, match="zero everywhere"):
            assert not method(loaded(module), pixels().float(), target=1, **options).values.any()
