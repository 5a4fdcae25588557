"""Where the blocks of a transformer are, and where their branches begin and end: for what is put into them."""

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
    NORM_BEFORE_MLP,
    POST_NORM,
    SCALE,
)


@dataclass(frozen=True, eq=False)
class Block:
    """One block: x + attention(x), then x + MLP(x), with norms and scales wherever the family has them.

    Attributes:
        module: the block, and its ``path``.
        attention: the attention module.
        attention_end, mlp_end: the modules whose output is added to the stream; in transformers' BEiT it is multiplied
            by a parameter first.
        stream: the module whose input is the stream that the MLP's branch leaves from.
        width: channels of the stream.
    """

    path: str
    module: nn.Module
    attention: nn.Module
    attention_end: nn.Module
    mlp_end: nn.Module
    stream: nn.Module
    width: int


def blocks(module: nn.Module) -> list[Block]:
    """The blocks of a vision transformer of transformers, timm or torchvision, in order.

    Raises:
        UnknownModelError: nothing in the module is built like a block.
    """
    found = [_block(path, child) for path, child in module.named_modules()]
    known = [block for block in found if block is not None]
    if not known:
        raise UnknownModelError(f"{type(module).__name__} has no blocks of attention and MLP that vitscope knows")
    return known


def _block(path: str, module: nn.Module) -> Block | None:
    parts = dict(module.named_children())
    attention, norm = _first(parts, ATTENTION), _first(parts, NORM_BEFORE_MLP)
    mlp_in, mlp_out = parts.get("mlp"), parts.get("mlp")
    if "intermediate" in parts and "output" in parts:  # transformers' Swin v2
        mlp_in, mlp_out = parts["intermediate"], parts["output"]
    if attention is None or norm is None or mlp_in is None or mlp_out is None:
        return None
    width = _width(norm)
    if type(module).__name__ in POST_NORM:
        first = _first(parts, NORM_AFTER_ATTENTION)
        assert first is not None
        return Block(path, module, attention, first, norm, mlp_in, width)
    ends = attention, mlp_out
    for scales in LAYER_SCALES:
        if all(_scales(parts.get(name)) for name in scales):
            ends = parts[scales[0]], parts[scales[1]]
    if getattr(module, SCALE, None) is not None and all(name in parts for name in DEPTHS):
        ends = parts[DEPTHS[0]], parts[DEPTHS[1]]
    return Block(path, module, attention, *ends, norm, width)


def _first(parts: Mapping[str, nn.Module], names: tuple[str, ...]) -> nn.Module | None:
    return next((parts[name] for name in names if name in parts), None)


def _scales(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Identity)


def _width(norm: Any) -> int:
    return int(norm.normalized_shape[-1])
