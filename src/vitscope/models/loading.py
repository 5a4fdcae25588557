"""load(): a name, folder or live module becomes a :class:`VisionModel`."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.arguments import whole_number
from vitscope.errors import CallError, ModelUnavailableError, UnknownModelError
from vitscope.models.folder import load_folder, manifest_folder
from vitscope.models.libraries import LIBRARIES, library_module
from vitscope.models.local_source import load_local
from vitscope.models.paths import model_path
from vitscope.models.vision_model import Layout, VisionModel
from vitscope.picture import Preprocessing

BUNDLED = ("vit-nano", "swin-nano")

Size = int | tuple[int, int]


def bundled_path(name: str) -> Path:
    """The folder of a model that comes with vitscope."""
    return Path(__file__).parent / "bundled" / name


def load(
    model: str | Path | nn.Module,
    *,
    pretrained: bool = True,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    image_size: Size | None = None,
    patch_size: Size | None = None,
    prefix: Sequence[str] = (),
    readout: str | Mapping[str, float] | None = None,
) -> VisionModel:
    """Load a vision model by name, or take a live module as it is.

    Args:
        model: ``"vit-nano"`` or ``"swin-nano"`` (bundled), a local transformers folder or a hub id, ``"timm:<name>"``,
            ``"torchvision:<name>"``, or an ``nn.Module``.
        pretrained: False gives random weights (seed torch yourself). For transformers a model type such as
            ``"vit"`` or ``"dinov2"`` is then a name too and means its default configuration.
        device, dtype: where and in which precision the weights shall be; by default as the library loads them.
            A live module stays as and where it is.
        image_size: height and width of the input, one number for a square; by default the model's own.
        patch_size, prefix, readout: the layout of a live module of none of the three libraries: pixels of a
            patch, names of the tokens before the patches, and which tokens the classifier reads (the name of a
            prefix token, ``"patches"`` for their mean, ``"pooling"``, or weights over these that sum to one).

    Raises:
        UnknownModelError: there is no such model.
        ModelUnavailableError: its weights or library cannot be reached.

    Example:
        >>> import vitscope as vs
        >>> vs.load("vit-nano")
        <VisionModel vit-nano (transformers) 32×32 px, patches of 4×4>
    """
    size = _pair(image_size, "image_size")
    if not isinstance(model, str | Path | nn.Module):
        raise CallError(f"a model is a name, a folder or an nn.Module, not {type(model).__name__}")
    if isinstance(model, nn.Module):
        if device is not None or dtype is not None:
            raise CallError("device and dtype are not for a live module: move it with its own .to() first")
        return _wrap(model, size, _layout(patch_size, prefix, readout))
    if patch_size is not None or prefix or readout is not None:
        raise CallError("patch_size, prefix and readout describe a live module; a named model is known already")
    loaded = _load_named(str(model), pretrained, size, _dtype(dtype))
    if device is not None:
        try:
            loaded.module.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            reason = "there is no such device" if first.startswith("Expected one of") else first
            there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
            usable = ", ".join(name for name, found in there.items() if found)
            raise ModelUnavailableError(
                f"device {str(device)!r} cannot be used: {reason} (usable here: {usable})"
            ) from None
    return loaded


def _load_named(name: str, pretrained: bool, size: tuple[int, int] | None, dtype: torch.dtype | None) -> VisionModel:
    library, colon, rest = name.partition(":")
    if colon and library in LIBRARIES:
        return library_module(library).load(rest, pretrained=pretrained, image_size=size, dtype=dtype)
    if name in BUNDLED:
        path = str(bundled_path(name))
        return library_module("transformers").load(path, pretrained=pretrained, image_size=size, dtype=dtype, name=name)
    path_like = model_path(name)
    tuned = manifest_folder(path_like)
    if tuned is not None:
        if not pretrained:
            raise CallError(f"{name} is a tuned model: it has weights, pretrained=False is for models without")
        return load_folder(tuned, image_size=size, dtype=dtype)
    local = load_local(path_like, pretrained=pretrained, image_size=size, dtype=dtype)
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
    return library_module("transformers").load(target, pretrained=pretrained, image_size=size, dtype=dtype)


def _wrap(module: nn.Module, size: tuple[int, int] | None, layout: Layout | None) -> VisionModel:
    module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper hides the calls it compiled
    if layout is None:
        for cls in type(module).__mro__:
            library = cls.__module__.partition(".")[0]
            if library in LIBRARIES:
                return library_module(library).wrap(module, image_size=size)
    preprocessing = None if size is None else Preprocessing(size)
    return VisionModel(type(module).__name__, "module", module, _foreign(module), layout, preprocessing)


def _foreign(module: nn.Module) -> Callable[[Tensor], Tensor | None]:
    """A forward for a module of nobody knows where: logits are (batch, class), alone or under that name."""

    def forward(pixels: Tensor) -> Tensor | None:
        output: Any = module(pixels)
        output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
        return output if isinstance(output, Tensor) and output.ndim == 2 else None

    return forward


def _layout(patch_size: Size | None, prefix: Sequence[str], readout: str | Mapping[str, float] | None) -> Layout | None:
    pair = _pair(patch_size, "patch_size")
    if pair is None:
        if prefix or readout is not None:
            raise CallError("prefix and readout need patch_size, which says what the other tokens are")
        return None
    weights = {readout: 1.0} if isinstance(readout, str) else dict(readout or {})
    known = {*prefix, "patches", "tokens", "pooling"}
    if not weights or not known.issuperset(weights) or abs(sum(weights.values()) - 1) > 1e-6:
        raise CallError(f"readout is {readout!r}: pass one of {sorted(known)}, or weights over them that sum to one")
    return Layout(pair, tuple(prefix), weights)


def _pair(size: Size | None, what: str) -> tuple[int, int] | None:
    if size is None:
        return None
    given = tuple(size) if hasattr(size, "__iter__") else (size, size)
    pair = tuple(whole_number(part, what) for part in given)
    if len(pair) != 2 or min(pair) <= 0:
        raise CallError(f"{what} is {size!r}: pass a positive number of pixels or (height, width)")
    return pair[0], pair[1]


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CallError(f"unknown dtype {dtype!r}: pass float32, bfloat16 or float16")
    return found
