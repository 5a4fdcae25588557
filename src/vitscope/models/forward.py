"""Forward passes: what is called with the pixels, and what of its output is handed on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vitscope.errors import CallError
from vitscope.models.endings import Ending, watched_ending
from vitscope.models.outputs import (
    CLASSIFIER_KEYS,
    Output,
    Select,
    UnclearOutputError,
    classes_of,
    in_words,
    parts_of,
    sums_to_one,
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
        if sums_to_one(rows.float()):
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
