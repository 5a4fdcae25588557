"""Results do not depend on torch's default device and dtype, which belong to the caller."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers.families import ALL
from tests.helpers.swin_families import ALL as SWIN
from tests.helpers.swin_families import SIZES

TARGET: dict[str, Any] = {"target": 0, "output": "logit"}
METHODS: dict[str, Callable[[vs.VisionModel, Tensor], Tensor]] = {
    "attention_map": lambda model, pixels: vs.attention_map(model, pixels).values,
    "rollout": lambda model, pixels: vs.rollout(model, pixels).values,
    "rollout, discarded": lambda model, pixels: vs.rollout(model, pixels, head_fusion="max", discard_ratio=0.5).values,
    "head_statistics": lambda model, pixels: vs.head_statistics(vs.capture(model, pixels)).distance,
    "head_importance": lambda model, pixels: vs.head_importance(model, pixels, target=0).values,
    "lime": lambda model, pixels: vs.lime(model, pixels, segments="patches", num_samples=40, **TARGET).values,
    "kernel_shap": lambda model, pixels: vs.kernel_shap(model, pixels, segments="patches", **TARGET).values,
    "occlusion": lambda model, pixels: vs.occlusion(model, pixels, **TARGET).values,
    "rise": lambda model, pixels: vs.rise(model, pixels, num_samples=8, **TARGET).values,
    "lime, dropped": lambda model, pixels: (
        vs.lime(model, pixels, segments="patches", num_samples=40, hide="drop", **TARGET).values
    ),
    "attention": lambda model, pixels: vs.capture(model, pixels).attention(-1),
}
SWIN_METHODS: dict[str, Callable[[vs.VisionModel, Tensor], Tensor]] = {
    "window_attention": lambda model, pixels: vs.window_attention(model, pixels, layer=1).values,
    "rollout by norm": lambda model, pixels: vs.rollout(model, pixels, merge="norm").values,
}
DTYPES = [torch.float64, torch.float16, torch.bfloat16]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same(values: Tensor, expected: Tensor) -> None:
    """Compare up to rounding: nn.MultiheadAttention uses another kernel while a default device is set."""
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6, equal_nan=True)


def cases() -> list[Any]:
    plain = [(ALL[i], name) for i in (0, 6, 14, 21) for name in METHODS]
    windowed = [(SWIN[i], name) for i in (0, 3) for name in METHODS | SWIN_METHODS]
    return [pytest.param(family, name, id=f"{family.name}-{name}") for family, name in plain + windowed]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), cases())
def test_defaults_of_torch_change_nothing(family: Any, name: str) -> None:
    model, size = family.model(), getattr(family, "size", SIZES["fitting"])
    pixels = torch.randn(1, 3, *size, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    compute = (METHODS | SWIN_METHODS)[name]
    expected = compute(model, pixels)
    with torch.device("meta"):
        same(compute(model, pixels), expected)
    for dtype in DTYPES:
        with default_dtype(dtype):
            same(compute(model, pixels), expected)
