"""Fine-tuning of a model of any library on the classes of a data set."""

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerState

from vitscope.errors import CallError, VitscopeError, first_line
from vitscope.files import atomic_write, delete_folder, replace_folder, require_path
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.backends.transformers.heads import quiet
from vitscope.models.checkpoints.serialization import MODEL_FOLDER, check_folder, save_folder
from vitscope.models.heads import get_classifiers, reset_classifier
from vitscope.models.loader import load
from vitscope.models.vision_model import VisionModel
from vitscope.progress import Progress, ProgressCallback, ProgressLike, progress_callback
from vitscope.tune import checkpoints
from vitscope.tune.baselines import baselines
from vitscope.tune.classifier import Classifier, compute_features, fit_classifiers
from vitscope.tune.data import Data, LabeledImages, stratified_split
from vitscope.tune.data_options import DEFAULT_OPTIONS, DataOptions
from vitscope.tune.dataset import FeatureDataset, ImageDataset, collate
from vitscope.tune.devices import require_device
from vitscope.tune.leakage import DataCheck, checked_data
from vitscope.tune.lock import locked
from vitscope.tune.memory import peak_memory
from vitscope.tune.methods import READS_WINDOWS, Prepared, prepare, require_tuning
from vitscope.tune.metrics import confusion_matrix, macro_f1, wilson_interval
from vitscope.tune.pretrained import check_frozen_weights, check_pretrained_weights, frozen_digests
from vitscope.tune.processes import training_processes
from vitscope.tune.recipe import Recipe, RecipeChanges, read_recipe
from vitscope.tune.run_folder import (
    CHECKPOINTS,
    RESULT,
    Tuned,
    joined_working_folder,
    read_run,
    settings_of,
    working_folder,
)
from vitscope.tune.trainer import STATE, RunReporter, Trainer, has_stopped, tensorboard_callback, training_arguments
from vitscope.validation import require_at_least

LOG = "log.jsonl"


def finetune(
    model: VisionModel | nn.Module | str | Path,
    data: Data | DataCheck | str | Path,
    *,
    out: str | Path,
    tuning: str = "head",
    recipe: str | Path | Recipe = "modern",
    rank: int | None = None,
    data_options: DataOptions = DEFAULT_OPTIONS,
    save_steps: int | None = None,
    tensorboard: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    progress: ProgressLike = False,
    **changes: Unpack[RecipeChanges],
) -> Tuned:
    """Train a model on a data set, test it, and write it to a folder that :func:`vitscope.load` reads.

    The engine is the ``Trainer`` of transformers. If a run was interrupted, the same call resumes it from its last
    checkpoint and ends with the same weights. ``model`` itself does not change, and neither do the random states of
    torch, numpy and Python.

    Args:
        model: a model of transformers, timm or torchvision: a name, or what :func:`vitscope.load` takes or returns.
        data: what :func:`vitscope.load_data` takes or returns, or a data set checked by :func:`vitscope.check_data`. A
            data set that is passed by name or path is checked first.
        out: the folder of the run.
        tuning: the tuning method, one of :data:`~vitscope.tune.methods.TUNING_METHODS`.
        recipe: ``"report"``, ``"modern"``, the path of a TOML file, or a :class:`vitscope.Recipe`.
        rank: width of adapters (64 by default) and of LoRA (8).
        data_options: how the data set is split, limited and cleaned; unused if ``data`` is loaded already.
        save_steps: steps between two checkpoints, besides those after every epoch.
        tensorboard: also write logs for TensorBoard into ``out``.
        overwrite: replace another run in ``out``, which is kept until the new run is finished.
        device: the device to train on; by default the GPU if there is one.
        progress: True for a bar on stderr, or a function that receives a :class:`vitscope.Progress` after every step.
            Its metrics are ``loss``, and ``accuracy`` after the evaluation of an epoch.
        changes: settings of the recipe to replace, such as ``epochs=3``.

    Returns:
        The tuned model and its results.

    Raises:
        CallError: an argument is wrong, the data set cannot be learned, or ``out`` holds another run.
        WorkError: images cannot be read, another run works on ``out``, the loss is not finite, or a result cannot be
            written.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from vitscope.tune.data import LabeledImages
        >>> images, classes = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 2
        >>> images[1::2] = 255
        >>> splits = (LabeledImages(images, index, classes[index]) for index in (np.arange(4), np.arange(4, 8)))
        >>> data = Data("shades", ("black", "white"), *splits)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tuned = finetune("vit-nano", data, out=Path(folder, "run"), epochs=1, batch_size=4)
        >>> tuned.predictions.shape
        (4,)
    """
    recipe = read_recipe(recipe, **changes)
    require_tuning(tuning)
    if save_steps is not None:
        require_at_least(1, save_steps, "save_steps")
    out, torch_device = require_path(out, "out"), require_device(device)
    with progress_callback(progress) as report:
        base = model if isinstance(model, VisionModel) else load(model)
        data, check = checked_data(data, data_options, report)
        recipe = recipe.resolved(tuning, len(data.train))
        nearest = None if check is None else check.nearest_accuracy(data_options)
        with _restored_random_state(recipe.seed), quiet(), _enabled_gradients():
            trainable = _with_new_classifier(base, data.labels, tuning)
            check_folder(trainable)
            prepared = prepare(trainable, tuning, rank=rank)
            check_pretrained_weights(base, trainable)
            settings = settings_of(base, data, tuning, rank, recipe)
            processes = training_processes()
            with locked(out) if processes.is_main_process else nullcontext():
                folder = _choose_folder(out, settings, overwrite)
                if folder is None:
                    return read_run(out)
                run = _Run(trainable, prepared, data, tuning, recipe, folder, settings, torch_device, nearest)
                tuned = run.train(save_steps, tensorboard, report)
                if folder != out:
                    if processes.is_main_process:
                        replace_folder(folder, out)
                    processes.wait_for_everyone()
                return replace(tuned, folder=out)


def _choose_folder(out: Path, settings: Mapping[str, Any], overwrite: bool) -> Path | None:
    """Return the folder to train in; the main process prepares it, the others read its choice."""
    processes = training_processes()
    with processes.main_process_first():
        if processes.is_main_process:
            return working_folder(out, settings, overwrite)
        return joined_working_folder(out, settings)


def _with_new_classifier(base: VisionModel, labels: Sequence[str], tuning: str) -> VisionModel:
    """Return the model to train.

    Raises:
        CallError: the model does not accept its own input size, or cannot be given another classifier.
    """
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
def _enabled_gradients() -> Iterator[None]:
    """Enable gradients, even if the caller has disabled them."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@dataclass(frozen=True, eq=False)
class _Run:
    """A training run in its folder."""

    model: VisionModel
    prepared: Prepared
    data: Data
    tuning: str
    recipe: Recipe
    out: Path
    settings: Mapping[str, Any]
    device: torch.device
    nearest: float | None  # accuracy of the nearest training thumbnail

    @property
    def preprocessing(self) -> Preprocessing:
        assert self.model.preprocessing is not None
        return self.model.preprocessing

    def train(self, save_steps: int | None, tensorboard: bool, report: ProgressCallback) -> Tuned:
        """Train from the beginning or from the last checkpoint, test, and write the results."""
        started = time.perf_counter()
        self.model.module.to(self.device)
        with peak_memory(self.device) as peak:
            frozen = self.tuning in ("head", READS_WINDOWS)
            digests = frozen_digests(self.model.module, evaluating=frozen)
            if self.recipe.only_fits(self.tuning):
                outcome = self._fit(report, started)
            else:
                outcome = self._take_steps(save_steps, tensorboard, report)
        check_frozen_weights(self.model.module, digests, self.model.name)
        self.prepared.finish()
        for parameter in self.model.module.parameters():
            parameter.requires_grad_(True).grad = None
        self.model.module.eval()
        processes = training_processes()
        if processes.is_main_process:
            self._write_result(outcome, peak.mib)
        processes.wait_for_everyone()
        return read_run(self.out)

    def _fit(self, report: ProgressCallback, started: float) -> dict[str, Any]:
        """Fit the classifier on the features of the frozen backbone until it converges, and return what to record."""
        train, evaluation = self._splits()
        features, evaluated = (compute_features(self.model, self._batches(images)) for images in (train, evaluation))
        is_main, last = training_processes().is_main_process, Progress("training", 0, 0)

        def show(completed: int, total: int, loss: float) -> None:
            nonlocal last
            last = Progress("training", completed, total, {"loss": loss})
            if is_main:
                report(last)

        fit = fit_classifiers(self.model, features, train.classes, self.recipe.seed, show)
        with torch.no_grad():
            heads = zip(get_classifiers(self.model), evaluated, strict=True)
            logits = torch.stack([head(inputs.to(self.device)).float().cpu() for head, inputs in heads]).mean(0)
        classes = torch.from_numpy(evaluation.classes)
        accuracy = float((logits.argmax(-1) == classes).double().mean())
        history = [
            {"epoch": float(fit.passes), "step": fit.passes, "loss": fit.loss},
            {
                "epoch": float(fit.passes),
                "step": fit.passes,
                "eval_loss": float(cross_entropy(logits, classes)),
                "eval_accuracy": accuracy,
            },
        ]
        if is_main:
            with atomic_write(self.out / LOG) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")
            report(replace(last, metrics={**last.metrics, "accuracy": accuracy}))
        return {
            "seconds": time.perf_counter() - started,
            "epochs": float(fit.passes),
            "penalty": fit.penalty,
            "history": history,
        }

    def _take_steps(self, save_steps: int | None, tensorboard: bool, report: ProgressCallback) -> dict[str, Any]:
        """Train step by step, from the beginning or from the last checkpoint, and return what to record."""
        if self._starts_fitted and not checkpoints.checkpoints(self.out / CHECKPOINTS):
            images = self._splits()[0]
            features = compute_features(self.model, self._batches(images))
            fit_classifiers(self.model, features, images.classes, self.recipe.seed)
        train, evaluation = self._datasets()
        frozen = self.tuning in ("head", READS_WINDOWS)
        classifier = Classifier(self.model, float(self.recipe.label_smoothing), frozen=frozen)
        trainer, early_stop = self._trainer(classifier, train, evaluation), self.recipe.early_stop
        reporter = RunReporter(
            trainer, report, log=self.out / LOG, early_stop=early_stop, dataset=train, save_steps=save_steps
        )
        trainer.add_callback(reporter)
        if tensorboard:
            trainer.add_callback(tensorboard_callback(self.out / "tensorboard"))
        self._train_or_resume(trainer)
        if early_stop is not None:
            checkpoints.load_trained(self.model.module, trainer.best_checkpoint)
        return {"seconds": trainer.seconds, "epochs": trainer.state.epoch, "history": trainer.state.log_history}

    @property
    def _starts_fitted(self) -> bool:
        """Whether the classifier is fitted before the first step; one that reads untrained CLS tokens cannot be."""
        return self.recipe.initial_classifier == "fitted" and self.tuning != READS_WINDOWS

    def _trainer(self, classifier: Classifier, train: Any, evaluation: Any) -> Trainer:
        assert self.recipe.epochs is not None
        per_step = self.recipe.batch_size * self.recipe.accumulate * training_processes().num_processes
        steps = self.recipe.epochs * math.ceil(len(train) / per_step)
        on_cpu = self.device.type == "cpu"
        return Trainer(
            recipe=self.recipe,
            classifier=classifier,
            module=self.model.module,
            args=training_arguments(self.recipe, self.tuning, self.out / CHECKPOINTS, steps, on_cpu=on_cpu),
            train_dataset=train,
            eval_dataset=evaluation,
            data_collator=collate,
        )

    def _train_or_resume(self, trainer: Trainer) -> None:
        """Train to the end, unless the last checkpoint says that the run has already stopped early."""
        saved = checkpoints.checkpoints(self.out / CHECKPOINTS)
        if not saved:
            trainer.train()
            return
        checkpoints.verify(saved[-1], STATE)
        state = TrainerState.load_from_json(str(saved[-1] / STATE))
        if self.recipe.early_stop is not None and has_stopped(state.log_history, self.recipe.early_stop):
            trainer.state = state
        else:
            trainer.train(resume_from_checkpoint=str(saved[-1]))

    def _splits(self) -> tuple[LabeledImages, LabeledImages]:
        """Return the images to learn from, and those that monitor training."""
        if not self.recipe.validation:
            return self.data.train, self.data.test
        splits = stratified_split(self.data.train.classes, float(self.recipe.validation), self.recipe.seed)
        return self.data.train.subset(splits[0]), self.data.train.subset(splits[1])

    def _datasets(self) -> tuple[Any, Any]:
        """Return the training and evaluation images, or their features if the backbone is frozen and runs only once."""
        train, evaluation = self._splits()
        augment = self.recipe.augment or ()
        if self.tuning == "head" and not augment and len(get_classifiers(self.model)) == 1:
            return self._features(train), self._features(evaluation)
        augmented = ImageDataset(train, self.preprocessing, augmentations=augment, seed=self.recipe.seed)
        return augmented, ImageDataset(evaluation, self.preprocessing)

    def _features(self, images: LabeledImages) -> FeatureDataset:
        return FeatureDataset(compute_features(self.model, self._batches(images))[0], images.classes)

    def _batches(self, images: LabeledImages) -> Iterator[Tensor]:
        dataset, size = ImageDataset(images, self.preprocessing), self.recipe.batch_size
        for start in range(0, len(images), size):
            yield dataset.__getitems__(list(range(start, min(start + size, len(images)))))["pixel_values"]

    def _predict(self) -> np.ndarray:
        """Return the predicted class index of each test image."""
        logits = []
        with torch.no_grad(), self.model.running():
            for pixels in self._batches(self.data.test):
                output = self.model.logits(pixels.to(self.device, self.model.dtype))
                assert output is not None
                logits.append(output.float().cpu())
        return torch.cat(logits).argmax(-1).numpy()

    def _write_result(self, outcome: Mapping[str, Any], peak_mib: float) -> None:
        """Test the finished model, write the model and the result, and delete the checkpoints."""
        predictions, labels = self._predict(), self.data.test.classes
        confusion = confusion_matrix(labels, predictions, len(self.data.labels))
        correct = int((predictions == labels).sum())
        record = {
            **self.settings,
            "accuracy": correct / len(labels),
            "interval": wilson_interval(correct, len(labels)),
            "macro_f1": macro_f1(confusion),
            "confusion": confusion.tolist(),
            "num_trained": self.prepared.num_trained,
            "num_head": self.prepared.num_head,
            "baselines": baselines(self.data, self.nearest),
            **outcome,
            "seconds": round(outcome["seconds"], 3),
            "peak_mib": round(peak_mib, 1),
            "predictions": predictions.tolist(),
            "true_labels": labels.tolist(),
        }
        base = self.model.name
        name = f"{Path(base).name if Path(base).is_dir() else base} ({self.tuning})"
        save_folder(
            replace(self.model, name=name),
            self.out / MODEL_FOLDER,
            adapters=self.prepared.adapters,
            about=self.settings,
        )
        with atomic_write(self.out / RESULT) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        delete_folder(self.out / CHECKPOINTS)


@contextmanager
def _restored_random_state(seed: int) -> Iterator[None]:
    """Seed torch inside the block, and restore every random state after it."""
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
