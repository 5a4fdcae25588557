"""Occlusion, RISE and KernelSHAP: equal to slow references, the same contract on every family, and refusals."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import families, swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.swin_families import SwinFamily, every_swin
from tests.helpers.tiny import LABELS, tiny_vit
from tests.reference import lime as slow
from tests.reference import occlusion as slow_occlusion
from tests.reference import rise as slow_rise
from tests.reference.shapley import shapley as slow_shapley
from vitscope.methods.kernel_shap import coalitions, shapley
from vitscope.methods.registry import METHODS
from vitscope.methods.rise import _mask
from vitscope.perturb import MaskedModel


def family(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


def outputs_of(model: vs.VisionModel, pixels: Tensor, output: str = "probability") -> np.ndarray:
    with torch.no_grad(), model.running():
        logits = model.answer(pixels)
    assert logits is not None
    return (logits.softmax(-1) if output == "probability" else logits).double().numpy()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Occlusion


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3)])
def test_occlusion_equals_the_slow_reference(window: int, stride: int) -> None:
    model, photo = vs.load(tiny_vit(), image_size=(32, 48)), noise(64, 96)

    def output(hidden: np.ndarray) -> float:
        covered = hidden.repeat(16, 0).repeat(16, 1)[..., None]
        return float(outputs_of(model, model.prepare(np.where(covered, np.uint8(128), photo))[0])[0, 2])

    result = vs.occlusion(model, photo, target=2, window=window, stride=stride)
    expected = slow_occlusion.occlusion(output, 4, 6, window, stride)
    assert result.values.shape == (1, 4, 6)
    assert result.values[0].numpy() == pytest.approx(expected, abs=1e-6)
    assert (result.target, result.signed) == (LABELS[2], True)


def test_occlusion_of_a_linear_model_gives_its_coefficients() -> None:
    """The model's output is the sum over its cells."""
    coefficients = np.random.default_rng(0).normal(size=(8, 2))
    labels = slow.stripes(4) + 4 * (np.arange(8) // 4)[:, None]
    module = slow.linear(labels, coefficients)
    model = vs.load(module, image_size=(8, 16), patch_size=4, readout="patches")
    result = vs.occlusion(model, slow.WHITE, target=1, hide="black", output="logit")
    assert result.values[0].numpy().ravel() == pytest.approx(coefficients[:, 1], abs=1e-5)
    pairs = vs.occlusion(model, slow.WHITE, target=1, hide="black", output="logit", window=2)
    twin = slow_occlusion.occlusion(lambda hidden: float((~hidden).ravel() @ coefficients[:, 1]), 2, 4, 2, 1)
    assert pairs.values[0].numpy() == pytest.approx(twin, abs=1e-5)


def test_a_window_over_the_entire_image_gives_the_total_drop() -> None:
    model, pixels = family("torchvision-vit").model(), family("torchvision-vit").pixels(1)
    result = vs.occlusion(model, pixels, target=0, window=4, hide="black", output="logit")
    black = torch.zeros_like(pixels)
    black[:] = (-torch.tensor(model.preprocessing.mean) / torch.tensor(model.preprocessing.std)).view(1, 3, 1, 1)
    drop = outputs_of(model, pixels, "logit")[0, 0] - outputs_of(model, black, "logit")[0, 0]
    assert result.values[0].numpy() == pytest.approx(np.full((4, 4), drop), abs=1e-5)
    assert result.provenance["samples"] == 1


# RISE


@pytest.mark.parametrize("size", [(8, 16), (9, 14)], ids=str)
@pytest.mark.parametrize("probability", [0.5, 0.2])
def test_rise_equals_the_slow_reference(size: tuple[int, int], probability: float) -> None:
    labels = slow.stripes(4, size)
    model = vs.load(slow.Known(labels, lambda shares: torch.stack([shares[:, 1], shares.prod(1)], 1)), image_size=size)
    photo = np.full((*size, 3), 255, np.uint8)
    random = np.random.default_rng(6)
    bits, shifts = random.random((25, 3, 3)) < probability, random.random((25, 2))
    masks = slow_rise.masks(bits, shifts, size)
    outputs = []
    for mask in masks:
        shares = np.array([mask[labels == label].mean() for label in range(4)])
        outputs.append(shares[1])
    options: dict[str, Any] = {"num_samples": 25, "cells": 3, "shown": probability, "seed": 6, "output": "logit"}
    result = vs.rise(model, photo, target=0, **options)
    assert result.values[0].numpy() == pytest.approx(slow_rise.rise(outputs, masks, probability), abs=1e-5)
    assert not result.signed
    assert (result.grid.height, result.grid.width) == size


@pytest.mark.parametrize("size", [(7, 7), (20, 31), (224, 300)], ids=str)
def test_masks_of_rise_are_bilinear_and_shifted_by_less_than_a_cell(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    bits, shifts = random.random((3, 7, 7)) < 0.5, random.random((3, 2))
    shifts[1], shifts[2] = 0.0, np.nextafter(1, 0)
    for index in range(3):
        mask = _mask(bits, shifts, index, size)
        assert mask.shape == size
        assert mask.min() >= 0
        assert mask.max() <= 1
        if size[0] < 100:
            (expected,) = slow_rise.masks(bits[index : index + 1], shifts[index : index + 1], size)
            assert mask == pytest.approx(expected, abs=1e-5)


def test_rise_highlights_the_region_that_the_output_depends_on() -> None:
    labels = slow.stripes(4)
    model = vs.load(
        slow.Known(labels, lambda shares: torch.stack([shares[:, 2], 1 - shares[:, 2]], 1)), image_size=(8, 16)
    )
    values = vs.rise(model, slow.WHITE, target=0, num_samples=600, cells=4, output="logit").values[0].numpy()
    means = [values[labels == label].mean() for label in range(4)]
    assert np.argmax(means) == 2
    assert means[2] > 1.1 * max(means[0], means[1])


def test_a_constant_output_gives_a_flat_map() -> None:
    """The pattern of the masks, which explains nothing, is removed, with a warning."""
    model = vs.load(slow.Known(slow.stripes(4), lambda shares: torch.full((len(shares), 2), 0.7)), image_size=(8, 16))
    with pytest.warns(vs.VitscopeWarning, match="stays 0.7 for all 3000 masks, so the map shows nothing"):
        values = vs.rise(model, slow.WHITE, target=0, num_samples=3000, output="logit", shown=0.3).values
    assert values.numpy() == pytest.approx(np.full((1, 8, 16), 0.7), abs=1e-6)


def test_outputs_that_differ_by_rounding_alone_count_as_constant() -> None:
    """Batches of other sizes may change the last bit of a float32."""
    labels, bit = slow.stripes(4), 2**-23
    model = vs.load(
        slow.Known(labels, lambda shares: (0.75 * (1 + bit * shares[:, 2].round()))[:, None].expand(-1, 2)),
        image_size=(8, 16),
    )
    with pytest.warns(vs.VitscopeWarning, match="so the map shows nothing"):
        values = vs.kernel_shap(model, slow.WHITE, target=0, segments=labels, hide="black", output="logit").weights
    assert values.tolist() == [0.0] * 4


def test_rise_of_a_large_photo_has_at_most_512_pixels_per_side() -> None:
    model = vs.load(tiny_vit())
    result = vs.rise(model, noise(300, 700), target=0, num_samples=2)
    assert result.values.shape == (1, 219, 512)
    assert result.overlay().size == (700, 300)


# KernelSHAP


def game(players: int, seed: int = 0) -> Callable[[np.ndarray], float]:
    """Return the value of a coalition whose players interact."""
    random = np.random.default_rng(seed)
    alone, pairs = random.normal(size=players), random.normal(size=(players, players))
    return lambda row: float(np.tanh(row @ alone + row @ pairs @ row) + 0.2 * row.prod())


def solved(value: Callable[[np.ndarray], float], players: int, count: int, seed: int = 0) -> np.ndarray:
    rows, kernel = coalitions(players, count, seed)
    ends = np.array([[value(np.zeros(players))], [value(np.ones(players))]])
    outputs = np.array([[value(row)] for row in rows.astype(float)])
    return shapley(rows, kernel, outputs, ends)[0][0]


@pytest.mark.parametrize("players", [2, 3, 4, 5, 6, 7, 8])
def test_with_all_coalitions_the_values_are_exact(players: int) -> None:
    value = game(players)
    expected = slow_shapley(lambda row: value(row.astype(float)), players)
    for count in (2**players - 2, 10_000):
        assert solved(value, players, count) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("players", [6, 7])
def test_it_equals_shaps_kernel_explainer(players: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shap = pytest.importorskip("shap", reason="the reference is PyPI's shap")
        value = game(players, seed=3)
        explainer = shap.KernelExplainer(
            lambda rows: np.array([value(row) for row in rows]), np.zeros((1, players)), silent=True
        )
        expected = explainer.shap_values(np.ones(players), nsamples=2**players, l1_reg=False, silent=True)
    assert solved(value, players, 2**players) == pytest.approx(np.asarray(expected).ravel(), abs=1e-6)


def test_kernel_shap_of_an_image_equals_the_slow_reference() -> None:
    model, photo = vs.load(tiny_vit(), image_size=32), noise(40, 60)
    labels = np.repeat(np.arange(6), 10)[None].repeat(40, 0)

    def outputs(row: np.ndarray) -> np.ndarray:
        return outputs_of(model, model.prepare(slow.hidden(photo, labels, row))[0])[0]

    result = vs.kernel_shap(model, photo, target=3, num_samples=62, segments=labels)
    assert result.intervals is None
    for label in result.classes:
        index, explained = LABELS.index(label), result.of(label)
        expected = slow_shapley(lambda row, index=index: float(outputs(row)[index]), 6)
        assert explained.weights.numpy() == pytest.approx(expected, abs=1e-5)
        assert explained.intercept == pytest.approx(outputs(np.zeros(6, dtype=bool))[index], abs=1e-6)
        assert explained.local_prediction == pytest.approx(explained.answer, abs=1e-6)
    assert result.provenance["samples"] == 64


@pytest.mark.parametrize("count", [2, 9, 20, 50, 200])
@pytest.mark.parametrize("output", ["probability", "logit"])
def test_the_values_always_add_up_to_the_output(count: int, output: str) -> None:
    model, photo = vs.load(tiny_vit(), image_size=(32, 48)), noise(32, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        result = vs.kernel_shap(model, photo, num_samples=count, segments="patches", output=output, seed=count)
    for label in result.classes:
        assert result.of(label).local_prediction == pytest.approx(result.of(label).answer, abs=1e-5)


@pytest.mark.parametrize("players", [2, 3, 5, 6, 9, 30])
@pytest.mark.parametrize("count", [2, 7, 40, 300])
def test_coalitions_are_complete_sizes_first_and_then_pairs(players: int, count: int) -> None:
    rows, kernel = coalitions(players, count, 1)
    sizes = rows.sum(1)
    assert len(rows) == len(kernel) <= count
    assert len(rows) >= min(count - 1, 2**players - 2)
    assert bool((sizes > 0).all())
    assert bool((sizes < players).all())
    assert bool((kernel > 0).all())
    if len(rows):
        assert kernel.sum() == pytest.approx(1) or count < 2 * players
    unique = {tuple(row) for row in rows.tolist()}
    assert all(tuple(~np.array(row)) in unique for row in unique)
    if count >= 2**players - 2:
        assert len(unique) == len(rows) == 2**players - 2


def test_equal_players_get_equal_values_and_idle_ones_zero() -> None:
    def value(row: np.ndarray) -> float:
        return float(np.sin(row[0] + row[2]) + row[4] * row[3])

    values = solved(value, 6, 62)
    assert values[0] == pytest.approx(values[2])
    assert values[3] == pytest.approx(values[4])
    assert values[[1, 5]] == pytest.approx([0, 0], abs=1e-12)


def test_more_samples_are_more_accurate() -> None:
    value = game(10, seed=4)
    expected = solved(value, 10, 1022)
    errors = [
        np.mean([np.abs(solved(value, 10, count, seed) - expected).mean() for seed in range(20)]) for count in (40, 400)
    ]
    assert errors[1] < errors[0] / 2


# The same contract on every family


def blocks() -> np.ndarray:
    return (np.arange(32) // 16)[:, None] * 3 + np.arange(48) // 16


@every_family
@pytest.mark.parametrize("hide", ["mean", "drop"])
def test_every_method_works_on_every_family(family: Family, hide: str) -> None:
    model, pixels = family.model(), family.pixels(1)
    target = 0 if model.embed is None else "similarity"
    name = "class 0" if model.embed is None else "similarity"
    size, cells = family.size, (family.grid.height, family.grid.width)
    labels = blocks()[:, : size[1]]
    with torch.no_grad(), model.running():
        logits = model.answer(pixels)
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
        assert result.answer == pytest.approx(expected, abs=1e-5)
    for method, options, shape in (
        (vs.occlusion, {"hide": hide}, cells),
        (vs.rise, {"num_samples": 6, "hide": hide, "shown": 0.9}, size),
    ):
        result = method(model, pixels, target=target, **options)
        assert result.values.shape == (1, *shape)
        assert result.values.dtype == torch.float32
        assert torch.isfinite(result.values).all()
        assert float(result.values.max() - result.values.min()) > 0
        assert result.target in (name, model.label(0))


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
    assert names == {"lime", "kernel_shap", "occlusion", "rise"}
    for name, method in METHODS.items():
        assert callable(method.compute)
        assert getattr(method.compute, "__name__", "") in (name, f"{name}_map")
        assert method.source
        assert method.summary


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
    ("lime", {"output": "odds"}, "unknown output 'odds': choose probability or logit"),
    ("lime", {"target": "thing 33"}, "target 'thing 33' is no label of this model: did you mean thing 3"),
    ("lime", {"target": 7}, "target 7 is not there: the model has classes 0 to 6"),
    ("lime", {"target": -1}, "target -1 is not there"),
    ("lime", {"target": 1.5}, "target is 1.5, a whole number is expected"),
    ("lime", {"target": "similarity"}, "target 'similarity' is no label"),
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
    ("lime", {"tie": 2}, "tie is 2, a share between 0 and 1"),
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
    ("rise", {"shown": 0.0}, "shown is 0.0"),
    ("rise", {"shown": 1.2}, "shown is 1.2"),
    ("rise", {"target": "thing 33"}, "did you mean"),
    ("rise", {"seed": -1}, "seed"),
]


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
        vs.UnsupportedModelError, match="gives neither classes nor features that vitscope knows"
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


def test_permuting_the_segments_permutes_the_shapley_values_even_with_few_samples() -> None:
    random = np.random.default_rng(0)
    rows, kernel = coalitions(12, 6, 0)
    outputs, ends = random.random((len(rows), 1)), np.array([[0.0], [7.8]])
    order = random.permutation(12)
    values, _ = shapley(rows, kernel, outputs, ends)
    permuted, _ = shapley(rows[:, order], kernel, outputs, ends)
    np.testing.assert_allclose(permuted, values[:, order], atol=1e-10)
    equal, _ = shapley(rows[:0], kernel[:0], outputs[:0], ends)
    np.testing.assert_allclose(equal, 7.8 / 12)
    assert values.sum() == pytest.approx(7.8)


def test_an_image_with_fewer_pixels_than_patches_is_refused() -> None:
    model = vs.load("vit-nano")
    for method in (vs.occlusion, vs.lime):
        options = {"segments": "patches"} if method is vs.lime else {}
        with pytest.raises(vs.CallError, match=r"6×6 pixels .* enlarge it first"):
            method(model, noise(6, 6, 0), **options)
