"""compose() as it asks: the same every time, nothing left behind, every family, Ctrl-C and no memory."""

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


# The same every time

OBJECTS = {"a": (4, 6, 16, 10), "b": (30, 16, 15, 18)}


def whole(model: Any = None, photo: Any = None, **options: Any) -> vs.Composition:
    model = vs.load(tiny_vit()) if model is None else model
    photo = noise(40, 56) if photo is None else photo
    return vs.compose(model, photo, OBJECTS, **({"tests": ALL_TESTS, "places": 2} | options))


def test_the_same_seed_gives_the_same_images_and_answers() -> None:
    first, again, other = whole(seed=1), whole(seed=1), whole(seed=2)
    assert np.array_equal(first.outputs, again.outputs)
    differing = []
    for at, composite in enumerate(first.composites):
        assert np.array_equal(first.stage.render(composite), again.stage.render(composite))
        if not np.array_equal(first.stage.render(composite), other.stage.render(composite)):
            differing.append(composite.name)
            assert not np.array_equal(first.outputs[at], other.outputs[at])
    assert differing == ["a on shuffled background", "b on shuffled background"]
    noisy = [whole(tests="split", fill="noise", seed=seed).image("a left out").tobytes() for seed in (1, 1, 2)]
    assert noisy[0] == noisy[1] != noisy[2]


@pytest.mark.parametrize("attention", [False, True])
def test_batches_of_any_size_give_the_same_answers(attention: bool) -> None:
    results = [whole(batch_size=size, attention=attention) for size in (1, 7, 64)]
    for one in results[1:]:
        np.testing.assert_allclose(one.outputs, results[0].outputs, atol=1e-5)
        if attention:
            np.testing.assert_allclose(one.rollouts, results[0].rollouts, atol=1e-5)


def test_attention_changes_no_answer() -> None:
    np.testing.assert_allclose(whole(attention=True).outputs, whole().outputs, atol=1e-5)


def test_progress_is_told_of_every_batch() -> None:
    told: list[tuple[int, int]] = []
    result = whole(batch_size=10, progress=lambda step: told.append((step.completed, step.total)))
    assert told[-1] == (len(result), len(result))
    assert [total for _, total in told] == [len(result)] * len(told)
    assert all(one[0] < other[0] <= one[0] + 10 for one, other in pairwise(told))


# Nothing left behind


# The type checks draw random numbers of their own.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["timm-vit", "transformers-beit", "transformers-dinov2"])
def test_composing_leaves_no_trace(name: str) -> None:
    model = family(name).model()
    mixed(model.module)
    before = state(model.module)
    for given in (model, model.module):
        whole(given, attention=True)
    assert_same(state(model.module), before)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("error", [TroubleError, KeyboardInterrupt])
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("after", [1, 2, 26])
def test_composing_that_fails_leaves_no_trace(after: int, attention: bool, error: type[BaseException]) -> None:
    """The last runs are those with positions made equal."""
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
            whole(model, attention=attention, batch_size=2)
    else:
        with pytest.raises(error):
            whole(model, attention=attention, batch_size=2)
    assert len(runs) >= after
    assert_same(state(model.module), before)


# The same contract on every family


def contract(model: vs.VisionModel, image: Any, objects: Any, *, attention: bool = True) -> vs.Composition:
    """Every composite's answer is the model's own to that image alone, and so is its rollout."""
    target = "similarity" if model.embed is not None else 0
    options: dict[str, Any] = {"target": target, "output": "logit", "places": 2, "scales": [0.6], "batch_size": 16}
    result = vs.compose(model, image, objects, tests=ALL_TESTS, attention=attention, **options)
    known, (subject,) = positions(model), subjects(model, image)
    features = None if model.embed is None else model.embed
    original, seen = None, set()
    for at, one in enumerate(result.composites):
        kind = (one.test, one.background, one.neutral, one.place is None, one.subject)
        if kind in seen:
            continue
        seen.add(kind)
        values = result.stage.render(one)
        if subject.scaling is None:
            pixels, _ = model.prepare(values)
        else:
            factor, offset = subject.scaling
            made = (torch.from_numpy(values) * factor + offset).permute(2, 0, 1)[None]
            pixels = torch.where(torch.from_numpy(values != subject.values).permute(2, 0, 1), made, subject.pixels)
        with neutral_positions(known) if one.neutral else warnings.catch_warnings(), torch.no_grad(), model.running():
            answer = model.answer(pixels) if features is None else features(pixels)
            if attention:
                rolled = vs.rollout(run_and_capture(model, pixels).trace).values[0].numpy()
                np.testing.assert_allclose(result.rollouts[at], rolled, atol=1e-5, err_msg=one.name)
        original = answer if original is None else original
        if features is not None:
            answer = torch.cosine_similarity(answer, original)[:, None]
        np.testing.assert_allclose(result.outputs[at], answer[0], atol=2e-5, err_msg=one.name)
    assert known.can_be_neutral == any(one.neutral for one in result.composites)
    first = result.location_map()
    assert first.target == ("similarity" if model.embed is not None else model.label(0))
    assert float(first.values.max() - first.values.min()) > 0
    return result


@every_family
def test_every_family_answers_as_if_asked_one_by_one(family: Family) -> None:
    result = contract(family.model(), noise(44, 60), {"a": (4, 6, 16, 10), "b": (30, 16, 15, 18)})
    if result.output == "similarity":
        assert result.outputs[0, 0] == pytest.approx(1, abs=1e-5)
        assert result.outputs.shape[1] == 1


@every_swin
def test_every_window_family_answers_as_if_asked_one_by_one(family: SwinFamily) -> None:
    size = family.sizes["fitting" if "fitting" in family.sizes else "small"]
    width, height = size[1] // 3, size[0] // 3
    objects = {"a": (1, 1, width, height), "b": (size[1] // 2, size[0] // 2, width, height)}
    contract(family.model(size), swin_families.pixels(size, 1), objects)


def test_maxvit_is_asked_but_not_rolled_out() -> None:
    model, pixels = swin_families.MAXVIT.model((64, 64)), swin_families.pixels((64, 64), 1)
    contract(model, pixels, (10, 12, 20, 18), attention=False)
    with pytest.raises(vs.UnsupportedModelError):
        vs.compose(model, pixels, (10, 12, 20, 18), tests=(), attention=True)


def test_a_live_module_is_taken_as_it_is() -> None:
    module = tiny_vit()
    np.testing.assert_array_equal(whole(module, tests="split").outputs, whole(vs.load(module), tests="split").outputs)


def test_images_come_as_path_array_or_image(tmp_path: Any) -> None:
    photo = noise(40, 56)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    results = [whole(photo=given, tests="split") for given in (photo, Image.fromarray(photo), tmp_path / "photo.png")]
    for one in results[1:]:
        np.testing.assert_array_equal(one.outputs, results[0].outputs)
    assert results[2].original.name.endswith("photo.png")


# Interrupted, and without memory


class CtrlC:
    """A progress callback in whose call after so many batches the user presses Ctrl-C."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self, _: vs.Progress) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("attention", [False, True])
def test_ctrl_c_leaves_what_was_answered(attention: bool) -> None:
    full = whole(attention=attention, batch_size=5)
    with pytest.warns(vs.VitscopeWarning, match=rf"^interrupted: the result is based on 10 of {len(full)}") as caught:
        part = whole(attention=attention, batch_size=5, progress=CtrlC(2))
    assert "\n" not in str(caught[0].message)
    assert (part.provenance["interrupted"], part.provenance["samples"]) == (True, 10)
    assert part.asked == list(range(10))
    np.testing.assert_array_equal(part.outputs[:10], full.outputs[:10])
    assert np.isnan(part.outputs[10:]).all()
    if attention:
        np.testing.assert_array_equal(part.rollouts[:10], full.rollouts[:10])
        assert np.isnan(part.rollouts[10:]).all()
    assert (full.provenance["interrupted"], full.provenance["samples"]) == (False, len(full))


def test_ctrl_c_before_two_answers_is_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        whole(batch_size=1, progress=CtrlC(1))


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "host": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
    "python": MemoryError,
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_batches_are_halved_until_there_is_memory(error: Callable[[], BaseException]) -> None:
    base, sizes = vs.load(tiny_vit()), []

    def forward(pixels: Tensor) -> Tensor | None:
        sizes.append(len(pixels))
        if len(pixels) > 5:
            raise error()
        return base.forward(pixels)

    plenty = whole(base, batch_size=16)
    with pytest.warns(vs.VitscopeWarning) as caught:
        little = whole(dataclasses.replace(base, forward=forward), batch_size=16)
    assert [str(warning.message) for warning in caught] == [
        "not enough memory for a batch of 16: continuing with 8",
        "not enough memory for a batch of 8: continuing with 4",
    ]
    assert max(sizes[3:]) == 4
    np.testing.assert_allclose(little.outputs, plenty.outputs, atol=1e-5)


def test_a_model_that_answers_with_no_number_is_refused() -> None:
    base = vs.load(tiny_vit())
    model = dataclasses.replace(base, forward=lambda pixels: base.forward(pixels) * float("nan"))
    with pytest.raises(vs.WorkError, match="NaN or infinity: check the model's weights"):
        whole(model)


def test_images_can_be_looked_at() -> None:
    result = whole(tests="split")
    made = Stage(noise(40, 56), list(result.outlines.values()), (56, 40))
    for at, composite in enumerate(result.composites):
        assert np.array_equal(np.asarray(result.image(at)), made.render(composite))
        assert result.image(composite.name).tobytes() == result.image(at).tobytes()
