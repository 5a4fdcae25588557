"""transformers: a model with other classes, what it is built from, and building it again."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from vitscope.errors import ModelUnavailableError, WorkError
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.backends.library_logging import quiet as quiet
from vitscope.models.checkpoints.paths import PROCESSOR_FILE
from vitscope.models.checkpoints.weights import Mismatch, quoted

HEADS = ("classifier", "cls_classifier", "distillation_classifier")
POOLERS = ("pooler", "head")  # of bare models; their classes with a classifier may lack it
# A vision tower by itself is classified by the class of the whole model.
_WITH_TEXT = {
    "clip_vision_model": ("CLIPForImageClassification", "CLIPConfig"),
    "siglip_vision_model": ("SiglipForImageClassification", "SiglipConfig"),
}


def reset_classifier(module: Any, labels: Sequence[str]) -> nn.Module | None:
    """A new model with an untrained classifier and the weights of ``module``; None where transformers has no class.

    Raises:
        WorkError: a weight of ``module`` has no place in the class with a classifier.
    """
    if not isinstance(module, transformers.PreTrainedModel) and hasattr(module, "get_base_model"):
        module = module.get_base_model()  # PEFT's wrapper
    module_class = _class_with_head(module)
    if module_class is None:
        return None
    config = copy.deepcopy(module.config)
    if not isinstance(config, module_class.config_class):
        config = module_class.config_class(vision_config=config.to_dict())
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    made = module_class._from_config(config, attn_implementation=module.config._attn_implementation)
    if isinstance(module, module_class):
        _copy_backbone(module, made)
    else:
        backbone = "vision_model" if hasattr(config, "vision_config") else made.base_model_prefix
        _copy_backbone(getattr(module, backbone, module), getattr(made, backbone))
    like = next(module.parameters())
    return made.to(like.device, like.dtype).train(module.training)


def get_classifiers(module: Any) -> list[nn.Linear]:
    """The linear layers that give the logits."""
    return [getattr(module, name) for name in HEADS if isinstance(getattr(module, name, None), nn.Linear)]


def architecture(module: Any) -> Mapping[str, Any]:
    """What :func:`build` needs, as JSON has it."""
    return {"class": type(module).__name__, "config": json.loads(module.config.to_json_string(use_diff=False))}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """The model without its weights.

    Raises:
        ModelUnavailableError: the class is not a vision model of transformers.
    """
    module_class = _vision_class(architecture["class"])
    config = dict(architecture["config"])
    if any("timm" in key and config[key] for key in config) or config.get("auto_map"):
        raise ModelUnavailableError(f"{module_class.__name__} cannot be built: its config asks for code of others")
    return module_class._from_config(module_class.config_class.from_dict(config))


def _vision_class(name: Any) -> Any:
    """Return the class of transformers that has this name, if it is a model that takes images."""
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) and found.__name__ == name
    if not is_model or name.startswith("Timm") or getattr(found, "main_input_name", "") != "pixel_values":
        raise ModelUnavailableError(f"{str(name)[:80]!r} is not a vision model of transformers: it cannot be built")
    return found


def write(module: Any, folder: Path, preprocessing: Preprocessing | None) -> None:
    """The folder as transformers itself writes it."""
    with quiet():
        module.save_pretrained(folder)
    if preprocessing is not None:
        processor = _processor(preprocessing)
        (folder / PROCESSOR_FILE).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, architecture: Mapping[str, Any]) -> nn.Module:
    """What :func:`write` wrote.

    Raises:
        ValueError: the weights are of another model; transformers itself would draw what is missing at random.
    """
    module_class = _vision_class(architecture["class"])
    with quiet():
        module, info = module_class.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    mismatch = mismatch_from(info)
    if mismatch:
        raise ValueError(f"its weights do not fit {module_class.__name__}: {mismatch}")
    return module


def mismatch_from(info: Mapping[str, Any]) -> Mismatch:
    """Read the loading report of transformers."""
    return Mismatch(
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(info["unexpected_keys"])),
        tuple((name, tuple(file), tuple(own)) for name, file, own in sorted(info["mismatched_keys"])),
    )


def _copy_backbone(module: nn.Module, into: nn.Module) -> None:
    """Copy every weight but those of the classifier and of a pooling layer that ``into`` does not have.

    Raises:
        WorkError: another weight has no place in ``into``.
    """
    own, weights = into.state_dict(), module.state_dict()
    heads = {name for name in weights if name.partition(".")[0] in HEADS}
    backbone = {name: tensor for name, tensor in weights.items() if name not in heads}
    fits = {name: tensor for name, tensor in backbone.items() if name in own and own[name].shape == tensor.shape}
    # Masked image modelling replaces patches by a token that no classifier ever sees.
    unread = {name for name in backbone if name.partition(".")[0] in POOLERS or name.endswith("mask_token")}
    lost = [name for name in backbone if name not in fits and name not in unread]
    untrained = [name for name in own if name not in fits and name.partition(".")[0] not in (*HEADS, *POOLERS)]
    if lost or untrained:
        raise WorkError(
            f"{type(module).__name__} cannot get other classes: {len(lost)} of its {len(backbone)} weights have no "
            f"place in {type(into).__name__} ({quoted(lost)}), and {len(untrained)} weights there would be untrained "
            f"({quoted(untrained)})"
        )
    into.load_state_dict(fits, strict=False)


def _class_with_head(module: Any) -> Any:
    if get_classifiers(module):
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
