"""Conversion of deeper pixels to 8 bits, based on the depth in the file's header and never on the largest value."""

from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import CallError, ImageError
from vitscope.images.grey_window import HOW_TO_WINDOW, GreyWindow, warn_if_narrow, windowed

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of these tags
_STRETCHED = {"L;2": 85, "L;4": 17}  # Pillow multiplies the pixels of such a PNG by this, but not the transparent grey


def check_depth(image: Image.Image, name: str, window: GreyWindow | None = None) -> None:
    """Refuse pixels of unknown range, and a window for pixels that are not grey.

    Raises:
        CallError: there is a window, but the pixels have colours or transparency.
        ImageError: there is no window, and the pixels are floating-point numbers or signed; or they are integers that
            Pillow does not decode as the numbers that they are.
    """
    if window is not None and image.mode not in ("L", "I", "F") and not image.mode.startswith("I;16"):
        raise CallError(f"window is for grey pixels, and {name} is of mode {image.mode}: leave it out")
    if image.mode == "F" and window is None:
        raise ImageError(
            f"{name} holds floating-point pixels of unknown range: convert it to 8 or 16 bits, or {HOW_TO_WINDOW}"
        )
    if _SIGNED in _tiff_tag(image, _SAMPLE_FORMAT, (1,)):
        if window is not None and image.mode == "I":
            return
        raise ImageError(
            f"{name} holds signed pixels of unknown range: convert it to unsigned 8 or 16 bits, or {HOW_TO_WINDOW}"
        )
    if image.mode == "I" and _tiff_tag(image, _BITS, (16,))[0] > 16:
        raise ImageError(f"{name} holds 32-bit pixels of unknown range: convert it to 8 or 16 bits")


def transparent_colour(image: Image.Image) -> Any:
    """Return the colour that a PNG declares transparent, on the scale of the decoded pixels.

    Call this before the pixels are loaded: Pillow reports the colour on the scale of the file, but scales the pixels
    to 8 bits when it loads them.
    """
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    layout = tiles[0][3] if tiles else None
    if isinstance(colour, int) and layout in _STRETCHED:
        return colour * _STRETCHED[layout]
    if isinstance(colour, tuple) and (layout == "RGB;16B" or max(colour) > 255):
        return tuple(channel >> 8 for channel in colour)
    return colour


def depth_of(header: Image.Image) -> tuple[int, bool]:
    """Return the number of bits of a deep pixel, 16 unless a TIFF states another, and whether zero means white."""
    bits, photometric = _tiff_tag(header, _BITS, (16,))[0], _tiff_tag(header, _PHOTOMETRIC, (1,))[0]
    return bits, photometric == _WHITE_IS_ZERO


def eight_bits(
    image: Image.Image, name: str, depth: tuple[int, bool], *, in_memory: bool, window: GreyWindow | None = None
) -> Image.Image:
    """Return grey pixels of any depth as mode L, or as LA if the image declares a grey transparent.

    Without a window, the pixels have 12, 16 or more bits, of which the upper 8 are used.

    Args:
        image: the upright image.
        name: name of the image, for messages.
        depth: from :func:`depth_of` its header.
        in_memory: whether it has no header. Pixels of mode "I" then count as 8-bit if none is above 255, otherwise as
            16-bit.
        window: the values of black and white.

    Raises:
        ImageError: 32-bit pixels of unknown range, or NaN.
    """
    bits, white_is_zero = depth
    values: Any = np.asarray(image).astype(np.float64 if image.mode == "F" else np.int64)
    transparent = image.info.get("transparency")
    alpha = None if not isinstance(transparent, int) else np.where(values == transparent, 0, 255).astype(np.uint8)
    if window is not None:
        grey = windowed(values, window, name)
    else:
        if values.max() > 65535 or values.min() < 0:
            raise ImageError(f"{name} holds 32-bit pixels of unknown range: convert it to 8 or 16 bits")
        if image.mode == "I" and in_memory and values.max() <= 255:
            bits = 8
        if bits > 8:
            warn_if_narrow(values, (0.0, float((1 << bits) - 1)), name)
        grey = (values >> max(bits - 8, 0)).astype(np.uint8)
    if white_is_zero and image.mode != "L":  # Pillow inverts such files if they have 8 bits, but not if they have 16
        grey = 255 - grey
    return Image.fromarray(grey if alpha is None else np.stack([grey, alpha], axis=-1))


def _tiff_tag(image: Image.Image, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the value of a TIFF tag; the default for other formats, and if the tag is damaged."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    value = None if tags is None else tags.get(tag)
    values = value if isinstance(value, tuple) else (value,)
    return values if values and all(isinstance(item, int) for item in values) else default
