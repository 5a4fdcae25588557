"""Checkpoints of a training run: safetensors and JSON, written beside and then renamed, never unpickled."""

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

from vitscope.errors import WorkError
from vitscope.files import discard
from vitscope.tune.json_files import DamagedError, read_object

WEIGHTS, OPTIMIZER, RANDOM, STATE = "trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
CHECKSUMS = "checksums.json"
NAME = re.compile(r"checkpoint-(\d+)$")


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What learns, and what is counted on the way: parameters with gradients, and floating-point buffers."""
    learning = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    kept = set(module.state_dict())
    buffers = {name: one for name, one in module.named_buffers() if name in kept and one.is_floating_point()}
    return {name: tensor.detach() for name, tensor in (learning | buffers).items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tensors of any device and layout as safetensors."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_trained(module: nn.Module, folder: Path) -> None:
    """Put back what :func:`trained_state` gave.

    Raises:
        WorkError: the file is damaged, or of another model or tuning.
    """
    found, wanted = _read(folder / WEIGHTS), trained_state(module)
    shapes = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (found, wanted))
    there, here = shapes
    if there != here:
        odd = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        raise WorkError(
            f"{folder} is of another model or tuning: {odd[0]} does not fit (and {len(odd) - 1} more); "
            f"{_advice(folder)}"
        )
    verify(folder, WEIGHTS)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def save_optimizer(optimizer: torch.optim.Optimizer, schedule: Any, seconds: float, folder: Path) -> None:
    """Tensors as safetensors, numbers as JSON; also how long the run has taken."""
    state = optimizer.state_dict()
    tensors = {
        f"{place}.{name}": value
        for place, values in state["state"].items()
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
    """Put back what :func:`save_optimizer` wrote; returns how long the run had taken.

    Raises:
        WorkError: it is damaged, or of another optimizer.
    """
    tensors, numbers = _read(folder / OPTIMIZER), json_of(folder / STATE)
    state: dict[int, dict[str, Tensor]] = {}
    learning = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if sorted(tensors) != numbers["tensors"]:
            raise ValueError(f"{OPTIMIZER} and {STATE} do not belong together")
        if [group.keys() for group in numbers["groups"]] != [group.keys() for group in optimizer.param_groups]:
            raise ValueError("its settings have other names")
        for name, tensor in tensors.items():
            place, _, key = name.partition(".")
            state.setdefault(int(place), {})[key] = tensor
        for at, values in state.items():
            if any(tensor.ndim and tensor.shape != learning[at].shape for tensor in values.values()):
                raise ValueError(f"weight {at} has another shape")
        for file in (OPTIMIZER, STATE):
            verify(folder, file)
        optimizer.load_state_dict({"state": state, "param_groups": numbers["groups"]})
        schedule.load_state_dict(numbers["schedule"])
        return float(numbers["seconds"])
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        raise WorkError(f"{folder / STATE} is of another optimizer: {error}; {_advice(folder)}") from None


def save_random(states: list[dict[str, Tensor]], folder: Path) -> None:
    """The random state of each process."""
    named = {f"{place}.{name}": tensor for place, one in enumerate(states) for name, tensor in one.items()}
    save_tensors(named, folder / RANDOM)


def load_random(folder: Path, process: int) -> None:
    """Put back the random state of one process; one that was not there before keeps its own."""
    states = _read(folder / RANDOM)
    verify(folder, RANDOM)
    for name, tensor in states.items():
        place, _, device = name.partition(".")
        if int(place) != process:
            continue
        if device == "cpu":
            torch.set_rng_state(tensor)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(tensor)


def random_state() -> dict[str, Tensor]:
    """Where torch's random numbers are, on the CPU and the current GPU."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [entry for entry in folder.glob("checkpoint-*") if NAME.fullmatch(entry.name)]
    return sorted(found, key=lambda entry: int(entry.name.partition("-")[2]))


def sweep(folder: Path, keep: set[Path]) -> None:
    """Delete all checkpoints but these, and what broken-off writing left."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and entry not in keep and (NAME.fullmatch(entry.name) or entry.name.startswith(".")):
            if NAME.fullmatch(entry.name):
                discard(entry)
            else:
                shutil.rmtree(entry, ignore_errors=True)


def save_checksums(folder: Path) -> None:
    """Write down the checksum of every file of a checkpoint: a damaged one is noticed, whatever it still says."""
    sums = {file.name: _checksum(file) for file in sorted(folder.iterdir())}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path, file: str) -> None:
    """Check one file of a checkpoint against its checksum.

    Raises:
        WorkError: it is missing or damaged.
    """
    try:
        checksum = _checksum(folder / file)
    except OSError as error:
        raise _damaged(folder / file, error) from None
    sums = json_of(folder / CHECKSUMS)
    if file not in sums:
        raise _damaged(folder / CHECKSUMS, f"it has no {file!r}")
    if sums[file] != checksum:
        raise _damaged(folder / file, f"its checksum is not the one in {CHECKSUMS}")


def json_of(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file of a checkpoint."""
    try:
        return read_object(path)
    except (OSError, DamagedError) as error:
        raise _damaged(path, error) from None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _damaged(path: Path, reason: Any) -> WorkError:
    return WorkError(f"{path} is no whole checkpoint: {str(reason).splitlines()[0]}; {_advice(path.parent)}")


def _advice(folder: Path) -> str:
    """Also where it is the only checkpoint: the run then begins anew."""
    return f"delete the folder {folder} and run the same call again"


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, str(error) or type(error).__name__) from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
