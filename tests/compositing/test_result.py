"""Compositions: tables that add up, files that hold the same numbers, columns, maps, curves, attention; refusals."""

import csv
import dataclasses
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.helpers import families
from tests.helpers.tiny import LABELS, tiny_vit
from tests.reference import stage as slow
from tests.reference.stage import boxed, noise, painted, seeing
from vitscope.images.preprocessing import Preprocessing

PHOTO = noise(40, 56)
OBJECTS = {"a": (4, 6, 16, 10), "b": (30, 16, 15, 18)}
ALL_TESTS = ("size", "location", "split", "controls")


def family(name: str) -> families.Family:
    return next(family for family in families.ALL if family.name == name)


def composed(model: Any = None, objects: Any = None, **options: Any) -> vs.Composition:
    model = vs.load(tiny_vit()) if model is None else model
    given = OBJECTS if objects is None else objects
    return vs.compose(model, PHOTO, given, **({"tests": ALL_TESTS, "places": (2, 3)} | options))


@pytest.fixture(scope="module", name="result")
def of_a_vit() -> vs.Composition:
    return composed(attention=True)


@pytest.fixture(scope="module", name="bare")
def without_classes() -> vs.Composition:
    return composed(family("transformers-vit-bare").model())


@pytest.fixture(scope="module", name="interrupted")
def cut_short() -> vs.Composition:
    left = [4]

    def press(_: vs.Progress) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vs.VitscopeWarning)
        return composed(attention=True, batch_size=4, progress=press)


# Tables


def test_probabilities_sum_to_one_and_changes_to_nothing(result: vs.Composition) -> None:
    np.testing.assert_allclose(result.outputs.sum(1), 1, atol=1e-5)
    for at, row in enumerate(result.table(top_k=7)):
        assert row.name == result.names[at]
        assert row.test == result.composites[at].test
        assert sum(one.value for one in row.classes) == pytest.approx(1, abs=1e-5)
        assert sum(one.change for one in row.classes) == pytest.approx(0, abs=1e-5)
        for one in row.classes:
            assert one.value == result.outputs[at, one.index]
            assert one.change == result.outputs[at, one.index] - result.outputs[0, one.index]
            assert one.label == LABELS[one.index]
        values = [one.value for one in row.classes]
        assert values == sorted(values, reverse=True)
    assert not any(one.change for one in result.ranking("original").classes)


def test_three_classes_are_listed_unless_more_are_asked_for(result: vs.Composition) -> None:
    assert {len(row.classes) for row in result.table()} == {3}
    assert len(result.ranking(0, top_k=1).classes) == 1
    assert result.ranking(0, 5).classes[:3] == result.ranking(0).classes


def test_the_first_row_is_the_answer_to_the_photo(result: vs.Composition) -> None:
    predicted = vs.load(tiny_vit()).predict(PHOTO, top_k=7)[0]
    ranked = result.ranking("original", top_k=7).classes
    assert [one.label for one in ranked] == [one.label for one in predicted]
    assert [one.value for one in ranked] == pytest.approx([one.probability for one in predicted], abs=1e-6)


def test_logits_are_those_of_the_probabilities(result: vs.Composition) -> None:
    logits = composed(output="logit").outputs
    shown = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(shown, result.outputs, atol=1e-5)


def test_csv_holds_the_numbers_of_the_table(result: vs.Composition, tmp_path: Path) -> None:
    path = result.save(tmp_path / "table.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["composite"] for row in rows] == result.names
    for at, (row, one, ranking) in enumerate(zip(rows, result.composites, result.table(), strict=True)):
        assert (row["test"], row["object"], row["background"]) == (one.test, one.subject or "", one.background)
        assert row["positions"] == ("neutral" if one.neutral else "as they are")
        for rank, ranked in enumerate(ranking.classes, 1):
            assert row[f"class {rank}"] == ranked.label
            assert float(row[f"probability {rank}"]) == ranked.value
            assert float(row[f"change {rank}"]) == ranked.change
        tested = [placed for placed in one.show if placed.name == one.subject]
        if not tested:
            assert row["x"] == row["y"] == row["scale"] == row["area"] == ""
            continue
        outline = result.outlines[tested[0].name]
        assert (float(row["x"]), float(row["y"])) == (tested[0].centre or outline.centre)
        assert float(row["scale"]) == tested[0].scale
        assert float(row["area"]) == pytest.approx(outline.area * tested[0].scale ** 2)
        for name in OBJECTS:
            shown = name in [placed.name for placed in one.show]
            assert bool(row[f"attention on {name}"]) == shown
            if shown:
                assert float(row[f"attention on {name}"]) == result.looked(at, name)[0]
    text = result.as_csv(top_k=5)
    assert "probability 5" in text.splitlines()[0]
    assert len(list(csv.reader(io.StringIO(text)))) == len(result) + 1


def test_json_holds_the_arrays(result: vs.Composition, tmp_path: Path) -> None:
    about = json.loads(result.save(tmp_path / "result.json").read_text(encoding="utf-8"))
    assert about["labels"] == list(LABELS)
    np.testing.assert_array_equal([one["outputs"] for one in about["composites"]], result.outputs)
    assert [one["name"] for one in about["composites"]] == result.names
    assert [one["name"] for one in about["objects"]] == ["a", "b"]
    assert about["objects"][1]["box"] == list(OBJECTS["b"])
    assert about["objects"][1]["area"] == pytest.approx(15 * 18 / 2240)
    assert about["objects"][0]["class"] == LABELS[int(result.outputs[0].argmax())]
    for one, entry in zip(result.composites, about["composites"], strict=True):
        shown = [(placed["name"], placed["scale"], placed["mirrored"]) for placed in entry["show"]]
        assert shown == [(placed.name, placed.scale, placed.mirrored) for placed in one.show]
        assert set(entry["attention"]) == {placed.name for placed in one.show}
    assert about["provenance"] == json.loads(json.dumps(result.provenance))
    again = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert again == about


def test_provenance_says_how_it_was_made(result: vs.Composition) -> None:
    made = result.provenance["parameters"]
    assert result.provenance["method"] == "compose"
    assert made == {
        "tests": list(ALL_TESTS),
        "scales": None,
        "places": [2, 3],
        "location_scale": 1.0,
        "fill": "inpaint",
        "background": "grass",
        "feather": 1.0,
        "composed_at": [40, 56],
        "positions": ["position embedding"],
        "output": "probability",
        "seed": 0,
    }
    assert result.provenance["samples"] == len(result) == len(result.composites)
    other = composed(tests="size", scales=[0.5], fill=(1, 2, 3), background=noise(9, 9), feather=2).provenance
    about = {name: other["parameters"][name] for name in ("scales", "fill", "background", "feather", "positions")}
    assert about == {"scales": [0.5], "fill": [1, 2, 3], "background": "an image", "feather": 2, "positions": []}


def test_a_file_is_written_whole_or_not_at_all(result: vs.Composition, tmp_path: Path) -> None:
    with pytest.raises(vs.CallError, match=r"cannot save as 'table.xlsx': end the name in .csv or .json"):
        result.save(tmp_path / "table.xlsx")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(vs.WorkError, match="is a file, not a folder"):
        result.save(tmp_path / "file" / "table.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Which class


def test_the_class_is_the_targets_the_objects_or_the_likeliest() -> None:
    likeliest = int(composed(tests=()).outputs[0].argmax())
    third, fourth = ((likeliest + by) % 7 for by in (1, 2))
    objects = [
        vs.outline(PHOTO, box=OBJECTS["a"], name="a"),
        vs.outline(PHOTO, box=OBJECTS["b"], name=LABELS[third].upper()),
    ]
    made = composed(objects=objects, tests="location")
    assert made.column() == made.column(name="a") == likeliest
    assert made.column(name=LABELS[third].upper()) == third
    assert made.location_map().target == LABELS[likeliest]
    assert made.location_map(LABELS[third].upper()).target == LABELS[third]
    assert made.column(LABELS[fourth]) == made.column(fourth) == made.column(f"{fourth}", "a") == fourth
    labelled = composed(objects=[dataclasses.replace(objects[0], label=LABELS[fourth])], tests="location")
    assert labelled.column(name="a") == fourth
    assert labelled.as_json()["objects"][0]["class"] == LABELS[fourth]
    given = composed(objects=objects, tests="location", target=fourth)
    assert given.column(name=LABELS[third].upper()) == given.column() == fourth
    assert given.column(third, "a") == third
    assert given.value(0, third) == given.outputs[0, third]


def test_an_object_named_by_a_number_is_no_class() -> None:
    likeliest = int(composed(tests=()).outputs[0].argmax())
    other = (likeliest + 1) % 7
    made = composed(objects={f"{other}": OBJECTS["a"]}, tests="location")
    assert made.column(name=f"{other}") == likeliest


def test_an_objects_class_is_checked_before_anything_is_asked() -> None:
    asked: list[int] = []
    one = vs.outline(PHOTO, box=OBJECTS["a"], name="a", label="thing 33")
    with pytest.raises(vs.CallError, match="target 'thing 33' is no label of this model: did you mean thing 3"):
        composed(objects=[one], progress=lambda _: asked.append(1))
    assert not asked


def test_a_model_without_classes_answers_with_similarity(bare: vs.Composition) -> None:
    assert (bare.output, list(bare.labels), bare.outputs.shape[1]) == ("similarity", ["similarity"], 1)
    assert bare.outputs[0, 0] == pytest.approx(1, abs=1e-6)
    assert (np.abs(bare.outputs) <= 1 + 1e-6).all()
    assert bare.column() == bare.column("similarity") == bare.column(name="a") == 0
    assert bare.location_map("b").target == "similarity"
    assert bare.size_curve("a", "similarity").target == "similarity"
    for target in ("cat", 0):
        with pytest.raises(vs.CallError, match=r"has no classes, .* its answer is 'similarity'"):
            bare.column(target)
    with pytest.raises(vs.CallError, match=r"has no classifier, .*pass target='similarity'"):
        composed(family("transformers-vit-bare").model(), target="cat")


# Maps and curves


def test_a_map_holds_the_answers_of_its_places(result: vs.Composition) -> None:
    for name, target in (("a", 2), ("b", None)):
        found = result.location_map(name, target)
        column = int(result.outputs[0].argmax()) if target is None else target
        for row in range(2):
            for place in range(3):
                at = result.at(f"{name} at ({row}, {place})")
                assert float(found.values[0, row, place]) == pytest.approx(result.outputs[at, column])
                x, y = result.composites[at].show[-1].centre
                left, top, right, bottom = found.images[0].box
                assert (left + (place + 0.5) / 3 * (right - left)) == pytest.approx(x)
                assert (top + (row + 0.5) / 2 * (bottom - top)) == pytest.approx(y)
        assert (found.grid.height, found.grid.width) == (2, 3)
        assert found.provenance["method"] == "location map"
        assert (found.provenance["object"], found.provenance["positions"]) == (name, "as they are")
    assert result.location_map().provenance["object"] == "a"
    assert found.overlay().size == (56, 40)


def test_maps_of_the_controls_are_of_the_object_alone(result: vs.Composition) -> None:
    made = {
        (background, neutral): result.location_map("b", 1, test="controls", background=background, neutral=neutral)
        for background, neutral in (("own", False), ("blank", False), ("blank", True))
    }
    for (background, neutral), found in made.items():
        words = " alone" if background == "own" else ", blank, positions neutral" if neutral else ", blank"
        at = result.at(f"b at (1, 2){words}")
        assert [placed.name for placed in result.composites[at].show] == ["b"]
        assert float(found.values[0, 1, 2]) == pytest.approx(result.outputs[at, 1])
        assert (found.provenance["background"], found.provenance["positions"]) == (
            background,
            "neutral" if neutral else "as they are",
        )
    assert len({float(found.values[0, 1, 2]) for found in made.values()}) == 3


def test_a_curve_rises_in_size_and_holds_the_answers(result: vs.Composition) -> None:
    made = composed(tests="size", scales=[1.0, 0.5, 0.7])
    for name in "ab":
        curve = made.size_curve(name, 3)
        assert (curve.name, curve.target) == (name, LABELS[3])
        assert curve.scales.tolist() == [0.5, 0.7, 1.0]
        assert curve.values.tolist() == [made.value(f"{name} × {scale:g}", 3) for scale in curve.scales]
        assert curve.areas == pytest.approx(made.outlines[name].area * curve.scales**2)
        assert curve.values[-1] == pytest.approx(made.outputs[0, 3], abs=1e-6)
    assert result.size_curve().name == "a"


# Attention


def test_rollouts_are_those_of_each_image(result: vs.Composition) -> None:
    assert result.rollouts is not None
    model = vs.load(tiny_vit())
    for name in ("original", "a × 0.5", "b at (1, 2)", "a and b exchanged", "no b"):
        expected = vs.rollout(model, result.image(name)).values[0]
        np.testing.assert_allclose(result.rollouts[result.at(name)], expected, atol=1e-6)


@pytest.mark.parametrize("crop", [False, True])
def test_attention_on_an_object_is_its_share_of_the_rollout(crop: bool) -> None:
    """Objects of whole patches: the share is that of their patches."""
    recipe = Preprocessing((32, 32), fit="crop", resize_to=(32, 32)) if crop else Preprocessing((32, 64))
    model = dataclasses.replace(vs.load(tiny_vit(), image_size=recipe.size), preprocessing=recipe)
    free = vs.EditedImage("moved", (vs.Placement("a", (28.0, 20.0)),))
    made = vs.compose(model, noise(32, 64), (16, 8, 16, 8), tests=(), attention=True, feather=0,
        composites=[dataclasses.replace(free, show=(vs.Placement("object", (36.0, 20.0)),))])  # fmt: skip
    assert made.rollouts is not None
    offset = 2 if crop else 0
    for at, rows, columns in ((0, (1,), (2, 3)), (1, (2,), (3.5, 4.5))):
        rollout = made.rollouts[at]
        expected, cells = 0.0, 0.0
        for row in rows:
            for column in range(rollout.shape[1]):
                left, right = columns[0] - offset, columns[-1] + 1 - offset
                share = max(0.0, min(right, column + 1) - max(left, column))
                expected, cells = expected + share * float(rollout[row, column]), cells + share
        on_it, covered = made.looked(at, "object")
        assert on_it == pytest.approx(expected / float(rollout.sum()), abs=1e-6)
        assert covered == pytest.approx(cells / rollout.size, abs=1e-6)


def test_attention_that_was_not_kept_is_said() -> None:
    made = composed(tests="split")
    assert made.rollouts is None
    with pytest.raises(vs.CallError, match="no rollouts were kept: pass attention=True to compose"):
        made.looked("original", "a")
    assert "attention" not in made.as_json()["composites"][0]


def test_attention_on_what_is_not_there_is_refused(result: vs.Composition) -> None:
    with pytest.raises(vs.CallError, match="a is not in 'a left out'"):
        result.looked("a left out", "a")


# Cut short


def test_what_was_not_answered_is_left_out(interrupted: vs.Composition, tmp_path: Path) -> None:
    assert interrupted.asked == list(range(16))
    assert len(interrupted.table()) == 16
    rows = list(csv.DictReader(io.StringIO(interrupted.as_csv())))
    assert [row["composite"] for row in rows] == interrupted.names[:16]
    about = json.loads(interrupted.save(tmp_path / "part.json").read_text(encoding="utf-8"))
    assert [one["outputs"] is None for one in about["composites"]] == [at >= 16 for at in range(len(interrupted))]
    assert ["attention" in one for one in about["composites"]] == [at < 16 for at in range(len(interrupted))]
    assert interrupted.size_curve("a").scales.tolist() == [0.5, 0.71, 1.0, 1.41]
    with pytest.raises(vs.CallError, match="the location test of b was interrupted: its map is not whole"):
        interrupted.location_map("b")
    with pytest.raises(vs.CallError, match="the controls were interrupted: their effects are not whole"):
        vs.effects(interrupted)


def test_a_size_test_that_did_not_begin_is_said() -> None:
    def press(_: vs.Progress) -> None:
        raise KeyboardInterrupt

    free = [vs.EditedImage("one", (vs.Placement("a"),)), vs.EditedImage("two", (vs.Placement("b"),))]
    with pytest.warns(vs.VitscopeWarning, match="interrupted"):
        made = composed(tests="size", composites=free, batch_size=3, progress=press)
    with pytest.raises(vs.CallError, match="the size test of a was interrupted before it began"):
        made.size_curve()


# Finding


def test_composites_are_found_by_name_and_number(result: vs.Composition) -> None:
    assert result.at("a mirrored") == result.names.index("a mirrored")
    assert result.value(-1, 0) == result.outputs[-1, 0]
    assert result.image(-1).tobytes() == result.image(len(result) - 1).tobytes()
    assert result.tested("size") == result.tested("controls") == ["a", "b"]
    assert all(result.composites[at].place is not None for at in result.select("location", "b", placed=True))
    assert not result.select("location", placed=False)
    assert [result.names[at] for at in result.select("controls", neutral=True, placed=False)] == ["positions neutral"]


WRONG: list[tuple[Any, str]] = [
    (lambda r: r.at("dog"), "there is no composite 'dog': the first are original, "),
    (lambda r: r.image(500), r"composite 500 is not there: there are \d+"),
    (lambda r: r.image(-500), "composite -500 is not there"),
    (lambda r: r.image(1.5), "the composite is 1.5, a whole number"),
    (lambda r: r.ranking(0, 0), "top_k is 0, at least 1"),
    (lambda r: r.column("thing 33"), "target 'thing 33' is no label of this model: did you mean thing 3"),
    (lambda r: r.column(7), "target 7 is not there: the model has classes 0 to 6"),
    (lambda r: r.location_map("c"), "there is no object 'c' in the location test: it has a, b"),
    (lambda r: r.size_curve("c"), "there is no object 'c' in the size test: it has a, b"),
    (lambda r: r.location_map("a", 9), "target 9 is not there"),
    (lambda r: r.location_map("a", background="night"), "no places of a over background 'night'"),
    (lambda r: r.location_map("a", test="splits"), r"the splits test was not made: pass tests=\('splits',\)"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("ask", "message"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_what_is_not_there_is_said_in_one_line(ask: Any, message: str, result: vs.Composition) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        ask(result)
    assert "\n" not in str(caught.value)


def test_a_test_that_was_not_made_is_named() -> None:
    made = composed(tests="split")
    for ask, name in ((made.location_map, "location"), (made.size_curve, "size")):
        with pytest.raises(vs.CallError, match=rf"the {name} test was not made: pass tests=\('{name}',\) to compose"):
            ask()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tests": "sizes"}, "unknown test 'sizes': choose size, location, split, controls"),
    ({"tests": ("size", "place")}, "unknown test 'place'"),
    ({"tests": 5}, "test"),
    ({"scales": []}, r"scales is \[\]: numbers above 0"),
    ({"scales": [0.5, 0]}, "numbers above 0 are expected"),
    ({"scales": [-1]}, "numbers above 0 are expected"),
    ({"scales": ["half"]}, "a scale is 'half', a number"),
    ({"scales": [float("nan")]}, "a scale is nan"),
    ({"scales": [3.0]}, "object × 3: object at scale 3 is 48×30 pixels and does not fit"),
    ({"scales": [0.1]}, "object × 0.1: .* too small to be seen, choose a larger scale"),
    ({"places": 1}, "places is 1, at least 2"),
    ({"places": (3, 1)}, "places is 1, at least 2"),
    ({"places": (3, 3, 3)}, r"places is \(3, 3, 3\): rows and columns are expected"),
    ({"places": 2.5}, "places is 2.5, a whole number"),
    ({"places": "many"}, "places is 'many'"),
    ({"location_scale": 0}, "location_scale is 0: a number above 0"),
    ({"location_scale": "half"}, "location_scale is 'half', a number"),
    ({"location_scale": 5.0}, r"object at scale 5 is 80×50 pixels, the model sees 56×40: .* well below 3.50"),
    ({"fill": "inpant"}, "inpant"),
    ({"feather": 99.0}, "feather is 99.0, 0 to 10"),
    ({"background": "nowhere.png", "tests": "controls"}, "nowhere.png does not exist"),
    ({"output": "odds"}, "unknown output 'odds': choose probability or logit"),
    ({"target": "thing 33"}, "did you mean thing 3"),
    ({"target": 7}, "target 7 is not there"),
    ({"batch_size": 0}, "batch_size is 0, at least 1"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 0.5}, "seed is 0.5, a whole number"),
    ({"progress": "yes"}, "progress is 'yes': pass True, False, or a function"),
    ({"composites": [vs.EditedImage("x", (vs.Placement("cow"),))]}, "no object 'cow'"),
    ({"composites": [vs.EditedImage("x"), vs.EditedImage("x")]}, "two composites are called 'x'"),
    ({"composites": [vs.EditedImage("original")]}, "two composites are called 'original'"),
    ({"composites": [vs.EditedImage("no object", (vs.Placement("object"),))], "tests": "controls"}, "'no object'"),
    ({"composites": [vs.EditedImage("x", (vs.Placement("object"),) * 2)]}, "an object is shown twice"),
    ({"composites": [vs.EditedImage("x", background="night")]}, "unknown background 'night'"),
    ({"objects": []}, "no object was marked"),
    ({"objects": (0, 0, 56, 40)}, "object is the whole image"),
    ({"objects": (50, 5, 10, 10)}, "reaches outside the image of 56×40"),
    ({"objects": {"a": (4, 6, 16, 10), "b": (10, 10, 9, 9)}}, "a and b overlap in 54 pixels"),
    ({"objects": np.zeros((40, 56), bool)}, "the mask of object is empty"),
    ({"objects": np.zeros((56, 40), bool)}, "is 56×40 where the image is 40×56"),
    ({"objects": (1, 1, 54, 38)}, "no background is left"),
    ({"image": [PHOTO, PHOTO]}, "one image a call, 2 came"),
    ({"image": torch.zeros(2, 3, 32, 32)}, "one image a call, 2 came"),
    ({"image": "nowhere.png"}, "nowhere.png does not exist"),
    ({"model": "vit-nano"}, r"a model is expected, from vitscope\.load"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_what_cannot_be_meant_is_refused_before_anything_is_shown(options: dict[str, Any], message: str) -> None:
    given = {"model": None, "image": PHOTO, "objects": OBJECTS["a"], "places": 2} | options
    model, image, objects = (given.pop(name) for name in ("model", "image", "objects"))
    shown: list[int] = []
    given = {"progress": lambda *_: shown.append(1)} | given
    with pytest.raises(vs.CallError, match=message) as caught:
        vs.compose(vs.load(tiny_vit()) if model is None else model, image, objects, **given)
    assert "\n" not in str(caught.value)
    assert not shown


def test_one_composite_needs_no_list() -> None:
    one = vs.EditedImage("alone", (vs.Placement("a"),))
    assert composed(tests=(), composites=one).names == composed(tests=(), composites=[one]).names


def test_a_background_that_is_none_is_refused_though_no_test_uses_it() -> None:
    with pytest.raises(vs.CallError, match=r"nowhere.png does not exist"):
        composed(tests="split", background="nowhere.png")


def test_a_list_of_one_image_is_one_image() -> None:
    made = vs.compose(vs.load(tiny_vit()), [PHOTO], OBJECTS, tests="split")
    np.testing.assert_array_equal(made.outputs, composed(tests="split").outputs)


def test_rotary_positions_cannot_be_made_equal() -> None:
    chosen = family("timm-dinov3")
    neutral = vs.EditedImage("nowhere", (vs.Placement("object"),), neutral=True)
    with pytest.raises(vs.CallError, match=r"nowhere: the positions of .* cannot be made equal \(they are rotary\)"):
        vs.compose(chosen.model(), PHOTO, OBJECTS["a"], tests=(), composites=[neutral])
    model = seeing(slow.share_of_red, 40, 56)
    with pytest.raises(vs.CallError, match=r"nowhere: the positions of .* cannot be made equal \(none are known\)"):
        vs.compose(model, PHOTO, OBJECTS["a"], tests=(), composites=[neutral])


def test_maps_of_classes_of_one_name_are_of_their_index() -> None:
    """ImageNet has two cranes."""
    base = seeing(lambda unit: torch.stack([slow.redness(unit).mean((1, 2)), unit[:, 2].mean((1, 2))], 1), 40, 56)
    model = dataclasses.replace(base, labels=("crane", "crane"))
    photo = painted(40, 56, (6, 9, 12, 10))
    made = vs.compose(model, photo, boxed(40, 56, (6, 9, 12, 10)), tests="location", places=2, output="logit")
    for index in (0, 1):
        assert made.location_map(target=index).values[0, 0, 0] == pytest.approx(made.outputs[1, index], abs=1e-6)
