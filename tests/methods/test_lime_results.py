"""LIME's results: weights, regions, files, provenance, several images, models of other kinds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vitscope as vs
from tests.helpers import families, tiny
from tests.helpers.lime import (
    assert_close,
    blocks,
    shrunk,
)
from tests.reference import lime as slow
from vitscope.perturb.masks import PairedSampler


@pytest.fixture(scope="module")
def result(nano: vs.VisionModel, cat: np.ndarray) -> vs.SegmentAttribution:
    return vs.lime(nano, cat, num_samples=60, segments=blocks(40, 60, 10), seed=2)


def test_values_are_the_weights_of_the_segments_in_the_order_of_their_labels(
    result: vs.SegmentAttribution, cat: np.ndarray
) -> None:
    labels = blocks(40, 60, 10)
    assert np.array_equal(result.segments.numpy(), labels)
    assert result.values.shape == (1, *cat.shape[:2])
    assert result.values.dtype == torch.float32
    assert result.weights.dtype == torch.float64
    assert (result.grid.height, result.grid.width, result.grid.prefix) == (40, 60, 0)
    for index, label in enumerate(np.unique(labels)):
        inside = result.values[0].numpy()[labels == label]
        assert np.array_equal(inside, np.full(100, np.float32(result.weights[index])))


def test_top_and_regions_are_the_largest_weights(result: vs.SegmentAttribution) -> None:
    weights = result.weights.numpy()
    orders = {"positive": np.argsort(-weights), "negative": np.argsort(weights), "both": np.argsort(-np.abs(weights))}
    for sign, order in orders.items():
        assert result.top(4, sign=sign) == order[:4].tolist()
        inside = np.isin(result.index.numpy(), order[:4])
        assert np.array_equal(result.regions(4, sign=sign).numpy(), inside)
    assert result.top() == orders["positive"][:5].tolist()
    positive = int((weights > 0).sum())
    assert len(result.top(99)) == positive
    assert len(result.top(99)) + len(result.top(99, sign="negative")) == len(weights)
    assert result.top(0) == []
    assert not result.regions(0).any()
    with pytest.raises(vs.CallError, match="sign is 'up': choose positive, negative, both"):
        result.top(sign="up")


def test_a_saved_result_reads_back(result: vs.SegmentAttribution, tmp_path: Path) -> None:
    back = vs.SegmentAttribution.load(result.save(tmp_path / "cat.safetensors"))
    for name in ("values", "segments", "index", "weights", "intervals"):
        assert torch.equal(getattr(back, name), getattr(result, name)), name
    for label in result.classes:
        explained, saved = result.of(label), back.of(label)
        assert torch.equal(saved.weights, explained.weights)
        assert torch.equal(saved.intervals, explained.intervals)
        assert (saved.intercept, saved.score, saved.target) == (explained.intercept, explained.score, explained.target)
        assert saved.output == explained.output
    assert back.provenance == {**result.provenance, "photos": result.photo_records()}
    assert back.signed
    assert back.top(3) == result.top(3)
    assert torch.equal(back.regions(3), result.regions(3))
    with pytest.raises(vs.CallError, match="holds no photos"):
        back.overlay()


def test_a_result_is_saved_as_arrays_as_json_and_as_an_image(result: vs.SegmentAttribution, tmp_path: Path) -> None:
    with np.load(result.save(tmp_path / "cat.npz")) as arrays:
        assert np.array_equal(arrays["values"], result.values.numpy())
        assert np.array_equal(arrays["segments.0"], result.segments.numpy())
        assert np.array_equal(arrays["weights.0.0"], result.weights.numpy())
        assert np.array_equal(arrays["intervals.0.1"], result.of(result.classes[1]).intervals.numpy())
        assert json.loads(str(arrays["about"]))["target"] == result.target
    saved = json.loads(result.save(tmp_path / "cat.json").read_text())
    (image,) = saved["images"]
    assert [entry["label"] for entry in image["classes"]] == result.classes
    for entry in image["classes"]:
        explained = result.of(entry["label"])
        assert (entry["weights"], entry["intervals"]) == (explained.weights.tolist(), explained.intervals.tolist())
        assert (entry["intercept"], entry["score"], entry["output"]) == (
            explained.intercept,
            explained.score,
            explained.output,
        )
    assert [entry["label"] for entry in image["segments"]] == np.unique(blocks(40, 60, 10)).tolist()
    assert all(entry["pixels"] == 100 for entry in image["segments"])
    assert image["segments"][7]["centre"] == [14.5, 14.5]
    assert saved["provenance"]["method"] == "lime"
    with Image.open(result.save(tmp_path / "cat.png")) as image:
        assert (image.size, image.mode) == ((60, 40), "RGB")


@pytest.mark.slow
def test_the_provenance_holds_all_parameters(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 70, "sampling": "glime", "kernel_width": 0.5, "alpha": 2.0, "seed": 9}
    provenance = vs.lime(nano, cat, segments="patches", hide=(1, 2, 3), confidence=0.9, **options).provenance
    assert provenance["method"] == "lime"
    expected = options | {"segments": "patches", "hide": [1.0, 2.0, 3.0], "output": "probability", "confidence": 0.9}
    assert provenance["parameters"] == expected | {"perturbed_at": [40, 60]}
    assert (provenance["samples"], provenance["interrupted"]) == (70, False)
    assert (provenance["model"], provenance["library"]) == ("vit-nano", "transformers")
    assert json.loads(json.dumps(dict(provenance))) == provenance


@pytest.mark.slow
def test_several_images_are_explained_separately(nano: vs.VisionModel, cat: np.ndarray, tmp_path: Path) -> None:
    astronaut = shrunk("astronaut", (60, 40))
    options: dict[str, Any] = {"num_samples": 80, "segments": "patches"}
    alone = [vs.lime(nano, photo, **options) for photo in (cat, astronaut)]
    together = vs.lime(nano, [cat, astronaut], **options)
    assert len(together) == 2
    assert together.values.shape == (2, 40, 60)
    assert together.target is None
    assert alone[0].target != alone[1].target
    back = vs.SegmentAttribution.load(together.save(tmp_path / "both.safetensors"))
    for index, result in enumerate(together):
        for same in (result, together[index - 2], back[index]):
            assert torch.equal(same.weights, alone[index].weights)
            assert torch.equal(same.intervals, alone[index].intervals)
            assert torch.equal(same.values, alone[index].values)
            assert (same.target, same.classes) == (alone[index].target, alone[index].classes)
        assert result.overlay() == alone[index].overlay()
    for access in (lambda: together.weights, together.top, lambda: together.segments):
        with pytest.raises(vs.CallError, match=r"this result holds 2 images: take one, as in result\[0\]"):
            access()
    for index in (2, -3):
        with pytest.raises(vs.CallError, match=f"image {index} does not exist: this result has images 0 to 1"):
            together[index]


@pytest.mark.slow
def test_one_class_of_several_images(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"num_samples": 80, "segments": "patches", "top_labels": 10}
    batch = vs.lime(nano, [cat, shrunk("astronaut", (60, 40))], **options).of("dog")
    assert batch.target == "dog"
    assert [result.target for result in batch] == ["dog", "dog"]
    assert torch.equal(batch.values[0], batch[0].values[0])
    assert not torch.equal(batch.values[0], batch.values[1])


@pytest.mark.slow
def test_a_tensor_of_several_images(nano: vs.VisionModel, cat: np.ndarray) -> None:
    pixels = nano.prepare([cat, shrunk("astronaut", (48, 40))])[0]
    options: dict[str, Any] = {"num_samples": 80, "segments": "patches", "target": 3}
    together = vs.lime(nano, pixels, **options)
    assert together.values.shape == (2, 32, 32)
    assert together.target == "cat"
    for index in (0, 1):
        assert torch.equal(vs.lime(nano, pixels[index : index + 1], **options).weights, together[index].weights)


@pytest.mark.usefixtures("unchecked")
def test_numpys_numbers_are_numbers(nano: vs.VisionModel, cat: np.ndarray) -> None:
    options: dict[str, Any] = {"segments": blocks(40, 60, 20)}
    plain = vs.lime(nano, cat, target=5, num_samples=20, seed=1, batch_size=8, **options)
    same = vs.lime(
        nano, cat, target=np.int64(5), num_samples=np.int32(20), seed=np.uint8(1), batch_size=np.int16(8), **options
    )
    assert torch.equal(same.weights, plain.weights)


def test_a_live_module_equals_a_loaded_model(cat: np.ndarray) -> None:
    module = tiny.tiny_vit()
    options: dict[str, Any] = {"num_samples": 30, "segments": "patches"}
    live, loaded = vs.lime(module, cat, **options), vs.lime(vs.load(module), cat, **options)
    assert torch.equal(live.weights, loaded.weights)
    assert live.target in tiny.LABELS


def test_a_model_without_a_classifier_is_explained_by_the_similarity_of_its_features(cat: np.ndarray) -> None:
    family = next(family for family in families.ALL if family.name == "transformers-vit-bare")
    model, labels = family.model(), blocks(40, 60, 20)
    result = vs.lime(
        model, cat, target="similarity", num_samples=40, segments=labels, batch_size=40, sampling="paired", seed=1
    )
    assert (result.target, result.classes) == ("similarity", ["similarity"])
    assert result.provenance["parameters"]["output"] == "similarity"
    assert result.output == pytest.approx(1, abs=1e-6)
    rows = PairedSampler(6, 1).draw(40)
    with torch.no_grad(), model.running():
        features = model.features(model.prepare([slow.hidden(cat, labels, row) for row in rows])[0]).double()
    cosines = torch.cosine_similarity(features, features[:1]).numpy()
    coefficients, intercept, _ = slow.ridge(rows, cosines, np.array([slow.kernel(row) for row in rows]), 1.0)
    assert_close(result.weights, coefficients, 1e-3)
    assert result.intercept == pytest.approx(intercept, abs=1e-5)


def test_progress_is_reported(nano: vs.VisionModel, cat: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    steps: list[vs.Progress] = []
    options: dict[str, Any] = {"num_samples": 30, "segments": blocks(40, 60, 20), "batch_size": 16}
    vs.lime(nano, cat, progress=steps.append, **options)
    assert steps == [vs.Progress("evaluating", 16, 30), vs.Progress("evaluating", 30, 30)]
    assert capsys.readouterr() == ("", "")
    vs.lime(nano, cat, progress=True, **options)
    assert capsys.readouterr().out == ""
