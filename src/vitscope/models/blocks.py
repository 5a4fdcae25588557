"""The blocks of a transformer, and the modules at which their branches start and end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitscope.errors import UnknownModelError
from vitscope.models.backends.names import (
    ATTENTION,
    DEPTHS,
    LAYER_SCALES,
    NORM_AFTER_ATTENTION,
    NORM_BEFORE_ATTENTION,
    NORM_BEFORE_MLP,
    POST_NORM,
    SCALE,
)


@dataclass(frozen=True, eq=False)
class Block:
    """One block: x + attention(x), then x + MLP(x), with the norms and scales of the model's family.

    Attributes:
        path: path of the block inside the model.
        module: the block itself.
        attention: the attention module.
        attention_end: module whose output the attention branch adds to the residual stream. In transformers' BEiT
            this output is first multiplied by a parameter.
        mlp_end: module whose output the MLP branch adds to the residual stream.
        stream: module whose input is the residual stream at the start of the MLP branch.
        width: number of channels of the residual stream.
        first_norm: the norm before attention; None for a post-norm block, which normalises the output of attention.
    """

    path: str
    module: nn.Module
    attention: nn.Module
    attention_end: nn.Module
    mlp_end: nn.Module
    stream: nn.Module
    width: int
    first_norm: nn.Module | None = None


def blocks(module: nn.Module) -> list[Block]:
    """Return the blocks of a vision transformer from transformers, timm or torchvision, in order.

    Raises:
        UnknownModelError: the module contains no such blocks.
    """
    candidates = (_block_or_none(path, child) for path, child in module.named_modules())
    result = [block for block in candidates if block is not None]
    if not result:
        raise UnknownModelError(f"{type(module).__name__} has no blocks of attention and MLP that vitscope recognises")
    return result


def _block_or_none(path: str, module: nn.Module) -> Block | None:
    """Return the module as a block; None if it is not one."""
    children = dict(module.named_children())
    attention, norm = _first(children, ATTENTION), _first(children, NORM_BEFORE_MLP)
    mlp_in, mlp_out = children.get("mlp"), children.get("mlp")
    if "intermediate" in children and "output" in children:  # transformers' Swin v2
        mlp_in, mlp_out = children["intermediate"], children["output"]
    if attention is None or norm is None or mlp_in is None or mlp_out is None:
        return None
    width = _width(norm)
    if type(module).__name__ in POST_NORM:
        first = _first(children, NORM_AFTER_ATTENTION)
        assert first is not None
        return Block(path, module, attention, first, norm, mlp_in, width)
    ends = attention, mlp_out
    for scales in LAYER_SCALES:
        if all(_is_active(children.get(name)) for name in scales):
            ends = children[scales[0]], children[scales[1]]
    if getattr(module, SCALE, None) is not None and all(name in children for name in DEPTHS):
        ends = children[DEPTHS[0]], children[DEPTHS[1]]
    return Block(path, module, attention, *ends, norm, width, _first(children, NORM_BEFORE_ATTENTION))


def _first(children: Mapping[str, nn.Module], names: tuple[str, ...]) -> nn.Module | None:
    return next((children[name] for name in names if name in children), None)


def _is_active(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _width(norm: Any) -> int:
    return int(norm.normalized_shape[-1])
