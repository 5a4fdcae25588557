"""transformers' Trainer with checkpoints that can be trusted: whole or not there, exact to go on from, no pickles."""

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
from vitscope.tune import checkpoints
from vitscope.tune.low_rank import LowRank
from vitscope.tune.muon import Muon
from vitscope.tune.progress import Progress
from vitscope.tune.recipe import Recipe

STATE = "trainer_state.json"
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "trapezoid": "warmup_stable_decay"}


def arguments(recipe: Recipe, tuning: str, out: Path, steps: int, *, on_cpu: bool) -> Any:
    """A recipe as TrainingArguments; ``steps`` is how many the whole run takes."""
    watched = recipe.early_stop is not None
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
        metric_for_best_model="accuracy" if watched else None,
        greater_is_better=True if watched else None,
        logging_strategy="epoch",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        log_level="error",
        use_cpu=on_cpu,
        # What a family keeps and does not use may be among the weights that were there before.
        ddp_find_unused_parameters=tuning in ("full", "bitfit", "layernorm"),
        **options,
    )


class Trainer(transformers.Trainer):  # type: ignore[misc]
    """Trains what takes gradients, and keeps only that in its checkpoints."""

    def __init__(self, *, recipe: Recipe, classifier: nn.Module, module: nn.Module, **options: Any) -> None:
        self._recipe, self._module = recipe, module
        self._before, self._started = 0.0, time.perf_counter()
        super().__init__(model=classifier, compute_metrics=_accuracy, **options)
        # Tables and results belong to vitscope; the library's printing callback would add lines of its own.
        self.remove_callback(transformers.PrinterCallback)

    @property
    def seconds(self) -> float:
        """Spent on training, also before the run was broken off."""
        return self._before + time.perf_counter() - self._started

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch, where one was looked for."""
        return Path(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002
        """Weight decay on the weights of linear layers and convolutions alone."""
        if self.optimizer is None:  # type: ignore[has-type]
            self.optimizer = _optimizer(self._module, self._recipe, self.args)
        return self.optimizer

    def compute_loss(self, *inputs: Any, **options: Any) -> Any:
        found = super().compute_loss(*inputs, **options)
        loss = found[0] if isinstance(found, tuple) else found
        if not bool(torch.isfinite(loss)):
            raise WorkError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}: the run stops, its last "
                "checkpoint is kept; take a lower learning rate or float32"
            )
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        step = self.state.global_step
        run, states = Path(self.args.output_dir), gather_object([checkpoints.random_state()])
        folder = run / f"checkpoint-{step}"
        if not self.args.should_save:
            return
        trained = checkpoints.trained_state(self._module)
        bad = [name for name, tensor in trained.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise WorkError(f"{bad[0]} holds NaN or infinity after step {step}: the last good checkpoint is kept")
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, transformers.trainer_callback.ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        with atomic_folder(folder) as beside:
            try:
                checkpoints.save_tensors(trained, beside / checkpoints.WEIGHTS)
                checkpoints.save_optimizer(self.optimizer, self.lr_scheduler, self.seconds, beside)
                checkpoints.save_random(states, beside)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            scaler = getattr(self.accelerator, "scaler", None)
            if scaler is not None:
                (beside / "scaler.json").write_text(json.dumps(scaler.state_dict()), encoding="utf-8")
            self.state.save_to_json(str(beside / STATE))
            checkpoints.save_checksums(beside)
        checkpoints.sweep(run, {folder, self.best})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        checkpoints.load_trained(self._module, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._before = checkpoints.load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler, path = getattr(self.accelerator, "scaler", None), Path(checkpoint or "", "scaler.json")
        if scaler is not None and path.is_file():
            state = checkpoints.json_of(path)
            checkpoints.verify(path.parent, path.name)
            scaler.load_state_dict(dict(state))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random(Path(checkpoint), self.args.process_index)


class Reporting(TrainerCallback):  # type: ignore[misc]
    """Tells of every step and every epoch, and ends a run that no longer gets better."""

    def __init__(
        self, progress: Progress | None, log: Path | None, early_stop: int | None, feed: Any, save_steps: int | None
    ) -> None:
        self.progress, self.log, self.early_stop = progress, log, early_stop
        self.feed, self.save_steps = feed, save_steps
        self.accuracy = math.nan

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        # accelerate does not tell a loader that begins in the middle of an epoch.
        if hasattr(self.feed, "set_epoch"):
            self.feed.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tell(state)
        # After the last step of an epoch comes its evaluation, and then a checkpoint anyhow.
        ends_epoch = state.global_step % (state.max_steps // math.ceil(args.num_train_epochs)) == 0
        if self.save_steps and state.global_step % self.save_steps == 0 and not ends_epoch:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self.log is not None and state.is_world_process_zero:
            with atomic_write(self.log) as beside:
                beside.write_text("".join(json.dumps(row) + "\n" for row in state.log_history), encoding="utf-8")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:  # noqa: ARG002
        self.accuracy = (metrics or {}).get("eval_accuracy", math.nan)
        self._tell(state)
        if self.early_stop is not None:
            control.should_training_stop = stopped(state.log_history, self.early_stop)

    def _tell(self, state: Any) -> None:
        if self.progress is not None and state.is_world_process_zero:
            self.progress({"step": state.global_step, "steps": state.max_steps, "accuracy": self.accuracy})


def stopped(history: Sequence[Mapping[str, Any]], early_stop: int) -> bool:
    """Whether so many epochs went by without a better accuracy."""
    seen = [row["eval_accuracy"] for row in history if "eval_accuracy" in row]
    return bool(seen) and len(seen) - 1 - seen.index(max(seen)) >= early_stop


def tensorboard_logs(folder: Path) -> TrainerCallback:
    """Writes what is logged for TensorBoard.

    Raises:
        ModelUnavailableError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ModelUnavailableError("TensorBoard is not installed: pip install 'vitscope[tune]'") from None
    return TensorBoardCallback(SummaryWriter(str(folder)))


def _accuracy(found: Any) -> dict[str, float]:
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float((logits.argmax(-1) == found.label_ids).mean())}


def _optimizer(module: nn.Module, recipe: Recipe, args: Any) -> torch.optim.Optimizer:
    weights = _weights(module)
    matrices: set[int] = set()
    if recipe.optimizer == "muon":
        inside = {id(one) for block in blocks(module) for one in block.module.parameters() if one.ndim == 2}
        matrices = inside & weights
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [one for one in learning if id(one) in matrices], "matrices": True, "lr": recipe.muon_learning_rate},
        {"params": [one for one in learning if id(one) in weights - matrices]},
        {"params": [one for one in learning if id(one) not in weights], "weight_decay": 0.0},
    ]
    groups = [{"lr": args.learning_rate, "weight_decay": args.weight_decay, **one} for one in groups if one["params"]]
    betas = (float(recipe.betas[0]), float(recipe.betas[1]))
    return Muon(groups, betas) if recipe.optimizer == "muon" else torch.optim.AdamW(groups, betas=betas)


def _weights(module: nn.Module) -> set[int]:
    """The weights of linear layers and convolutions, and the factors of low-rank ones."""
    found: set[int] = set()
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            found.add(id(child._parameters.get("weight")))
        elif isinstance(child, LowRank):
            found.update(map(id, child.parameters()))
    return found
