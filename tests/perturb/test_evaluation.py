"""Evaluations that are interrupted, out of memory, constant or not finite, and that leave the model unchanged."""

import dataclasses
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.contracts.test_leaks import assert_same, mixed, state
from tests.helpers.perturbed import family, noise
from tests.reference import lime as slow
from vitscope.perturb.masked_model import MaskedModel
from vitscope.perturb.options import PerturbationOptions
from vitscope.perturb.rendering import Renderer, Subject, subjects

LABELS = slow.stripes(4)


def model_of(logits: Callable[[Tensor], Tensor]) -> vs.VisionModel:
    """Return a model whose logits are a function of the visible stripes of four."""
    return vs.load(slow.Known(LABELS, logits), image_size=(8, 16))


LINEAR = torch.tensor([[1.0, 0.0], [0.5, 0.0], [-1.0, 0.5], [0.25, 0.0]])


def linear() -> vs.VisionModel:
    return model_of(lambda visible: visible @ LINEAR)


BLACK: dict[str, Any] = {"hide": "black", "output": "logit"}
OPTIONS: dict[str, Any] = {"segments": LABELS, **BLACK}


METHODS: dict[str, Callable[..., Any]] = {
    "lime": lambda model, **more: vs.lime(model, slow.WHITE, num_samples=40, target=0, **OPTIONS, **more),
    "kernel_shap": lambda model, **more: vs.kernel_shap(model, slow.WHITE, num_samples=14, target=0, **OPTIONS, **more),
    "rise": lambda model, **more: vs.rise(model, slow.WHITE, num_samples=40, target=0, **BLACK, **more),
}


every_method = pytest.mark.parametrize("explain", METHODS.values(), ids=METHODS)


class CtrlC:
    """A progress callback that raises KeyboardInterrupt after this number of batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self, _: vs.Progress) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@every_method
def test_ctrl_c_returns_a_result_of_the_samples_so_far(explain: Callable[..., Any]) -> None:
    with pytest.warns(vs.VitscopeWarning, match=r"interrupted: the result is based on 12") as caught:
        result = explain(linear(), batch_size=4, progress=CtrlC(3))
    assert "\n" not in str(caught[0].message)
    assert result.provenance["interrupted"] is True
    assert result.provenance["samples"] == 12
    assert torch.isfinite(result.values).all()


def test_after_ctrl_c_the_weights_are_those_of_fewer_samples() -> None:
    with pytest.warns(vs.VitscopeWarning, match="interrupted"):
        interrupted = METHODS["lime"](linear(), batch_size=10, progress=CtrlC(2))
    complete = vs.lime(linear(), slow.WHITE, num_samples=20, batch_size=10, target=0, **OPTIONS)
    torch.testing.assert_close(interrupted.weights, complete.weights)
    assert complete.provenance["interrupted"] is False


def test_ctrl_c_ends_automatic_sampling_too() -> None:
    options = OPTIONS | {"num_samples": "auto", "batch_size": 32}
    with pytest.warns(vs.VitscopeWarning, match=r"^interrupted: the result is based on 96 samples$"):
        result = vs.lime(linear(), slow.WHITE, progress=CtrlC(3), **options)
    assert result.provenance["samples"] == 96
    assert result.provenance["interrupted"] is True


@every_method
def test_ctrl_c_before_two_samples_is_raised(explain: Callable[..., Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        explain(linear(), batch_size=1, progress=CtrlC(1))


def test_interrupted_occlusion_has_values_of_the_evaluated_windows() -> None:
    model = family("timm-vit").model()
    pixels = family("timm-vit").pixels(1)
    with pytest.warns(vs.VitscopeWarning, match="interrupted: the result is based on 10 of 24"):
        interrupted = vs.occlusion(model, pixels, target=0, batch_size=5, progress=CtrlC(2))
    complete = vs.occlusion(model, pixels, target=0, batch_size=5)
    torch.testing.assert_close(interrupted.values.flatten()[:10], complete.values.flatten()[:10])
    assert not interrupted.values.flatten()[10:].any()


def test_dropping_can_be_interrupted() -> None:
    model, pixels = family("timm-vit").model(), family("timm-vit").pixels(1)
    with pytest.warns(vs.VitscopeWarning, match="interrupted"):
        result = vs.lime(
            model, pixels, target=0, num_samples=60, segments="patches", hide="drop", batch_size=4, progress=CtrlC(6)
        )
    assert 6 <= result.provenance["samples"] <= 24
    assert torch.isfinite(result.weights).all()


def out_of(error: Callable[[], BaseException], most: int, sizes: list[int]) -> vs.VisionModel:
    """Return a model with memory for this number of images only."""
    model = linear()

    def forward(pixels: Tensor) -> Tensor | None:
        sizes.append(len(pixels))
        if len(pixels) > most:
            raise error()
        return model.forward(pixels)

    return dataclasses.replace(model, forward=forward)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
    "python": MemoryError,
}


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_batches_are_halved_until_the_memory_suffices(
    explain: Callable[..., Any], error: Callable[[], BaseException]
) -> None:
    plenty = explain(linear(), batch_size=16)
    sizes: list[int] = []
    with pytest.warns(vs.VitscopeWarning) as caught:
        little = explain(out_of(error, 5, sizes), batch_size=16)
    assert [str(warning.message) for warning in caught] == [
        "not enough memory for a batch of 16: continuing with 8",
        "not enough memory for a batch of 8: continuing with 4",
    ]
    assert max(sizes[3:]) == 4
    assert little.provenance["samples"] == plenty.provenance["samples"]
    torch.testing.assert_close(little.values, plenty.values, atol=1e-6, rtol=1e-5)


def test_too_little_memory_for_one_image_is_an_error() -> None:
    sizes: list[int] = []
    model = linear()

    def forward(pixels: Tensor) -> Tensor | None:
        sizes.append(len(pixels))
        if len(sizes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return model.forward(pixels)

    with (
        pytest.warns(vs.VitscopeWarning),
        pytest.raises(vs.WorkError, match=r"not enough memory to run .* on a single image") as caught,
    ):
        METHODS["lime"](dataclasses.replace(model, forward=forward), batch_size=4)
    assert "\n" not in str(caught.value)
    assert sizes == [1, 4, 2, 1]


def test_other_errors_of_the_model_are_raised() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        METHODS["lime"](out_of(lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 4, []))


@pytest.mark.slow
def test_batches_are_halved_while_dropping_too() -> None:
    base, pixels = family("timm-vit").model(), family("timm-vit").pixels(1)

    def forward(batch: Tensor) -> Tensor | None:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return base.forward(batch)

    options: dict[str, Any] = {"target": 0, "num_samples": 40, "segments": "patches", "hide": "drop"}
    plenty = vs.lime(base, pixels, **options)
    with pytest.warns(vs.VitscopeWarning, match="not enough memory for a batch"):
        little = vs.lime(dataclasses.replace(base, forward=forward), pixels, **options)
    torch.testing.assert_close(little.weights, plenty.weights, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["lime", "kernel_shap"])
def test_constant_outputs_give_zero_weights(method: str) -> None:
    model = model_of(lambda visible: torch.full((len(visible), 2), 1 / 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = METHODS[method](model)
    assert not result.weights.any()
    assert not result.values.any()
    assert (result.intercept, result.score) == (pytest.approx(1 / 3), 1)
    assert result.intervals is None or not result.intervals.any()
    if method == "lime":
        (message,) = [str(warning.message) for warning in caught]
        assert message == "the output for 'class 0' is the same for all 40 masks: all weights are zero"


def test_constant_outputs_are_drawn_without_further_warnings(recwarn: pytest.WarningsRecorder) -> None:
    model = model_of(lambda visible: torch.zeros(len(visible), 2))
    with pytest.warns(vs.VitscopeWarning, match="is the same for all 40 masks"):
        result = METHODS["lime"](model)
    assert result.overlay().size == (16, 8)
    assert result.top() == []
    assert not result.regions().any()
    assert not recwarn.list


@every_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("moment", ["original", "hidden"])
def test_an_output_that_is_not_finite_is_refused(explain: Callable[..., Any], bad: float, moment: str) -> None:
    def logits(visible: Tensor) -> Tensor:
        spoilt = torch.ones(len(visible)) if moment == "original" else (visible.sum(1) < 3).float()
        return visible @ LINEAR + torch.where(spoilt[:, None] > 0, bad, 0.0)

    with pytest.raises(vs.WorkError, match="came out as NaN or infinity: check the model's weights") as caught:
        explain(model_of(logits))
    assert "\n" not in str(caught.value)


def test_a_model_that_stops_returning_classes_is_refused() -> None:
    model, calls = linear(), []

    def forward(pixels: Tensor) -> Tensor | None:
        calls.append(1)
        return model.forward(pixels) if len(calls) == 1 else None

    with pytest.raises(vs.WorkError, match="returned classes for the original image, but none for a perturbed one"):
        METHODS["lime"](dataclasses.replace(model, forward=forward))


def test_memory_holds_at_most_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the next batch is rendered while the model runs on the current one."""
    rendered_indices: list[int] = []
    batch_sizes: list[int] = []
    render, model = Renderer._render, linear()
    monkeypatch.setattr(
        Renderer, "_render", lambda self, masks, index: rendered_indices.append(index) or render(self, masks, index)
    )

    def forward(pixels: Tensor) -> Tensor | None:
        batch_sizes.append(len(pixels))
        assert len(rendered_indices) <= sum(batch_sizes[1:]) + 8
        return model.forward(pixels)

    METHODS["lime"](dataclasses.replace(model, forward=forward), batch_size=8)
    assert sum(batch_sizes) == 41
    assert sorted(rendered_indices) == list(range(40))


class TroubleError(Exception):
    pass


LEAVING = ["timm-vit", "transformers-beit", "transformers-dinov3", "torchvision-vit"]


def every_way(model: Any, pixels: Tensor) -> list[Callable[[], Any]]:
    bare = (model if isinstance(model, vs.VisionModel) else vs.load(model)).embed is not None
    common: dict[str, Any] = {"target": "similarity" if bare else 0}
    return [
        lambda: vs.lime(model, pixels, num_samples=30, segments="patches", hide="drop", **common),
        lambda: vs.lime(model, pixels, num_samples=30, segments="patches", hide="noise", **common),
        lambda: vs.kernel_shap(model, pixels, num_samples=50, segments="patches", **common),
        lambda: vs.occlusion(model, pixels, **common),
        lambda: vs.occlusion(model, pixels, hide="drop", **common),
        lambda: vs.rise(model, pixels, num_samples=10, **common),
        lambda: vs.rise(model, pixels, num_samples=10, hide="drop", **common),
    ]


# Models are unchanged. The type checks are off, because they draw random numbers of their own.


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LEAVING)
def test_methods_do_not_change_the_model(name: str) -> None:
    model, pixels = family(name).model(), family(name).pixels(1)
    mixed(model.module)
    before = state(model.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        for way in [*every_way(model, pixels), *every_way(model.module, pixels)]:
            way()
    assert_same(state(model.module), before)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", LEAVING)
@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_failing_methods_do_not_change_the_model(name: str, after: int) -> None:
    """The model raises in its second block, or Ctrl-C comes there before any output, after this number of runs."""
    model, pixels = family(name).model(), family(name).pixels(1)
    mixed(model.module)
    norms = [child for child in model.module.modules() if isinstance(child, torch.nn.LayerNorm)]
    ways = every_way(model, pixels)
    for error in (TroubleError, KeyboardInterrupt)[: 2 if after <= 2 else 1]:
        runs: list[int] = []

        def trouble(*_: Any, error: type[BaseException] = error, runs: list[int] = runs) -> None:
            runs.append(1)
            if len(runs) >= after:
                raise error

        handle = norms[2].register_forward_pre_hook(trouble)
        before = state(model.module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vs.VitscopeWarning)
            for way in ways if after <= 2 else ways[:1]:
                runs.clear()
                with pytest.raises(error):
                    way()
        assert_same(state(model.module), before)
        handle.remove()


def test_a_masked_model_equals_the_model_on_masked_photos() -> None:
    model, photo = family("timm-vit").model(), noise(50, 70)
    (subject,) = subjects(model, photo)
    assert isinstance(subject, Subject)
    masked_model = MaskedModel(
        model, subject, PerturbationOptions(hide="grey", output="logit", batch_size=3), segments="patches"
    )
    assert masked_model.segments is not None
    rows = np.random.default_rng(0).integers(0, 2, (7, masked_model.segments.count)).astype(bool)
    evaluations = masked_model.evaluate(masked_model.masks(rows), [5, 0])
    assert evaluations.evaluated.all()
    assert not evaluations.interrupted
    visible = [np.append(row, True)[masked_model.segments.index][..., None] for row in rows]
    photos = [np.where(mask, photo, np.uint8(128)) for mask in visible]
    with torch.no_grad(), model.running():
        expected = model.logits(model.prepare(photos)[0])
    assert expected is not None
    assert evaluations.outputs == pytest.approx(expected[:, [5, 0]].double().numpy(), abs=1e-5)


def test_progress_continues_over_several_evaluations() -> None:
    steps: list[tuple[int, int]] = []
    (subject,) = subjects(linear(), slow.WHITE)
    masked_model = MaskedModel(
        linear(),
        subject,
        PerturbationOptions(hide="black", batch_size=4),
        segments=LABELS,
        report=lambda step: steps.append((step.completed, step.total)),
    )
    masks = masked_model.masks(np.ones((6, 4), dtype=bool))
    masked_model.evaluate(masks, [0])
    masked_model.evaluate(masks, [0], before=6, total=12)
    assert steps == [(4, 6), (6, 6), (10, 12), (12, 12)]
    assert all(first[0] < second[0] for first, second in pairwise(steps))
