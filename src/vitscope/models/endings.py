"""The origin of a module's output: the layer or function that computed it last, and what that proves."""

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitscope.models.outputs import Output
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.unwatched import unwatched

# Names of layers whose output is a row of classes, and names of layers whose output is an embedding.
_CERTAIN_CLASSIFIER = re.compile(r"classif|logit|pred")
_CLASSIFIER = re.compile(r"head|^fc|^cls|linear|^out$|output|last_layer|final")
_EMBEDDING = re.compile(r"proj|embed|neck|feature|visual|norm|bottleneck")
_CONTAINER = re.compile(
    r"^(\d+|_?model|_?net|network|module|backbone_and_head|layers|seq|sequential|modules_to_save|default)$"
)
# Layers that pass their input on, and layers whose output is an embedding.
_PASS_THROUGH = (nn.Identity, nn.Flatten, nn.Dropout)
_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.GroupNorm, nn.RMSNorm, nn.AdaptiveAvgPool2d, *_PASS_THROUGH)


@dataclass(frozen=True)
class Ending:
    """The origin of the rows that a module returned.

    Attributes:
        path: path of the layer inside the module.
        layer: last layer that computed the rows; None if a function did.
        function: ``"softmax"`` or ``"sigmoid"`` if that function computed the rows last; empty otherwise.
        any_layer_ran: whether any layer ran at all; if not, the rows are a function of the pixels alone.
    """

    path: str = ""
    layer: nn.Module | None = None
    function: str = ""
    any_layer_ran: bool = True

    @property
    def meaning(self) -> Output | None:
        """The meaning that the ending proves: classes, probabilities or features; None if it proves nothing."""
        if self.function or isinstance(self.layer, nn.Softmax | nn.Sigmoid):
            return "probabilities"
        if isinstance(self.layer, nn.LogSoftmax):
            return "softmax"
        if isinstance(self.layer, _NORMS):
            return "features"
        return _meaning_of_names(self.path.split(".")) if isinstance(self.layer, nn.Linear) else None


def _meaning_of_names(path: Sequence[str]) -> Output | None:
    """Return the meaning implied by the names on the path of a last linear layer; None if there is none or several."""
    if any(_CERTAIN_CLASSIFIER.search(name) for name in path):
        return "logits"
    names = [name for name in path if not _CONTAINER.search(name)]
    if not names:
        return "logits"  # nn.Sequential(backbone, head)
    embeds = bool(_EMBEDDING.search(names[-1]))
    if any(_CLASSIFIER.search(name) for name in names[-2:]):
        return None if embeds else "logits"
    return "features" if embeds else None


_PROBABILITY_FUNCTIONS = {
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit), "sigmoid"),
}


class _ProbabilityRecorder(TorchFunctionMode):
    """A recorder of the results of softmax and sigmoid that does not keep them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[weakref.ref[Tensor], str]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _PROBABILITY_FUNCTIONS.get(func)
        if name is not None and isinstance(result, Tensor):
            self.results.append((weakref.ref(result), name))
        return result


@contextmanager
def watch_ending(module: nn.Module) -> Iterator[Callable[[Tensor], Ending]]:
    """Yield a function that returns the ending of a tensor which the module computed inside the context."""
    outputs: list[tuple[str, nn.Module, weakref.ref[Tensor]]] = []

    def recorder(path: str) -> Callable[..., None]:
        def record(layer: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((path, layer, weakref.ref(output)))

        return record

    handles = [
        layer.register_forward_hook(in_this_thread(recorder(path)))
        for path, layer in module.named_modules()
        if path and not any(True for _ in layer.children())
    ]
    probabilities = _ProbabilityRecorder()

    def ending(rows: Tensor) -> Ending:
        with unwatched():
            for reference, name in reversed(probabilities.results):
                if _shares_storage(reference(), rows):
                    return Ending(function=name)
            endings = [
                Ending(path, layer) for path, layer, source in reversed(outputs) if _shares_storage(source(), rows)
            ]
        computed = (candidate for candidate in endings if not isinstance(candidate.layer, _PASS_THROUGH))
        return next(computed, endings[0] if endings else Ending(any_layer_ran=bool(outputs)))

    try:
        with probabilities:
            yield ending
    finally:
        for handle in handles:
            handle.remove()


def _shares_storage(source: Tensor | None, rows: Tensor) -> bool:
    """Return whether the rows are the tensor itself or a view of it."""
    return source is not None and (
        source is rows or source.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    )
