"""What stands in the place of a hidden part."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from PIL import Image
from skimage.filters import gaussian

from vitscope.errors import CallError
from vitscope.perturb.segments import Segments
from vitscope.picture import read_photo

HideName = Literal["mean", "black", "grey", "blur", "noise", "drop"]

GREY = 128
BLUR = 5 / 224  # standard deviation over the shorter side, as the insertion metric of RISE blurs


def fill(
    photo: np.ndarray,
    hide: Any,
    segments: Segments | None,
    seed: int,
    *,
    what: str = "hide",
    names: Sequence[str] = get_args(HideName),
) -> np.ndarray:
    """A picture of the photo's size and dtype, values 0 … 255, that hidden parts are taken from.

    Args:
        hide: ``"mean"`` (of each segment; without segments of the picture), ``"black"``, ``"grey"``, ``"blur"``,
            ``"noise"`` (uniform, from ``seed``), a colour as one number or three in 0 … 255, or another picture.
        segments: of the photo, if it was cut into any.
        what, names: the option that is refused where it cannot be meant, and its choices.

    Raises:
        CallError: no such way of hiding.
    """
    whole = photo.dtype == np.uint8
    if isinstance(hide, str) and hide in get_args(HideName):
        made = _named(photo.astype(np.float64), hide, segments, seed)
        # Means are cut off rather than rounded, as PyPI's lime does by writing them into bytes.
        return made.astype(np.uint8) if whole else made.astype(photo.dtype)
    if (colour := _colour(hide, what)) is not None:
        return np.broadcast_to(colour, photo.shape).astype(photo.dtype)
    try:
        other, _ = read_photo(hide)
    except CallError as error:
        got = f"{what} is {hide!r}" if isinstance(hide, str | None) else f"{what} is {type(hide).__name__}"
        raise CallError(f"{got}: choose {', '.join(names)}, a colour, or a picture ({error})") from None
    resized = other.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized).astype(photo.dtype)


def _named(photo: np.ndarray, hide: str, segments: Segments | None, seed: int) -> np.ndarray:
    if hide == "mean":
        return _means(photo, segments)
    if hide == "blur":
        return gaussian(photo, sigma=BLUR * min(photo.shape[:2]), channel_axis=-1)
    if hide == "noise":
        return np.random.default_rng(seed).integers(0, 256, photo.shape).astype(np.float64)
    return np.full(photo.shape, float(GREY if hide == "grey" else 0))


def _means(photo: np.ndarray, segments: Segments | None) -> np.ndarray:
    if segments is None:
        return np.broadcast_to(photo.mean((0, 1)), photo.shape).copy()
    index = segments.index.ravel()
    inside, filled = index >= 0, photo.reshape(-1, 3).copy()
    for channel in range(3):
        sums = np.bincount(index[inside], weights=filled[inside, channel], minlength=segments.count)
        filled[inside, channel] = (sums / np.maximum(segments.sizes, 1))[index[inside]]
    return filled.reshape(photo.shape)


def _colour(hide: Any, what: str = "hide") -> Float[np.ndarray, " 3"] | None:
    """One number or three as a colour; None for what is neither."""
    flat = isinstance(hide, np.ndarray) and hide.ndim < 2
    if not flat and not isinstance(hide, int | float | np.number | tuple | list):
        return None
    try:
        parts = np.broadcast_to(np.asarray(hide, dtype=np.float64), (3,))
    except (TypeError, ValueError):
        parts = np.full(3, -1.0)
    if isinstance(hide, bool) or not ((parts >= 0) & (parts <= 255)).all():
        raise CallError(f"{what} is {hide!r}: a colour is one number or three, each from 0 to 255")
    return parts


def described(hide: Any) -> str | list[float]:
    """What stood in the place of hidden parts, as the provenance says it."""
    if isinstance(hide, str) and hide in get_args(HideName):
        return hide
    colour = _colour(hide)
    return "a picture" if colour is None else colour.tolist()
