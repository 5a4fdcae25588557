"""Which layers of a run are kept."""

from collections.abc import Sequence
from typing import Any

from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.trace import AttentionStep, Step
from vitscope.errors import CallError
from vitscope.validation import whole_number


class LayerSelection:
    """The steps that were asked for; negative layers are known only when the run is over."""

    def __init__(self, layers: Sequence[int] | None) -> None:
        self._layers = None if layers is None else _listed(layers)
        self._depth = max((-layer for layer in self._layers or () if layer < 0), default=0)
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        self._steps.append(step)
        if self._layers is not None and isinstance(step, AttentionStep):
            passed = step.layer - self._depth
            if passed not in self._layers:
                self._steps = [kept for kept in self._steps if getattr(kept, "layer", None) != passed]

    def resolve(self, count: int) -> list[Step]:
        if self._layers is None:
            return self._steps
        for layer in self._layers:
            if not -count <= layer < count:
                raise CallError(f"layer {layer} is not there: the model has layers 0 to {count - 1}")
        wanted = {layer % count for layer in self._layers}
        return [step for step in self._steps if isinstance(step, MergeStep) or step.layer in wanted]


def _listed(layers: Any) -> list[int]:
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise CallError(f"layers is {layers!r}, a list of whole numbers is expected")
    listed = [whole_number(layer, "a layer") for layer in layers]
    if not listed:
        raise CallError("layers is empty: name at least one attention block, or leave it out for all")
    return listed
