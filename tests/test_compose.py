"""compose(): laws that hold for every model, models whose answers are known, and the same contract on every family."""

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
from tests import families, swin_families
from tests.families import Family, every_family
from tests.reference import stage as slow
from tests.reference.stage import boxed, noise, painted, seeing
from tests.swin_families import SwinFamily, every_swin
from tests.test_leaks import TroubleError, assert_same, mixed, state
from tests.tiny import tiny_vit
from vitscope.composites.stage import Stage
from vitscope.perturb.rendering import subjects
from vitscope.picture import Preprocessing
from vitscope.positions import neutral_positions, positions
from vitscope.run import run

ALL_TESTS = ("size", "location", "split", "controls")


def family(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


def asked(model: vs.VisionModel, pixels: Tensor, *, logit: bool = False) -> np.ndarray:
    with torch.no_grad(), model.running():
        logits = model.answer(pixels)
    assert logits is not None
    return (logits if logit else logits.softmax(-1)).double().numpy()


# At home it is the original

RECIPES = {
    "squash": Preprocessing((32, 48)),
    "crop": Preprocessing((32, 48), fit="crop", resize_to=(40, 60)),
    "as it is": Preprocessing((50, 70)),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_at_home_the_input_is_that_of_the_photo_bit_for_bit(recipe: Preprocessing) -> None:
    given: list[Tensor] = []
    base = seeing(slow.share_of_red, *recipe.size)

    def forward(pixels: Tensor) -> Tensor | None:
        given.extend(pixels)
        return base.forward(pixels)

    model = dataclasses.replace(base, preprocessing=recipe, forward=forward)
    photo = noise(50, 70)
    home = vs.Composite("home", (vs.Placement("b", (31.0, 25.5)), vs.Placement("a")))
    objects = {"a": (3, 4, 20, 12), "b": (26, 20, 10, 11)}
    result = vs.compose(model, photo, objects, tests="size", scales=[1.0], composites=[home])
    expected = model.prepare(photo)[0][0]
    assert len(given) == 5  # and the answer to the photo before
    assert all(torch.equal(one, expected) for one in given)
    assert all(np.array_equal(np.asarray(result.image(at)), photo) for at in range(4))


def test_of_a_tensor_what_is_as_it_was_stays_bit_for_bit() -> None:
    given: list[Tensor] = []
    base = vs.load(slow.Seeing(slow.share_of_red))
    assert base.preprocessing is None
    for model in (base, family("timm-vit").model()):

        def forward(pixels: Tensor, model: vs.VisionModel = model) -> Tensor | None:
            given.extend(pixels)
            return model.forward(pixels)

        given.clear()
        pixels = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 3
        moved = vs.Composite("moved", (vs.Placement("object", (36.0, 20.0)),))
        watched = dataclasses.replace(model, forward=forward)
        vs.compose(watched, pixels, (4, 5, 12, 9), tests=(), composites=[moved], feather=0)
        assert torch.equal(given[1], pixels[0])
        touched = torch.from_numpy(slow.hole(boxed(32, 48, (4, 5, 12, 9)), 1) | boxed(32, 48, (30, 16, 12, 9)))
        assert torch.equal(given[2][:, ~touched], pixels[0, :, ~touched])
        torch.testing.assert_close(given[2][:, 16:25, 30:42], pixels[0, :, 5:14, 4:16], atol=1e-4, rtol=1e-5)
        assert not torch.equal(given[2][:, 5:14, 4:16], pixels[0, :, 5:14, 4:16])


# Models whose answers are known

LOGIT: dict[str, Any] = {"output": "logit", "target": 0, "feather": 0}


def test_where_place_does_not_matter_the_map_is_flat() -> None:
    photo = painted(40, 56, (6, 9, 12, 10))
    model = seeing(slow.share_of_red, 40, 56)
    result = vs.compose(model, photo, (6, 9, 12, 10), tests=("location", "split"), places=(5, 6), **LOGIT)
    found = result.location_map().values
    assert found.shape == (1, 5, 6)
    np.testing.assert_allclose(found, 120 / 2240, atol=1e-6)
    soft = vs.compose(model, photo, (6, 9, 12, 10), tests="location", places=4, **(LOGIT | {"feather": 3.0}))
    values = soft.location_map().values
    assert float(values.max() - values.min()) < 1e-4
    assert result.value("object mirrored") == pytest.approx(120 / 2240, abs=1e-6)
    assert result.value("object left out") == pytest.approx(0, abs=1e-6)


def test_a_model_that_looks_at_the_centre_gives_a_peak_there() -> None:
    photo = painted(40, 56, (6, 9, 6, 4))
    model = seeing(slow.red_at_the_centre, 40, 56)
    result = vs.compose(model, photo, (6, 9, 6, 4), tests="location", places=(5, 7), **LOGIT)
    values = result.location_map().values[0].numpy()
    assert np.unravel_index(values.argmax(), values.shape) == (2, 3)
    assert values == pytest.approx(values[::-1, ::-1], abs=1e-3)
    assert (np.diff(values[2, :4]) > 0).all()
    assert (np.diff(values[:3, 3]) > 0).all()
    # Each place by itself: the kernel's weight under the box, which is put where it says.
    for row in range(5):
        for column in range(7):
            left, top = column * (56 - 6) / 6, row * (40 - 4) / 4
            at = boxed(40, 56, (round(left), round(top), 6, 4))
            picture = np.where(at[..., None], np.uint8(slow.RED), np.uint8(slow.GROUND))
            alone = asked(model, model.prepare(picture)[0], logit=True)
            assert values[row, column] == pytest.approx(alone[0, 0], abs=1e-4)


def test_the_size_curve_of_a_share_is_the_area() -> None:
    photo = painted(120, 160, (60, 44, 40, 32))
    model = seeing(slow.share_of_red, 120, 160)
    result = vs.compose(model, photo, (60, 44, 40, 32), tests="size", **LOGIT)
    curve = result.size_curve()
    assert curve.scales.tolist() == [0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0]
    assert curve.areas == pytest.approx(40 * 32 / 19200 * curve.scales**2)
    assert curve.values == pytest.approx(curve.areas, rel=0.06)
    assert curve.values[4] == pytest.approx(curve.areas[4], abs=1e-6)


def test_scales_that_do_not_fit_are_left_out_by_default_and_refused_when_asked_for() -> None:
    photo = painted(40, 56, (2, 2, 30, 20))
    model = seeing(slow.share_of_red, 40, 56)
    result = vs.compose(model, photo, (2, 2, 30, 20), tests="size")
    assert result.size_curve().scales.tolist() == [0.25, 0.35, 0.5, 0.71, 1.0]
    small = vs.compose(model, painted(40, 56, (20, 14, 8, 8)), (20, 14, 8, 8), tests="size")
    assert small.size_curve().scales.tolist() == [0.5, 0.71, 1.0, 1.41, 2.0]
    with pytest.raises(vs.CallError, match=r"object × 2: object at scale 2 is 60×40 pixels and does not fit"):
        vs.compose(model, photo, (2, 2, 30, 20), tests="size", scales=[0.5, 2])


def test_places_lie_in_what_the_model_sees() -> None:
    recipe = Preprocessing((32, 32), fit="crop", resize_to=(32, 32))
    model = dataclasses.replace(seeing(slow.share_of_red, 32, 32), preprocessing=recipe)
    photo = painted(32, 64, (30, 15, 8, 4))
    result = vs.compose(model, photo, (30, 15, 8, 4), tests="location", places=(3, 5), **LOGIT)
    centres = [composite.show[-1].centre for composite in result.composites[1:]]
    xs, ys = sorted({x for x, _ in centres}), sorted({y for _, y in centres})
    assert xs == pytest.approx([20, 26, 32, 38, 44])
    assert ys == pytest.approx([2, 16, 30])
    assert [composite.place for composite in result.composites[1:]] == [(i // 5, i % 5) for i in range(15)]
    assert result.seen("object") == 1
    cut = vs.compose(model, photo, (10, 15, 8, 4), tests=(), **LOGIT)
    assert cut.seen("object") == pytest.approx(2 / 8)  # of columns 10 to 17 the model sees 16 and 17
    assert cut.as_json()["objects"][0]["seen"] == cut.seen("object")
    found = result.location_map()
    np.testing.assert_allclose(found.values, 8 * 4 / 32 / 32, atol=1e-6)
    assert found.pictures[0].box == pytest.approx((17, -5, 47, 37))


def test_what_is_wider_than_the_models_view_is_exchanged_smaller() -> None:
    recipe = Preprocessing((32, 32), fit="crop", resize_to=(32, 32))
    model = dataclasses.replace(seeing(slow.share_of_red, 32, 32), preprocessing=recipe)
    objects = {"a": (2, 3, 48, 8), "b": (20, 18, 10, 10)}
    result = vs.compose(model, noise(32, 64), objects, tests="split", **LOGIT)
    (one,) = [one for one in result.composites if "exchanged" in one.name]
    assert one.name == "a and b exchanged × 0.67"
    placed = {placement.name: placement for placement in one.show}
    assert placed["a"].scale == placed["b"].scale == pytest.approx(32 / 48)
    assert placed["a"].centre == pytest.approx((32, 23))  # as wide as the view, from 16 to 48
    assert placed["b"].centre == pytest.approx((26, 7))


def test_where_there_is_little_room_there_are_few_places() -> None:
    photo = painted(40, 56, (1, 10, 53, 8))
    options = {"tests": "location", "places": (3, 9)} | LOGIT
    result = vs.compose(seeing(slow.share_of_red, 40, 56), photo, (1, 10, 53, 8), **options)
    assert result.location_map().values.shape == (1, 3, 4)
    assert result.location_map().pictures[0].box == pytest.approx((26, -4, 30, 44))
    single = vs.compose(seeing(slow.share_of_red, 40, 56), painted(40, 56, (0, 9, 56, 8)), (0, 9, 56, 8), **options)
    assert single.location_map().values.shape == (1, 3, 1)


def test_a_larger_location_scale_moves_a_larger_object() -> None:
    photo = painted(80, 112, (20, 20, 20, 20))
    model = seeing(slow.share_of_red, 80, 112)
    result = vs.compose(model, photo, (20, 20, 20, 20), tests="location", places=3, location_scale=2, **LOGIT)
    np.testing.assert_allclose(result.location_map().values, 1600 / 8960, rtol=0.03)
    assert {one.show[-1].scale for one in result.composites[1:]} == {2.0}


def test_split_sets_apart_exchanges_mirrors_and_leaves_out() -> None:
    photo = painted(40, 60, (4, 10, 10, 8), (40, 14, 12, 16))
    objects = {"a": (4, 10, 10, 8), "b": (40, 14, 12, 16)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), photo, objects, tests="split", **LOGIT)
    assert result.names == [
        "original",
        "a and b apart",
        "a and b exchanged",
        "a mirrored",
        "b mirrored",
        "a left out",
        "b left out",
    ]
    apart, exchanged = result.composites[1:3]
    assert {one.name: (one.centre, one.scale) for one in apart.show} == {
        "a": ((5.0, 14.0), 1.0),
        "b": ((54.0, 22.0), 1.0),
    }
    assert {one.name: one.centre for one in exchanged.show} == {"a": (46.0, 22.0), "b": (9.0, 14.0)}
    assert [one.mirrored for one in result.composites[3].show] == [True, False]
    assert [one.name for one in result.composites[5].show] == ["b"]
    assert result.value("a left out") == pytest.approx(192 / 2400, abs=1e-6)
    assert result.value("a and b exchanged") == pytest.approx((80 + 192) / 2400, abs=1e-6)


def test_objects_too_large_to_stand_apart_are_made_smaller() -> None:
    photo = painted(40, 60, (2, 3, 40, 15), (2, 20, 44, 18))
    objects = {"a": (2, 3, 40, 15), "b": (2, 20, 44, 18)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), photo, objects, tests="split", **LOGIT)
    apart = result.composites[1]
    assert apart.name == "a and b apart"  # above each other there is room
    wide = {"a": (0, 8, 25, 24), "b": (26, 10, 33, 22)}
    apart = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), wide, tests="split", **LOGIT).composites[1]
    scale = 0.95 * 60 / 58
    assert apart.name == f"a and b apart × {scale:.2f}"
    assert {one.name: one.centre for one in apart.show} == {
        "a": pytest.approx((25 * scale / 2, 20.0)),
        "b": pytest.approx((60 - 33 * scale / 2, 21.0)),
    }


def test_each_goes_to_the_edge_that_it_is_nearer_to() -> None:
    objects = {"right": (40, 14, 12, 16), "left": (4, 10, 10, 8)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="split")
    assert {one.name: one.centre for one in result.composites[1].show} == {"left": (5.0, 14.0), "right": (54.0, 22.0)}


def test_what_is_set_apart_or_exchanged_stays_in_what_the_model_sees() -> None:
    """In a crop of the middle, of an object that stood beyond it."""
    recipe = Preprocessing((40, 40), fit="crop", resize_to=(40, 40))
    model = dataclasses.replace(seeing(slow.share_of_red, 40, 40), preprocessing=recipe)
    objects = {"a": (2, 3, 10, 8), "b": (30, 80, 8, 14)}
    apart, exchanged = vs.compose(model, noise(100, 40), objects, tests="split").composites[1:3]
    assert {one.name: one.centre for one in apart.show} == {"a": (5.0, 34.0), "b": (36.0, 63.0)}
    assert {one.name: one.centre for one in exchanged.show} == {"a": (34.0, 66.0), "b": (7.0, 37.0)}
    wide = {"a": (80, 2, 14, 8), "b": (50, 20, 8, 14)}
    beside = vs.compose(model, noise(40, 100), wide, tests="split").composites[1]
    assert all(30 <= one.centre[0] <= 70 for one in beside.show)


def test_three_objects_are_split_two_by_two_and_the_third_stays() -> None:
    objects = {"a": (2, 2, 8, 8), "b": (20, 12, 8, 8), "c": (40, 24, 8, 8)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="split")
    pairs = [name for name in result.names if " and " in name]
    assert pairs == [f"{a} and {b} {what}" for a, b in ("ab", "ac", "bc") for what in ("apart", "exchanged")]
    assert all({placed.name for placed in one.show} == set("abc") for one in result.composites[1:7])


def test_controls_are_alone_on_every_background_and_at_every_place() -> None:
    objects = {"a": (4, 10, 10, 8), "b": (40, 14, 12, 16)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="controls", places=2)
    for name in "ab":
        alone = [result.composites[at] for at in result.select("controls", name, placed=False)]
        assert [(one.name, one.background) for one in alone] == [
            (f"{name} alone", "own"),
            (f"{name} on blank background", "blank"),
            (f"{name} on blurred background", "blurred"),
            (f"{name} on shuffled background", "shuffled"),
            (f"{name} on another background", "other"),
            (f"no {name}", "own"),
        ]
        assert [[one.name for one in composite.show] for composite in alone] == [[name]] * 5 + [
            ["b" if name == "a" else "a"]
        ]
        for setting in ("own", "blank"):
            placed = [result.composites[at] for at in result.select("controls", name, background=setting, placed=True)]
            assert [one.place for one in placed] == [(0, 0), (0, 1), (1, 0), (1, 1)]
            assert all([shown.name for shown in one.show] == [name] for one in placed)
    assert not any(one.neutral for one in result.composites)


def test_pictures_of_ones_own_come_after_the_original() -> None:
    free = vs.Composite("both small", (vs.Placement("b", scale=0.5), vs.Placement("a", (30.0, 20.0), 0.5)), "blank")
    objects = {"a": (4, 10, 10, 8), "b": (40, 14, 12, 16)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="split", composites=[free])
    assert result.names[:3] == ["original", "both small", "a and b apart"]
    assert result.composites[1] is free
    only = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests=(), composites=[free])
    assert only.names == ["original", "both small"]


def test_a_large_photo_is_composed_on_a_smaller_copy() -> None:
    photo = painted(1000, 1400, (600, 400, 200, 160))
    result = vs.compose(seeing(slow.share_of_red, 40, 56), photo, (600, 400, 200, 160), tests="size", **LOGIT)
    height, width = result.provenance["parameters"]["composed_at"]
    assert height * width == pytest.approx(400_000, rel=0.01)
    assert result.image(0).size == (width, height)
    curve = result.size_curve()
    assert curve.values == pytest.approx(curve.areas, rel=0.15)
    assert result.outlines["object"].box == (600, 400, 200, 160)
    whole = vs.compose(vs.load(tiny_vit()), photo, (600, 400, 200, 160), tests="location", places=2)
    assert whole.shown(0).photo.size == (width, height)
    assert whole.shown(0).box == pytest.approx((0, 0, width, height))


def test_a_picture_smaller_than_the_input_works() -> None:
    photo = painted(20, 24, (8, 6, 6, 6))
    result = vs.compose(seeing(slow.share_of_red, 64, 96), photo, (8, 6, 6, 6), tests=ALL_TESTS, places=2, **LOGIT)
    assert np.isfinite(result.outputs).all()
    assert result.location_map().values == pytest.approx(np.full((1, 2, 2), 36 / 480), rel=0.2)


# The same every time

OBJECTS = {"a": (4, 6, 16, 10), "b": (30, 16, 15, 18)}


def whole(model: Any = None, photo: Any = None, **options: Any) -> vs.Composition:
    model = vs.load(tiny_vit()) if model is None else model
    photo = noise(40, 56) if photo is None else photo
    return vs.compose(model, photo, OBJECTS, **({"tests": ALL_TESTS, "places": 2} | options))


def test_the_same_seed_gives_the_same_pictures_and_answers() -> None:
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
    result = whole(batch_size=10, progress=lambda *counts: told.append(counts))
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
    """Every composite's answer is the model's own to that picture alone, and so is its rollout."""
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
                rolled = vs.rollout(run(model, pixels).trace).values[0].numpy()
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
    with pytest.raises(vs.CallError):
        vs.compose(model, pixels, (10, 12, 20, 18), tests=(), attention=True)


def test_a_live_module_is_taken_as_it_is() -> None:
    module = tiny_vit()
    np.testing.assert_array_equal(whole(module, tests="split").outputs, whole(vs.load(module), tests="split").outputs)


def test_pictures_come_as_path_array_or_image(tmp_path: Any) -> None:
    photo = noise(40, 56)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    results = [whole(photo=given, tests="split") for given in (photo, Image.fromarray(photo), tmp_path / "photo.png")]
    for one in results[1:]:
        np.testing.assert_array_equal(one.outputs, results[0].outputs)
    assert results[2].picture.name.endswith("photo.png")


# Interrupted, and without memory


class CtrlC:
    """A progress callback in whose call after so many batches the user presses Ctrl-C."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    def __call__(self, *_: int) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("attention", [False, True])
def test_ctrl_c_leaves_what_was_answered(attention: bool) -> None:
    full = whole(attention=attention, batch_size=5)
    with pytest.warns(vs.VitscopeWarning, match=rf"^interrupted: the result stands on 10 of {len(full)}") as caught:
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
        "no memory for a batch of 16: going on with 8",
        "no memory for a batch of 8: going on with 4",
    ]
    assert max(sizes[3:]) == 4
    np.testing.assert_allclose(little.outputs, plenty.outputs, atol=1e-5)


def test_a_model_that_answers_with_no_number_is_refused() -> None:
    base = vs.load(tiny_vit())
    model = dataclasses.replace(base, forward=lambda pixels: base.forward(pixels) * float("nan"))
    with pytest.raises(vs.WorkError, match="NaN or infinity: check the model's weights"):
        whole(model)


def test_pictures_can_be_looked_at() -> None:
    result = whole(tests="split")
    made = Stage(noise(40, 56), list(result.outlines.values()), (56, 40))
    for at, composite in enumerate(result.composites):
        assert np.array_equal(np.asarray(result.image(at)), made.render(composite))
        assert result.image(composite.name).tobytes() == result.image(at).tobytes()
