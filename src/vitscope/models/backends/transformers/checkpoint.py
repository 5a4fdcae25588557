"""transformers: fill a class from a checkpoint, which is refused unless every weight comes from the checkpoint."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from vitscope.errors import ModelUnavailableError, first_line
from vitscope.models.backends.foreign_errors import foreign_errors
from vitscope.models.backends.transformers.families import HEADS
from vitscope.models.backends.transformers.heads import mismatch_from
from vitscope.models.checkpoints.json_file import read_object
from vitscope.models.checkpoints.weights import (
    FLOATS,
    Mismatch,
    common_prefixes,
    is_computed,
    list_names,
    warn_about_prefix,
)
from vitscope.models.checkpoints.weights_file import read_weights

POOLER = "pooler."
SAFE_FILES = ("model.safetensors", "model.safetensors.index.json")
TORCH_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_SAFE_FLOATS = ("F64", "F32", "F16", "BF16")
FEATURES_HINT = 'output="features" loads it without a classifier'


@dataclass(frozen=True)
class Checkpoint:
    """The location of the weights of a model, or the weights themselves.

    Attributes:
        name: name of the model in messages.
        source: local folder or hub id.
        local_only: whether the hub's client must use its cache alone.
        state: weights that are used instead of those of ``source``; None to use those.
    """

    name: str
    source: str
    local_only: bool
    state: Mapping[str, Tensor] | None = None

    def files(self) -> list[Path]:
        """Return the weights files, including the shards that an index lists; empty if there are none."""
        for name in (*SAFE_FILES, *TORCH_FILES):
            path = self.file(name)
            if path is None:
                continue
            if path.suffix != ".json":
                return [path]
            try:
                shards = sorted(set(read_object(path)["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ModelUnavailableError(f"{self.name} cannot be loaded: {name}: {first_line(error)}") from None
            files = [self.file(str(shard)) for shard in shards]
            missing = [shard for shard, file in zip(shards, files, strict=True) if file is None]
            if missing:
                raise ModelUnavailableError(f"{self.name} cannot be loaded: {list_names(missing)} is missing")
            return [file for file in files if file is not None]
        return []

    def file(self, name: str) -> Path | None:
        """Return the path of a file of the model, from the folder or the hub; None if it does not exist."""
        if Path(self.source).is_dir():
            path = Path(self.source) / name
            return path if path.is_file() else None
        path = cached_file(
            self.source,
            name,
            local_files_only=self.local_only,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else Path(path)

    def read(self) -> dict[str, Tensor]:
        """Return all weights by their names in the file."""
        if self.state is not None:
            return dict(self.state)
        merged: dict[str, Tensor] = {}
        for file in self.files():
            merged |= read_weights(file)
        return merged


def fill(
    module_class: Any, config: Any, checkpoint: Checkpoint, *, dtype: torch.dtype | None, untrained_head: bool = False
) -> nn.Module:
    """Return a model of this class, every weight of which comes from the checkpoint.

    A pooling layer that was not saved is removed from the model. Leftover weights must belong to the class that the
    configuration names.

    Args:
        module_class: the class of transformers.
        config: its configuration.
        checkpoint: the weights.
        dtype: precision of the weights; None for that of the checkpoint.
        untrained_head: whether the classifier may be missing, because the caller replaces it.

    Raises:
        ModelUnavailableError: weights are missing, left over, or do not fit.
    """
    if getattr(config, "quantization_config", None):
        raise ModelUnavailableError(f"{checkpoint.name} is quantized: pass a model with floating-point weights")
    _check_dtypes(checkpoint)
    filling = _Filling(module_class, config, checkpoint, dtype, untrained_head)
    module, mismatch = filling.load(checkpoint.state)
    if not mismatch:
        return module
    if mismatch.missing and mismatch.unexpected:
        for prefix, renamed in _rename(checkpoint.read(), module_class):
            renamed_module, renamed_mismatch = filling.load(renamed)
            if not renamed_mismatch:
                warn_about_prefix(checkpoint.name, prefix.lstrip("+"), added=prefix.startswith("+"))
                renamed_module.config._name_or_path = module.config._name_or_path
                return renamed_module
    raise ModelUnavailableError(_refusal(module_class, checkpoint, mismatch))


@dataclass(frozen=True)
class _Filling:
    """One class and the checkpoint that fills it."""

    module_class: Any
    config: Any
    checkpoint: Checkpoint
    dtype: torch.dtype | None
    untrained_head: bool

    def load(self, state: Mapping[str, Tensor] | None) -> tuple[Any, Mismatch]:
        """Return the class filled with these weights, or with the checkpoint's files, and the differences."""
        options = {} if self.dtype is None else {"dtype": self.dtype}
        with foreign_errors(f"{self.checkpoint.name} cannot be loaded: building {self.module_class.__name__}"):
            module, info = self._from_pretrained(self.module_class, state, **options)
        mismatch = mismatch_from(info)
        if self.untrained_head:
            heads = [name for name in mismatch.missing if name.partition(".")[0] in HEADS]
            shapes = tuple(entry for entry in mismatch.shapes if entry[0].partition(".")[0] not in HEADS)
            mismatch = replace(
                mismatch, missing=tuple(name for name in mismatch.missing if name not in heads), shapes=shapes
            )
        mismatch = _remove_unsaved_pooler(module, mismatch)
        if mismatch.unexpected:
            mismatch = replace(mismatch, unexpected=self._foreign(mismatch.unexpected, state))
        return module, mismatch

    def _foreign(self, unexpected: tuple[str, ...], state: Mapping[str, Tensor] | None) -> tuple[str, ...]:
        """Return the leftover names that are also missing from the class that the configuration names."""
        for name in self.config.architectures or ():
            saved_class = getattr(transformers, name, None) if isinstance(name, str) else None
            if not isinstance(saved_class, type) or not issubclass(saved_class, transformers.PreTrainedModel):
                continue
            if saved_class is self.module_class:
                continue
            on_meta = {"device_map": "meta"} if importlib.util.find_spec("accelerate") else {}
            with foreign_errors(f"{self.checkpoint.name} cannot be loaded: building {name}"):
                _, info = self._from_pretrained(saved_class, state, **on_meta)
            return tuple(key for key in sorted(info["unexpected_keys"]) if not is_computed(key))
        return tuple(key for key in unexpected if not is_computed(key))

    def _from_pretrained(
        self, module_class: Any, state: Mapping[str, Tensor] | None, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
        config = self.config
        if not isinstance(config, module_class.config_class):
            config = getattr(config, "vision_config", config)
        if state is not None:
            return module_class.from_pretrained(None, config=config, state_dict=dict(state), **options)
        options["local_files_only"] = self.checkpoint.local_only
        # A tower's class extracts its own section from the configuration of the whole model.
        if isinstance(self.config, module_class.config_class):
            options["config"] = self.config
        return module_class.from_pretrained(self.checkpoint.source, **options)


def _remove_unsaved_pooler(module: Any, mismatch: Mismatch) -> Mismatch:
    """Remove a pooling layer that was not saved, and return the other differences.

    The features are then those of the last tokens.
    """
    pooler = getattr(module, "pooler", None)
    if not isinstance(pooler, nn.Module):
        return mismatch
    names = {f"{POOLER}{name}" for name in pooler.state_dict()}
    if not names or not names.issubset(mismatch.missing):
        return mismatch
    module.pooler = None
    return replace(mismatch, missing=tuple(name for name in mismatch.missing if name not in names))


def _rename(state: Mapping[str, Tensor], module_class: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the weights without a shared prefix, or with the prefix of the class's backbone (then marked with +)."""
    for prefix in common_prefixes(state):
        yield prefix, {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for prefix in {f"{module_class.base_model_prefix}.", "vision_model."} - {"."}:
        yield f"+{prefix}", {f"{prefix}{name}": tensor for name, tensor in state.items()}


def _check_dtypes(checkpoint: Checkpoint) -> None:
    """Refuse weights that are not floating-point numbers, which transformers would convert silently."""
    refused: list[str] = []
    for file in [] if checkpoint.state is not None else checkpoint.files():
        if file.suffix == ".safetensors":
            with foreign_errors(f"{checkpoint.name} cannot be loaded: reading {file.name}"), safe_open(file, "pt") as f:
                dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}  # noqa: SIM118
            refused += [f"{name}: {dtype}" for name, dtype in dtypes.items() if dtype not in _SAFE_FLOATS]
        else:
            refused += _not_floating(read_weights(file))
    if checkpoint.state is not None:
        refused += _not_floating(checkpoint.state)
    refused = [entry for entry in refused if not is_computed(entry.partition(":")[0])]
    if refused:
        raise ModelUnavailableError(
            f"{checkpoint.name} cannot be loaded: {len(refused)} weights are not floating-point numbers "
            f"({list_names(refused)})"
        )


def _not_floating(state: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name}: {tensor.dtype}"
        for name, tensor in state.items()
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided
    ]


def _refusal(module_class: Any, checkpoint: Checkpoint, mismatch: Mismatch) -> str:
    hint = ""
    heads = [name for name in mismatch.missing if name.partition(".")[0] in HEADS]
    if heads and len(heads) == len(mismatch.missing) and not (mismatch.unexpected or mismatch.shapes):
        hint = f": {FEATURES_HINT}"
    return (
        f"{checkpoint.name} cannot be loaded: its weights do not fill {module_class.__name__}, and vitscope does not "
        f"run on random weights ({mismatch}){hint}"
    )
