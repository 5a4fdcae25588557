"""VisionModel: a network of any library, with the few facts the rest of the package needs to know."""

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.errors import CallError, UnsupportedModelError, WorkError, quoted_error, warn
from vitscope.grid import Grid
from vitscope.images.image import InputImage, image_of_unit
from vitscope.images.preprocessing import Preprocessing
from vitscope.images.reading import photos
from vitscope.interrupts import uninterrupted
from vitscope.models.forward import Classes, NoClasses, Observed
from vitscope.models.hierarchy import Hierarchy
from vitscope.models.outputs import Output, UnclearOutputError, probabilities
from vitscope.typing import Pixels
from vitscope.validation import whole_number

# What a module raises for an input that it does not take.
_FOREIGN_ERRORS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError, ImportError)


@dataclass(frozen=True)
class Layout:
    """What the tokens of a transformer are, and which of them the classifier reads.

    Attributes:
        patch_size: (height, width) of a patch in pixels of the input.
        prefix_names: the tokens before the patches, in order.
        readout: weights that sum to one over sources: the name of a prefix token, ``"patches"`` or ``"tokens"``
            (uniform), ``"pooling"`` (the attention of a pooling layer, seen while the model runs). Empty where the
            classifier reads something that no token leads to.
        hierarchy: windows and merging, where attention is not over one grid of all tokens.
        partial_patches: a last patch that the input fills only in part is padded, not left over.
        states_readout: the caller of load() named the readout, so one that turns out wrong is an error.
    """

    patch_size: tuple[int, int]
    prefix_names: tuple[str, ...]
    readout: Mapping[str, float]
    hierarchy: Hierarchy | None = None
    partial_patches: bool = False
    states_readout: bool = False

    def grid(self, height: int, width: int) -> Grid:
        """The (finest) token grid of an input of ``height`` × ``width`` pixels."""
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        if self.partial_patches:
            rows, columns = -(-height // self.patch_size[0]), -(-width // self.patch_size[1])
        if not rows or not columns:
            patch = "×".join(map(str, self.patch_size))
            raise CallError(f"an input of {height}×{width} pixels is smaller than one patch of {patch}")
        return Grid(rows, columns, len(self.prefix_names))


@dataclass(frozen=True)
class Prediction:
    """One class of an image.

    Attributes:
        label: the name of the class.
        index: its place in the model's output.
        probability: in [0, 1], as the model's head means it (softmax or sigmoid); None if it predicts values.
        value: what the model predicts if that is not a probability (regression), else None.
    """

    label: str
    index: int
    probability: float | None
    value: float | None = None

    def __repr__(self) -> str:
        number = f"probability={self.probability}" if self.value is None else f"value={self.value}"
        return f"Prediction(label={self.label!r}, index={self.index}, {number})"


@dataclass(frozen=True, eq=False)
class VisionModel:
    """A live module with its preprocessing, labels and token layout. Made by :func:`vitscope.load`.

    ``layout`` is None for a module whose tokens are unknown (attention is still captured), ``preprocessing`` is
    None for a module that takes tensors only, ``labels`` is None without a classifier.
    ``forward`` runs the module on its input and returns logits, or None where there is no classifier; then ``embed``
    returns the features that a classifier would read, (batch, channel), and is None where nobody knows them.
    ``backbone`` is the path of the vision transformer inside ``module``, empty if ``module`` is the transformer itself:
    ``layout`` describes that part alone.
    ``output`` says what logits mean, see :data:`~vitscope.models.outputs.Output`; None if the output decides.
    ``verified`` is False if the layout was taken from a class that the module contains or derives from: the first
    capture then checks it by experiment. ``no_preprocessing`` says why ``preprocessing`` is None.
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

    def __repr__(self) -> str:
        size = "" if self.preprocessing is None else " {}×{} px".format(*self.preprocessing.size)
        grid = "" if self.layout is None else f", patches of {'×'.join(map(str, self.layout.patch_size))}"
        return f"<VisionModel {self.name} ({self.library}){size}{grid}>"

    @property
    def device(self) -> torch.device:
        parameter = next(self.module.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @property
    def dtype(self) -> torch.dtype:
        floating = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    def prepare(self, images: Any) -> tuple[Pixels, list[InputImage]]:
        """Images as the model's input, on its device and in its dtype, and the way back to each photo.

        Args:
            images: a path, PIL image or uint8 array (H, W, 3), a list of these, or a tensor
                (batch, 3, height, width) taken as already preprocessed.
        """
        if self.device.type == "meta":
            raise CallError(f"{self.name} is on the device meta, which holds no weights: load it on another device")
        if isinstance(images, Tensor):
            pixels, views = images, self._images_of(self._checked(images))
        else:
            pixels, views = self._preprocessed(images)
        if self.layout is not None:
            height, width = pixels.shape[-2:]
            grid, patch = self.layout.grid(height, width), self.layout.patch_size
            refused = self.layout.hierarchy and self.layout.hierarchy.why_unsupported(grid)
            if refused:
                raise CallError(f"{self.name} takes no input of {height}×{width} pixels: {refused}")
            seen = (grid.height * patch[0] / height, grid.width * patch[1] / width)
            views = [view.top_left(*seen) for view in views]
        return pixels.to(self.device, self.dtype), views

    def predict(self, images: Any, top_k: int = 5) -> list[list[Prediction]]:
        """The ``top_k`` likeliest classes of each image, likeliest first.

        Raises:
            CallError: the model has no classifier, or the images cannot be read as such.
        """
        top_k = whole_number(top_k, "top_k")
        if top_k < 1:
            raise CallError(f"top_k is {top_k}, at least 1 is expected")
        pixels, _ = self.prepare(images)
        with torch.no_grad(), self.running():
            logits = self.answer(pixels)
        return self.predictions(logits, top_k)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode; flags and whatever the library sets while it runs are as before afterwards."""
        hierarchy = None if self.layout is None else self.layout.hierarchy
        with (
            evaluating(self.module),
            uncompiled(self.module),
            nullcontext() if hierarchy is None else hierarchy.preserved_state(),
        ):
            yield

    def answer(self, pixels: Pixels) -> Tensor | None:
        """Logits (batch, class), or None without a classifier.

        Raises:
            UnclearOutputError: which part of the output holds the classes is not certain.
            CallError: the module says that it does not take this input.
            WorkError: the module failed; its own error is quoted.
        """
        with self._quoted(pixels):
            return self.forward(pixels)

    def answer_or_none(self, pixels: Pixels) -> Tensor | None:
        """:meth:`answer`, or None also if it is not certain which part of the output holds the classes."""
        try:
            return self.answer(pixels)
        except UnclearOutputError:
            return None

    @contextmanager
    def _quoted(self, pixels: Tensor) -> Iterator[None]:
        """Errors of the module, as one line that says what it was given."""
        try:
            yield
        except _FOREIGN_ERRORS as error:
            # Errors of the caller's own classes are the caller's; the batch loop handles missing memory.
            own = type(error).__module__.partition(".")[0] not in ("builtins", "torch", "einops")
            if own or isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise
            height, width = pixels.shape[-2:]
            if isinstance(error, AssertionError) and str(error):
                raise CallError(f"{self.name} takes no input of {height}×{width} pixels: {error}") from None
            shape = "×".join(map(str, pixels.shape))
            raise WorkError(
                f"{self.name} failed on an input of {shape} (batch×channel×height×width): {quoted_error(error)}"
            ) from error

    def features(self, pixels: Pixels) -> Float[Tensor, "batch channel"]:
        """What a classifier would read, of a model that has none."""
        if self.embed is None:
            raise CallError(
                f"{self.name} gives neither classes nor features that vitscope knows: pass logits= or embed= to "
                "vitscope.load, a function of the module's output"
            )
        with self._quoted(pixels):
            return self.embed(pixels)

    @property
    def meaning(self) -> Output:
        """What the numbers of :meth:`answer` are; ``"logits"`` as long as nothing says otherwise."""
        if isinstance(self.forward, NoClasses) or (self.embed is not None and isinstance(self.forward, Classes)):
            return "features"
        observed = self.forward.meaning if isinstance(self.forward, Observed) else None
        return self.output or observed or "logits"

    def probabilities(self, logits: Tensor) -> Float[Tensor, "batch label"] | None:
        """Logits (batch, class) as probabilities, float32; None if the model predicts values. The one place."""
        return probabilities(logits, self.meaning)

    def predictions(self, logits: Tensor | None, top_k: int = 5) -> list[list[Prediction]]:
        """Logits (batch, class) as ranked classes."""
        if logits is None:
            advice = ": pass select= or logits= to vitscope.load if it has classes" if self.library == "module" else ""
            raise UnsupportedModelError(f"{self.name} has no classifier: it gives features, not classes{advice}")
        if not bool(torch.isfinite(logits).all()):
            raise WorkError(f"{self.name} answered with NaN or infinity: check its weights and its dtype")
        chances = self.probabilities(logits)
        numbers, indices = (logits.float() if chances is None else chances).topk(min(top_k, logits.shape[-1]))
        names = self.names(logits.shape[-1])
        return [
            [
                Prediction(names[i], i, None, number) if chances is None else Prediction(names[i], i, number)
                for i, number in zip(row_i, row_n, strict=True)
            ]
            for row_i, row_n in zip(indices.tolist(), numbers.tolist(), strict=True)
        ]

    def names(self, count: int) -> tuple[str, ...]:
        """The labels of ``count`` classes; numbered classes if the model's labels are of another head."""
        if self.labels is not None and len(self.labels) == count:
            return self.labels
        if self.labels is not None:
            warn(
                f"{self.name} has {count} outputs and {len(self.labels)} labels, so its classes are numbered: pass "
                "labels= to vitscope.load"
            )
        return tuple("value" if count == 1 and self.meaning == "value" else f"class {i}" for i in range(count))

    def label(self, index: int) -> str:
        """The name of a class."""
        known = self.labels is not None and index < len(self.labels)
        return self.labels[index] if known and self.labels else f"class {index}"

    def _preprocessed(self, images: Any) -> tuple[Tensor, list[InputImage]]:
        if self.preprocessing is None:
            why = f" ({self.no_preprocessing})" if self.no_preprocessing else ""
            raise CallError(
                f"{self.name} came without preprocessing{why}: pass a tensor (batch, {self.channels or 3}, height, "
                "width) that is preprocessed already, or image_size to vitscope.load together with mean and std, or "
                "processor"
            )
        sources = photos(images)
        made = [self.preprocessing.read(source) for source in sources]
        return torch.stack([pixels for pixels, _ in made]), [image for _, image in made]

    @property
    def channels(self) -> int | None:
        """The number of channels of the input; None if nothing tells it."""
        if self.preprocessing is not None:
            return len(self.preprocessing.mean)
        # Of a module of one's own the first convolution need not be the one that sees the image.
        return None if self.library == "module" else input_channels(self.module)

    def _checked(self, images: Tensor) -> Tensor:
        channels = self.channels
        if images.ndim != 4 or 0 in images.shape or channels not in (None, images.shape[1]):
            raise CallError(
                f"a tensor of shape {tuple(images.shape)} is no batch of images: (batch, {channels or 3}, height, "
                "width) is expected"
            )
        if not images.is_floating_point():
            raise CallError(f"a tensor of {images.dtype} is not preprocessed: pass floating point, or arrays of uint8")
        if not bool(torch.isfinite(images).all()):
            raise CallError("the tensor holds NaN or infinity")
        return images

    def _images_of(self, pixels: Tensor) -> list[InputImage]:
        if self.preprocessing is not None:
            return [self.preprocessing.image_of(one) for one in pixels]
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        shown = (pixels - low) / (high - low).clamp_min(1e-12)
        return [image_of_unit(one.detach().float().cpu()) for one in shown]


def input_channels(module: nn.Module) -> int | None:
    """The channels that the first convolution of a module takes; None if it has none."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            return child.in_channels
    return None


# How many runs hold a module in evaluation mode, and the flag it had before the first of them.
_held: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()
_held_lock = threading.Lock()


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Compiled modules, blocks and forward methods run as they were written, so that attention can be seen."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    if not any(type(child).__name__ == "OptimizedModule" for child in module.modules()):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        # A compiled module inside another one complains of the hooks that watch the run.
        warnings.filterwarnings("ignore", message="Using `torch.compile")
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; each submodule's training flag is as before afterwards, also when runs overlap in threads."""
    children, held = list(module.modules()), []
    try:
        with uninterrupted(), _held_lock:
            for child in children:
                runs, training = _held.get(child, (0, child.training))
                _held[child] = (runs + 1, training)
                child.training = False
                held.append(child)
        yield
    finally:
        with uninterrupted(), _held_lock:
            for child in held:
                runs, training = _held.pop(child)
                if runs > 1:
                    _held[child] = (runs - 1, training)
                else:
                    child.training = training
