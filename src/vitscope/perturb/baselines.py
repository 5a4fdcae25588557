"""The pixels that replace hidden parts of an image."""

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

BASELINES = tuple(name for name in get_args(HideName) if name != "drop")  # names of an image without information

GREY = 128
OPAQUE = 255
BLUR = 5 / 224  # standard deviation over the shorter side, as in the insertion metric of RISE


def fill(
    photo: np.ndarray,
    hide: Any,
    segments: Segments | None,
    seed: int,
    *,
    option: str = "hide",
    names: Sequence[str] = get_args(HideName),
) -> np.ndarray:
    """Return the filling: an image whose pixels replace hidden ones, with the photo's size and dtype, in 0 … 255.

    Args:
        photo: (pixel height, pixel width, channel). Bytes of four channels are RGBA; their filling is opaque.
        hide: ``"mean"`` (of each segment; of the image if there are none), ``"black"``, ``"grey"``, ``"blur"``,
            ``"noise"`` (uniform, from ``seed``), a colour, or another image. A colour is one number or three in
            0 … 255; if a tensor does not have three channels, one number or one for each channel.
        segments: segments of the photo; None if it was not divided.
        seed: seed of the noise.
        option: name of the option, for error messages.
        names: choices of the option, for error messages.

    Raises:
        CallError: ``hide`` is none of these.
    """
    is_bytes = photo.dtype == np.uint8
    if isinstance(hide, str) and hide in get_args(HideName):
        filling = _named_filling(photo.astype(np.float64), hide, segments, seed, is_bytes and photo.shape[-1] == 4)
        # Means are truncated rather than rounded, because PyPI's lime truncates them by writing them into bytes.
        return filling.astype(np.uint8) if is_bytes else filling.astype(photo.dtype)
    if (colour := _colour_or_none(hide, option)) is not None:
        return _plain(colour, photo, hide, option)
    try:
        replacement, _ = read_photo(hide)
    except CallError as error:
        value = repr(hide) if isinstance(hide, str | None) else type(hide).__name__
        raise CallError(f"{option} is {value}: choose {', '.join(names)}, a colour, or an image ({error})") from None
    resized = replacement.resize((photo.shape[1], photo.shape[0]), Image.Resampling.BICUBIC)
    return as_channels(resized, photo, option)


def as_channels(image: Image.Image, template: np.ndarray, option: str) -> np.ndarray:
    """Return a photo with the channels and the dtype of ``template``.

    Raises:
        CallError: a photo cannot have this number of channels.
    """
    channels = template.shape[-1]
    if channels not in PHOTO_MODES:
        raise CallError(
            f"{option} is an image of 3 channels, but the input has {channels}: choose a colour of one number"
        )
    values = np.asarray(on_white(image).convert(PHOTO_MODES[channels]))
    return values.reshape(template.shape).astype(template.dtype)


def _plain(colour: Float[np.ndarray, " component"], photo: np.ndarray, hide: Any, option: str) -> np.ndarray:
    """Return an image of one colour."""
    channels = photo.shape[-1]
    if len(colour) == 3 and channels == 1:
        colour = np.asarray(Image.new("RGB", (1, 1), tuple(colour.round().astype(int).tolist())).convert("L"))[0]
    elif photo.dtype == np.uint8 and channels == 4 and len(colour) != 4:
        colour = np.append(np.broadcast_to(colour, (3,)), OPAQUE)
    if len(colour) not in (1, channels):
        number = "three" if channels in (1, 3) else str(channels)
        raise CallError(f"{option} is {hide!r}: a colour is one number or {number}, each from 0 to 255")
    return np.broadcast_to(colour, photo.shape).astype(photo.dtype)


def _named_filling(photo: np.ndarray, hide: str, segments: Segments | None, seed: int, has_alpha: bool) -> np.ndarray:
    """Return the filling that ``hide`` names, in floating point."""
    if hide == "mean":
        return _means(photo, segments)
    if hide == "blur":
        return gaussian(photo, sigma=BLUR * min(photo.shape[:2]), channel_axis=-1)
    if hide == "noise":
        filling = np.random.default_rng(seed).integers(0, 256, photo.shape).astype(np.float64)
    else:
        filling = np.full(photo.shape, float(GREY if hide == "grey" else 0))
    if has_alpha:
        filling[..., -1] = OPAQUE
    return filling


def _means(photo: np.ndarray, segments: Segments | None) -> np.ndarray:
    """Return each segment in its mean colour, or the whole image in its mean colour if there are no segments."""
    if segments is None:
        return np.broadcast_to(photo.mean((0, 1)), photo.shape).copy()
    index = segments.index.ravel()
    inside, filled = index >= 0, photo.reshape(-1, photo.shape[-1]).copy()
    for channel in range(photo.shape[-1]):
        sums = np.bincount(index[inside], weights=filled[inside, channel], minlength=segments.count)
        filled[inside, channel] = (sums / np.maximum(segments.sizes, 1))[index[inside]]
    return filled.reshape(photo.shape)


def _colour_or_none(hide: Any, option: str = "hide") -> Float[np.ndarray, " component"] | None:
    """Return one or several numbers from 0 to 255 as a colour; None if ``hide`` is something else."""
    flat = isinstance(hide, np.ndarray) and hide.ndim < 2
    if not flat and not isinstance(hide, int | float | np.number | tuple | list):
        return None
    try:
        colour = np.atleast_1d(np.asarray(hide, dtype=np.float64))
    except (TypeError, ValueError):
        colour = np.zeros(0)
    if isinstance(hide, bool) or colour.ndim != 1 or not len(colour) or not ((colour >= 0) & (colour <= 255)).all():
        raise CallError(f"{option} is {hide!r}: a colour is one number or three, each from 0 to 255")
    return colour


def describe_hide(hide: Any, option: str = "hide") -> str | list[float]:
    """Return ``hide`` as the provenance records it: a name, a colour, or "an image".

    Args:
        hide: see :func:`fill`.
        option: name of the option, for error messages.
    """
    if isinstance(hide, str) and hide in get_args(HideName):
        return hide
    colour = _colour_or_none(hide, option)
    if colour is None:
        return "an image"
    return (np.broadcast_to(colour, (3,)) if len(colour) == 1 else colour).tolist()
