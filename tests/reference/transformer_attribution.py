"""Transformer attribution (2012.09838) of a timm ViT with a CLS token: relevance goes back one layer at a time.

It does not use vitscope. Every function takes the relevance of an output and returns that of the inputs; all numbers
are float64 and belong to one image.
"""

from typing import Any

import torch
from torch import Tensor, nn

EPSILON = 1e-9


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient with the authors' stabiliser."""
    stable = denominator.clamp(min=EPSILON) + denominator.clamp(max=EPSILON)
    stable = stable + stable.eq(0) * EPSILON
    return numerator / stable * denominator.ne(0)


def through_linear(layer: nn.Linear, x: Tensor, relevance: Tensor) -> Tensor:
    """Return the relevance of the input of a linear layer, for α = 1 and β = 0."""
    above, below = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    positive = x.clamp(min=0) @ above.T + x.clamp(max=0) @ below.T
    share = divide(relevance, positive)
    return x.clamp(min=0) * (share @ above) + x.clamp(max=0) * (share @ below)


def through_product(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relevance of the two factors of a matrix product."""
    share = divide(relevance, first @ second)
    return first * (share @ second.mT) / 2, second * (first.mT @ share) / 2


def through_sum(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relevance of two summands, which share the total by their absolute sums."""
    share = divide(relevance, first + second)
    terms = first * share, second * share
    sums = [term.sum() for term in terms]
    total = sums[0].abs() + sums[1].abs()
    of_first, of_second = (
        term / part * part.abs() / total * relevance.sum() for term, part in zip(terms, sums, strict=True)
    )
    return of_first, of_second


def transformer_attribution(vit: Any, pixels: Tensor, target: int, start_layer: int = 0) -> tuple[Tensor, list[float]]:
    """Return the row of the CLS token, (token,), and the total relevance at the input of each block, last first."""
    vit = vit.double()
    with torch.enable_grad():
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(pixels.double()))))
        states = []
        for block in vit.blocks:
            state = _forward(block, tokens)
            states.append(state)
            tokens = state["output"]
        normed = vit.norm(tokens)
        logit = vit.head(normed[:, 0])[0, target]
    gradients = torch.autograd.grad(logit, [state["weights"] for state in states])
    with torch.no_grad():
        one_hot = torch.eye(vit.head.out_features, dtype=torch.float64, device="cpu")[target][None]
        relevance = torch.zeros_like(normed[0])
        relevance[:1] = through_linear(vit.head, normed[0, :1], one_hot)
        matrices, totals = [], []
        for block, state, gradient in zip(vit.blocks[::-1], states[::-1], gradients[::-1], strict=True):
            relevance, of_weights = _backward(block, state, relevance)
            matrices.append((gradient[0] * of_weights).clamp(min=0).mean(0))
            totals.append(float(relevance.sum()))
        row = torch.eye(len(relevance), dtype=torch.float64, device="cpu")[0]
        for matrix in matrices[: len(matrices) - start_layer]:
            row = row + row @ matrix
    return row, totals


def _forward(block: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return every activation of a block."""
    attention, state = block.attn, {"input": tokens}
    state["normed"] = block.norm1(tokens)
    heads, width = attention.num_heads, attention.head_dim
    joint = attention.qkv(state["normed"]).unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4)
    state["query"], state["key"], state["value"] = joint.unbind(0)
    state["weights"] = (state["query"] @ state["key"].mT * width**-0.5).softmax(-1)
    state["mixed"] = (state["weights"] @ state["value"]).transpose(1, 2).flatten(2)
    state["attended"] = attention.proj(state["mixed"])
    state["middle"] = tokens + state["attended"]
    state["normed2"] = block.norm2(state["middle"])
    state["hidden"] = block.mlp.act(block.mlp.fc1(state["normed2"]))
    state["changed"] = block.mlp.fc2(state["hidden"])
    state["output"] = state["middle"] + state["changed"]
    return state


def _backward(block: Any, state: dict[str, Tensor], relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relevance of a block's input, (token, channel), and of its weights, (head, token, token)."""
    s = {name: tensor[0] for name, tensor in state.items()}
    skipped, of_changed = through_sum(s["middle"], s["changed"], relevance)
    of_hidden = through_linear(block.mlp.fc2, s["hidden"], of_changed)  # GELU and LayerNorm pass relevance unchanged
    of_middle = skipped + through_linear(block.mlp.fc1, s["normed2"], of_hidden)
    skipped, of_attended = through_sum(s["input"], s["attended"], of_middle)
    of_mixed = through_linear(block.attn.proj, s["mixed"], of_attended)
    heads = of_mixed.unflatten(-1, (len(s["weights"]), -1)).transpose(0, 1)
    of_weights, of_value = through_product(s["weights"], s["value"], heads)
    of_query, of_key = through_product(s["query"], s["key"].mT, of_weights)
    joint = torch.stack([of_query, of_key.mT, of_value]).permute(2, 0, 1, 3).flatten(1)
    return skipped + through_linear(block.attn.qkv, s["normed"], joint), of_weights
