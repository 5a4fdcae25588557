"""The functions of torch that timm's Swin calls, written out in float64 with a rule set, and a record of its run.

It does not use vitscope. While the context is active, the library's own module runs with these functions.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.gradients import half
from tests.reference.swin_rollout import Block, Story


@dataclass(eq=False)
class Record:
    maps: list[Tensor] = field(default_factory=list)  # (batch·window, head, query, key)
    biases: list[Tensor] = field(default_factory=list)


@contextmanager
def explicit_functions(module: nn.Module, rules: str) -> Iterator[Record]:
    """Run a module of timm inside the context with explicit attention; its parameters stay as they are."""
    record = Record()
    linear, lrp = F.linear, rules == "attn_lrp"

    def copied(bias: Tensor, like: Tensor) -> Tensor:
        copy = bias.detach().expand_as(like).clone().requires_grad_()
        record.biases.append(copy)
        return copy

    def with_copied_bias(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight)
        return y if bias is None else y + copied(bias, y)

    def layer_norm(x: Tensor, _: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        deviation = deviation if rules == "plain" else deviation.detach()
        y = (x - x.mean(-1, keepdim=True)) / deviation * weight
        return y + copied(bias, y)

    def gelu(x: Tensor, approximate: str = "none") -> Tensor:
        assert approximate == "none"
        gate = (1 + torch.erf(x / 2**0.5)) / 2
        return x * (gate if rules == "plain" else gate.detach())

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        q, k, v = (half(x) if lrp else x for x in (q, k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        weights = weights.detach().requires_grad_() if rules == "libra" else weights
        record.maps.append(weights)
        return (half(weights) if lrp else weights) @ v

    replacements = {"linear": with_copied_bias, "layer_norm": layer_norm, "gelu": gelu}
    replacements["scaled_dot_product_attention"] = attention
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(F, **replacements))
        for child in module.modules():
            if hasattr(child, "fused_attn"):  # its other branch does the softmax outside of these functions
                stack.enter_context(mock.patch.object(child, "fused_attn", True))
        yield record


def generic_attention(story: Story, products: list[Tensor]) -> Tensor:
    """Return (batch, token + 1) of r ← r + r · E_h[(A ⊙ ∇A)⁺] through windows and mergings, with padding last.

    Args:
        story: a plain run of the same images.
        products: A ⊙ ∇A of each block, (batch·window, head, query, key).
    """
    rows, batch = [], len(story.features)
    for image in range(batch):
        row, remaining = story.readout(image, None), list(products)
        for step in reversed(story.steps):
            if not isinstance(step, Block):
                row = row @ step.matrix(image, "equal")
                continue
            block = Block(remaining.pop().unflatten(0, (batch, -1)), step.grid, step.size, step.shift, step.roll_first)
            fused, tokens = block.dense(image)[0].clamp_min(0).mean(0), prod(step.grid)
            matrix = torch.eye(tokens + 1, dtype=torch.float64)
            matrix[:tokens, :tokens] += fused[:, :tokens]
            matrix[:tokens, tokens] = fused[:, tokens:].sum(1)
            row = row @ matrix
        rows.append(row)
    return torch.stack(rows).detach()
