"""Colours of maps: the ends of the colour scale, and the picture of a map over its photo."""

from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image

COLORMAP = "inferno"  # perceptually uniform: equal steps of value look like equal steps
SIGNED_COLORMAP = "RdBu_r"  # blue below zero, white at zero, red above; safe for most forms of colour blindness
ROUNDING = 2e-6  # relative to the largest value: accumulated rounding, a few units in the last place of float32
PERCENTILE = 99.5  # of the values, at which the colours of a map with outliers end
OUTLIER_RATIO = 3.0  # of the highest value to this percentile, above which a map has outliers
MIN_VALUES = 100  # of a map with outliers: in smaller ones the percentile is the highest value
FLAT_RATIO = 1.1  # of the highest to the lowest attention, below which a map is nearly flat
PALE = 0.25  # strength of the colours of what cannot be told from zero
MAX_MEDIANS = 1000  # larger multiples of the median are given as multiples of the percentile


@dataclass(frozen=True)
class ColourScale:
    """The ends of a map's colours.

    Attributes:
        limits: the values of the first and the last colour; None if all values are equal.
        note: what these ends leave out, or how flat the map is; empty for an ordinary map.
        outliers: number of values beyond the ends.
    """

    limits: tuple[float, float] | None
    note: str = ""
    outliers: int = 0


def colour_scale(
    values: np.ndarray, *, signed: bool = False, uniform: float | None = None, clip: bool = True
) -> ColourScale:
    """Return the colour scale of a map.

    The colours range from the lowest to the highest value, and for a signed map from minus to plus the largest
    absolute value. There are two exceptions. A few outliers would leave everything else in the darkest colours: if the
    highest value exceeds three times the 99.5th percentile, the colours end at this percentile. And attention that is
    nearly the same everywhere would look as vivid as any: if the highest value is below 1.1 times the lowest, the
    colours range from zero to twice the mean.

    Args:
        values: one per patch or pixel; NaN is ignored.
        signed: whether negative values oppose the target.
        uniform: attention per patch if it is the same everywhere, for maps of attention; None for other maps.
        clip: whether outliers may lie beyond the ends.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if is_flat(values):
        return ColourScale(None, "all values are equal" if finite.size else "")
    sizes = np.abs(finite) if signed else finite
    high = float(sizes.max())
    end = float(np.percentile(sizes, PERCENTILE, method="lower"))
    if clip and sizes.size >= MIN_VALUES and high > OUTLIER_RATIO * end > 0:
        note = _outlier_note(sizes, end, "patches" if uniform is not None else "values")
        limits = (-end, end) if signed else (float(finite.min()), end)
        return ColourScale(limits, note, int((sizes > end).sum()))
    if signed:
        return ColourScale((-high, high))
    low = float(finite.min())
    if uniform is not None and low > 0 and high < FLAT_RATIO * low:
        return ColourScale(
            (0.0, 2 * float(finite.mean())), f"nearly the same everywhere: highest {high / low:.2f} × lowest"
        )
    return ColourScale((low, high))


def _outlier_note(sizes: np.ndarray, end: float, noun: str) -> str:
    """Return the number of values beyond the scale, and how large they are."""
    count, high, median = int((sizes > end).sum()), float(sizes.max()), float(np.median(sizes))
    verb = "lies" if count == 1 else "lie"
    in_medians = 0 < high < MAX_MEDIANS * median
    size = f"{high / median:.0f} × the median" if in_medians else f"{high / end:.0f} × its end"
    return f"{count} of {sizes.size:,} {noun} {verb} beyond the scale: {'' if count == 1 else 'up to '}{size}"


def stretch(values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Return values scaled to [0, 1].

    Args:
        values: NaN stays NaN; a constant map becomes 0.
        limits: the values that become 0 and 1; by default the smallest and the largest value.
    """
    if not np.isfinite(values).any():
        return values
    low, high = (np.nanmin(values), np.nanmax(values)) if limits is None else limits
    return ((values - low) / (high - low)).clip(0, 1) if high > low else values * 0


def default_colormap(*, signed: bool) -> str:
    """Return the name of the colours of maps that name none themselves."""
    return SIGNED_COLORMAP if signed else COLORMAP


def blend(
    photo: Image.Image,
    heat: np.ndarray,
    alpha: float,
    *,
    signed: bool = False,
    colormap: str = "",
    pale: np.ndarray | None = None,
) -> Image.Image:
    """Return a map with values in [0, 1], drawn over a photo of the same size; pixels of value NaN become grey."""
    base = np.asarray(photo, dtype=np.float32)
    colormap = colormap or default_colormap(signed=signed)
    if signed:
        base = base.mean(-1, keepdims=True).repeat(3, -1)  # the photo's colours could be mistaken for signs
    colours = matplotlib.colormaps[colormap](np.nan_to_num(heat, nan=0.5))[..., :3].astype(np.float32) * 255
    if pale is not None:
        colours[pale] = 255 - PALE * (255 - colours[pale])
    mixed = (1 - alpha) * base + alpha * colours
    unseen = np.isnan(heat)
    mixed[unseen] = base[unseen].mean(-1, keepdims=True) * 0.35 + 160
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def coloured(
    photo: Image.Image,
    heat: np.ndarray,
    alpha: float,
    *,
    signed: bool = False,
    limits: tuple[float, float] | None = None,
    colormap: str = "",
    pale: np.ndarray | None = None,
) -> Image.Image:
    """Return a map drawn over a photo of the same size; if the map is constant, the photo becomes grey instead.

    Args:
        photo: the photo.
        heat: the map; NaN becomes grey.
        alpha: opacity of the map.
        signed: whether the colours diverge from zero.
        limits: the values of the first and the last colour; by default the ends of all values, and for a signed map
            minus and plus the largest absolute value.
        colormap: name of the colours; by default inferno, and RdBu_r if the map is signed.
        pale: True for pixels in pale colours; None for none.
    """
    if limits is None and is_flat(heat):
        # With an alpha of 0 or 1 the result is the photo alone or the map alone, which is a single colour.
        constant = np.full_like(heat, np.nan if 0 < alpha < 1 else 0.5 if signed else 0.0)
        return blend(photo, np.where(np.isnan(heat), np.nan, constant), alpha, signed=signed, colormap=colormap)
    if limits is None and signed:
        limits = colour_scale(heat, signed=True, clip=False).limits
    return blend(photo, stretch(heat, limits), alpha, signed=signed, colormap=colormap, pale=pale)


def is_flat(values: np.ndarray) -> bool:
    """Return whether the finite values differ by no more than rounding in float32."""
    finite = values[np.isfinite(values)]
    return not finite.size or float(np.ptp(finite)) <= ROUNDING * float(np.abs(finite).max())
