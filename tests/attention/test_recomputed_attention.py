"""Attention that recomputes its weights has the gradients of softmax attention, in any number of blocks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.attention import recomputed_attention
from vitscope.attention.recomputed_attention import RecomputedAttention
from vitscope.attention.tap import AttentionCall

BIASES: list[tuple[int, ...] | None] = [None, (1, 1, 1, 40), (3, 1, 40, 40), (1, 2, 40, 40), (40, 40)]


@pytest.fixture(params=[64, 1 << 21], ids=["many blocks", "one block"])
def block_size(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_BLOCK", "CPU_BLOCK_ALONE"):
        monkeypatch.setattr(recomputed_attention, name, request.param)


def tensors(bias: tuple[int, ...] | None) -> list[Tensor | None]:
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = [(3, 2, 40, 5)] * 3 + [bias]
    return [
        None
        if shape is None
        else torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").requires_grad_()
        for shape in shapes
    ]


def gradients(output: Tensor, inputs: list[Tensor | None]) -> list[Tensor | None]:
    seed = torch.linspace(-1, 1, output.numel(), dtype=torch.float64, device="cpu").view_as(output)
    present = [tensor for tensor in inputs if tensor is not None]
    return list(torch.autograd.grad(output, present, seed, allow_unused=True))


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("observed", [False, True])
def test_gradients(bias: tuple[int, ...] | None, constant: bool, observed: bool) -> None:
    inputs = tensors(bias)
    query, key, value, mask = inputs
    assert query is not None
    assert key is not None
    assert value is not None
    call = AttentionCall("", lambda: F.scaled_dot_product_attention(query, key, value, mask), scale=5**-0.5)
    seen = torch.zeros(3, 2, 40, 40, dtype=torch.float64, device="cpu")

    def on_rows(rows: slice, weights: Tensor, gradient: Tensor) -> None:
        seen[..., rows, :] = weights * gradient

    output = RecomputedAttention.apply(*inputs, call, constant, 1.0, on_rows if observed else None)
    actual = gradients(output, inputs)
    scores = query @ key.mT * 5**-0.5
    weights = (scores if mask is None else scores + mask).softmax(-1)
    weights = weights.detach().requires_grad_() if constant else weights
    product = weights @ value
    expected = gradients(product, inputs)
    for result, reference in zip(actual, expected, strict=True):
        assert (result is None) == (reference is None)
        if result is not None and reference is not None:
            torch.testing.assert_close(result, reference, rtol=0, atol=1e-12)
    if observed:
        seed = torch.linspace(-1, 1, product.numel(), dtype=torch.float64, device="cpu").view_as(product)
        torch.testing.assert_close(seen, weights.detach() * (seed @ value.detach().mT), rtol=0, atol=1e-12)
