"""Slow float64 references of artefact tokens, register neurons and test-time registers, from their papers."""

import math

import numpy as np
import torch
from torch import Tensor, nn


def valley(norms: np.ndarray) -> float | None:
    """Return the norm in the deepest valley right of the median, from a kernel density summed directly."""
    logs = np.log(np.asarray(norms, dtype=np.float64))
    count, median = len(logs), np.median(logs)
    quartiles = np.quantile(logs, 0.75) - np.quantile(logs, 0.25)
    width = max(0.9 * min(logs.std(), quartiles / 1.34) / count**0.2, 0.06)
    grid = np.arange(logs.min() - 4 * width, logs.max() + 4 * width, width / 10)
    density = np.array([kernel((x - logs) / width).sum() for x in grid])
    best, lowest = None, math.inf
    for i in range(1, len(grid) - 1):
        above = logs[logs > grid[i]]
        if grid[i] <= median or not density[i - 1] >= density[i] <= density[i + 1]:
            continue
        if len(above) < 10 or len(above) < 0.0005 * count or density[i] > density[i:].max() / 2:
            continue
        if math.exp(np.median(above)) >= 2 * math.exp(median) and density[i] < lowest:
            best, lowest = math.exp(grid[i]), density[i]
    return best


def kernel(distance: np.ndarray) -> np.ndarray:
    """Return the Gaussian kernel, zero beyond six bandwidths."""
    return np.where(np.abs(distance) <= 6, np.exp(-0.5 * distance**2), 0.0)


class Run:
    """A float64 forward pass of timm's plain ViT, written out, with optional registers."""

    def __init__(self, module: nn.Module, image: Tensor, moves: dict[int, list[int]] | None = None, count: int = 0):
        weights = {name: tensor.detach().double() for name, tensor in module.state_dict().items()}
        heads = module.blocks[0].attn.num_heads
        self.norms: list[Tensor] = []  # one vector over all tokens for each block
        self.hidden: list[Tensor] = []  # (token, neuron) of each block, before registers
        self.cls_attention: list[Tensor] = []  # (token,) mean over heads
        size = module.patch_embed.patch_size[0]
        columns = torch.nn.functional.unfold(image.double()[None], size, stride=size)[0].T
        kernel = weights["patch_embed.proj.weight"].flatten(1)
        patches = columns @ kernel.T + weights["patch_embed.proj.bias"]
        x = torch.cat([weights["cls_token"][0], patches]) + weights["pos_embed"][0]
        x = torch.cat([x[:1], torch.zeros(count, x.shape[1], dtype=torch.float64), x[1:]])
        for index in range(len(module.blocks)):
            w = {name.split(".", 2)[2]: t for name, t in weights.items() if name.startswith(f"blocks.{index}.")}
            y = normed(x, w["norm1.weight"], w["norm1.bias"])
            qkv = y @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
            query, key, value = qkv.reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
            attention = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
            self.cls_attention.append(attention[:, 0].mean(0))
            mixed = (attention @ value).transpose(0, 1).reshape(len(x), -1)
            x = x + mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"]
            y = normed(x, w["norm2.weight"], w["norm2.bias"])
            hidden = y @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            self.hidden.append(hidden.clone())
            for neuron in (moves or {}).get(index, []):
                values = hidden[:, neuron].clone()
                largest = max(values.tolist(), key=abs)
                for token in range(1, len(x)):
                    hidden[token, neuron] = largest if token < 1 + count else 0.0
            x = x + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
            self.norms.append(x.square().sum(1).sqrt())
        # The classifier reads CLS or, after average pooling, the mean of the patches; never a register.
        pooled = "fc_norm.weight" in weights
        y = x[1 + count :].mean(0, keepdim=True) if pooled else x[:1]
        name = "fc_norm" if pooled else "norm"
        y = normed(y, weights[f"{name}.weight"], weights[f"{name}.bias"])
        self.logits = (y @ weights["head.weight"].T + weights["head.bias"])[0]


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return LayerNorm of rows, with timm's epsilon."""
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * weight + bias


def neuron_scores(module: nn.Module, images: Tensor, above: Tensor) -> Tensor:
    """Return (block, neuron): mean |a| on artefacts less mean |a| elsewhere, times the norm of the output weights."""
    runs = [Run(module, image) for image in images]
    rows = []
    for index, block in enumerate(module.blocks):
        inside, outside = [], []
        for run, places in zip(runs, above, strict=True):
            for patch, artefact in enumerate(places.flatten().tolist()):
                (inside if artefact else outside).append(run.hidden[index][1 + patch].abs())
        size = block.mlp.fc2.weight.detach().double().square().sum(0).sqrt()
        rows.append((sum(inside) / len(inside) - sum(outside) / len(outside)) * size)
    return torch.stack(rows)
