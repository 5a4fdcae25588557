"""Agreement between attributions of one image: rank correlation, and overlap of the top regions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.stats import rankdata

from vitscope.display import Tabulated, ends, one_line
from vitscope.errors import CallError
from vitscope.images.image import InputImage, nearest_pixels
from vitscope.results.attribution import Attribution
from vitscope.validation import require_ratio

# Attributions are compared on the photo, at this many pixels per side at most.
MAX_SIDE = 256


@dataclass(frozen=True, eq=False)
class Agreement(Tabulated):
    """How well attributions agree, pair by pair.

    Attributes:
        names: names of the attributions.
        rank_correlation: (name, name) in [−1, 1], Spearman's rank correlation over the pixels that all attributions
            cover; 1 on the diagonal, NaN for a constant map.
        overlap: (name, name) in [0, 1], the intersection over union of the top regions.
        chance: (name, name), the expected overlap of two independent regions of these sizes.
        top: requested share of the image that counts as the top region.
    """

    names: Sequence[str]
    rank_correlation: Float[np.ndarray, "name name"]
    overlap: Float[np.ndarray, "name name"]
    chance: Float[np.ndarray, "name name"]
    top: float

    def __repr__(self) -> str:
        pairs = np.triu_indices(len(self.names), 1)
        return one_line(
            f"Agreement of {', '.join(self.names)[:80]}: rank correlation {ends(self.rank_correlation[pairs])}",
            f"overlap of the top {self.top:.0%} {ends(self.overlap[pairs])}",
        )

    def as_json(self) -> dict[str, Any]:
        """Return all attributes as JSON values; None for a correlation that is not defined."""
        correlation = [[None if np.isnan(value) else value for value in row] for row in self.rank_correlation.tolist()]
        return {
            "names": list(self.names),
            "rank_correlation": correlation,
            "overlap": self.overlap.tolist(),
            "top": self.top,
            "chance": self.chance.tolist(),
        }


def agreement(results: Sequence[Attribution], *, names: Sequence[str] | None = None, top: float = 0.2) -> Agreement:
    """Measure whether models, or methods, highlight the same regions of one image.

    Args:
        results: two or more attributions of the same photo, on grids of any kind.
        names: name of each result; by default its model or method, whichever differs.
        top: share of the image, between 0 and 1, that counts as its top region: the pixels of the highest values.
            Equal values, such as those of a segment, stay together, so the region may only be close to this share.

    Returns:
        rank correlation and overlap of each pair of results.

    Raises:
        CallError: there are fewer than two results, a result holds several images, the results are of
            different photos, or an option is out of range.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model, photo = vs.load("vit-nano"), skimage.data.chelsea()
        >>> agreement = vs.agreement([vs.rollout(model, photo), vs.occlusion(model, photo)])
        >>> agreement.names, agreement.overlap.shape
        (['rollout', 'occlusion'], (2, 2))
    """
    if not isinstance(results, Sequence) or not all(isinstance(result, Attribution) for result in results):
        raise CallError("agreement compares attributions, as vitscope.lime or vitscope.rollout return them")
    if len(results) < 2:
        raise CallError(f"agreement needs two or more results, got {len(results)}")
    if not 0 < require_ratio(top, "top") < 1:
        raise CallError(f"top is {top}: a share between 0 and 1 is expected")
    if any(len(result) != 1 for result in results):
        raise CallError("agreement compares results of one image each: take one of a batch, as in result[0]")
    images = [_image_of(result) for result in results]
    if any(not _same_photo(results[0], result) for result in results[1:]):
        raise CallError("agreement compares results of the same photo, but these are of different photos")
    photo_width, photo_height = images[0].photo.size
    if names is not None and len(names) != len(results):
        raise CallError(f"{len(names)} names for {len(results)} results: pass one name per result")
    shrink = min(MAX_SIDE / max(photo_width, photo_height), 1)
    size = (max(round(photo_width * shrink), 1), max(round(photo_height * shrink), 1))
    maps = [_map(result, image, size) for result, image in zip(results, images, strict=True)]
    covered = np.isfinite(maps).all(0)
    if not covered.any():
        raise CallError("the results cover no common part of the photo")
    values = [pixels[covered] for pixels in maps]
    regions = [_top_region(pixels, top) for pixels in values]
    overlap = np.array([[(a & b).sum() / (a | b).sum() for b in regions] for a in regions])
    shares = np.array([region.mean() for region in regions])
    product = np.outer(shares, shares)
    chance = product / (shares[:, None] + shares - product)
    return Agreement(names or _distinctive_names(results), _rank_correlation(values), overlap, chance, float(top))


def _image_of(result: Attribution) -> InputImage:
    """Return the image of a result; that of a loaded one is black, because only its size and box matter here."""
    if result.images:
        return result.images[0]
    records = result.photo_records()
    if not records:
        raise CallError("agreement needs the photo, which a result does not describe: explain the image again")
    width, height = records[0]["size"]
    left, top, right, bottom = records[0]["box"]
    return InputImage(Image.new("RGB", (width, height)), (left, top, right, bottom))


def _same_photo(first: Attribution, second: Attribution) -> bool:
    if first.images and second.images and first.images[0].photo is second.images[0].photo:
        return True
    return first.photo_records()[0]["sha256"] == second.photo_records()[0]["sha256"]


def _map(result: Attribution, image: InputImage, size: tuple[int, int]) -> Float[np.ndarray, "height width"]:
    """Return a result on the photo. One on pixels is not smoothed, which would blur the borders of segments."""
    values = result.values[0].cpu().numpy()
    is_fine = values.shape[0] >= size[1] and values.shape[1] >= size[0]
    if not is_fine:
        return image.paint(values, size)
    return nearest_pixels(image.paint(values, smooth=False), size[::-1])


def _rank_correlation(values: Sequence[Float[np.ndarray, " pixel"]]) -> Float[np.ndarray, "name name"]:
    """Return Spearman's rank correlation. Ties share their mean rank; for a constant map it is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef([rankdata(pixels) for pixels in values])


def _top_region(values: Float[np.ndarray, " pixel"], share: float) -> np.ndarray:
    """Return a mask of the highest values that make up about this share."""
    levels, counts = np.unique(-values, return_counts=True)
    reached = np.cumsum(counts)
    return -values <= levels[np.abs(reached - share * len(values)).argmin()]


def _distinctive_names(results: Sequence[Attribution]) -> list[str]:
    """Return the model or the method of each result, whichever differs, or both."""
    models = [str(result.provenance.get("model", "?")) for result in results]
    methods = [str(result.provenance.get("method", "?")) for result in results]
    if len(set(methods)) == 1 and len(set(models)) > 1:
        return models
    if len(set(models)) == 1:
        return methods
    return [f"{model}, {method}" for model, method in zip(models, methods, strict=True)]
