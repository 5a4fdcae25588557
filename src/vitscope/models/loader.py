"""load(): return a :class:`VisionModel` from a name, a folder or a live module."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.errors import CallError, ModelUnavailableError, UnknownModelError, first_line
from vitscope.images.preprocessing import MAX_SIDE
from vitscope.models.backends.libraries import LIBRARIES, backend
from vitscope.models.checkpoints.adapter_folder import is_adapter_folder, load_adapter
from vitscope.models.checkpoints.local import load_local, with_adapter
from vitscope.models.checkpoints.paths import model_path
from vitscope.models.checkpoints.serialization import load_folder, manifest_folder
from vitscope.models.checkpoints.timm_folder import is_timm_folder
from vitscope.models.checkpoints.unknown_names import suggestion_or_none
from vitscope.models.containers import with_backbone_preprocessing
from vitscope.models.description import Description, require_description, require_readout
from vitscope.models.forward import Embedding, Observed
from vitscope.models.layout import Layout
from vitscope.models.outputs import Output
from vitscope.models.vision_model import VisionModel
from vitscope.models.wrappers import backbone_path, library_of, unwrap, with_path_prefix
from vitscope.validation import require_integer

BUNDLED = ("vit-nano", "swin-nano")

Size = int | tuple[int, int]


def bundled_path(name: str) -> Path:
    """Return the folder of a bundled model.

    Args:
        name: ``"vit-nano"`` or ``"swin-nano"``.

    Examples:
        >>> from vitscope.models import bundled_path
        >>> (bundled_path("vit-nano") / "config.json").exists()
        True
    """
    return Path(__file__).parent / "bundled" / name


def load(
    model: str | Path | nn.Module,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    prefix: Sequence[str] = (),
    readout: str | Mapping[str, float] | None = None,
    backbone: str | None = None,
    output: Output | None = None,
    labels: Sequence[str] | Mapping[int, str] | str | Path | None = None,
    select: str | int | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    embed: Callable[[Any], Tensor] | None = None,
    processor: Any = None,
    tokenizer: Any = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
) -> VisionModel:
    """Return a vision model, loaded by name or from a folder, or built around a live module.

    Nothing is guessed. Weights that do not fill the model are an error, the preprocessing is the one that the
    checkpoint was saved with, and if an output could be either classes or an embedding, the caller must say which.

    Args:
        model: one of

            * ``"vit-nano"`` or ``"swin-nano"``, the bundled models,
            * a local folder or hub id of transformers, a PEFT adapter folder, a folder in timm's hub layout, or a run
              folder of :func:`vitscope.finetune`,
            * ``"timm:<name>"`` (also ``"timm:hf-hub:<id>"`` and ``"timm:local-dir:<folder>"``) or
              ``"torchvision:<name>"``,
            * an ``nn.Module``: a model of these three libraries, a module that contains one, or any other transformer,
              also wrapped by ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, PEFT or Lightning.
        pretrained: whether to load pretrained weights. False gives random weights from torch's global generator (seed
            it for reproducible weights). ``model`` may then also be a model type of transformers, such as ``"vit"`` or
            ``"dinov2"``, which is built with its default configuration.
        weights: a file of weights (``.safetensors``, ``.pth``, ``.ckpt``, …) for the architecture that ``model`` names.
            Only tensors are read from it, never other pickled objects.
        adapter: a PEFT adapter folder, applied to a copy of ``model``.
        device: device of the weights; by default the one that the library loads them to. A live module stays where
            it is.
        dtype: precision of the weights; by default the one that the library loads them in. A live module keeps its
            own.
        image_size: (height, width) of the input in pixels, or one number for a square; by default the model's own.
        patch_size: (height, width) of a patch in pixels, or one number for a square, for a live module from none of the
            three libraries. ``prefix`` and ``readout`` then complete the token layout.
        prefix: names of the tokens before the patches.
        readout: tokens that the classifier reads: the name of a prefix token, ``"patches"`` for their mean,
            ``"pooling"``, or a mapping from these to weights that sum to one. ``readout`` alone replaces the readout of
            a known live model whose classifier was changed.
        backbone: path of the vision transformer inside a live module or a model of transformers; by default the
            only known model inside it.
        output: meaning of the module's output: ``"logits"`` (softmax, or sigmoid for a single output),
            ``"softmax"``, ``"sigmoid"`` (independent classes), ``"probabilities"``, ``"value"`` (regression) or
            ``"features"`` (an embedding, explained by similarity). By default it is derived from the library or from
            the layers that compute the output.
        labels: names of the classes: a list, a mapping from index to name, or a file of names. For CLIP and SigLIP of
            transformers they are texts, such as ``"a photo of a cat"``, and the result is a zero-shot classifier: its
            logits compare the image with each text as the whole model does.
        select: entry of the output that holds the classes: a key, a position, or keys joined by dots.
        logits: a function from the module's output to logits (batch, class).
        embed: a function from the module's output to features (batch, channel).
        processor: the preprocessing: an image processor of transformers, its folder or settings, timm's data
            configuration, or ``weights.transforms()`` of torchvision. By default that of the checkpoint.
        tokenizer: tokenizer of the text tower of CLIP or SigLIP: a tokenizer or processor of transformers, or its
            folder. By default that of ``processor``, or else that of the checkpoint.
        mean: mean of each channel, or one number for all channels, for pixels in [0, 1]. It replaces the mean of
            the preprocessing. ``mean``, ``std`` and ``image_size`` together define a preprocessing that resizes the
            image to the input size. For a module that neither is nor contains a known model, ``image_size`` alone means
            pixels from -1 to 1.
        std: standard deviation of each channel, in the same form as ``mean``.

    Returns:
        The model in evaluation mode; a live module keeps its mode.

    Raises:
        CallError: an argument is invalid or does not apply to this model.
        UnknownModelError: there is no such model.
        UnsupportedModelError: the model takes more than an image, or vitscope cannot explain it correctly.
        ModelUnavailableError: the weights, the library or the device are not available, or the weights do not fill the
            model.

    Examples:
        >>> import vitscope as vs
        >>> vs.load("vit-nano")
        <VisionModel vit-nano (transformers) 32×32 px, patches of 4×4>
    """
    size = _pair(image_size, "image_size")
    if not isinstance(model, str | Path | nn.Module):
        raise CallError(f"a model is a name, a folder or an nn.Module, not {type(model).__name__}")
    live = isinstance(model, nn.Module)
    if live and (device is not None or dtype is not None):
        raise CallError("device and dtype are not for a live module: move it with its own .to() first")
    if live and weights is not None:
        raise CallError("weights are not for a live module: load them with its own load_state_dict() first")
    if not live and (patch_size is not None or prefix or readout is not None):
        raise CallError(
            "patch_size, prefix and readout are only for a live module: omit them, the layout of a named model is known"
        )
    description = require_description(
        image_size=size,
        layout=_layout(patch_size, prefix, readout),
        readout={readout: 1.0} if isinstance(readout, str) else readout,
        backbone=backbone,
        output=output,
        labels=labels,
        select=select,
        logits=logits,
        embed=embed,
        processor=processor,
        tokenizer=tokenizer,
        mean=mean,
        std=std,
    )
    if isinstance(model, nn.Module):
        module = model if adapter is None else load_adapter(unwrap(model), adapter)
        return describe_module(module, description)
    loaded = _load_named(str(model), pretrained, size, _dtype(dtype), weights, output, backbone)
    if adapter is not None:
        loaded = with_adapter(loaded, adapter, image_size=size, name=loaded.name)
    if device is not None:
        _move(loaded.module, device)
    return description.apply(loaded)


def _move(module: nn.Module, device: str | torch.device) -> None:
    """Move a module to a device."""
    try:
        module.to(torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = first_line(error)
        reason = "there is no such device" if first.startswith("Expected one of") else first
        backends = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        usable = ", ".join(name for name, available in backends.items() if available)
        raise ModelUnavailableError(
            f"device {str(device)!r} cannot be used: {reason} (usable here: {usable})"
        ) from None


def _load_named(
    name: str,
    pretrained: bool,
    size: tuple[int, int] | None,
    dtype: torch.dtype | None,
    weights: str | Path | None,
    output: str | None,
    backbone: str | None,
) -> VisionModel:
    """Load a model by name or from a folder, with the library that the name belongs to."""
    library, colon, rest = name.partition(":")
    options: dict[str, Any] = {"pretrained": pretrained, "image_size": size, "dtype": dtype}
    names_library = bool(colon) and library in LIBRARIES
    path_like = Path(rest) if names_library else model_path(name)
    has_own_weights = not names_library and (
        name in BUNDLED or manifest_folder(path_like) or is_adapter_folder(path_like)
    )
    if backbone is not None and (names_library or has_own_weights or is_timm_folder(path_like)):
        raise CallError(f"backbone is only for a live module or a model of transformers: omit it for {name}")
    if names_library:
        return backend(library).load(rest, **options, weights=weights)
    if weights is not None and has_own_weights:
        raise CallError(f"{name} contains its own weights: weights= is for an architecture, such as timm:<name>")
    if name in BUNDLED:
        path = str(bundled_path(name))
        return backend("transformers").load(path, **options, display_name=name)
    tuned = manifest_folder(path_like)
    if tuned is not None:
        if not pretrained:
            raise CallError(f"{name} is a fine-tuned model with weights: omit pretrained=False")
        return load_folder(tuned, image_size=size, dtype=dtype)
    local = load_local(path_like, **options, weights=weights)
    if local is not None:
        return local
    close = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.85)
    if close and not path_like.exists():
        raise UnknownModelError(f"unknown model {name!r}: did you mean {close[0]!r}?")
    if not path_like.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise UnknownModelError(
            suggestion_or_none(name)
            or f"unknown model {name!r}: pass a bundled model ({', '.join(BUNDLED)}), a local transformers folder, "
            "a hub id such as google/vit-base-patch16-224, timm:<name> or torchvision:<name>"
        )
    target = str(path_like) if path_like.exists() else name
    headless = "features" if output == "features" else None
    try:
        return backend("transformers").load(target, **options, weights=weights, output=headless, backbone=backbone)
    except (ModelUnavailableError, UnknownModelError):
        suggestion = None if path_like.exists() else suggestion_or_none(name)
        if suggestion is None:
            raise
    raise UnknownModelError(suggestion)


def describe_module(module: nn.Module, description: Description) -> VisionModel:
    """Return a live module as a VisionModel: a known model, a module that contains one, or any other module."""
    inner = unwrap(module)
    library = library_of(inner)
    if library is not None and description.layout is None and description.backbone is None:
        return description.apply(backend(library).wrap(inner, image_size=description.image_size))
    path = None if description.layout is not None else backbone_path(inner, description.backbone)
    name = type(inner).__name__
    backbone: VisionModel | None = None
    if path is not None:
        submodule = unwrap(inner.get_submodule(path))
        path = _path_of(submodule, inner)
        library = library_of(submodule)
        if library is not None:
            backbone = backend(library).wrap(submodule, image_size=description.image_size)
    layout = description.layout
    if backbone is not None:
        # The image encoder may be even deeper, such as the vision tower of CLIP.
        path = _path_of(backbone.module, inner)
        layout = backbone.layout
        if layout is not None and layout.hierarchy is not None:
            layout = replace(layout, hierarchy=with_path_prefix(layout.hierarchy, path))
    observed = Observed(inner, name, output=description.output)
    base = VisionModel(
        name,
        "module",
        inner,
        observed,
        layout,
        backbone=path or "",
        embed=Embedding(observed),
        verified=description.layout is not None,
        no_preprocessing="the preprocessing of this module is unknown",
    )
    if backbone is not None:
        base = with_backbone_preprocessing(base, backbone)
    return replace(
        description.apply(base), output=None
    )  # the forward pass already takes the caller's output into account


def _path_of(submodule: nn.Module, module: nn.Module) -> str:
    """Return the path of a submodule inside a module."""
    return next(path for path, child in module.named_modules() if child is submodule)


def _layout(patch_size: Size | None, prefix: Sequence[str], readout: str | Mapping[str, float] | None) -> Layout | None:
    """Return the token layout that the caller describes; None without ``patch_size``."""
    pair = _pair(patch_size, "patch_size")
    if pair is None:
        if prefix:
            raise CallError("prefix needs patch_size: pass it too, because the token layout is unknown")
        return None
    if readout is None:
        raise CallError(
            f"readout is None: pass the tokens that the classifier reads, such as 'patches' or one of {list(prefix)}"
        )
    weights = {readout: 1.0} if isinstance(readout, str) else readout
    return Layout(pair, tuple(prefix), require_readout(weights, prefix))


def _pair(size: Size | None, name: str) -> tuple[int, int] | None:
    """Return a size in pixels as (height, width)."""
    if size is None:
        return None
    sides = tuple(size) if hasattr(size, "__iter__") else (size, size)
    pair = tuple(require_integer(side, name) for side in sides)
    if len(pair) != 2 or min(pair) <= 0:
        raise CallError(f"{name} is {size!r}: pass a positive number of pixels or (height, width)")
    if max(pair) > MAX_SIDE:
        raise CallError(f"{name} is {size!r}: pass at most {MAX_SIDE:,} pixels per side")
    return pair[0], pair[1]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return a dtype or the name of one as a floating-point dtype."""
    if dtype is None:
        return None
    result = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(result, torch.dtype) or not result.is_floating_point:
        raise CallError(f"unknown dtype {dtype!r}: pass float32, bfloat16 or float16")
    return result
