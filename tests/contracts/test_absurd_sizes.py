"""Sizes that would run for years are refused before anything is planned."""

import time
from typing import Any

import numpy as np
import pytest

from tests.models.test_preprocessing_settings import defaults
from vitscope.compositing.experiments import MAX_PLACES, MAX_SCALES, plan_edited_images, plan_experiments
from vitscope.compositing.object_masks import object_masks
from vitscope.compositing.stage import MAX_SCALE, EditedImage, Placement, Stage
from vitscope.errors import CallError
from vitscope.perturb.masks import MAX_MASKS, KernelSampler, PairedSampler, PixelMasks, SegmentMasks, UniformSampler
from vitscope.perturb.segments import Segments

PHOTO = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
HUGE = [MAX_MASKS + 1, 10**15, 10**26, 10**6000]


def refusal(call: Any) -> str:
    started = time.monotonic()
    with pytest.raises(CallError) as caught:
        call()
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 250
    return message


def samplers(segments: int) -> list[Any]:
    return [
        UniformSampler(segments, 0),
        PairedSampler(segments, 0),
        KernelSampler(segments, 0, lambda rows: np.ones(len(rows))),
    ]


@pytest.mark.parametrize("sampler", range(3), ids=["uniform", "paired", "kernel"])
@pytest.mark.parametrize("count", HUGE, ids=["most + 1", "10^15", "10^26", "10^6000"])
def test_too_many_masks_are_refused_before_they_are_drawn(count: int, sampler: int) -> None:
    assert "masks are too many: at most 1,000,000" in refusal(lambda: samplers(3)[sampler].draw(count))
    assert len(samplers(3)[sampler].draw(10)) == 10


@pytest.mark.parametrize("sampler", range(3), ids=["uniform", "paired", "kernel"])
def test_many_masks_of_many_segments_are_refused(sampler: int) -> None:
    message = refusal(lambda: samplers(4000)[sampler].draw(MAX_MASKS))
    assert message == (
        "1,000,000 masks of 4,000 segments are too many: at most 62,500 masks can be drawn for this number of segments"
    )


@pytest.mark.parametrize("count", HUGE, ids=["most + 1", "10^15", "10^26", "10^6000"])
def test_masks_of_pixels_are_counted(count: int) -> None:
    assert "masks are too many" in refusal(lambda: PixelMasks(count, lambda _: np.ones((2, 2))))
    assert len(PixelMasks(MAX_MASKS, lambda _: np.ones((2, 2)))) == MAX_MASKS


def test_masks_of_segments_are_counted() -> None:
    labels = np.array([[0, 1]])
    rows = np.broadcast_to(np.array([[True, False]]), (MAX_MASKS + 1, 2))
    assert "1,000,001 masks are too many" in refusal(lambda: SegmentMasks(rows, Segments(labels, labels, 2, "labels")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"places": 99999}, "places is 99999: pass at most 100 rows and columns"),
        ({"places": (7, MAX_PLACES + 1)}, "places is (7, 101): pass at most 100"),
        ({"places": 10**30}, "at most 100 rows and columns"),
        ({"places": 10**6000}, "at most 100 rows and columns"),
        ({"scales": [1e300]}, "a scale is 1e+300: pass at most 1,000"),
        ({"scales": [0.5, MAX_SCALE + 1]}, "a scale is 1001: pass at most 1,000"),
        ({"scales": [0.5] * (MAX_SCALES + 1)}, "scales has 1,001 numbers: pass at most 1,000"),
        ({"location_scale": 1e300}, "location_scale is 1e+300: pass at most 1,000"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)
def test_too_large_a_plan_is_refused(options: dict[str, Any], message: str) -> None:
    assert message in refusal(
        lambda: plan_experiments(
            **{"names": ("size", "location"), "scales": None, "places": 7, "location_scale": 1, **options}
        )
    )


def stage() -> Stage:
    return Stage(PHOTO, object_masks(PHOTO, {"thing": (10, 10, 12, 12)}), (50, 40), fill="mean")


def test_the_largest_plan_is_accepted() -> None:
    tests = plan_experiments(("location",), None, MAX_PLACES, 1.0)
    edited_images = plan_edited_images(stage(), (0.0, 0.0, 50.0, 40.0), tests)
    assert 100 < len(edited_images) <= MAX_PLACES**2 + 1


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement("thing", scale=1e300), "the scale of thing is 1e+300, but must be above 0 and at most 1,000"),
        (Placement("thing", scale=float("nan")), "the scale of thing is nan"),
        (Placement("thing", scale=float("inf")), "the scale of thing is inf"),
        (Placement("thing", scale=1e-300), "too small to be seen"),
        (Placement("thing", (1e300, 5.0)), "does not fit around (1e+300, 5)"),
        (Placement("thing", (5.0, -1e200)), "does not fit around (5, -1e+200)"),
        (Placement("thing", (float("inf"), 5.0)), "does not fit around (inf, 5)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_impossible_placement_is_refused_in_a_short_message(placement: Placement, message: str) -> None:
    assert message in refusal(lambda: stage().prepare(EditedImage("free", (placement,))))


def test_a_plan_does_not_depend_on_torchs_defaults() -> None:
    with defaults("meta", None):
        assert stage().render(EditedImage("free", (Placement("thing", scale=0.5),))).shape == PHOTO.shape
