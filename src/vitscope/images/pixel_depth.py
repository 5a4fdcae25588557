"""Pixels of any depth as eight bits: the header says how many bits they have, never their largest value."""

from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import ImageError

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # of a TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2
_STRETCHED = {"L;2": 85, "L;4": 17}  # what Pillow multiplies the pixels of a PNG by, but not its transparent grey


def check_depth(image: Image.Image, name: str) -> None:
    """Refuse pixels whose range nobody can know.

    Raises:
        ImageError: floating point, signed, or integers of 32 bits.
    """
    if image.mode == "F":
        raise ImageError(f"{name} holds floating-point pixels of unknown range: convert it to 8 or 16 bits")
    if _SIGNED in _tag(image, _SAMPLE_FORMAT, (1,)):
        raise ImageError(f"{name} holds signed pixels of unknown range: convert it to unsigned 8 or 16 bits")
    if image.mode == "I" and _tag(image, _BITS, (16,))[0] > 16:
        raise ImageError(f"{name} holds 32-bit pixels of unknown range: convert it to 8 or 16 bits")


def transparent_colour(image: Image.Image) -> Any:
    """Return the colour that a PNG declares transparent, on the scale of the image's pixels; before they are loaded.

    Pillow reports it on the scale of the file, whose pixels it then stretches or shortens to eight bits.
    """
    colour = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    layout = tiles[0][3] if tiles else None
    if isinstance(colour, int) and layout in _STRETCHED:
        return colour * _STRETCHED[layout]
    if isinstance(colour, tuple) and (layout == "RGB;16B" or max(colour) > 255):
        return tuple(part >> 8 for part in colour)
    return colour


def eight_bits(image: Image.Image, header: Image.Image, name: str) -> Image.Image:
    """Return grey pixels of 12, 16 or more bits as mode L, or LA if the image declares a grey transparent.

    Args:
        image: upright, which costs it the facts that its file states.
        header: the image that states them.
        name: in messages.

    An image in memory whose mode is "I" has no header: up to 255 its pixels count as 8 bits, otherwise as 16.

    Raises:
        ImageError: 32-bit pixels of unknown range.
    """
    values = np.asarray(image).astype(np.int64)
    if values.max() > 65535 or values.min() < 0:
        raise ImageError(f"{name} holds 32-bit pixels of unknown range: convert it to 8 or 16 bits")
    bits = _tag(header, _BITS, (16,))[0]
    if image.mode == "I" and header.format is None and values.max() <= 255:
        bits = 8
    transparent = image.info.get("transparency")
    alpha = None if not isinstance(transparent, int) else np.where(values == transparent, 0, 255).astype(np.uint8)
    # Pillow inverts such a file of 8 bits, and not of 16.
    if _tag(header, _PHOTOMETRIC, (1,))[0] == _WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values
    grey = (values >> max(bits - 8, 0)).astype(np.uint8)
    return Image.fromarray(grey if alpha is None else np.stack([grey, alpha], axis=-1))


def _tag(image: Image.Image, number: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """A tag of a TIFF; the default for every other format, and where it is damaged."""
    tags = getattr(image, "tag_v2", None) if image.format == "TIFF" else None
    value = None if tags is None else tags.get(number)
    values = value if isinstance(value, tuple) else (value,)
    return values if values and all(isinstance(part, int) for part in values) else default
