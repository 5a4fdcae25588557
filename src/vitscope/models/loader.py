"""load(): a name, folder or live module becomes a :class:`VisionModel`."""

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
from vitscope.models.containers import with_backbone
from vitscope.models.description import Description, checked_readout, described
from vitscope.models.forward import Embedding, Observed
from vitscope.models.outputs import Output
from vitscope.models.vision_model import Layout, VisionModel
from vitscope.models.wrappers import backbone_path, inside, library_of, unwrapped
from vitscope.validation import whole_number

BUNDLED = ("vit-nano", "swin-nano")

Size = int | tuple[int, int]


def bundled_path(name: str) -> Path:
    """The folder of a model that comes with vitscope."""
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
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
) -> VisionModel:
    """Load a vision model by name, or take a live module as it is.

    Nothing is assumed that could be wrong: weights fill the model or are refused, the preprocessing is the one the
    checkpoint was saved with, and an output that could be classes or an embedding has to be named.

    Args:
        model: ``"vit-nano"`` or ``"swin-nano"`` (bundled), a local folder or hub id of transformers, a PEFT adapter
            folder, a folder of timm's hub layout, a run of :func:`vitscope.finetune`, ``"timm:<name>"`` (also
            ``"timm:hf-hub:<id>"`` and ``"timm:local-dir:<folder>"``), ``"torchvision:<name>"``, or an ``nn.Module``:
            a model of the three libraries, one that contains such a model, or one of your own, also wrapped by
            ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``, PEFT or Lightning.
        pretrained: False gives random weights (seed torch yourself). For transformers a model type such as
            ``"vit"`` or ``"dinov2"`` is then a name too and means its default configuration.
        weights: a file of weights (``.safetensors``, ``.pth``, ``.ckpt``, …) for the architecture that ``model`` names.
            Only tensors are read, never other pickled objects.
        adapter: a PEFT adapter folder, put on a copy of ``model``.
        device, dtype: where and in which precision the weights shall be; by default as the library loads them.
            A live module stays as and where it is.
        image_size: height and width of the input, one number for a square; by default the model's own.
        patch_size, prefix, readout: the layout of a live module of none of the three libraries: pixels of a
            patch, names of the tokens before the patches, and which tokens the classifier reads (the name of a
            prefix token, ``"patches"`` for their mean, ``"pooling"``, or weights over these that sum to one).
            ``readout`` alone replaces that of a known live model, whose classifier was changed.
        backbone: the path of the vision transformer inside a live module or a model of transformers; a single known
            model is found by itself.
        output: what the module returns: ``"logits"`` (softmax, or sigmoid of a single output), ``"softmax"``,
            ``"sigmoid"`` (independent classes), ``"probabilities"``, ``"value"`` (regression) or ``"features"``
            (an embedding, explained by similarity). By default what the library or the module shows.
        labels: the names of the classes: a list, a mapping from index to name, or a file of names.
        select: which part of the output holds the classes: a key, a position, or keys joined by dots.
        logits, embed: functions of the module's output that return logits (batch, class) or features (batch, channel).
        processor: the preprocessing: an image processor of transformers, its folder or settings, timm's data
            configuration, or ``weights.transforms()`` of torchvision.
        mean, std: of each channel, or one number for all, for pixels in [0, 1]; they replace those of the
            preprocessing. Together with ``image_size`` they are a preprocessing of their own: the photo is resized to
            the input. For a module that neither is nor contains a known model, ``image_size`` alone means pixels from
            -1 to 1.

    Raises:
        UnknownModelError: there is no such model.
        UnsupportedModelError: what the model computes cannot be shown truthfully.
        ModelUnavailableError: its weights or library cannot be reached, or the weights do not fill the model.

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
        raise CallError("patch_size, prefix and readout describe a live module; a named model is known already")
    description = described(
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
        mean=mean,
        std=std,
    )
    if isinstance(model, nn.Module):
        module = model if adapter is None else load_adapter(unwrapped(model), adapter)
        return describe_module(module, description)
    loaded = _load_named(str(model), pretrained, size, _dtype(dtype), weights, output, backbone)
    if adapter is not None:
        loaded = with_adapter(loaded, adapter, image_size=size, name=loaded.name)
    return _moved(description.applied(loaded), device)


def _moved(loaded: VisionModel, device: str | torch.device | None) -> VisionModel:
    if device is None:
        return loaded
    try:
        loaded.module.to(torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = first_line(error)
        reason = "there is no such device" if first.startswith("Expected one of") else first
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        usable = ", ".join(name for name, found in there.items() if found)
        raise ModelUnavailableError(
            f"device {str(device)!r} cannot be used: {reason} (usable here: {usable})"
        ) from None
    return loaded


def _load_named(
    name: str,
    pretrained: bool,
    size: tuple[int, int] | None,
    dtype: torch.dtype | None,
    weights: str | Path | None,
    output: str | None,
    backbone: str | None,
) -> VisionModel:
    library, colon, rest = name.partition(":")
    options: dict[str, Any] = {"pretrained": pretrained, "image_size": size, "dtype": dtype}
    of_a_library = bool(colon) and library in LIBRARIES
    path_like = Path(rest) if of_a_library else model_path(name)
    own = not of_a_library and (name in BUNDLED or manifest_folder(path_like) or is_adapter_folder(path_like))
    if backbone is not None and (of_a_library or own or is_timm_folder(path_like)):
        raise CallError(f"backbone names a part of a live module or of a model of transformers, and {name} is neither")
    if of_a_library:
        return backend(library).load(rest, **options, weights=weights)
    if weights is not None and own:
        raise CallError(f"{name} has weights of its own: weights= is for an architecture, such as timm:<name>")
    if name in BUNDLED:
        path = str(bundled_path(name))
        return backend("transformers").load(path, **options, display_name=name)
    tuned = manifest_folder(path_like)
    if tuned is not None:
        if not pretrained:
            raise CallError(f"{name} is a tuned model: it has weights, pretrained=False is for models without")
        return load_folder(tuned, image_size=size, dtype=dtype)
    local = load_local(path_like, **options, weights=weights)
    if local is not None:
        return local
    close = difflib.get_close_matches(name, BUNDLED, n=1, cutoff=0.85)
    if close and not path_like.exists():
        raise UnknownModelError(f"unknown model {name!r}: did you mean {close[0]!r}?")
    if not path_like.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise UnknownModelError(
            f"unknown model {name!r}: pass a bundled model ({', '.join(BUNDLED)}), a local transformers folder, "
            "a hub id such as google/vit-base-patch16-224, timm:<name> or torchvision:<name>"
        )
    target = str(path_like) if path_like.exists() else name
    headless = "features" if output == "features" else None
    return backend("transformers").load(target, **options, weights=weights, output=headless, backbone=backbone)


def describe_module(module: nn.Module, description: Description) -> VisionModel:
    """Return a live module as a VisionModel: a known model, a module that contains one, or one of the caller's own."""
    inner = unwrapped(module)
    library = library_of(inner)
    if library is not None and description.layout is None and description.backbone is None:
        return description.applied(backend(library).wrap(inner, image_size=description.image_size))
    path = None if description.layout is not None else backbone_path(inner, description.backbone)
    name = type(inner).__name__
    known = None
    if path is not None:
        backbone = unwrapped(inner.get_submodule(path))
        path = next(place for place, child in inner.named_modules() if child is backbone)
        library = library_of(backbone)
        known = None if library is None else backend(library).wrap(backbone, image_size=description.image_size)
    layout = description.layout
    if known is not None:
        # The part that looks at the image may be deeper still: the tower of a CLIP.
        path = next(place for place, child in inner.named_modules() if child is known.module)
        hierarchy = None if known.layout is None else known.layout.hierarchy
        layout = known.layout and replace(
            known.layout, hierarchy=None if hierarchy is None else inside(hierarchy, path)
        )
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
        no_preprocessing="nothing tells how this module's images are prepared",
    )
    if known is not None and path is not None:
        base = with_backbone(base, known)
    return replace(description.applied(base), output=None)  # what was observed already follows what was said


def _layout(patch_size: Size | None, prefix: Sequence[str], readout: str | Mapping[str, float] | None) -> Layout | None:
    pair = _pair(patch_size, "patch_size")
    if pair is None:
        if prefix:
            raise CallError("prefix and readout need patch_size, which says what the other tokens are")
        return None
    if readout is None:
        raise CallError(f"readout is None: pass what the classifier reads, such as 'patches' or one of {list(prefix)}")
    weights = {readout: 1.0} if isinstance(readout, str) else readout
    return Layout(pair, tuple(prefix), checked_readout(weights, prefix))


def _pair(size: Size | None, what: str) -> tuple[int, int] | None:
    if size is None:
        return None
    given = tuple(size) if hasattr(size, "__iter__") else (size, size)
    pair = tuple(whole_number(part, what) for part in given)
    if len(pair) != 2 or min(pair) <= 0:
        raise CallError(f"{what} is {size!r}: pass a positive number of pixels or (height, width)")
    if max(pair) > MAX_SIDE:
        raise CallError(f"{what} is more than {MAX_SIDE:,} pixels a side, the most that is possible")
    return pair[0], pair[1]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CallError(f"unknown dtype {dtype!r}: pass float32, bfloat16 or float16")
    return found
