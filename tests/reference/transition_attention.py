"""Head-wise transition attention (Chen et al., 2023) in float64, with every attention map and its graph in memory.

It does not use vitscope. The libraries run with an explicit attention function, one image and one input at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference.swin_rollout import Block, Story

Score = Callable[[Tensor], Tensor]  # pixels (1, channel, height, width) → the number to explain, (1,)


@contextmanager
def explicit_attention(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that receives the weights of each attention call, (batch, head, query, key), with their graph."""
    maps: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, *_: Any, **options: Any) -> Tensor:
        mask = options.get("attn_mask", mask)
        scores = q @ k.mT * (options.get("scale") or q.shape[-1] ** -0.5)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        maps.append(weights)
        return weights @ v

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        """Keep the weights of a pooling layer, which computes them elsewhere: their mean over heads."""
        if isinstance(output, tuple) and output[1] is not None:
            maps.append(output[1][:, None])

    pooling = [child for child in module.modules() if isinstance(child, nn.MultiheadAttention)]
    handles = [child.register_forward_hook(keep) for child in pooling]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(torch.enable_grad())
        for child in module.modules():
            if hasattr(child, "fused_attn"):  # its other branch computes the softmax elsewhere
                stack.enter_context(mock.patch.object(child, "fused_attn", True))
        for handle in handles:
            stack.callback(handle.remove)
        yield maps


def maps_and_gradients(module: nn.Module, pixels: Tensor, score: Score) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the maps of the blocks, their gradients, and the map of a pooling layer if there is one."""
    with explicit_attention(module) as maps:
        value = score(pixels.clone().requires_grad_())
        blocks = [weights for weights in maps if weights.shape[-2] == weights.shape[-1]]
        gradients = torch.autograd.grad(value.sum(), blocks)
    return [weights.detach() for weights in blocks], list(gradients), maps[-1].detach()


def importance(weights: Tensor, gradient: Tensor) -> Tensor:
    """Return the share of each head in mean |A_hᵀ ∇A_h|, from the maps of one image, (window, head, query, key)."""
    sizes = []
    for head in range(weights.shape[1]):
        products = [a.T @ b for a, b in zip(weights[:, head], gradient[:, head], strict=True)]
        sizes.append(float(torch.stack(products).abs().mean()))
    return torch.tensor(sizes, dtype=torch.float64) / sum(sizes)


def readout_row(readout: Mapping[str, float], prefix_names: tuple[str, ...], count: int, pooled: Tensor) -> Tensor:
    """Return the weight of each token in what the classifier reads."""
    row = torch.zeros(count, dtype=torch.float64)
    for source, weight in readout.items():
        if source == "pooling":
            row += weight * pooled[0].mean((0, 1))
        elif source == "patches":
            row[len(prefix_names) :] += weight / (count - len(prefix_names))
        else:
            row[prefix_names.index(source)] += weight
    return row


def transition_attention(
    module: nn.Module,
    pixels: Tensor,
    score: Score,
    readout: Mapping[str, float],
    prefix_names: tuple[str, ...],
    start_layer: int,
    steps: int,
) -> Tensor:
    """Return the map of one image, (token,)."""
    maps, gradients, pooled = maps_and_gradients(module, pixels, score)
    count = maps[0].shape[-1]
    row = readout_row(readout, prefix_names, count, pooled)
    matrix = torch.eye(count, dtype=torch.float64)
    for weights, gradient in list(zip(maps, gradients, strict=True))[start_layer:]:
        matrix = matrix + torch.einsum("h,hqk->qk", importance(weights, gradient), weights[0]) @ matrix
    runs = [maps_and_gradients(module, pixels * step / steps, score)[1][-1][0] for step in range(1, steps + 1)]
    feedback = torch.stack(runs).mean(0).clamp(min=0).mean(0)
    return (row @ matrix) * (row @ feedback)


def window_transition_attention(
    module: nn.Module, pixels: Tensor, score: Score, story: Story, start_layer: int, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the map of one image, (finest token,), and the part of the row on padding."""
    maps, gradients, _ = maps_and_gradients(module, pixels, score)
    runs = [maps_and_gradients(module, pixels * step / steps, score)[1][-1] for step in range(1, steps + 1)]
    integrated = torch.stack(runs).mean(0).clamp(min=0)  # (window, head, query, key)
    row, index = story.readout(0, None), len(maps)
    feedback: Tensor | None = None
    for step in reversed(story.steps):
        if not isinstance(step, Block):
            matrix = step.matrix(0, "equal")
            assert feedback is not None
            row, feedback = row @ matrix, feedback @ matrix
            continue
        index -= 1
        if feedback is None:
            heads = integrated.shape[1]
            feedback = row @ _dense(step, integrated, torch.full((heads,), 1 / heads, dtype=torch.float64))
        if index >= start_layer:
            row = row + row @ _dense(step, maps[index], importance(maps[index], gradients[index]))
    assert feedback is not None
    return row[:-1] * feedback[:-1], row[-1]


def _dense(block: Block, weights: Tensor, shares: Tensor) -> Tensor:
    """Return Σ_h I_h A_h on the token grid, (token + 1, token + 1), with the part on padding in the last column."""
    placed = Block(weights[None], block.grid, block.size, block.shift, block.roll_first)
    fused = torch.einsum("h,htp->tp", shares, placed.dense(0)[0])
    tokens = len(fused)
    matrix = torch.zeros(tokens + 1, tokens + 1, dtype=torch.float64)
    matrix[:tokens, :tokens], matrix[:tokens, tokens] = fused[:, :tokens], fused[:, tokens:].sum(1)
    return matrix
