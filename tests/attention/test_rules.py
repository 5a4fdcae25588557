"""Local rules: the library's own value, and the gradient of each rule in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitscope.attention import recomputed_attention
from vitscope.attention.rules import LocalRules
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.attention.tap import AttentionCall

RELEVANCE = ("libra", "attn_lrp")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pulled(name: Any, func: Any, *args: Any, inputs: int = 1, **options: Any) -> list[Tensor | None]:
    """Return the gradients of a function's first inputs under a rule set; its value is the library's own."""
    leaves = [arg.clone().requires_grad_() for arg in args[:inputs]]
    result = LocalRules(name, SoftmaxTracker())(func, (*leaves, *args[inputs:]), options)
    assert torch.equal(result, func(*args, **options))
    if not result.requires_grad:
        return [None] * inputs
    return list(torch.autograd.grad((result * numbers(*result.shape, seed=9)).sum(), leaves, allow_unused=True))


GATES: dict[str, tuple[Any, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, {}, lambda x: (1 + torch.erf(x / 2**0.5)) / 2),
    "gelu by tanh": (F.gelu, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh") / x),
    "silu": (F.silu, {}, lambda x: 1 / (1 + torch.exp(-x))),
    "mish": (F.mish, {}, lambda x: F.mish(x) / x),
    "hardswish": (F.hardswish, {}, lambda x: F.hardswish(x) / x),
}


@pytest.mark.parametrize("name", RELEVANCE)
@pytest.mark.parametrize("gate", GATES)
def test_the_gate_of_an_activation_function_is_a_constant(gate: str, name: Any) -> None:
    func, options, expected = GATES[gate]
    x = numbers(40) * 3
    (gradient,) = pulled(name, func, x, **options)
    torch.testing.assert_close(gradient, expected(x) * numbers(40, seed=9), rtol=1e-12, atol=1e-14)
    (at_zero,) = pulled(name, func, torch.zeros(1, dtype=torch.float64), **options)
    gate_at_zero = {"mish": torch.tanh(torch.tensor(2.0, dtype=torch.float64).log())}.get(gate, 0.5)
    assert float(at_zero) == pytest.approx(float(gate_at_zero) * float(numbers(1, seed=9)), rel=1e-12)


@pytest.mark.parametrize("func", [F.silu, F.mish, F.hardswish])
def test_an_activation_function_in_place_keeps_its_input(func: Any) -> None:
    x = numbers(6).requires_grad_()
    y = x * 1
    result = LocalRules("libra", SoftmaxTracker())(func, (y,), {"inplace": True})
    torch.testing.assert_close(result, func(x))
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], pulled_ones(func, x.detach()))


def pulled_ones(func: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(LocalRules("libra", SoftmaxTracker())(func, (leaf,), {}).sum(), leaf)[0]


@pytest.mark.parametrize("name", RELEVANCE)
def test_the_deviation_of_a_norm_is_a_constant(name: Any) -> None:
    x, weight, bias, g = numbers(5, 8), numbers(8, seed=1), numbers(8, seed=2), numbers(5, 8, seed=9)
    deviation = (x.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    for scale in (weight, None):
        received = g if scale is None else g * scale
        expected = (received - received.mean(-1, keepdim=True)) / deviation
        (gradient,) = pulled(name, F.layer_norm, x, (8,), scale, None if scale is None else bias, 1e-3)
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    root = (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    (gradient,) = pulled(name, F.rms_norm, x, (8,), weight, 1e-3)
    torch.testing.assert_close(gradient, g * weight / root, rtol=1e-12, atol=1e-14)
    (gradient,) = pulled(name, F.normalize, x, dim=-1)
    torch.testing.assert_close(gradient, g / x.norm(dim=-1, keepdim=True), rtol=1e-12, atol=1e-14)


def test_both_axes_of_a_norm() -> None:
    x, g = numbers(2, 3, 4), numbers(2, 3, 4, seed=9)
    deviation = (x.var((-1, -2), unbiased=False, keepdim=True) + 1e-5).sqrt()
    (gradient,) = pulled("libra", F.layer_norm, x, (3, 4))
    torch.testing.assert_close(gradient, (g - g.mean((-1, -2), keepdim=True)) / deviation, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RELEVANCE)
@pytest.mark.parametrize("func", [torch.mul, Tensor.mul, Tensor.__mul__, torch.matmul, Tensor.__matmul__])
def test_each_of_two_factors_receives_half(func: Any, name: Any) -> None:
    a, b = numbers(4, 4), numbers(4, 4, seed=1)
    halves, whole = pulled(name, func, a, b, inputs=2), pulled("plain", func, a, b, inputs=2)
    for part, gradient in zip(halves, whole, strict=True):
        assert part is not None
        assert gradient is not None
        torch.testing.assert_close(part * 2, gradient)
    (alone,) = pulled(name, func, a, b)  # times a constant
    assert torch.equal(alone, whole[0])


@pytest.mark.parametrize("name", RELEVANCE)
@pytest.mark.parametrize("func", [torch.sigmoid, torch.tanh, torch.erf, torch.rsqrt, torch.sqrt])
def test_other_functions_are_constants(func: Any, name: Any) -> None:
    assert pulled(name, func, numbers(5).abs()) == [None]
    assert pulled("plain", func, numbers(5).abs()) != [None]


@pytest.mark.parametrize("name", RELEVANCE)
def test_a_denominator_is_a_constant(name: Any) -> None:
    a, b = numbers(5), numbers(5, seed=1)
    to_a, to_b = pulled(name, torch.div, a, b, inputs=2)
    assert to_b is None
    torch.testing.assert_close(to_a, numbers(5, seed=9) / b)


@pytest.mark.parametrize("bias", [None, "all", "row"])
@pytest.mark.parametrize("name", ["plain", *RELEVANCE])
@pytest.mark.parametrize("block", [1, 1 << 19])
def test_attention_recomputes_its_weights(name: Any, block: int, bias: str | None, monkeypatch: Any) -> None:
    """Forty queries, sixteen at a time or all at once, against explicit softmax attention."""
    monkeypatch.setattr(recomputed_attention, "CPU_BLOCK", block)
    q, k, v = (numbers(2, 3, 40, 5, seed=seed).requires_grad_() for seed in range(3))
    b = None
    if bias is not None:
        b = numbers(1, 3, 40 if bias == "all" else 1, 40, seed=4).requires_grad_()
    call = AttentionCall("", lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=b, scale=0.3), q, k, v, 0.3, b)
    seen: list[tuple[slice, Tensor, Tensor]] = []
    output = LocalRules(name, SoftmaxTracker()).attend(call, lambda *parts: seen.append(parts))
    g = numbers(2, 3, 40, 5, seed=9)
    leaves = [q, k, v] if b is None else [q, k, v, b]
    values = torch.autograd.grad((output * g).sum(), leaves, allow_unused=True)

    def half(x: Tensor) -> Tensor:
        return x / 2 + (x / 2).detach() if name == "attn_lrp" else x

    scores = half(q) @ half(k).mT * 0.3
    weights = (scores if b is None else scores + b).softmax(-1)
    weights = weights.detach().requires_grad_() if name == "libra" else weights
    explicit = half(weights) @ half(v)
    expected = torch.autograd.grad((explicit * g).sum(), [*leaves, weights], allow_unused=True)
    torch.testing.assert_close(output, explicit, rtol=1e-12, atol=1e-12)
    for value, gradient in zip(values, expected[:-1], strict=True):
        assert (value is None) == (gradient is None)
        if value is not None:
            torch.testing.assert_close(value, gradient, rtol=1e-11, atol=1e-12)
    assert len(seen) == (3 if block == 1 else 1)
    torch.testing.assert_close(torch.cat([part[1] for part in seen], -2), weights.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([part[2] for part in seen], -2), expected[-1], rtol=1e-11, atol=1e-12)


def test_biases_are_reported_once() -> None:
    noted: list[tuple[Tensor, Tensor]] = []
    local = LocalRules("libra", SoftmaxTracker(), on_bias=lambda result, bias: noted.append((result, bias)))
    x, layer, conv = numbers(2, 3, 4, 4).requires_grad_(), nn.Linear(4, 2).double(), nn.Conv2d(3, 2, 2).double()
    for func, module in ((F.linear, layer), (F.conv2d, conv)):
        result = local(func, (x, module.weight.detach(), module.bias.detach()), {})  # type: ignore[union-attr]
        assert noted[-1][0] is result
        assert torch.equal(noted[-1][1].flatten(), module.bias)  # type: ignore[arg-type]
    constant = numbers(4)
    for func, args, expected in (
        (torch.add, (x, constant), constant),
        (torch.sub, (x, constant), -constant),
        (torch.sub, (constant, x), constant),
    ):
        local(func, args, {})
        assert torch.equal(noted[-1][1], expected)
    assert len(noted) == 5
    local(F.linear, (constant, layer.weight.detach(), layer.bias.detach()), {})  # not of the image
    local(torch.add, (x, x), {})
    assert len(noted) == 5
