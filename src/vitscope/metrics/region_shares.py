"""Region shares: how much of a map lies in a region of the photo, compared with a random map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from vitscope.compositing.object_masks import Mask
from vitscope.compositing.regions import region_mask, regions_by_name
from vitscope.display import Tabulated, counted, one_line
from vitscope.errors import CallError
from vitscope.images.cell_sums import cell_sums
from vitscope.images.image import InputImage
from vitscope.results.attribution import Attribution
from vitscope.results.segment_attribution import SegmentAttribution
from vitscope.validation import require_at_least, require_seed, short_repr, short_text

PARTS, SIGNED_PARTS = ("all",), ("supports", "opposes")
TOLERANCE = 1e-9  # of shares: rounding of the Fourier transform
ENDS = (2.5, 97.5)  # percentiles of 95 % intervals


@dataclass(frozen=True, repr=False)
class RegionShare:
    """How much of one map, or of the maps of several photos, lies in a region.

    Attributes:
        name: of the photo, or of the group of photos.
        region: name of the region.
        part: ``"all"`` of a map without signs, or what ``"supports"`` or ``"opposes"`` the class.
        photos: number of photos whose map has this part and in which the model sees the region.
        share: of the part's sum, from 0 to 1; the mean over the photos, NaN if there are none.
        area: share of the area that the map covers, from 0 to 1; the mean over the photos.
        ratio: ``share`` divided by ``area``; 1 for a uniform map.
        share_interval, ratio_interval: 95 % bootstrap intervals over the photos; None for fewer than two.
        random_interval: 95 % of the ratios of random maps.
        p_value: probability that a random map has a ratio as high, or as low, two-sided.
    """

    name: str
    region: str
    part: str
    photos: int
    share: float
    area: float
    ratio: float
    share_interval: tuple[float, float] | None
    ratio_interval: tuple[float, float] | None
    random_interval: tuple[float, float]
    p_value: float

    def __repr__(self) -> str:
        low, high = self.random_interval
        return one_line(
            f"RegionShare of {self.region}: {self.share:.1%} of the map{_of_part(self.part)}",
            f"{self.area:.1%} of the area",
            f"ratio {self.ratio:.2f} (random maps {low:.2f} to {high:.2f})",
            short_text(self.name, ""),
        )

    def as_json(self) -> dict[str, Any]:
        """Return all attributes as JSON values, with None for NaN."""
        return {name: _without_nan(value) for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False)
class RegionShares(Tabulated):
    """The result of :func:`vitscope.region_shares`.

    Attributes:
        regions: names of the regions.
        parts: ``("all",)``, or for a signed map ``("supports", "opposes")``.
        photos: names of the photos.
        share: (image, part, region) in [0, 1], the share of the part that lies in the region. NaN if the model does not
            see the region, or if the map has no such part.
        area: (image, region) in [0, 1], the share of the area that the map covers.
        random: (image, part, region, draw) in [0, 1], the shares of random maps.
        seed: of the random maps and the bootstrap.
    """

    regions: Sequence[str]
    parts: Sequence[str]
    photos: Sequence[str]
    share: Float[np.ndarray, "image part region"]
    area: Float[np.ndarray, "image region"]
    random: Float[np.ndarray, "image part region draw"]
    seed: int = 0

    def __repr__(self) -> str:
        facts = [f"{row.region} {row.ratio:.2f} × area{_of_part(row.part)}" for row in self.means()]
        return one_line(f"RegionShares: {counted(len(self.photos), 'photo')}", *facts)

    @property
    def ratio(self) -> Float[np.ndarray, "image part region"]:
        """Share divided by area; 1 for a uniform map. NaN if the share is NaN."""
        return _ratio(self.share, self.area[:, None])

    @classmethod
    def join(cls, results: Sequence["RegionShares"]) -> "RegionShares":
        """Combine the results of several photos.

        Args:
            results: with the same regions, parts and draws, at least one.

        Raises:
            CallError: the list is empty, or the results differ in these.
        """
        if not results:
            raise CallError("join takes a list of at least one RegionShares")
        kinds = {(tuple(r.regions), tuple(r.parts), r.random.shape[-1]) for r in results}
        if len(kinds) > 1:
            raise CallError("cannot combine shares of other regions, of signed and unsigned maps, or of other draws")
        return replace(
            results[0],
            photos=[photo for result in results for photo in result.photos],
            share=np.concatenate([result.share for result in results]),
            area=np.concatenate([result.area for result in results]),
            random=np.concatenate([result.random for result in results]),
        )

    def rows(self) -> list[RegionShare]:
        """Return one entry for each photo, region and part."""
        return [
            row
            for index, photo in enumerate(self.photos)
            for row in self._rows(photo, np.array([index]), np.random.default_rng(self.seed))
        ]

    def means(self, groups: Sequence[str] | None = None) -> list[RegionShare]:
        """Return the mean over the photos of each group, for each region and part.

        The ratio is the mean share divided by the mean area. Its interval is a percentile bootstrap over the photos.
        For comparison, the map of every photo is replaced by a random one.

        Args:
            groups: the group of each photo, such as its class; by default all photos are one group.

        Raises:
            CallError: there is not one group for each photo.
        """
        names = ["all photos"] * len(self.photos) if groups is None else list(map(str, groups))
        if len(names) != len(self.photos):
            raise CallError(f"{len(names)} groups for {len(self.photos)} photos: pass one group for each photo")
        generator = np.random.default_rng(self.seed)
        return [
            row
            for name in dict.fromkeys(names)
            for row in self._rows(name, np.flatnonzero(np.array(names) == name), generator)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return the entries of all photos, and the means over all photos if there are several, as JSON values."""
        means = {"means": [row.as_json() for row in self.means()]} if len(self.photos) > 1 else {}
        return {"photos": [row.as_json() for row in self.rows()], **means}

    def _rows(self, name: str, indices: np.ndarray, generator: np.random.Generator) -> Iterator[RegionShare]:
        """Yield the entries of a group of photos, which may be a single one."""
        for region_index, region in enumerate(self.regions):
            for part_index, part in enumerate(self.parts):
                shares = self.share[indices, part_index, region_index]
                present = np.isfinite(shares)
                yield _mean_share(
                    (name, region, part),
                    shares[present],
                    self.area[indices, region_index][present],
                    self.random[indices, part_index, region_index][present],
                    generator,
                )


def region_shares(
    result: Attribution,
    regions: Any,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> RegionShares:
    """Measure how much of a map lies in regions of its photo, compared with their area and with random maps.

    The value of a patch is spread evenly over its pixels, without interpolation; so is the weight of a segment (LIME,
    KernelSHAP), because the weights add up and not their products with areas. A signed map is measured twice: the share
    of its positive part (what supports the class) and that of its negative part. Only what the model sees counts: the
    parts of the photo that preprocessing crops away, padding, and dropped patches belong to neither the share nor the
    area.

    A random map is the same map in a random place: shifted by random numbers of rows and columns, around the edges, and
    mirrored or not in each direction. It has the same values and the same smoothness, but does not depend on the photo.
    Its ratio is 1 on average.

    Args:
        result: an attribution of one or several photos, of any method.
        regions: a mapping from names to regions, which are the same for all photos or, as a list, one for each photo. A
            region is a box (left, top, width, height) or a polygon of corners (x, y) in pixels of the photo; a mask, as
            an array, an image or its path; an :class:`~vitscope.ObjectMask`; or ``"border"``, the outer tenth of the
            photo on each side. In a list, None is a photo without this region. A list of objects with names, or of
            ``"border"``, is accepted instead of a mapping, and a single one of them too.
        draws: number of random maps for each photo.
        seed: of the random maps, and of the bootstrap over photos.

    Returns:
        the share, the area and the shares of random maps, for each photo and region.

    Raises:
        CallError: there is no region, one does not fit its photo, the result holds no photos, or its map has negative
            values without being signed.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model, photo = vs.load("vit-nano"), skimage.data.chelsea()
        >>> shares = vs.region_shares(vs.rollout(model, photo), {"face": (105, 60, 235, 190), "edge": "border"})
        >>> shares.ratio.shape, shares.area.round(2).tolist()
        ((1, 1, 2), [[0.33, 0.36]])
        >>> vs.region_shares(vs.libra(model, photo, target="cat"), "border").parts
        ('supports', 'opposes')
    """
    if not isinstance(result, Attribution):
        raise CallError(f"result is {short_repr(result)}: an attribution is expected, as vitscope.rollout returns it")
    if not result.images:
        raise CallError(
            "this result was loaded from a file and holds no photos: attach them with result.with_photos(images)"
        )
    draws, seed = require_at_least(1, draws, "draws"), require_seed(seed)
    named = regions_by_name(regions, len(result))
    generator = np.random.default_rng(seed)
    parts = SIGNED_PARTS if result.signed else PARTS
    size = (len(result), len(parts), len(named))
    share, random = np.full(size, np.nan), np.full((*size, draws), np.nan)
    area = np.zeros((len(result), len(named)))
    for index, single in enumerate(result):
        image, values = single.images[0], _density(single)
        seen = _seen_area(single)
        covered = [
            np.zeros_like(seen) if mask is None else _covered_area(mask, image, seen.shape) * (seen > 0)
            for mask in (region_mask(image, choices[index], name) for name, choices in named.items())
        ]
        shifts = _random_shifts(values.shape, draws, generator)
        area[index] = [region.sum() / seen.sum() for region in covered]
        for part, amounts in enumerate(_parts(values, signed=result.signed)):
            if not (amounts * seen).any():
                continue
            totals = _shifted_sums(amounts, seen, shifts)
            for region, cells in enumerate(covered):
                if cells.any():
                    share[index, part, region] = (amounts * cells).sum() / (amounts * seen).sum()
                    random[index, part, region] = _shifted_sums(amounts, cells, shifts) / totals
    photos = [image.name or f"image {number}" for number, image in enumerate(result.images)]
    return RegionShares(list(named), parts, photos, share, area, random, seed)


def _density(result: Attribution) -> Float[np.ndarray, "height width"]:
    """Return the map of a single result, float64, with the weights of segments spread over their pixels."""
    values = result.values[0].detach().cpu().double().numpy()
    if isinstance(result, SegmentAttribution):
        index = result.index.cpu().numpy()
        inside = index >= 0
        return np.where(inside, values / np.maximum(np.bincount(index[inside])[np.maximum(index, 0)], 1), 0.0)
    if not result.signed and values.min() < 0:
        raise CallError("the map has negative values, but it is not signed: its shares would not be between 0 and 1")
    return values


def _parts(values: Float[np.ndarray, "height width"], *, signed: bool) -> list[np.ndarray]:
    """Return the positive and the negative part of a signed map, both as positive numbers, or the map itself."""
    return [values.clip(0), (-values).clip(0)] if signed else [values]


def _seen_area(result: Attribution) -> Float[np.ndarray, "height width"]:
    """Return the area of each patch on the photo, as a share of the patch; 0 for dropped patches."""
    image = result.images[0]
    height, width = result.values.shape[1:]
    seen = _covered_area(np.ones((image.photo.height, image.photo.width), dtype=bool), image, (height, width))
    return seen if result.dropped is None else seen * ~result.dropped[0].cpu().numpy()


def _covered_area(mask: Mask, image: InputImage, shape: tuple[int, ...]) -> Float[np.ndarray, "height width"]:
    """Return the share of the area of each patch that a mask of the photo covers."""
    left, top, right, bottom = image.box
    height, width = shape
    covered = cell_sums(mask, np.linspace(top, bottom, height + 1), np.linspace(left, right, width + 1))
    return covered.clip(0) * height * width / ((right - left) * (bottom - top))


def _random_shifts(shape: tuple[int, ...], draws: int, generator: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return for each random map whether it is mirrored upside down and sideways, and its shift in rows and columns."""
    return tuple(generator.integers(limit, size=draws) for limit in (2, 2, *shape))


def _shifted_sums(
    values: np.ndarray, weights: np.ndarray, shifts: tuple[np.ndarray, ...]
) -> Float[np.ndarray, " draw"]:
    """Return the weighted sums of shifted and mirrored maps; those of all shifts are a circular correlation."""
    sums = np.empty((2, 2, *values.shape))
    spectrum = np.fft.rfft2(weights)
    for upside_down in (0, 1):
        for sideways in (0, 1):
            mirrored = values[:: 1 - 2 * upside_down, :: 1 - 2 * sideways]
            correlation = np.fft.irfft2(np.conj(np.fft.rfft2(mirrored)) * spectrum, values.shape)
            sums[upside_down, sideways] = correlation
    return sums[shifts].clip(0)


def _mean_share(
    names: tuple[str, str, str],
    shares: Float[np.ndarray, " image"],
    areas: Float[np.ndarray, " image"],
    random: Float[np.ndarray, "image draw"],
    generator: np.random.Generator,
) -> RegionShare:
    """Return the mean share of some photos, with its intervals and its probability under random maps."""
    count, draws = random.shape
    if not count:
        nothing = float("nan")
        return RegionShare(*names, 0, nothing, nothing, nothing, None, None, (nothing, nothing), nothing)
    share, area = float(shares.mean()), float(areas.mean())
    share_interval = ratio_interval = None
    if count > 1:
        # Each photo has its own random map: equal draws of photos explained one by one are not paired.
        random = np.take_along_axis(random, generator.integers(draws, size=random.shape), axis=1)
        sample = generator.integers(count, size=(draws, count))
        means = shares[sample].mean(1)
        share_interval = _interval(means)
        ratio_interval = _interval(means / areas[sample].mean(1))
    random_means = random.mean(0)
    at_least = int((random_means >= share - TOLERANCE).sum())
    at_most = int((random_means <= share + TOLERANCE).sum())
    p_value = min(2 * (1 + min(at_least, at_most)) / (1 + draws), 1.0)
    random_interval = _interval(random_means / area)
    return RegionShare(
        *names, count, share, area, share / area, share_interval, ratio_interval, random_interval, p_value
    )


def _ratio(share: np.ndarray, area: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isfinite(share), share / area, np.nan)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, ENDS)
    return float(low), float(high)


def _of_part(part: str) -> str:
    return "" if part == PARTS[0] else f" ({part})"


def _without_nan(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
