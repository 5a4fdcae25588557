"""Masks: which parts of an image one question shows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from vitscope.errors import CallError
from vitscope.perturb.segments import Segments

MOST_MASKS = 1_000_000  # of one image: more take days, whatever the model
MOST_TOSSES = 250_000_000  # masks × segments: two gigabytes of random numbers

Visible = Shaped[np.ndarray, "pixel_height pixel_width"]  # bool, or from 0 (hidden) to 1 (shown)


@runtime_checkable
class Masks(Protocol):
    """A number of masks over the pixels of one image."""

    def __len__(self) -> int: ...

    def visible(self, at: int) -> Visible:
        """One mask at every pixel."""

    def patch_shares(
        self, at: Sequence[int], points: Int[np.ndarray, "patch point"]
    ) -> Float[np.ndarray, "mask patch"]:
        """How much of each patch is shown, for some of the masks."""


def check_count(count: int, segments: int = 1) -> None:
    """Refuse a number of masks that could never be evaluated, before room is made for them.

    Raises:
        CallError: more than :data:`MOST_MASKS` masks, or than :data:`MOST_TOSSES` parts in all.
    """
    shown = f"{count:,}" if count < 10**30 else "over 10^30"
    if count > MOST_MASKS:
        raise CallError(f"{shown} masks are too many: at most {MOST_MASKS:,} are evaluated on one image")
    if count * segments > MOST_TOSSES:
        raise CallError(
            f"{shown} masks of {segments:,} segments are too many: at most {MOST_TOSSES // segments:,} masks are drawn "
            "of so many segments"
        )


@dataclass(frozen=True, eq=False)
class SegmentMasks:
    """Rows of zeros and ones over segments, at most :data:`MOST_MASKS`."""

    rows: Bool[np.ndarray, "mask segment"]
    segments: Segments

    def __post_init__(self) -> None:
        check_count(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def visible(self, at: int) -> Visible:
        return np.append(self.rows[at], True)[self.segments.index]

    def patch_shares(
        self, at: Sequence[int], points: Int[np.ndarray, "patch point"]
    ) -> Float[np.ndarray, "mask patch"]:
        hidden = ~self.rows[list(at)]
        return 1 - hidden @ self.segments.coverage(points).T


@dataclass(frozen=True, eq=False)
class PixelMasks:
    """Masks that are made one by one when they are asked for, at most :data:`MOST_MASKS`."""

    count: int
    make: Callable[[int], Visible]

    def __post_init__(self) -> None:
        check_count(self.count)

    def __len__(self) -> int:
        return self.count

    def visible(self, at: int) -> Visible:
        return self.make(at)

    def patch_shares(
        self, at: Sequence[int], points: Int[np.ndarray, "patch point"]
    ) -> Float[np.ndarray, "mask patch"]:
        return np.stack([self.make(i).ravel()[points].mean(-1, dtype=float) for i in at])


@runtime_checkable
class Sampler(Protocol):
    """Rows of zeros and ones over segments, drawn in parts of any size; the first row shows everything."""

    def draw(self, count: int) -> Bool[np.ndarray, "mask segment"]: ...


class UniformSampler:
    """Each segment shown or hidden by the toss of a coin, in the order in which PyPI's lime tosses it."""

    def __init__(self, segments: int, seed: int) -> None:
        self._random = np.random.RandomState(seed)
        self._random.randint(0, 1000)  # lime draws a seed for its segmentation first
        self._segments, self._drawn = segments, 0

    def draw(self, count: int) -> Bool[np.ndarray, "mask segment"]:
        check_count(count, self._segments)
        rows = self._random.randint(0, 2, count * self._segments).reshape(count, self._segments).astype(bool)
        if self._drawn == 0:
            rows[:1] = True
        self._drawn += count
        return rows


class PairedSampler:
    """Coin tosses, each row followed by its complement: effects of even order cancel."""

    def __init__(self, segments: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._segments = segments
        self._waiting = np.ones((1, segments), dtype=bool)  # the image itself has no partner

    def draw(self, count: int) -> Bool[np.ndarray, "mask segment"]:
        check_count(count, self._segments)
        first = self._random.integers(0, 2, (max(-(-(count - len(self._waiting)) // 2), 0), self._segments)) > 0
        pairs = np.stack([first, ~first], axis=1).reshape(-1, self._segments)
        rows = np.concatenate([self._waiting, pairs])
        self._waiting = rows[count:]
        return rows[:count]


class KernelSampler:
    """Rows drawn as often as a kernel weighs them, so that no weight is left to apply.

    ``weight(k)`` is the kernel's weight of a row with k of its segments shown. GLIME: Tan et al., 2023
    (arXiv 2311.15722).
    """

    def __init__(self, segments: int, seed: int, weight: Callable[[np.ndarray], np.ndarray]) -> None:
        self._random = np.random.default_rng(seed)
        counts = np.arange(segments + 1)
        logs = np.array(
            [math.lgamma(segments + 1) - math.lgamma(k + 1) - math.lgamma(segments - k + 1) for k in counts]
        )
        chances = np.exp(logs - logs.max()) * weight(counts)
        self._chances, self._counts, self._first = chances / chances.sum(), counts, True

    def draw(self, count: int) -> Bool[np.ndarray, "mask segment"]:
        check_count(count, len(self._counts) - 1)
        shown = self._random.choice(self._counts, size=count, p=self._chances)
        ranks = self._random.random((count, len(self._counts) - 1)).argsort(1).argsort(1)
        rows = ranks < shown[:, None]
        if self._first:
            rows[:1] = True
            self._first = False
        return rows
