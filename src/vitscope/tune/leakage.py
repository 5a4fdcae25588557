"""Checks of a data set before training: unreadable images, duplicates between train and test, mean images."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vitscope.display import Drawn, counted, one_line
from vitscope.errors import CallError, ImageError, WorkError, warn
from vitscope.progress import Progress, ProgressCallback, ProgressLike, progress_callback
from vitscope.tune.data import Data, LabeledImages, load_data, without
from vitscope.tune.data_options import DEFAULT_OPTIONS, DataOptions
from vitscope.validation import require_ratio

THUMBNAIL, MEAN_SIDE = 32, 64  # pixels per side
NEAR = 0.99  # correlation of grey thumbnails from which images are near duplicates
FLAT = 2.0  # standard deviation in grey levels: below it an image has no structure to compare
BLOCK = 1 << 24  # pairs compared at a time
READING = "reading images"


@dataclass(frozen=True, eq=False)
class DataCheck(Drawn):
    """The result of :func:`vitscope.check_data`.

    Attributes:
        data: the data set that was checked.
        unreadable: ("train" or "test", index, reason) of each image that cannot be read, in order.
        exact: (training index, test index) of images that are identical pixel by pixel.
        near: (training index, test index) of images whose grey thumbnails have a correlation of at least ``threshold``,
            without the exact pairs.
        repeated: number of training images that repeat an earlier training image pixel by pixel.
        contradictions: number of pairs of ``exact`` and ``near`` with different classes.
        nearest: share of test images whose most similar training thumbnail has the same class: the accuracy of a
            nearest-neighbour lookup without any model.
        nearest_without: the same share if duplicates are left out of the training images.
        means: (class, 64, 64, 3) in [0, 255], the mean training image of each class; NaN if none could be read.
        threshold: correlation from which two images are near duplicates.

    Examples:
        >>> from vitscope.tune.data import LabeledImages
        >>> images = np.zeros((4, 32, 32, 3), np.uint8)
        >>> splits = (LabeledImages(images, index, index % 2) for index in (np.arange(2), np.arange(2, 4)))
        >>> check_data(Data("blank", ("even", "odd"), *splits)).describe_leaks()
        '2 training images are also in the test set (4 exact pairs and 0 near)'
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
        return one_line(
            f"DataCheck of {self.data.name}: {counted(len(self.unreadable), 'unreadable image')}",
            self.describe_leaks(),
            counted(self.repeated, "repeated training image"),
        )

    @property
    def leaking(self) -> tuple[int, ...]:
        """Indices of the training images that are also in the test set."""
        return tuple(sorted({train for train, _ in (*self.exact, *self.near)}))

    def nearest_accuracy(self, options: DataOptions) -> float:
        """Return the accuracy of the nearest training thumbnail on the data set that these options clean."""
        return self.nearest_without if options.drop_duplicates else self.nearest

    def describe_leaks(self) -> str:
        """Return the number of leaking images as text."""
        if not self.leaking:
            return "no training image is in the test set"
        verb = "is" if len(self.leaking) == 1 else "are"
        pairs = f"{counted(len(self.exact), 'exact pair')} and {len(self.near):,} near"
        return f"{counted(len(self.leaking), 'training image')} {verb} also in the test set ({pairs})"

    def without_duplicates(self) -> Data:
        """Return the data set without the training images that are also in the test set, which does not change."""
        return without(self.data, self.leaking)

    def without_unreadable(self) -> Data:
        """Return the data set without the images that cannot be read."""
        return without(self.data, self._unreadable_in("train"), self._unreadable_in("test"))

    def clean_data(self, options: DataOptions = DEFAULT_OPTIONS) -> Data:
        """Return the data set to train on, and warn about remaining duplicates and skipped images.

        Args:
            options: only ``unreadable`` and ``drop_duplicates`` are used.

        Raises:
            WorkError: images cannot be read, and ``unreadable`` is ``"refuse"``.
        """
        if self.unreadable:
            reasons = "; ".join(reason for _, _, reason in self.unreadable[:3])
            more = f"; and {len(self.unreadable) - 3} more" if len(self.unreadable) > 3 else ""
            message = f"{counted(len(self.unreadable), 'image')} of {self.data.name} cannot be read: {reasons}{more}"
            if options.unreadable != "skip":
                raise WorkError(
                    f"{message}: repair, delete or skip them (--unreadable skip, DataOptions(unreadable='skip'))"
                )
            warn(f"{message}: skipped")
        if self.leaking and not options.drop_duplicates:
            warn(
                f"{self.data.name}: {self.describe_leaks()}: the accuracy will be too high; leave them out "
                "(--drop-duplicates, DataOptions(drop_duplicates=True))"
            )
        dropped = self.leaking if options.drop_duplicates else ()
        return without(self.data, [*self._unreadable_in("train"), *dropped], self._unreadable_in("test"))

    def as_json(self) -> dict[str, Any]:
        """Return counts, unreadable images, duplicates by name, and the accuracy of a nearest-neighbour lookup."""
        duplicates = [
            {"train": self.data.train.name(a), "test": self.data.test.name(b), "exact": (a, b) in set(self.exact)}
            for a, b in (*self.exact, *self.near)
        ]
        return {
            "name": self.data.name,
            "classes": {label: {"train": a, "test": b} for label, (a, b) in self.data.counts().items()},
            "unreadable": [reason for _, _, reason in self.unreadable],
            "duplicates": duplicates,
            "repeated_in_train": self.repeated,
            "contradictions": self.contradictions,
            "threshold": self.threshold,
            "nearest": self.nearest,
            "nearest_without_duplicates": self.nearest_without,
        }

    def _unreadable_in(self, split: str) -> list[int]:
        return [index for name, index, _ in self.unreadable if name == split]


def check_data(data: Data, *, threshold: float | int = NEAR, progress: ProgressLike = False) -> DataCheck:
    """Read every image once and report images that leak from train to test.

    Two images are near duplicates if the correlation of their grey thumbnails of 32 × 32 pixels is at least
    ``threshold``. Copies that were saved again, resized, brightened or changed in contrast are detected; mirrored ones
    are not.

    Args:
        data: a data set from :func:`vitscope.load_data`.
        threshold: correlation, from 0 to 1, from which two images are near duplicates.
        progress: True for a bar on stderr, or a function that receives a :class:`vitscope.Progress` per image.

    Returns:
        The result of the check. Its method :meth:`DataCheck.without_duplicates` returns the data set without
        the leaks.

    Raises:
        CallError: ``data`` is not a data set, or ``threshold`` is out of range.
        WorkError: no training image or no test image can be read.

    Examples:
        >>> import numpy as np
        >>> from vitscope.tune.data import LabeledImages
        >>> images = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        >>> images[5] = images[1]
        >>> splits = (LabeledImages(images, index, index % 2) for index in (np.arange(4), np.arange(4, 6)))
        >>> check_data(Data("noise", ("even", "odd"), *splits)).exact
        ((1, 1),)
    """
    if not isinstance(data, Data):
        raise CallError(f"data is {data!r}: pass what vitscope.load_data returns")
    threshold = require_ratio(threshold, "threshold")
    with progress_callback(progress) as report:
        return _check(data, threshold, report)


def checked_data(
    data: Data | DataCheck | str | Path, options: DataOptions, report: ProgressCallback
) -> tuple[Data, DataCheck | None]:
    """Return the data set to train on, and its check; a data set that was loaded before is not checked.

    Args:
        data: a data set, its check, or what :func:`vitscope.load_data` takes.
        options: how to split, limit and clean a data set that is not loaded yet, or to clean one that is checked.
        report: receives the progress of the check.
    """
    if isinstance(data, Data):
        return data, None
    check = data if isinstance(data, DataCheck) else check_data(load_data(data, options), progress=report)
    return check.clean_data(options), check


@dataclass(frozen=True, eq=False)
class _Fingerprint:
    """The compared properties of an image: a digest of its pixels, its grey thumbnail, and a small colour copy."""

    digest: bytes
    grey: Float[np.ndarray, " pixel"]
    small: Float[np.ndarray, "height width 3"]


def _check(data: Data, threshold: float, report: ProgressCallback) -> DataCheck:
    """Return the check of a data set."""
    total = len(data.train) + len(data.test)
    unreadable: list[tuple[str, int, str]] = []
    sums = np.zeros((len(data.labels), MEAN_SIDE, MEAN_SIDE, 3))
    counts = np.zeros(len(data.labels))
    fingerprints: dict[str, list[_Fingerprint | None]] = {"train": [], "test": []}
    completed = 0
    for name, split in (("train", data.train), ("test", data.test)):
        for index, result in enumerate(_fingerprints(split)):
            completed += 1
            report(Progress(READING, completed, total))
            if isinstance(result, str):
                unreadable.append((name, index, result))
                fingerprints[name].append(None)
                continue
            fingerprints[name].append(result)
            if name == "train":
                sums[split.classes[index]] += result.small
                counts[split.classes[index]] += 1
    if not all(any(entry is not None for entry in entries) for entries in fingerprints.values()):
        raise WorkError(f"{data.name} has no image that can be read: {unreadable[0][2]}")
    digests = {
        name: [None if entry is None else entry.digest for entry in entries] for name, entries in fingerprints.items()
    }
    exact = _exact_pairs(digests["train"], digests["test"])
    near, nearest = _near_pairs(_vectors(fingerprints["train"]), _vectors(fingerprints["test"]), threshold, set(exact))
    readable = np.asarray([entry is not None for entry in fingerprints["test"]])
    correct = [(data.train.classes[indices] == data.test.classes)[readable] for indices in nearest]
    train_digests = [digest for digest in digests["train"] if digest is not None]
    pairs = (*exact, *near)
    return DataCheck(
        data,
        tuple(unreadable),
        tuple(exact),
        tuple(near),
        repeated=len(train_digests) - len(set(train_digests)),
        contradictions=sum(int(data.train.classes[a] != data.test.classes[b]) for a, b in pairs),
        nearest=float(correct[0].mean()),
        nearest_without=float(correct[1].mean()),
        means=sums / np.where(counts, counts, np.nan)[:, None, None, None],
        threshold=threshold,
    )


def _fingerprints(images: LabeledImages) -> Iterator["_Fingerprint | str"]:
    """Yield the fingerprint of each image in order, or why it cannot be read; a few threads read ahead."""

    def fingerprint(index: int) -> _Fingerprint | str:
        try:
            photo = images.read(index)
        except ImageError as error:
            return str(error)
        grey = photo.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        small = photo.resize((MEAN_SIDE, MEAN_SIDE), Image.Resampling.BOX)
        size = np.asarray(photo.size, np.int64).tobytes()
        digest = hashlib.blake2b(size + photo.tobytes(), digest_size=16).digest()
        return _Fingerprint(digest, np.asarray(grey, np.float32).ravel(), np.asarray(small, np.float32))

    workers = max(os.cpu_count() or 1, 2)
    with ThreadPoolExecutor(workers) as threads:
        pending = deque(threads.submit(fingerprint, index) for index in range(min(4 * workers, len(images))))
        for index in range(4 * workers, len(images) + 4 * workers):
            if not pending:
                return
            result = pending.popleft().result()
            if index < len(images):
                pending.append(threads.submit(fingerprint, index))
            yield result


def _exact_pairs(train: list[bytes | None], test: list[bytes | None]) -> list[tuple[int, int]]:
    """Return (training index, test index) of equal digests."""
    indices: dict[bytes, list[int]] = {}
    for index, digest in enumerate(train):
        if digest is not None:
            indices.setdefault(digest, []).append(index)
    return [(a, b) for b, digest in enumerate(test) if digest is not None for a in indices.get(digest, [])]


def _vectors(fingerprints: list[_Fingerprint | None]) -> Float[np.ndarray, "image pixel"]:
    """Return grey thumbnails of mean 0 and length 1; zero for images that are flat or could not be read."""
    blank = np.zeros(THUMBNAIL**2, np.float32)
    grey = np.stack([blank if entry is None else entry.grey for entry in fingerprints])
    grey -= grey.mean(1, keepdims=True)
    length = np.linalg.norm(grey, axis=1, keepdims=True)
    return np.where(length > FLAT * THUMBNAIL, grey / np.maximum(length, 1e-6), 0)


def _near_pairs(
    train: Float[np.ndarray, "train pixel"],
    test: Float[np.ndarray, "test pixel"],
    threshold: float,
    exact: set[tuple[int, int]],
) -> tuple[list[tuple[int, int]], Int[np.ndarray, "2 test"]]:
    """Return the near pairs, and for each test image the nearest training image: of all, and of the non-duplicates."""
    pairs: list[tuple[int, int]] = []
    exact_indices = [train_index for train_index, _ in exact]
    best, nearest = np.full((2, len(test)), -np.inf), np.zeros((2, len(test)), dtype=np.int64)
    size = max(BLOCK // len(test), 1)
    for start in range(0, len(train), size):
        similarity = test @ train[start : start + size].T
        rows, columns = np.nonzero(similarity >= threshold)
        pairs += zip((columns + start).tolist(), rows.tolist(), strict=True)
        is_duplicate = np.isin(np.arange(start, start + similarity.shape[1]), exact_indices)
        is_duplicate[columns] = True
        for i, candidates in enumerate((similarity, np.where(is_duplicate, -np.inf, similarity))):
            columns_of_best = candidates.argmax(1)
            values = candidates[np.arange(len(test)), columns_of_best]
            better = values > best[i]
            best[i, better], nearest[i, better] = values[better], columns_of_best[better] + start
    return sorted(pair for pair in pairs if pair not in exact), nearest
