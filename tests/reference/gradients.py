"""Gradients of a ViT that is written out in plain torch, float64, with every map and every bias kept in the graph.

It does not use vitscope. The weights are those of timm's or transformers' ViT. A rule set is one or two lines in the
forward pass: ``detach`` makes a constant, and ``half`` lets half of a gradient through.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Affine = tuple[Tensor, Tensor]  # weight and bias
Score = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Layer:
    norm1: Affine
    query: Affine
    key: Affine
    value: Affine
    out: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


@dataclass(eq=False)
class Weights:
    patch: nn.Conv2d
    cls: Tensor
    position: Tensor
    layers: list[Layer]
    norm: Affine
    head: Affine
    heads: int
    eps: float
    reads_mean: bool  # of the patches, with the norm after the mean; otherwise the CLS token, with the norm before


def affine(module: Any) -> Affine:
    return module.weight.detach().double(), module.bias.detach().double()


def from_timm(module: Any) -> Weights:
    layers = []
    for block in module.blocks:
        weight, bias = affine(block.attn.qkv)
        query, key, value = zip(weight.chunk(3), bias.chunk(3), strict=True)
        layers.append(
            Layer(
                affine(block.norm1),
                *(query, key, value),
                affine(block.attn.proj),
                affine(block.norm2),
                affine(block.mlp.fc1),
                affine(block.mlp.fc2),
            )
        )
    mean = module.global_pool == "avg"
    norm = module.fc_norm if mean else module.norm
    return Weights(
        module.patch_embed.proj,
        *(module.cls_token, module.pos_embed, layers),
        *(affine(norm), affine(module.head)),
        *(module.blocks[0].attn.num_heads, norm.eps, mean),
    )


def from_transformers(module: Any) -> Weights:
    vit = module.vit
    layers = [
        Layer(
            affine(block.layernorm_before),
            *(affine(block.attention.q_proj), affine(block.attention.k_proj), affine(block.attention.v_proj)),
            affine(block.attention.o_proj),
            affine(block.layernorm_after),
            *(affine(block.mlp.fc1), affine(block.mlp.fc2)),
        )
        for block in vit.layers
    ]
    embeddings, config = vit.embeddings, module.config
    return Weights(
        embeddings.patch_embeddings.projection,
        *(embeddings.cls_token, embeddings.position_embeddings, layers),
        *(affine(vit.layernorm), affine(module.classifier)),
        *(config.num_attention_heads, config.layer_norm_eps, False),
    )


@dataclass(eq=False)
class Run:
    """A run with its graph: everything that a method reads, by block."""

    pixels: Tensor
    logits: Tensor
    readout: Tensor  # (token,)
    streams: list[Tensor] = field(default_factory=list)  # inputs of the blocks
    norms: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)  # (batch, head, query, key)
    scores: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)  # behind the first stream, one copy for each token

    def gradients(self, score: Score, tensors: list[Tensor]) -> list[Tensor]:
        results = torch.autograd.grad(score(self.logits).sum(), tensors, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, results, strict=True)]


def half(x: Tensor) -> Tensor:
    """Return x, with half of its gradient."""
    return x / 2 + (x / 2).detach()


def run(weights: Weights, pixels: Tensor, rules: str = "plain", gamma: float = 0.0, conv_gamma: float = 0.0) -> Run:
    libra, lrp = rules == "libra", rules == "attn_lrp"
    share = half if lrp else lambda x: x
    biases: list[Tensor] = []

    def linear(x: Tensor, layer: Affine) -> Tensor:
        bias = layer[1].expand(*x.shape[:-1], -1).clone().requires_grad_()
        biases.append(bias)
        if gamma:  # the bias is part of the rule; its copy adds nothing but its own gradient
            return GammaRule.apply(x, *layer, gamma) + (bias - bias.detach())
        return x @ layer[0].T + bias

    def norm(x: Tensor, layer: Affine) -> Tensor:
        deviation = (x.var(-1, unbiased=False, keepdim=True) + weights.eps).sqrt()
        deviation = deviation if rules == "plain" else deviation.detach()
        bias = layer[1].expand_as(x).clone().requires_grad_()
        biases.append(bias)
        return (x - x.mean(-1, keepdim=True)) / deviation * layer[0] + bias

    def gelu(x: Tensor) -> Tensor:
        gate = (1 + torch.erf(x / 2**0.5)) / 2
        return x * (gate if rules == "plain" else gate.detach())

    def by_head(x: Tensor) -> Tensor:
        return x.unflatten(-1, (weights.heads, -1)).transpose(1, 2)

    pixels = pixels.double().clone().requires_grad_()
    kernel = weights.patch.weight.detach().double()
    size = kernel.shape[-1]
    batch, channels, height, width = pixels.shape
    cut = pixels.view(batch, channels, height // size, size, width // size, size).permute(0, 2, 4, 1, 3, 5)
    patch_bias = weights.patch.bias.detach().double()
    patches = cut.flatten(3).flatten(1, 2)
    tokens = (
        GammaRule.apply(patches, kernel.flatten(1), patch_bias, conv_gamma)
        if conv_gamma
        else patches @ kernel.flatten(1).T + patch_bias
    )
    x = torch.cat([weights.cls.detach().double().expand(batch, -1, -1), tokens], 1) + weights.position.detach().double()
    result = Run(pixels, x, torch.zeros(x.shape[1], dtype=torch.float64))
    for layer in weights.layers:
        result.streams.append(x)
        normed = norm(x, layer.norm1)
        query, key, value = (by_head(linear(normed, part)) for part in (layer.query, layer.key, layer.value))
        scores = share(query) @ share(key).mT * query.shape[-1] ** -0.5
        attention = scores.softmax(-1)
        attention = attention.detach().requires_grad_() if libra else attention
        mixed = share(attention) @ share(value)
        x = x + linear(mixed.transpose(1, 2).flatten(2), layer.out)
        x = x + linear(gelu(linear(norm(x, layer.norm2), layer.fc1)), layer.fc2)
        result.norms.append(normed)
        result.scores.append(scores)
        result.maps.append(attention)
        result.outputs.append(x)
    if weights.reads_mean:
        result.readout[1:] = 1 / (x.shape[1] - 1)
        features = norm(x[:, 1:].mean(1), weights.norm)
    else:
        result.readout[0] = 1
        features = norm(x, weights.norm)[:, 0]
    result.logits = linear(features, weights.head)
    result.biases = biases
    return result


def generic_attention(ran: Run, score: Score, start_layer: int = 0) -> Tensor:
    """Return (batch, token) of r ← r + r · E_h[(A ⊙ ∇A)⁺], from the last block to the first."""
    gradients = ran.gradients(score, ran.maps)
    row = ran.readout.expand(len(ran.logits), 1, -1)
    for attention, gradient in list(zip(ran.maps, gradients, strict=True))[
        : start_layer - 1 if start_layer else None : -1
    ]:
        row = row + row @ (attention * gradient).clamp_min(0).mean(1)
    return row[:, 0].detach()


def gradient_rollout(ran: Run, score: Score, start_layer: int = 0, discard_ratio: float = 0.0) -> Tensor:
    """Return (batch, token) of r ← r · rownorm((E_h[A ⊙ ∇A])⁺ + I), from the last block to the first."""
    gradients = ran.gradients(score, ran.maps)
    rows = []
    for image in range(len(ran.logits)):
        row = ran.readout
        for block in range(len(ran.maps) - 1, start_layer - 1, -1):
            matrix = (ran.maps[block][image] * gradients[block][image]).detach().mean(0).clamp_min(0)
            smallest = matrix.flatten().argsort(stable=True)[: int(discard_ratio * matrix.numel())]
            matrix = matrix.flatten().index_fill(0, smallest, 0.0).view_as(matrix) + torch.eye(len(matrix))
            row = row @ (matrix / matrix.sum(1, keepdim=True))
        rows.append(row)
    return torch.stack(rows)


def cam(x: Tensor, g: Tensor, variant: str) -> Tensor:
    """Return the map of one image, (patch,), from activations and gradients (patch, channel), channel by channel."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for a, b in zip(x.T, g.T, strict=True):
        if variant == "grad_cam":
            total += a * b.mean()
        elif variant == "hires_cam":
            total += a * b
        elif variant == "layer_cam":
            total += a * b.clamp_min(0)
        elif variant == "element_wise":
            total += (a * b).clamp_min(0)
        elif variant == "x_grad_cam":
            total += a * sum(float(p) * float(q) / (float(a.sum()) + 1e-7) for p, q in zip(a, b, strict=True))
        else:
            weight = 0.0
            for slope in b.tolist():
                alpha = slope**2 / (2 * slope**2 + float(a.sum()) * slope**3 + 1e-6) if slope else 0.0
                weight += alpha * max(slope, 0.0)
            total += a * weight
    return total


def relevance(ran: Run, score: Score, tensor: Tensor) -> Tensor:
    """Return Σ_c x ⊙ ∇x, (batch, token) or, for pixels, (batch, height, width)."""
    (gradient,) = ran.gradients(score, [tensor])
    return (tensor * gradient).sum(1 if tensor is ran.pixels else -1).detach()


def libra_map(ran: Run, score: Score, variant: str) -> Tensor:
    """Return (batch, token) of a variant of LibraGrad from a run with Libra's rules."""
    total = torch.zeros(ran.streams[0].shape[:2], dtype=torch.float64)
    gradients = ran.gradients(score, ran.streams)
    count = 1 if variant in ("full_grad", "input_x_gradient") else len(ran.streams)
    for stream, gradient in list(zip(ran.streams, gradients, strict=True))[:count]:
        if variant == "grad_cam_plus":
            gradient = gradient.mean(1, keepdim=True)
        total += (stream * gradient).sum(-1).detach()
    if variant.startswith("full_grad"):
        for bias, gradient in zip(ran.biases, ran.gradients(score, ran.biases), strict=True):
            if bias.ndim == 3:  # the others are behind the pooling and belong to no token
                total += (bias * gradient).sum(-1).detach()
    return total


def softmax_gap(ran: Run, score: Score) -> Tensor:
    """Return Σ A ⊙ dA − Σ log A ⊙ ds over all softmaxes, (batch,): what AttnLRP leaves in them."""
    total = torch.zeros(len(ran.logits), dtype=torch.float64)
    to_maps, to_scores = (ran.gradients(score, tensors) for tensors in (ran.maps, ran.scores))
    for attention, to_map, to_score in zip(ran.maps, to_maps, to_scores, strict=True):
        total += (attention * to_map - attention.log() * to_score).sum((1, 2, 3)).detach()
    return total


def integrated_gradients(function: Callable[[Tensor], Tensor], x: Tensor, origin: Tensor, steps: int) -> Tensor:
    """Return (x − x′) ⊙ ∫ ∇f(x′ + t (x − x′)) dt with the nodes of Gauss and Legendre, found as roots."""
    from numpy.polynomial import Polynomial
    from scipy.special import legendre

    polynomial = Polynomial(legendre(steps).c[::-1])
    total = torch.zeros_like(x)
    for node in polynomial.roots().real:
        weight = 2 / ((1 - node**2) * polynomial.deriv()(node) ** 2)
        point = (origin + (x - origin) * (node + 1) / 2).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(point).sum(), point)
        total += gradient * weight / 2
    return (x - origin) * total


def gamma_rule(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """Return the gradient of each row of x by the generalised γ-rule, from every single contribution.

    A contribution with the sign of its output counts (1 + γ) times, the bias included.
    """
    result = torch.zeros_like(x)
    for k in range(len(weight)):
        terms = torch.cat([x * weight[k], bias[k].expand(*x.shape[:-1], 1)], -1)
        output = terms.sum(-1, keepdim=True)
        grown = torch.where(terms * output > 0, (1 + gamma) * terms, terms)
        total = grown.sum(-1, keepdim=True)
        total = torch.where(total < 0, total - 1e-6, total + 1e-6)
        share = torch.where(x == 0, 0.0, grown[..., :-1] / x)
        result += torch.where(output == 0, 0.0, share * output / total) * gradient[..., k, None]
    return result


class GammaRule(torch.autograd.Function):
    """A linear layer with the γ-rule as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.gamma = gamma
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gamma_rule(*ctx.saved_tensors, gradients[0], ctx.gamma), None, None, None
