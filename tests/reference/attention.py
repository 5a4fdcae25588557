"""Attention from the unfused code of each library, without vitscope: the maps that vitscope must reproduce."""

from typing import Any

import torch
from torch import Tensor, nn


def attention(module: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Return (batch, head, token, token) of every block, from the library's eager code or its formula."""
    library = type(module).__module__.split(".")[0]
    with torch.no_grad():
        return {"transformers": _transformers, "timm": _timm, "torchvision": _torchvision}[library](module, pixels)


def _transformers(module: Any, pixels: Tensor) -> list[Tensor]:
    """Return the result of ``output_attentions`` with the eager implementation."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        return list(module(pixel_values=pixels, output_attentions=True, **resize_positions(module)).attentions)
    finally:
        module.set_attn_implementation(before)


def resize_positions(module: Any) -> dict[str, bool]:
    """Return the argument that makes transformers resample a position embedding, for models that need it."""
    automatic = ("dinov2", "dinov2_with_registers", "dinov3_vit", "beit")
    return {} if module.config.model_type in automatic else {"interpolate_pos_encoding": True}


def _timm(module: Any, pixels: Tensor) -> list[Tensor]:
    """Return the input of each block's attention dropout, with the fused kernel disabled."""
    maps: list[Tensor] = []
    attentions = [block.attn for block in module.blocks]
    before = [attention.fused_attn for attention in attentions]
    hooks = [a.attn_drop.register_forward_hook(lambda _, args, __: maps.append(args[0].clone())) for a in attentions]
    try:
        for attention in attentions:
            attention.fused_attn = False
        module(pixels)
    finally:
        for attention, fused, hook in zip(attentions, before, hooks, strict=True):
            attention.fused_attn = fused
            hook.remove()
    return maps


def _torchvision(module: Any, pixels: Tensor) -> list[Tensor]:
    """Return softmax(q·kᵀ/√d) from the input of each block's attention and its joint projection."""
    inputs: list[Tensor] = []
    blocks = [block.self_attention for block in module.encoder.layers]
    hooks = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone())) for block in blocks]
    try:
        module(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    maps = []
    for block, x in zip(blocks, inputs, strict=True):
        q, k, _ = (x @ block.in_proj_weight.T + block.in_proj_bias).chunk(3, dim=-1)
        q, k = (t.unflatten(-1, (block.num_heads, -1)).transpose(1, 2) for t in (q, k))
        maps.append((q @ k.transpose(-1, -2) / block.head_dim**0.5).softmax(-1))
    return maps
