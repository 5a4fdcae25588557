"""Models with new classes: an untrained classifier on any backbone, and the description that rebuilds the model."""

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
from vitscope.models.wrappers import with_path_prefix

HEAD_STD = 0.02  # standard deviation of an untrained classifier's weights, the same for all libraries


class Classified(nn.Module):
    """A backbone for which its library has no classifier, and a linear layer that reads its features."""

    def __init__(self, backbone: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        reference = next(backbone.parameters())
        self.classifier = nn.Linear(features, classes).to(reference.device, reference.dtype)
        self.training = self.classifier.training = backbone.training


class WindowClassified(nn.Module):
    """A Swin with a CLS token in every window, and the head that reads these tokens."""

    def __init__(self, backbone: VisionModel, classes: int) -> None:
        super().__init__()
        self.backbone = backbone.module
        self.reader = WindowReader(backbone, classes).train(backbone.module.training)
        self.training = backbone.module.training


def reset_classifier(model: VisionModel, labels: Sequence[str], *, by_windows: bool = False) -> VisionModel:
    """Return a copy of the model with an untrained classifier for these classes.

    The classifier is the library's own, if it has one for this model. Its weights are drawn from a normal
    distribution with a standard deviation of 0.02 (by torch's global generator; seed it for reproducible weights), and
    its bias is zero.

    Args:
        model: the model to copy; it is not changed.
        labels: names of the new classes.
        by_windows: whether the classifier reads CLS tokens in the windows of a Swin, see :class:`vitscope.WindowHead`.

    Raises:
        UnsupportedModelError: the model is from none of the three libraries, has adapters, or returns no features.
    """
    if model.library not in LIBRARIES:
        raise UnsupportedModelError(
            f"{model.name} is not a model of {', '.join(LIBRARIES)}: its classifier cannot be replaced"
        )
    if any(isinstance(child, Adapter | ParallelAdapter) for child in model.module.modules()):
        raise UnsupportedModelError(
            f"{model.name} has adapters, which a new classifier would discard: fine-tune the original model instead"
        )
    library = backend(model.library)
    module: nn.Module | None = None
    if by_windows:
        backbone = _wrap(model.library, _trainable_copy(_backbone(model)), model.preprocessing)
        module = WindowClassified(backbone, len(labels))
    elif not isinstance(model.module, Classified | WindowClassified):
        module = library.reset_classifier(_trainable_copy(model.module), labels)
    if module is None:
        module = _with_linear_classifier(model, len(labels))
    result = describe(model.library, module, labels, model.preprocessing, model.name)
    with torch.no_grad():
        for head in get_classifiers(result):
            head.weight.normal_(std=HEAD_STD)
            if head.bias is not None:
                head.bias.zero_()
    return result


def get_classifiers(model: VisionModel) -> list[nn.Linear]:
    """Return the linear layers that compute the logits: one, or two for a distilled model."""
    if isinstance(model.module, Classified):
        return [model.module.classifier]
    if isinstance(model.module, WindowClassified):
        return [model.module.reader.head]
    return backend(model.library).get_classifiers(model.module)


def architecture(model: VisionModel) -> Mapping[str, Any]:
    """Return the arguments of :func:`build` that rebuild the model's module, as JSON values."""
    library, module = backend(model.library), model.module
    if isinstance(module, WindowClassified):
        return {"windows": library.architecture(module.backbone), "classes": module.reader.head.out_features}
    if not isinstance(module, Classified):
        return library.architecture(module)
    sizes = {"features": module.classifier.in_features, "classes": module.classifier.out_features}
    return {"backbone": library.architecture(module.backbone), **sizes}


def build(library: str, architecture: Mapping[str, Any]) -> nn.Module:
    """Return a module of this architecture with untrained weights."""
    build_module: Callable[[Mapping[str, Any]], nn.Module] = backend(library).build
    if "windows" in architecture:
        backbone = _wrap(library, build_module(architecture["windows"]), None)
        return WindowClassified(backbone, architecture["classes"])
    if "backbone" not in architecture:
        return build_module(architecture)
    return Classified(build_module(architecture["backbone"]), architecture["features"], architecture["classes"])


def describe(
    library: str, module: nn.Module, labels: Sequence[str], preprocessing: Preprocessing | None, name: str
) -> VisionModel:
    """Return a module with a classifier as a :class:`VisionModel`.

    Args:
        library: library of the module or of its backbone.
        module: a model of the library, a :class:`Classified` or a :class:`WindowClassified`.
        labels: names of the classes.
        preprocessing: preprocessing of images; None for the library's own.
        name: name of the model.
    """
    facts: dict[str, Any] = {"labels": tuple(labels), "name": name, "embed": None, "output": "logits"}
    if isinstance(module, WindowClassified):
        return _describe_window_reader(_wrap(library, module.backbone, preprocessing), module, facts)
    if not isinstance(module, Classified):
        return replace(_wrap(library, module, preprocessing), **facts)
    backbone = _wrap(library, module.backbone, preprocessing)
    embed, classifier = backbone.embed, module.classifier
    assert embed is not None

    return replace(backbone, module=module, forward=ClassifiedFeatures(embed, classifier), **facts)


@dataclass(frozen=True, eq=False)
class ClassifiedFeatures:
    """The forward pass of :class:`Classified`: logits by a linear layer on the backbone's features."""

    embed: Callable[[Tensor], Tensor]
    classifier: nn.Linear

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.classifier(self.embed(pixels))


@dataclass(frozen=True, eq=False)
class ReadWindows:
    """The forward pass of :class:`WindowClassified`: logits from the CLS tokens in the backbone's windows."""

    reader: WindowReader
    backbone: VisionModel

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.reader.read(self.backbone, pixels)


def _wrap(library: str, module: nn.Module, preprocessing: Preprocessing | None) -> VisionModel:
    """Return a library's module as a VisionModel, with this preprocessing or the library's own."""
    size = None if preprocessing is None else preprocessing.size
    model: VisionModel = backend(library).wrap(module, image_size=size)
    return replace(model, preprocessing=preprocessing or model.preprocessing)


def _describe_window_reader(backbone: VisionModel, module: WindowClassified, facts: Mapping[str, Any]) -> VisionModel:
    """Return the model of a window reader, with the backbone's attention, which does not lead to the CLS tokens."""
    layout = backbone.layout
    assert layout is not None
    assert layout.hierarchy is not None
    hierarchy = replace(with_path_prefix(layout.hierarchy, "backbone"), classifier=None)
    return replace(
        backbone,
        module=module,
        forward=ReadWindows(module.reader, backbone),
        layout=replace(layout, readout={}, hierarchy=hierarchy),
        **facts,
    )


def _backbone(model: VisionModel) -> nn.Module:
    """Return the module without the window reader, if it has one."""
    return model.module.backbone if isinstance(model.module, WindowClassified) else model.module


def _with_linear_classifier(model: VisionModel, classes: int) -> Classified:
    """Return a copy of the module with a linear layer on its features."""
    if isinstance(model.module, Classified):
        backbone = _trainable_copy(model.module.backbone)
        return Classified(backbone, model.module.classifier.in_features, classes)
    if isinstance(model.module, WindowClassified):
        raise UnsupportedModelError(
            f"{model.name} classifies by CLS tokens in its windows: fine-tune the original Swin instead"
        )
    if model.embed is None or model.preprocessing is None:
        raise UnsupportedModelError(
            f"{model.name} returns no features that vitscope recognises: a classifier has nothing to read"
        )
    with torch.no_grad(), model.running():
        blank = torch.zeros(1, 3, *model.preprocessing.size, device=model.device, dtype=model.dtype)
        features = model.features(blank).shape[-1]
    return Classified(_trainable_copy(model.module), features, classes)


def _trainable_copy(module: nn.Module) -> nn.Module:
    """Return a copy whose weights take gradients, even if they were frozen or created in inference mode."""
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        parameter.grad = None
        parameter.requires_grad_(True)
    return copied
