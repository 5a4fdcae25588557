"""Perturbation methods: the same contract on every family, Ctrl-C, and refusals."""

from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers import swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.perturbed import family, noise
from tests.helpers.swin_families import SwinFamily, every_swin
from tests.helpers.tiny import LABELS, tiny_vit
from tests.reference import lime as slow
from vitscope.methods.registry import METHODS
from vitscope.perturb import MaskedModel


def blocks() -> np.ndarray:
    return (np.arange(32) // 16)[:, None] * 3 + np.arange(48) // 16


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("hide", ["mean", "drop"])
def test_every_method_works_on_every_family(family: Family, hide: str) -> None:
    model, pixels = family.model(), family.pixels(1)
    target = 0 if model.embed is None else "similarity"
    name = "class 0" if model.embed is None else "similarity"
    size, cells = family.size, (family.grid.height, family.grid.width)
    labels = blocks()[:, : size[1]]
    with torch.no_grad(), model.running():
        logits = model.logits(pixels)
    segments = len(np.unique(labels))
    for method in (vs.lime, vs.kernel_shap):
        result = method(
            model, pixels, target=target, num_samples=20, segments=labels, hide=hide if method is vs.lime else "mean"
        )
        assert result.values.shape == (1, *size)
        assert result.weights.shape == (segments,)
        assert torch.isfinite(result.values).all()
        assert bool(result.weights.any())
        assert result.target in (name, model.label(0))
        expected = 1.0 if logits is None else float(logits.softmax(-1)[0, 0])
        assert result.output == pytest.approx(expected, abs=1e-5)
    for method, options, shape in (
        (vs.occlusion, {"hide": hide}, cells),
        (vs.rise, {"num_samples": 6, "hide": hide, "keep_probability": 0.9}, size),
    ):
        result = method(model, pixels, target=target, **options)
        assert result.values.shape == (1, *shape)
        assert result.values.dtype == torch.float32
        assert torch.isfinite(result.values).all()
        assert float(result.values.max() - result.values.min()) > 0
        assert result.target in (name, model.label(0))


@pytest.mark.slow
@every_swin
@pytest.mark.parametrize("hide", ["grey", "drop"])
def test_every_method_works_on_every_window_family(family: SwinFamily, hide: str) -> None:
    kind = "fitting" if "fitting" in family.sizes else "small"
    size = family.sizes[kind]
    model, pixels = family.model(size), swin_families.pixels(size, 1)
    labels = (np.arange(size[0]) * 2 // size[0])[:, None] * 3 + np.arange(size[1]) * 3 // size[1]
    grid = family.grid(size)
    last = (-(-grid.height // 4), -(-grid.width // 4))
    for method in (vs.lime, vs.kernel_shap):
        result = method(model, pixels, target=1, num_samples=20, segments=labels, hide=hide)
        assert result.values.shape == (1, *size)
        assert result.weights.shape == (6,)
        assert torch.isfinite(result.weights).all()
        assert bool(result.weights.any())
    for method, options, shape in (
        (vs.occlusion, {"hide": hide}, last),
        (vs.rise, {"num_samples": 4, "hide": hide}, size),
    ):
        result = method(model, pixels, target=1, **options)
        assert result.values.shape == (1, *shape)
        assert torch.isfinite(result.values).all()


def test_methods_work_on_maxvit() -> None:
    model, pixels = swin_families.MAXVIT.model((64, 64)), swin_families.pixels((64, 64), 1)
    labels = np.arange(64)[:, None] // 32 * 2 + np.arange(64) // 32
    result = vs.lime(model, pixels, target=0, num_samples=12, segments=labels)
    assert torch.isfinite(result.weights).all()
    assert torch.isfinite(vs.occlusion(model, pixels, target=0).values).all()


def test_every_perturbation_method_is_in_the_registry() -> None:
    names = {name for name, method in METHODS.items() if method.kind == "perturbation"}
    assert names == {"lime", "kernel_shap", "occlusion", "rise", "activation_patching"}
    for name, method in METHODS.items():
        assert callable(method.compute)
        assert getattr(method.compute, "__name__", "") in (name, f"{name}_map")
        assert method.source
        assert method.summary


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lime", "kernel_shap", "occlusion", "rise"])
def test_several_images_are_one_batch(name: str) -> None:
    model = vs.load(tiny_vit())
    photos = [noise(20, 30, seed) for seed in range(3)]
    options: dict[str, Any] = {} if name == "occlusion" else {"num_samples": 40}
    options |= {"segments": "patches"} if name in ("lime", "kernel_shap") else {}
    together = METHODS[name].compute(model, photos, target=1, **options)
    assert len(together) == 3
    assert together.target == LABELS[1]
    for photo, result in zip(photos, together, strict=True):
        alone = METHODS[name].compute(model, photo, target=1, **options)
        assert torch.equal(result.values, alone.values)
        assert result.target == alone.target
        assert result.provenance["method"] == name


@pytest.mark.parametrize("name", ["lime", "kernel_shap", "occlusion", "rise"])
def test_each_image_of_a_batch_has_its_own_target(name: str) -> None:
    """By default it is the likeliest class of each image, which may differ."""
    labels = slow.stripes(2)
    model = vs.load(slow.linear(labels, np.eye(2)), image_size=(8, 16), patch_size=4, readout="patches")
    left_half, right_half = slow.WHITE.copy(), slow.WHITE.copy()
    left_half[:, 8:], right_half[:, :8] = 30, 30
    options: dict[str, Any] = {"hide": "black"} | ({} if name == "occlusion" else {"num_samples": 20})
    options |= {"segments": labels} if name in ("lime", "kernel_shap") else {}
    together = METHODS[name].compute(model, [left_half, right_half], **options)
    assert [result.target for result in together] == ["class 0", "class 1"]


def test_ctrl_c_in_the_second_image_warns() -> None:
    model = vs.load(tiny_vit())
    steps: list[int] = []

    def press(_: vs.Progress) -> None:
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"target": 0, "num_samples": 40, "segments": "patches", "batch_size": 10}
    with (
        pytest.warns(vs.VitscopeWarning, match="interrupted: the result is based on 20 of 40"),
        pytest.warns(vs.VitscopeWarning, match="interrupted: the result holds the first 2 of 3 images"),
    ):
        result = vs.lime(model, [noise(20, 30, seed) for seed in range(3)], progress=press, **options)
    assert len(result) == 2
    assert result.provenance["interrupted"] is True


# Refusals


PHOTO = noise(20, 30)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("lime", {"segments": np.zeros((20, 30), int)}, "one segment only"),
    ("lime", {"segments": np.zeros((30, 20), int)}, "segment labels are 30×20, but the image is 20×30"),
    ("lime", {"segments": "voronoi"}, "unknown segments 'voronoi': choose quickshift, slic, patches"),
    ("lime", {"hide": "gray"}, "hide is 'gray': choose mean, black, grey"),
    ("lime", {"hide": 256}, "hide is 256: a colour is"),
    ("lime", {"hide": "nowhere.png"}, "hide is 'nowhere.png'.*does not exist"),
    ("lime", {"sampling": "grime"}, "unknown sampling 'grime': choose lime, paired, glime"),
    ("lime", {"output": "odds"}, "unknown output 'odds': choose logit, log_odds, probability, log_probability"),
    ("lime", {"target": "thing 33"}, "target 'thing 33' is not a label of this model: did you mean thing 3"),
    ("lime", {"target": 7}, "target 7 does not exist: the model has classes 0 to 6"),
    ("lime", {"target": -1}, "target -1 does not exist"),
    ("lime", {"target": 1.5}, "target is 1.5, a whole number is expected"),
    ("lime", {"target": "similarity"}, "target 'similarity' is not a label"),
    ("lime", {"num_samples": 1}, "num_samples is 1, at least 2"),
    ("lime", {"num_samples": 0}, "num_samples is 0, at least 2"),
    ("lime", {"num_samples": 10.5}, "num_samples is 10.5, a whole number"),
    ("lime", {"num_samples": "many"}, "num_samples is 'many': pass a whole number, or 'auto'"),
    ("lime", {"batch_size": 0}, "batch_size is 0, at least 1"),
    ("lime", {"batch_size": "big"}, "batch_size is 'big', a whole number"),
    ("lime", {"seed": 0.5}, "seed is 0.5, a whole number"),
    ("lime", {"seed": -1}, "seed"),
    ("lime", {"seed": 2**40}, "seed"),
    ("lime", {"kernel_width": 0.0}, "kernel_width is 0.0"),
    ("lime", {"kernel_width": "wide"}, "kernel_width is 'wide'"),
    ("lime", {"alpha": -1.0}, "alpha is -1.0"),
    ("lime", {"alpha": float("nan")}, "alpha is nan"),
    ("lime", {"confidence": 1.0}, "confidence is 1.0"),
    ("lime", {"confidence": 95}, "confidence is 95"),
    ("lime", {"top_segments": 0, "num_samples": "auto"}, "top_segments is 0, at least 1"),
    ("lime", {"tie": 2}, "tie is 2, a number between 0 and 1"),
    ("lime", {"top_labels": "all"}, "top_labels is 'all', a whole number"),
    ("kernel_shap", {"num_samples": 1}, "num_samples is 1, at least 2"),
    ("kernel_shap", {"segments": lambda _: np.ones((20, 30), int)}, "one segment only"),
    ("kernel_shap", {"seed": -1}, "seed"),
    ("occlusion", {"window": 0}, "stride is 1 and window is 0"),
    ("occlusion", {"window": 5}, "a window of 5 patches does not fit the grid of 4×4"),
    ("occlusion", {"window": 2, "stride": 3}, "stride is 3 and window is 2"),
    ("occlusion", {"window": 1.5}, "window is 1.5, a whole number"),
    ("occlusion", {"hide": "gray"}, "hide is 'gray'"),
    ("rise", {"num_samples": 0}, "num_samples is 0"),
    ("rise", {"cells": 1}, "cells is 1"),
    ("rise", {"keep_probability": 0.0}, "keep_probability is 0.0"),
    ("rise", {"keep_probability": 1.2}, "keep_probability is 1.2"),
    ("rise", {"target": "thing 33"}, "did you mean"),
    ("rise", {"seed": -1}, "seed"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "options", "message"), REFUSED, ids=lambda value: value[:40] if isinstance(value, str) else "-".join(value)
)
def test_invalid_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    segments = {"segments": "patches"} if name in ("lime", "kernel_shap") else {}
    with pytest.raises(vs.CallError, match=message) as caught:
        METHODS[name].compute(vs.load(tiny_vit()), PHOTO, **(segments | options))
    assert "\n" not in str(caught.value)


every_method = pytest.mark.parametrize("name", ["lime", "kernel_shap", "occlusion", "rise"])


@every_method
def test_a_model_without_a_classifier_is_refused_with_alternatives(name: str) -> None:
    bare = family("transformers-vit-bare")
    segments = {"segments": "patches"} if name in ("lime", "kernel_shap") else {}
    for target in (None, 0, "cat"):
        with pytest.raises(vs.CallError, match=r"has no classifier.*target='similarity'") as caught:
            METHODS[name].compute(bare.model(), bare.pixels(1), target=target, **segments)
        assert "\n" not in str(caught.value)


@every_method
def test_a_model_without_classes_or_features_is_refused(name: str) -> None:
    module = torch.nn.Conv2d(3, 4, 8, stride=8)
    model = vs.load(module, image_size=16, patch_size=8, readout="patches")
    with pytest.raises(
        vs.UnsupportedModelError, match="returns neither classes nor features that vitscope recognises"
    ) as caught:
        METHODS[name].compute(
            model, noise(16, 16), **({"segments": "patches"} if name in ("lime", "kernel_shap") else {})
        )
    assert "\n" not in str(caught.value)


@every_method
def test_no_image_is_refused(name: str) -> None:
    with pytest.raises(vs.CallError, match="no image was given"):
        METHODS[name].compute(vs.load(tiny_vit()), [])


@pytest.mark.usefixtures("unchecked")
@every_method
def test_a_string_is_not_a_model(name: str) -> None:
    with pytest.raises(vs.CallError, match=r"a model is expected, from vitscope\.load or an nn\.Module, not str"):
        METHODS[name].compute("vit-nano", PHOTO)


def test_segments_of_patches_need_known_patches() -> None:
    model = vs.load(slow.linear(slow.stripes(4), np.ones((4, 2))), image_size=(8, 16))
    for explain in (
        lambda: vs.occlusion(model, slow.WHITE),
        lambda: vs.lime(model, slow.WHITE, segments="patches"),
        lambda: vs.kernel_shap(model, slow.WHITE, segments="patches"),
    ):
        with pytest.raises(vs.CallError, match="the patches of this model are unknown") as caught:
            explain()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "meaning"), [(vs.lime, "depend on the ridge penalty"), (vs.kernel_shap, "the smallest that fit")]
)
def test_fewer_samples_than_segments_warn(method: Any, meaning: str) -> None:
    with pytest.warns(vs.VitscopeWarning, match=f"for 16 segments: fewer samples than unknowns.*{meaning}") as caught:
        result = method(vs.load(tiny_vit()), PHOTO, num_samples=10, segments="patches")
    assert "\n" not in str(caught[0].message)
    assert torch.isfinite(result.weights).all()


def test_a_warning_points_at_the_calling_line() -> None:
    with pytest.warns(vs.VitscopeWarning) as caught:
        vs.lime(vs.load(tiny_vit()), PHOTO, num_samples=10, segments="patches")
    assert caught[0].filename == __file__


def test_ctrl_c_before_the_second_image_keeps_the_first() -> None:
    model = vs.load(tiny_vit())
    steps: list[int] = []
    images = [noise(20, 30, seed) for seed in range(2)]
    expected = vs.lime(model, images[0], target=0, num_samples=40, segments="patches")

    def record(_: vs.Progress) -> None:
        steps.append(1)

    options: dict[str, Any] = {"target": 0, "num_samples": 40, "segments": "patches", "progress": record}
    evaluate = MaskedModel.evaluate

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if steps:
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedModel, "evaluate", interrupted)
        with pytest.warns(vs.VitscopeWarning, match="the first 1 of 2 images"):
            result = vs.lime(model, images, **options)
    torch.testing.assert_close(result.weights, expected.weights)


def test_an_image_with_fewer_pixels_than_patches_is_refused() -> None:
    model = vs.load("vit-nano")
    for method in (vs.occlusion, vs.lime):
        options = {"segments": "patches"} if method is vs.lime else {}
        with pytest.raises(vs.CallError, match=r"6×6 pixels .* enlarge it first"):
            method(model, noise(6, 6, 0), **options)
