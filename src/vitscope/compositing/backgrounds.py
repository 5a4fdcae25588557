"""What is behind the objects: the photo with its holes filled, and other backgrounds to set objects on."""

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

# Inpainting costs missing pixels × known ones. Larger holes are filled on a smaller copy, of longer rims fewer pixels
# are taken.
MOST_INPAINTED = 30_000
MOST_KNOWN = 1_000
RIM = 2  # pixels around a hole whose colours are carried on into it
TILES = 8  # a side, of a shuffled background
STRONG = 4  # times the blur that hides details, so that nothing of the scene is left but its light

Values = Shaped[np.ndarray, "pixel_height pixel_width channel"]  # 0 … 255, bytes or floating point
Hole = Bool[np.ndarray, "pixel_height pixel_width"]


def filled(photo: Values, hole: Hole, how: Any, seed: int) -> Values:
    """The photo with other pixels where ``hole`` is True; all others are as they were.

    Args:
        how: ``"inpaint"`` (the colours of its rim carried on by linear radial basis functions: Carr et al., 2001),
            ``"mean"`` (of what is not in the hole), ``"blur"`` (what is around it, blurred into it), or a colour, a
            image, ``"grey"``, ``"black"`` or ``"noise"`` as for :func:`vitscope.lime`.

    Raises:
        CallError: no such way of filling.
    """
    known = ~hole
    if isinstance(how, str) and how in get_args(FillName):
        made = {"inpaint": _inpainted, "mean": _mean, "blur": _blurred}[how](photo.astype(np.float64), known)
    elif isinstance(how, str) and how == "drop":
        raise CallError("fill is 'drop': a hole needs pixels; choose inpaint, mean, blur, a colour or an image")
    else:
        others = [name for name in get_args(HideName) if name not in ("drop", *get_args(FillName))]
        made = fill(photo, how, None, seed, what="fill", names=(*get_args(FillName), *others)).astype(np.float64)
    return np.where(hole[..., None], _as(made, photo), photo)


def _as(made: Float[np.ndarray, "..."], like: Values) -> Values:
    made = made.clip(0, 255).round() if like.dtype == np.uint8 else made
    return made.astype(like.dtype)


def _mean(photo: Float[np.ndarray, "..."], known: Hole) -> Float[np.ndarray, "..."]:
    return np.broadcast_to(photo[known].mean(0), photo.shape)


def _blurred(photo: Float[np.ndarray, "..."], known: Hole) -> Float[np.ndarray, "..."]:
    """What is known, spread into the hole; deep inside, where nothing reaches, the mean colour."""
    sigma = BLUR * min(known.shape) * STRONG / 2
    weight = gaussian(known.astype(np.float64), sigma=sigma)[..., None]
    spread = gaussian(photo * known[..., None], sigma=sigma, channel_axis=-1)
    faint = 1e-3
    return (spread + faint * _mean(photo, known)) / (weight + faint)


def _inpainted(photo: Float[np.ndarray, "..."], known: Hole) -> Float[np.ndarray, "..."]:
    shrink = (MOST_INPAINTED / max(int((~known).sum()), 1)) ** 0.5
    if shrink >= 1:
        return _interpolated(photo, ~known)
    size = (max(round(known.shape[1] * shrink), 2), max(round(known.shape[0] * shrink), 2))
    weight = resized(known.astype(np.float32), size)
    small = np.stack([resized(plane * known, size) for plane in np.moveaxis(photo, -1, 0)], axis=-1).astype(np.float64)
    small /= np.maximum(weight, 1e-6)[..., None]
    hole = weight < 0.5
    if hole.all():
        return _blurred(photo, known)
    made = _interpolated(small, hole)
    return np.stack([resized(plane, known.shape[::-1]) for plane in np.moveaxis(made, -1, 0)], axis=-1)


def _interpolated(photo: Float[np.ndarray, "..."], hole: Hole) -> Float[np.ndarray, "..."]:
    """The colours of the hole's rim carried on into it, none brighter or darker than they are."""
    rim = np.argwhere(binary_dilation(hole, iterations=RIM) & ~hole)
    rim = rim[:: -(-len(rim) // MOST_KNOWN)]
    colours = photo[tuple(rim.T)]
    # Slopes go on only where the rim does not lie on one line.
    degree = int(np.ptp(rim, axis=0).min() > 0)
    surface = RBFInterpolator(rim, colours, kernel="linear", degree=degree, smoothing=1.0)
    made = photo.copy()
    made[hole] = surface(np.argwhere(hole)).clip(colours.min(0), colours.max(0))
    return made


def resized(plane: Float[np.ndarray, "..."], size: tuple[int, int]) -> Float[np.ndarray, "..."]:
    """One channel at ``size`` = (width, height)."""
    image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def background(own: Values, name: str, other: Any, seed: int) -> Values:
    """A background as large as the photo without its objects, ``own``.

    Args:
        name: ``"own"``, ``"blank"`` (its mean colour), ``"blurred"`` (until only light and shade are left),
            ``"shuffled"`` (cut into 8 × 8 tiles that change places: the same colours and textures, no scene), or
            ``"other"``.
        other: the image that ``"other"`` means, cut to the photo's proportions; by default a texture of grass.

    Raises:
        CallError: no such background.
    """
    if name not in get_args(BackgroundName):
        raise CallError(f"unknown background {name!r}: choose {', '.join(get_args(BackgroundName))}")
    if name == "blank":
        return _as(np.broadcast_to(own.astype(np.float64).mean((0, 1)), own.shape), own)
    if name == "blurred":
        sigma = BLUR * STRONG * min(own.shape[:2])
        return _as(gaussian(own.astype(np.float64), sigma=sigma, channel_axis=-1), own)
    if name == "shuffled":
        return _shuffled(own, seed)
    if name == "other":
        if own.shape[-1] not in PHOTO_MODES:
            raise CallError(
                f"a photo as background has 3 channels where the input has {own.shape[-1]}: leave out the test "
                "'controls' and backgrounds called 'other'"
            )
        photo, _ = read_photo(grass() if other is None else other)
        height, width = own.shape[:2]
        return as_channels(ImageOps.fit(photo, (width, height), Image.Resampling.BICUBIC), own, "background")
    return own


def _shuffled(own: Values, seed: int) -> Values:
    """Tiles in another order; pixels left over at the right and at the bottom stay."""
    tiles = min(TILES, *own.shape[:2])
    high, wide = own.shape[0] // tiles, own.shape[1] // tiles
    order = np.random.default_rng(seed).permutation(tiles * tiles)
    whole = own[: tiles * high, : tiles * wide]
    # (row, high, column, wide, channel) → (tile, high, wide, channel)
    cut = whole.reshape(tiles, high, tiles, wide, -1).swapaxes(1, 2).reshape(-1, high, wide, own.shape[-1])
    made = own.copy()
    made[: tiles * high, : tiles * wide] = (
        cut[order].reshape(tiles, tiles, high, wide, -1).swapaxes(1, 2).reshape(whole.shape)
    )
    return made


def at_size(mask: Bool[np.ndarray, "height width"], size: tuple[int, int]) -> Hole:
    """A mask for a copy of the photo with ``size`` = (height, width) pixels."""
    return mask if mask.shape == size else nearest_pixels(mask, size)
