"""A small ViT whose attention is written in many ways, with a dense twin that is plain arithmetic under every rule set.

The twin does not use vitscope: weights are exp(scores) divided by their sums, and a rule set is a ``detach`` for a
constant or ``half`` for half of a gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, CHANNELS, PATCH, SIDE, CLASSES = 32, 4, 8, 8, 32, 5
TOKENS = 1 + (SIDE // PATCH) ** 2

Parts = tuple[Tensor, Tensor, Tensor]  # queries, keys and values, each (batch, head, token, channel)


def half(tensor: Tensor) -> Tensor:
    """Return a tensor through which half of the gradient flows."""
    return (tensor + tensor.detach()) / 2


class Variant:
    """Attention that a library computes, and the scores of its dense twin."""

    def __init__(
        self,
        mix: Callable[["Attention", Tensor, Tensor, Tensor], Tensor],
        scores: Callable[["Attention", Tensor, Tensor], Tensor],
        *,
        key_heads: int = HEADS,
        readout: str = "cls",
    ) -> None:
        self.mix, self.scores, self.key_heads, self.readout = mix, scores, key_heads, readout


class Attention(nn.Module):
    """Attention of one variant. In its dense form it keeps its weights, with their gradient."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant, self.num_heads = variant, HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * variant.key_heads * CHANNELS)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.bias = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 2)
        self.rules: str | None = None  # of the dense form; None for the variant itself
        self.weights = torch.empty(0)

    def parts(self, tokens: Tensor) -> Parts:
        query = self.q(tokens).unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2)
        key, value = self.kv(tokens).unflatten(-1, (2, self.variant.key_heads, CHANNELS)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.parts(tokens)
        mixed = self.variant.mix(self, query, key, value) if self.rules is None else self.dense(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeats = HEADS // key.shape[1]
        key, value = (tensor.repeat_interleave(repeats, 1) for tensor in (key, value))
        scores = self.variant.scores(self, query, key)
        raised = (scores - scores.amax(-1, keepdim=True).detach().clamp_min(-1e9)).exp()
        weights = raised / raised.sum(-1, keepdim=True).clamp_min(1e-30)
        if self.rules == "libra":
            weights = weights.detach().requires_grad_()
        weights.retain_grad()
        self.weights = weights
        return half(weights @ value) if self.rules == "attn_lrp" else weights @ value

    def product(self, query: Tensor, key: Tensor) -> Tensor:
        """Return q·kᵀ of the dense form."""
        return half(query @ key.mT) if self.rules == "attn_lrp" else query @ key.mT

    def unit(self, tensor: Tensor) -> Tensor:
        """Return a tensor of length 1 in the dense form."""
        length = tensor.square().sum(-1, keepdim=True).sqrt()
        return tensor / (length if self.rules == "plain" else length.detach())


class Norm(nn.LayerNorm):
    """A LayerNorm whose deviation may be a constant."""

    rules: str | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        if self.rules is None:
            return super().forward(tokens)
        centred = tokens - tokens.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        if self.rules != "plain":
            deviation = deviation.detach()
        return centred / deviation * self.weight + self.bias


class Gelu(nn.Module):
    """A GELU whose gate may be a constant."""

    rules: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rules is None:
            return F.gelu(x)
        gate = (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (gate if self.rules == "plain" else gate.detach())


class Block(nn.Module):
    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(WIDTH), Norm(WIDTH)
        self.attn = Attention(variant)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), Gelu(), nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Vit(nn.Module):
    """A ViT with a CLS token, 4×4 patches of 8 pixels and one block for each of the variants."""

    def __init__(self, *variants: Variant) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.readout = variants[-1].readout
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block(variant) for variant in variants))
        self.norm, self.head = Norm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.tokens = torch.empty(0)
        with torch.no_grad():
            for block in self.blocks:
                block.attn.q.weight.mul_(3)
                block.attn.kv.weight.mul_(3)
        self.double().eval()

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.embed(pixels).flatten(2).mT
        self.tokens = tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1) + self.position
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens[:, 0] if self.readout == "cls" else tokens[:, 1:].mean(1))

    def dense(self, pixels: Tensor, rules: str, target: int) -> "Dense":
        """Return what the dense twin computes for a class, under a rule set."""
        changed: list[Any] = [module for module in self.modules() if hasattr(module, "rules")]
        flags = [parameter.requires_grad for parameter in self.parameters()]
        self.requires_grad_(False)
        for module in changed:
            module.rules = rules
        handle = self.blocks.register_forward_pre_hook(lambda _, args: (args[0].detach().requires_grad_(),))
        entered: list[Tensor] = []
        keep = self.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        try:
            output = self(pixels)
            output[:, target].sum().backward()
        finally:
            handle.remove()
            keep.remove()
            for module in changed:
                module.rules = None
            for parameter, flag in zip(self.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)
        attentions = [block.attn.weights for block in self.blocks]
        return Dense(output.detach(), entered[0], attentions)


class Dense:
    """The result of a dense twin: logits, the tokens that enter the first block, and the weights of each block."""

    def __init__(self, logits: Tensor, tokens: Tensor, weights: list[Tensor]) -> None:
        self.logits, self.weights = logits, [weight.detach() for weight in weights]
        self.gradients = [weight.grad for weight in weights]
        assert tokens.grad is not None
        self.relevance = (tokens * tokens.grad).sum(-1).detach()

    def readout(self, kind: str) -> Tensor:
        row = torch.zeros(len(self.logits), 1, TOKENS, dtype=torch.float64)
        row[:, :, 0 if kind == "cls" else slice(1, None)] = 1
        return row / row.sum(-1, keepdim=True)

    def rollout(self, kind: str) -> Tensor:
        row = self.readout(kind)
        for weights in reversed(self.weights):
            mixed = weights.mean(1) + torch.eye(TOKENS, dtype=torch.float64)
            row = row @ (mixed / mixed.sum(-1, keepdim=True))
        return patches(row[:, 0])

    def generic(self, kind: str) -> Tensor:
        row = self.readout(kind)
        for weights, gradient in zip(reversed(self.weights), reversed(self.gradients), strict=True):
            assert gradient is not None
            row = row + row @ (weights * gradient).clamp_min(0).mean(1)
        return patches(row[:, 0])


def patches(tokens: Tensor) -> Tensor:
    """Return (batch, token) as the map of the patches."""
    side = SIDE // PATCH
    return tokens[:, 1:].unflatten(1, (side, side))
