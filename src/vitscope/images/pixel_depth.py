"""Conversion of deeper pixels to 8 bits, based on the depth in the file's header and never on the largest value."""

from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import ImageError

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # TIFF tags
_WHITE_IS_ZERO, _SIGNED = 0, 2  # values of these tags
_STRETCHED = {"L;2": 85, "L;4": 17}  # Pillow multiplies the pixels of such a PNG by this, but not the transparent grey


def check_depth(image: Image.Image, name: str) -> None:
    """Refuse pixels of unknown range.

    Raises:
        ImageError: the pixels are floating-point numbers, signed, or integers of 32 bits.
    """
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels of unknown range: convert it to 8 or 16 bits")
    if _SIGNED in _tiff_tag(image, _SAMPLE_FORMAT, (1,)):
        raise ImageError(f"{name} holds signed pixels of unknown range: convert it to unsigned 8 or 16 bits")
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


def eight_bits(image: Image.Image, header: Image.Image, name: str) -> Image.Image:
    """Return grey pixels of 12, 16 or more bits as mode L, or as LA if the image declares a grey transparent.

    An image of mode "I" in memory has no header. Its pixels count as 8-bit if none is above 255, otherwise as 16-bit.

    Args:
        image: the upright image, which no longer has the header's metadata.
        header: the image as it was opened.
        name: name of the image, for messages.

    Raises:
        ImageError: 32-bit pixels of unknown range.
    """
    values = np.asarray(image).astype(np.int64)
    if values.max() > 65535 or values.min() < 0:
        raise ImageError(f"{name} holds 32-bit pixels of unknown range: convert it to 8 or 16 bits")
    bits = _tiff_tag(header, _BITS, (16,))[0]
    if image.mode == "I" and header.format is None and values.max() <= 255:
        bits = 8
    transparent = image.info.get("transparency")
    alpha = None if not isinstance(transparent, int) else np.where(values == transparent, 0, 255).astype(np.uint8)
    # Pillow inverts such files if they have 8 bits, but not if they have 16.
    if _tiff_tag(header, _PHOTOMETRIC, (1,))[0] == _WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values
    grey = (values >> max(bits - 8, 0)).astype(np.uint8)
    return Image.fromarray(grey if alpha is None else np.stack([grey, alpha], axis=-1))


def _tiff_tag(image: Image.Image, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Return the value of a TIFF tag; the default for other formats, and if the tag is damaged."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    value = None if tags is None else tags.get(tag)
    values = value if isinstance(value, tuple) else (value,)
    return values if values and all(isinstance(item, int) for item in values) else default
