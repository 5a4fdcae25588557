"""finetune(): a model of any library learns the classes of a data set."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import TrainerState
from transformers.utils import logging as transformers_logging

from vitscope.arguments import at_least
from vitscope.errors import CallError, OutputExistsError
from vitscope.models.classes import heads, with_classes
from vitscope.models.folder import WITHIN, check_folder, load_folder, save_folder
from vitscope.models.loading import load
from vitscope.models.vision_model import VisionModel
from vitscope.saving import replacing
from vitscope.tune import checkpoints, measures
from vitscope.tune.classifier import Classifier, features_of
from vitscope.tune.data import Data, Pictures, load_data, stratified
from vitscope.tune.feeding import FeatureFeed, Feed, as_they_come
from vitscope.tune.inspecting import inspect, usable
from vitscope.tune.memory import peak_memory
from vitscope.tune.recipe import Recipe, read_recipe
from vitscope.tune.trainer import STATE, Progress, Reporting, Trainer, arguments, stopped, tensorboard_logs
from vitscope.tune.tunings import READS_WINDOWS, Prepared, known_tuning, prepare

RUN, RESULT, LOG, CHECKPOINTS = "run.json", "result.json", "log.jsonl", "checkpoints"


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


def finetune(
    model: VisionModel | nn.Module | str | Path,
    data: Data | str | Path,
    *,
    out: str | Path,
    tuning: str = "head",
    recipe: Recipe | str | Path = "modern",
    rank: int | None = None,
    unreadable: str = "refuse",
    drop_duplicates: bool = False,
    save_steps: int | None = None,
    tensorboard: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> Tuned:
    """Train a model on a data set, test it, and leave a folder that :func:`vitscope.load` takes.

    The engine is transformers' ``Trainer``. A run that was broken off, at any moment, goes on from its last checkpoint
    when it is called again in the same way, and ends with the same weights. ``model`` itself is not changed, and
    neither are torch's, numpy's and Python's random numbers.

    Args:
        model: of transformers, timm or torchvision; a name, or what :func:`vitscope.load` takes or gives.
        data: as for :func:`~vitscope.tune.data.load_data`; its pictures are checked first, unless it is a
            :class:`~vitscope.tune.data.Data`.
        out: the run's folder.
        tuning: what learns: one of :data:`~vitscope.tune.tunings.TUNINGS`.
        recipe: ``"report"``, ``"modern"``, a TOML file or a :class:`~vitscope.tune.recipe.Recipe`; ``changes`` are
            settings of it to change, such as ``epochs=3``.
        rank: of adapters (64) and of LoRA (8).
        unreadable: ``"refuse"`` or ``"skip"`` pictures that cannot be read.
        drop_duplicates: leave out training pictures that are in the test set too.
        save_steps: a checkpoint after so many steps too, not after every epoch alone.
        tensorboard: write logs for TensorBoard into ``out``.
        overwrite: replace another run in ``out``.
        device: where to train; by default on the GPU if there is one.
        progress: told of every step: step, steps, accuracy.

    Raises:
        CallError: an argument is wrong, the data set cannot be learned from, or ``out`` holds another run.
        WorkError: pictures cannot be read, the loss is not finite, or a result cannot be written.
    """
    chosen = read_recipe(recipe, **changes)
    known_tuning(tuning)
    if unreadable not in ("refuse", "skip"):
        raise CallError(f"unreadable is {unreadable!r}: refuse or skip")
    if save_steps is not None:
        at_least(1, save_steps, "save_steps")
    base = model if isinstance(model, VisionModel) else load(model)
    if not isinstance(data, Data):
        data = usable(inspect(load_data(data)), unreadable=unreadable, drop_duplicates=drop_duplicates)
    out = Path(out)
    with _kept_random(chosen.seed), _quiet():
        made = with_classes(base, data.labels, by_windows=tuning == READS_WINDOWS)
        check_folder(made)
        prepared = prepare(made, tuning, rank=rank)
        settings = settings_of(base, data, tuning, rank, chosen)
        if _finished(out, settings, overwrite):
            return read_run(out)
        run = _Run(made, prepared, data, tuning, chosen, out, settings, _device(device))
        return run.trained(save_steps, tensorboard, progress)


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


class _Run:
    """One training run and its folder."""

    def __init__(
        self,
        model: VisionModel,
        prepared: Prepared,
        data: Data,
        tuning: str,
        recipe: Recipe,
        out: Path,
        settings: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        self.model, self.prepared, self.data, self.tuning = model, prepared, data, tuning
        self.recipe, self.out, self.settings = recipe, out, settings
        assert model.preprocessing is not None
        self.preprocessing = model.preprocessing
        self.device = device

    def trained(self, save_steps: int | None, tensorboard: bool, progress: Progress | None) -> Tuned:
        self.model.module.to(self.device)
        with peak_memory(self.device) as peak:
            train, watched = self._feeds()
            frozen = self.tuning in ("head", READS_WINDOWS)
            classifier = Classifier(self.model, float(self.recipe.label_smoothing), frozen=frozen)
            per_step = self.recipe.batch_size * self.recipe.accumulate * PartialState().num_processes
            steps = self.recipe.epochs * math.ceil(len(train) / per_step)
            folder = self.out / CHECKPOINTS
            on_cpu = self.device.type == "cpu"
            args = arguments(self.recipe, self.tuning, folder, steps, on_cpu=on_cpu)
            callbacks = [Reporting(progress, self.out / LOG, self.recipe.early_stop, train, save_steps)]
            if tensorboard:
                callbacks.append(tensorboard_logs(self.out / "tensorboard"))
            trainer = Trainer(
                recipe=self.recipe,
                classifier=classifier,
                module=self.model.module,
                args=args,
                train_dataset=train,
                eval_dataset=watched,
                data_collator=as_they_come,
                callbacks=callbacks,
            )
            there = checkpoints.checkpoints(folder)
            if there and self._had_stopped(there[-1]):
                trainer.state = TrainerState.load_from_json(str(there[-1] / STATE))
            else:
                trainer.train(resume_from_checkpoint=str(there[-1]) if there else None)
            if self.recipe.early_stop is not None:
                checkpoints.load_trained(self.model.module, trainer.best)
        self.prepared.finish()
        for parameter in self.model.module.parameters():
            parameter.requires_grad_(True).grad = None
        self.model.module.eval()
        self._test(trainer, peak.mib)
        return read_run(self.out)

    def _had_stopped(self, last: Path) -> bool:
        """Whether the run was broken off after it had stopped early, before it was tested."""
        if self.recipe.early_stop is None:
            return False
        return stopped(TrainerState.load_from_json(str(last / STATE)).log_history, self.recipe.early_stop)

    def _feeds(self) -> tuple[Any, Any]:
        """What is trained on and what is watched: pictures, or features where the backbone has nothing to learn."""
        train, watched = self.data.train, self.data.test
        if self.recipe.validation:
            parts = stratified(train.classes, float(self.recipe.validation), self.recipe.seed)
            train, watched = train.subset(parts[0]), train.subset(parts[1])
        if self.tuning == "head" and not self.recipe.augment and len(heads(self.model)) == 1:
            return self._features(train), self._features(watched)
        changed = Feed(train, self.preprocessing, changes=self.recipe.augment, seed=self.recipe.seed)
        return changed, Feed(watched, self.preprocessing)

    def _features(self, pictures: Pictures) -> FeatureFeed:
        return FeatureFeed(features_of(self.model, self._batches(pictures)), pictures.classes)

    def _batches(self, pictures: Pictures) -> Iterator[Tensor]:
        feed, size = Feed(pictures, self.preprocessing), self.recipe.batch_size
        for start in range(0, len(pictures), size):
            yield feed.__getitems__(list(range(start, min(start + size, len(pictures)))))["pixel_values"]

    def _test(self, trainer: Trainer, mib: float) -> None:
        """The test set through the finished model; the main process writes."""
        if trainer.is_world_process_zero():
            logits = []
            with torch.no_grad(), self.model.running():
                for pixels in self._batches(self.data.test):
                    answer = self.model.answer(pixels.to(self.device, self.model.dtype))
                    assert answer is not None
                    logits.append(answer.float().cpu())
            said, truth = torch.cat(logits).argmax(-1).numpy(), self.data.test.classes
            table = measures.confusion(truth, said, len(self.data.labels))
            right = int((said == truth).sum())
            about = {
                **self.settings,
                "accuracy": right / len(truth),
                "interval": measures.wilson(right, len(truth)),
                "macro_f1": measures.macro_f1(table),
                "confusion": table.tolist(),
                "trained": self.prepared.num_trained,
                "head": self.prepared.num_head,
                "seconds": round(trainer.seconds, 3),
                "peak_mib": round(mib, 1),
                "epochs": trainer.state.epoch,
                "history": trainer.state.log_history,
                "said": said.tolist(),
                "truth": truth.tolist(),
            }
            base = self.model.name
            name = f"{Path(base).name if Path(base).is_dir() else base} ({self.tuning})"
            save_folder(
                replace(self.model, name=name),
                self.out / WITHIN,
                adapters=self.prepared.adapters,
                about={**self.settings, "said": None},
            )
            with replacing(self.out / RESULT) as beside:
                beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            checkpoints.sweep(self.out / CHECKPOINTS, set())
        trainer.accelerator.wait_for_everyone()


def _device(device: str | torch.device | None) -> torch.device:
    there = torch.cuda.is_available()
    chosen = torch.device(device if device is not None else "cuda" if there else "cpu")
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not there):
        raise CallError(f"device {str(device)!r} cannot be trained on here: cpu{' and cuda' if there else ''} can")
    return chosen


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


def _finished(out: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether this very run is finished; a folder with another run is refused, a new one is begun."""
    try:
        before = json.loads((out / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        before = None
    except (OSError, ValueError) as error:
        raise CallError(f"{out} cannot be read as a run: {error}") from None
    if before is None and out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise OutputExistsError(f"{out} holds something else than a run: choose another --out")
    if before is not None and before != settings:
        if not overwrite:
            odd = next(name for name in settings if before.get(name) != settings[name])
            raise OutputExistsError(
                f"{out} holds a run with another {odd} ({_short(before.get(odd))}, not {_short(settings[odd])}): "
                "choose another folder or allow overwriting"
            )
        checkpoints.sweep(out / CHECKPOINTS, set())
        (out / RESULT).unlink(missing_ok=True)
    if before == settings and (out / RESULT).is_file():
        return True
    with replacing(out / RUN) as beside:
        beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return False


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


@contextmanager
def _quiet() -> Iterator[None]:
    """The engine sets how much transformers tells; afterwards it tells as much as before."""
    before = transformers_logging.get_verbosity()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def _kept_random(seed: int) -> Iterator[None]:
    """Seeded inside; afterwards every random number comes as if nothing had been."""
    states = random.getstate(), np.random.get_state(), checkpoints.random_state()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2]["cpu"])
        if "cuda" in states[2]:
            torch.cuda.set_rng_state(states[2]["cuda"])
