"""check(): verify the token grid, the readout and the order of blocks of a model by running it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitscope.attention.readout import readout_text
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.tracing.experiment import noise, preserved_random_state
from vitscope.tracing.verification import verify_readout


@dataclass(frozen=True)
class CheckReport:
    """The verified facts of a model. Returned by :func:`vitscope.check`.

    Attributes:
        model: name of the model.
        layers: number of attention blocks.
        grid: token grid, verified by changing patches of the image; None if the layout is unknown.
        readout: weight of each source that the classifier reads, verified by changing tokens; None if the layout or the
            output is unknown, or if the output depends on no token.
        unchained: reason why the blocks do not form a chain; None if they do.
    """

    model: str
    layers: int
    grid: Grid | None
    readout: Mapping[str, float] | None
    unchained: str | None

    @property
    def chained(self) -> bool:
        """Whether each block depends on the block before it, which rollout needs."""
        return self.unchained is None

    def __repr__(self) -> str:
        blocks = f"{self.layers} attention blocks {'in a chain' if self.chained else 'that are not a chain'}"
        readout = "unknown tokens" if self.readout is None else readout_text(self.readout)
        return f"<CheckReport {self.model}: {blocks}, {_grid_text(self.grid)}, classifier reads {readout}>"


def _grid_text(grid: Grid | None) -> str:
    """Return a token grid as text: "8×8 patches after 1 prefix token"."""
    if grid is None:
        return "unknown token grid"
    prefix = f" after {grid.prefix} prefix token{'' if grid.prefix == 1 else 's'}" if grid.prefix else ""
    return f"{grid.height}×{grid.width} patches{prefix}"


def check(model: VisionModel | nn.Module, images: Any = None) -> CheckReport:
    """Verify the token grid, the readout and the order of blocks of a model by experiments.

    The model runs three times. The first run is captured. In the second, single patches of the image are changed: the
    token of the changed patch must change most. In the third, single tokens are changed in the output of the last
    attention block: the prediction must change for exactly those tokens that the readout names. A model of an unknown
    class runs once before that, on three images of noise.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: as for :func:`vitscope.capture`; only the first image is used. The default is noise with the model's
            input size.

    Returns:
        The verified facts; their ``repr`` is a short summary.

    Raises:
        UnsupportedModelError: an experiment contradicts the layout, or the attention is not available.
        CallError: no images are passed and the input size is unknown, or the images are not valid.
        WorkError: the model fails on the input.

    Examples:
        >>> import vitscope as vs
        >>> vs.check(vs.load("vit-nano"))
        <CheckReport vit-nano: 6 attention blocks in a chain, 8×8 patches after 1 prefix token, classifier reads cls>
    """
    model = as_vision_model(model)
    pixels = _pixels(model, images)
    with preserved_random_state(model.device):
        captured = run_and_capture(model, pixels)
        trace, has_classes = captured.trace, captured.logits is not None
        readout = verify_readout(model, pixels, trace, captured.calls, captured.first_blocks, has_classes=has_classes)
    return CheckReport(model.name, trace.num_layers, trace.grid, readout, trace.why_unchained)


def _pixels(model: VisionModel, images: Any) -> Tensor:
    """Return the first image as the model's input, or noise if no images were passed."""
    if images is not None:
        return model.prepare(images)[0][:1]
    if model.preprocessing is None:
        raise CallError(f"the input size of {model.name} is unknown: pass images, or image_size to vitscope.load")
    return noise((1, model.channels or 3, *model.preprocessing.size)).to(model.device, model.dtype)
