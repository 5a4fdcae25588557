"""Backgrounds behind the objects of a photo: filled holes, and other images to paste objects on."""

from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Shaped
from PIL import Image, ImageOps
from scipy.interpolate import RBFInterpolator
from scipy.ndimage import binary_dilation
from skimage.data import grass
from skimage.filters import gaussian

from vitscope.errors import CallError
from vitscope.images.image import nearest_pixels
from vitscope.images.preprocessing import PHOTO_MODES
from vitscope.images.reading import read_photo
from vitscope.perturb.baselines import BLUR, HideName, as_channels, fill

FillName = Literal["inpaint", "mean", "blur"]
BackgroundName = Literal["own", "blank", "blurred", "shuffled", "other"]

# The cost of inpainting is the number of missing pixels times the number of rim pixels. Larger holes are filled on a
# smaller copy, and longer rims are thinned out.
MAX_INPAINTED_PIXELS = 30_000
MAX_RIM_PIXELS = 1_000
RIM_WIDTH = 2  # pixels around a hole whose colours are continued into it
TILES = 8  # per side of a shuffled background
STRONG = 4  # multiple of the default blur, so that only light and shade of the scene remain
FAINT = 1e-3  # weight of the mean colour in a blurred filling, for pixels that no visible pixel reaches

Values = Shaped[np.ndarray, "pixel_height pixel_width channel"]  # 0 … 255, bytes or floating point
Hole = Bool[np.ndarray, "pixel_height pixel_width"]


def fill_hole(photo: Values, hole: Hole, method: Any, seed: int) -> Values:
    """Return the photo with new pixels where ``hole`` is True; all other pixels are unchanged.

    Args:
        photo: (pixel height, pixel width, channel), 0 … 255.
        hole: the pixels to replace.
        method: ``"inpaint"`` (the colours of the rim, continued by linear radial basis functions: Carr et al., 2001),
            ``"mean"`` (of the pixels outside the hole), ``"blur"`` (the surroundings, blurred into the hole), or a
            colour, an image, ``"grey"``, ``"black"`` or ``"noise"`` as for :func:`vitscope.lime`.
        seed: random seed of ``"noise"``.

    Raises:
        CallError: unknown method.
    """
    visible = ~hole
    if isinstance(method, str) and method in get_args(FillName):
        fillers = {"inpaint": _inpaint, "mean": _mean_colour, "blur": _blur_into}
        filling = fillers[method](photo.astype(np.float64), visible)
    elif isinstance(method, str) and method == "drop":
        raise CallError("fill is 'drop', but a hole needs pixels: choose inpaint, mean, blur, a colour or an image")
    else:
        names = [name for name in get_args(HideName) if name not in ("drop", *get_args(FillName))]
        filling = fill(photo, method, None, seed, option="fill", names=(*get_args(FillName), *names)).astype(np.float64)
    return np.where(hole[..., None], _cast(filling, photo.dtype), photo)


def _cast(values: Float[np.ndarray, "..."], dtype: np.dtype[Any]) -> Values:
    """Return values in the dtype of a photo, rounded and clipped for bytes."""
    values = values.clip(0, 255).round() if dtype == np.uint8 else values
    return values.astype(dtype)


def _mean_colour(photo: Float[np.ndarray, "..."], visible: Hole) -> Float[np.ndarray, "..."]:
    """Return an image of the mean colour of the visible pixels."""
    return np.broadcast_to(photo[visible].mean(0), photo.shape)


def _blur_into(photo: Float[np.ndarray, "..."], visible: Hole) -> Float[np.ndarray, "..."]:
    """Return the visible pixels blurred into the hole; pixels that the blur does not reach get the mean colour."""
    sigma = BLUR * min(visible.shape) * STRONG / 2
    weight = gaussian(visible.astype(np.float64), sigma=sigma)[..., None]
    spread = gaussian(photo * visible[..., None], sigma=sigma, channel_axis=-1)
    return (spread + FAINT * _mean_colour(photo, visible)) / (weight + FAINT)


def _inpaint(photo: Float[np.ndarray, "..."], visible: Hole) -> Float[np.ndarray, "..."]:
    """Return the photo with its hole inpainted; a large hole is inpainted on a smaller copy."""
    shrink = (MAX_INPAINTED_PIXELS / max(int((~visible).sum()), 1)) ** 0.5
    if shrink >= 1:
        return _interpolate(photo, ~visible)
    size = (max(round(visible.shape[1] * shrink), 2), max(round(visible.shape[0] * shrink), 2))
    weight = resize_channel(visible.astype(np.float32), size)
    channels = [resize_channel(channel * visible, size) for channel in np.moveaxis(photo, -1, 0)]
    small = np.stack(channels, axis=-1).astype(np.float64)
    small /= np.maximum(weight, 1e-6)[..., None]
    hole = weight < 0.5
    if hole.all():
        return _blur_into(photo, visible)
    filled = _interpolate(small, hole)
    return np.stack([resize_channel(channel, visible.shape[::-1]) for channel in np.moveaxis(filled, -1, 0)], axis=-1)


def _interpolate(photo: Float[np.ndarray, "..."], hole: Hole) -> Float[np.ndarray, "..."]:
    """Return the photo with the colours of the hole's rim continued into it, within the range of the rim."""
    rim = np.argwhere(binary_dilation(hole, iterations=RIM_WIDTH) & ~hole)
    rim = rim[:: -(-len(rim) // MAX_RIM_PIXELS)]
    colours = photo[tuple(rim.T)]
    # A slope is only defined if the rim does not lie on one line.
    degree = int(np.ptp(rim, axis=0).min() > 0)
    surface = RBFInterpolator(rim, colours, kernel="linear", degree=degree, smoothing=1.0)
    filled = photo.copy()
    filled[hole] = surface(np.argwhere(hole)).clip(colours.min(0), colours.max(0))
    return filled


def resize_channel(channel: Float[np.ndarray, "..."], size: tuple[int, int]) -> Float[np.ndarray, "..."]:
    """Return one channel resized to ``size`` = (width, height)."""
    image = Image.fromarray(np.ascontiguousarray(channel, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def make_background(empty_photo: Values, name: str, image: Any, seed: int) -> Values:
    """Return a background of the size and dtype of the photo.

    Args:
        empty_photo: the photo with its objects removed.
        name: ``"own"``, ``"blank"`` (the mean colour of ``empty_photo``), ``"blurred"`` (only light and shade remain),
            ``"shuffled"`` (8 × 8 tiles in random order: the same colours and textures, no scene), or ``"other"``.
        image: the image for ``"other"``, cropped to the photo's proportions; a texture of grass if None.
        seed: random seed of ``"shuffled"``.

    Raises:
        CallError: unknown background, or ``"other"`` for an input of more than four channels.
    """
    if name not in get_args(BackgroundName):
        raise CallError(f"unknown background {name!r}: choose {', '.join(get_args(BackgroundName))}")
    if name == "blank":
        return _cast(np.broadcast_to(empty_photo.astype(np.float64).mean((0, 1)), empty_photo.shape), empty_photo.dtype)
    if name == "blurred":
        sigma = BLUR * STRONG * min(empty_photo.shape[:2])
        return _cast(gaussian(empty_photo.astype(np.float64), sigma=sigma, channel_axis=-1), empty_photo.dtype)
    if name == "shuffled":
        return _shuffle_tiles(empty_photo, seed)
    if name == "other":
        channels = empty_photo.shape[-1]
        if channels not in PHOTO_MODES:
            raise CallError(
                f"cannot use a photo of 3 channels as the background of an input with {channels} channels: leave out "
                "the test 'controls' and backgrounds called 'other'"
            )
        photo, _ = read_photo(grass() if image is None else image)
        height, width = empty_photo.shape[:2]
        fitted = ImageOps.fit(photo, (width, height), Image.Resampling.BICUBIC)
        return as_channels(fitted, empty_photo, "background")
    return empty_photo


def _shuffle_tiles(photo: Values, seed: int) -> Values:
    """Return the photo with its tiles in random order; the pixels left over at the right and bottom do not move."""
    tiles = min(TILES, *photo.shape[:2])
    height, width = photo.shape[0] // tiles, photo.shape[1] // tiles
    order = np.random.default_rng(seed).permutation(tiles * tiles)
    tiled = photo[: tiles * height, : tiles * width]
    # (row, height, column, width, channel) → (tile, height, width, channel)
    stack = tiled.reshape(tiles, height, tiles, width, -1).swapaxes(1, 2).reshape(-1, height, width, photo.shape[-1])
    shuffled = photo.copy()
    shuffled[: tiles * height, : tiles * width] = (
        stack[order].reshape(tiles, tiles, height, width, -1).swapaxes(1, 2).reshape(tiled.shape)
    )
    return shuffled


def resize_mask(mask: Bool[np.ndarray, "height width"], size: tuple[int, int]) -> Hole:
    """Return the mask resized for a copy of the photo with ``size`` = (height, width) pixels."""
    return mask if mask.shape == size else nearest_pixels(mask, size)
