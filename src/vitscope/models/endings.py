"""How the output of a module came about: the layer or function that made it last, and what that proves."""

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
from vitscope.models.unwatched import unwatched

# Names of layers whose output is one row of classes, and of layers whose output is an embedding.
_CERTAIN_CLASSIFIER = re.compile(r"classif|logit|pred")
_CLASSIFIER = re.compile(r"head|^fc|^cls|linear|^out$|output|last_layer|final")
_EMBEDDING = re.compile(r"proj|embed|neck|feature|visual|norm|bottleneck")
_CONTAINER = re.compile(
    r"^(\d+|_?model|_?net|network|module|backbone_and_head|layers|seq|sequential|modules_to_save|default)$"
)
# Layers that hand on what they are given, and layers whose output is an embedding.
_PASSING_ON = (nn.Identity, nn.Flatten, nn.Dropout)
_NORMS = (nn.LayerNorm, nn.BatchNorm1d, nn.GroupNorm, nn.RMSNorm, nn.AdaptiveAvgPool2d, *_PASSING_ON)


@dataclass(frozen=True)
class Ending:
    """How the rows that a module returned came about.

    Attributes:
        layer: the last layer whose output they are, and its ``path``; None if a function made them.
        function: ``"softmax"`` or ``"sigmoid"`` if that made them last.
        of_layers: whether any layer ran at all; else the rows are a function of the pixels.
    """

    path: str = ""
    layer: nn.Module | None = None
    function: str = ""
    of_layers: bool = True

    @property
    def meaning(self) -> Output | None:
        """What the ending proves: classes, probabilities or features; None if it proves nothing."""
        if self.function or isinstance(self.layer, nn.Softmax | nn.Sigmoid):
            return "probabilities"
        if isinstance(self.layer, nn.LogSoftmax):
            return "softmax"
        if isinstance(self.layer, _NORMS):
            return "features"
        return _named_meaning(self.path.split(".")) if isinstance(self.layer, nn.Linear) else None


def _named_meaning(path: Sequence[str]) -> Output | None:
    """What the names on the path of a last linear layer say; None if they say nothing, or two things."""
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


class _Watch(TorchFunctionMode):
    """Remembers the results of softmax and sigmoid, without keeping them alive."""

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
def watched_ending(module: nn.Module) -> Iterator[Callable[[Tensor], Ending]]:
    """While held, how the output of ``module`` comes about is watched; the result tells it of a tensor."""
    outputs: list[tuple[str, nn.Module, weakref.ref[Tensor]]] = []

    def note(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((path, layer, weakref.ref(output)))

        return hook

    handles = [
        layer.register_forward_hook(note(path))
        for path, layer in module.named_modules()
        if path and not any(True for _ in layer.children())
    ]
    watch = _Watch()

    def ending(rows: Tensor) -> Ending:
        with unwatched():
            for reference, name in reversed(watch.results):
                if _same(reference(), rows):
                    return Ending(function=name)
            endings = [Ending(path, layer) for path, layer, source in reversed(outputs) if _same(source(), rows)]
        computed = (end for end in endings if not isinstance(end.layer, _PASSING_ON))
        return next(computed, endings[0] if endings else Ending(of_layers=bool(outputs)))

    try:
        with watch:
            yield ending
    finally:
        for handle in handles:
            handle.remove()


def _same(source: Tensor | None, rows: Tensor) -> bool:
    """Whether a tensor is the rows, or the rows are a view of it."""
    return source is not None and (
        source is rows or source.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    )
