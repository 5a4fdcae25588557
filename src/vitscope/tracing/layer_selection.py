"""The layers of a run that a trace holds."""

from collections.abc import Sequence
from typing import Any

from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.step import AttentionStep, require_index
from vitscope.attention.trace import Step
from vitscope.errors import CallError
from vitscope.validation import require_integer


class LayerSelection:
    """The steps of the selected layers, collected while the number of layers is still unknown.

    Args:
        layers: indices of attention blocks; negative indices count from the end. None for all blocks.
    """

    def __init__(self, layers: Sequence[int] | None) -> None:
        self._layers = None if layers is None else _require_layers(layers)
        self._depth = max((-layer for layer in self._layers or () if layer < 0), default=0)
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        """Add a step, and drop the block that no negative index can select any more."""
        self._steps.append(step)
        if self._layers is not None and isinstance(step, AttentionStep):
            passed = step.layer - self._depth
            if passed not in self._layers:
                self._steps = [earlier for earlier in self._steps if getattr(earlier, "layer", None) != passed]

    def resolve(self, count: int) -> list[Step]:
        """Return the selected blocks and all merge steps of a model with ``count`` attention blocks.

        Raises:
            CallError: a layer is out of range.
        """
        if self._layers is None:
            return self._steps
        selected = {require_index(layer, count, "layer", "the model") % count for layer in self._layers}
        return [step for step in self._steps if isinstance(step, MergeStep) or step.layer in selected]


def _require_layers(layers: Any) -> list[int]:
    """Return the layers as a list of integers."""
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise CallError(f"layers is {layers!r}, a list of whole numbers is expected")
    indices = [require_integer(layer, "a layer") for layer in layers]
    if not indices:
        raise CallError("layers is empty: pass at least one attention block, or omit layers for all blocks")
    return indices
