"""LeGrad (2404.03214) of timm models, block by block in float64: one gradient for each block, with explicit attention.

It does not use vitscope. Attention is the library's own slow code, observed at its dropout.
"""

from typing import Any

import torch
from torch import Tensor, nn


def without_fused_attention(module: nn.Module) -> nn.Module:
    """Return the module after all its attention layers were told to compute explicit weights."""
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False
    return module.double()


def le_grad(vit: Any, pixels: Tensor, target: int, start_layer: int = 0) -> Tensor:
    """Return the map of one image, (token,): CLS token and patches, or the tokens of the last stage of a Swin."""
    blocks = [child for child in vit.modules() if type(child).__name__ in ("Block", "SwinTransformerBlock")]
    attentions: list[Tensor] = []  # in the order of the blocks
    outputs: list[Tensor] = []
    handles = [
        *(
            block.attn.attn_drop.register_forward_hook(lambda _m, args, _o: attentions.append(args[0]))
            for block in blocks
        ),
        *(block.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for block in blocks),
    ]
    with torch.enable_grad():
        vit(pixels.double())
    for handle in handles:
        handle.remove()
    maps = []
    for index in range(start_layer, len(blocks)):
        tokens, attention = outputs[index], attentions[index]
        if tokens.shape != outputs[-1].shape:
            continue
        axes = tuple(range(1, tokens.ndim - 1))
        mean = tokens.mean(axes, keepdim=True).expand_as(tokens)
        answer = vit.forward_head(vit.norm(mean))[0, target]
        (gradient,) = torch.autograd.grad(answer, attention, retain_graph=True)
        maps.append(_on_tokens(gradient.clamp_min(0), tokens, blocks[index]))
    return torch.stack(maps).mean(0)


def _on_tokens(gradient: Tensor, tokens: Tensor, block: Any) -> Tensor:
    """Return the mean over heads and queries of (window, head, query, key), (token,)."""
    if tokens.ndim == 3:
        return gradient[0].mean((0, 1))
    from timm.models.swin_transformer import window_partition

    _, height, width, _ = tokens.shape
    places = torch.arange(height * width, device="cpu").view(1, height, width, 1)
    shift = tuple(-step for step in block.shift_size)
    slots = window_partition(torch.roll(places, shift, (1, 2)), block.window_size).flatten(1, 3)  # (window, slot)
    result = gradient.new_zeros(height * width)
    for window, positions in enumerate(slots):
        for slot, token in enumerate(positions.tolist()):
            result[token] += gradient[window, :, :, slot].mean(0).sum()
    return result / (height * width)


def pooled_le_grad(vit: Any, pixels: Tensor, target: int) -> Tensor:
    """Return the map of one image, (token,), of a model whose pooling layer attends to the tokens."""
    outputs: list[Tensor] = []
    handles = [block.register_forward_hook(lambda _m, _a, output: outputs.append(output)) for block in vit.blocks]
    with torch.no_grad():
        vit(pixels.double())
    for handle in handles:
        handle.remove()
    pool, maps = vit.attn_pool, []
    for tokens in outputs:
        normed = vit.norm(tokens)
        count, heads, width = normed.shape[1], pool.num_heads, pool.head_dim
        query = pool.q(pool.latent)[0].reshape(1, heads, width).transpose(0, 1)
        key, value = (part.transpose(0, 1) for part in pool.kv(normed)[0].reshape(count, 2, heads, width).unbind(1))
        weights = ((query @ key.mT) * width**-0.5).softmax(-1).detach().requires_grad_()
        pooled = pool.proj((weights @ value).transpose(0, 1).reshape(1, -1))
        pooled = pooled + pool.mlp(pool.norm(pooled))
        (gradient,) = torch.autograd.grad(vit.head(vit.fc_norm(pooled))[0, target], weights)
        maps.append(gradient.clamp_min(0).mean((0, 1)))
    return torch.stack(maps).mean(0)
