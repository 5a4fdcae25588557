"""What stands in the place of a hidden part."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from PIL import Image
from skimage.filters import gaussian

from vitscope.errors import CallError
from vitscope.images.image import on_white
from vitscope.images.preprocessing import PHOTO_MODES
from vitscope.images.reading import read_photo
from vitscope.perturb.segments import Segments

HideName = Literal["mean", "black", "grey", "blur", "noise", "drop"]

GREY = 128
OPAQUE = 255
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
    """An image of the photo's size and dtype, values 0 … 255, that hidden parts are taken from.

    Args:
        photo: (pixel height, pixel width, channel); bytes of four channels are RGBA, whose hidden parts are opaque.
        hide: ``"mean"`` (of each segment; without segments of the image), ``"black"``, ``"grey"``, ``"blur"``,
            ``"noise"`` (uniform, from ``seed``), a colour as one number or three in 0 … 255 (for a tensor of other than
            three channels: one, or as many), or another image.
        segments: of the photo, if it was cut into any.
        what, names: the option that is refused where it cannot be meant, and its choices.

    Raises:
        CallError: no such way of hiding.
    """
    whole = photo.dtype == np.uint8
    if isinstance(hide, str) and hide in get_args(HideName):
        made = _named(photo.astype(np.float64), hide, segments, seed, whole and photo.shape[-1] == 4)
        # Means are cut off rather than rounded, as PyPI's lime does by writing them into bytes.
        return made.astype(np.uint8) if whole else made.astype(photo.dtype)
    if (colour := _colour(hide, what)) is not None:
        return _coloured(colour, photo, hide, what)
    try:
        other, _ = read_photo(hide)
    except CallError as error:
        got = f"{what} is {hide!r}" if isinstance(hide, str | None) else f"{what} is {type(hide).__name__}"
        raise CallError(f"{got}: choose {', '.join(names)}, a colour, or an image ({error})") from None
    resized = other.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BICUBIC)
    return as_channels(resized, photo, what)


def as_channels(image: Image.Image, like: np.ndarray, what: str) -> np.ndarray:
    """A photo in the channels and the dtype of ``like``.

    Raises:
        CallError: a photo has no such number of channels.
    """
    channels = like.shape[-1]
    if channels not in PHOTO_MODES:
        raise CallError(
            f"{what} is an image, which has 3 channels where the input has {channels}: choose a colour of one number"
        )
    values = np.asarray(on_white(image).convert(PHOTO_MODES[channels]))
    return values.reshape(like.shape).astype(like.dtype)


def _coloured(colour: Float[np.ndarray, " part"], photo: np.ndarray, hide: Any, what: str) -> np.ndarray:
    channels = photo.shape[-1]
    if len(colour) == 3 and channels == 1:
        colour = np.asarray(Image.new("RGB", (1, 1), tuple(colour.round().astype(int).tolist())).convert("L"))[0]
    elif photo.dtype == np.uint8 and channels == 4 and len(colour) != 4:
        colour = np.append(np.broadcast_to(colour, (3,)), OPAQUE)
    if len(colour) not in (1, channels):
        number = "three" if channels in (1, 3) else str(channels)
        raise CallError(f"{what} is {hide!r}: a colour is one number or {number}, each from 0 to 255")
    return np.broadcast_to(colour, photo.shape).astype(photo.dtype)


def _named(photo: np.ndarray, hide: str, segments: Segments | None, seed: int, transparent: bool = False) -> np.ndarray:
    if hide == "mean":
        return _means(photo, segments)
    if hide == "blur":
        return gaussian(photo, sigma=BLUR * min(photo.shape[:2]), channel_axis=-1)
    if hide == "noise":
        made = np.random.default_rng(seed).integers(0, 256, photo.shape).astype(np.float64)
    else:
        made = np.full(photo.shape, float(GREY if hide == "grey" else 0))
    if transparent:
        made[..., -1] = OPAQUE
    return made


def _means(photo: np.ndarray, segments: Segments | None) -> np.ndarray:
    if segments is None:
        return np.broadcast_to(photo.mean((0, 1)), photo.shape).copy()
    index = segments.index.ravel()
    inside, filled = index >= 0, photo.reshape(-1, photo.shape[-1]).copy()
    for channel in range(photo.shape[-1]):
        sums = np.bincount(index[inside], weights=filled[inside, channel], minlength=segments.count)
        filled[inside, channel] = (sums / np.maximum(segments.sizes, 1))[index[inside]]
    return filled.reshape(photo.shape)


def _colour(hide: Any, what: str = "hide") -> Float[np.ndarray, " part"] | None:
    """Numbers from 0 to 255, one or several, as a colour; None for what is neither."""
    flat = isinstance(hide, np.ndarray) and hide.ndim < 2
    if not flat and not isinstance(hide, int | float | np.number | tuple | list):
        return None
    try:
        parts = np.atleast_1d(np.asarray(hide, dtype=np.float64))
    except (TypeError, ValueError):
        parts = np.zeros(0)
    if isinstance(hide, bool) or parts.ndim != 1 or not len(parts) or not ((parts >= 0) & (parts <= 255)).all():
        raise CallError(f"{what} is {hide!r}: a colour is one number or three, each from 0 to 255")
    return parts


def described(hide: Any) -> str | list[float]:
    """What stood in the place of hidden parts, as the provenance says it."""
    if isinstance(hide, str) and hide in get_args(HideName):
        return hide
    colour = _colour(hide)
    if colour is None:
        return "an image"
    return (np.broadcast_to(colour, (3,)) if len(colour) == 1 else colour).tolist()
