"""A model asked without knowing where its patches are: every position made equal, for one run."""

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
    """How a model knows where its patches are.

    Attributes:
        neutral: for each tensor of the model that says so, one in which all places are the same.
        kinds: what these are: ``"position embedding"``, ``"relative bias"``.
        rotary: queries and keys are turned by their places too, which is left as it is.
    """

    neutral: Mapping[Tensor, Tensor]
    kinds: tuple[str, ...]
    rotary: bool

    @property
    def can_be_neutral(self) -> bool:
        """Something is known, and nothing that would still tell places apart is left."""
        return bool(self.neutral) and not self.rotary


def positions(model: VisionModel) -> Positions:
    """What of a model's tensors says where patches are, and what would say it no more.

    A position embedding of patches becomes its mean over all patches; that of CLS and register tokens stays. A table
    of relative biases becomes its mean over all offsets, for each head: the softmax does not see a constant, so that
    is no bias at all. Swin v2's bias is computed from offsets, which become zero, with the same effect.

    Raises:
        CallError: an embedding whose rows fit no grid of patches.
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
    """(…, token, channel) with the patches' rows all their mean; prefix tokens come first."""
    prefix = _prefix_rows(model, tensor.shape[-2])
    if tensor.ndim == 4:  # (1, height, width, channel)
        return tensor.mean((1, 2), keepdim=True).expand_as(tensor)
    if prefix is None:
        raise UnsupportedModelError(
            f"{path} of {model.name} has {tensor.shape[-2]} rows, which fit no grid of its patches"
        )
    patches = tensor[..., prefix:, :]
    return torch.cat([tensor[..., :prefix, :], patches.mean(-2, keepdim=True).expand_as(patches)], dim=-2)


def _prefix_rows(model: VisionModel, rows: int) -> int | None:
    """How many rows of an embedding are not patches': registers may have none."""
    if model.layout is None:
        return None
    choices = range(len(model.layout.prefix_names) + 1)
    if model.preprocessing is not None:
        trained = model.layout.grid(*model.preprocessing.size).num_patches
        for prefix in choices:
            if rows - prefix == trained:
                return prefix
    return next((prefix for prefix in choices if math.isqrt(rows - prefix) ** 2 == rows - prefix), None)


class _Neutral(TorchFunctionMode):
    """Whoever uses one of the tensors, on this thread, is given the other in its place: no weight is touched."""

    def __init__(self, neutral: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._neutral = {id(tensor): other for tensor, other in neutral.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [self._neutral.get(id(arg), arg) if isinstance(arg, Tensor) else arg for arg in args]
        named = {
            name: self._neutral.get(id(arg), arg) if isinstance(arg, Tensor) else arg
            for name, arg in (kwargs or {}).items()
        }
        return func(*given, **named)


@contextmanager
def neutral_positions(known: Positions) -> Iterator[None]:
    """While held, the model answers on this thread as if all patches were in the same place."""
    with _Neutral(known.neutral):
        yield
