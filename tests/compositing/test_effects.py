"""Effects of object, place, background and positions, for models whose effects are known; and intervals."""

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


def named(all_effects: list[vs.Effect]) -> dict[str, float]:
    return {effect.name: effect.mean for effect in all_effects}


def hill(rows: int, columns: int) -> np.ndarray:
    """Weights that fall from the middle to the edges."""
    down, across = (1 - np.abs(np.arange(side) - (side - 1) / 2) / side for side in (rows, columns))
    return down[:, None] * across


def test_a_bias_of_the_position_embedding_is_attributed_to_it() -> None:
    """An embedding gives red more weight in the middle; the background has a single colour."""
    model, photo = placed(hill(10, 14)), painted(40, 56, BOX)
    means = named(vs.effects(controls(model, photo)))
    assert list(means) == list(DESCRIPTIONS)
    assert means["place"] > 0.001
    assert means["place, blank"] == pytest.approx(means["place"], abs=1e-6)
    assert means["place, blank, neutral"] == pytest.approx(0, abs=1e-6)
    assert means["place by position"] == pytest.approx(means["place"], abs=1e-6)
    assert means["place by context"] == pytest.approx(0, abs=1e-6)
    for name in ("context: blank", "context: blurred", "context: shuffled"):
        assert means[name] == pytest.approx(0, abs=1e-6)
    # The object is 2 × 2 patches of 4 pixels, in rows 4 and 5, columns 3 and 4.
    weights = hill(10, 14)
    assert means["object"] == pytest.approx(weights[4:6, 3:5].sum() / 140, abs=1e-6)
    assert means["position"] == pytest.approx((weights[4:6, 3:5].mean() - weights.mean()) * 4 / 140, abs=1e-6)


def test_a_bias_of_other_weights_is_not_attributed_to_positions() -> None:
    """The same preference for the middle, not in an embedding."""
    model, photo = seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX)
    means = named(vs.effects(controls(model, photo)))
    assert means["place"] > 0.01
    assert means["place, blank"] == pytest.approx(means["place"], abs=1e-6)
    assert means["place by context"] == pytest.approx(0, abs=1e-6)
    assert not {"place, blank, neutral", "place by position", "position"} & set(means)


def test_the_outputs_of_a_model_that_sees_only_the_background_are_context() -> None:
    """Blue stripes, a pixel wide: the mean of the squared blue is a half on stripes, a quarter on their mean."""
    stripes = np.zeros((40, 56, 3), np.uint8)
    stripes[:, ::2, 2] = 255
    model = seeing(lambda unit: slow.two((unit[:, 2] ** 2).mean((1, 2))), 40, 56)
    means = named(vs.effects(controls(model, painted(40, 56, BOX, ground=stripes), fill=stripes)))
    rest = 1 - 64 / 2240
    assert means["context: blank"] == pytest.approx(rest * (0.5 - (128 / 255) ** 2), abs=1e-4)
    assert means["context: shuffled"] == pytest.approx(0, abs=0.01)
    assert means["context: blurred"] > 0.1
    assert means["object"] == pytest.approx(rest * 0.5 - 0.5, abs=1e-4)
    for name in ("place", "place, blank", "place by context"):
        assert means[name] == pytest.approx(0, abs=1e-4)


def test_a_background_that_is_brighter_in_the_middle_is_context() -> None:
    """The model prefers red on bright ground: over its own background the middle, over a blank one no place."""
    ys, xs = np.mgrid[:40, :56]
    ground = np.repeat((200 - 3 * np.hypot(ys - 19.5, xs - 27.5)).clip(0)[..., None], 3, 2).astype(np.uint8)

    def look(unit: Any) -> Any:
        red = ((unit[:, 0] - unit[:, 1]) > 0.9).float()
        light = unit[:, 2] * (1 - red)
        near = 1 - (1 - red).cumprod(-1) * (1 - red).flip(-1).cumprod(-1).flip(-1)  # rows that hold red
        return slow.two((light * near).sum((1, 2)) / near.sum((1, 2)).clamp_min(1))

    means = named(vs.effects(controls(seeing(look, 40, 56), painted(40, 56, BOX, ground=ground), fill=ground)))
    assert means["place"] > 0.02
    assert abs(means["place, blank"]) < 1e-4
    assert means["place by context"] == pytest.approx(means["place"], abs=1e-4)


def test_effects_are_differences_of_outputs() -> None:
    objects = {"a": (4, 6, 12, 10), "b": (30, 16, 13, 16)}
    result = controls(vs.load(tiny_vit()), slow.noise(40, 56), objects, target=2, output="probability", places=(4, 3))
    means = named(vs.effects(result))
    pairs = {
        "object": ("original", "no {}"),
        "context: blank": ("{} alone", "{} on blank background"),
        "context: blurred": ("{} alone", "{} on blurred background"),
        "context: shuffled": ("{} alone", "{} on shuffled background"),
        "context: other": ("{} alone", "{} on another background"),
        "position": ("original", "positions neutral"),
    }
    for name, (more, less) in pairs.items():
        each = [result.value(more.format(item), 2) - result.value(less.format(item), 2) for item in "ab"]
        assert means[name] == pytest.approx(np.mean(each))
    place, words_of = {}, {"place": " alone", "place, blank": ", blank"}
    words_of["place, blank, neutral"] = ", blank, positions neutral"
    for name, words in words_of.items():
        each = []
        for item in "ab":
            # Of 4 × 3 places, those in column 1 of rows 1 and 2 are nearest to the middle; all others are the rim.
            value = {(r, c): result.value(f"{item} at ({r}, {c}){words}", 2) for r in range(4) for c in range(3)}
            middle = [value.pop((1, 1)), value.pop((2, 1))]
            each.append(np.mean(middle) - np.mean(list(value.values())))
        place[name] = np.mean(each)
        assert means[name] == pytest.approx(place[name], abs=1e-6)
    assert means["place by context"] == pytest.approx(place["place"] - place["place, blank"], abs=1e-6)
    assert means["place by position"] == pytest.approx(place["place, blank"] - place["place, blank, neutral"], abs=1e-6)
    of_third = named(vs.effects(result, target=3))
    assert of_third["object"] == pytest.approx(
        np.mean([result.value("original", 3) - result.value(f"no {item}", 3) for item in "ab"])
    )


def test_places_between_middle_and_rim_are_ignored() -> None:
    result = controls(seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX), places=(7, 7))
    location_map = result.location_map(test="controls")
    values = location_map.values[0].double().numpy()
    rim = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    assert centre_minus_rim(location_map, result) == pytest.approx(values[3, 3] - rim.mean(), abs=1e-9)
    line = dataclasses.replace(location_map, values=location_map.values[:, 3:4], grid=vs.Grid(1, 7))
    assert centre_minus_rim(line, result) == pytest.approx(values[3, 3] - (values[3, 0] + values[3, 6]) / 2)


def test_no_place_counts_for_both_middle_and_rim() -> None:
    """All places of two rows are on the rim; those nearest to the middle do not count as rim."""
    result = controls(seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX), places=(2, 3))
    location_map = result.location_map(test="controls")
    values = location_map.values[0].double().numpy()
    assert centre_minus_rim(location_map, result) == pytest.approx(values[:, 1].mean() - values[:, [0, 2]].mean())


def test_the_middle_is_the_centre_of_what_the_model_sees() -> None:
    """The model sees a centre crop: the middle of the places is the middle of the crop."""
    from vitscope.images.preprocessing import Preprocessing

    base = seeing(slow.red_at_the_centre, 32, 32)
    model = dataclasses.replace(base, preprocessing=Preprocessing((32, 32), fit="crop", resize_to=(32, 32)))
    result = controls(model, painted(32, 64, (30, 12, 6, 6)), (30, 12, 6, 6))
    location_map = result.location_map(test="controls")
    values = location_map.values[0].numpy()
    assert np.unravel_index(values.argmax(), values.shape) == (2, 2)
    rim = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    assert centre_minus_rim(location_map, result) == pytest.approx(values[2, 2] - rim.mean(), abs=1e-6)


# Several images


@pytest.fixture(scope="module", name="several")
def of_four_images() -> list[vs.Composition]:
    model = vs.load(tiny_vit())
    return [
        vs.compose(model, slow.noise(40, 56, seed), (4 + seed, 6, 14, 12), tests="controls", places=3, target=1)
        for seed in range(4)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_intervals_equal_those_of_students_t_test(several: list[vs.Composition], confidence: float) -> None:
    alone = [named(vs.effects(result)) for result in several]
    for effect in vs.effects(several, confidence=confidence):
        assert effect.values == pytest.approx([single[effect.name] for single in alone])
        expected = ttest_1samp(effect.values, 0).confidence_interval(confidence)
        assert effect.interval == pytest.approx((expected.low, expected.high))
        assert effect.mean == pytest.approx(effect.values.mean())
        assert effect.standardized == pytest.approx(effect.values.mean() / effect.values.std(ddof=1))
        assert effect.description == DESCRIPTIONS[effect.name]


def test_intervals_equal_an_integral_of_students_density(several: list[vs.Composition]) -> None:
    effect = vs.effects(several)[0]
    assert effect.interval == pytest.approx(slow.student(effect.values.tolist(), 0.95), rel=1e-3)


def test_one_image_has_no_interval(several: list[vs.Composition]) -> None:
    for results in (several[0], several[:1]):
        for effect in vs.effects(results):
            assert (effect.interval, effect.standardized, len(effect.values)) == (None, None, 1)


def test_equal_values_have_no_standardized_effect(several: list[vs.Composition]) -> None:
    for effect in vs.effects([several[0]] * 3):
        assert effect.standardized is None
        assert effect.interval == pytest.approx((effect.mean, effect.mean))


def test_json_holds_the_effects(several: list[vs.Composition]) -> None:
    all_effects = vs.effects(several)
    entries = json.loads(json.dumps([effect.as_json() for effect in all_effects], allow_nan=False))
    assert [entry["name"] for entry in entries] == list(DESCRIPTIONS)
    for effect, entry in zip(all_effects, entries, strict=True):
        assert entry["values"] == effect.values.tolist()
        assert (entry["mean"], tuple(entry["interval"]), entry["description"]) == (
            effect.mean,
            effect.interval,
            effect.description,
        )
        assert entry["standardized"] == effect.standardized
    assert vs.effects(several[0])[0].as_json()["interval"] is None


def test_an_effect_that_some_images_lack_is_left_out(several: list[vs.Composition]) -> None:
    """For example because of rotary positions, or of another version of vitscope."""
    indices = [index for index, image in enumerate(several[1].edited_images) if not image.neutral]
    without = dataclasses.replace(
        several[1],
        edited_images=[several[1].edited_images[index] for index in indices],
        outputs=several[1].outputs[indices],
    )
    names = [effect.name for effect in vs.effects([several[0], without])]
    assert names == [name for name in DESCRIPTIONS if "neutral" not in name and "position" not in name]


@pytest.mark.usefixtures("unchecked")
def test_invalid_results_are_refused_in_one_line(several: list[vs.Composition]) -> None:
    another_model = dataclasses.replace(several[1], provenance={**several[1].provenance, "model": "another"})
    parameters = {**several[1].provenance["parameters"], "output": "logit"}
    logit = dataclasses.replace(several[1], provenance={**several[1].provenance, "parameters": parameters})
    sizes = vs.compose(vs.load(tiny_vit()), slow.noise(40, 56), BOX, tests="size", scales=[0.5])
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "effects takes results of vitscope.compose"),
        (["a"], {}, "effects takes results of vitscope.compose"),
        (
            [several[0], another_model],
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
        (several, {"confidence": 95}, "confidence is 95, a number between 0 and 1"),
        (several, {"target": "thing 33"}, "did you mean thing 3"),
    ]
    for results, options, message in wrong:
        with pytest.raises(vs.CallError, match=message) as caught:
            vs.effects(results, **options)
        assert "\n" not in str(caught.value)


def test_a_grid_without_a_middle_has_no_effects_of_place() -> None:
    """All of 2 × 2 places are equally near to the middle."""
    result = controls(seeing(slow.red_at_the_centre, 40, 56), painted(40, 56, BOX), places=2)
    assert not [name for name in named(vs.effects(result)) if name.startswith("place")]
