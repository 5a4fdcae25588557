"""Every image of a data set read once: which cannot be read, which are there twice, what a class looks like."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vitscope.errors import CallError, ImageError, WorkError, warn
from vitscope.methods._perturbation import progress_bar
from vitscope.tune.data import Data, LabeledImages, without
from vitscope.validation import ratio

THUMBNAIL, MEAN_SIDE = 32, 64  # pixels a side
NEAR = 0.99  # correlation of grey thumbnails
FLAT = 2.0  # standard deviation in grey levels: below it an image has no structure to compare
BLOCK = 1 << 24  # pairs compared at a time

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class DataCheck:
    """What was found in a data set.

    Attributes:
        unreadable: ("train" or "test", place, why), in order.
        exact: (place in train, place in test) of images that are the same pixel by pixel.
        near: the same for images whose grey thumbnails correlate by at least ``threshold``, exact ones not counted.
        repeated: how many training images are pixel by pixel there before.
        contradictions: how many of ``exact`` and ``near`` carry different labels.
        nearest: the share of test images whose most similar training thumbnail is of their class: what looking
            images up gets right, without any model; ``nearest_without``, when the duplicates are left out.
        means: (class, 64, 64, 3) in [0, 255], the mean training image of each class; NaN where none could be read.
    """

    data: Data
    unreadable: tuple[tuple[str, int, str], ...]
    exact: tuple[tuple[int, int], ...]
    near: tuple[tuple[int, int], ...]
    repeated: int
    contradictions: int
    nearest: float
    nearest_without: float
    means: Float[np.ndarray, "label height width 3"]
    threshold: float

    def __repr__(self) -> str:
        return (
            f"<Inspection of {self.data.name}: {counted(len(self.unreadable), 'unreadable image')}, "
            f"{self.leaks_told()}, {counted(self.repeated, 'repeated training image')}>"
        )

    @property
    def leaking(self) -> tuple[int, ...]:
        """Places of the training images that are in the test set as well."""
        return tuple(sorted({train for train, _ in (*self.exact, *self.near)}))

    def leaks_told(self) -> str:
        """How many there are, in words."""
        if not self.leaking:
            return "no training image is in the test set"
        are = "is" if len(self.leaking) == 1 else "are"
        pairs = f"{counted(len(self.exact), 'exact pair')} and {len(self.near):,} near"
        return f"{counted(len(self.leaking), 'training image')} {are} in the test set too ({pairs})"

    def without_duplicates(self) -> Data:
        """The data set without the training images that are in the test set as well; the test set stays whole."""
        return without(self.data, self.leaking)

    def without_unreadable(self) -> Data:
        """The data set without the files that hold no image."""
        places = {name: [at for where, at, _ in self.unreadable if where == name] for name in ("train", "test")}
        return without(self.data, places["train"], places["test"])

    def as_json(self) -> dict[str, Any]:
        names = [
            {"train": self.data.train.name(a), "test": self.data.test.name(b), "exact": (a, b) in set(self.exact)}
            for a, b in (*self.exact, *self.near)
        ]
        return {
            "name": self.data.name,
            "classes": {label: {"train": a, "test": b} for label, (a, b) in self.data.counts().items()},
            "unreadable": [reason for _, _, reason in self.unreadable],
            "duplicates": names,
            "repeated_in_train": self.repeated,
            "contradictions": self.contradictions,
            "threshold": self.threshold,
            "nearest": self.nearest,
            "nearest_without_duplicates": self.nearest_without,
        }


def inspect(data: Data, *, threshold: float | int = NEAR, progress: Progress | bool | None = None) -> DataCheck:
    """Read every image once and look for leaks between train and test.

    Two images are near duplicates when their grey thumbnails of 32 × 32 pixels correlate by ``threshold`` or more:
    so are copies that were saved again, made larger, brighter or of more contrast; mirrored ones are not.

    Args:
        data: as :func:`~vitscope.tune.data.load_data` gives it.
        threshold: the correlation from which two images are near duplicates.
        progress: True for a bar on stderr, or a function of the number of images read and of all.

    Raises:
        CallError: an argument is wrong.
        WorkError: no image of train, or none of test, can be read.
    """
    if not isinstance(data, Data):
        raise CallError(f"inspect was given {data!r}: pass what vitscope.load_data returns")
    threshold = ratio(threshold, "threshold")
    with progress_bar(progress, "reading images") as tell:
        return _inspect(data, threshold, tell)


def _inspect(data: Data, threshold: float, progress: Progress | None) -> DataCheck:
    total = len(data.train) + len(data.test)
    unreadable: list[tuple[str, int, str]] = []
    sums = np.zeros((len(data.labels), MEAN_SIDE, MEAN_SIDE, 3))
    read = np.zeros(len(data.labels))
    looks: dict[str, list[_Look | None]] = {}
    done = 0
    for name, split in (("train", data.train), ("test", data.test)):
        looks[name] = []
        for at, look in enumerate(_looks(split)):
            done += 1
            if progress is not None:
                progress(done, total)
            if isinstance(look, str):
                unreadable.append((name, at, look))
                looks[name].append(None)
                continue
            looks[name].append(look)
            if name == "train":
                sums[split.classes[at]] += look.small
                read[split.classes[at]] += 1
    if not all(any(look is not None for look in some) for some in looks.values()):
        raise WorkError(f"{data.name} has no image that can be read: {unreadable[0][2]}")
    digests = {name: [None if look is None else look.digest for look in some] for name, some in looks.items()}
    exact = _same(digests["train"], digests["test"])
    near, found = _near(_vectors(looks["train"]), _vectors(looks["test"]), threshold, set(exact))
    readable = np.asarray([look is not None for look in looks["test"]])
    right = [(data.train.classes[places] == data.test.classes)[readable] for places in found]
    there = [digest for digest in digests["train"] if digest is not None]
    pairs = (*exact, *near)
    return DataCheck(
        data,
        tuple(unreadable),
        tuple(exact),
        tuple(near),
        repeated=len(there) - len(set(there)),
        contradictions=sum(int(data.train.classes[a] != data.test.classes[b]) for a, b in pairs),
        nearest=float(right[0].mean()),
        nearest_without=float(right[1].mean()),
        means=sums / np.where(read, read, np.nan)[:, None, None, None],
        threshold=threshold,
    )


def usable(inspection: DataCheck, *, unreadable: str = "refuse", drop_duplicates: bool = False) -> Data:
    """The data set to work with: unreadable images refused or skipped, duplicates told of or dropped.

    Raises:
        WorkError: images cannot be read and ``unreadable`` is ``"refuse"``.
    """
    if unreadable not in ("refuse", "skip"):
        raise CallError(f"unreadable is {unreadable!r}: refuse or skip")
    data = inspection.data
    if inspection.unreadable:
        named = "; ".join(reason for _, _, reason in inspection.unreadable[:3])
        more = len(inspection.unreadable) - 3
        count = len(inspection.unreadable)
        story = f"{counted(count, 'image')} of {data.name} cannot be read: {named}" + (
            f"; and {more} more" if more > 0 else ""
        )
        if unreadable != "skip":
            raise WorkError(f"{story}: mend or delete them, or skip them (--unreadable skip, unreadable='skip')")
        warn(f"{story}: skipped")
    if inspection.leaking and not drop_duplicates:
        warn(
            f"{data.name}: {inspection.leaks_told()}: the accuracy will be too high; leave them out "
            "(--drop-duplicates, drop_duplicates=True)"
        )
    skipped = [at for where, at, _ in inspection.unreadable if where == "train"]
    lost = [at for where, at, _ in inspection.unreadable if where == "test"]
    return without(data, [*skipped, *(inspection.leaking if drop_duplicates else ())], lost)


def counted(count: int, what: str) -> str:
    """A number of things as text."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


@dataclass(frozen=True, eq=False)
class _Look:
    digest: bytes
    grey: Float[np.ndarray, " pixel"]
    small: Float[np.ndarray, "height width 3"]


def _looks(images: LabeledImages) -> Iterator["_Look | str"]:
    """Each image's look, or why it has none, in order; a few threads ahead."""

    def look(at: int) -> _Look | str:
        try:
            photo = images.read(at)
        except ImageError as error:
            return str(error)
        grey = photo.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        small = photo.resize((MEAN_SIDE, MEAN_SIDE), Image.Resampling.BOX)
        size = np.asarray(photo.size, np.int64).tobytes()
        digest = hashlib.blake2b(size + photo.tobytes(), digest_size=16).digest()
        return _Look(digest, np.asarray(grey, np.float32).ravel(), np.asarray(small, np.float32))

    workers = max(os.cpu_count() or 1, 2)
    with ThreadPoolExecutor(workers) as threads:
        waiting = deque(threads.submit(look, at) for at in range(min(4 * workers, len(images))))
        for at in range(4 * workers, len(images) + 4 * workers):
            if not waiting:
                return
            found = waiting.popleft().result()
            if at < len(images):
                waiting.append(threads.submit(look, at))
            yield found


def _same(train: list[bytes | None], test: list[bytes | None]) -> list[tuple[int, int]]:
    places: dict[bytes, list[int]] = {}
    for at, digest in enumerate(train):
        if digest is not None:
            places.setdefault(digest, []).append(at)
    return [(a, b) for b, digest in enumerate(test) if digest is not None for a in places.get(digest, [])]


def _vectors(looks: list[_Look | None]) -> Float[np.ndarray, "image pixel"]:
    """Grey thumbnails of mean 0 and length 1; zero for what is flat or could not be read."""
    grey = np.stack([np.zeros(THUMBNAIL**2, np.float32) if look is None else look.grey for look in looks])
    grey -= grey.mean(1, keepdims=True)
    length = np.linalg.norm(grey, axis=1, keepdims=True)
    return np.where(length > FLAT * THUMBNAIL, grey / np.maximum(length, 1e-6), 0)


def _near(
    train: Float[np.ndarray, "train pixel"],
    test: Float[np.ndarray, "test pixel"],
    threshold: float,
    exact: set[tuple[int, int]],
) -> tuple[list[tuple[int, int]], Int[np.ndarray, "2 test"]]:
    """Near pairs; for each test image the nearest training image, and the nearest that is no duplicate."""
    found: list[tuple[int, int]] = []
    same = {place for place, _ in exact}
    best, places = np.full((2, len(test)), -np.inf), np.zeros((2, len(test)), dtype=np.int64)
    size = max(BLOCK // len(test), 1)
    for first in range(0, len(train), size):
        alike = test @ train[first : first + size].T
        rows, columns = np.nonzero(alike >= threshold)
        found += zip((columns + first).tolist(), rows.tolist(), strict=True)
        known = np.isin(np.arange(first, first + alike.shape[1]), list(same))
        known[columns] = True
        for kind, compared in enumerate((alike, np.where(known, -np.inf, alike))):
            nearest = compared.argmax(1)
            value = compared[np.arange(len(test)), nearest]
            better = value > best[kind]
            best[kind, better], places[kind, better] = value[better], nearest[better] + first
    return sorted(pair for pair in found if pair not in exact), places
