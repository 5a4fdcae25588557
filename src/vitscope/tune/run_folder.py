"""The folder of a training run: what the run was, whether it is finished, and what it left."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.errors import CallError, OutputExistsError
from vitscope.files import (
    atomic_write,
    discard,
    hidden_name,
    is_temporary,
    old_name,
    recover,
    require_path,
    sweep_temporary,
    take_place,
)
from vitscope.models.checkpoints.serialization import WITHIN, load_folder
from vitscope.models.vision_model import VisionModel
from vitscope.tune.data import Data, LabeledImages
from vitscope.tune.json_files import DamagedError, matches, read_object
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
    "trained": int,
    "head": int,
    "seconds": int | float,
    "peak_mib": int | float,
    "history": list,
    "said": list,
    "truth": list,
}
DIGESTS = {"weights": "set of weights", "order": "split of the images", "images_seen": "set of images"}


@dataclass(frozen=True, eq=False)
class Tuned:
    """What fine-tuning left.

    Attributes:
        model: the tuned model, to explain and to predict with.
        folder: the run's folder; ``vitscope.load(folder)`` gives the model again.
        about: accuracy and its 95 % interval, macro F1, confusion matrix (row: true class), weights that learned,
            seconds, peak memory, the history of the run, and every setting.
        said: (image,) the class that the tuned model names for each test image.
    """

    model: VisionModel
    folder: Path
    about: Mapping[str, Any]
    said: np.ndarray

    def __repr__(self) -> str:
        about = self.about
        low, high = about["interval"]
        return (
            f"<Tuned {about['model']} ({about['tuning']}) on {about['data']}: accuracy {about['accuracy']:.1%} of "
            f"{len(self.said):,} test images, 95 % interval {low:.1%} to {high:.1%}; in {self.folder}>"
        )

    @property
    def accuracy(self) -> float:
        return self.about["accuracy"]

    @property
    def confusion(self) -> np.ndarray:
        return np.asarray(self.about["confusion"])


def read_run(folder: str | Path) -> Tuned:
    """A finished run again.

    Raises:
        CallError: the folder holds no finished run.
    """
    folder = require_path(folder, "folder")
    try:
        about = read_result(folder / RESULT)
    except FileNotFoundError:
        raise CallError(f"{folder} holds no finished run") from None
    model = load_folder(folder / WITHIN, image_size=None, dtype=None)
    return Tuned(model, folder, about, np.asarray(about["said"]))


def read_result(path: Path) -> dict[str, Any]:
    """What a finished run wrote about itself.

    Raises:
        FileNotFoundError: it is missing.
        CallError: it is damaged.
    """
    try:
        about = read_object(path, tuple(RESULT_TYPES))
        odd = matches(about, RESULT_TYPES)
        if odd is None and not _consistent(about):
            odd = "said"
        if odd is not None:
            raise DamagedError(f"its {odd!r} is damaged")
    except DamagedError as error:
        raise CallError(
            f"{path.parent} holds no finished run: {path} is damaged ({error}); delete {path.parent} and run the same "
            "call again"
        ) from None
    return about


def _consistent(about: Mapping[str, Any]) -> bool:
    said, truth, classes = about["said"], about["truth"], len(about["labels"])
    numbers = all(type(one) is int and 0 <= one < classes for one in (*said, *truth))
    rows = all(isinstance(row, list) and len(row) == classes for row in about["confusion"])
    interval = len(about["interval"]) == 2 and all(isinstance(one, int | float) for one in about["interval"])
    return numbers and rows and interval and len(said) == len(truth) > 0 and len(about["confusion"]) == classes


def settings_of(base: VisionModel, data: Data, tuning: str, rank: int | None, recipe: Recipe) -> dict[str, Any]:
    """Everything that the weights of a run follow from."""
    size = None if base.preprocessing is None else list(base.preprocessing.size)
    return {
        "model": base.name,
        "library": base.library,
        "weights": _digest(base.module.state_dict().values()),
        "image_size": size,
        "data": data.name,
        "images": {"train": len(data.train), "test": len(data.test)},
        "labels": list(data.labels),
        "order": _digest([part for split in (data.train, data.test) for part in (split.index, split.classes)]),
        "images_seen": _digest([_identity(split) for split in (data.train, data.test)]),
        "tuning": tuning,
        "rank": rank,
        "recipe": json.loads(json.dumps(recipe.as_json())),
    }


def _digest(parts: Any) -> str:
    """Of tensors and arrays, one after another."""
    found = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def _identity(images: LabeledImages) -> np.ndarray:
    """What tells these images from others: pixels in memory; of files the names and sizes, wherever they lie."""
    if isinstance(images.source, np.ndarray):
        return images.source[images.index]
    if not isinstance(images.source, list):
        return np.frombuffer(str(getattr(images.source, "identity", "")).encode(), dtype=np.uint8)
    places = [images.source[int(at)] for at in images.index]
    told = [f"{'/'.join(one.parts[-2:])} {_size(one)}" for one in places if isinstance(one, Path)]
    return np.frombuffer("\n".join(told).encode(errors="surrogateescape"), dtype=np.uint8)


def _size(file: Path) -> int:
    """In bytes; −1 of what is no file, which fails when it is read as an image."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def working_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path | None:
    """Where this run is worked on; None when it is finished already.

    That is ``out``, or a folder beside it while ``out`` holds another finished run that shall be replaced. What a
    killed process left half done is finished or swept.

    Raises:
        OutputExistsError: ``out`` holds another run and shall not be replaced, or something else.
        CallError: ``out`` cannot be read.
    """
    recover(out)
    before = settings_in(out)
    if before is None and out.exists() and (not out.is_dir() or holds_something(out)):
        raise OutputExistsError(f"{out} holds something else than a run: choose another --out")
    finished = (out / RESULT).is_file()
    if before == settings and finished:
        _sweep(out, overwrite)
        return None
    if before is not None and before != settings:
        if not overwrite:
            raise OutputExistsError(
                f"{out} holds a run with another {difference(before, settings)}: choose another --out, or replace it "
                "(--overwrite)"
            )
        if finished:
            place = _beside(out, settings)
            if place is None:
                _sweep(out, overwrite)
            return place
        discard(out / CHECKPOINTS)
        discard(out / WITHIN)
    _write_settings(out, settings, before)
    return out


def working_folder_of_others(out: Path, settings: Mapping[str, Any]) -> Path | None:
    """What :func:`working_folder` told the main process, read by another process of the same training."""
    for folder in (out, hidden_name(out, "new")):
        if settings_in(folder) == settings:
            return None if (folder / RESULT).is_file() else folder
    raise CallError(f"{out} cannot be read as the run that the main process began: use one folder for all processes")


def holds_something(folder: Path) -> bool:
    """Whether a folder holds more than files that a killed process was writing."""
    return any(not is_temporary(entry.name) for entry in folder.iterdir())


def _write_settings(out: Path, settings: Mapping[str, Any], before: Any) -> None:
    if before != settings:
        with atomic_write(out / RUN) as beside:
            beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    for folder in (out, out / CHECKPOINTS):
        sweep_temporary(folder)


def _sweep(out: Path, overwrite: bool) -> None:
    """Delete what a run leaves that was killed after its result was written."""
    for folder in (out.parent, out):
        sweep_temporary(folder)
    for folder in (out / CHECKPOINTS, old_name(out / WITHIN)):
        discard(folder)
    beside = hidden_name(out, "new")
    if overwrite and (beside / RESULT).is_file():  # the run that was replaced, or one that was never put in its place
        discard(beside)


def difference(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The first setting that is not the same, and what it was and is."""
    odd = next((name for name in settings if before.get(name) != settings[name]), "list of settings")
    if odd not in settings:
        return odd
    old, new = before.get(odd), settings[odd]
    if odd in DIGESTS:
        return f"{DIGESTS[odd]}"
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [f"{name} {old.get(name)}, not {new[name]}" for name in new if old.get(name) != new[name]]
        return f"{odd} ({'; '.join(changed[:3])})"
    return f"{odd} ({_short(old)}, not {_short(new)})"


def _beside(out: Path, settings: Mapping[str, Any]) -> Path | None:
    """A hidden folder for the run that shall replace the one in ``out``; None when it was finished there."""
    beside = hidden_name(out, "new")
    before = settings_in(beside)
    if before != settings:
        discard(beside)
        before = None
    if before is not None and (beside / RESULT).is_file():
        discard(beside / CHECKPOINTS)
        take_place(beside, out)
        return None
    _write_settings(beside, settings, before)
    return beside


def settings_in(folder: Path) -> Any:
    """The settings of the run in a folder; None where it holds none.

    Raises:
        CallError: they cannot be read.
    """
    try:
        return read_object(folder / RUN)
    except FileNotFoundError:
        return None
    except DamagedError as error:
        if not folder.is_dir():
            raise CallError(f"{folder} is a file, or lies under one: choose another --out") from None
        raise CallError(
            f"{folder} cannot be read as a run: {folder / RUN} is damaged ({error}); choose another --out, or delete "
            f"{folder}"
        ) from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
