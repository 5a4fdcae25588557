"""The backend of torchvision: load a model by name, and describe a live model.

Its vision transformer reads a CLS token and has one fixed, square input size.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

from vitscope.attention.windows import Windows
from vitscope.errors import CallError, ModelUnavailableError, UnknownModelError
from vitscope.grid import Grid
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.checkpoints.hub import host_responds
from vitscope.models.checkpoints.weights import fit_weights, head_rows
from vitscope.models.checkpoints.weights_file import read_weights
from vitscope.models.forward import Classes, MeanOfTokens, NoClasses, Observed
from vitscope.models.hierarchy import Hierarchy, Merging, Projection, WindowBlock, restore_attributes
from vitscope.models.layout import Layout
from vitscope.models.vision_model import VisionModel

_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def load(
    name: str,
    *,
    pretrained: bool,
    image_size: tuple[int, int] | None,
    dtype: torch.dtype | None,
    weights: str | Path | None = None,
    classes: int | None = None,
) -> VisionModel:
    """Load a classification model by torchvision's name.

    Args:
        name: torchvision's name, such as ``"vit_b_16"``.
        pretrained: whether to load pretrained weights; False gives random weights.
        image_size: height and width in pixels; None for the size of the pretrained weights.
        dtype: precision of the weights; None for torchvision's choice.
        weights: weights file for this architecture, used instead of the pretrained weights.
        classes: number of classes of a classifier that stays untrained because the caller replaces it.
    """
    if not has_model(name):
        names = torchvision.models.list_models(module=torchvision.models)
        close = difflib.get_close_matches(name, names, n=3)
        hint = f": did you mean {', '.join(close)}?" if close else ": torchvision.models.list_models() lists all names"
        raise UnknownModelError(f"torchvision has no model {name!r}{hint}")
    pretrained_weights = torchvision.models.get_model_weights(name).DEFAULT
    transformer = name.startswith("vit_")
    options: dict[str, Any] = {}
    if transformer:
        # Some weights were trained on larger images than the default size of the class.
        height, width = image_size or pretrained_weights.meta["min_size"]
        if height != width:
            raise CallError(f"torchvision's {name} takes square images only, not {height}×{width}")
        options["image_size"] = height
    try:
        module = torchvision.models.get_model(name, weights=None, **options)
    except AssertionError as error:
        raise CallError(f"torchvision's {name} cannot be built for {options['image_size']} pixels: {error}") from None
    if weights is not None:
        module = _create_filled(name, options, read_weights(weights), str(weights))
    elif pretrained:
        state = _pretrained_state(name, pretrained_weights)
        if transformer:
            state = _resample_positions(module, state)
        module.load_state_dict(state)
    if classes is not None:
        module = reset_classifier(module, [""] * classes)
    module = module if dtype is None else module.to(dtype)
    return wrap(module.eval(), image_size=image_size, name=f"torchvision:{name}", weights=pretrained_weights)


def _resample_positions(module: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights with the position embedding resampled to the module's input size."""
    return torchvision.models.vision_transformer.interpolate_embeddings(
        module.image_size, module.patch_size, dict(state)
    )


def _create_filled(
    name: str, options: Mapping[str, Any], state: Mapping[str, torch.Tensor], weights_name: str
) -> nn.Module:
    """Return the model with these weights and their number of classes."""
    template = torchvision.models.get_model(name, weights=None, **options)
    paths = [path for path, child in template.named_modules() if isinstance(child, nn.Linear)]
    rows = head_rows(state, paths[-1:])
    classes = {} if rows is None else {"num_classes": rows}
    module: Any = torchvision.models.get_model(name, weights=None, **options, **classes)
    try:
        module.load_state_dict(fit_weights(module, state, weights_name))
    except ModelUnavailableError:
        if "image_size" not in options:
            raise
        # Weights of the default size are resampled to the size that the caller requested.
        default = torchvision.models.get_model(name, weights=None, **classes)
        module.load_state_dict(_resample_positions(module, fit_weights(default, state, weights_name)))
    return module


def _pretrained_state(name: str, weights: Any) -> Any:
    """Return pretrained weights from the cache or the network."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    reason = "the server did not respond"
    if cached.exists() or host_responds(weights.url):
        try:
            return weights.get_state_dict(progress=False, check_hash=True)
        except Exception as error:
            reason = type(error).__name__
    raise ModelUnavailableError(
        f"torchvision:{name} is not in the local cache and could not be downloaded: use the bundled vit-nano, a local "
        f"folder, or pretrained=False ({reason})"
    )


def has_model(name: str) -> bool:
    """Return whether torchvision has a classifier of this name."""
    return name in torchvision.models.list_models(module=torchvision.models)


def wrap(
    module: nn.Module, *, image_size: tuple[int, int] | None, name: str | None = None, weights: Any = None
) -> VisionModel:
    """Describe a live torchvision model.

    Args:
        module: a model of torchvision; it is not changed.
        image_size: height and width in pixels; None for the module's own size.
        name: name in messages and results; by default that of the class.
        weights: torchvision's weights entry, which states preprocessing and labels; by default one for ImageNet.

    Raises:
        CallError: the module is a vision transformer with another input size.
    """
    layout = None
    size = image_size
    if isinstance(module, torchvision.models.VisionTransformer):
        layout = Layout((module.patch_size, module.patch_size), ("cls",), {"cls": 1.0})
        if size is not None and size != (module.image_size, module.image_size):
            raise CallError(
                f"this module takes {module.image_size}×{module.image_size} pixels, not {size[0]}×{size[1]}"
            )
        size = (module.image_size, module.image_size)
    if isinstance(module, torchvision.models.SwinTransformer):
        patches: Any = module.features[0][0]
        layout = Layout(tuple(patches.stride), (), {"patches": 1.0}, _swin(module))
    # The last layer is the head's linear layer, unless another one follows it, such as a softmax.
    classifier = [child for child in module.modules() if not any(True for _ in child.children())][-1:]
    own_forward = type(module).__module__.startswith("torchvision.")
    head = get_classifiers(module)
    name = name or f"torchvision:{type(module).__name__}"
    embeds = not head and any(isinstance(layer, nn.Identity) for layer in (_head(module), *classifier))
    forward: Any = NoClasses(module) if embeds else Observed(module, name)
    if head and own_forward and classifier == head:
        forward = Classes(module, name)
    labels = tuple((weights or torchvision.models.ViT_B_16_Weights.DEFAULT).meta["categories"])
    fits = bool(head) and head[0].out_features == len(labels)
    preprocessing = _preprocessing(weights or torchvision.models.ViT_B_16_Weights.DEFAULT, size)
    if weights is None:
        preprocessing = replace(
            preprocessing, source="torchvision's for ImageNet, because a live module does not state its own"
        )
    return VisionModel(
        name,
        "torchvision",
        module,
        forward,
        layout,
        preprocessing,
        labels if fits else None,
        {"torchvision": torchvision.__version__},
        MeanOfTokens(module) if embeds else None,
        verified=own_forward,
    )


def _head(module: Any) -> Any:
    """Return the classifier, of whatever class; None if the module has none."""
    return module.heads if isinstance(module, VisionTransformer) else getattr(module, "head", None)


def _swin(module: Any) -> Hierarchy:
    """Return the hierarchy of Swin or Swin v2: patch merging separates the stages."""
    attentions = [child for child in module.modules() if isinstance(child, ShiftedWindowAttention)]
    return Hierarchy(
        blocks={
            f"{name}.attn": WindowBlock(block, partial(_windows, block.attn), _projection(block))
            for name, block in module.named_modules()
            if isinstance(block, SwinTransformerBlock)
        },
        mergings={
            name: Merging(child, child.norm, child.reduction)
            for name, child in module.named_modules()
            if isinstance(child, PatchMerging | PatchMergingV2)
        },
        before_pooling=module.norm,
        classifier=module.head if isinstance(module.head, nn.Linear) else None,
        # Some versions of torchvision write the shift for a small grid into the list itself.
        preserved_state=partial(restore_attributes, attentions, ("shift_size",)),
    )


def _windows(attention: Any, grid: Grid) -> Windows:
    height, width = attention.window_size
    shift_down, shift_across = attention.shift_size
    # An axis with a single window is not shifted.
    return Windows((height, width), (shift_down * (grid.height > height), shift_across * (grid.width > width)))


def _projection(block: Any) -> Projection | None:
    if isinstance(block.attn, ShiftedWindowAttentionV2):
        return None
    return Projection(block.norm1, (block.attn.qkv,), block.attn.proj, block.attn.num_heads)


def _preprocessing(weights: Any, size: tuple[int, int] | None) -> Preprocessing:
    return replace(read_transforms(weights.transforms(), size), source=f"torchvision's {weights}")


def read_transforms(transforms: Any, size: tuple[int, int] | None) -> Preprocessing:
    """Return torchvision's ``weights.transforms()`` as a Preprocessing.

    Args:
        transforms: the ``ImageClassification`` preset of a weights entry.
        size: height and width in pixels; None for the size of the preset.
    """
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    preprocessing = Preprocessing(
        size=(crop, crop),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        fit="crop",
        resize_to=(resize, resize),
        resample=_RESAMPLE[transforms.interpolation.value],
        round_half_even=True,
    )
    return preprocessing if size is None or size == preprocessing.size else preprocessing.resized(size)


def reset_classifier(module: Any, labels: Sequence[str]) -> nn.Module:
    """Return the same module with an untrained classifier."""
    (old,) = get_classifiers(module)
    new = nn.Linear(old.in_features, len(labels)).to(old.weight.device, old.weight.dtype)
    if isinstance(module, VisionTransformer):
        module.heads.head, module.num_classes = new, len(labels)
    else:
        module.head = new
    return module


def get_classifiers(module: Any) -> list[nn.Linear]:
    """Return the linear layer that computes the logits; empty for a backbone."""
    if isinstance(module, VisionTransformer):
        head = getattr(module.heads, "head", None)
        return [head] if isinstance(head, nn.Linear) else []
    return [module.head] if isinstance(getattr(module, "head", None), nn.Linear) else []


def architecture(module: Any) -> Mapping[str, Any]:
    """Return what :func:`build` needs, as JSON values: the arguments of the class, read from the module."""
    (head,) = get_classifiers(module)
    if isinstance(module, VisionTransformer):
        names = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "num_classes", "representation_size")
        layers = list(module.encoder.layers)
        counts = {"num_layers": len(layers), "num_heads": layers[0].num_heads}
        return {"class": "VisionTransformer", "options": {name: getattr(module, name) for name in names} | counts}
    stages = list(module.features[1::2])
    block, patches = stages[0][0], module.features[0][0]
    options = {
        "patch_size": list(patches.kernel_size),
        "embed_dim": patches.out_channels,
        "depths": [len(stage) for stage in stages],
        "num_heads": [stage[0].attn.num_heads for stage in stages],
        "window_size": list(block.attn.window_size),
        "mlp_ratio": block.mlp[0].out_features / block.mlp[0].in_features,
        "num_classes": head.out_features,
    }
    return {"class": type(block).__name__, "options": options}


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """Build a model with random weights from the result of :func:`architecture`."""
    if architecture["class"] == "VisionTransformer":
        return VisionTransformer(**architecture["options"])
    second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    versions: Mapping[str, Any] = {"SwinTransformerBlock": {}, "SwinTransformerBlockV2": second}
    return SwinTransformer(**architecture["options"], **versions[architecture["class"]])
