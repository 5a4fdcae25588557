"""PEFT adapters: a copy of the base model with every weight of the adapter in its place."""

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
from vitscope.models.checkpoints.weights import head_rows, quoted
from vitscope.models.checkpoints.weights_file import read_weights

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

NAME = "default"  # of the adapter inside the model
_WRAPPER_PREFIX = "base_model."  # of the names in the file: the outer wrapper's

# Kinds that change a vision model by weights of their own alone.
KINDS = (
    *("LORA", "LOHA", "LOKR", "ADALORA", "IA3", "OFT", "BOFT", "HRA", "VERA", "LN_TUNING", "FOURIERFT"),
    *("BONE", "MISS", "RANDLORA", "SHIRA", "C3A"),
)

# Others begin by changing the weights of the base model, which the adapter's file does not hold.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

# Settings that name code or files elsewhere.
_REFUSED = ("megatron_config", "layer_replication")


def is_adapter_folder(path: str | Path) -> bool:
    """True for a folder that PEFT's ``save_pretrained`` wrote."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_name(folder: Path) -> str:
    """Return the name of the model that the adapter was trained on; empty if its folder does not say."""
    name = _settings(folder).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def adapter_classes(folder: Path) -> int | None:
    """Return the number of classes of the classifier that was saved with the adapter, None if there is none."""
    saved = _settings(folder).get("modules_to_save")
    names = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    return head_rows(_weights(folder), names) if names else None


def load_adapter(base: nn.Module, folder: str | Path) -> nn.Module:
    """Return a copy of ``base`` with the adapter inside, also with the classifier that was saved with it.

    The layers that the adapter changes are PEFT's, all others keep their class and place.

    Args:
        base: the model that the adapter was trained on; it stays as it is.
        folder: what PEFT's ``save_pretrained`` wrote.

    Raises:
        ModelUnavailableError: peft is not installed, files are damaged, or a weight has no place in the model.
    """
    path = Path(folder)
    settings, weights = _settings(path), _weights(path)
    if importlib.util.find_spec("peft") is None:
        raise ModelUnavailableError(f"{path} is a PEFT adapter: pip install peft")
    import peft

    what = f"{path} cannot be loaded: putting the adapter into {type(base).__name__}"
    with foreign_errors(what), _random_state_restored(base):
        config = peft.PeftConfig.from_peft_type(**_known(peft, settings))
        config.inference_mode = True
        # The tuner by itself: peft's outer wrapper is for training and asks for things that only some libraries have.
        tuner = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](_copied(base), {NAME: config}, NAME)
        if hasattr(tuner, "_cast_adapter_dtype"):
            tuner._cast_adapter_dtype(adapter_name=NAME, autocast_adapter_dtype=True)
        inner = {name.removeprefix(_WRAPPER_PREFIX): tensor.clone() for name, tensor in weights.items()}
        peft.set_peft_model_state_dict(tuner, dict(inner), adapter_name=NAME)
        filled = peft.get_peft_model_state_dict(tuner, adapter_name=NAME, save_embedding_layers=False)
    _check(path, type(base).__name__, inner, filled)
    return _unwrapped(tuner.model, peft.utils.ModulesToSaveWrapper).eval()


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_object(folder / ADAPTER_CONFIG)
    except ValueError as error:
        raise ModelUnavailableError(f"{folder} is no PEFT adapter: {error}") from None
    kind = settings.get("peft_type")
    if kind not in KINDS:
        raise ModelUnavailableError(
            f"{folder} is a PEFT adapter of the kind {str(kind)[:40]!r}, vitscope reads {', '.join(KINDS)}: merge it "
            "into its model and pass that"
        )
    refused = [name for name in _REFUSED if settings.get(name)]
    start = settings.get("init_lora_weights")
    if refused or not (isinstance(start, bool | str | None) and start in _HARMLESS_STARTS):
        reason = f"{refused[0]} is set" if refused else f"init_lora_weights={start!r} changes the base model's weights"
        raise ModelUnavailableError(f"{folder} cannot be loaded: {reason}: merge it into its model and pass that")
    return settings


def _weights(folder: Path) -> dict[str, Tensor]:
    for name in ADAPTER_WEIGHTS:
        if (folder / name).exists():
            return read_weights(folder / name)
    raise ModelUnavailableError(
        f"{folder} is a PEFT adapter without weights: {' or '.join(ADAPTER_WEIGHTS)} is missing"
    )


def _known(peft: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that this version of peft has; another one may only be empty."""
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"]]
    fields = config_class.__dataclass_fields__
    unknown = [name for name, value in settings.items() if name not in fields and value not in (None, False, [], {})]
    if unknown and not {"peft_version"}.issuperset(unknown):
        raise ValueError(f"this version of peft does not know the setting {quoted(unknown)}")
    known = {name: value for name, value in settings.items() if name in fields and name != "auto_mapping"}
    return json.loads(json.dumps(known))


def _copied(base: nn.Module) -> nn.Module:
    copied = copy.deepcopy(base)
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def _check(folder: Path, model: str, weights: Mapping[str, Tensor], filled: Mapping[str, Tensor]) -> None:
    """Refuse an adapter of which a weight went nowhere, or a model of which an adapter weight came from nowhere."""
    lost = [name for name in weights if name not in filled]
    empty = [name for name in filled if name not in weights]
    other = [
        name
        for name, tensor in weights.items()
        if name in filled
        and (filled[name].shape != tensor.shape or not torch.equal(filled[name].cpu(), tensor.to(filled[name].dtype)))
    ]
    if lost or empty or other:
        parts = ((lost, "have no place in the model"), (empty, "are missing"), (other, "did not arrive as they are"))
        story = ", ".join(f"{len(names)} {what} ({quoted(names)})" for names, what in parts if names)
        raise ModelUnavailableError(f"{folder} does not fit {model}: of {len(weights)} adapter weights {story}")


def _unwrapped(module: nn.Module, wrapper: Any) -> nn.Module:
    """Put the saved classifier itself in the place of PEFT's wrapper around the old and the new one."""
    for path, child in list(module.named_modules()):
        if isinstance(child, wrapper):
            parent = module.get_submodule(path.rpartition(".")[0])
            saved: Any = child.modules_to_save
            setattr(parent, path.rpartition(".")[2], saved[child.active_adapter])
    return module


@contextmanager
def _random_state_restored(module: nn.Module) -> Iterator[None]:
    """Adapters are drawn at random before their weights arrive; nobody else's random numbers change by that."""
    devices = {parameter.device.index for parameter in module.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        yield
