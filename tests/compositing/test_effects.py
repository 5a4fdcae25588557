"""Effects: what is owed to object, place, background and positions, for models where it is known; and intervals."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

import vitscope as vs
from tests.helpers.tiny import tiny_vit
from tests.reference import stage as slow
from tests.reference.stage import painted, placed, seeing
from vitscope.compositing.effects import DESCRIPTIONS, centre_minus_rim

BOX = (12, 16, 8, 8)
OPTIONS: dict[str, Any] = {"tests": "controls", "output": "logit", "target": 0, "feather": 0}


def controls(model: vs.VisionModel, photo: np.ndarray, objects: Any = BOX, **options: Any) -> vs.Composition:
    return vs.compose(model, photo, objects, **(OPTIONS | {"places": 5} | options))


def named(found: list[vs.Effect]) -> dict[str, float]:
    return {one.name: one.mean for one in found}


def hill(rows: int, columns: int) -> np.ndarray:
    """Weights that fall from the middle to the edges."""
    down, across = (1 - np.abs(np.arange(side) - (side - 1) / 2) / side for side in (rows, columns))
    return down[:, None] * across


def test_a_bias_through_the_embedding_is_told_from_all_else() -> None:
    """Red counts more in the middle, by an embedding; the ground is as grey as a blank one."""
    model, photo = placed(hill(10, 14)), painted(40, 56, BOX)
    found = named(vs.effects(controls(model, photo)))
    assert list(found) == list(DESCRIPTIONS)
    assert found["place"] > 0.001
    assert found["place, blank"] == pytest.approx(found["place"], abs=1e-6)
    assert found["place, blank, neutral"] == pytest.approx(0, abs=1e-6)
    assert found["place by position"] == pytest.approx(found["place"], abs=1e-6)
    assert found["place by context"] == pytest.approx(0, abs=1e-6)
    for name in ("context: blank", "context: blurred", "context: shuffled"):
        assert found[name] == pytest.approx(0, abs=1e-6)
    # Patches of 4 pixels: the object is 2 × 2 of them, at its place rows 4 and 5, columns 3 and 4.
    weights = hill(10, 14)
    assert found["object"] == pytest.approx(weights[4:6, 3:5].sum() / 140, abs=1e-6)
    assert found["position"] == pytest.approx((weights[4:6, 3:5].mean() - weights.mean()) * 4 / 140, abs=1e-6)


def test_a_bias_that_is_no_embedding_stays_without_positions() -> None:
    """The same liking for the middle, in the model's weights."""
    model, photo = seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX)
    found = named(vs.effects(controls(model, photo)))
    assert found["place"] > 0.01
    assert found["place, blank"] == pytest.approx(found["place"], abs=1e-6)
    assert found["place by context"] == pytest.approx(0, abs=1e-6)
    assert not {"place, blank, neutral", "place by position", "position"} & set(found)


def test_a_model_that_sees_the_background_alone_owes_it_to_the_context() -> None:
    """Blue stripes, a pixel wide: the mean of the squared blue is a half on stripes, a quarter on their mean."""
    stripes = np.zeros((40, 56, 3), np.uint8)
    stripes[:, ::2, 2] = 255
    model = seeing(lambda unit: slow.two((unit[:, 2] ** 2).mean((1, 2))), 40, 56)
    found = named(vs.effects(controls(model, painted(40, 56, BOX, ground=stripes), fill=stripes)))
    rest = 1 - 64 / 2240
    assert found["context: blank"] == pytest.approx(rest * (0.5 - (128 / 255) ** 2), abs=1e-4)
    assert found["context: shuffled"] == pytest.approx(0, abs=0.01)
    assert found["context: blurred"] > 0.1
    assert found["object"] == pytest.approx(rest * 0.5 - 0.5, abs=1e-4)
    for name in ("place", "place, blank", "place by context"):
        assert found[name] == pytest.approx(0, abs=1e-4)


def test_a_background_that_is_brighter_in_the_middle_is_context() -> None:
    """The model likes red on bright ground: on its own background the middle, on a blank one no place."""
    ys, xs = np.mgrid[:40, :56]
    ground = np.repeat((200 - 3 * np.hypot(ys - 19.5, xs - 27.5)).clip(0)[..., None], 3, 2).astype(np.uint8)

    def look(unit: Any) -> Any:
        red = ((unit[:, 0] - unit[:, 1]) > 0.9).float()
        light = unit[:, 2] * (1 - red)
        near = 1 - (1 - red).cumprod(-1) * (1 - red).flip(-1).cumprod(-1).flip(-1)  # rows that hold red
        return slow.two((light * near).sum((1, 2)) / near.sum((1, 2)).clamp_min(1))

    found = named(vs.effects(controls(seeing(look, 40, 56), painted(40, 56, BOX, ground=ground), fill=ground)))
    assert found["place"] > 0.02
    assert abs(found["place, blank"]) < 1e-4
    assert found["place by context"] == pytest.approx(found["place"], abs=1e-4)


def test_effects_are_differences_of_the_answers() -> None:
    objects = {"a": (4, 6, 12, 10), "b": (30, 16, 13, 16)}
    made = controls(vs.load(tiny_vit()), slow.noise(40, 56), objects, target=2, output="probability", places=(4, 3))
    found = named(vs.effects(made))
    pairs = {
        "object": ("original", "no {}"),
        "context: blank": ("{} alone", "{} on blank background"),
        "context: blurred": ("{} alone", "{} on blurred background"),
        "context: shuffled": ("{} alone", "{} on shuffled background"),
        "context: other": ("{} alone", "{} on another background"),
        "position": ("original", "positions neutral"),
    }
    for name, (more, less) in pairs.items():
        each = [made.value(more.format(one), 2) - made.value(less.format(one), 2) for one in "ab"]
        assert found[name] == pytest.approx(np.mean(each))
    place, words_of = {}, {"place": " alone", "place, blank": ", blank"}
    words_of["place, blank, neutral"] = ", blank, positions neutral"
    for name, words in words_of.items():
        each = []
        for one in "ab":
            # Of 4 × 3 places those in the second column of rows 1 and 2 are nearest the middle, the others the rim.
            value = {(r, c): made.value(f"{one} at ({r}, {c}){words}", 2) for r in range(4) for c in range(3)}
            middle = [value.pop((1, 1)), value.pop((2, 1))]
            each.append(np.mean(middle) - np.mean(list(value.values())))
        place[name] = np.mean(each)
        assert found[name] == pytest.approx(place[name], abs=1e-6)
    assert found["place by context"] == pytest.approx(place["place"] - place["place, blank"], abs=1e-6)
    assert found["place by position"] == pytest.approx(place["place, blank"] - place["place, blank, neutral"], abs=1e-6)
    of_third = named(vs.effects(made, target=3))
    assert of_third["object"] == pytest.approx(
        np.mean([made.value("original", 3) - made.value(f"no {one}", 3) for one in "ab"])
    )


def test_between_middle_and_rim_places_count_for_neither() -> None:
    made = controls(seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX), places=(7, 7))
    found = made.location_map(test="controls")
    values = found.values[0].double().numpy()
    rim = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    assert centre_minus_rim(found, made) == pytest.approx(values[3, 3] - rim.mean(), abs=1e-9)
    line = dataclasses.replace(found, values=found.values[:, 3:4], grid=vs.Grid(1, 7))
    assert centre_minus_rim(line, made) == pytest.approx(values[3, 3] - (values[3, 0] + values[3, 6]) / 2)


def test_a_place_is_of_the_middle_or_of_the_rim() -> None:
    """Of two rows all places are on the rim, and the middle ones are not counted there."""
    made = controls(seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX), places=(2, 3))
    found = made.location_map(test="controls")
    values = found.values[0].double().numpy()
    assert centre_minus_rim(found, made) == pytest.approx(values[:, 1].mean() - values[:, [0, 2]].mean())


def test_the_middle_is_that_of_what_the_model_sees() -> None:
    """In a crop the middle of the places is the middle of the crop."""
    from vitscope.images.preprocessing import Preprocessing

    base = seeing(slow.red_at_the_centre, 32, 32)
    model = dataclasses.replace(base, preprocessing=Preprocessing((32, 32), fit="crop", resize_to=(32, 32)))
    made = controls(model, painted(32, 64, (30, 12, 6, 6)), (30, 12, 6, 6))
    found = made.location_map(test="controls")
    values = found.values[0].numpy()
    assert np.unravel_index(values.argmax(), values.shape) == (2, 2)
    rim = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    assert centre_minus_rim(found, made) == pytest.approx(values[2, 2] - rim.mean(), abs=1e-6)


# Several images


@pytest.fixture(scope="module", name="several")
def of_four_images() -> list[vs.Composition]:
    model = vs.load(tiny_vit())
    return [
        vs.compose(model, slow.noise(40, 56, seed), (4 + seed, 6, 14, 12), tests="controls", places=3, target=1)
        for seed in range(4)
    ]


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_intervals_are_students(several: list[vs.Composition], confidence: float) -> None:
    alone = [named(vs.effects(one)) for one in several]
    for one in vs.effects(several, confidence=confidence):
        assert one.values == pytest.approx([single[one.name] for single in alone])
        expected = ttest_1samp(one.values, 0).confidence_interval(confidence)
        assert one.interval == pytest.approx((expected.low, expected.high))
        assert one.mean == pytest.approx(one.values.mean())
        assert one.standardized == pytest.approx(one.values.mean() / one.values.std(ddof=1))
        assert one.about == DESCRIPTIONS[one.name]


def test_students_interval_by_the_density(several: list[vs.Composition]) -> None:
    one = vs.effects(several)[0]
    assert one.interval == pytest.approx(slow.student(one.values.tolist(), 0.95), rel=1e-3)


def test_one_image_has_no_interval(several: list[vs.Composition]) -> None:
    for given in (several[0], several[:1]):
        for one in vs.effects(given):
            assert (one.interval, one.standardized, len(one.values)) == (None, None, 1)


def test_where_all_are_the_same_nothing_is_standardized(several: list[vs.Composition]) -> None:
    for one in vs.effects([several[0]] * 3):
        assert one.standardized is None
        assert one.interval == pytest.approx((one.mean, one.mean))


def test_json_has_the_effects(several: list[vs.Composition]) -> None:
    found = vs.effects(several)
    about = json.loads(json.dumps([one.as_json() for one in found], allow_nan=False))
    assert [one["name"] for one in about] == list(DESCRIPTIONS)
    for one, entry in zip(found, about, strict=True):
        assert entry["values"] == one.values.tolist()
        assert (entry["mean"], tuple(entry["interval"]), entry["about"]) == (one.mean, one.interval, one.about)
        assert entry["standardized"] == one.standardized
    assert vs.effects(several[0])[0].as_json()["interval"] is None


def test_an_effect_that_some_images_lack_is_left_out(several: list[vs.Composition]) -> None:
    """Rotary positions, say, or images asked about with another version."""
    kept = [at for at, one in enumerate(several[1].edited_images) if not one.neutral]
    without = dataclasses.replace(
        several[1], edited_images=[several[1].edited_images[at] for at in kept], outputs=several[1].outputs[kept]
    )
    names = [one.name for one in vs.effects([several[0], without])]
    assert names == [name for name in DESCRIPTIONS if "neutral" not in name and "position" not in name]


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_effects_is_refused(several: list[vs.Composition]) -> None:
    other = dataclasses.replace(several[1], provenance={**several[1].provenance, "model": "another"})
    parameters = {**several[1].provenance["parameters"], "output": "logit"}
    logit = dataclasses.replace(several[1], provenance={**several[1].provenance, "parameters": parameters})
    sizes = vs.compose(vs.load(tiny_vit()), slow.noise(40, 56), BOX, tests="size", scales=[0.5])
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "effects takes results of vitscope.compose"),
        (["a"], {}, "effects takes results of vitscope.compose"),
        (
            [several[0], other],
            {},
            "cannot combine results of different models \\(.*, another\\): pass those of one model",
        ),
        (
            [several[0], logit],
            {},
            "cannot combine results of different outputs \\(probability, logit\\): .* one output",
        ),
        (sizes, {}, r"the result has no controls: pass tests=\('controls',\) to compose"),
        ([several[0], sizes], {}, "the result has no controls"),
        (several, {"confidence": 1.0}, "confidence is 1.0"),
        (several, {"confidence": 0.0}, "confidence is 0.0"),
        (several, {"confidence": 95}, "confidence is 95, a share between 0 and 1"),
        (several, {"target": "thing 33"}, "did you mean thing 3"),
    ]
    for given, options, message in wrong:
        with pytest.raises(vs.CallError, match=message) as caught:
            vs.effects(given, **options)
        assert "\n" not in str(caught.value)


def test_a_grid_without_a_middle_says_nothing_about_places() -> None:
    """Of 2 × 2 places all are as near to the middle: no effect of place is better than one of nothing."""
    made = controls(seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX), places=2)
    assert not [name for name in named(vs.effects(made)) if name.startswith("place")]
