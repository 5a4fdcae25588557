"""Agreement between attributions of one image: rank correlation and overlap of the highest places."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from vitscope.errors import CallError
from vitscope.images.image import nearest_pixels
from vitscope.results.attribution import Attribution
from vitscope.validation import ratio

# Attributions are compared on the photo, at no more than this many pixels a side.
MAX_SIDE = 256


@dataclass(frozen=True, eq=False)
class Agreement:
    """How alike some attributions are, two by two.

    Attributes:
        names: of the attributions.
        rank_correlation: (name, name) in [−1, 1], Spearman's over the pixels that all of them cover; 1 on the
            diagonal, NaN where a map is constant.
        overlap: (name, name) in [0, 1], the top regions' intersection over union.
        chance: (name, name), the overlap to expect of two regions as large as these that have nothing to do with each
            other.
        top: the share of the image that a top region was to have.
    """

    names: Sequence[str]
    rank_correlation: Float[np.ndarray, "name name"]
    overlap: Float[np.ndarray, "name name"]
    chance: Float[np.ndarray, "name name"]
    top: float

    def as_json(self) -> dict[str, Any]:
        """What JSON has; None for a correlation that does not exist."""
        correlation = [[None if np.isnan(one) else one for one in row] for row in self.rank_correlation.tolist()]
        about = {"top": self.top, "chance": self.chance.tolist()}
        return {"names": list(self.names), "rank_correlation": correlation, "overlap": self.overlap.tolist(), **about}


def agreement(results: Sequence[Attribution], *, names: Sequence[str] | None = None, top: float = 0.2) -> Agreement:
    """Whether models, or methods, look at the same places of one image.

    Args:
        results: two or more attributions of the same photo, on grids of any kind.
        names: of each; by default its model and method.
        top: the share of the image that counts as its top region, by value. Where values are equal (segments) the
            region is as near to that share as whole groups of equal values come.

    Raises:
        CallError: fewer than two results, several images in one, or results of different photos.
    """
    if not isinstance(results, Sequence) or not all(isinstance(result, Attribution) for result in results):
        raise CallError("agreement compares attributions, as vitscope.lime or vitscope.rollout return them")
    if len(results) < 2:
        raise CallError(f"agreement needs two results or more, {len(results)} came")
    if not 0 < ratio(top, "top") < 1:
        raise CallError(f"top is {top}: a share between 0 and 1 is expected")
    if any(len(result) != 1 or not result.images for result in results):
        raise CallError("agreement compares results of one image each, as they were computed (not loaded from files)")
    photos = [result.images[0].photo for result in results]
    if any(not _same(photos[0], photo) for photo in photos[1:]):
        raise CallError("agreement compares results of one and the same photo: these are of different ones")
    if names is not None and len(names) != len(results):
        raise CallError(f"{len(names)} names for {len(results)} results")
    shrink = min(MAX_SIDE / max(photos[0].size), 1)
    size = (max(round(photos[0].width * shrink), 1), max(round(photos[0].height * shrink), 1))
    maps = [_map(result, size) for result in results]
    seen = np.isfinite(maps).all(0)
    if not seen.any():
        raise CallError("the results cover no common part of the photo")
    values = [one[seen] for one in maps]
    ranks = [_ranks(one) for one in values]
    regions = [_top(one, top) for one in values]
    correlation = np.array([[_correlation(first, second) for second in ranks] for first in ranks])
    overlap = np.array([[(a & b).sum() / (a | b).sum() for b in regions] for a in regions])
    shares = np.array([region.mean() for region in regions])
    both = np.outer(shares, shares)
    chance = both / (shares[:, None] + shares - both)
    return Agreement(names or _names(results), correlation, overlap, chance, float(top))


def _same(photo: Image.Image, other: Image.Image) -> bool:
    return photo is other or (photo.size == other.size and photo.tobytes() == other.tobytes())


def _map(result: Attribution, size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """A result on the photo; one on pixels as it is, without smoothing over the borders of segments."""
    values = result.values[0].cpu().numpy()
    image = result.images[0]
    fine = values.shape[0] >= size[1] and values.shape[1] >= size[0]
    if not fine:
        return image.paint(values, size)
    return nearest_pixels(image.paint(values, smooth=False), size[::-1])


def _ranks(values: Float[np.ndarray, " pixel"]) -> Float[np.ndarray, " pixel"]:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _correlation(first: Float[np.ndarray, " pixel"], second: Float[np.ndarray, " pixel"]) -> float:
    first, second = first - first.mean(), second - second.mean()
    length = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / length) if length > 0 else float("nan")


def _top(values: Float[np.ndarray, " pixel"], share: float) -> np.ndarray:
    levels, counts = np.unique(-values, return_counts=True)
    reached = np.cumsum(counts)
    return -values <= levels[np.abs(reached - share * len(values)).argmin()]


def _names(results: Sequence[Attribution]) -> list[str]:
    models = [str(result.provenance.get("model", "?")) for result in results]
    methods = [str(result.provenance.get("method", "?")) for result in results]
    if len(set(methods)) == 1 and len(set(models)) > 1:
        return models
    return methods if len(set(models)) == 1 else [f"{m}, {how}" for m, how in zip(models, methods, strict=True)]
