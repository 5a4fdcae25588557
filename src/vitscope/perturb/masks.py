"""Masks: which parts of an image are visible."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from vitscope.errors import CallError
from vitscope.perturb.segments import Segments

MAX_MASKS = 1_000_000  # for one image: more would take days, whatever the model
MAX_DRAWS = 250_000_000  # masks × segments: two gigabytes of random numbers

Visible = Shaped[np.ndarray, "pixel_height pixel_width"]  # bool, or from 0 (hidden) to 1 (visible)


@runtime_checkable
class Masks(Protocol):
    """Masks over the pixels of one image."""

    def __len__(self) -> int: ...

    def visible(self, index: int) -> Visible:
        """Return the visibility of every pixel under one mask."""

    def patch_shares(
        self, indices: Sequence[int], points: Int[np.ndarray, "patch point"]
    ) -> Float[np.ndarray, "mask patch"]:
        """Return the visible share of each patch under some of the masks."""


def check_count(count: int, segments: int = 1) -> None:
    """Refuse a number of masks that could never be evaluated, before memory is allocated for them.

    Raises:
        CallError: more than :data:`MAX_MASKS` masks, or more than :data:`MAX_DRAWS` masks × segments.
    """
    number = f"{count:,}" if count < 10**30 else "over 10^30"
    if count > MAX_MASKS:
        raise CallError(f"{number} masks are too many: at most {MAX_MASKS:,} are evaluated on one image")
    if count * segments > MAX_DRAWS:
        raise CallError(
            f"{number} masks of {segments:,} segments are too many: at most {MAX_DRAWS // segments:,} masks can be "
            "drawn for this number of segments"
        )


@dataclass(frozen=True, eq=False)
class SegmentMasks:
    """Masks as rows over segments, True for each visible segment; at most :data:`MAX_MASKS`."""

    rows: Bool[np.ndarray, "mask segment"]
    segments: Segments

    def __post_init__(self) -> None:
        check_count(len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def visible(self, index: int) -> Visible:
        return np.append(self.rows[index], True)[self.segments.index]

    def patch_shares(
        self, indices: Sequence[int], points: Int[np.ndarray, "patch point"]
    ) -> Float[np.ndarray, "mask patch"]:
        hidden = ~self.rows[list(indices)]
        return 1 - hidden @ self.segments.coverage(points).T


@dataclass(frozen=True, eq=False)
class PixelMasks:
    """Masks over pixels, computed one by one when they are needed; at most :data:`MAX_MASKS`."""

    count: int
    make: Callable[[int], Visible]

    def __post_init__(self) -> None:
        check_count(self.count)

    def __len__(self) -> int:
        return self.count

    def visible(self, index: int) -> Visible:
        return self.make(index)

    def patch_shares(
        self, indices: Sequence[int], points: Int[np.ndarray, "patch point"]
    ) -> Float[np.ndarray, "mask patch"]:
        return np.stack([self.make(index).ravel()[points].mean(-1, dtype=float) for index in indices])


@runtime_checkable
class Sampler(Protocol):
    """Draws rows over segments, in chunks of any size. The very first row shows every segment."""

    def draw(self, count: int) -> Bool[np.ndarray, "mask segment"]: ...


class UniformSampler:
    """Hides each segment with probability ½, with the random numbers of PyPI's lime in the same order."""

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
    """Draws uniform rows, each followed by its complement, so that effects of even order cancel."""

    def __init__(self, segments: int, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._segments = segments
        self._waiting = np.ones((1, segments), dtype=bool)  # the original image has no complement

    def draw(self, count: int) -> Bool[np.ndarray, "mask segment"]:
        check_count(count, self._segments)
        first = self._random.integers(0, 2, (max(-(-(count - len(self._waiting)) // 2), 0), self._segments)) > 0
        pairs = np.stack([first, ~first], axis=1).reshape(-1, self._segments)
        rows = np.concatenate([self._waiting, pairs])
        self._waiting = rows[count:]
        return rows[:count]


class KernelSampler:
    """Draws rows in proportion to a kernel, so that the regression needs no weights.

    ``weight(k)`` is the kernel's weight of a row with k visible segments.

    Reference: GLIME, Tan et al., 2023 (arXiv 2311.15722).
    """

    def __init__(self, segments: int, seed: int, weight: Callable[[np.ndarray], np.ndarray]) -> None:
        self._random = np.random.default_rng(seed)
        counts = np.arange(segments + 1)
        logs = np.array(
            [math.lgamma(segments + 1) - math.lgamma(k + 1) - math.lgamma(segments - k + 1) for k in counts]
        )
        probabilities = np.exp(logs - logs.max()) * weight(counts)
        self._probabilities, self._counts, self._first = probabilities / probabilities.sum(), counts, True

    def draw(self, count: int) -> Bool[np.ndarray, "mask segment"]:
        check_count(count, len(self._counts) - 1)
        visible = self._random.choice(self._counts, size=count, p=self._probabilities)
        ranks = self._random.random((count, len(self._counts) - 1)).argsort(1).argsort(1)
        rows = ranks < visible[:, None]
        if self._first:
            rows[:1] = True
            self._first = False
        return rows
