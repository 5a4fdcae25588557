"""The folder of a training run: what the run was, whether it is finished, and what it left."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitscope.errors import CallError, OutputExistsError
from vitscope.models.folder import WITHIN, load_folder
from vitscope.models.vision_model import VisionModel
from vitscope.saving import replacing, take_place
from vitscope.tune.data import Data, Pictures
from vitscope.tune.recipe import Recipe

RUN, RESULT, CHECKPOINTS = "run.json", "result.json", "checkpoints"
DIGESTS = {"weights": "set of weights", "order": "split of the pictures", "pictures_seen": "set of pictures"}


@dataclass(frozen=True, eq=False)
class Tuned:
    """What fine-tuning left.

    Attributes:
        model: the tuned model, to explain and to predict with.
        folder: the run's folder; ``vitscope.load(folder)`` gives the model again.
        about: accuracy and its 95 % interval, macro F1, confusion matrix (row: true class), weights that learned,
            seconds, peak memory, the history of the run, and every setting.
        said: (picture,) the class that the tuned model names for each test picture.
    """

    model: VisionModel
    folder: Path
    about: Mapping[str, Any]
    said: np.ndarray

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
    folder = Path(folder)
    try:
        about = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CallError(f"{folder} holds no finished run") from None
    model = load_folder(folder / WITHIN, image_size=None, dtype=None)
    return Tuned(model, folder, about, np.asarray(about["said"]))


def settings_of(base: VisionModel, data: Data, tuning: str, rank: int | None, recipe: Recipe) -> dict[str, Any]:
    """Everything that the weights of a run follow from."""
    size = None if base.preprocessing is None else list(base.preprocessing.size)
    return {
        "model": base.name,
        "library": base.library,
        "weights": _digest(base.module.state_dict().values()),
        "image_size": size,
        "data": data.name,
        "pictures": {"train": len(data.train), "test": len(data.test)},
        "labels": list(data.labels),
        "order": _digest([part for split in (data.train, data.test) for part in (split.index, split.classes)]),
        "pictures_seen": _digest([_identity(split) for split in (data.train, data.test)]),
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


def _identity(pictures: Pictures) -> np.ndarray:
    """What tells these pictures from others: pixels in memory; of files the names and sizes, wherever they lie."""
    if isinstance(pictures.source, np.ndarray):
        return pictures.source[pictures.index]
    if not isinstance(pictures.source, list):
        return np.frombuffer(str(getattr(pictures.source, "identity", "")).encode(), dtype=np.uint8)
    places = [pictures.source[int(at)] for at in pictures.index]
    told = [f"{'/'.join(one.parts[-2:])} {one.stat().st_size}" for one in places if isinstance(one, Path)]
    return np.frombuffer("\n".join(told).encode(), dtype=np.uint8)


def working_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path | None:
    """Where this run is worked on; None when it is finished already.

    That is ``out``, or a folder beside it while ``out`` holds another finished run that shall be replaced.

    Raises:
        OutputExistsError: ``out`` holds another run and shall not be replaced, or something else.
        CallError: ``out`` cannot be read.
    """
    before = _settings_in(out)
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} holds something else than a run: choose another --out")
    finished = (out / RESULT).is_file()
    if before == settings and finished:
        return None
    if before is not None and before != settings:
        if not overwrite:
            raise OutputExistsError(
                f"{out} holds a run with another {difference(before, settings)}: choose another --out, or replace it "
                "(--overwrite)"
            )
        if finished:
            return _beside(out, settings)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    with replacing(out / RUN) as beside:
        beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return out


def difference(before: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The first setting that is not the same, and what it was and is."""
    odd = next(name for name in settings if before.get(name) != settings[name])
    old, new = before.get(odd), settings[odd]
    if odd in DIGESTS:
        return f"{DIGESTS[odd]}"
    if isinstance(old, dict) and isinstance(new, dict):
        changed = [f"{name} {old.get(name)}, not {new[name]}" for name in new if old.get(name) != new[name]]
        return f"{odd} ({'; '.join(changed[:3])})"
    return f"{odd} ({_short(old)}, not {_short(new)})"


def _beside(out: Path, settings: Mapping[str, Any]) -> Path | None:
    """A hidden folder for the run that shall replace the one in ``out``; None when it was finished there."""
    beside = out.with_name(f".{out.name}.new")
    if _settings_in(beside) != settings:
        shutil.rmtree(beside, ignore_errors=True)
    found = working_folder(beside, settings, overwrite=False)
    if found is None:
        take_place(beside, out)
    return found


def _settings_in(folder: Path) -> Any:
    try:
        return json.loads((folder / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise CallError(f"{folder} is a file, or lies under one: choose another --out") from None
    except (OSError, ValueError) as error:
        raise CallError(f"{folder} cannot be read as a run: {error}") from None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
