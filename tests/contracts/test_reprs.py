"""The repr of a result is a few short lines without its numbers."""

from typing import Any

import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.results.test_saved_results import plain, segmented, tensor
from vitscope.views.plain_text import visible


def test_the_line_describes_the_result() -> None:
    assert repr(plain()) == "<Attribution: rollout of m, 2 images of 2×3, 0 to 1, target cat>"
    assert repr(segmented()) == (
        "<SegmentAttribution: lime of m, 1 image of 2×4, 3 segments, 2 classes, -0.25 to 0.5, target cat, signed>"
    )
    assert repr(vs.Attribution(tensor([[[1.0]]]), vs.Grid(1, 1))) == (
        "<Attribution: no method of no model, 1 image of 1×1, without photos, 1, target none>"
    )


def test_reprs_of_the_parts_of_a_result_are_short() -> None:
    segments = segmented().segmented_images[0]
    assert repr(segments) == "<SegmentedImage of 2×4 pixels: 3 segments, 2 classes>"
    assert repr(segments.fits[0]) == "<LinearFit of cat (3): 3 segments>"


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_the_repr_of_many_images_is_no_longer(count: int) -> None:
    image = vs.InputImage(Image.new("RGB", (4, 4)), (0.0, 0.0, 4.0, 4.0))
    record = {"method": "rollout", "model": "m", "images": [{"target": "cat"}] * count}
    plain_result = vs.Attribution(torch.zeros(count, 14, 14, device="cpu"), vs.Grid(14, 14), [image] * count, record)
    single = segmented()
    joined = single.join([single] * count)
    for result in (plain_result, joined):
        assert len(repr(result)) <= 120
        assert "\n" not in repr(result)
        assert f"{count:,} image" in repr(result)
        assert "tensor" not in repr(result)


@pytest.mark.parametrize(
    "text", ["long " * 1000, "\x1b[31mred\x07", "a\nb\n" * 9, "a\u202eb", 5, ["a"], {"a": "b" * 999}]
)
def test_names_of_any_kind_stay_on_one_line(text: Any) -> None:
    target = text if isinstance(text, str) else None
    text_of_result = repr(vs.Attribution(tensor([[[1.0]]]), vs.Grid(1, 1), (), {"method": text, "model": text}, target))
    assert len(text_of_result) <= 200
    assert "\n" not in text_of_result
    assert visible(text_of_result) == text_of_result
