"""Comparison of models, tuning methods and seeds on one data set, cell by cell."""

import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from vitscope.errors import CallError, OutputExistsError
from vitscope.files import atomic_write, delete_abandoned, delete_folder, require_path
from vitscope.models.checkpoints.serialization import MODEL_FOLDER
from vitscope.models.loader import load
from vitscope.models.vision_model import VisionModel
from vitscope.models.window_reader import block_projections
from vitscope.progress import ProgressCallback, ProgressLike, progress_callback
from vitscope.tune.attention_change import AttentionChange, attention_change
from vitscope.tune.comparison_result import BASE, Cell, Comparison
from vitscope.tune.data import Data
from vitscope.tune.data_options import DEFAULT_OPTIONS, DataOptions
from vitscope.tune.devices import require_device
from vitscope.tune.finetune import finetune
from vitscope.tune.leakage import DataCheck, checked_data
from vitscope.tune.lock import locked
from vitscope.tune.methods import READS_WINDOWS, require_tuning
from vitscope.tune.processes import training_processes
from vitscope.tune.recipe import Recipe, RecipeChanges, read_recipe
from vitscope.tune.run_folder import Tuned, describe_difference, has_content, read_result, settings_of
from vitscope.validation import require_at_least, require_seed

CELL, CELLS, NUM_EXAMPLES = "cell.json", "cells", 8


def compare(
    data: Data | DataCheck | str | Path,
    models: Sequence[str | Path | VisionModel],
    *,
    out: str | Path,
    tunings: Sequence[str] = (BASE, "adapter-mlp", "lora"),
    seeds: int | Sequence[int] = 3,
    recipe: str | Path | Recipe = "modern",
    rank: int | None = None,
    data_options: DataOptions = DEFAULT_OPTIONS,
    keep_models: bool = False,
    device: str | None = None,
    progress: ProgressLike = False,
    **changes: Unpack[RecipeChanges],
) -> Comparison:
    """Fine-tune every model with every method and seed, and compare accuracy, gains and attention.

    The same call resumes a comparison that was interrupted: finished cells are not run again, and an interrupted cell
    resumes from its last checkpoint.

    Args:
        data: what :func:`vitscope.load_data` takes or returns, or a data set checked by :func:`vitscope.check_data`.
        models: a list of models, by name or from :func:`vitscope.load`.
        out: the folder of the comparison.
        tunings: tuning methods, see :func:`vitscope.finetune`; gains are measured against ``"head"`` if it is among
            them.
        seeds: the number of seeds, counted from 0, or a list of seeds.
        recipe: ``"report"``, ``"modern"``, the path of a TOML file, or a :class:`vitscope.Recipe`.
        rank: width of adapters (64 by default) and of LoRA (8), for the methods that have one.
        data_options: how the data set is split, limited and cleaned; unused if ``data`` is loaded already.
        keep_models: keep the tuned models of all cells in ``out/cells``. Otherwise only their results are kept, and
            cells that were finished without this option no longer have a model.
        device: the device to train on; by default the GPU if there is one.
        progress: True for a bar on stderr, or a function that receives a :class:`vitscope.Progress` after every step,
            whose description names the cell: ``"vit-nano, lora, seed 0"``.
        changes: settings of the recipe to replace, such as ``epochs=3``.

    Returns:
        The cells, their summaries and interactions.

    Raises:
        CallError: an argument is wrong, or ``out`` holds something else.
        WorkError: a cell fails; the cells that are finished are kept.

    Examples:
        >>> import tempfile
        >>> import numpy as np
        >>> from vitscope.tune.data import LabeledImages
        >>> images, classes = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8) % 2
        >>> images[1::2] = 255
        >>> splits = (LabeledImages(images, index, classes[index]) for index in (np.arange(4), np.arange(4, 8)))
        >>> data = Data("shades", ("black", "white"), *splits)
        >>> options = {"tunings": ["head"], "seeds": 1, "epochs": 1, "batch_size": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     comparison = compare(data, ["vit-nano"], out=Path(folder, "comparison"), **options)
        >>> [(cell.model, cell.tuning, cell.seed) for cell in comparison.cells]
        [('vit-nano', 'head', 0)]
    """
    recipe, out = read_recipe(recipe, **changes), require_path(out, "out")
    require_device(device)
    seed_list = _seeds(seeds)
    _check_is_list(models, "models", "models")
    _check_is_list(tunings, "tunings", "names of tuning methods")
    methods = [require_tuning(tuning) for tuning in tunings]
    if rank is not None and all(method.rank is None for method in methods):
        raise CallError(f"rank is {rank}, but none of {', '.join(tunings)} has a rank: add an adapter or lora")
    if not models or not tunings or not seed_list:
        raise CallError("a comparison needs at least one model, one tuning and one seed")
    if out.exists() and (not out.is_dir() or (has_content(out) and not (out / CELLS).is_dir())):
        raise OutputExistsError(f"{out} holds something other than a comparison: choose another folder")
    with progress_callback(progress) as report:
        data, data_check = checked_data(data, data_options, report)
        loaded = [model if isinstance(model, VisionModel) else load(model) for model in models]
        _check_distinct_names([model.name for model in loaded])
        if READS_WINDOWS in tunings:
            for model in loaded:
                block_projections(model)  # raises an error for a model without windows before anything is trained
        images = _example_images(data)
        cells: list[Cell] = []
        processes = training_processes()
        with locked(out) if processes.is_main_process else nullcontext():
            for model, tuning, seed in _combinations(loaded, tunings, seed_list):
                folder = out / CELLS / f"{folder_name(model.name)}-{tuning}-{seed}"
                cell_rank = None if require_tuning(tuning).rank is None else rank
                cell_recipe = replace(recipe, seed=seed).resolved(tuning, len(data.train))
                job = _CellJob(model, data, tuning, cell_rank, cell_recipe, folder, images, keep_models, device)
                cells.append(job.cell(report))
            views = {model.name: model.prepare(list(images))[1] for model in loaded}
            result = Comparison(data.name, data.labels, tuple(cells), recipe.as_json(), data_check, out, views)
            if processes.is_main_process:
                with atomic_write(out / "comparison.json") as temporary:
                    temporary.write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
    return result


@dataclass(frozen=True, eq=False)
class _CellJob:
    """A cell that is run, or read if it is finished."""

    model: VisionModel
    data: Data
    tuning: str
    rank: int | None
    recipe: Recipe
    folder: Path
    images: Sequence[Any]
    keep_model: bool
    device: str | None

    def cell(self, report: ProgressCallback) -> Cell:
        """Return the cell, after the main process has written it."""
        path = self.folder / CELL
        if not path.is_file():
            tuned, processes = self._tune(report), training_processes()
            if processes.is_main_process:
                change = attention_change(self.model, tuned.model, self.images)
                with atomic_write(path) as temporary:
                    record = {**tuned.record, "attention": change.as_json(), "model_kept": self.keep_model}
                    temporary.write_text(json.dumps(record), encoding="utf-8")
            processes.wait_for_everyone()
        record = _read_cell(path)
        model_kept = record.pop("model_kept", True)
        if training_processes().is_main_process:
            if (
                not model_kept
            ):  # from the run of the cell, whose process may have been killed before it deleted the model
                delete_folder(self.folder / MODEL_FOLDER)
            for folder in (self.folder, self.folder.parent):
                delete_abandoned(folder)
        settings = settings_of(self.model, self.data, self.tuning, self.rank, self.recipe)
        if any(record.get(name) != settings[name] for name in settings):
            raise OutputExistsError(
                f"{self.folder} holds a cell with another {describe_difference(record, settings)}: choose another --out"
            )
        return Cell(self.model.name, self.tuning, self.recipe.seed, record)

    def _tune(self, report: ProgressCallback) -> Tuned:
        name = f"{self.model.name}, {self.tuning}, seed {self.recipe.seed}"
        return finetune(
            self.model,
            self.data,
            out=self.folder,
            tuning=self.tuning,
            recipe=self.recipe,
            rank=self.rank,
            device=self.device,
            progress=lambda step: report(replace(step, description=name)),
        )


def _read_cell(path: Path) -> dict[str, Any]:
    """Return the record of a finished cell.

    Raises:
        CallError: the file is damaged.
    """
    record = read_result(path)
    try:
        if record.get("attention"):
            AttentionChange.from_json(record["attention"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CallError(f"{path} is damaged: delete {path.parent} and run the same call again") from None
    return record


def _seeds(seeds: Any) -> list[int]:
    """Return the list of seeds."""
    if isinstance(seeds, Sequence | np.ndarray) and not isinstance(seeds, str | bytes):
        return [require_seed(seed) for seed in seeds]
    return list(range(require_at_least(1, seeds, "seeds")))


def _check_is_list(value: Any, name: str, items: str) -> None:
    """Check that an argument is a list and not text, which is also a sequence."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise CallError(f"{name} is {value!r}: pass a list of {items}")


def _combinations(
    models: Sequence[VisionModel], tunings: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[VisionModel, str, int]]:
    """Return every combination in order; repeated methods and seeds count once."""
    unique_tunings, unique_seeds = dict.fromkeys(tunings), dict.fromkeys(seeds)
    return ((model, tuning, seed) for model in models for tuning in unique_tunings for seed in unique_seeds)


def _check_distinct_names(names: Sequence[str]) -> None:
    """Check that no two models have the same name, because they would share the folders of their cells."""
    folders = [folder_name(name) for name in names]
    repeated = next((name for name in names if folders.count(folder_name(name)) > 1), None)
    if repeated is None:
        return
    if Path(repeated).is_dir():
        raise CallError(
            f"two models have the same name, {Path(repeated).name}: compare different ones, or rename a model's folder"
        )
    raise CallError(f"two models have the same name, {repeated}: compare different ones")


def _example_images(data: Data) -> list[Any]:
    """Return the test images whose attention is compared, alternating between the classes."""
    by_class = [np.flatnonzero(data.test.classes == index) for index in range(len(data.labels))]
    in_turn = [indices[i] for i in range(NUM_EXAMPLES) for indices in by_class if i < len(indices)]
    return [data.test.read(int(index)) for index in in_turn[:NUM_EXAMPLES]]


def folder_name(name: str) -> str:
    """Return the name of a model as the name of a folder: the last level of a local path, all of any other name."""
    short = Path(name).name if Path(name).is_dir() else name
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in short)
