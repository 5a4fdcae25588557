"""Object masks from boxes, polygons, masks and segments; refinement; and invalid objects."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.reference.stage import boxed, noise
from vitscope.compositing import grabcut
from vitscope.compositing.object_masks import object_masks
from vitscope.perturb.segments import segment

PHOTO = noise(30, 40)
BOX = (5, 8, 12, 10)
MARKED = boxed(30, 40, BOX)


def test_a_box_marks_its_pixels() -> None:
    dog = vs.object_mask(PHOTO, box=BOX, name="dog", label="bull mastiff")
    assert np.array_equal(dog.mask, MARKED)
    assert (dog.name, dog.label, dog.box) == ("dog", "bull mastiff", BOX)
    assert dog.centre == (11.0, 13.0)
    assert dog.area == pytest.approx(120 / 1200)


def test_a_box_between_pixels_is_rounded() -> None:
    assert vs.object_mask(PHOTO, box=(5.4, 7.6, 12.0, 10.0)).box == (5, 8, 12, 10)
    assert vs.object_mask(PHOTO, box=(0, 0, 40, 29)).box == (0, 0, 40, 29)
    assert vs.object_mask(PHOTO, box=(38, 28, 2, 2)).area == pytest.approx(4 / 1200)


def test_a_polygon_through_the_corners_of_a_box_equals_the_box() -> None:
    corners = [(5, 8), (17, 8), (17, 18), (5, 18)]
    for polygon in (corners, np.array(corners), corners[::-1]):
        assert np.array_equal(vs.object_mask(PHOTO, polygon=polygon).mask, MARKED)


def test_a_triangle_marks_the_pixels_whose_centres_it_contains() -> None:
    corners = [(2.3, 3.1), (37.2, 10.4), (12.7, 28.1)]
    mask = vs.object_mask(PHOTO, polygon=corners).mask
    expected = np.zeros((30, 40), dtype=bool)
    for row in range(30):
        for column in range(40):
            x, y = column + 0.5, row + 0.5
            sides = [
                (bx - ax) * (y - ay) - (by - ay) * (x - ax)
                for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True)
            ]
            expected[row, column] = min(sides) > 0
    assert np.array_equal(mask, expected)


def test_a_mask_may_come_in_many_forms(tmp_path: Path) -> None:
    grey = np.where(MARKED, 200, 60).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", MARKED)
    forms: list[Any] = [
        MARKED,
        MARKED.astype(int),
        MARKED.astype(np.float32),
        grey,
        np.repeat(grey[..., None], 3, 2),
        np.dstack([grey, grey, grey, np.full_like(grey, 255)]),
        Image.fromarray(grey),
        Image.fromarray(grey).convert("RGB"),
        tmp_path / "mask.png",
        str(tmp_path / "mask.png"),
        tmp_path / "mask.npy",
    ]
    for form in forms:
        assert np.array_equal(vs.object_mask(PHOTO, mask=form).mask, MARKED)


def test_half_the_range_of_a_mask_is_not_the_object() -> None:
    mask = np.zeros((30, 40))
    mask[:10], mask[10:20] = 0.5, 1.0
    assert vs.object_mask(PHOTO, mask=mask).box == (0, 10, 40, 10)


def test_segments_are_picked_by_their_labels() -> None:
    labels = np.arange(30)[:, None] // 10 * 4 + np.arange(40) // 10
    picked = vs.object_mask(PHOTO, segments=[1, 6], cut=labels).mask
    assert np.array_equal(picked, (labels == 1) | (labels == 6))
    photo = scene()
    full_box = (0.0, 0.0, 100.0, 80.0)
    cut = segment(photo, "quickshift", vs.InputImage(Image.fromarray(photo), full_box), None).labels
    assert np.array_equal(vs.object_mask(photo, segments=[int(cut[42, 50])]).mask, cut == cut[42, 50])


def test_a_path_is_a_photo_too(tmp_path: Path) -> None:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    assert np.array_equal(vs.object_mask(tmp_path / "photo.png", box=BOX).mask, MARKED)


# Refining


def scene() -> np.ndarray:
    """A red ball on a ground of green noise."""
    random = np.random.default_rng(0)
    photo = random.integers(0, 60, (80, 100, 3)).astype(np.uint8)
    photo[..., 1] += 120
    rows, columns = np.ogrid[:80, :100]
    ball = (rows - 42) ** 2 + (columns - 50) ** 2 <= 20**2
    photo[ball] = random.integers(0, 40, (int(ball.sum()), 3))
    photo[ball, 0] += 200
    return photo


def ball() -> np.ndarray:
    rows, columns = np.ogrid[:80, :100]
    return (rows - 42) ** 2 + (columns - 50) ** 2 <= 20**2


def test_a_rough_box_becomes_the_object() -> None:
    pytest.importorskip("cv2")
    mask = vs.object_mask(scene(), box=(26, 18, 48, 48), refine=True).mask
    assert (mask & ball()).sum() / (mask | ball()).sum() > 0.97
    again = vs.object_mask(scene(), box=(26, 18, 48, 48), refine=True).mask
    assert np.array_equal(mask, again)


def test_refinement_extends_a_mask_by_the_margin_at_most() -> None:
    pytest.importorskip("cv2")
    mask = vs.object_mask(scene(), box=(34, 26, 32, 32), refine=True).mask
    reach = round(grabcut.MARGIN * 80)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (26 - reach, 57 + reach, 34 - reach, 65 + reach)


def test_small_pieces_are_dropped() -> None:
    pytest.importorskip("cv2")
    photo = scene()
    photo[64:66, 72:74] = (220, 10, 10)
    mask = vs.object_mask(photo, box=(26, 18, 50, 50), refine=True).mask
    assert not mask[64:66, 72:74].any()
    pieces = np.zeros((20, 30), dtype=bool)
    pieces[:4, :10], pieces[8, 8:12], pieces[15, 15:18] = True, True, True
    remaining = grabcut._without_small_pieces(pieces)
    assert remaining[8, 8:12].all()
    assert not remaining[15].any()


def test_a_large_photo_is_refined_on_a_smaller_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(grabcut, "MAX_PIXELS", 2000)
    sizes, grab_cut = [], cv2.grabCut
    monkeypatch.setattr(cv2, "grabCut", lambda image, *more: sizes.append(image.shape) or grab_cut(image, *more))
    mask = vs.object_mask(scene(), box=(26, 18, 48, 48), refine=True).mask
    assert sizes == [(40, 50, 3)]
    assert (mask & ball()).sum() / (mask | ball()).sum() > 0.9


def test_an_object_that_nearly_vanishes_is_a_warning() -> None:
    pytest.importorskip("cv2")
    photo = scene()
    photo[ball()] = photo[0, 0]
    photo[40:46, 46:52] = (250, 10, 10)
    with pytest.warns(vs.VitscopeWarning, match=r"GrabCut kept only \d+% of the mask of toy") as caught:
        vs.object_mask(photo, box=(26, 18, 48, 48), refine=True, name="toy")
    assert "\n" not in str(caught[0].message)


def test_an_empty_refinement_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "grabCut", lambda _, marks, *__: marks.fill(0))
    with pytest.raises(vs.CallError, match="GrabCut found nothing of dog inside its mask") as caught:
        vs.object_mask(scene(), box=(26, 18, 48, 48), refine=True, name="dog")
    assert "\n" not in str(caught.value)


def test_a_refined_mask_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "grabCut", lambda _, marks, *__: marks.fill(cv2.GC_FGD))
    with pytest.raises(vs.CallError, match="dog is the whole image"):
        vs.object_mask(scene(), box=(26, 18, 48, 48), refine=True, name="dog")


def test_opencvs_random_numbers_do_not_matter() -> None:
    """The colours of a disc and its surroundings overlap, so that the start of the clustering matters."""
    cv2 = pytest.importorskip("cv2")
    ys, xs = np.ogrid[:60, :80]
    photo = np.random.default_rng(0).integers(0, 150, (60, 80, 3))
    photo[(ys - 30) ** 2 + (xs - 40) ** 2 < 15**2] += 90
    masks = []
    for seed in range(3):
        cv2.setRNGSeed(seed)
        masks.append(vs.object_mask(photo.astype(np.uint8), box=(20, 10, 40, 40), refine=True).mask)
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


def test_missing_opencv_is_one_line_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(vs.WorkError, match=r"refine needs OpenCV .*pip install 'vitscope\[opencv\]'") as caught:
        vs.object_mask(scene(), box=(26, 18, 48, 48), refine=True)
    assert type(caught.value).__name__ == "ModelUnavailableError"
    assert "\n" not in str(caught.value)
    assert vs.object_mask(scene(), box=BOX).box == BOX


# Invalid objects

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"box": (-1, 0, 10, 10)}, "-1,0,10,10 .*it reaches outside the image of 40×30"),
    ({"box": (0, -1, 10, 10)}, "it reaches outside the image of 40×30 pixels"),
    ({"box": (31, 0, 10, 10)}, "it reaches outside"),
    ({"box": (0, 21, 10, 10)}, "it reaches outside"),
    ({"box": (5, 5, 0, 10)}, "which is empty: make it at least 2×2 pixels"),
    ({"box": (5, 5, 10, 1)}, "which is empty"),
    ({"box": (5, 5, -10, 10)}, "which is empty"),
    ({"box": (0, 0, 40, 30)}, "dog is the whole image"),
    ({"box": (0, 0, 40)}, "has 3 numbers: pass left, top, width, height"),
    ({"box": (0, 0, float("nan"), 30)}, "the box of dog is nan, a number is expected"),
    ({"box": (0, 0, float("inf"), 30)}, "the box of dog is inf"),
    ({"box": ("a", 0, 10, 30)}, "the box of dog is 'a'"),
    ({"box": 5}, "box"),
    ({"box": "5,5,10,10"}, "box"),
    ({"polygon": [(1, 1), (10, 10)]}, "is not a polygon: pass three or more corners"),
    ({"polygon": [(1, 1, 2), (10, 10, 3), (4, 5, 6)]}, "is not a polygon"),
    ({"polygon": "round"}, "is not a polygon"),
    ({"polygon": [(1, 1), (10, 10), (float("nan"), 3)]}, "is not a polygon"),
    ({"polygon": [(1, 1), (10, 10), (41, 3)]}, r"from \(1, 1\) to \(41, 10\): it reaches outside"),
    ({"polygon": [(1, 1), (10, 10), (4, -3)]}, "it reaches outside the image of 40×30"),
    ({"polygon": [(1, 1), (10, 10), (20, 20)]}, "the mask of dog is empty"),
    ({"polygon": [(0, 0), (40, 0), (40, 30), (0, 30)]}, "dog is the whole image"),
    ({"mask": np.ones((40, 30), bool)}, r"is 40×30 \(height×width\), the image is 30×40: pass a mask"),
    ({"mask": np.zeros((30, 40), bool)}, "the mask of dog is empty"),
    ({"mask": np.zeros((30, 40), np.uint8)}, "the mask of dog is empty"),
    ({"mask": np.ones((30, 40), bool)}, "dog is the whole image"),
    ({"mask": np.full((30, 40), 7)}, "dog is the whole image"),
    ({"mask": np.zeros(30)}, "is not a mask: pass an array of the size of the image"),
    ({"mask": None, "segments": None}, "dog is marked by nothing: pass exactly one of box, polygon, mask or segments"),
    ({"mask": MARKED, "box": BOX}, "dog is marked by box and mask: pass exactly one of box, polygon, mask or segments"),
    ({"mask": {1: 2}}, "is not a mask"),
    ({"mask": boxed(30, 40, (3, 3, 1, 9))}, "dog is thinner than 2 pixels"),
    ({"mask": boxed(30, 40, (3, 3, 9, 1))}, "dog is thinner than 2 pixels"),
    ({"mask": "nowhere.png"}, "nowhere.png does not exist"),
    ({"mask": "nowhere.npy"}, "nowhere.npy does not exist"),
    (
        {"segments": [99], "cut": "slic"},
        r"segment 99 of dog does not exist: slic cut the image into \d+ segments, 0 to \d+",
    ),
    ({"segments": [0.5], "cut": "slic"}, "a segment of dog is 0.5, a whole number"),
    ({"segments": [], "cut": "slic"}, "the mask of dog is empty"),
    ({"segments": 3}, "segment"),
    ({"segments": [0], "cut": "voronoi"}, "unknown segments 'voronoi'"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_invalid_masks_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        vs.object_mask(PHOTO, name="dog", **options)
    assert "\n" not in str(caught.value)


def test_a_damaged_mask_is_one_line(tmp_path: Path) -> None:
    for name in ("mask.npy", "mask.png"):
        (tmp_path / name).write_bytes(b"no image\n at all")
        with pytest.raises(vs.VitscopeError, match=name) as caught:
            vs.object_mask(PHOTO, mask=tmp_path / name)
        assert "\n" not in str(caught.value)


# Several objects, in any form


def test_objects_are_named_by_the_caller_or_numbered() -> None:
    second = boxed(30, 40, (25, 3, 8, 8))
    corners = [(25, 3), (33, 3), (33, 11), (25, 11)]

    def names(objects: Any) -> list[str]:
        return [item.name for item in object_masks(PHOTO, objects)]

    assert names(BOX) == names([BOX]) == names(MARKED) == names(list(BOX)) == ["object"]
    assert names([BOX, second]) == ["object 1", "object 2"]
    assert names({"dog": BOX, "cat": second}) == ["dog", "cat"]
    masks = object_masks(PHOTO, {"dog": vs.object_mask(PHOTO, box=BOX, name="hound", label="beagle"), "cat": corners})
    assert [(item.name, item.label) for item in masks] == [("dog", "beagle"), ("cat", None)]
    assert np.array_equal(masks[1].mask, second)
    assert names([vs.object_mask(PHOTO, box=BOX, name="hound"), np.array(corners)]) == ["hound", "object 2"]


@pytest.mark.parametrize("form", ["polygon", "array", "image", "numbers"])
def test_one_object_needs_no_list(form: str) -> None:
    corners = [(5, 8), (17, 8), (17, 18), (5, 18)]
    forms = {"polygon": corners, "array": np.array(corners), "image": Image.fromarray(MARKED)}
    (item,) = object_masks(PHOTO, (forms | {"numbers": np.array(BOX)})[form])
    assert (item.name, item.box) == ("object", BOX)


WRONG_OBJECTS: list[tuple[Any, str]] = [
    ([], "no object was marked: pass a box"),
    ({}, "no object was marked"),
    (None, "cannot use None as objects: pass boxes"),
    (7, "cannot use 7 as objects"),
    (
        [BOX, (10, 10, 5, 5)],
        "object 1 and object 2 overlap in 25 pixels: mark them by polygons or masks that do not overlap",
    ),
    ({"a": BOX, "b": MARKED}, "a and b overlap in 120 pixels"),
    (
        [vs.object_mask(PHOTO, box=BOX), vs.object_mask(PHOTO, box=(25, 3, 8, 8))],
        "two objects have the same name \\(object, object\\): give each its own name",
    ),
    (vs.object_mask(noise(20, 20), box=(2, 2, 5, 5)), "is 20×20 \\(height×width\\), the image is 30×40"),
    ({"a": "nowhere.png"}, "nowhere.png does not exist"),
    ({"a": (1, 2, 3)}, "the outline of a is not a polygon"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("objects", "message"), WRONG_OBJECTS, ids=[f"{i}" for i in range(len(WRONG_OBJECTS))])
def test_invalid_objects_are_refused_in_one_line(objects: Any, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        object_masks(PHOTO, objects)
    assert "\n" not in str(caught.value)
