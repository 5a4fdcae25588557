"""Which of the axes before tokens and channels are images, windows and heads."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitscope.errors import UnsupportedModelError

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "nhead", "n_head")
_NEAR = 3  # the attention module, and two around it


@dataclass(frozen=True)
class Axes:
    """How to bring a tensor (…, token, channel) into (batch, window, head, token, channel).

    Attributes:
        shape: the axes before tokens, split as far as needed.
        order: which of them are, in turn, the batch, the windows (any number of axes) and the head.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        return self.order == tuple(range(len(self.shape)))

    def split(self, tensor: Tensor) -> Tensor:
        """Return (batch, window, head, token, channel)."""
        tokens = tensor.shape[-2:]
        tensor = tensor.reshape(*self.shape, *tokens)
        if not self.in_order:
            tensor = tensor.permute(*self.order, -2, -1)
        return tensor if len(self.shape) == 3 else tensor.reshape(len(tensor), -1, *tensor.shape[-3:])


def head_count(module: nn.Module, path: str) -> int | None:
    """Return the number of heads that the module at ``path``, or one near around it, says it has."""
    for _ in range(_NEAR):
        owner = module.get_submodule(path)
        for name in _HEADS:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        if not path:
            return None
        path = path.rpartition(".")[0]
    return None


def axes_of(
    leading: Sequence[int],
    batch: int,
    heads: int | None,
    path: str,
    *,
    heads_first: bool = False,
    heads_before_windows: bool | None = None,
) -> Axes:
    """Return what the axes before tokens are.

    Libraries put images outermost, then windows, then heads. The number of heads that the module names confirms that,
    or says which other order it is.

    Args:
        leading: the sizes of the axes before tokens and channels.
        batch: the number of images.
        heads: the number of heads of the module, or None if it does not say.
        path: the module, for the error.
        heads_first: an experiment has shown that heads are outermost.
        heads_before_windows: an experiment has shown which of two equal axes after the images holds the heads.

    Raises:
        UnsupportedModelError: the sizes contradict the module, or fit two orders.
    """
    axes = _heads_first(leading, batch) if heads_first else _axes(tuple(leading), batch, heads)
    if axes is None and heads_before_windows is not None and len(leading) == 3 and leading[0] == batch:
        axes = Axes(tuple(leading), (0, 2, 1) if heads_before_windows else (0, 1, 2))
    if axes is not None:
        return axes
    sizes = "×".join(map(str, leading))
    images = "1 image" if batch == 1 else f"{batch} images"
    if leading[0] % batch and leading[-1] in (heads, leading[0]):
        raise UnsupportedModelError(
            f"{path or 'the model'} packs the {images} of a batch into {leading[0]} "
            f"sequence{'' if leading[0] == 1 else 's'}: pass one image at a time"
        )
    raise UnsupportedModelError(
        f"{path or 'the model'} attends along axes of {sizes} for {images} and has {heads} heads: which of them are "
        "heads and which are windows is unknown, so its attention cannot be shown"
    )


def _axes(leading: tuple[int, ...], batch: int, heads: int | None) -> Axes | None:
    outer, last = leading[0], leading[-1]
    if len(leading) == 1:
        if outer % batch:
            return None
        each = outer // batch
        if heads is None:
            return Axes((batch, 1, each), (0, 1, 2))
        return Axes((batch, each // heads, heads), (0, 1, 2)) if each % heads == 0 else None
    if heads is None or (last == heads and (len(leading) == 2 or heads == 1 or heads not in leading[1:-1])):
        if outer % batch:
            return None
        return Axes((batch, outer // batch * math.prod(leading[1:-1]), last), (0, 1, 2))
    if len(leading) == 2 and outer == heads and last % batch == 0:
        return Axes((heads, batch, last // batch), (1, 2, 0))
    if leading == (batch * heads, 1):
        return Axes((batch, 1, heads), (0, 1, 2))
    if len(leading) == 3 and leading[1] == heads != last and outer % batch == 0:
        return Axes((batch, outer // batch, heads, last), (0, 1, 3, 2))
    return None


def _heads_first(leading: Sequence[int], batch: int) -> Axes | None:
    if len(leading) == 1 and leading[0] % batch == 0:
        return Axes((leading[0] // batch, batch, 1), (1, 2, 0))
    if len(leading) == 2 and leading[1] == batch:
        return Axes((leading[0], batch, 1), (1, 2, 0))
    return None
