"""check(): verify what vitscope believes about a model by running it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.tracing.experiment import noise, preserved_random_state
from vitscope.tracing.verification import verified_readout


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` verified.

    Attributes:
        model: the name of the model.
        layers: the number of attention blocks.
        grid: the token grid, verified by changing patches; None if the model has no known layout.
        readout: what the classifier reads, verified by changing tokens; None if the layout or the output is unknown, or
            the output depends on no token.
        unchained: why the blocks do not follow one another, or None if they do.
    """

    model: str
    layers: int
    grid: Grid | None
    readout: Mapping[str, float] | None
    unchained: str | None

    @property
    def chained(self) -> bool:
        """Whether each block depends on all before it, which rollout needs."""
        return self.unchained is None

    def __repr__(self) -> str:
        grid = (
            "grid unknown" if self.grid is None else f"grid {self.grid.height}×{self.grid.width} + {self.grid.prefix}"
        )
        readout = "unknown" if self.readout is None else " + ".join(f"{v:g} {k}" for k, v in self.readout.items())
        order = "one after the other" if self.chained else "not one after the other"
        return f"<CheckReport {self.model}: {self.layers} blocks {order}, {grid}, readout {readout}>"


def check(model: VisionModel | nn.Module, images: Any = None) -> CheckReport:
    """Verify grid, readout and order of a model by experiments, and return what holds.

    Three forward passes: one is captured; in one, single patches of the image are changed, which must change their own
    tokens most; in one, single tokens are changed in the output of the last attention block, which must change the
    prediction for exactly the tokens that the readout names.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: as for :func:`vitscope.capture`, of which the first is used; by default noise of the model's input size.

    Raises:
        UnsupportedModelError: the experiments contradict what the layout says.

    Example:
        >>> import vitscope as vs
        >>> vs.check(vs.load("vit-nano"))
        <CheckReport vit-nano: 6 blocks one after the other, grid 8×8 + 1, readout 1 cls>
    """
    model = as_vision_model(model)
    pixels = _pixels(model, images)
    with preserved_random_state(model.device):
        captured = run_and_capture(model, pixels)
        trace, calls = captured.trace, captured.calls
        readout = verified_readout(model, pixels, trace, calls, has_classes=captured.logits is not None)
    return CheckReport(model.name, trace.num_layers, trace.grid, readout, trace.why_unchained)


def _pixels(model: VisionModel, images: Any) -> Tensor:
    if images is not None:
        return model.prepare(images)[0][:1]
    if model.preprocessing is None:
        raise CallError(f"the input size of {model.name} is unknown: pass images, or image_size to vitscope.load")
    return noise((1, model.channels or 3, *model.preprocessing.size)).to(model.device, model.dtype)
