"""What enters, crosses and leaves each block of a library's own ViT or timm's Swin, with every attention map.

It does not use vitscope. Attention is written out in place of torch's fused kernel, and streams are observed at the
modules that the libraries call with them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The module that is called with the stream behind the attention, by class of the block.
AFTER_ATTENTION = {
    "Block": "norm2",  # timm
    "EvaBlock": "norm2",
    "SwinTransformerBlock": "norm2",
    "EncoderBlock": "ln_2",  # torchvision
    "CLIPEncoderLayer": "layer_norm2",  # transformers
    "SiglipEncoderLayer": "layer_norm2",
    "ViTLayer": "layernorm_after",
    "DeiTLayer": "layernorm_after",
    "BeitLayer": "layernorm_after",
    "Dinov2Layer": "norm2",
    "Dinov2WithRegistersLayer": "norm2",
    "DINOv3ViTLayer": "norm2",
}


@dataclass(eq=False)
class Streams:
    """By block: its input, the stream between its halves and its output, (batch, token, channel), and its map."""

    output: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    middles: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    maps: list[Tensor] = field(default_factory=list)  # (batch, head, query, key)
    blocks: list[nn.Module] = field(default_factory=list)


def streams(module: nn.Module, predict: Callable[[], Tensor]) -> Streams:
    """Return a run of a module with its graph; ``predict`` calls the module."""
    run = Streams(torch.empty(0))
    handles: list[Any] = []
    for block in module.modules():
        name = AFTER_ATTENTION.get(type(block).__name__)
        if name is None:
            continue
        run.blocks.append(block)
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs: run.inputs.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        handles.append(getattr(block, name).register_forward_pre_hook(lambda _, args: run.middles.append(args[0])))
        handles.append(
            block.register_forward_hook(lambda _, __, y: run.outputs.append(y[0] if isinstance(y, tuple) else y))
        )

    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **options: Any) -> Tensor:
        scale = options.get("scale")
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
        run.maps.append(weights)
        return weights @ v

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())  # without a graph, nn.MultiheadAttention takes a kernel of its own
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        for child in module.modules():
            if hasattr(child, "fused_attn"):  # its other branch does the softmax outside of these functions
                stack.enter_context(mock.patch.object(child, "fused_attn", True))
        run.output = predict()
    for handle in handles:
        handle.remove()
    run.maps = run.maps[: len(run.blocks)]  # a pooling layer attends last
    return run


def gradients(run: Streams, tensors: list[Tensor], target: int) -> list[Tensor]:
    """Return the gradient of an output with respect to each tensor."""
    return list(torch.autograd.grad(run.output[:, target].sum(), tensors, retain_graph=True))
