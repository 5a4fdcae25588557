"""Predictions of compose(): deterministic, without side effects, for every family, after Ctrl-C and without memory."""

import dataclasses
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import vitscope as vs
from tests.contracts.test_leaks import TroubleError, assert_same, mixed, state
from tests.helpers import families, swin_families
from tests.helpers.families import Family, every_family
from tests.helpers.swin_families import SwinFamily, every_swin
from tests.helpers.tiny import tiny_vit
from tests.reference.stage import noise
from vitscope.compositing.stage import Stage
from vitscope.interventions.positions import neutral_positions, positions
from vitscope.perturb.rendering import subjects
from vitscope.tracing.capture import run_and_capture

ALL_TESTS = ("size", "location", "split", "controls")


def family(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


# Determinism

OBJECTS = {"a": (4, 6, 16, 10), "b": (30, 16, 15, 18)}


def run_all_tests(model: Any = None, photo: Any = None, **options: Any) -> vs.Composition:
    model = vs.load(tiny_vit()) if model is None else model
    photo = noise(40, 56) if photo is None else photo
    return vs.compose(model, photo, OBJECTS, **({"tests": ALL_TESTS, "places": 2} | options))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_images_and_outputs() -> None:
    first, again, different = run_all_tests(seed=1), run_all_tests(seed=1), run_all_tests(seed=2)
    assert np.array_equal(first.outputs, again.outputs)
    differing = []
    for index, image in enumerate(first.edited_images):
        assert np.array_equal(first.stage.render(image), again.stage.render(image))
        if not np.array_equal(first.stage.render(image), different.stage.render(image)):
            differing.append(image.name)
            assert not np.array_equal(first.outputs[index], different.outputs[index])
    assert differing == ["a on shuffled background", "b on shuffled background"]
    noisy = [run_all_tests(tests="split", fill="noise", seed=seed).image("a left out").tobytes() for seed in (1, 1, 2)]
    assert noisy[0] == noisy[1] != noisy[2]


@pytest.mark.slow
@pytest.mark.parametrize("attention", [False, True])
def test_batches_of_any_size_give_the_same_outputs(attention: bool) -> None:
    results = [run_all_tests(batch_size=size, attention=attention) for size in (1, 7, 64)]
    for result in results[1:]:
        np.testing.assert_allclose(result.outputs, results[0].outputs, atol=1e-5)
        if attention:
            np.testing.assert_allclose(result.rollouts, results[0].rollouts, atol=1e-5)


def test_attention_changes_no_output() -> None:
    np.testing.assert_allclose(run_all_tests(attention=True).outputs, run_all_tests().outputs, atol=1e-5)


def test_progress_is_reported_after_every_batch() -> None:
    reports: list[tuple[int, int]] = []
    result = run_all_tests(batch_size=10, progress=lambda step: reports.append((step.completed, step.total)))
    assert reports[-1] == (len(result), len(result))
    assert [total for _, total in reports] == [len(result)] * len(reports)
    assert all(previous[0] < following[0] <= previous[0] + 10 for previous, following in pairwise(reports))


# No side effects


# The type checks draw random numbers of their own.
@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["timm-vit", "transformers-beit", "transformers-dinov2"])
def test_compose_restores_the_model(name: str) -> None:
    model = family(name).model()
    mixed(model.module)
    before = state(model.module)
    for variant in (model, model.module):
        run_all_tests(variant, attention=True)
    assert_same(state(model.module), before)


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("error", [TroubleError, KeyboardInterrupt])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("after", [1, 2, 26])
def test_compose_restores_the_model_after_a_failure(after: int, attention: bool, error: type[BaseException]) -> None:
    """The last forward passes are those with neutral positions."""
    model = family("timm-vit").model()
    mixed(model.module)
    runs: list[int] = []

    def trouble(*_: Any) -> None:
        runs.append(1)
        if len(runs) >= after:
            raise error

    model.module.blocks[1].norm1.register_forward_pre_hook(trouble)
    before = state(model.module)
    if error is KeyboardInterrupt and after > 2:
        with pytest.warns(vs.VitscopeWarning, match="interrupted"):
            run_all_tests(model, attention=attention, batch_size=2)
    else:
        with pytest.raises(error):
            run_all_tests(model, attention=attention, batch_size=2)
    assert len(runs) >= after
    assert_same(state(model.module), before)


# Every family


def check_each_image_alone(
    model: vs.VisionModel, photo: Any, objects: Any, *, attention: bool = True
) -> vs.Composition:
    """Check that the output and the rollout of every edited image equal those of that image alone."""
    target = "similarity" if model.embed is not None else 0
    options: dict[str, Any] = {"target": target, "output": "logit", "places": 2, "scales": [0.6], "batch_size": 16}
    result = vs.compose(model, photo, objects, tests=ALL_TESTS, attention=attention, **options)
    model_positions, (subject,) = positions(model), subjects(model, photo)
    features = None if model.embed is None else model.embed
    original, seen_kinds = None, set()
    for index, image in enumerate(result.edited_images):
        kind = (image.test, image.background, image.neutral, image.place is None, image.subject)
        if kind in seen_kinds:
            continue
        seen_kinds.add(kind)
        values = result.stage.render(image)
        if subject.scaling is None:
            pixels, _ = model.prepare(values)
        else:
            factor, offset = subject.scaling
            scaled = (torch.from_numpy(values) * factor + offset).permute(2, 0, 1)[None]
            pixels = torch.where(torch.from_numpy(values != subject.values).permute(2, 0, 1), scaled, subject.pixels)
        with (
            neutral_positions(model_positions) if image.neutral else warnings.catch_warnings(),
            torch.no_grad(),
            model.running(),
        ):
            answer = model.logits(pixels) if features is None else features(pixels)
            if attention:
                rolled = vs.rollout(run_and_capture(model, pixels).trace).values[0].numpy()
                np.testing.assert_allclose(result.rollouts[index], rolled, atol=1e-5, err_msg=image.name)
        original = answer if original is None else original
        if features is not None:
            answer = torch.cosine_similarity(answer, original)[:, None]
        np.testing.assert_allclose(result.outputs[index], answer[0], atol=2e-5, err_msg=image.name)
    assert model_positions.can_be_neutral == any(image.neutral for image in result.edited_images)
    first = result.location_map()
    assert first.target == ("similarity" if model.embed is not None else model.label(0))
    assert float(first.values.max() - first.values.min()) > 0
    return result


@pytest.mark.slow
@every_family
def test_outputs_of_every_family_equal_those_of_single_images(family: Family) -> None:
    result = check_each_image_alone(family.model(), noise(44, 60), {"a": (4, 6, 16, 10), "b": (30, 16, 15, 18)})
    if result.output == "similarity":
        assert result.outputs[0, 0] == pytest.approx(1, abs=1e-5)
        assert result.outputs.shape[1] == 1


@pytest.mark.slow
@every_swin
def test_outputs_of_every_window_family_equal_those_of_single_images(family: SwinFamily) -> None:
    size = family.sizes["fitting" if "fitting" in family.sizes else "small"]
    width, height = size[1] // 3, size[0] // 3
    objects = {"a": (1, 1, width, height), "b": (size[1] // 2, size[0] // 2, width, height)}
    check_each_image_alone(family.model(size), swin_families.pixels(size, 1), objects)


@pytest.mark.slow
def test_maxvit_is_supported_without_attention() -> None:
    model, pixels = swin_families.MAXVIT.model((64, 64)), swin_families.pixels((64, 64), 1)
    check_each_image_alone(model, pixels, (10, 12, 20, 18), attention=False)
    with pytest.raises(vs.UnsupportedModelError):
        vs.compose(model, pixels, (10, 12, 20, 18), tests=(), attention=True)


def test_a_live_module_gives_the_same_outputs() -> None:
    module = tiny_vit()
    np.testing.assert_array_equal(
        run_all_tests(module, tests="split").outputs, run_all_tests(vs.load(module), tests="split").outputs
    )


def test_a_photo_may_be_a_path_an_array_or_an_image(tmp_path: Any) -> None:
    photo = noise(40, 56)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    results = [
        run_all_tests(photo=source, tests="split") for source in (photo, Image.fromarray(photo), tmp_path / "photo.png")
    ]
    for result in results[1:]:
        np.testing.assert_array_equal(result.outputs, results[0].outputs)
    assert results[2].original.name.endswith("photo.png")


# Ctrl-C and missing memory


class CtrlC:
    """A progress callback that acts as if the user pressed Ctrl-C after a number of batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self, _: vs.Progress) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("attention", [False, True])
def test_ctrl_c_keeps_the_outputs_so_far(attention: bool) -> None:
    full = run_all_tests(attention=attention, batch_size=5)
    with pytest.warns(vs.VitscopeWarning, match=rf"^interrupted: the result is based on 10 of {len(full)}") as caught:
        partial = run_all_tests(attention=attention, batch_size=5, progress=CtrlC(2))
    assert "\n" not in str(caught[0].message)
    assert (partial.provenance["interrupted"], partial.provenance["samples"]) == (True, 10)
    assert partial.evaluated == list(range(10))
    np.testing.assert_array_equal(partial.outputs[:10], full.outputs[:10])
    assert np.isnan(partial.outputs[10:]).all()
    if attention:
        np.testing.assert_array_equal(partial.rollouts[:10], full.rollouts[:10])
        assert np.isnan(partial.rollouts[10:]).all()
    assert (full.provenance["interrupted"], full.provenance["samples"]) == (False, len(full))


def test_ctrl_c_before_two_outputs_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt):
        run_all_tests(batch_size=1, progress=CtrlC(1))


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
    "python": MemoryError,
}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_batches_are_halved_until_they_fit_into_memory(error: Callable[[], BaseException]) -> None:
    base, sizes = vs.load(tiny_vit()), []

    def forward(pixels: Tensor) -> Tensor | None:
        sizes.append(len(pixels))
        if len(pixels) > 5:
            raise error()
        return base.forward(pixels)

    plenty = run_all_tests(base, batch_size=16)
    with pytest.warns(vs.VitscopeWarning) as caught:
        little = run_all_tests(dataclasses.replace(base, forward=forward), batch_size=16)
    assert [str(warning.message) for warning in caught] == [
        "not enough memory for a batch of 16: continuing with 8",
        "not enough memory for a batch of 8: continuing with 4",
    ]
    assert max(sizes[3:]) == 4
    np.testing.assert_allclose(little.outputs, plenty.outputs, atol=1e-5)


def test_outputs_that_are_not_finite_are_refused() -> None:
    base = vs.load(tiny_vit())
    model = dataclasses.replace(base, forward=lambda pixels: base.forward(pixels) * float("nan"))
    with pytest.raises(vs.WorkError, match="NaN or infinity: check the model's weights"):
        run_all_tests(model)


def test_images_are_those_of_the_stage() -> None:
    result = run_all_tests(tests="split")
    stage = Stage(noise(40, 56), list(result.objects.values()), (56, 40))
    for index, image in enumerate(result.edited_images):
        assert np.array_equal(np.asarray(result.image(index)), stage.render(image))
        assert result.image(image.name).tobytes() == result.image(index).tobytes()
