"""What a model returns: which tensor holds the classes, and what its numbers mean.

.. code-block:: text

    returned                                          read as
    ------------------------------------------------  ---------------------------------------------------
    (batch, class), (batch,), (batch, 1, class)       logits: one row per image
    a mapping or object with ``logits``               that entry
    a mapping or object with one classifier key       that entry, see CLASSIFIER_KEYS
    a mapping or tuple with one 2-d tensor            that tensor
    several heads                                     refused; ``select=`` names one: a key, a position, "key.key"
    anything else                                     refused; ``logits=`` or ``embed=`` read it
"""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitscope.errors import CallError, UnsupportedModelError
from vitscope.models.unwatched import unwatched

Output = Literal["logits", "softmax", "sigmoid", "probabilities", "value", "features"]
Select = str | int

CLASSIFIER_KEYS = (
    "logits",
    "class_logits",
    "cls_logits",
    "logit",
    "pred",
    "preds",
    "prediction",
    "predictions",
    "scores",
)
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


class UnclearOutputError(UnsupportedModelError):
    """The module ran, but which part of its output are the classes is not certain.

    ``returned`` is the tensor in doubt, for those who only ask what it depends on.
    """

    def __init__(self, message: str, returned: Tensor | None = None) -> None:
        super().__init__(message)
        self.returned = returned


def check_output(output: Any) -> Output | None:
    """Refuse what is no meaning of an output."""
    if output is not None and output not in get_args(Output):
        raise CallError(f"output is {output!r}: choose {', '.join(get_args(Output))}")
    return output


def parts_of(returned: Any) -> dict[str | int, Any] | None:
    """The named or numbered parts of what a module returned; None for a tensor or something without parts."""
    if isinstance(returned, Mapping):
        return dict(returned)
    if hasattr(returned, "_fields"):
        return {name: getattr(returned, name) for name in returned._fields}
    if isinstance(returned, list | tuple):
        return dict(enumerate(returned))
    if is_dataclass(returned):
        return {part.name: getattr(returned, part.name) for part in fields(returned)}
    return dict(vars(returned)) if hasattr(returned, "__dict__") and not isinstance(returned, Tensor) else None


def select_part(returned: Any, select: Select, name: str) -> Any:
    """The part of an output that ``select`` names.

    Raises:
        CallError: there is no such part; the message lists those that there are.
    """
    for step in select.split(".") if isinstance(select, str) else [select]:
        parts = parts_of(returned) or {}
        numbered = list(parts.values())
        if step in parts:
            returned = parts[step]
        elif isinstance(step, int) and -len(numbered) <= step < len(numbered):
            returned = numbered[step]
        elif isinstance(step, str) and step.isdecimal() and int(step) < len(numbered):
            returned = numbered[int(step)]
        else:
            raise CallError(f"select={select!r} is not in the output of {name}: it returns {in_words(returned)}")
    return returned


def classes_of(returned: Any, batch: int, name: str, select: Select | None = None) -> Tensor | None:
    """The (batch, class) tensor of an output; None if it holds no classes (the tokens of a bare backbone).

    Raises:
        UnclearOutputError: several tensors could be meant, or the tensor is not one row of classes per image.
    """
    if select is not None:
        returned = select_part(returned, select, name)
    parts = None if isinstance(returned, Tensor) else parts_of(returned)
    if parts is not None:
        returned = _only_candidate(parts, batch, name)
    if returned is None:
        return None
    if not isinstance(returned, Tensor):
        raise UnclearOutputError(
            f"{name} gives neither classes nor features that vitscope knows: it returns {in_words(returned)}; pass "
            "logits= to vitscope.load, a function of the output that returns (batch, class)"
        )
    rows = as_rows(returned, batch)
    if rows is None:
        raise UnclearOutputError(
            f"{name} gives neither classes nor features that vitscope knows: it returns a tensor of shape "
            f"{tuple(returned.shape)}, not one row per image; pass logits= to vitscope.load (a function of the output "
            "that returns (batch, class)), or embed= (one that returns (batch, channel))",
            returned,
        )
    return rows


def as_rows(tensor: Tensor, batch: int) -> Tensor | None:
    """(batch,), (batch, 1, class) or (batch, class, 1, 1) as (batch, class); None for other shapes."""
    if tensor.ndim == 0 or len(tensor) != batch or not tensor.is_floating_point():
        return None
    if tensor.ndim == 1:
        return tensor[:, None]
    if tensor.ndim == 3 and tensor.shape[1] == 1:
        return tensor[:, 0]
    if tensor.ndim == 4 and tuple(tensor.shape[2:]) == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor if tensor.ndim == 2 else None


def _only_candidate(parts: Mapping[str | int, Any], batch: int, name: str) -> Any:
    """The part that holds the classes: the one called so, else the only one with a row per image."""
    for key in CLASSIFIER_KEYS:
        if parts.get(key) is not None:
            return parts[key]
    if {"last_hidden_state", "hidden_states"} & parts.keys():
        return None
    tensors = {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    rows = {key: part for key, part in tensors.items() if part.ndim <= 3 and as_rows(part, batch) is not None}
    if len(rows) == 1:
        return next(iter(rows.values()))
    if not rows and not tensors:
        return None
    listed = ", ".join(f"{key!r} {tuple(part.shape)}" for key, part in tensors.items())
    if not rows:
        raise UnclearOutputError(
            f"{name} gives neither classes nor features that vitscope knows: it returns {listed}, not one row per "
            "image; pass logits= to vitscope.load (a function of the output that returns (batch, class)), or embed= "
            "(one that returns (batch, channel))"
        )
    raise UnclearOutputError(
        f"{name} returns several outputs ({listed}): pass select= to vitscope.load, the key or position of the one to "
        "explain"
    )


def in_words(returned: Any) -> str:
    """An output in words, for a message."""
    if isinstance(returned, Tensor):
        return f"a tensor of shape {tuple(returned.shape)}"
    parts = parts_of(returned)
    if not parts:
        return f"a {type(returned).__name__}"
    shapes = (tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts.values())
    listed = ", ".join(f"{key!r} {shape}" for key, shape in zip(parts, shapes, strict=True))
    return f"a {type(returned).__name__} of {listed}"


def probabilities(logits: Tensor, meaning: Output) -> Tensor | None:
    """The probability of each class, float32 (batch, class); None if the outputs are values without one.

    Args:
        meaning: ``"logits"`` decides between ``"softmax"`` and, for a single output, ``"sigmoid"``; rows that are
            probabilities already stay as they are.
    """
    logits = logits.float()
    if meaning == "value":
        return None
    if meaning == "probabilities" or (meaning in ("logits", "softmax") and _sums_to_one(logits)):
        return logits
    if meaning == "sigmoid" or (meaning == "logits" and logits.shape[-1] == 1):
        return logits.sigmoid()
    return logits.softmax(-1)


def _sums_to_one(rows: Tensor) -> bool:
    """Rows of a softmax: no logits of several classes are non-negative and sum to one by chance."""
    if rows.shape[-1] < 2:
        return False
    return bool((rows >= 0).all() and ((rows.sum(-1) - 1).abs() < 1e-4).all())


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


@dataclass(eq=False)
class Observed:
    """The forward pass of a module whose output has to be looked at: which part holds classes, and what they mean.

    Called with the module's input it returns logits (batch, class), or None if the output holds features.
    ``run`` calls the module if it is not called with the pixels alone. ``meaning`` is None until the first forward
    pass has shown it.
    """

    module: nn.Module
    name: str
    run: Callable[[Tensor], Any] | None = None
    output: Output | None = None
    select: Select | None = None
    logits: Callable[[Any], Tensor] | None = None
    has_labels: bool = False
    meaning: Output | None = field(default=None, init=False)

    def __call__(self, pixels: Tensor) -> Tensor | None:
        rows = self.rows(pixels)
        return None if self.meaning == "features" else rows

    def rows(self, pixels: Tensor) -> Tensor | None:
        """(batch, class) or (batch, channel), whichever the module returns."""
        run = self.run or self.module
        if self.meaning is not None:
            return self._read(run(pixels), len(pixels))
        with watched_ending(self.module) as ending:
            returned = run(pixels)
            rows = self._read(returned, len(pixels))
            if rows is None:
                self.meaning = "features"
                return None
            self.meaning = self._decided(returned, rows, ending(rows))
        return rows

    def features(self, pixels: Tensor) -> Tensor:
        """The embedding that the module returns, (batch, channel)."""
        rows = self.rows(pixels)
        if rows is None:
            raise UnclearOutputError(
                f"{self.name} returns neither classes nor one embedding per image: pass embed= to vitscope.load, a "
                "function of the output that returns (batch, channel)"
            )
        return rows

    def _read(self, returned: Any, batch: int) -> Tensor | None:
        if self.logits is None:
            return classes_of(returned, batch, self.name, self.select)
        rows = self.logits(returned)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != batch:
            raise CallError(f"logits= returned {in_words(rows)}: a tensor (batch, class) is expected")
        return rows

    def _decided(self, returned: Any, rows: Tensor, ending: Ending) -> Output:
        proven = ending.meaning
        if self.output is not None and self.output != "logits":
            return self.output
        if proven == "probabilities":
            return proven
        stated = self.output == "logits" or self.logits is not None or self.has_labels
        parts = None if isinstance(returned, Tensor) else parts_of(returned)
        if stated or (parts is not None and any(parts.get(key) is not None for key in CLASSIFIER_KEYS)):
            return "logits"
        if proven is not None:
            return proven
        if not ending.of_layers:
            return "logits"  # a function of the pixels, which is no tower
        if _sums_to_one(rows.float()):
            return "probabilities"
        if bool(((rows.float().norm(dim=-1) - 1).abs() < 1e-3).all()):
            return "features"  # a normalised embedding
        raise UnclearOutputError(
            f"{self.name} returns {rows.shape[1]} numbers per image, and whether these are classes or an embedding is "
            "not certain: pass output='logits' or output='features' to vitscope.load",
            rows,
        )


@dataclass(frozen=True, eq=False)
class Classes:
    """The forward pass of a model that is known to return classes, or none."""

    run: Callable[[Tensor], Any]
    name: str

    def __call__(self, pixels: Tensor) -> Tensor | None:
        returned = self.run(pixels)
        return (
            returned
            if isinstance(returned, Tensor) and returned.ndim == 2
            else classes_of(returned, len(pixels), self.name)
        )


@dataclass(frozen=True, eq=False)
class NoClasses:
    """The forward pass of a backbone: it runs, and returns no classes."""

    run: Callable[[Tensor], Any]

    def __call__(self, pixels: Tensor) -> None:
        self.run(pixels)


@dataclass(frozen=True, eq=False)
class MeanOfTokens:
    """One vector per image from a backbone of timm or torchvision: its own, or the mean of the tokens it returns."""

    run: Callable[[Tensor], Any]

    def __call__(self, pixels: Tensor) -> Tensor:
        output = self.run(pixels)
        return output if output.ndim == 2 else output.flatten(1, -2).mean(1)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The features of an :class:`Observed` module, or what ``embed`` reads from its output."""

    observed: Observed
    embed: Callable[[Any], Tensor] | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.embed is None:
            return self.observed.features(pixels)
        features = self.embed((self.observed.run or self.observed.module)(pixels))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(pixels):
            raise CallError(f"embed= returned {in_words(features)}: a tensor (batch, channel) is expected")
        return features
