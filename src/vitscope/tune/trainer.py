"""The Trainer of transformers, with atomic checkpoints that allow an exact resume and use no pickles."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import nn
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import TrainerCallback

from vitscope.errors import ModelUnavailableError, WorkError
from vitscope.files import atomic_folder, atomic_write
from vitscope.models.blocks import blocks
from vitscope.progress import Progress, ProgressCallback
from vitscope.tune import checkpoints
from vitscope.tune.low_rank import LowRank
from vitscope.tune.muon import Muon
from vitscope.tune.recipe import Recipe

STATE, SCALER = "trainer_state.json", "scaler.json"
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "trapezoid": "warmup_stable_decay"}


def training_arguments(recipe: Recipe, tuning: str, out: Path, steps: int, *, on_cpu: bool) -> Any:
    """Return a recipe as TrainingArguments; ``steps`` is the number of steps of the whole run."""
    has_early_stop = recipe.early_stop is not None
    options: dict[str, Any] = {}
    if recipe.schedule == "trapezoid":
        options["lr_scheduler_kwargs"] = {"num_decay_steps": math.ceil(recipe.decay * steps), "decay_type": "linear"}
    return transformers.TrainingArguments(
        output_dir=str(out),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.rate(tuning),
        weight_decay=float(recipe.weight_decay),
        lr_scheduler_type=SCHEDULES[recipe.schedule],
        warmup_steps=math.ceil(recipe.warmup * steps),
        max_grad_norm=float(recipe.clip),
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        seed=recipe.seed,
        data_seed=recipe.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=False,
        metric_for_best_model="accuracy" if has_early_stop else None,
        greater_is_better=True if has_early_stop else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        log_level="error",
        use_cpu=on_cpu,
        # Some families have pretrained weights that they do not use.
        ddp_find_unused_parameters=tuning in ("full", "bitfit", "layernorm"),
        **options,
    )


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints contain only the tensors that training changes.

    Attributes:
        last_loss: the loss of the last training batch; NaN before the first.
    """

    def __init__(self, *, recipe: Recipe, classifier: nn.Module, module: nn.Module, **options: Any) -> None:
        self._recipe, self._module = recipe, module
        self._earlier_seconds, self._started = 0.0, time.perf_counter()
        self.last_loss = math.nan
        super().__init__(model=classifier, compute_metrics=_accuracy, **options)
        # vitscope prints tables and results itself; the printing callback of the library would add lines.
        self.remove_callback(transformers.PrinterCallback)

    @property
    def seconds(self) -> float:
        """Seconds spent on training, including those before an interruption."""
        return self._earlier_seconds + time.perf_counter() - self._started

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint of the best epoch, if the recipe stops early."""
        return Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002
        """Return the optimizer; only the weights of linear layers and convolutions decay."""
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = _optimizer(self._module, self._recipe, self.args)
        return self.optimizer

    def compute_loss(self, *inputs: Any, **options: Any) -> Any:
        """Return the loss.

        Raises:
            WorkError: the loss is not finite.
        """
        result = super().compute_loss(*inputs, **options)
        loss = float((result[0] if isinstance(result, tuple) else result).detach())
        if not math.isfinite(loss):
            raise WorkError(
                f"the loss is {loss} at step {self.state.global_step + 1}: the run stops and keeps its last "
                "checkpoint; use a lower learning rate or float32"
            )
        if self.model.training:
            self.last_loss = loss
        return result

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        step = self.state.global_step
        run, states = Path(self.args.output_dir), gather_object([checkpoints.random_state()])
        folder = run / f"checkpoint-{step}"
        if not self.args.should_save:
            return
        tensors = checkpoints.trained_state(self._module)
        not_finite = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if not_finite:
            raise WorkError(
                f"{not_finite[0]} holds NaN or infinity after step {step}: the last good checkpoint is kept"
            )
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, transformers.trainer_callback.ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        with atomic_folder(folder) as temporary:
            try:
                checkpoints.save_tensors(tensors, temporary / checkpoints.WEIGHTS)
                checkpoints.save_optimizer(self.optimizer, self.lr_scheduler, self.seconds, temporary)
                checkpoints.save_random(states, temporary)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            scaler = getattr(self.accelerator, "scaler", None)
            if scaler is not None:
                (temporary / SCALER).write_text(json.dumps(scaler.state_dict()), encoding="utf-8")
            self.state.save_to_json(str(temporary / STATE))
            checkpoints.save_checksums(temporary)
        checkpoints.sweep(run, {folder, self.best_checkpoint})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        checkpoints.load_trained(self._module, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._earlier_seconds = checkpoints.load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler, path = getattr(self.accelerator, "scaler", None), Path(checkpoint or "", SCALER)
        if scaler is not None and path.is_file():
            state = checkpoints.read_json(path)
            checkpoints.verify(path.parent, path.name)
            scaler.load_state_dict(dict(state))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint), self.args.process_index)


class RunReporter(TrainerCallback):  # type: ignore[misc]
    """Report the progress of a run, write its log, and stop it if it no longer improves.

    Args:
        trainer: the trainer of the run.
        report: receives the progress after every step, and with the accuracy after every evaluation.
        log: the file of the log, one JSON object per line.
        early_stop: number of epochs without a better accuracy after which the run stops; None to disable this.
        dataset: the training images, which are told the current epoch.
        save_steps: steps between two checkpoints, besides those after every epoch.
    """

    def __init__(
        self,
        trainer: Trainer,
        report: ProgressCallback,
        *,
        log: Path,
        early_stop: int | None,
        dataset: Any,
        save_steps: int | None,
    ) -> None:
        self.trainer, self.report, self.log = trainer, report, log
        self.early_stop, self.dataset, self.save_steps = early_stop, dataset, save_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Set the epoch, because accelerate does not set it if training resumes in the middle of an epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the step, and save a checkpoint if one is due."""
        self._report(state, {})
        # The last step of an epoch is always followed by an evaluation and a checkpoint.
        ends_epoch = state.global_step % (state.max_steps // math.ceil(args.num_train_epochs)) == 0
        if self.save_steps and state.global_step % self.save_steps == 0 and not ends_epoch:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Write the log."""
        if state.is_world_process_zero:
            with atomic_write(self.log) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in state.log_history), encoding="utf-8")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Report the accuracy, and stop the run if it no longer improves."""
        accuracy = (metrics or {}).get("eval_accuracy", math.nan)
        self._report(state, {"accuracy": float(accuracy)})
        if self.early_stop is not None:
            control.should_training_stop = has_stopped(state.log_history, self.early_stop)

    def _report(self, state: Any, metrics: Mapping[str, float]) -> None:
        if state.is_world_process_zero:
            metrics = {**metrics, "loss": self.trainer.last_loss}
            self.report(Progress("training", state.global_step, state.max_steps, metrics))


def has_stopped(history: Sequence[Mapping[str, Any]], early_stop: int) -> bool:
    """Return whether the accuracy did not improve in the last ``early_stop`` epochs."""
    accuracies = [row["eval_accuracy"] for row in history if "eval_accuracy" in row]
    return bool(accuracies) and len(accuracies) - 1 - accuracies.index(max(accuracies)) >= early_stop


def tensorboard_callback(folder: Path) -> TrainerCallback:
    """Return a callback that writes the log for TensorBoard.

    Raises:
        ModelUnavailableError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModelUnavailableError("TensorBoard is not installed: pip install 'vitscope[tune]'") from None
    return TensorBoardCallback(SummaryWriter(str(folder)))


def _accuracy(evaluation: Any) -> dict[str, float]:
    """Return the accuracy in an evaluation by the Trainer."""
    predictions = evaluation.predictions
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return {"accuracy": float((logits.argmax(-1) == evaluation.label_ids).mean())}


def _optimizer(module: nn.Module, recipe: Recipe, args: Any) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe, with groups for Muon's matrices, other decaying weights, and the rest."""
    decaying = _decaying_weights(module)
    matrices: set[int] = set()
    if recipe.optimizer == "muon":
        in_blocks = {
            id(parameter) for block in blocks(module) for parameter in block.module.parameters() if parameter.ndim == 2
        }
        matrices = in_blocks & decaying
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in learning if id(parameter) in matrices],
            "matrices": True,
            "lr": recipe.muon_learning_rate,
        },
        {"params": [parameter for parameter in learning if id(parameter) in decaying - matrices]},
        {"params": [parameter for parameter in learning if id(parameter) not in decaying], "weight_decay": 0.0},
    ]
    defaults = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    groups = [{**defaults, **group} for group in groups if group["params"]]
    betas = (float(recipe.betas[0]), float(recipe.betas[1]))
    return Muon(groups, betas) if recipe.optimizer == "muon" else torch.optim.AdamW(groups, betas=betas)


def _decaying_weights(module: nn.Module) -> set[int]:
    """Return the ids of the weights of linear layers and convolutions, and of the factors of low-rank updates."""
    ids: set[int] = set()
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            ids.add(id(child._parameters.get("weight")))
        elif isinstance(child, LowRank):
            ids.update(map(id, child.parameters()))
    return ids
