"""Forward passes: functions from the model's input to its logits or features. All of them can be pickled."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vitscope.errors import CallError, UnclearOutputError
from vitscope.models.endings import Ending, watch_ending
from vitscope.models.outputs import (
    CLASSIFIER_KEYS,
    Output,
    Select,
    class_rows,
    describe_output,
    entries_or_none,
    num_rows,
    sums_to_one,
)


@dataclass(eq=False)
class Observed:
    """The forward pass of a module whose output must be inspected: which entry holds classes, and what they mean.

    Called with the module's input, it returns logits (batch, class), or None if the output holds features.

    Attributes:
        module: module whose layers are watched.
        name: name of the model in error messages.
        run: function that calls the module with everything it needs besides the pixels; None for the module itself.
        output: meaning that the caller declared.
        select: entry of the output that the caller selected.
        logits: function of the caller that returns logits from the output.
        has_labels: whether the caller passed labels, which implies classes.
        meaning: meaning of the output as observed; None before the first forward pass.
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
        """Return (batch, class) or (batch, channel), whichever the module computes; None if it returns neither."""
        run = self.run or self.module
        if self.meaning is not None:
            return self._read(run(pixels), len(pixels))
        with watch_ending(self.module) as ending:
            returned = run(pixels)
            rows = self._read(returned, len(pixels))
            if rows is None:
                self.meaning = "features"
                return None
            self.meaning = self._decide_meaning(returned, rows, ending(rows))
        return rows

    def features(self, pixels: Tensor) -> Tensor:
        """Return the embedding that the module computes, (batch, channel).

        Raises:
            UnclearOutputError: the module returns no embedding.
        """
        rows = self.rows(pixels)
        if rows is None:
            raise UnclearOutputError(
                f"{self.name} returns neither classes nor one embedding per image: pass embed= to vitscope.load, a "
                "function of the output that returns (batch, channel)"
            )
        return rows

    def _read(self, returned: Any, batch: int) -> Tensor | None:
        """Return the rows of the output, read as the caller described it."""
        if self.logits is None:
            return class_rows(returned, batch, self.name, self.select)
        rows = self.logits(returned)
        if not isinstance(rows, Tensor) or rows.ndim != 2 or len(rows) != num_rows(batch):
            raise CallError(f"logits= returned {describe_output(rows)}: a tensor (batch, class) is expected")
        return rows

    def _decide_meaning(self, returned: Any, rows: Tensor, ending: Ending) -> Output:
        """Return what the numbers mean, from the caller's arguments, the ending and the numbers themselves."""
        proven = ending.meaning
        if self.output is not None and self.output != "logits":
            return self.output
        if proven == "probabilities":
            return proven
        declared = self.output == "logits" or self.logits is not None or self.has_labels
        entries = None if isinstance(returned, Tensor) else entries_or_none(returned)
        if declared or (entries is not None and any(entries.get(key) is not None for key in CLASSIFIER_KEYS)):
            return "logits"
        if proven is not None:
            return proven
        if not ending.any_layer_ran:
            return "logits"  # a function of the pixels alone is not an image encoder
        if sums_to_one(rows.float()):
            return "probabilities"
        if bool(((rows.float().norm(dim=-1) - 1).abs() < 1e-3).all()):
            return "features"  # a normalised embedding
        raise UnclearOutputError(
            f"{self.name} returns {rows.shape[1]} numbers per image, which could be classes or an embedding: pass "
            "output='logits' or output='features' to vitscope.load",
            rows,
        )


@dataclass(frozen=True, eq=False)
class Classes:
    """The forward pass of a model whose class is known: it returns classes, or None for a bare backbone."""

    run: Callable[[Tensor], Any]
    name: str

    def __call__(self, pixels: Tensor) -> Tensor | None:
        returned = self.run(pixels)
        return (
            returned
            if isinstance(returned, Tensor) and returned.ndim == 2
            else class_rows(returned, len(pixels), self.name)
        )


@dataclass(frozen=True, eq=False)
class NoClasses:
    """The forward pass of a backbone, which returns no classes."""

    run: Callable[[Tensor], Any]

    def __call__(self, pixels: Tensor) -> None:
        self.run(pixels)


@dataclass(frozen=True, eq=False)
class MeanOfTokens:
    """The features of a backbone of timm or torchvision: the vector it returns, or the mean of the tokens."""

    run: Callable[[Tensor], Any]

    def __call__(self, pixels: Tensor) -> Tensor:
        output = self.run(pixels)
        return output if output.ndim == 2 else output.flatten(1, -2).mean(1)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The features of an :class:`Observed` module, or those that ``embed`` reads from its output."""

    observed: Observed
    embed: Callable[[Any], Tensor] | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.embed is None:
            return self.observed.features(pixels)
        features = self.embed((self.observed.run or self.observed.module)(pixels))
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != num_rows(len(pixels)):
            raise CallError(f"embed= returned {describe_output(features)}: a tensor (batch, channel) is expected")
        return features
