"""Folders in the layout of timm's hub repositories: a config.json that names the architecture, and a weights file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscope.errors import ModelUnavailableError, UnknownModelError
from vitscope.models.checkpoints.json_file import read_object
from vitscope.models.checkpoints.values import is_number
from vitscope.models.checkpoints.weights_file import SUFFIXES

# In the order in which timm itself looks for them.
WEIGHTS_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WRAPPER_PREFIX = "timm_model."  # prefix of weight names in folders that transformers wrote

# Settings of a configuration that describe the images and classes of a model, but not where to fetch weights.
_FACTS = (
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode"),
    *("test_crop_pct", "mean", "std", "num_classes", "pool_size", "test_pool_size", "first_conv", "classifier"),
    *("label_names", "label_descriptions", "tag", "license"),
)


@dataclass(frozen=True)
class TimmFolder:
    """The description of the model in a folder: how to build it, and its classes.

    Attributes:
        path: the folder.
        architecture: timm's name of the architecture.
        facts: timm's ``pretrained_cfg``, without sources of weights.
        options: arguments of the model's class.
        labels: names of the classes; None if the folder does not state them.
        wrapped: True if transformers wrote the folder; its weight names then have a prefix.
    """

    path: Path
    architecture: str
    facts: Mapping[str, Any]
    options: Mapping[str, Any]
    labels: tuple[str, ...] | None
    wrapped: bool

    def weights_file(self) -> Path:
        """Return the weights file.

        Raises:
            ModelUnavailableError: there is none, or there are several and none has a standard name.
        """
        for name in WEIGHTS_FILES:
            if (self.path / name).exists():
                return self.path / name
        files = sorted(file for file in self.path.iterdir() if file.suffix in SUFFIXES)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ModelUnavailableError(f"{self.path} needs exactly one weights file, but it holds {names}: keep one")
        return files[0]


def is_timm_folder(path: Path) -> bool:
    """Return whether the config.json of a folder names an architecture of timm."""
    try:
        config = read_object(path / "config.json")
    except ValueError:
        return False
    return isinstance(config.get("architecture"), str) and config.get("model_type", "timm_wrapper") == "timm_wrapper"


def read_folder(path: Path) -> TimmFolder:
    """Return the checked content of the folder's config.json.

    Raises:
        UnknownModelError: the folder does not contain a model of timm.
    """
    try:
        config = read_object(path / "config.json")
        architecture = config.get("architecture")
        if not isinstance(architecture, str):
            raise ValueError("config.json names no architecture of timm")
        # Older files have the facts next to the architecture.
        facts = _require_object(config, "pretrained_cfg") if "pretrained_cfg" in config else dict(config)
        if "labels" in config and "label_names" not in config:
            config["label_names"] = config["labels"]
        for name in ("num_classes", "label_names", "label_descriptions"):
            if config.get(name) is not None:
                facts[name] = config[name]
        if config.get("architectures") == ["TimmWrapperModel"]:
            facts["num_classes"] = 0
            facts.pop("label_names", None)
        facts = {name: _as_tuple(facts[name]) for name in _FACTS if facts.get(name) is not None}
        _check_facts(facts)
        options = _require_object(config, "model_args") if config.get("model_args") is not None else {}
        labels = _labels(facts)
    except ValueError as error:
        raise UnknownModelError(f"{path} does not hold a model of timm: {error}") from None
    wrapped = config.get("model_type") == "timm_wrapper"
    return TimmFolder(path, architecture, facts, options, labels, wrapped)


def _require_object(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = config[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name} of config.json is not a JSON object")
    return dict(value)


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Refuse values that timm would replace by its defaults, or that would cause errors later."""

    def is_numbers(name: str, count: int) -> bool:
        values = facts.get(name)
        return values is None or (isinstance(values, tuple) and len(values) == count and all(map(is_number, values)))

    size = facts.get("input_size", (3, 1, 1))
    if not is_numbers("input_size", 3) or not all(isinstance(value, int) and value > 0 for value in size):
        raise ValueError(f"input_size of config.json is {size!r}, channels, height and width are expected")
    for name in ("mean", "std"):
        if not is_numbers(name, size[0]) or (name == "std" and not all(value > 0 for value in facts.get(name, ()))):
            raise ValueError(f"{name} of config.json is {facts[name]!r}, one number per channel is expected")
    ratio = facts.get("crop_pct", 1.0)
    if not is_number(ratio) or ratio <= 0:
        raise ValueError(f"crop_pct of config.json is {ratio!r}, a positive number is expected")
    classes = facts.get("num_classes", 0)
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise ValueError(f"num_classes of config.json is {classes!r}, a whole number is expected")


def _labels(facts: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the description of each class, or its name if it has no description."""
    names, descriptions = facts.get("label_names"), facts.get("label_descriptions") or {}
    if names is None:
        return None
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        raise ValueError("label_names of config.json is not a list of names")
    if not isinstance(descriptions, Mapping):
        raise ValueError("label_descriptions of config.json is not a JSON object")
    if len(names) != facts.get("num_classes", len(names)):
        raise ValueError(f"config.json has {facts['num_classes']} classes and {len(names)} label_names")
    labels = tuple(descriptions.get(name, name) for name in names)
    if not all(isinstance(label, str) for label in labels):
        raise ValueError("label_descriptions of config.json has a description that is not text")
    return labels


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
