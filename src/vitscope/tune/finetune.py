"""finetune(): a model of any library learns the classes of a data set."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerState

from vitscope.errors import CallError, VitscopeError, first_line
from vitscope.files import atomic_write, discard, require_path, take_place
from vitscope.models.backends.transformers.heads import quiet
from vitscope.models.checkpoints.serialization import WITHIN, check_folder, save_folder
from vitscope.models.heads import get_classifiers, reset_classifier
from vitscope.models.loader import load
from vitscope.models.vision_model import VisionModel
from vitscope.tune import checkpoints
from vitscope.tune import metrics as measures
from vitscope.tune.classifier import Classifier, features_of
from vitscope.tune.data import Data, LabeledImages, load_data, stratified
from vitscope.tune.dataset import FeatureDataset, ImageDataset, as_they_come
from vitscope.tune.leakage import inspect, usable
from vitscope.tune.lock import locked
from vitscope.tune.memory import peak_memory
from vitscope.tune.methods import READS_WINDOWS, Prepared, prepare, require_tuning
from vitscope.tune.pretrained import check_frozen_weights, check_pretrained_weights, frozen_digests
from vitscope.tune.processes import training_processes
from vitscope.tune.progress import Progress, training_progress
from vitscope.tune.recipe import Recipe, read_recipe
from vitscope.tune.run_folder import (
    CHECKPOINTS,
    RESULT,
    Tuned,
    read_run,
    settings_of,
    working_folder,
    working_folder_of_others,
)
from vitscope.tune.trainer import STATE, Reporting, Trainer, arguments, stopped, tensorboard_logs
from vitscope.validation import at_least

LOG = "log.jsonl"


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
    progress: Progress | bool | None = None,
    **changes: Any,
) -> Tuned:
    """Train a model on a data set, test it, and leave a folder that :func:`vitscope.load` takes.

    The engine is transformers' ``Trainer``. A run that was broken off, at any moment, goes on from its last checkpoint
    when it is called again in the same way, and ends with the same weights. ``model`` itself is not changed, and
    neither are torch's, numpy's and Python's random numbers.

    Args:
        model: of transformers, timm or torchvision; a name, or what :func:`vitscope.load` takes or gives.
        data: as for :func:`~vitscope.tune.data.load_data`; its images are checked first, unless it is a
            :class:`~vitscope.tune.data.Data`.
        out: the run's folder.
        tuning: what learns: one of :data:`~vitscope.tune.methods.TUNING_METHODS`.
        recipe: ``"report"``, ``"modern"``, a TOML file or a :class:`~vitscope.tune.recipe.Recipe`; ``changes`` are
            settings of it to change, such as ``epochs=3``.
        rank: of adapters (64) and of LoRA (8).
        unreadable: ``"refuse"`` or ``"skip"`` images that cannot be read.
        drop_duplicates: leave out training images that are in the test set too.
        save_steps: a checkpoint after so many steps too, not after every epoch alone.
        tensorboard: write logs for TensorBoard into ``out``.
        overwrite: replace another run in ``out``, which is there until the new one is finished.
        device: where to train; by default on the GPU if there is one.
        progress: True for a bar on stderr, or a function that is called after every step with a mapping: step, steps,
            accuracy.

    Raises:
        CallError: an argument is wrong, the data set cannot be learned from, or ``out`` holds another run.
        WorkError: images cannot be read, another run works on ``out``, the loss is not finite, or a result cannot be
            written.
    """
    chosen = read_recipe(recipe, **changes)
    require_tuning(tuning)
    if unreadable not in ("refuse", "skip"):
        raise CallError(f"unreadable is {unreadable!r}: refuse or skip")
    if save_steps is not None:
        at_least(1, save_steps, "save_steps")
    out, trained_on = require_path(out, "out"), require_device(device)
    base = model if isinstance(model, VisionModel) else load(model)
    if not isinstance(data, Data):
        data = usable(inspect(load_data(data)), unreadable=unreadable, drop_duplicates=drop_duplicates)
    with training_progress(progress) as tell, _kept_random(chosen.seed), quiet(), _learning():
        made = _reset_classifier(base, data.labels, tuning)
        check_folder(made)
        prepared = prepare(made, tuning, rank=rank)
        check_pretrained_weights(base, made)
        settings = settings_of(base, data, tuning, rank, chosen)
        processes = training_processes()
        with locked(out) if processes.is_main_process else nullcontext():
            place = _place(out, settings, overwrite)
            if place is None:
                return read_run(out)
            run = _Run(made, prepared, data, tuning, chosen, place, settings, trained_on)
            tuned = run.trained(save_steps, tensorboard, tell)
            if place != out:
                if processes.is_main_process:
                    take_place(place, out)
                processes.wait_for_everyone()
            return replace(tuned, folder=out)


def _place(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path | None:
    """Where this run is worked on; the main process prepares it, the others read what it decided."""
    processes = training_processes()
    with processes.main_process_first():
        if processes.is_main_process:
            return working_folder(out, settings, overwrite)
        return working_folder_of_others(out, settings)


def _reset_classifier(base: VisionModel, labels: Sequence[str], tuning: str) -> VisionModel:
    """The model to train; one that cannot take its own input, or another classifier, is one line."""
    if base.layout is not None and base.preprocessing is not None:
        base.layout.grid(*base.preprocessing.size)
    try:
        return reset_classifier(base, labels, by_windows=tuning == READS_WINDOWS)
    except VitscopeError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise CallError(
            f"{base.name} cannot be given another classifier ({first_line(error)}): load the original model by name, "
            "with an image size that it takes, and tune that"
        ) from None


@contextmanager
def _learning() -> Iterator[None]:
    """Gradients, also where the caller has switched them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


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
            digests = frozen_digests(self.model.module, evaluating=frozen)
            classifier = Classifier(self.model, float(self.recipe.label_smoothing), frozen=frozen)
            per_step = self.recipe.batch_size * self.recipe.accumulate * training_processes().num_processes
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
            if there:
                checkpoints.verify(there[-1], STATE)
            if there and self._had_stopped(there[-1]):
                trainer.state = TrainerState.load_from_json(str(there[-1] / STATE))
            else:
                trainer.train(resume_from_checkpoint=str(there[-1]) if there else None)
            if self.recipe.early_stop is not None:
                checkpoints.load_trained(self.model.module, trainer.best)
        check_frozen_weights(self.model.module, digests, self.model.name)
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
        """What is trained on and what is watched: images, or features where the backbone has nothing to learn."""
        train, watched = self.data.train, self.data.test
        if self.recipe.validation:
            parts = stratified(train.classes, float(self.recipe.validation), self.recipe.seed)
            train, watched = train.subset(parts[0]), train.subset(parts[1])
        if self.tuning == "head" and not self.recipe.augment and len(get_classifiers(self.model)) == 1:
            return self._features(train), self._features(watched)
        changed = ImageDataset(train, self.preprocessing, changes=self.recipe.augment, seed=self.recipe.seed)
        return changed, ImageDataset(watched, self.preprocessing)

    def _features(self, images: LabeledImages) -> FeatureDataset:
        return FeatureDataset(features_of(self.model, self._batches(images)), images.classes)

    def _batches(self, images: LabeledImages) -> Iterator[Tensor]:
        feed, size = ImageDataset(images, self.preprocessing), self.recipe.batch_size
        for start in range(0, len(images), size):
            yield feed.__getitems__(list(range(start, min(start + size, len(images)))))["pixel_values"]

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
                about=self.settings,
            )
            with atomic_write(self.out / RESULT) as beside:
                beside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            discard(self.out / CHECKPOINTS)
        trainer.accelerator.wait_for_everyone()


def require_device(device: str | torch.device | None) -> torch.device:
    """Return the device to train on, or refuse one that this machine does not have."""
    there = torch.cuda.is_available()
    try:
        if not isinstance(device, str | torch.device | None):
            raise TypeError
        chosen = torch.device(device if device is not None else "cuda" if there else "cpu")
    except (RuntimeError, TypeError):
        chosen = None
    known = chosen is not None and (
        chosen.type == "cpu" or (chosen.type == "cuda" and there and (chosen.index or 0) < torch.cuda.device_count())
    )
    if chosen is None or not known:
        raise CallError(f"device {str(device)!r} cannot be trained on here: cpu{' and cuda' if there else ''} can")
    return chosen


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
