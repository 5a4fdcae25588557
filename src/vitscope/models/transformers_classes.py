"""transformers: a model with other classes, what it is built from, and building it again."""

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers.utils import logging as transformers_logging

from vitscope.picture import Preprocessing

HEADS = ("classifier", "cls_classifier", "distillation_classifier")
# A vision tower by itself is classified by the class of the whole model.
_WITH_TEXT = {
    "clip_vision_model": ("CLIPForImageClassification", "CLIPConfig"),
    "siglip_vision_model": ("SiglipForImageClassification", "SiglipConfig"),
}


def with_classes(module: Any, labels: Sequence[str]) -> nn.Module | None:
    """A new model with an untrained classifier and the weights of ``module``; None where transformers has no class."""
    module_class = _class_with_head(module)
    if module_class is None:
        return None
    config = copy.deepcopy(module.config)
    if not isinstance(config, module_class.config_class):
        config = module_class.config_class(vision_config=config.to_dict())
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    made = module_class._from_config(config, attn_implementation=module.config._attn_implementation)
    into = made
    if not isinstance(module, module_class):
        into = made.vision_model if hasattr(config, "vision_config") else getattr(made, made.base_model_prefix)
    # A bare model may have a pooling layer that its class with a head has not.
    wanted = into.state_dict().keys()
    weights = {name: tensor for name, tensor in module.state_dict().items() if name in wanted}
    heads = {name for name in weights if name.partition(".")[0] in HEADS}
    into.load_state_dict({name: tensor for name, tensor in weights.items() if name not in heads}, strict=False)
    like = next(module.parameters())
    return made.to(like.device, like.dtype).train(module.training)


def heads(module: Any) -> list[nn.Linear]:
    """The linear layers that give the logits."""
    return [getattr(module, name) for name in HEADS if isinstance(getattr(module, name, None), nn.Linear)]


def architecture(module: Any) -> Mapping[str, Any]:
    """What :func:`build` needs, as JSON has it."""
    return {"class": type(module).__name__, "config": json.loads(module.config.to_json_string(use_diff=False))}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The model without its weights."""
    module_class = getattr(transformers, architecture["class"])
    return module_class._from_config(module_class.config_class.from_dict(dict(architecture["config"])))


def write(module: Any, folder: Path, preprocessing: Preprocessing | None) -> None:
    """The folder as transformers itself writes it."""
    with quiet():
        module.save_pretrained(folder)
    if preprocessing is not None:
        processor = _processor(preprocessing)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, architecture: Mapping[str, Any]) -> nn.Module:
    """What :func:`write` wrote.

    Raises:
        ValueError: the weights are of another model; transformers itself would draw what is missing at random.
    """
    with quiet():
        module, found = getattr(transformers, architecture["class"]).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    odd = [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
    if odd:
        raise ValueError(f"its weights are of another model ({odd[0]})")
    return module


def _class_with_head(module: Any) -> Any:
    if heads(module):
        return type(module)
    config: Any = module.config
    if config.model_type in _WITH_TEXT:
        return getattr(transformers, _WITH_TEXT[config.model_type][0])
    found = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _processor(preprocessing: Preprocessing) -> dict[str, Any]:
    height, width = preprocessing.size
    fill_height, fill_width = preprocessing.resize_to or preprocessing.size
    cuts = preprocessing.fit == "crop"
    filled = {"height": fill_height, "width": fill_width}
    crop = {"do_center_crop": True, "crop_size": {"height": height, "width": width}}
    return {
        "image_processor_type": "CLIPImageProcessor" if cuts else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(fill_height, fill_width)} if cuts else filled,
        **(crop if cuts else {}),
        "resample": int(preprocessing.resample),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and notes of the library on a terminal that belongs to vitscope."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
