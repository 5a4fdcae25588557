"""Run a model without position information: every position embedding and bias is replaced by its mean."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitscope.errors import UnsupportedModelError
from vitscope.models.backends.names import (
    POSITION_EMBEDDING_MODULES,
    POSITION_EMBEDDINGS,
    RELATIVE_BIAS_TABLES,
    RELATIVE_OFFSETS,
    ROTARY_MODULES,
)
from vitscope.models.vision_model import VisionModel


@dataclass(frozen=True, eq=False)
class Positions:
    """How a model represents the positions of its patches.

    Attributes:
        neutral: for each tensor of the model that holds positions, a replacement in which all positions are the same.
        kinds: the kinds of these tensors: ``"position embedding"``, ``"relative bias"``.
        rotary: whether queries and keys are also rotated by position, which cannot be replaced.
    """

    neutral: Mapping[Tensor, Tensor]
    kinds: tuple[str, ...]
    rotary: bool

    @property
    def can_be_neutral(self) -> bool:
        """Whether position tensors are known, and nothing else distinguishes positions."""
        return bool(self.neutral) and not self.rotary


def positions(model: VisionModel) -> Positions:
    """Return the tensors that hold a model's positions, each with a neutral replacement.

    A position embedding of patches becomes its mean over all patches; that of CLS and register tokens stays. A table
    of relative biases becomes its mean over all offsets, for each head. Softmax ignores a constant, so this is the
    same as no bias. Swin v2 computes its bias from offsets; these become zero, with the same effect.

    Raises:
        UnsupportedModelError: the rows of an embedding fit no grid of patches.
    """
    neutral: dict[Tensor, Tensor] = {}
    kinds: list[str] = []
    tensors = [*model.module.named_parameters(), *model.module.named_buffers()]
    for path, tensor in tensors:
        owner, _, name = path.rpartition(".")
        embedding = owner.rpartition(".")[2] in POSITION_EMBEDDING_MODULES and name == "weight"
        if name in POSITION_EMBEDDINGS or embedding:
            neutral[tensor] = _mean_of_patches(model, path, tensor.detach())
            kinds.append("position embedding")
        elif name in RELATIVE_BIAS_TABLES:
            neutral[tensor] = tensor.detach().mean(0, keepdim=True).expand_as(tensor)
            kinds.append("relative bias")
        elif name in RELATIVE_OFFSETS:
            neutral[tensor] = torch.zeros_like(tensor)
            kinds.append("relative bias")
    rotary = any(path.rpartition(".")[2] in ROTARY_MODULES for path, _ in model.module.named_modules())
    return Positions(neutral, tuple(dict.fromkeys(kinds)), rotary)


def _mean_of_patches(model: VisionModel, path: str, tensor: Tensor) -> Tensor:
    """Return an embedding in which every patch has the mean of all patches; rows of prefix tokens are unchanged."""
    prefix = _prefix_rows_or_none(model, tensor.shape[-2])
    if tensor.ndim == 4:  # (1, height, width, channel)
        return tensor.mean((1, 2), keepdim=True).expand_as(tensor)
    if prefix is None:
        raise UnsupportedModelError(
            f"{path} of {model.name} has {tensor.shape[-2]} rows, which fit no grid of its patches"
        )
    patches = tensor[..., prefix:, :]
    return torch.cat([tensor[..., :prefix, :], patches.mean(-2, keepdim=True).expand_as(patches)], dim=-2)


def _prefix_rows_or_none(model: VisionModel, rows: int) -> int | None:
    """Return the number of rows of an embedding that belong to prefix tokens; register tokens may have none."""
    if model.layout is None:
        return None
    choices = range(len(model.layout.prefix_names) + 1)
    if model.preprocessing is not None:
        trained = model.layout.grid(*model.preprocessing.size).num_patches
        for prefix in choices:
            if rows - prefix == trained:
                return prefix
    return next((prefix for prefix in choices if math.isqrt(rows - prefix) ** 2 == rows - prefix), None)


class _Replacement(TorchFunctionMode):
    """Passes a neutral tensor to every operation that uses a position tensor on this thread. No weight is changed."""

    def __init__(self, neutral: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._neutral = {id(tensor): replacement for tensor, replacement in neutral.items()}

    def _replaced(self, argument: Any) -> Any:
        return self._neutral.get(id(argument), argument) if isinstance(argument, Tensor) else argument

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = {name: self._replaced(argument) for name, argument in (kwargs or {}).items()}
        return func(*(self._replaced(argument) for argument in args), **named)


@contextmanager
def neutral_positions(positions: Positions) -> Iterator[None]:
    """While held, run the model on this thread as if all patches had the same position."""
    with _Replacement(positions.neutral):
        yield
