"""The folder of a training run: its settings, its state, and its result."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.display import Drawn, one_line
from vitscope.errors import CallError, OutputExistsError
from vitscope.files import (
    atomic_write,
    delete_abandoned,
    delete_folder,
    hidden_name,
    is_temporary,
    old_name,
    recover,
    replace_folder,
    require_path,
)
from vitscope.models.checkpoints.serialization import MODEL_FOLDER, load_folder
from vitscope.models.vision_model import VisionModel
from vitscope.tune.baselines import baseline_warning, describe_baselines
from vitscope.tune.data import Data, LabeledImages
from vitscope.tune.json_files import DamagedError, mistyped_key, read_object
from vitscope.tune.recipe import Recipe

RUN, RESULT, CHECKPOINTS = "run.json", "result.json", "checkpoints"
RESULT_TYPES = {
    "model": str,
    "tuning": str,
    "data": str,
    "labels": list,
    "accuracy": int | float,
    "interval": list,
    "macro_f1": int | float,
    "confusion": list,
    "num_trained": int,
    "num_head": int,
    "seconds": int | float,
    "peak_mib": int | float,
    "history": list,
    "predictions": list,
    "true_labels": list,
}
OLD_KEYS = ("said", "truth")  # keys of results from before version 0.1
DIGESTS = {
    "weights_digest": "set of weights",
    "split_digest": "split of the images",
    "images_digest": "set of images",
}


@dataclass(frozen=True, eq=False)
class Tuned(Drawn):
    """The result of :func:`vitscope.finetune`.

    Attributes:
        model: the tuned model.
        folder: the folder of the run; ``vitscope.load(folder)`` returns the model again.
        record: every setting and result of the run: ``accuracy`` and its 95 % ``interval``, ``macro_f1``,
            ``confusion`` (rows: true classes), ``num_trained`` and ``num_head`` (weights that learned, without and of
            the classifier), ``baselines`` (accuracies of chance, of the most frequent class and of the nearest training
            thumbnail, None if the data set was loaded before), ``seconds``, ``peak_mib``, ``history``, ``predictions``
            and ``true_labels``.
        predictions: (image,) the predicted class index of each test image.

    Examples:
        >>> import vitscope as vs
        >>> record = {"accuracy": 0.75, "confusion": [[1, 1], [0, 2]]}
        >>> tuned = Tuned(vs.load("vit-nano"), Path("run"), record, np.array([0, 1, 1, 1]))
        >>> tuned.accuracy, int(tuned.confusion[1, 1])
        (0.75, 2)
    """

    model: VisionModel
    folder: Path
    record: Mapping[str, Any]
    predictions: np.ndarray

    def __repr__(self) -> str:
        record = self.record
        low, high = record["interval"]
        return one_line(
            f"Tuned {record['model']} ({record['tuning']}) on {record['data']}: accuracy {record['accuracy']:.1%} of "
            f"{len(self.predictions):,} test images",
            f"95 % interval {low:.1%} to {high:.1%} ({describe_baselines(record)}); in {self.folder}",
        )

    @property
    def accuracy(self) -> float:
        """The share of test images whose class is predicted correctly."""
        return self.record["accuracy"]

    @property
    def baselines(self) -> Mapping[str, float | None]:
        """Accuracies without tuning: ``"chance"``, ``"majority"`` (most frequent class) and ``"nearest"`` thumbnail."""
        return self.record["baselines"]

    @property
    def warning(self) -> str | None:
        """A warning if the accuracy is not clearly above every baseline: its interval has to lie above all of them."""
        return baseline_warning(self.record)

    @property
    def confusion(self) -> np.ndarray:
        """(class, class) counts of test images; rows are true classes, columns predicted ones."""
        return np.asarray(self.record["confusion"])


def read_run(folder: str | Path) -> Tuned:
    """Return the finished run in a folder.

    Raises:
        CallError: the folder holds no finished run.
    """
    folder = require_path(folder, "folder")
    try:
        record = read_result(folder / RESULT)
    except FileNotFoundError:
        raise CallError(f"{folder} holds no finished run: run the training, or pass another folder") from None
    model = load_folder(folder / MODEL_FOLDER, image_size=None, dtype=None)
    return Tuned(model, folder, record, np.asarray(record["predictions"]))


def read_result(path: Path) -> dict[str, Any]:
    """Return the settings and results that a finished run wrote.

    Raises:
        FileNotFoundError: the file is missing.
        CallError: the file is damaged, or was written by an older version.
    """
    again = f"delete {path.parent} and run the same call again"
    try:
        record = read_object(path)
        if all(key in record for key in OLD_KEYS):
            raise CallError(f"{path.parent} holds the run of an older version of vitscope: {again}")
        missing = [key for key in RESULT_TYPES if key not in record]
        if missing:
            raise DamagedError(f"it has no {missing[0]!r}")
        damaged_key = mistyped_key(record, RESULT_TYPES)
        if damaged_key is None and not _is_consistent(record):
            damaged_key = "predictions"
        if damaged_key is not None:
            raise DamagedError(f"its {damaged_key!r} is damaged")
    except DamagedError as error:
        raise CallError(f"{path.parent} holds no finished run: {path} is damaged ({error}); {again}") from None
    return record


def _is_consistent(record: Mapping[str, Any]) -> bool:
    """Return whether the sizes of predictions, true labels, confusion matrix and interval fit together."""
    predictions, labels, num_classes = record["predictions"], record["true_labels"], len(record["labels"])
    indices = all(type(index) is int and 0 <= index < num_classes for index in (*predictions, *labels))
    rows = all(isinstance(row, list) and len(row) == num_classes for row in record["confusion"])
    interval = len(record["interval"]) == 2 and all(isinstance(bound, int | float) for bound in record["interval"])
    sizes = len(predictions) == len(labels) > 0 and len(record["confusion"]) == num_classes
    return indices and rows and interval and sizes


def settings_of(base: VisionModel, data: Data, tuning: str, rank: int | None, recipe: Recipe) -> dict[str, Any]:
    """Return all settings that determine the weights of a run."""
    size = None if base.preprocessing is None else list(base.preprocessing.size)
    return {
        "model": base.name,
        "library": base.library,
        "weights_digest": _digest(base.module.state_dict().values()),
        "image_size": size,
        "data": data.name,
        "images": {"train": len(data.train), "test": len(data.test)},
        "labels": list(data.labels),
        "split_digest": _digest([array for split in (data.train, data.test) for array in (split.index, split.classes)]),
        "images_digest": _digest([_image_identity(split) for split in (data.train, data.test)]),
        "tuning": tuning,
        "rank": rank,
        "recipe": json.loads(json.dumps(recipe.as_json())),
    }


def describe_recipe(record: Mapping[str, Any]) -> str:
    """Return how long a run trained, with which augmentations, and from which classifier."""
    recipe = record["recipe"]
    if record.get("penalty") is not None:
        return f"classifier fitted until it converged, penalty {record['penalty']:.2g} by cross-validation"
    augment = ", ".join(recipe["augment"]) or "none"
    initial = recipe.get("initial_classifier", "random")
    return f"{record['epochs']:g} epochs, augmentation: {augment}, initial classifier: {initial}"


def _digest(values: Any) -> str:
    """Return the digest of tensors and arrays, one after another."""
    digest = hashlib.blake2b(digest_size=12)
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _image_identity(images: LabeledImages) -> np.ndarray:
    """Return bytes that identify these images: pixels in memory; names and sizes of files, in any folder."""
    if isinstance(images.source, np.ndarray):
        return images.source[images.index]
    if not isinstance(images.source, list):
        return np.frombuffer(str(getattr(images.source, "identity", "")).encode(), dtype=np.uint8)
    items = [images.source[int(index)] for index in images.index]
    lines = [f"{'/'.join(item.parts[-2:])} {_size(item)}" for item in items if isinstance(item, Path)]
    return np.frombuffer("\n".join(lines).encode(errors="surrogateescape"), dtype=np.uint8)


def _size(file: Path) -> int:
    """Return the size in bytes; −1 if there is no such file: the error comes when it is read as an image."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def working_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path | None:
    """Return the folder to train in; None if the run is finished already.

    The folder is ``out``. If ``out`` holds another finished run that is to be replaced, it is a hidden folder next to
    ``out``. Incomplete work of a killed process is completed or deleted.

    Raises:
        OutputExistsError: ``out`` holds another run and ``overwrite`` is False, or holds something else.
        CallError: ``out`` cannot be read.
    """
    recover(out)
    before = read_settings(out)
    if before is None and out.exists() and (not out.is_dir() or has_content(out)):
        raise OutputExistsError(f"{out} holds something other than a run: choose another --out")
    finished = (out / RESULT).is_file()
    if before == settings and finished:
        _sweep(out, overwrite)
        return None
    if before is not None and before != settings:
        if not overwrite:
            raise OutputExistsError(
                f"{out} holds a run with another {describe_difference(before, settings)}: choose another --out, or "
                "replace it (--overwrite)"
            )
        if finished:
            folder = _replacement_folder(out, settings)
            if folder is None:
                _sweep(out, overwrite)
            return folder
        delete_folder(out / CHECKPOINTS)
        delete_folder(out / MODEL_FOLDER)
    _write_settings(out, settings, before)
    return out


def joined_working_folder(out: Path, settings: Mapping[str, Any]) -> Path | None:
    """Return, in another training process, the folder that :func:`working_folder` chose in the main process."""
    for folder in (out, hidden_name(out, "new")):
        if read_settings(folder) == settings:
            return None if (folder / RESULT).is_file() else folder
    raise CallError(f"{out} does not hold the run that the main process started: use one folder for all processes")


def has_content(folder: Path) -> bool:
    """Return whether a folder holds more than temporary files of a killed process."""
    return any(not is_temporary(entry.name) for entry in folder.iterdir())


def describe_difference(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Return the first setting that differs, with its old and its new value."""
    name = next((name for name in settings if before.get(name) != settings[name]), "list of settings")
    if name not in settings:
        return name
    old, new = before.get(name), settings[name]
    if name in DIGESTS:
        return DIGESTS[name]
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [f"{key} {old.get(key)}, not {new[key]}" for key in new if old.get(key) != new[key]]
        return f"{name} ({'; '.join(changed[:3])})"
    return f"{name} ({_shortened(old)}, not {_shortened(new)})"


def read_settings(folder: Path) -> Any:
    """Return the settings of the run in a folder; None if there is none.

    Raises:
        CallError: the settings cannot be read.
    """
    try:
        return read_object(folder / RUN)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        if not folder.is_dir():
            raise CallError(f"{folder} is a file or lies inside one: choose another --out") from None
        raise CallError(
            f"{folder} cannot be read as a run: {folder / RUN} is damaged ({error}); choose another --out, or delete "
            f"{folder}"
        ) from None


def _write_settings(out: Path, settings: Mapping[str, Any], before: Any) -> None:
    """Write the settings unless they exist already, and delete temporary files of killed processes."""
    if before != settings:
        with atomic_write(out / RUN) as temporary:
            temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for folder in (out, out / CHECKPOINTS):
        delete_abandoned(folder)


def _sweep(out: Path, overwrite: bool) -> None:
    """Delete the remains of a run that was killed after it had written its result."""
    for folder in (out.parent, out):
        delete_abandoned(folder)
    for folder in (out / CHECKPOINTS, old_name(out / MODEL_FOLDER)):
        delete_folder(folder)
    replacement = hidden_name(out, "new")
    if (
        overwrite and (replacement / RESULT).is_file()
    ):  # the replaced run, or a replacement that was never moved into place
        delete_folder(replacement)


def _replacement_folder(out: Path, settings: Mapping[str, Any]) -> Path | None:
    """Return a hidden folder for the run that replaces the one in ``out``; None if it is already finished there."""
    folder = hidden_name(out, "new")
    before = read_settings(folder)
    if before != settings:
        delete_folder(folder)
        before = None
    if before is not None and (folder / RESULT).is_file():
        delete_folder(folder / CHECKPOINTS)
        replace_folder(folder, out)
        return None
    _write_settings(folder, settings, before)
    return folder


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
