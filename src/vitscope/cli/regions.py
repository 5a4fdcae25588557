"""The option --region: shares of maps in regions of the photos, and what photos of a group have in common."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vitscope.cli.marks import parse_mark, parse_name
from vitscope.cli.output import save
from vitscope.cli.tables import print_table
from vitscope.cli.terminal import say
from vitscope.errors import CallError, OutputExistsError

if TYPE_CHECKING:
    from vitscope.cli.photo_batch import PhotoBatch
    from vitscope.compositing.object_masks import Mask
    from vitscope.metrics.region_shares import RegionShare, RegionShares
    from vitscope.models import Prediction
    from vitscope.results.attribution import Attribution
    from vitscope.views.scene import Scene
    from vitscope.views.style import FigureStyle

BORDER = "border"
MEAN_CELLS = 200  # rows and columns of the masks on mean photos
OVERVIEW = "regions"  # ends the name of the figure of mean maps
ALL = "all photos"
WIDE = 100  # columns of a terminal that has room for all columns of the table
GROUPS = {"predicted": "predicted class", "folder": "folder"}


@dataclass(frozen=True)
class MeasuredPhoto:
    """The regions of one photo; there are none without --region.

    Attributes:
        shares: of each map, by its name.
        masks: of the regions in the photo, by their names.
    """

    shares: "Mapping[str, RegionShares]" = field(default_factory=dict)
    masks: "Mapping[str, Mask]" = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, Any]:
        """Values of the JSON report."""
        if not self.shares:
            return {}
        return {"regions": {name: shares.as_json()["photos"] for name, shares in self.shares.items()}}

    @property
    def numbers(self) -> dict[str, str]:
        """Columns of summary.csv: the area of each region, and its share of each map with the ratio of both."""
        numbers = {}
        for name, shares in self.shares.items():
            for row in shares.rows():
                part = name if len(shares.parts) == 1 else f"{name} {row.part}"
                numbers[f"{row.region}: area"] = _number(row.area)
                numbers[f"{row.region}: share, {part}"] = _number(row.share)
                numbers[f"{row.region}: ratio, {part}"] = _number(row.ratio)
        return numbers

    def rows(self) -> "list[RegionShare]":
        """Return the entries of all maps, named by the maps."""
        return [row for name, shares in self.shares.items() for row in _renamed(name, shares.rows())]

    def outline(self, scene: "Scene") -> "Scene":
        """Return the scene with the outlines of the regions."""
        from vitscope.views.region_outlines import outlined

        return outlined(scene, self.masks) if self.masks else scene


class RegionOption:
    """The regions of all photos of a call, and what was measured in them.

    On leaving the context, the mean shares of several photos are printed.

    Args:
        texts: the values of --region; None or empty for no regions.
        group_by: ``"predicted"`` for groups of the same predicted class, ``"folder"`` for photos of one folder.
        photos: of the call.
        json_: whether tables are not printed.

    Raises:
        CallError: a value is no region, two regions have the same name, or a folder has no masks of the photos.
    """

    def __init__(self, texts: Sequence[str] | None, group_by: str, photos: Sequence[Any], *, json_: bool) -> None:
        self._regions = _parse_regions(texts or ())
        for region in self._regions.values():
            if isinstance(region, Path) and all(_region_of(photo, region) is None for photo in photos):
                raise CallError(
                    f"{region} holds no mask of these photos: name each mask like its photo, in the same subfolder"
                )
        self._group_by, self._json = group_by, json_
        self._groups: list[str] = []
        self._shares: dict[str, list[RegionShares]] = {}
        self._maps: dict[str, list[Attribution]] = {}
        self._masks: list[dict[str, Mask]] = []

    def __enter__(self) -> "RegionOption":
        return self

    def measure(
        self, photo: Any, maps: "Mapping[str, Attribution]", predictions: "Sequence[Prediction]"
    ) -> MeasuredPhoto:
        """Measure the regions of one photo.

        Args:
            photo: the photo.
            maps: of the photo, by their names.
            predictions: of the photo, the most probable first.
        """
        if not self._regions or not maps:
            return MeasuredPhoto()
        from vitscope.compositing.regions import region_mask
        from vitscope.metrics.region_shares import region_shares
        from vitscope.results.mean_maps import reduced

        image = next(iter(maps.values())).images[0].uncropped()
        masks = {name: region_mask(image, _region_of(photo, region), name) for name, region in self._regions.items()}
        listed = {name: [mask] for name, mask in masks.items()}
        shares = {name: region_shares(result, listed) for name, result in maps.items()}
        self._groups.append(self._group(photo, predictions))
        for name, result in maps.items():
            self._shares.setdefault(name, []).append(shares[name])
            self._maps.setdefault(name, []).append(reduced(result))
        present = {name: mask for name, mask in masks.items() if mask is not None}
        self._masks.append(_coarse_masks(present, next(iter(maps.values()))))
        return MeasuredPhoto(shares, present)

    def print_photo(self, measured: MeasuredPhoto, *, several: bool) -> None:
        """Print the shares of a photo, unless it is one of several, whose means are printed at the end."""
        if measured.shares and not self._json and not several:
            _print_shares(measured.rows())

    def conclude(self, batch: "PhotoBatch", *, overwrite: bool, style: "FigureStyle | None") -> None:
        """Write the mean maps of several photos, and add the means to the report.

        Args:
            batch: the photos.
            overwrite: whether an existing figure is replaced.
            style: of the figure; None for no figure.
        """
        if len(self._groups) < 2:
            return
        path = None if style is None else batch.overview_path(OVERVIEW)
        if path is not None:
            if path.exists() and not overwrite:
                raise OutputExistsError(f"{path} exists already: pass --overwrite or another --out")
            save(self._scene(), path, overwrite, style)
        means = {name: [row.as_json() for row in rows] for name, rows in self._means().items()}
        batch.add_overview(path, {"group_by": self._group_by, "region_means": means})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if len(self._groups) < 2 or self._json:
            return
        for name, rows in self._means().items():
            say(f"shares of regions, {name}, by {GROUPS[self._group_by]} (number of photos):")
            _print_shares(rows)

    def _group(self, photo: Any, predictions: "Sequence[Prediction]") -> str:
        """Return the group of a photo."""
        if self._group_by == "folder":
            return Path(photo).absolute().parent.name if isinstance(photo, Path) else ALL
        return predictions[0].label if predictions else ALL

    def _means(self) -> "dict[str, list[RegionShare]]":
        """Return the means of the groups, largest group first, then those of all photos, for each map."""
        from vitscope.metrics.region_shares import RegionShares

        result = {}
        for name, shares in self._shares.items():
            joined = RegionShares.join(shares)
            order = self._ordered_groups()
            rows = sorted(joined.means(self._groups), key=lambda row: order.index(row.name))
            result[name] = [*rows, *(joined.means() if len(order) > 1 else ())]
        return result

    def _ordered_groups(self) -> list[str]:
        return sorted(dict.fromkeys(self._groups), key=lambda group: -self._groups.count(group))

    def _scene(self) -> "Scene":
        """Return the figure of the mean maps."""
        from vitscope.results.mean_maps import mean_maps
        from vitscope.views.region_outlines import mean_map_scene

        order = self._ordered_groups()
        ranks = sorted(range(len(self._groups)), key=lambda index: order.index(self._groups[index]))
        groups = [self._groups[index] for index in ranks]
        means = {name: mean_maps([maps[index] for index in ranks], groups) for name, maps in self._maps.items()}
        rows = self._means()
        lines = {
            name: [[_line(row) for row in rows[name] if row.name == group and row.photos] for group in order]
            for name in means
        }
        provenance = next(iter(means.values())).provenance
        return mean_map_scene(
            means,
            [self._mean_masks(group) for group in order],
            lines,
            title=f"Mean maps by {GROUPS[self._group_by]}: {', '.join(means)} of {provenance.get('model', '')}",
            note="every photo counts equally; below: share of the map in a region, its ratio to the area, and the "
            "ratios of 95 % of random maps",
        )

    def _mean_masks(self, group: str) -> "dict[str, Mask]":
        """Return the part of each region that lies in it in at least half of the photos of a group that have it."""
        import numpy as np

        chosen = [masks for masks, label in zip(self._masks, self._groups, strict=True) if label == group]
        by_name = {name: [masks[name] for masks in chosen if name in masks] for name in self._regions}
        return {name: np.mean(masks, axis=0) >= 0.5 for name, masks in by_name.items() if masks}


def _parse_regions(texts: Sequence[str]) -> dict[str, Any]:
    """Return the regions by their names: ``"border"``, a box, a polygon, the path of a mask, or a folder of masks."""
    regions: dict[str, Any] = {}
    for number, text in enumerate(texts, 1):
        default = BORDER if text == BORDER else "region" if len(texts) == 1 else f"region {number}"
        name, value = parse_name(text, default)
        if name in regions:
            raise CallError(f"two regions are called {name}: give each its own name, as in {name}2={value}")
        if value == BORDER:
            regions[name] = BORDER
        elif Path(value).is_dir():
            regions[name] = Path(value)
        else:
            ((kind, mark),) = parse_mark(value, "--region").items()
            if kind == "box" and len(mark) != 4:
                raise CallError(f"the region {name} is {value}, {len(mark)} numbers: a box is x,y,width,height")
            regions[name] = Path(mark) if kind == "mask" else mark
    return regions


def _region_of(photo: Any, region: Any) -> Any:
    """Return the region of a photo: itself, or from a folder the mask of the photo's name; None if it has none."""
    if not isinstance(region, Path) or not region.is_dir():
        return region
    path = Path(photo)
    folder = getattr(photo, "folder", None)
    place = path.relative_to(folder) if folder is not None else Path(path.name)
    masks = sorted((region / place.parent).glob(f"{glob.escape(place.stem)}.*"))
    if len(masks) > 1:
        raise CallError(f"{masks[0]} and {masks[1]} are both masks of {path}: remove one of them")
    return masks[0] if masks else None


def _coarse_masks(masks: "Mapping[str, Mask]", result: "Attribution") -> "dict[str, Mask]":
    """Return each region at the points of a coarse grid of what the model sees."""
    import numpy as np

    left, top, right, bottom = result.images[0].box
    points = (np.arange(MEAN_CELLS) + 0.5) / MEAN_CELLS
    rows, columns = np.floor(top + points * (bottom - top)), np.floor(left + points * (right - left))
    coarse = {}
    for name, mask in masks.items():
        height, width = mask.shape
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        indices = rows.clip(0, height - 1).astype(int), columns.clip(0, width - 1).astype(int)
        coarse[name] = mask[np.ix_(*indices)] & inside
    return coarse


def _print_shares(rows: "Sequence[RegionShare]") -> None:
    from rich.console import Console

    from vitscope.views.tables import REGIONS_HEADER, region_rows

    count = len(REGIONS_HEADER) - (Console().width < WIDE)  # a narrow terminal has no room for the last column, p
    cells = [row[:count] for row in region_rows(rows)]
    print_table(REGIONS_HEADER[:count], cells, right=range(2, count), unbroken=range(1, count), gap=2)


def _renamed(name: str, rows: "Sequence[RegionShare]") -> "list[RegionShare]":
    from dataclasses import replace

    return [replace(row, name=name) for row in rows]


def _line(row: "RegionShare") -> str:
    part = "" if row.part == "all" else f", {row.part}"
    low, high = row.random_interval
    return f"{row.region}{part}: {row.share:.0%}, × {row.ratio:.2f} ({low:.2f} to {high:.2f})"


def _number(value: float) -> str:
    return "" if value != value else f"{value:.6g}"
