"""The key images of a composition: on the plate of a page, and in the table of 25 lines."""

from typing import Any

import pytest

import vitscope as vs
from tests.helpers.tiny import tiny_vit
from tests.reference.stage import noise
from vitscope.cli.tables import print_edited_images
from vitscope.views.compositing import on_plate, plate
from vitscope.views.key_images import key_images, left_out

OBJECTS = {"dog": (4, 6, 14, 10), "cat": (30, 16, 13, 16)}
TESTS = ("size", "location", "split", "controls")


def composed(height: int = 40, width: int = 56, **options: Any) -> vs.Composition:
    defaults = {"tests": TESTS, "places": 3, "scales": [0.25, 0.35, 0.5, 0.71, 1, 1.2, 1.4]}
    return vs.compose(vs.load(tiny_vit()), noise(height, width), OBJECTS, **(defaults | options))


@pytest.fixture(scope="module", name="result")
def of_two_objects() -> vs.Composition:
    own = vs.EditedImage("own", (vs.Placement("dog", scale=0.5),), background="blurred")
    return composed(edited_images=own)


def changes(result: vs.Composition, indices: list[int]) -> list[float]:
    """Return the largest change of the three classes that are named with each image."""
    return [max(abs(entry.change) for entry in result.table()[index].classes) for index in indices]


def test_each_test_of_each_object_has_its_key_steps(result: vs.Composition) -> None:
    choices = on_plate(result)
    chosen = key_images(result, choices, 18)
    assert len(chosen) == 18
    assert chosen[0] == 0
    assert [index for index in choices if index in chosen] == chosen
    names = [result.names[index] for index in chosen]
    assert "own" in names
    for name in OBJECTS:
        assert f"{name} left out" in names
        places = [index for index in choices if index in result.select("location", name)]
        assert {places[0], places[-1]} <= set(chosen)
        sizes = [index for index in choices if index in result.select("size", name)]
        largest = sizes[changes(result, sizes).index(max(changes(result, sizes)))]
        assert largest in chosen
    few = key_images(result, choices, 8)  # the original, the user's own, and the largest changes of the first steps
    assert set(few) <= set(chosen)
    splits = [index for index in choices if result.edited_images[index].test == "split"]
    pairs = [index for index in splits if result.edited_images[index].subject is None]
    firsts = [
        *(result.names.index(f"{name} left out") for name in OBJECTS),
        pairs[changes(result, pairs).index(max(changes(result, pairs)))],
    ]
    for name in OBJECTS:
        sizes = [index for index in choices if index in result.select("size", name)]
        firsts.append(sizes[changes(result, sizes).index(max(changes(result, sizes)))])
        firsts.append(next(index for index in choices if index in result.select("location", name)))
    expected = sorted(firsts, key=lambda index: -changes(result, [index])[0])[:6]
    assert set(few) == {0, result.names.index("own"), *expected}


def test_all_images_are_shown_if_they_fit(result: vs.Composition) -> None:
    choices = on_plate(result)
    assert key_images(result, choices, len(choices)) == choices
    assert left_out(result, choices, choices) == ""
    assert key_images(result, choices, 1) == [0]


def test_the_plate_fits_a_page_and_says_what_is_left_out(result: vs.Composition) -> None:
    choices, scene = on_plate(result), plate(result)
    shown = sum(len(row.panels) for row in scene.rows)
    assert (shown, len(choices)) == (18, 32)
    counts = scene.note.partition("key steps and largest changes, without ")[2]
    numbers = [int(part.split()[0]) for part in counts.split(", ")]
    assert sum(numbers) == 14
    assert f"18 of {len(result)} images shown: key steps" in scene.note
    full = plate(result, full=True)
    assert sum(len(row.panels) for row in full.rows) == 32
    assert full.note.endswith(f"32 of {len(result)} images shown")


@pytest.mark.parametrize(("height", "width", "attention", "count"), [(112, 56, True, 6), (40, 56, True, 18)])
def test_a_plate_of_high_photos_has_fewer_rows(height: int, width: int, attention: bool, count: int) -> None:
    scene = plate(composed(height, width, attention=attention, tests=("size", "split")))
    images = [panel for row in scene.rows for panel in row.panels]
    assert len(images) == min(count, 18) * (2 if attention else 1)


def test_the_table_has_25_lines(result: vs.Composition, capsys: pytest.CaptureFixture[str]) -> None:
    print_edited_images(result, 3)
    lines = capsys.readouterr().out.splitlines()
    assert 18 <= len(lines) <= 24  # the command adds a line with the name of the photo
    (rest,) = [line for line in lines if line.startswith("  … and ")]
    assert rest.endswith("--full shows all")
    print_edited_images(result, 3, full=True)
    full = capsys.readouterr().out.splitlines()
    assert len(full) > 40
    assert not [line for line in full if "--full" in line]
