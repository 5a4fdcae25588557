"""The protocol of a backend: what vitscope needs from transformers, timm and torchvision."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from vitscope.images.preprocessing import Preprocessing
from vitscope.models.vision_model import VisionModel

Size = tuple[int, int]


@runtime_checkable
class Backend(Protocol):
    """The functions that every backend module defines.

    A module is the library's own ``nn.Module``. Heights and widths are in pixels.
    """

    def load(
        self,
        name: str,
        /,
        *,
        pretrained: bool,
        image_size: Size | None,
        dtype: torch.dtype | None,
        weights: str | Path | None = None,
        classes: int | None = None,
    ) -> VisionModel:
        """Load a model by its name in the library.

        Args:
            name: the library's name of the model, without the prefix ``timm:`` or ``torchvision:``.
            pretrained: whether to load pretrained weights; False gives random weights.
            image_size: height and width of the input; None for the model's own size.
            dtype: precision of the weights; None for the library's choice.
            weights: weights file for this architecture, used instead of the pretrained weights.
            classes: number of classes of a classifier that stays untrained because the caller replaces it.

        Raises:
            UnknownModelError: the library has no model of this name.
            CallError: the model does not support this image size.
            ModelUnavailableError: the weights cannot be found, or do not fit the model.
        """
        ...

    def has_model(self, name: str, /) -> bool:
        """Return whether the library has a model of this name; weights after a dot, as timm names them, may follow."""
        ...

    def wrap(self, module: Any, /, *, image_size: Size | None) -> VisionModel:
        """Describe a live module of the library: its forward pass, tokens, preprocessing and labels.

        Args:
            module: the live module; it is not changed.
            image_size: height and width of the input; None for the module's own size.
        """
        ...

    def reset_classifier(self, module: Any, labels: Sequence[str], /) -> nn.Module | None:
        """Return the module with an untrained classifier for these labels.

        The module may be changed, so pass a copy. The result is None if the library has no classifier for the model.

        Raises:
            WorkError: a weight of ``module`` has no counterpart in the class with a classifier.
        """
        ...

    def get_classifiers(self, module: Any, /) -> list[nn.Linear]:
        """Return the linear layers that compute the logits; two for a distilled model, none for a backbone."""
        ...

    def architecture(self, module: Any, /) -> Mapping[str, Any]:
        """Return what :meth:`build` needs to rebuild the module, as JSON values."""
        ...

    def build(self, architecture: Mapping[str, Any], /) -> nn.Module:
        """Build a module with random weights from the result of :meth:`architecture`.

        Raises:
            UnknownModelError: the library has no model of this name.
            ModelUnavailableError: the description names another class, or options that would fetch files or run code.
        """
        ...


@runtime_checkable
class TransformersBackend(Backend, Protocol):
    """The backend of transformers, which also writes and reads its own folders."""

    def load(
        self,
        name: str,
        /,
        *,
        pretrained: bool,
        image_size: Size | None,
        dtype: torch.dtype | None,
        weights: str | Path | None = None,
        classes: int | None = None,
        display_name: str | None = None,
        output: str | None = None,
        backbone: str | None = None,
    ) -> VisionModel:
        """Load a hub id, a local folder or, without pretrained weights, a model type.

        Args:
            name, pretrained, image_size, dtype, weights, classes: as in :meth:`Backend.load`.
            display_name: name in messages and results; by default ``name``.
            output: ``"features"`` omits the classifier; None keeps what the checkpoint was saved with.
            backbone: path of the submodule that takes the image, for a model with several candidates.
        """
        ...

    def write(self, module: Any, folder: Path, preprocessing: Preprocessing | None, /) -> None:
        """Write a module and its preprocessing as an ordinary transformers folder."""
        ...

    def read(self, folder: Path, architecture: Mapping[str, Any], /) -> nn.Module:
        """Return the module that :meth:`write` wrote.

        Raises:
            ValueError: the weights belong to another model.
        """
        ...

    def saved_processor(
        self, family: str | Mapping[str, Any], settings: Mapping[str, Any], size: Size | None, source: str, /
    ) -> Preprocessing:
        """Return the settings of an image processor as a Preprocessing.

        Args:
            family: name of the processor class, or the settings, that supply missing values.
            settings: content of a ``preprocessor_config.json``.
            size: height and width of the input; None for the processor's own size.
            source: origin of the settings, for people to read.
        """
        ...


@runtime_checkable
class TimmBackend(Backend, Protocol):
    """The backend of timm."""

    def read_data_config(self, config: Mapping[str, Any], image_size: Size | None, /) -> Preprocessing:
        """Return timm's data configuration as a Preprocessing."""
        ...


@runtime_checkable
class TorchvisionBackend(Backend, Protocol):
    """The backend of torchvision."""

    def read_transforms(self, transforms: Any, size: Size | None, /) -> Preprocessing:
        """Return torchvision's ``weights.transforms()`` as a Preprocessing."""
        ...
