"""Rows of text of results that are best read as tables."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vitscope.compositing.effects import Effect
from vitscope.methods.head_statistics import HeadStatistics
from vitscope.metrics.agreement import Agreement
from vitscope.metrics.faithfulness import Faithfulness
from vitscope.metrics.region_shares import PARTS, RegionShare

AGREEMENT_HEADER = ("pair", "rank correlation", "overlap", "by chance")
EFFECTS_HEADER = ("effect", "difference", "mean", "interval")
FAITHFULNESS_HEADER = ("image", "deletion", "in random order", "insertion", "in random order")
REGIONS_HEADER = ("map", "region", "share", "area", "ratio", "random maps", "p")
STATISTICS_HEADER = ("layer (index)", "entropy in nats", "attention distance in patches")


def agreement_rows(agreement: Agreement) -> list[tuple[str, ...]]:
    """Return the rank correlation of each pair, and the overlap of its top regions compared with chance."""
    return [
        (
            f"{first} and {second}",
            f"{agreement.rank_correlation[i, j]:+z.2f}",
            f"{agreement.overlap[i, j]:.0%}",
            f"{agreement.chance[i, j]:.0%}",
        )
        for i, first in enumerate(agreement.names)
        for j, second in enumerate(agreement.names)
        if i < j
    ]


def effect_rows(effects: Sequence[Effect]) -> list[tuple[str, ...]]:
    """Return each effect with its two sides in words, its mean and its interval."""
    return [
        (
            effect.name,
            effect.description,
            f"{effect.mean:+.3f}",
            "" if effect.interval is None else "{:+.3f} to {:+.3f}".format(*effect.interval),
        )
        for effect in effects
    ]


def faithfulness_rows(areas: Faithfulness) -> list[tuple[str, ...]]:
    """Return the areas of each image, and their means if there are several images."""
    columns = (areas.deletion, areas.random_deletion, areas.insertion, areas.random_insertion)
    rows = [(str(image), *(f"{area:.3f}" for area in row)) for image, row in enumerate(zip(*columns, strict=True))]
    return rows if len(rows) == 1 else [("mean", *(f"{column.mean():.3f}" for column in columns)), *rows]


def region_rows(entries: Sequence[RegionShare]) -> list[tuple[str, ...]]:
    """Return the share of the map in each region, its ratio to the area, and the ratios of random maps.

    A mean over photos is named with their number, and its ratio has a 95 % interval.
    """
    return [
        (
            _name_and_part(entry),
            entry.region if entry.photos else f"{entry.region} (not seen)",
            _percent(entry.share),
            _percent(entry.area),
            _ratio(entry.ratio, entry.ratio_interval),
            "{} to {}".format(*map(_ratio, entry.random_interval)) if entry.photos else "",
            f"{entry.p_value:.3f}" if entry.photos else "",
        )
        for entry in entries
    ]


def _name_and_part(entry: RegionShare) -> str:
    count = f" ({entry.photos:,})" if entry.ratio_interval is not None else ""
    return f"{entry.name}{count}{'' if entry.part in PARTS else f', {entry.part}'}"


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{share:.1%}"


def _ratio(ratio: float, interval: tuple[float, float] | None = None) -> str:
    ends = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
    return "" if math.isnan(ratio) else f"{ratio:.2f}{ends}"


def statistics_rows(statistics: HeadStatistics) -> list[tuple[str, ...]]:
    """Return the mean entropy and distance of each layer, with the lowest and the highest of its heads."""
    by_layer = zip(statistics.layers, statistics.entropy.unbind(1), statistics.distance.unbind(1), strict=True)
    return [
        (f"{layer + 1} ({layer})", _mean_and_range(entropy), _mean_and_range(distance))
        for layer, entropy, distance in by_layer
    ]


def _mean_and_range(values: Tensor) -> str:
    """Return the mean over images and heads, and the range of the heads."""
    heads = torch.nanmean(values.double(), 0)
    numbers = [head for head in heads.tolist() if not math.isnan(head)]
    if not numbers:
        return ""
    return f"{sum(numbers) / len(numbers):.2f} ({min(numbers):.2f} to {max(numbers):.2f})"
