"""A model with classes of one's own: an untrained classifier on any backbone, and what is needed to build it again."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.errors import UnsupportedModelError
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.adapters import Adapter, ParallelAdapter
from vitscope.models.backends.libraries import LIBRARIES, backend
from vitscope.models.vision_model import VisionModel
from vitscope.models.window_reader import WindowReader

HEAD_STD = 0.02  # of the untrained classifier's weights, in all libraries


class Classified(nn.Module):
    """A backbone whose library has no classifier for it, and a linear layer on its features."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        like = next(backbone.parameters())
        self.classifier = nn.Linear(features, classes).to(like.device, like.dtype)
        self.training = self.classifier.training = backbone.training


class WindowClassified(nn.Module):
    """A Swin with a CLS token in every window, and the head that reads these."""

    def __init__(self, backbone: VisionModel, classes: int) -> None:
        super().__init__()
        self.backbone = backbone.module
        self.reader = WindowReader(backbone, classes).train(backbone.module.training)
        self.training = backbone.module.training


def reset_classifier(model: VisionModel, labels: Sequence[str], *, by_windows: bool = False) -> VisionModel:
    """A copy of the model with an untrained classifier for these classes; ``model`` stays as it is.

    The classifier is the library's own where it has one for this model. Its weights are drawn from a normal
    distribution with a standard deviation of 0.02 (torch's random numbers: seed them), its bias is zero.

    Args:
        by_windows: the classifier reads CLS tokens in the windows of a Swin, see :class:`vitscope.WindowHead`.

    Raises:
        CallError: the model is of none of the three libraries, or has adapters.
    """
    if model.library not in LIBRARIES:
        raise UnsupportedModelError(
            f"{model.name} is of none of the libraries {', '.join(LIBRARIES)}: its classifier is not known"
        )
    if any(isinstance(child, Adapter | ParallelAdapter) for child in model.module.modules()):
        raise UnsupportedModelError(
            f"{model.name} has adapters, which another classifier would lose: tune the model it was made from"
        )
    library = backend(model.library)
    module: nn.Module | None = None
    if by_windows:
        module = WindowClassified(_wrapped(model.library, _copy(_bare(model)), model.preprocessing), len(labels))
    elif not isinstance(model.module, Classified | WindowClassified):
        module = library.reset_classifier(_copy(model.module), labels)
    if module is None:
        module = _classified(model, len(labels))
    made = described(model.library, module, labels, model.preprocessing, model.name)
    with torch.no_grad():
        for head in get_classifiers(made):
            head.weight.normal_(std=HEAD_STD)
            if head.bias is not None:
                head.bias.zero_()
    return made


def get_classifiers(model: VisionModel) -> list[nn.Linear]:
    """The linear layers that give the logits: one, or two where a model was distilled."""
    if isinstance(model.module, Classified):
        return [model.module.classifier]
    if isinstance(model.module, WindowClassified):
        return [model.module.reader.head]
    return backend(model.library).get_classifiers(model.module)


def architecture(model: VisionModel) -> Mapping[str, Any]:
    """What :func:`build` needs, as JSON has it."""
    library, module = backend(model.library), model.module
    if isinstance(module, WindowClassified):
        return {"windows": library.architecture(module.backbone), "classes": module.reader.head.out_features}
    if not isinstance(module, Classified):
        return library.architecture(module)
    sizes = {"features": module.classifier.in_features, "classes": module.classifier.out_features}
    return {"backbone": library.architecture(module.backbone), **sizes}


def build(library: str, architecture: Mapping[str, Any]) -> nn.Module:
    """The module without its weights."""
    build_module: Callable[[Mapping[str, Any]], nn.Module] = backend(library).build
    if "windows" in architecture:
        backbone = _wrapped(library, build_module(architecture["windows"]), None)
        return WindowClassified(backbone, architecture["classes"])
    if "backbone" not in architecture:
        return build_module(architecture)
    return Classified(build_module(architecture["backbone"]), architecture["features"], architecture["classes"])


def described(
    library: str, module: nn.Module, labels: Sequence[str], preprocessing: Preprocessing | None, name: str
) -> VisionModel:
    """A module with a classifier as a :class:`VisionModel`."""
    known: dict[str, Any] = {"labels": tuple(labels), "name": name, "embed": None, "output": "logits"}
    if isinstance(module, WindowClassified):
        return _read_by_windows(_wrapped(library, module.backbone, preprocessing), module, known)
    if not isinstance(module, Classified):
        return replace(_wrapped(library, module, preprocessing), **known)
    backbone = _wrapped(library, module.backbone, preprocessing)
    embed, classifier = backbone.embed, module.classifier
    assert embed is not None

    return replace(backbone, module=module, forward=ClassifiedFeatures(embed, classifier), **known)


@dataclass(frozen=True, eq=False)
class ClassifiedFeatures:
    """Logits of pixels: a linear layer on a backbone's features."""

    embed: Callable[[Tensor], Tensor]
    classifier: nn.Linear

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.embed(pixels))


@dataclass(frozen=True, eq=False)
class ReadWindows:
    """Logits of pixels: the CLS tokens that a reader puts into the windows of a backbone."""

    reader: WindowReader
    backbone: VisionModel

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.reader.read(self.backbone, pixels)


def _wrapped(library: str, module: nn.Module, preprocessing: Preprocessing | None) -> VisionModel:
    """A module of a library as it is, with this preprocessing or the library's own."""
    size = None if preprocessing is None else preprocessing.size
    wrapped: VisionModel = backend(library).wrap(module, image_size=size)
    return replace(wrapped, preprocessing=preprocessing or wrapped.preprocessing)


def _read_by_windows(backbone: VisionModel, module: WindowClassified, known: Mapping[str, Any]) -> VisionModel:
    """Attention is the backbone's; what the classifier reads are tokens that no row of it leads to."""
    layout = backbone.layout
    assert layout is not None
    assert layout.hierarchy is not None
    within: dict[str, Any] = {
        name: {f"backbone.{path}": part for path, part in getattr(layout.hierarchy, name).items()}
        for name in ("blocks", "mergings")
    }
    hierarchy = replace(layout.hierarchy, classifier=None, **within)
    return replace(
        backbone,
        module=module,
        forward=ReadWindows(module.reader, backbone),
        layout=replace(layout, readout={}, hierarchy=hierarchy),
        **known,
    )


def _bare(model: VisionModel) -> nn.Module:
    return model.module.backbone if isinstance(model.module, WindowClassified) else model.module


def _classified(model: VisionModel, classes: int) -> Classified:
    if isinstance(model.module, Classified):
        backbone = _copy(model.module.backbone)
        return Classified(backbone, model.module.classifier.in_features, classes)
    if isinstance(model.module, WindowClassified):
        raise UnsupportedModelError(f"{model.name} reads its windows: tune the Swin it was made from")
    if model.embed is None or model.preprocessing is None:
        raise UnsupportedModelError(
            f"{model.name} gives no features that vitscope knows: a classifier has nothing to read"
        )
    with torch.no_grad(), model.running():
        blank = torch.zeros(1, 3, *model.preprocessing.size, device=model.device, dtype=model.dtype)
        features = model.features(blank).shape[-1]
    return Classified(_copy(model.module), features, classes)


def _copy(module: nn.Module) -> nn.Module:
    """A copy that trains: weights that were frozen, or made in inference mode, take gradients again."""
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return copied
