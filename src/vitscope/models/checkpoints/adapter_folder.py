"""PEFT adapters: a copy of the base model that contains every weight of the adapter."""

import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.errors import ModelUnavailableError
from vitscope.models.backends.foreign_errors import foreign_errors
from vitscope.models.checkpoints.json_file import read_object
from vitscope.models.checkpoints.weights import head_rows, list_names
from vitscope.models.checkpoints.weights_file import read_weights
from vitscope.validation import short_repr

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

NAME = "default"  # name of the adapter inside the model
_WRAPPER_PREFIX = "base_model."  # prefix of weight names in the file, from PEFT's outer wrapper

# Kinds of adapters that change a vision model only by their own weights.
KINDS = (
    *("LORA", "LOHA", "LOKR", "ADALORA", "IA3", "OFT", "BOFT", "HRA", "VERA", "LN_TUNING", "FOURIERFT"),
    *("BONE", "MISS", "RANDLORA", "SHIRA", "C3A"),
)

# Other initialisations change the weights of the base model, which are not in the adapter's file.
_SAFE_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

# Settings that refer to code or files elsewhere.
_REFUSED = ("megatron_config", "layer_replication")


def is_adapter_folder(path: str | Path) -> bool:
    """Return whether PEFT's ``save_pretrained`` wrote the folder."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_name(folder: Path) -> str:
    """Return the name of the model that the adapter was trained on; empty if its folder does not state it."""
    name = _settings(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def adapter_classes(folder: Path) -> int | None:
    """Return the number of classes of the classifier saved with the adapter; None if there is none."""
    saved = _settings(folder).get("modules_to_save")
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    return head_rows(_weights(folder), names) if names else None


def load_adapter(base: nn.Module, folder: str | Path) -> nn.Module:
    """Return a copy of ``base`` with the adapter and the classifier that was saved with it.

    The layers that the adapter changes become PEFT's layers; all others keep their class and path.

    Args:
        base: the model that the adapter was trained on; it is not changed.
        folder: a folder that PEFT's ``save_pretrained`` wrote.

    Raises:
        ModelUnavailableError: peft is not installed, a file is damaged, or the weights do not fit the model.
    """
    path = Path(folder)
    settings, weights = _settings(path), _weights(path)
    if importlib.util.find_spec("peft") is None:
        raise ModelUnavailableError(f"{path} is a PEFT adapter: pip install peft")
    import peft

    action = f"{path} cannot be loaded: adding the adapter to {type(base).__name__}"
    with foreign_errors(action), _preserved_random_state(base):
        config = peft.PeftConfig.from_peft_type(**_supported_settings(peft, settings))
        config.inference_mode = True
        # The tuner alone: peft's outer wrapper is for training and needs attributes that only some libraries define.
        tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](_copy(base), {NAME: config}, NAME)
        if hasattr(tuner, "_cast_adapter_dtype"):
            tuner._cast_adapter_dtype(adapter_name=NAME, autocast_adapter_dtype=True)
        inner = {name.removeprefix(_WRAPPER_PREFIX): tensor.clone() for name, tensor in weights.items()}
        peft.set_peft_model_state_dict(tuner, dict(inner), adapter_name=NAME)
        filled = peft.get_peft_model_state_dict(tuner, adapter_name=NAME, save_embedding_layers=False)
    _check_filled(path, type(base).__name__, inner, filled)
    return _unwrap(tuner.model, peft.utils.ModulesToSaveWrapper).eval()


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_object(folder / ADAPTER_CONFIG)
    except ValueError as error:
        raise ModelUnavailableError(f"{folder} is not a PEFT adapter: {error}") from None
    kind = settings.get("peft_type")
    if kind not in KINDS:
        raise ModelUnavailableError(
            f"{folder} is a PEFT adapter of the unsupported kind {short_repr(kind, 40)}, not one of "
            f"{', '.join(KINDS)}: merge it into its model and pass the merged model"
        )
    refused = [name for name in _REFUSED if settings.get(name)]
    initialisation = settings.get("init_lora_weights")
    if refused or not (isinstance(initialisation, bool | str | None) and initialisation in _SAFE_INITIALISATIONS):
        reason = f"init_lora_weights={initialisation!r} changes the base model's weights"
        if refused:
            reason = f"{refused[0]} is set"
        raise ModelUnavailableError(
            f"{folder} cannot be loaded: {reason}: merge it into its model and pass the merged model"
        )
    return settings


def _weights(folder: Path) -> dict[str, Tensor]:
    for name in ADAPTER_WEIGHTS:
        if (folder / name).exists():
            return read_weights(folder / name)
    raise ModelUnavailableError(
        f"{folder} is a PEFT adapter without weights: {' or '.join(ADAPTER_WEIGHTS)} is missing"
    )


def _supported_settings(peft: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that this version of peft has; any other setting must be empty."""
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
    fields = config_class.__dataclass_fields__
    unknown = [name for name, value in settings.items() if name not in fields and value not in (None, False, [], {})]
    if unknown and not {"peft_version"}.issuperset(unknown):
        raise ValueError(f"this version of peft does not support the setting {list_names(unknown)}")
    supported = {name: value for name, value in settings.items() if name in fields and name != "auto_mapping"}
    return json.loads(json.dumps(supported))


def _copy(base: nn.Module) -> nn.Module:
    """Return a copy of a module without gradients."""
    module = copy.deepcopy(base)
    for parameter in module.parameters():
        parameter.grad = None
    return module


def _check_filled(folder: Path, model: str, weights: Mapping[str, Tensor], filled: Mapping[str, Tensor]) -> None:
    """Refuse an adapter if one of its weights was not used, or if the model has an adapter weight from elsewhere."""
    unused = [name for name in weights if name not in filled]
    missing = [name for name in filled if name not in weights]
    changed = [
        name
        for name, tensor in weights.items()
        if name in filled
        and (filled[name].shape != tensor.shape or not torch.equal(filled[name].cpu(), tensor.to(filled[name].dtype)))
    ]
    problems = ((unused, "do not exist in the model"), (missing, "are missing"), (changed, "differ in the model"))
    listed = ", ".join(f"{len(names)} {problem} ({list_names(names)})" for names, problem in problems if names)
    if listed:
        raise ModelUnavailableError(f"{folder} does not fit {model}: of {len(weights)} adapter weights {listed}")


def _unwrap(module: nn.Module, wrapper: Any) -> nn.Module:
    """Return the module with PEFT's wrapper around the original and the saved classifier replaced by the saved one."""
    for path, child in list(module.named_modules()):
        if isinstance(child, wrapper):
            parent = module.get_submodule(path.rpartition(".")[0])
            saved: Any = child.modules_to_save
            setattr(parent, path.rpartition(".")[2], saved[child.active_adapter])
    return module


@contextmanager
def _preserved_random_state(module: nn.Module) -> Iterator[None]:
    """Restore torch's random state: PEFT draws adapters at random before their weights are loaded."""
    devices = {parameter.device.index for parameter in module.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        yield
