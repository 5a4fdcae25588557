"""Photos of different sizes in one call of LIME, KernelSHAP, RISE and occlusion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.lime import shrunk

METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "lime": (vs.lime, {"num_samples": 80, "segments": "patches"}),
    "kernel_shap": (vs.kernel_shap, {"num_samples": 140, "segments": "patches"}),
    "rise": (vs.rise, {"num_samples": 30, "cells": 4}),
    "occlusion": (vs.occlusion, {"window": 2}),
}
every_method = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def photos(cat: np.ndarray) -> list[np.ndarray]:
    return [cat, shrunk("astronaut", (50, 70)), shrunk("coffee", (33, 41))]


@pytest.mark.slow
@every_method
def test_each_photo_has_the_result_of_its_own_explanation(
    nano: vs.VisionModel, photos: list[np.ndarray], name: str, tmp_path: Path
) -> None:
    method, options = METHODS[name]
    alone = [method(nano, photo, **options) for photo in photos]
    batch = method(nano, photos, **options)
    assert len(batch) == 3
    assert batch.values.shape == ((3, 8, 8) if name == "occlusion" else (3, 70, 60))
    assert batch.sizes == (None if name == "occlusion" else [(40, 60), (70, 50), (41, 33)])
    loaded = type(batch).load(batch.save(tmp_path / "map.safetensors"))
    attached = loaded.with_photos(photos[::-1])
    for index, single in enumerate(alone):
        for result in (batch[index], loaded[index], attached[index], list(batch)[index]):
            assert torch.equal(result.values, single.values)
            assert (result.target, result.grid, result.sizes) == (single.target, single.grid, None)
        assert batch.overlay(index=index) == attached.overlay(index=index) == single.overlay()
        assert batch.overlay(index=index).size == photos[index].shape[1::-1]
        assert batch.colour_scale(index) == single.colour_scale()
    dog, dogs = method(nano, photos[1], target="dog", **options), loaded.of("dog")
    assert torch.equal(dogs[1].values, dog.values)
    assert dogs.values.shape == batch.values.shape


@every_method
def test_the_files_hold_every_map(nano: vs.VisionModel, photos: list[np.ndarray], name: str, tmp_path: Path) -> None:
    method, options = METHODS[name]
    batch = method(nano, photos[:2], **options)
    with np.load(batch.save(tmp_path / "map.npz")) as arrays:
        assert np.array_equal(arrays["values"], np.asarray(batch))
    record = batch.as_json()
    if name in ("lime", "kernel_shap"):
        assert [len(image["segments"]) for image in record["images"]] == [64, 64]
    else:
        assert [np.shape(values) for values in record["values"]] == [result.values.shape[1:] for result in batch]
    if name != "occlusion":
        assert record["sizes"] == [[40, 60], [70, 50]]
        assert "different sizes" in repr(batch)


@pytest.mark.slow
@every_method
@pytest.mark.usefixtures("coarse_figures")
def test_a_batch_is_drawn(nano: vs.VisionModel, photos: list[np.ndarray], name: str) -> None:
    method, options = METHODS[name]
    batch = method(nano, photos, **options)
    assert len([axes for axes in batch.figure().axes if axes.images and axes.get_label() != "colour bar"]) == 6
    assert batch.figure(index=2).axes
    assert batch._repr_png_() is not None


@pytest.mark.parametrize("name", ["lime", "rise"])
def test_values_repeat_rows_and_columns_without_interpolation(
    nano: vs.VisionModel, photos: list[np.ndarray], name: str
) -> None:
    method, options = METHODS[name]
    batch = method(nano, photos, **options)
    rows, columns = np.arange(70) * 41 // 70, np.arange(60) * 33 // 60
    assert np.array_equal(batch.values[2].numpy(), batch[2].values[0].numpy()[np.ix_(rows, columns)])


def test_results_of_different_sizes_are_joined(nano: vs.VisionModel, photos: list[np.ndarray]) -> None:
    method, options = METHODS["lime"]
    batch = method(nano, photos, **options)
    for kind in (vs.Attribution, vs.SegmentAttribution):
        joined = kind.join(list(batch))
        assert torch.equal(joined.values, batch.values)
        assert joined.sizes == batch.sizes
        assert [result.target for result in joined] == [result.target for result in batch]
    same = vs.SegmentAttribution.join([batch[1], batch[1]])
    assert same.sizes is None
    assert same.values.shape == (2, 70, 50)


def test_results_of_different_kinds_are_not_joined(nano: vs.VisionModel, photos: list[np.ndarray]) -> None:
    results = [METHODS[name][0](nano, photos[0], **METHODS[name][1]) for name in ("lime", "occlusion")]
    with pytest.raises(vs.CallError, match=r"^join takes results of one method, not of SegmentAttribution and Sampled"):
        vs.Attribution.join(results)


@pytest.mark.slow
def test_faithfulness_takes_maps_of_different_sizes(nano: vs.VisionModel, photos: list[np.ndarray]) -> None:
    batch = vs.lime(nano, photos, num_samples=80, segments="patches")
    areas = vs.faithfulness(nano, photos, batch)
    alone = vs.faithfulness(nano, photos[2], batch[2])
    assert areas.deletion[2] == pytest.approx(alone.deletion[0], abs=1e-6)
