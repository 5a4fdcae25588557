"""VisionModel: a network from any library, with the facts about it that the rest of the package needs."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.errors import CallError, UnclearOutputError, UnsupportedModelError, WorkError, warn
from vitscope.images.image import InputImage
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import photos
from vitscope.models.evaluation import eager, evaluating
from vitscope.models.forward import Classes, NoClasses, Observed
from vitscope.models.input_pixels import displayed_images, input_channels, require_pixels
from vitscope.models.layout import Layout
from vitscope.models.module_errors import quoted_module_errors
from vitscope.models.outputs import Output, probabilities
from vitscope.models.pickling import check_picklable
from vitscope.models.prediction import Prediction, ranked_predictions
from vitscope.models.text import TextEncoder, TextLogits, require_text_tower, require_texts
from vitscope.typing import Pixels
from vitscope.validation import require_at_least


@dataclass(frozen=True, eq=False)
class VisionModel:
    """A live module with its preprocessing, labels and token layout, as :func:`vitscope.load` returns it.

    Models can be copied and pickled. A pickle contains the weights and needs only the library that defines the module.

    Attributes:
        name: name or folder that was loaded, or the class of the module.
        library: ``"transformers"``, ``"timm"``, ``"torchvision"``, or ``"module"`` for any other module.
        module: the network itself.
        forward: function that runs the module on its input and returns logits (batch, class), or None without a
            classifier.
        layout: tokens of the transformer; None if they are unknown. Attention can be captured even then.
        preprocessing: preprocessing of images; None if it is unknown, so that only preprocessed tensors are accepted.
        labels: names of the classes; None without a classifier, or if they are unknown.
        versions: versions of the libraries, by name.
        embed: function that returns the features (batch, channel) that a classifier would read; None if there are none,
            or if they are unknown.
        backbone: path of the vision transformer inside ``module``, which ``layout`` describes; empty if ``module``
            is the transformer itself.
        output: meaning of the logits, see :data:`~vitscope.models.outputs.Output`; None if it is derived from
            the output.
        verified: whether the layout is certain. If it was derived from a class that the module contains or inherits
            from, the first capture verifies it by an experiment.
        no_preprocessing: reason why ``preprocessing`` is None.
        text: text tower of a text-image model with its tokenizer, see :meth:`text_logits`; None without one.

    Examples:
        >>> import skimage, vitscope as vs
        >>> model = vs.load("vit-nano")
        >>> model
        <VisionModel vit-nano (transformers) 32×32 px, patches of 4×4>
        >>> model.predict(skimage.data.chelsea())[0][0].label
        'cat'
    """

    name: str
    library: str
    module: nn.Module
    forward: Callable[[Tensor], Tensor | None]
    layout: Layout | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None
    versions: Mapping[str, str] | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    backbone: str = ""
    output: Output | None = None
    verified: bool = True
    no_preprocessing: str = ""
    text: TextEncoder | None = None

    def __repr__(self) -> str:
        size = "" if self.preprocessing is None else " {}×{} px".format(*self.preprocessing.size)
        grid = "" if self.layout is None else f", patches of {'×'.join(map(str, self.layout.patch_size))}"
        return f"<VisionModel {self.name} ({self.library}){size}{grid}>"

    def __copy__(self) -> "VisionModel":
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "VisionModel":
        return replace(self, **{name: copy.deepcopy(value, memo) for name, value in vars(self).items()})

    def __reduce_ex__(self, protocol: Any) -> Any:
        check_picklable(self.name, vars(self), protocol)
        return super().__reduce_ex__(protocol)

    @property
    def device(self) -> torch.device:
        """The device of the module's weights; the CPU if it has none."""
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the module's weights; float32 if it has none."""
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def prepare(self, images: Any) -> tuple[Pixels, list[InputImage]]:
        """Return images as the model's input, on its device and in its dtype, and the mapping back to each photo.

        Args:
            images: a path, a PIL image, a uint8 array (height, width, 3), a list of these, or a preprocessed tensor
                (batch, channel, height, width).

        Returns:
            The input, (batch, channel, height, width), and one :class:`InputImage` per image.

        Raises:
            CallError: the images are not valid, the model does not accept their size, or its preprocessing is unknown.
            ImageError: an image file cannot be read.

        Examples:
            >>> import skimage, vitscope as vs
            >>> pixels, images = vs.load("vit-nano").prepare(skimage.data.chelsea())
            >>> pixels.shape, images[0].photo.size
            (torch.Size([1, 3, 32, 32]), (451, 300))
        """
        if self.device.type == "meta":
            raise CallError(f"{self.name} is on the device meta, which holds no weights: load it on another device")
        if isinstance(images, Tensor):
            pixels = require_pixels(images, self.channels)
            views = displayed_images(pixels, self.preprocessing)
        else:
            pixels, views = self._require_preprocessing().read_batch(photos(images))
        if self.layout is not None:
            height, width = pixels.shape[-2:]
            grid, patch = self.layout.grid(height, width), self.layout.patch_size
            reason = self.layout.hierarchy and self.layout.hierarchy.why_unsupported(grid)
            if reason:
                raise CallError(f"{self.name} does not accept an input of {height}×{width} pixels: {reason}")
            covered = (grid.height * patch[0] / height, grid.width * patch[1] / width)
            views = [view.top_left(*covered) for view in views]
        return pixels.to(self.device, self.dtype), views

    def predict(self, images: Any, top_k: int = 5) -> list[list[Prediction]]:
        """Return the most probable classes of each image, the most probable first.

        Args:
            images: as for :meth:`prepare`.
            top_k: maximum number of classes per image. The default is 5.

        Returns:
            One list of predictions per image.

        Raises:
            CallError: the images are not valid, or ``top_k`` is below 1.
            ImageError: an image file cannot be read.
            UnsupportedModelError: the model has no classifier, or it is uncertain which output holds the classes.
            WorkError: the model fails on the input, or its logits are NaN or infinite.

        Examples:
            >>> import skimage, vitscope as vs
            >>> [[first, second]] = vs.load("swin-nano").predict(skimage.data.chelsea(), top_k=2)
            >>> first.label, second.label
            ('dog', 'cat')
        """
        top_k = require_at_least(1, top_k, "top_k")
        pixels, _ = self.prepare(images)
        with torch.no_grad(), self.running():
            logits = self.logits(pixels)
        return self.predictions(logits, top_k)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the module in evaluation mode inside a context; afterwards restore all flags and settings that changed.

        Examples:
            >>> import vitscope as vs
            >>> model = vs.load("vit-nano")
            >>> with model.running():
            ...     model.module.training
            False
        """
        hierarchy = None if self.layout is None else self.layout.hierarchy
        with (
            evaluating(self.module),
            eager(self.module),
            nullcontext() if hierarchy is None else hierarchy.preserved_state(),
        ):
            yield

    def logits(self, pixels: Pixels) -> Tensor | None:
        """Return logits (batch, class), or None without a classifier.

        Args:
            pixels: preprocessed images, (batch, channel, height, width).

        Raises:
            UnclearOutputError: it is uncertain which entry of the output holds the classes.
            CallError: the module does not accept this input.
            WorkError: the module failed; its own error is quoted.

        Examples:
            >>> import skimage.data, torch, vitscope as vs
            >>> model = vs.load("vit-nano")
            >>> pixels, _ = model.prepare(skimage.data.chelsea())
            >>> with torch.no_grad(), model.running():
            ...     model.logits(pixels).shape
            torch.Size([1, 10])
        """
        with quoted_module_errors(self.name, pixels):
            return self.forward(pixels)

    def logits_or_none(self, pixels: Pixels) -> Tensor | None:
        """Return the result of :meth:`logits`, or None if it is uncertain which entry of the output holds the classes.

        Args:
            pixels: preprocessed images, (batch, channel, height, width).

        Raises:
            CallError: the module does not accept this input.
            WorkError: the module failed; its own error is quoted.

        Examples:
            >>> import skimage.data, torch, vitscope as vs
            >>> model = vs.load("vit-nano")
            >>> pixels, _ = model.prepare(skimage.data.chelsea())
            >>> with torch.no_grad(), model.running():
            ...     model.logits_or_none(pixels).shape
            torch.Size([1, 10])
        """
        try:
            return self.logits(pixels)
        except UnclearOutputError:
            return None

    def features(self, pixels: Pixels) -> Float[Tensor, "row channel"]:
        """Return the features that a classifier would read, for a model without a classifier.

        Args:
            pixels: preprocessed images, (batch, channel, height, width).

        Returns:
            The features, (batch, channel); more rows only inside :func:`~vitscope.models.outputs.copied_images`.

        Raises:
            CallError: the features of the model are unknown, or the module does not accept this input.
            UnclearOutputError: the module returns no features.
            WorkError: the module failed; its own error is quoted.

        Examples:
            >>> import skimage.data, torch, vitscope as vs
            >>> model = vs.load(vs.load("vit-nano").module.vit, image_size=32)
            >>> pixels, _ = model.prepare(skimage.data.chelsea())
            >>> with torch.no_grad(), model.running():
            ...     model.features(pixels).shape
            torch.Size([1, 192])
        """
        if self.embed is None:
            raise CallError(
                f"{self.name} returns neither classes nor features that vitscope recognises: pass logits= or embed= to "
                "vitscope.load, a function of the module's output"
            )
        with quoted_module_errors(self.name, pixels):
            return self.embed(pixels)

    def text_logits(self, texts: Sequence[str]) -> TextLogits:
        """Return a function from features (batch, channel) to the logits of texts (batch, text).

        The logits are those of CLIP (temperature · cosine) or SigLIP (also with a bias). The vectors of the texts, with
        the temperature as their length, are computed once: ``model.text_logits(texts).vectors``, (text, channel).

        Args:
            texts: the texts, such as ``["a photo of a boxer"]``. They reach the tokenizer as they are.

        Raises:
            CallError: a text is empty or longer than the text tower allows, or the tokenizer belongs to another model.
            UnsupportedModelError: the model has no text tower.
            ModelUnavailableError: the text tower or its tokenizer is not available.

        Examples:
            >>> import vitscope as vs
            >>> try:
            ...     vs.load("vit-nano").text_logits(["a photo of a cat"])
            ... except vs.UnsupportedModelError as error:
            ...     print(error)
            vit-nano has no text tower: load a CLIPModel or SiglipModel of transformers with its own weights
        """
        texts = require_texts(texts)
        return require_text_tower(self.text, self.name)(texts, self.device)

    @property
    def meaning(self) -> Output:
        """The meaning of the numbers that :meth:`logits` returns; ``"logits"`` unless another meaning is known."""
        if isinstance(self.forward, NoClasses) or (self.embed is not None and isinstance(self.forward, Classes)):
            return "features"
        observed = self.forward.meaning if isinstance(self.forward, Observed) else None
        return self.output or observed or "logits"

    def probabilities(self, logits: Tensor) -> Float[Tensor, "batch label"] | None:
        """Return the probability of each class; None if the model predicts values.

        Args:
            logits: output of :meth:`logits`, (batch, class).

        Returns:
            float32 (batch, class).

        Examples:
            >>> import torch, vitscope as vs
            >>> round(float(vs.load("vit-nano").probabilities(torch.zeros(1, 10))[0, 0]), 3)
            0.1
        """
        return probabilities(logits, self.meaning)

    def predictions(self, logits: Tensor | None, top_k: int = 5) -> list[list[Prediction]]:
        """Return the ranked classes of logits (batch, class).

        Args:
            logits: output of :meth:`logits`.
            top_k: maximum number of classes per image. The default is 5.

        Returns:
            One list of predictions per image, the most probable class first.

        Raises:
            UnsupportedModelError: the logits are None, because the model has no classifier.
            WorkError: the logits contain NaN or infinity.

        Examples:
            >>> import torch, vitscope as vs
            >>> [[first]] = vs.load("vit-nano").predictions(torch.eye(10)[3:4], top_k=1)
            >>> first.label
            'cat'
        """
        if logits is None:
            advice = ": pass select= or logits= to vitscope.load if it has classes" if self.library == "module" else ""
            raise UnsupportedModelError(f"{self.name} has no classifier: it returns features, not classes{advice}")
        if not bool(torch.isfinite(logits).all()):
            raise WorkError(f"{self.name} returned NaN or infinity: check its weights and dtype")
        return ranked_predictions(logits, self.probabilities(logits), self.names(logits.shape[-1]), top_k)

    def names(self, count: int) -> tuple[str, ...]:
        """Return the labels of all classes, or names such as "class 0" if the model's labels do not fit their number.

        Args:
            count: number of classes.

        Warns:
            VitscopeWarning: the model has labels, but another number of them.

        Examples:
            >>> import vitscope as vs
            >>> vs.load("vit-nano").names(10)[:3]
            ('airplane', 'automobile', 'bird')
        """
        if self.labels is not None and len(self.labels) == count:
            return self.labels
        if self.labels is not None:
            warn(
                f"{self.name} has {count} outputs and {len(self.labels)} labels, so its classes are numbered: pass "
                "labels= to vitscope.load"
            )
        return tuple("value" if count == 1 and self.meaning == "value" else f"class {i}" for i in range(count))

    def label(self, index: int) -> str:
        """Return the label of a class, such as "cat", or "class 3" if the model has no labels.

        Args:
            index: index of the class, from 0.

        Examples:
            >>> import vitscope as vs
            >>> vs.load("vit-nano").label(3)
            'cat'
        """
        return self.labels[index] if self.labels and index < len(self.labels) else f"class {index}"

    def _require_preprocessing(self) -> Preprocessing:
        """Return the preprocessing of photos."""
        if self.preprocessing is None:
            reason = f" ({self.no_preprocessing})" if self.no_preprocessing else ""
            raise CallError(
                f"{self.name} came without preprocessing{reason}: pass a tensor (batch, {self.channels or 3}, height, "
                "width) that is already preprocessed, or image_size to vitscope.load together with mean and std, or "
                "processor"
            )
        return self.preprocessing

    @property
    def channels(self) -> int | None:
        """The number of channels of the input; None if it is unknown."""
        if self.preprocessing is not None:
            return len(self.preprocessing.mean)
        # In any other module, the first convolution is not necessarily the one that receives the image.
        return None if self.library == "module" else input_channels(self.module)
