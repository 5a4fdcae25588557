"""The order of images, windows and heads in the leading axes of an attention call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vitscope.attention.unsupported import unsupported_attention
from vitscope.errors import UnsupportedModelError

_HEAD_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "heads", "nhead", "n_head")
_SEARCHED_LEVELS = 3  # the attention module and the two modules around it


@dataclass(frozen=True)
class Axes:
    """A rearrangement of (…, token, channel) into (batch, window, head, token, channel).

    Attributes:
        shape: sizes of the leading axes, split as far as necessary.
        order: indices into ``shape``: the batch, then the windows (any number of axes), then the heads.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def in_order(self) -> bool:
        """Whether the axes are already in the order batch, windows, heads."""
        return self.order == tuple(range(len(self.shape)))

    def split(self, tensor: Tensor) -> Tensor:
        """Return the tensor as (batch, window, head, token, channel)."""
        tokens = tensor.shape[-2:]
        tensor = tensor.reshape(*self.shape, *tokens)
        if not self.in_order:
            tensor = tensor.permute(*self.order, -2, -1)
        return tensor if len(self.shape) == 3 else tensor.reshape(len(tensor), -1, *tensor.shape[-3:])

    def join(self, tensor: Tensor, leading: Sequence[int]) -> Tensor:
        """Return a tensor (batch, window, head, token, channel) as (…, token, channel): the inverse of :meth:`split`.

        Args:
            tensor: a tensor with the sizes that :meth:`split` returns; tokens and channels may have other sizes.
            leading: sizes of the axes before tokens and channels.
        """
        tokens = tensor.shape[-2:]
        tensor = tensor.reshape(*(self.shape[axis] for axis in self.order), *tokens)
        if not self.in_order:
            inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
            tensor = tensor.permute(*inverse, -2, -1)
        return tensor.reshape(*leading, *tokens)


def head_count(module: nn.Module, path: str) -> int | None:
    """Return the number of heads that the module at ``path`` or one of the two modules around it declares, or None."""
    for _ in range(_SEARCHED_LEVELS):
        owner = module.get_submodule(path)
        for name in _HEAD_ATTRIBUTES:
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
    """Return the rearrangement for an attention call.

    Libraries put images outermost, then windows, then heads. The number of heads that the module declares confirms this
    order or reveals another one.

    Args:
        leading: sizes of the axes before tokens and channels.
        batch: number of images.
        heads: number of heads that the module declares; None if unknown.
        path: path of the module, for the error message.
        heads_first: True if an experiment has shown that the heads are outermost.
        heads_before_windows: True or False if an experiment has shown which of two axes of equal size after the images
            holds the heads; None without such an experiment.

    Raises:
        UnsupportedModelError: the sizes contradict the module or fit two orders.
    """
    axes = _heads_first_axes(leading, batch) if heads_first else _images_first_axes(tuple(leading), batch, heads)
    if axes is None and heads_before_windows is not None and len(leading) == 3 and leading[0] == batch:
        axes = Axes(tuple(leading), (0, 2, 1) if heads_before_windows else (0, 1, 2))
    if axes is not None:
        return axes
    module = path or "the model"
    images = "1 image" if batch == 1 else f"{batch} images"
    if leading[0] % batch and leading[-1] in (heads, leading[0]):
        raise UnsupportedModelError(
            f"{module} packs the {images} of a batch into {leading[0]} sequence{'' if leading[0] == 1 else 's'}: "
            "pass one image at a time"
        )
    sizes = "×".join(map(str, leading))
    head_text = "an unknown number of heads" if heads is None else f"{heads} heads"
    raise unsupported_attention(
        module,
        f"axes of {sizes} for {images} and {head_text} do not show which are heads and which are windows",
    )


def _images_first_axes(leading: tuple[int, ...], batch: int, heads: int | None) -> Axes | None:
    """Return the only order that fits with the images outermost or directly after the heads; None if there is none."""
    outer, last = leading[0], leading[-1]
    if len(leading) == 1:
        if outer % batch:
            return None
        per_image = outer // batch
        if heads is None:
            return Axes((batch, 1, per_image), (0, 1, 2))
        return Axes((batch, per_image // heads, heads), (0, 1, 2)) if per_image % heads == 0 else None
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


def _heads_first_axes(leading: Sequence[int], batch: int) -> Axes | None:
    """Return the order with the heads outermost and the images inside each head, or None if the sizes do not fit."""
    if len(leading) == 1 and leading[0] % batch == 0:
        return Axes((leading[0] // batch, batch, 1), (1, 2, 0))
    if len(leading) == 2 and leading[1] == batch:
        return Axes((leading[0], batch, 1), (1, 2, 0))
    return None
