"""Runs of the dense references whose methods need the residual streams of every block."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

import vitscope as vs
from tests.helpers import gradient_laws as laws
from tests.helpers import swin_families as swin
from tests.helpers.gradients import assert_equal
from tests.reference.block_streams import Streams, streams
from tests.reference.swin_rollout import Story, story


def streams_of(model: vs.VisionModel, pixels: Tensor) -> Streams:
    """Return the reference's run of a model in float64."""
    predict = model.features if model.meaning == "features" else model.logits
    return streams(model.module, lambda: predict(pixels))  # type: ignore[arg-type,return-value]


def check_windows(
    explain: Callable[..., vs.Attribution], windowed: Callable[[Story, Streams, int], Tensor], kind: Any
) -> None:
    """Check that the map of timm's Swin equals the reference with dense matrices."""
    size, timm = swin.SIZES[kind], swin.family("timm-swin")
    model, pixels = laws.in_float64(timm.model(size)), swin.pixels(size).double()
    plain = story(model.module, pixels, (timm.grid(size).height, timm.grid(size).width))
    expected = windowed(plain, streams_of(model, pixels), 1)
    assert_equal(explain(model, pixels, target=1).values.flatten(1), expected)
