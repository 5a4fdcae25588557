"""Compositions: tables, files, target classes, location maps, size curves and attention."""

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
    marked = OBJECTS if objects is None else objects
    return vs.compose(model, PHOTO, marked, **({"tests": ALL_TESTS, "places": (2, 3)} | options))


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


@pytest.mark.slow
def test_probabilities_sum_to_one_and_changes_to_zero(result: vs.Composition) -> None:
    np.testing.assert_allclose(result.outputs.sum(1), 1, atol=1e-5)
    for index, row in enumerate(result.table(top_k=7)):
        assert row.name == result.names[index]
        assert row.test == result.edited_images[index].test
        assert sum(ranked.value for ranked in row.classes) == pytest.approx(1, abs=1e-5)
        assert sum(ranked.change for ranked in row.classes) == pytest.approx(0, abs=1e-5)
        for ranked in row.classes:
            assert ranked.value == result.outputs[index, ranked.index]
            assert ranked.change == result.outputs[index, ranked.index] - result.outputs[0, ranked.index]
            assert ranked.label == LABELS[ranked.index]
        values = [ranked.value for ranked in row.classes]
        assert values == sorted(values, reverse=True)
    assert not any(ranked.change for ranked in result.ranking("original").classes)


def test_three_classes_are_listed_by_default(result: vs.Composition) -> None:
    assert {len(row.classes) for row in result.table()} == {3}
    assert len(result.ranking(0, top_k=1).classes) == 1
    assert result.ranking(0, 5).classes[:3] == result.ranking(0).classes


def test_the_first_row_is_the_prediction_for_the_photo(result: vs.Composition) -> None:
    predicted = vs.load(tiny_vit()).predict(PHOTO, top_k=7)[0]
    ranked = result.ranking("original", top_k=7).classes
    assert [entry.label for entry in ranked] == [entry.label for entry in predicted]
    assert [entry.value for entry in ranked] == pytest.approx([entry.probability for entry in predicted], abs=1e-6)


def test_logits_are_those_of_the_probabilities(result: vs.Composition) -> None:
    logits = composed(output="logit").outputs
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, result.outputs, atol=1e-5)


def test_csv_holds_the_numbers_of_the_table(result: vs.Composition, tmp_path: Path) -> None:
    path = result.save(tmp_path / "table.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["edited image"] for row in rows] == result.names
    for index, (row, image, ranking) in enumerate(zip(rows, result.edited_images, result.table(), strict=True)):
        assert (row["test"], row["object"], row["background"]) == (image.test, image.subject or "", image.background)
        assert row["positions"] == ("neutral" if image.neutral else "as they are")
        for rank, ranked in enumerate(ranking.classes, 1):
            assert row[f"class {rank}"] == ranked.label
            assert float(row[f"probability {rank}"]) == ranked.value
            assert float(row[f"change {rank}"]) == ranked.change
        tested = [placed for placed in image.show if placed.name == image.subject]
        if not tested:
            assert row["x"] == row["y"] == row["scale"] == row["area"] == ""
            continue
        outline = result.objects[tested[0].name]
        assert (float(row["x"]), float(row["y"])) == (tested[0].centre or outline.centre)
        assert float(row["scale"]) == tested[0].scale
        assert float(row["area"]) == pytest.approx(outline.area * tested[0].scale ** 2)
        for name in OBJECTS:
            is_shown = name in [placed.name for placed in image.show]
            assert bool(row[f"attention on {name}"]) == is_shown
            if is_shown:
                assert float(row[f"attention on {name}"]) == result.rollout_mass(index, name)[0]
    text = result.as_csv(top_k=5)
    assert "probability 5" in text.splitlines()[0]
    assert len(list(csv.reader(io.StringIO(text)))) == len(result) + 1


def test_json_holds_the_arrays(result: vs.Composition, tmp_path: Path) -> None:
    content = json.loads(result.save(tmp_path / "result.json").read_text(encoding="utf-8"))
    assert content["labels"] == list(LABELS)
    np.testing.assert_array_equal([entry["outputs"] for entry in content["edited_images"]], result.outputs)
    assert [entry["name"] for entry in content["edited_images"]] == result.names
    assert [entry["name"] for entry in content["objects"]] == ["a", "b"]
    assert content["objects"][1]["box"] == list(OBJECTS["b"])
    assert content["objects"][1]["area"] == pytest.approx(15 * 18 / 2240)
    assert content["objects"][0]["class"] == LABELS[int(result.outputs[0].argmax())]
    for image, entry in zip(result.edited_images, content["edited_images"], strict=True):
        placements = [(placed["name"], placed["scale"], placed["mirrored"]) for placed in entry["show"]]
        assert placements == [(placed.name, placed.scale, placed.mirrored) for placed in image.show]
        assert set(entry["attention"]) == {placed.name for placed in image.show}
    assert content["provenance"] == json.loads(json.dumps(result.provenance))
    again = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert again == content


def test_provenance_holds_the_options(result: vs.Composition) -> None:
    parameters = result.provenance["parameters"]
    assert result.provenance["method"] == "compose"
    assert parameters == {
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
    assert result.provenance["samples"] == len(result) == len(result.edited_images)
    custom = composed(tests="size", scales=[0.5], fill=(1, 2, 3), background=noise(9, 9), feather=2).provenance
    chosen = {name: custom["parameters"][name] for name in ("scales", "fill", "background", "feather", "positions")}
    assert chosen == {"scales": [0.5], "fill": [1, 2, 3], "background": "an image", "feather": 2, "positions": []}


def test_a_file_is_written_completely_or_not_at_all(result: vs.Composition, tmp_path: Path) -> None:
    with pytest.raises(vs.CallError, match=r"cannot save as 'table.xlsx': end the name in .csv or .json"):
        result.save(tmp_path / "table.xlsx")
    (tmp_path / "file").write_text("unchanged")
    with pytest.raises(vs.WorkError, match="is a file, not a folder"):
        result.save(tmp_path / "file" / "table.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Target classes


def test_the_class_is_the_target_that_of_the_object_or_the_likeliest() -> None:
    likeliest = int(composed(tests=()).outputs[0].argmax())
    third, fourth = ((likeliest + by) % 7 for by in (1, 2))
    objects = [
        vs.object_mask(PHOTO, box=OBJECTS["a"], name="a"),
        vs.object_mask(PHOTO, box=OBJECTS["b"], name=LABELS[third].upper()),
    ]
    result = composed(objects=objects, tests="location")
    assert result.column() == result.column(name="a") == likeliest
    assert result.column(name=LABELS[third].upper()) == third
    assert result.location_map().target == LABELS[likeliest]
    assert result.location_map(LABELS[third].upper()).target == LABELS[third]
    assert result.column(LABELS[fourth]) == result.column(fourth) == result.column(f"{fourth}", "a") == fourth
    labelled = composed(objects=[dataclasses.replace(objects[0], label=LABELS[fourth])], tests="location")
    assert labelled.column(name="a") == fourth
    assert labelled.as_json()["objects"][0]["class"] == LABELS[fourth]
    with_target = composed(objects=objects, tests="location", target=fourth)
    assert with_target.column(name=LABELS[third].upper()) == with_target.column() == fourth
    assert with_target.column(third, "a") == third
    assert with_target.value(0, third) == with_target.outputs[0, third]


def test_an_object_named_by_a_number_is_no_class() -> None:
    likeliest = int(composed(tests=()).outputs[0].argmax())
    index = (likeliest + 1) % 7
    result = composed(objects={f"{index}": OBJECTS["a"]}, tests="location")
    assert result.column(name=f"{index}") == likeliest


def test_an_objects_class_is_checked_before_the_first_prediction() -> None:
    reports: list[int] = []
    item = vs.object_mask(PHOTO, box=OBJECTS["a"], name="a", label="thing 33")
    with pytest.raises(vs.CallError, match="target 'thing 33' is not a label of this model: did you mean thing 3"):
        composed(objects=[item], progress=lambda _: reports.append(1))
    assert not reports


def test_the_output_of_a_model_without_classes_is_similarity(bare: vs.Composition) -> None:
    assert (bare.output, list(bare.labels), bare.outputs.shape[1]) == ("similarity", ["similarity"], 1)
    assert bare.outputs[0, 0] == pytest.approx(1, abs=1e-6)
    assert (np.abs(bare.outputs) <= 1 + 1e-6).all()
    assert bare.column() == bare.column("similarity") == bare.column(name="a") == 0
    assert bare.location_map("b").target == "similarity"
    assert bare.size_curve("a", "similarity").target == "similarity"
    for target in ("cat", 0):
        with pytest.raises(vs.CallError, match=r"has no classes, .* its output is 'similarity'"):
            bare.column(target)
    with pytest.raises(vs.CallError, match=r"has no classifier and no text tower, .*pass target='similarity'"):
        composed(family("transformers-vit-bare").model(), target="cat")


# Maps and curves


def test_a_map_holds_the_outputs_of_its_places(result: vs.Composition) -> None:
    for name, target in (("a", 2), ("b", None)):
        location_map = result.location_map(name, target)
        column = int(result.outputs[0].argmax()) if target is None else target
        for row in range(2):
            for column_of_map in range(3):
                index = result.index_of(f"{name} at ({row}, {column_of_map})")
                assert float(location_map.values[0, row, column_of_map]) == pytest.approx(result.outputs[index, column])
                x, y = result.edited_images[index].show[-1].centre
                left, top, right, bottom = location_map.images[0].box
                assert (left + (column_of_map + 0.5) / 3 * (right - left)) == pytest.approx(x)
                assert (top + (row + 0.5) / 2 * (bottom - top)) == pytest.approx(y)
        assert (location_map.grid.height, location_map.grid.width) == (2, 3)
        assert location_map.provenance["method"] == "location map"
        assert (location_map.provenance["object"], location_map.provenance["positions"]) == (name, "as they are")
    assert result.location_map().provenance["object"] == "a"
    assert location_map.overlay().size == (56, 40)


def test_maps_of_the_controls_show_the_object_alone(result: vs.Composition) -> None:
    maps = {
        (background, neutral): result.location_map("b", 1, test="controls", background=background, neutral=neutral)
        for background, neutral in (("own", False), ("blank", False), ("blank", True))
    }
    for (background, neutral), location_map in maps.items():
        suffix = " alone" if background == "own" else ", blank, positions neutral" if neutral else ", blank"
        index = result.index_of(f"b at (1, 2){suffix}")
        assert [placed.name for placed in result.edited_images[index].show] == ["b"]
        assert float(location_map.values[0, 1, 2]) == pytest.approx(result.outputs[index, 1])
        assert (location_map.provenance["background"], location_map.provenance["positions"]) == (
            background,
            "neutral" if neutral else "as they are",
        )
    assert len({float(location_map.values[0, 1, 2]) for location_map in maps.values()}) == 3


def test_a_curve_is_sorted_by_size_and_holds_the_outputs(result: vs.Composition) -> None:
    sizes = composed(tests="size", scales=[1.0, 0.5, 0.7])
    for name in "ab":
        curve = sizes.size_curve(name, 3)
        assert (curve.name, curve.target) == (name, LABELS[3])
        assert curve.scales.tolist() == [0.5, 0.7, 1.0]
        assert curve.values.tolist() == [sizes.value(f"{name} × {scale:g}", 3) for scale in curve.scales]
        assert curve.areas == pytest.approx(sizes.objects[name].area * curve.scales**2)
        assert curve.values[-1] == pytest.approx(sizes.outputs[0, 3], abs=1e-6)
    assert result.size_curve().name == "a"


# Attention


def test_rollouts_are_those_of_each_image(result: vs.Composition) -> None:
    assert result.rollouts is not None
    model = vs.load(tiny_vit())
    for name in ("original", "a × 0.5", "b at (1, 2)", "a and b exchanged", "no b"):
        expected = vs.rollout(model, result.image(name)).values[0]
        np.testing.assert_allclose(result.rollouts[result.index_of(name)], expected, atol=1e-6)


@pytest.mark.parametrize("crop", [False, True])
def test_attention_on_an_object_is_its_share_of_the_rollout(crop: bool) -> None:
    """Objects of whole patches: the share is that of their patches."""
    recipe = Preprocessing((32, 32), fit="crop", resize_to=(32, 32)) if crop else Preprocessing((32, 64))
    model = dataclasses.replace(vs.load(tiny_vit(), image_size=recipe.size), preprocessing=recipe)
    free = vs.EditedImage("moved", (vs.Placement("a", (28.0, 20.0)),))
    moved = vs.compose(model, noise(32, 64), (16, 8, 16, 8), tests=(), attention=True, feather=0,
        edited_images=[dataclasses.replace(free, show=(vs.Placement("object", (36.0, 20.0)),))])  # fmt: skip
    assert moved.rollouts is not None
    offset = 2 if crop else 0
    for index, rows, columns in ((0, (1,), (2, 3)), (1, (2,), (3.5, 4.5))):
        rollout = moved.rollouts[index]
        expected, cells = 0.0, 0.0
        for row in rows:
            for column in range(rollout.shape[1]):
                left, right = columns[0] - offset, columns[-1] + 1 - offset
                share = max(0.0, min(right, column + 1) - max(left, column))
                expected, cells = expected + share * float(rollout[row, column]), cells + share
        mass, covered = moved.rollout_mass(index, "object")
        assert mass == pytest.approx(expected / float(rollout.sum()), abs=1e-6)
        assert covered == pytest.approx(cells / rollout.size, abs=1e-6)


def test_missing_rollouts_are_refused() -> None:
    result = composed(tests="split")
    assert result.rollouts is None
    with pytest.raises(vs.CallError, match="the result has no rollouts: pass attention=True to compose"):
        result.rollout_mass("original", "a")
    assert "attention" not in result.as_json()["edited_images"][0]


def test_attention_on_an_object_that_is_not_shown_is_refused(result: vs.Composition) -> None:
    with pytest.raises(vs.CallError, match="'a left out' does not show a: it shows b"):
        result.rollout_mass("a left out", "a")


# Interrupted


def test_images_after_ctrl_c_are_left_out(interrupted: vs.Composition, tmp_path: Path) -> None:
    assert interrupted.evaluated == list(range(16))
    assert len(interrupted.table()) == 16
    rows = list(csv.DictReader(io.StringIO(interrupted.as_csv())))
    assert [row["edited image"] for row in rows] == interrupted.names[:16]
    content = json.loads(interrupted.save(tmp_path / "part.json").read_text(encoding="utf-8"))
    assert [entry["outputs"] is None for entry in content["edited_images"]] == [
        index >= 16 for index in range(len(interrupted))
    ]
    assert ["attention" in entry for entry in content["edited_images"]] == [
        index < 16 for index in range(len(interrupted))
    ]
    assert interrupted.size_curve("a").scales.tolist() == [0.5, 0.71, 1.0, 1.41]
    with pytest.raises(vs.CallError, match="the location test of b was interrupted, so its map is incomplete"):
        interrupted.location_map("b")
    with pytest.raises(vs.CallError, match="the controls were interrupted, so their effects are incomplete"):
        vs.effects(interrupted)


def test_a_size_test_that_did_not_begin_is_refused() -> None:
    def press(_: vs.Progress) -> None:
        raise KeyboardInterrupt

    free = [vs.EditedImage("one", (vs.Placement("a"),)), vs.EditedImage("two", (vs.Placement("b"),))]
    with pytest.warns(vs.VitscopeWarning, match="interrupted"):
        result = composed(tests="size", edited_images=free, batch_size=3, progress=press)
    with pytest.raises(vs.CallError, match="the size test of a was interrupted before its first image"):
        result.size_curve()


# Selection


def test_images_are_selected_by_name_and_index(result: vs.Composition) -> None:
    assert result.index_of("a mirrored") == result.names.index("a mirrored")
    assert result.value(-1, 0) == result.outputs[-1, 0]
    assert result.image(-1).tobytes() == result.image(len(result) - 1).tobytes()
    assert result.tested("size") == result.tested("controls") == ["a", "b"]
    assert all(result.edited_images[index].place is not None for index in result.select("location", "b", placed=True))
    assert not result.select("location", placed=False)
    assert [result.names[index] for index in result.select("controls", neutral=True, placed=False)] == [
        "positions neutral"
    ]


WRONG: list[tuple[Any, str]] = [
    (lambda r: r.index_of("dog"), "there is no edited image 'dog': the first are original, "),
    (lambda r: r.image(500), r"there is no edited image 500: there are \d+"),
    (lambda r: r.image(-500), "there is no edited image -500"),
    (lambda r: r.image(1.5), "the edited image is 1.5, a whole number"),
    (lambda r: r.ranking(0, 0), "top_k is 0, at least 1"),
    (lambda r: r.column("thing 33"), "target 'thing 33' is not a label of this model: did you mean thing 3"),
    (lambda r: r.column(7), "target 7 does not exist: the model has classes 0 to 6"),
    (lambda r: r.location_map("c"), "there is no object 'c' in the location test: choose a, b"),
    (lambda r: r.size_curve("c"), "there is no object 'c' in the size test: choose a, b"),
    (lambda r: r.location_map("a", 9), "target 9 does not exist"),
    (lambda r: r.location_map("a", background="night"), "test 'location' has no places of a over background 'night'"),
    (lambda r: r.location_map("a", test="splits"), r"the result has no splits test: pass tests=\('splits',\)"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("ask", "message"), WRONG, ids=[f"{i}" for i in range(len(WRONG))])
def test_unknown_images_objects_and_classes_are_refused_in_one_line(
    ask: Any, message: str, result: vs.Composition
) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        ask(result)
    assert "\n" not in str(caught.value)


def test_a_missing_test_is_named() -> None:
    result = composed(tests="split")
    for method, name in ((result.location_map, "location"), (result.size_curve, "size")):
        with pytest.raises(vs.CallError, match=rf"the result has no {name} test: pass tests=\('{name}',\) to compose"):
            method()


def test_maps_of_classes_of_the_same_name_are_selected_by_index() -> None:
    """ImageNet has two cranes."""
    base = seeing(lambda unit: torch.stack([slow.redness(unit).mean((1, 2)), unit[:, 2].mean((1, 2))], 1), 40, 56)
    model = dataclasses.replace(base, labels=("crane", "crane"))
    photo = painted(40, 56, (6, 9, 12, 10))
    result = vs.compose(model, photo, boxed(40, 56, (6, 9, 12, 10)), tests="location", places=2, output="logit")
    for index in (0, 1):
        assert result.location_map(target=index).values[0, 0, 0] == pytest.approx(result.outputs[1, index], abs=1e-6)
