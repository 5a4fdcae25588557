"""Results of LIME, KernelSHAP, RISE and occlusion explain other classes from their samples, also after loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers.lime import blocks
from vitscope.perturb import batching
from vitscope.results import segmented_image

SEGMENTS = blocks(40, 60, 10)
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "lime": (vs.lime, {"num_samples": 80, "segments": SEGMENTS}),
    "paired": (vs.lime, {"num_samples": 81, "segments": SEGMENTS, "sampling": "paired", "output": "logit"}),
    "glime": (vs.lime, {"num_samples": 60, "segments": SEGMENTS, "sampling": "glime", "alpha": 0.1}),
    "kernel_shap": (vs.kernel_shap, {"num_samples": 90, "segments": SEGMENTS}),
    "rise": (vs.rise, {"num_samples": 40, "cells": 4, "output": "log_odds"}),
    "occlusion": (vs.occlusion, {"window": 2}),
}
every_method = pytest.mark.parametrize("name", METHODS)


def assert_same(result: vs.Attribution, expected: vs.Attribution) -> None:
    """Compare everything but the classes that are explained besides the target."""
    assert torch.equal(result.values, expected.values)
    assert (result.target, result.provenance.get("parameters")) == (
        expected.target,
        expected.provenance.get("parameters"),
    )
    if isinstance(expected, vs.SegmentAttribution):
        assert isinstance(result, vs.SegmentAttribution)
        for field in ("weights", "intervals"):
            first, second = getattr(result, field), getattr(expected, field)
            assert (first is None and second is None) or torch.equal(first, second), field
        for field in ("intercept", "score", "held_out_score", "output", "local_prediction"):
            assert getattr(result, field) == getattr(expected, field), field
        assert result.class_indices[0] == expected.class_indices[0]


@every_method
@pytest.mark.parametrize("target", ["truck", 0, ("cat", "dog"), (9, "bird"), (None, 4)], ids=repr)
def test_any_class_or_contrast_equals_its_own_explanation_to_the_last_bit(
    nano: vs.VisionModel, cat: np.ndarray, name: str, target: Any
) -> None:
    method, options = METHODS[name]
    result = method(nano, cat, **options).of(target)
    assert_same(result, method(nano, cat, target=target, **options))


@every_method
def test_a_loaded_result_explains_other_classes_too(
    nano: vs.VisionModel, cat: np.ndarray, name: str, tmp_path: Path
) -> None:
    method, options = METHODS[name]
    result = method(nano, cat, **options)
    loaded = type(result).load(result.save(tmp_path / "map.safetensors"))
    assert loaded.labels == result.labels == list(nano.names(10))
    for target in ("truck", ("cat", 5)):
        assert_same(loaded.of(target), result.of(target))
    back = loaded.of("truck").of(result.target)
    assert torch.equal(back.values, result.values)


@every_method
def test_each_image_of_a_batch_is_explained_from_its_own_samples(
    nano: vs.VisionModel, cat: np.ndarray, name: str
) -> None:
    method, options = METHODS[name]
    photos = [cat, cat[::-1].copy()]
    batch = method(nano, photos, **options).of("ship")
    assert batch.target == "ship"
    for index, photo in enumerate(photos):
        assert_same(batch[index], method(nano, photo, target="ship", **options))


@every_method
def test_an_unknown_class_is_refused_with_the_nearest_label(nano: vs.VisionModel, cat: np.ndarray, name: str) -> None:
    method, options = METHODS[name]
    result = method(nano, cat, target="cat", **options)
    with pytest.raises(vs.CallError, match=r"^target 'dogg' is not a label of this model: did you mean dog"):
        result.of("dogg")
    with pytest.raises(vs.CallError, match="target 10 does not exist: the model has classes 0 to 9"):
        result.of(10)
    with pytest.raises(vs.CallError, match="a contrast of 'dog' with itself is always 0"):
        result.of(("dog", 5))


@every_method
def test_a_class_whose_outputs_are_not_stored_is_named(
    nano: vs.VisionModel, cat: np.ndarray, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options = METHODS[name]
    monkeypatch.setattr(batching, "MAX_STORED", 0)
    result = method(nano, cat, **options)
    assert result.labels == [result.target]
    unlikely = nano.predict(cat, top_k=10)[0][-1]
    with pytest.raises(vs.CallError) as caught:
        result.of(unlikely.label)
    assert str(caught.value) == (
        f"{unlikely.label!r} is a class of this model, but was not evaluated: this result holds the outputs of 1 of 10 "
        f"classes; explain the image with target={unlikely.index}"
    )


class Impossible(torch.nn.Module):
    """A classifier that gives its last class a probability of exactly 0."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vs.load("vit-nano").module

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = self.inner(pixels).logits
        return torch.cat([logits[:, :9], logits[:, 9:] - 1e4], dim=1)


def test_infinite_outputs_of_other_classes_are_not_stored(cat: np.ndarray, tmp_path: Path) -> None:
    model = vs.load(Impossible(), image_size=32, output="probabilities", logits=lambda logits: logits.softmax(-1))
    result = vs.occlusion(model, cat, output="log_probability")
    assert result.labels == [f"class {index}" for index in range(9)]
    assert torch.isfinite(result.of(0).values).all()
    with pytest.raises(vs.CallError, match="'class 9' is a class of this model, but was not evaluated"):
        result.of(9)
    vs.SampledAttribution.load(result.save(tmp_path / "map.safetensors"))


def test_a_fit_that_exists_is_not_computed_again(
    nano: vs.VisionModel, cat: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = vs.lime(nano, cat, target=("cat", "dog"), num_samples=60, segments=SEGMENTS)
    monkeypatch.setattr(segmented_image, "linear_fit", lambda *_: pytest.fail("computed again"))
    for label, index in zip(result.classes[1:], result.class_indices[1:], strict=True):
        assert result.of(label).target == result.of(index).target == label
    assert result.of("cat − dog").target == result.of(("cat", "dog")).target == result.of((3, 5)).target == "cat − dog"


def test_results_without_samples_say_so(nano: vs.VisionModel, cat: np.ndarray) -> None:
    from dataclasses import replace

    lime = vs.lime(nano, cat, num_samples=60, top_labels=1, segments=SEGMENTS)
    bare = replace(lime, segmented_images=[replace(lime.segmented_images[0], samples=None)])
    assert bare.labels == bare.classes == ["cat"]
    for target, named in (("dog", "'dog'"), (5, "class 5")):
        with pytest.raises(vs.CallError) as caught:
            bare.of(target)
        assert str(caught.value).startswith(f"{named} was not explained: this result has the classes ")
        assert str(caught.value).endswith("; for another class, explain the image with target= or a larger top_labels=")
    occlusion = replace(vs.occlusion(nano, cat), samples=[None])
    for result in (bare, occlusion):
        with pytest.raises(
            vs.CallError, match=r"^\('cat', 'dog'\) was not explained, and this result holds no outputs"
        ):
            result.of(("cat", "dog"))
    assert occlusion.labels == []


def test_samples_are_saved_in_float32_and_bits(nano: vs.VisionModel, cat: np.ndarray, tmp_path: Path) -> None:
    """200 samples of 10 classes and 24 segments: 8 kB of outputs, 0.6 kB of masks, 3.2 kB of weights and groups."""
    options: dict[str, Any] = {"num_samples": 200, "segments": SEGMENTS}
    full = vs.lime(nano, cat, **options)
    from dataclasses import replace

    bare = replace(full, segmented_images=[replace(full.segmented_images[0], samples=None)])
    sizes = [result.save(tmp_path / f"{index}.safetensors").stat().st_size for index, result in enumerate((full, bare))]
    assert 11_800 < sizes[0] - sizes[1] < 13_000
