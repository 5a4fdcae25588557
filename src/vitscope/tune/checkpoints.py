"""Checkpoints of a training run: safetensors and JSON with checksums, written atomically, never pickled."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitscope.errors import WorkError, first_line
from vitscope.files import delete_folder
from vitscope.tune.json_files import DamagedError, read_object

WEIGHTS, OPTIMIZER, RANDOM, STATE = "trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
CHECKSUMS = "checksums.json"
NAME = re.compile(r"checkpoint-(\d+)$")


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that training changes: parameters with gradients, and floating-point buffers."""
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    saved_names = set(module.state_dict())
    buffers = {
        name: buffer for name, buffer in module.named_buffers() if name in saved_names and buffer.is_floating_point()
    }
    return {name: tensor.detach() for name, tensor in (parameters | buffers).items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Save tensors on any device and in any layout as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_trained(module: nn.Module, folder: Path) -> None:
    """Restore the tensors of :func:`trained_state` from a checkpoint.

    Raises:
        WorkError: the file is damaged, or belongs to another model or tuning method.
    """
    saved, current = _read_tensors(folder / WEIGHTS), trained_state(module)
    saved_shapes, current_shapes = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (saved, current)
    )
    if saved_shapes != current_shapes:
        names = saved_shapes.keys() | current_shapes.keys()
        different = sorted(name for name in names if saved_shapes.get(name) != current_shapes.get(name))
        raise WorkError(
            f"{folder} is of another model or tuning: {different[0]} does not fit (and {len(different) - 1} more); "
            f"{_advice(folder)}"
        )
    verify(folder, WEIGHTS)
    with torch.no_grad():
        for name, tensor in current.items():
            tensor.copy_(saved[name])


def save_optimizer(optimizer: torch.optim.Optimizer, schedule: Any, seconds: float, folder: Path) -> None:
    """Save the tensors of an optimizer as safetensors, and its numbers and the training time so far as JSON."""
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    numbers = {
        "seconds": seconds,
        "groups": state["param_groups"],
        "tensors": sorted(tensors),
        "schedule": {name: value for name, value in schedule.state_dict().items() if _is_json(value)},
    }
    save_tensors(tensors, folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(numbers), encoding="utf-8")


def load_optimizer(optimizer: torch.optim.Optimizer, schedule: Any, folder: Path) -> float:
    """Restore what :func:`save_optimizer` saved, and return the training time so far in seconds.

    Raises:
        WorkError: the files are damaged, or belong to another optimizer.
    """
    tensors, numbers = _read_tensors(folder / OPTIMIZER), read_json(folder / STATE)
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if sorted(tensors) != numbers["tensors"]:
            raise ValueError(f"{OPTIMIZER} and {STATE} do not belong together")
        if [group.keys() for group in numbers["groups"]] != [group.keys() for group in optimizer.param_groups]:
            raise ValueError("its settings have other names")
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        for position, values in state.items():
            if any(tensor.ndim and tensor.shape != parameters[position].shape for tensor in values.values()):
                raise ValueError(f"weight {position} has another shape")
        for file in (OPTIMIZER, STATE):
            verify(folder, file)
        optimizer.load_state_dict({"state": state, "param_groups": numbers["groups"]})
        schedule.load_state_dict(numbers["schedule"])
        return float(numbers["seconds"])
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise WorkError(f"{folder / STATE} is of another optimizer: {error}; {_advice(folder)}") from None


def save_random(states: list[dict[str, Tensor]], folder: Path) -> None:
    """Save the random state of each process."""
    tensors = {f"{process}.{name}": tensor for process, state in enumerate(states) for name, tensor in state.items()}
    save_tensors(tensors, folder / RANDOM)


def load_random(folder: Path, process: int) -> None:
    """Restore the random state of one process; a process without a saved state keeps its own."""
    states = _read_tensors(folder / RANDOM)
    verify(folder, RANDOM)
    for name, tensor in states.items():
        number, _, device = name.partition(".")
        if int(number) != process:
            continue
        if device == "cpu":
            torch.set_rng_state(tensor)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(tensor)


def random_state() -> dict[str, Tensor]:
    """Return the state of torch's random numbers on the CPU and the current GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a folder, oldest first."""
    entries = [entry for entry in folder.glob("checkpoint-*") if NAME.fullmatch(entry.name)]
    return sorted(entries, key=lambda entry: int(entry.name.partition("-")[2]))


def sweep(folder: Path, keep: set[Path]) -> None:
    """Delete all checkpoints that are not in ``keep``, and incomplete ones left by interrupted writes."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and entry not in keep and (NAME.fullmatch(entry.name) or entry.name.startswith(".")):
            if NAME.fullmatch(entry.name):
                delete_folder(entry)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def save_checksums(folder: Path) -> None:
    """Save the checksum of every file of a checkpoint, which reveals a damaged file even if it can be read."""
    checksums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path, file: str) -> None:
    """Check one file of a checkpoint against its checksum.

    Raises:
        WorkError: the file is missing or damaged.
    """
    try:
        checksum = _checksum(folder / file)
    except OSError as error:
        raise _damaged(folder / file, error) from None
    checksums = read_json(folder / CHECKSUMS)
    if file not in checksums:
        raise _damaged(folder / CHECKSUMS, f"it has no {file!r}")
    if checksums[file] != checksum:
        raise _damaged(folder / file, f"its checksum is not the one in {CHECKSUMS}")


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file of a checkpoint.

    Raises:
        WorkError: the file is missing or damaged.
    """
    try:
        return read_object(path)
    except (OSError, DamagedError) as error:
        raise _damaged(path, error) from None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _damaged(path: Path, reason: Exception | str) -> WorkError:
    text = reason if isinstance(reason, str) else first_line(reason)
    return WorkError(f"{path} is damaged: {text}; {_advice(path.parent)}")


def _advice(folder: Path) -> str:
    """Return the advice for a damaged checkpoint; if it is the only one, the run then starts again."""
    return f"delete the folder {folder} and run the same call again"


def _read_tensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, error) from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
