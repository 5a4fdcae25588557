"""Transformer attribution (2012.09838) of a Swin of timm or torchvision: relevance goes back one layer at a time.

It does not use vitscope. Windows are index lists, found token by token; −1 is padding. All numbers are float64 and
belong to one image, (row, column, channel). The relevance of padding and of exact zeros is counted apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.transformer_attribution import divide, through_linear, through_product, through_sum


@dataclass(eq=False)
class Block:
    module: Any  # with norm1, norm2, attn.qkv and attn.proj
    fc1: nn.Linear
    fc2: nn.Linear
    bias: Tensor  # (head, slot, slot)
    window: tuple[int, int]
    shift: tuple[int, int]
    scale: Tensor  # of the products, (head, 1, 1)
    second: bool  # Swin v2: cosine attention, and each norm follows its branch


@dataclass(eq=False)
class Model:
    embed: Callable[[Tensor], Tensor]  # pixels → (row, column, channel)
    stages: list[list[Any]]  # blocks and merging layers, in order
    norm: nn.Module
    head: nn.Linear
    roll_first: bool


@dataclass(eq=False)
class Result:
    row: Tensor  # (token,)
    padding: float  # the part of the row on padding
    matrices: list[Tensor] = field(default_factory=list)  # Ā of each block, (window, slot, slot), last first
    totals: list[float] = field(default_factory=list)  # relevance at the input of each block, last first
    lost: list[float] = field(default_factory=list)  # relevance on padding behind the input of each block, last first


def from_timm(module: Any) -> Model:
    stages = []
    for stage in module.layers:
        blocks: list[Any] = [] if isinstance(stage.downsample, nn.Identity) else [stage.downsample]
        for block in stage.blocks:
            heads, width = block.attn.num_heads, block.attn.qkv.in_features // block.attn.num_heads
            scale, bias = (
                torch.full((heads, 1, 1), width**-0.5, dtype=torch.float64, device="cpu"),
                block.attn._get_rel_pos_bias()[0].detach(),
            )
            places = (tuple(block.window_size), tuple(block.shift_size))
            blocks.append(Block(block, block.mlp.fc1, block.mlp.fc2, bias, *places, scale, False))
        stages.append(blocks)
    return Model(lambda pixels: module.patch_embed(pixels)[0], stages, module.norm, module.head.fc, True)


def from_torchvision(module: Any) -> Model:
    stages: list[list[Any]] = []
    for part in module.features[1:]:
        if not isinstance(part, nn.Sequential):
            stages.append([part])
            continue
        for block in part:
            attention = block.attn
            second = hasattr(attention, "logit_scale")
            width = attention.qkv.in_features // attention.num_heads
            scale = torch.full((attention.num_heads, 1, 1), width**-0.5, dtype=torch.float64, device="cpu")
            scale = attention.logit_scale.detach().clamp(max=4.605170185988092).exp() if second else scale
            places = (tuple(attention.window_size), tuple(attention.shift_size))
            bias = attention.get_relative_position_bias()[0].detach()
            stages.append([Block(block, block.mlp[0], block.mlp[3], bias, *places, scale, second)])
    return Model(lambda pixels: module.features[0](pixels)[0], stages, module.norm, module.head, False)


def windows(
    height: int, width: int, size: tuple[int, int], shift: tuple[int, int], roll_first: bool
) -> tuple[Tensor, Tensor]:
    """Return the token in each slot of each window, (window, slot), and whether each pair of slots may attend."""
    full = (-(-height // size[0]) * size[0], -(-width // size[1]) * size[1])
    if not roll_first:
        shift = (0 if size[0] >= full[0] else shift[0], 0 if size[1] >= full[1] else shift[1])
    slots, regions = [], []
    for top in range(0, full[0], size[0]):
        for left in range(0, full[1], size[1]):
            window, region = [], []
            for i in range(top, top + size[0]):
                for j in range(left, left + size[1]):
                    if roll_first:
                        inside = i < height and j < width
                        y, x = (i + shift[0]) % height, (j + shift[1]) % width
                    else:
                        y, x = (i + shift[0]) % full[0], (j + shift[1]) % full[1]
                        inside = y < height and x < width
                    window.append(y * width + x if inside else -1)
                    ends = [bool(s) and place >= side - s for s, place, side in zip(shift, (i, j), full, strict=True)]
                    region.append(2 * ends[0] + ends[1])
            slots.append(window)
            regions.append(region)
    place = torch.tensor(regions, device="cpu")
    return torch.tensor(slots, device="cpu"), place[:, :, None] == place[:, None, :]


def to_slots(tokens: Tensor, slots: Tensor) -> Tensor:
    """Return (window, slot, channel) of (token, channel), zeros for padding."""
    return tokens[slots.clamp(min=0)] * (slots >= 0)[..., None]


def from_slots(values: Tensor, slots: Tensor, count: int) -> Tensor:
    """Return (token, channel) of (window, slot, channel), without padding."""
    tokens = torch.zeros(count, values.shape[-1], dtype=torch.float64, device="cpu")
    tokens[slots[slots >= 0]] = values[slots >= 0]
    return tokens


def forward_block(block: Block, x: Tensor, roll_first: bool) -> dict[str, Tensor]:
    """Return every activation of a block, tokens first."""
    module, (height, width, channels) = block.module, x.shape
    slots, pairs = windows(height, width, block.window, block.shift, roll_first)
    state = {"slots": slots, "input": x.flatten(0, 1)}
    normed = state["input"] if block.second else module.norm1(state["input"])
    state["placed"] = to_slots(normed, slots)
    bias = module.attn.qkv.bias
    if block.second:  # keys have no bias
        bias = torch.cat([bias[:channels], torch.zeros_like(bias[:channels]), bias[2 * channels :]])
    joint = state["placed"] @ module.attn.qkv.weight.T + bias
    joint = joint.unflatten(-1, (3, len(block.bias), -1)).permute(2, 0, 3, 1, 4)
    state["query"], state["key"], state["value"] = joint.unbind(0)
    for name in ("query", "key"):
        norm = state[name].norm(dim=-1, keepdim=True).clamp(min=1e-12)
        state[f"{name} factor"] = state[name] / norm if block.second else state[name]
    products = state["query factor"] @ state["key factor"].mT
    logits = products * block.scale + block.bias + torch.where(pairs, 0.0, -100.0)[:, None]
    state["weights"] = logits.softmax(-1)
    state["mixed"] = (state["weights"] @ state["value"]).transpose(1, 2).flatten(2)
    attended = from_slots(module.attn.proj(state["mixed"]), slots, height * width)
    state["attended"] = module.norm1(attended) if block.second else attended
    state["middle"] = state["input"] + state["attended"]
    state["normed2"] = state["middle"] if block.second else module.norm2(state["middle"])
    state["hidden"] = nn.functional.gelu(block.fc1(state["normed2"]))
    changed = block.fc2(state["hidden"])
    state["changed"] = module.norm2(changed) if block.second else changed
    state["output"] = (state["middle"] + state["changed"]).view(x.shape)
    return state


def backward_block(block: Block, s: dict[str, Tensor], relevance: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the relevance of a block's input, of its weights, and what padding keeps. Norms and GELU keep nothing."""
    slots, attention = s["slots"], block.module.attn
    skipped, of_changed = through_sum(s["middle"], s["changed"], relevance.flatten(0, 1))
    of_middle = skipped + through_linear(block.fc1, s["normed2"], through_linear(block.fc2, s["hidden"], of_changed))
    skipped, of_attended = through_sum(s["input"], s["attended"], of_middle)
    of_mixed = through_linear(attention.proj, s["mixed"], to_slots(of_attended, slots))
    heads = of_mixed.unflatten(-1, (len(block.bias), -1)).transpose(1, 2)
    of_weights, of_value = through_product(s["weights"], s["value"], heads)
    of_query, of_key = through_product(s["query factor"], s["key factor"].mT, of_weights)
    lost = float(of_weights[(s["query factor"] @ s["key factor"].mT) == 0].sum())
    joint = torch.stack([of_query, of_key.mT, of_value]).permute(1, 3, 0, 2, 4).flatten(2)
    lost += float(joint[slots < 0].sum())
    placed = through_linear(attention.qkv, s["placed"], joint)
    return (skipped + from_slots(placed, slots, len(skipped))).view(relevance.shape), of_weights, lost


def forward_merge(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Return every activation of a merging layer."""
    height, width, _ = x.shape
    groups, _ = windows(height, width, (2, 2), (0, 0), True)
    groups = groups[:, [0, 2, 1, 3]]
    joined = to_slots(x.flatten(0, 1), groups).flatten(1)
    second = layer.norm.normalized_shape[0] != joined.shape[1]
    factor = joined if second else layer.norm(joined)
    output = layer.norm(layer.reduction(joined)) if second else layer.reduction(factor)
    state = {"groups": groups, "joined": joined, "factor": factor, "input": x}
    return state | {"output": output.view((height + 1) // 2, (width + 1) // 2, -1)}


def backward_merge(layer: Any, s: dict[str, Tensor], relevance: Tensor) -> tuple[Tensor, float]:
    """Return the relevance of a merging layer's input, and what padding keeps."""
    height, width, _ = s["input"].shape
    of_four = through_linear(layer.reduction, s["factor"], relevance.flatten(0, 1)).unflatten(-1, (4, -1))
    lost = float(of_four[s["groups"] < 0].sum())
    return from_slots(of_four, s["groups"], height * width).view(s["input"].shape), lost


def transformer_attribution(model: Model, pixels: Tensor, target: int) -> tuple[Result, Tensor]:
    """Return the attribution of one image, and the model's logits."""
    layers = [layer for stage in model.stages for layer in stage]
    with torch.enable_grad():
        x, states = model.embed(pixels.double()), []
        for layer in layers:
            is_block = isinstance(layer, Block)
            states.append(forward_block(layer, x, model.roll_first) if is_block else forward_merge(layer, x))
            x = states[-1]["output"]
        normed = model.norm(x)
        pooled = normed.mean((0, 1))
        logits = model.head(pooled)
    gradients = torch.autograd.grad(logits[target], [state["weights"] for state in states if "weights" in state])
    with torch.no_grad():
        start = torch.eye(len(logits), dtype=torch.float64, device="cpu")[target]
        share = divide(through_linear(model.head, pooled, start), pooled)
        relevance = normed * share / normed[..., 0].numel()
        row = torch.full((normed[..., 0].numel(),), 1 / normed[..., 0].numel(), dtype=torch.float64, device="cpu")
        result, remaining, lost = Result(row, 0.0), list(gradients), 0.0
        for layer, state in zip(layers[::-1], states[::-1], strict=True):
            if isinstance(layer, Block):
                relevance, of_weights, part = backward_block(layer, state, relevance)
                matrix = (remaining.pop() * of_weights).clamp(min=0).mean(1)
                pulled = to_slots(row[:, None], state["slots"]).mT @ matrix
                result.padding += float(pulled[:, 0][state["slots"] < 0].sum())
                row = row + from_slots(pulled.mT, state["slots"], len(row))[:, 0]
                lost += part
                result.matrices.append(matrix)
                result.totals.append(float(relevance.sum()))
                result.lost.append(lost)
            else:
                relevance, part = backward_merge(layer, state, relevance)
                lost += part
                groups, count = state["groups"], state["input"][..., 0].numel()
                quarters = (row / 4)[:, None].expand(-1, 4)
                result.padding += float(quarters[groups < 0].sum())
                row = from_slots(quarters[..., None], groups, count)[:, 0]
        result.row = row
    return result, logits.detach()
