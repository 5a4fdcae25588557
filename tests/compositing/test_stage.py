"""The stage: holes, fillings, backgrounds and pasted objects, compared with a slow twin that sets single pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.filters import gaussian

import vitscope as vs
from tests.reference import stage as slow
from tests.reference.stage import boxed, noise, painted
from vitscope.compositing import backgrounds
from vitscope.compositing.backgrounds import fill_hole, make_background
from vitscope.compositing.stage import Stage

HEIGHT, WIDTH = 40, 56
DOG, CAT = boxed(HEIGHT, WIDTH, (6, 8, 12, 15)), boxed(HEIGHT, WIDTH, (30, 12, 14, 9))
DOG[8:12, 6:10] = False  # not a box: an L
NEAR = boxed(HEIGHT, WIDTH, (19, 14, 9, 12))  # one pixel from the dog
AT = vs.Placement
COLOUR = (10.0, 200.0, 60.0)


def objects(*masks: np.ndarray) -> list[vs.ObjectMask]:
    return [vs.ObjectMask(name, mask) for name, mask in zip(("dog", "cat"), masks, strict=False)]


def stage(photo: np.ndarray, *masks: np.ndarray, **options: Any) -> Stage:
    return Stage(photo, objects(*masks), (photo.shape[1], photo.shape[0]), **options)


def photo_of(kind: str) -> np.ndarray:
    photo = noise(HEIGHT, WIDTH)
    return photo if kind == "bytes" else (photo.astype(np.float32) * 1.7 - 80)


SHOWN: dict[str, tuple[vs.Placement, ...]] = {
    "nothing": (),
    "all unmoved": (AT("dog"), AT("cat")),
    "one left out": (AT("cat"),),
    "moved": (AT("cat"), AT("dog", (40.0, 20.5))),
    "moved between pixels": (AT("dog", (23.3, 21.9)),),
    "moved over the other": (AT("cat"), AT("dog", (35.0, 16.0))),
    "unmoved in front of moved": (AT("dog", (35.0, 16.0)), AT("cat")),
    "mirrored": (AT("cat"), AT("dog", mirrored=True)),
    "both moved and mirrored": (AT("cat", (12.0, 30.0), mirrored=True), AT("dog", (45.0, 10.0), mirrored=True)),
    "at the edge": (AT("dog", (6.0, 7.5)), AT("cat", (49.0, 35.5))),
    "at its own centre": (AT("cat", (37.0, 16.5)), AT("dog", (12.0, 15.5))),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["own", "blank"])
@pytest.mark.parametrize("kind", ["bytes", "floating point"])
@pytest.mark.parametrize("feather", [0.0, 2.6])
@pytest.mark.parametrize("masks", [(DOG, CAT), (DOG, NEAR)], ids=["apart", "near"])
def test_images_equal_the_slow_twin(masks: Any, feather: float, kind: str, setting: str) -> None:
    photo = photo_of(kind)
    fast = stage(photo, *masks, fill=COLOUR, feather=feather)
    margin = round(0.015 * HEIGHT)
    union = slow.hole(masks[0], margin) | slow.hole(masks[1], margin)
    behind = np.where(union[..., None], np.array(COLOUR), photo.astype(float))
    if setting == "blank":
        behind[:] = behind.mean((0, 1))
        behind = behind.round() if kind == "bytes" else behind
    named = dict(zip(("dog", "cat"), masks, strict=True))
    for name, show in SHOWN.items():
        rendered = fast.render(vs.EditedImage(name, show, setting))
        expected = slow.composed(photo, named, show, behind, own=setting == "own", feather=feather, margin=margin)
        assert rendered.dtype == photo.dtype
        # Each layer is rounded to bytes.
        np.testing.assert_allclose(rendered, expected, atol=0.51 * len(show) if kind == "bytes" else 1e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["bytes", "floating point"])
@pytest.mark.parametrize("fill", ["inpaint", "mean", "blur", "noise", "black", 40])
def test_unmoved_objects_give_the_photo_to_the_pixel(fill: Any, kind: str) -> None:
    photo = photo_of(kind)
    for masks in ((DOG, CAT), (DOG, NEAR), (DOG,)):
        rendered_stage = stage(photo, *masks, fill=fill)
        unmoved = [vs.Placement(name) for name in rendered_stage.objects]
        centred = [vs.Placement(name, rendered_stage.objects[name].centre) for name in rendered_stage.objects]
        for show in (unmoved, centred, unmoved[::-1]):
            assert np.array_equal(rendered_stage.render(vs.EditedImage("unmoved", tuple(show))), photo)


def test_pixels_outside_holes_and_objects_do_not_change() -> None:
    photo = photo_of("bytes")
    scene = stage(photo, DOG, CAT)
    touched = slow.hole(DOG, 1) | slow.hole(CAT, 1)
    touched |= boxed(HEIGHT, WIDTH, (34, 12, 12, 16))  # the new place of the dog
    rendered = scene.render(vs.EditedImage("moved", (AT("cat"), AT("dog", (40.0, 20.0)))))
    assert np.array_equal(rendered[~touched], photo[~touched])
    original_pixels = DOG & ~slow.hole(CAT, 1)
    assert not np.array_equal(rendered[original_pixels], photo[original_pixels])


def test_a_moved_object_keeps_its_inner_pixels() -> None:
    photo = photo_of("bytes")
    scene = stage(photo, DOG, CAT, feather=1.5)
    rendered = scene.render(vs.EditedImage("moved", (AT("dog", (40.0, 21.5)),)))
    inner = slow.opacity(DOG, 1.5) >= 1
    rows, columns = np.nonzero(inner)
    assert len(rows) > 20
    assert np.array_equal(rendered[rows + 6, columns + 28], photo[rows, columns])


def test_edges_fade_over_the_feather() -> None:
    red = painted(40, 56, (10, 10, 20, 20), ground=(0, 0, 0))
    mask = boxed(40, 56, (10, 10, 20, 20))
    for feather in (0, 3.0, 9):
        rendered = stage(red, mask, feather=feather, fill="black").render(
            vs.EditedImage("m", (AT("dog", (40.0, 20.0)),))
        )
        expected = [min((distance + 1) / (feather + 1), 1) * 255 for distance in range(10)]
        assert rendered[20, 30:40, 0] == pytest.approx(expected, abs=0.51)
    assert stage(red, mask).feather == 1.0
    assert stage(np.zeros((400, 600, 3), np.uint8), boxed(400, 600, (9, 9, 50, 60))).feather == 4.0


def test_mirroring_twice_restores_an_object() -> None:
    photo = photo_of("bytes")
    once = stage(photo, CAT, feather=0).render(vs.EditedImage("once", (AT("dog", mirrored=True),)))
    assert np.array_equal(once[12:21, 30:44], photo[12:21, 30:44][:, ::-1])
    twice = stage(once, CAT, feather=0).render(vs.EditedImage("twice", (AT("dog", mirrored=True),)))
    assert np.array_equal(twice[12:21, 30:44], photo[12:21, 30:44])


@pytest.mark.parametrize("fill", ["inpaint", "mean", "blur"])
def test_an_object_that_is_left_out_leaves_no_pixel(fill: str) -> None:
    """Its fringe is removed with it."""
    photo = painted(HEIGHT, WIDTH, ground=(90, 120, 150))
    photo[slow.hole(DOG, 1)] = (255, 0, 0)
    rendered = stage(photo, DOG, CAT, fill=fill).render(vs.EditedImage("no dog", (AT("cat"),)))
    assert np.abs(rendered.astype(int) - (90, 120, 150)).max() <= 1


def test_an_object_that_is_left_out_leaves_no_pixel_in_the_hole_of_its_neighbour() -> None:
    photo = painted(HEIGHT, WIDTH)
    photo[DOG], photo[NEAR] = (255, 0, 0), (0, 0, 255)
    scene = stage(photo, DOG, NEAR)
    assert (scene.render(vs.EditedImage("no dog", (AT("cat"),)))[..., 0] <= 120).all()
    assert (scene.render(vs.EditedImage("no cat", (AT("dog"),)))[..., 2] <= 150).all()


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.5])
def test_a_scaled_object_has_the_expected_size_and_its_own_colour(scale: float) -> None:
    red = painted(80, 90, (30, 26, 32, 24), ground=(0, 0, 200))
    scene = stage(red, boxed(80, 90, (30, 26, 32, 24)), feather=0)
    rendered = scene.render(vs.EditedImage("scaled", (AT("dog", scale=scale),))).astype(int)
    solid = rendered[..., 0] > 127
    rows, columns = np.flatnonzero(solid.any(1)), np.flatnonzero(solid.any(0))
    assert len(rows) == pytest.approx(24 * scale, abs=1)
    assert len(columns) == pytest.approx(32 * scale, abs=1)
    assert rows.mean() + 0.5 == pytest.approx(38, abs=1)
    assert columns.mean() + 0.5 == pytest.approx(46, abs=1)
    # Only red and the background are mixed, in shares that sum to one.
    assert np.abs(rendered[..., 0] / 255 + rendered[..., 2] / 200 - 1).max() < 0.02
    assert not rendered[..., 1].any()


@pytest.mark.parametrize("scale", [0.4, 1.0, 1.6])
def test_no_pixel_of_the_old_background_is_pasted(scale: float) -> None:
    """A red ball on blue is pasted on green: no blue remains."""
    ys, xs = np.ogrid[:80, :90]
    ball = (ys - 40) ** 2 + (xs - 45) ** 2 < 20**2
    photo = painted(80, 90, ground=(0, 0, 255))
    photo[ball] = (255, 0, 0)
    green = np.zeros_like(photo)
    green[..., 1] = 255
    scene = stage(photo, ball, background_image=green, feather=2.0)
    rendered = scene.render(vs.EditedImage("on green", (AT("dog", scale=scale),), "other"))
    assert rendered[..., 2].max() <= 1
    assert rendered[40, 45].tolist() == [255, 0, 0]


def test_scaled_and_mirrored_is_mirrored_and_scaled() -> None:
    photo = photo_of("bytes")
    flipped = np.ascontiguousarray(photo[:, ::-1])
    from_original = stage(photo, CAT).render(vs.EditedImage("a", (AT("dog", scale=1.5, mirrored=True),)))
    # In the mirrored photo the centre of the cat is (56 − 37, 16.5), and the cat is mirrored already.
    from_flipped = stage(flipped, CAT[:, ::-1], fill="mean").render(
        vs.EditedImage("a", (AT("dog", (37.0, 16.5), 1.5),))
    )
    inner = (slice(12, 20), slice(29, 45))
    assert np.abs(from_original[inner].astype(int) - from_flipped[inner].astype(int)).max() <= 1


def test_places_on_a_smaller_stage_are_in_pixels_of_the_photo() -> None:
    photo = noise(HEIGHT, WIDTH)
    large = [boxed(2 * HEIGHT, 2 * WIDTH, (60, 24, 28, 18))]
    small_stage = Stage(photo, objects(*large), (2 * WIDTH, 2 * HEIGHT), feather=0.0)
    full_stage = stage(photo, CAT, feather=0.0)
    assert small_stage.factor == (0.5, 0.5)
    assert small_stage.size_of("dog", 0.5) == (14.0, 9.0)
    for centre, scaled_centre in (((40.0, 40.0), (20.0, 20.0)), ((74.0, 33.0), (37.0, 16.5)), (None, None)):
        rendered = small_stage.render(vs.EditedImage("moved", (AT("dog", centre),)))
        assert np.array_equal(rendered, full_stage.render(vs.EditedImage("moved", (AT("dog", scaled_centre),))))


def test_objects_in_front_reduce_the_shares_of_objects_behind() -> None:
    photo = photo_of("bytes")
    scene = stage(photo, DOG, CAT, feather=0.0)
    apart = scene.shares(vs.EditedImage("unmoved", (AT("dog"), AT("cat"))))
    assert np.array_equal(apart["dog"] > 0, DOG)
    assert np.array_equal(apart["cat"] > 0, CAT)
    over = scene.shares(vs.EditedImage("over", (AT("cat"), AT("dog", (37.0, 16.5)))))
    moved_mask = np.roll(DOG, (1, 25), (0, 1))
    assert np.array_equal(over["dog"] > 0, moved_mask)
    assert np.array_equal(over["cat"] > 0, CAT & ~moved_mask)
    soft = stage(photo, DOG, CAT, feather=2.0).shares(vs.EditedImage("soft", (AT("cat"), AT("dog", (37.0, 16.5)))))
    assert (soft["cat"] + soft["dog"]).max() <= 1 + 1e-6
    assert soft["dog"][:, 25:] == pytest.approx(slow.opacity(moved_mask, 2.0)[:, 25:], abs=1e-6)


# Fillings

HOLE = boxed(30, 44, (14, 10, 12, 9))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("method", ["inpaint", "mean", "blur", "grey", "black", "noise", 7, (1, 2, 3), noise(9, 9)])
def test_filling_changes_only_the_hole(method: Any, dtype: type) -> None:
    photo = noise(30, 44).astype(dtype)
    filled = fill_hole(photo, HOLE, method, 0)
    assert filled.dtype == dtype
    assert np.array_equal(filled[~HOLE], photo[~HOLE])
    assert (filled[HOLE] != photo[HOLE]).any(-1).mean() > 0.9


@pytest.mark.parametrize("method", ["inpaint", "mean", "blur"])
@pytest.mark.parametrize("corner", [False, True], ids=["inside", "corner"])
def test_the_filling_of_a_constant_image_is_the_constant(method: str, corner: bool) -> None:
    photo, hole = np.empty((30, 44, 3), np.float32), boxed(30, 44, (0, 0, 20, 18)) if corner else HOLE
    photo[:] = (20.0, 130.5, 251.0)
    spoilt = photo.copy()
    spoilt[hole] = 77
    np.testing.assert_allclose(fill_hole(spoilt, hole, method, 0), photo, atol=1e-2)
    assert np.abs(fill_hole(spoilt.astype(np.uint8), hole, method, 0).astype(int) - photo.astype(np.uint8)).max() <= 1


def test_the_inpainting_of_a_ramp_is_the_ramp() -> None:
    rows, columns = np.mgrid[:30, :44].astype(np.float32)
    ramp = np.stack([3 * columns + 20, 5 * rows + 2 * columns, 200 - 4 * rows], -1)
    spoilt = ramp.copy()
    spoilt[HOLE] = 0
    np.testing.assert_allclose(fill_hole(spoilt, HOLE, "inpaint", 0), ramp, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("box", [(14, 10, 12, 9), (0, 0, 9, 12), (30, 20, 14, 10)], ids=str)
def test_inpainting_equals_the_slow_twin(box: tuple[int, int, int, int]) -> None:
    """At a corner, the slopes of the rim would exceed its colours."""
    hole = boxed(30, 44, box)
    ramp = np.mgrid[:30, :44].sum(0)[..., None].astype(np.float32) * 3
    for photo in (noise(30, 44).astype(np.float32), ramp + noise(30, 44) / np.float32(20)):
        np.testing.assert_allclose(fill_hole(photo, hole, "inpaint", 0), slow.inpainted(photo, hole), atol=0.01)


def test_inpainting_is_no_brighter_or_darker_than_the_rim() -> None:
    photo = noise(30, 44)
    rim = slow.hole(HOLE, backgrounds.RIM_WIDTH) & ~HOLE
    filled = fill_hole(photo, HOLE, "inpaint", 0)[HOLE]
    assert (filled >= photo[rim].min(0)).all()
    assert (filled <= photo[rim].max(0)).all()
    assert filled.std(0).min() > 1


@pytest.mark.parametrize("kind", ["constant", "ramp"])
def test_a_large_hole_is_inpainted_on_a_smaller_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backgrounds, "MAX_INPAINTED_PIXELS", 300)
    rows, columns = np.mgrid[:60, :88].astype(np.float32)
    plane = np.full((60, 88), 70.0, np.float32) if kind == "constant" else 2 * columns + rows
    photo = np.repeat(plane[..., None], 3, -1)
    hole = boxed(60, 88, (24, 18, 40, 24))
    spoilt = photo.copy()
    spoilt[hole] = 255
    filled = fill_hole(spoilt, hole, "inpaint", 0)
    assert np.array_equal(filled[~hole], photo[~hole])
    np.testing.assert_allclose(filled, photo, atol=0.01 if kind == "constant" else 4)


def test_a_hole_above_the_limit_of_inpainting_is_filled() -> None:
    photo = painted(260, 260)
    filled = fill_hole(photo, boxed(260, 260, (20, 20, 200, 200)), "inpaint", 0)
    assert np.abs(filled.astype(int) - photo).max() <= 1


def test_a_hole_from_edge_to_edge_is_inpainted() -> None:
    photo = np.repeat((np.arange(20) * 10)[:, None, None], 30, 1).repeat(3, 2).astype(np.uint8)
    for hole in (boxed(20, 30, (0, 1, 30, 19)), boxed(20, 30, (0, 6, 30, 8)), boxed(20, 30, (1, 0, 29, 20))):
        filled = fill_hole(photo, hole, "inpaint", 0)
        assert np.array_equal(filled[~hole], photo[~hole])
        assert filled[hole].max() <= 190


def test_the_mean_is_that_of_the_visible_pixels() -> None:
    photo = noise(30, 44)
    expected = photo[~HOLE].astype(float).mean(0).round()
    assert (fill_hole(photo, HOLE, "mean", 0)[HOLE] == expected).all()


def test_blurring_spreads_nearby_colours_into_the_hole() -> None:
    photo = np.zeros((60, 90, 3), np.uint8)
    photo[:, 45:] = 200
    hole = boxed(60, 90, (35, 20, 20, 20))
    filled = fill_hole(photo, hole, "blur", 0)[30, 35:55, 0].astype(int)
    assert (np.diff(filled) >= 0).all()
    assert filled[0] < 60
    assert filled[-1] > 140


def test_noise_depends_on_the_seed() -> None:
    photo = noise(30, 44)
    first, again, different = (fill_hole(photo, HOLE, "noise", seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, different)


# Backgrounds


def test_blank_is_the_mean_colour_and_blurred_is_a_gaussian_blur() -> None:
    photo = noise(48, 64)
    blank = make_background(photo, "blank", None, 0)
    assert np.array_equal(blank, np.broadcast_to(photo.astype(float).mean((0, 1)).round(), photo.shape))
    sigma = 4 * 5 / 224 * 48
    expected = gaussian(photo.astype(float), sigma=sigma, channel_axis=-1).round()
    assert np.array_equal(make_background(photo, "blurred", None, 0), expected.astype(np.uint8))
    assert make_background(photo, "own", None, 0) is photo


@pytest.mark.parametrize("size", [(48, 64), (50, 67), (5, 30)], ids=str)
def test_shuffling_keeps_all_tiles_in_another_order(size: tuple[int, int]) -> None:
    photo = noise(*size)
    tiles = min(8, *size)
    high, wide = size[0] // tiles, size[1] // tiles
    shuffled = make_background(photo, "shuffled", None, 3)

    def cut(image: np.ndarray) -> list[bytes]:
        corners = [(high * row, wide * column) for row in range(tiles) for column in range(tiles)]
        return [image[row : row + high, column : column + wide].tobytes() for row, column in corners]

    assert sorted(cut(shuffled)) == sorted(cut(photo))
    assert sum(tile == original for tile, original in zip(cut(shuffled), cut(photo), strict=True)) < tiles * tiles / 4
    assert np.array_equal(shuffled[high * tiles :], photo[high * tiles :])
    assert np.array_equal(shuffled[:, wide * tiles :], photo[:, wide * tiles :])
    assert np.array_equal(shuffled, make_background(photo, "shuffled", None, 3))
    assert not np.array_equal(shuffled, make_background(photo, "shuffled", None, 4))


def test_another_background_is_cropped_to_the_photos_proportions(tmp_path: Path) -> None:
    photo, image = noise(20, 40), np.zeros((60, 60, 3), np.uint8)
    image[15:45] = 200  # the middle half is what is left of a square
    Image.fromarray(image).save(tmp_path / "other.png")
    for source in (image, tmp_path / "other.png", str(tmp_path / "other.png"), Image.fromarray(image)):
        assert np.abs(make_background(photo, "other", source, 0)[4:-4].astype(int) - 200).max() <= 1
    grass = make_background(photo.astype(np.float32), "other", None, 0)
    assert grass.dtype == np.float32
    assert grass.std() > 5


# Invalid arguments

REFUSED: list[tuple[vs.EditedImage, str]] = [
    (vs.EditedImage("x", (AT("cow"),)), "no object 'cow' in this image: choose dog, cat"),
    (vs.EditedImage("x", background="night"), "x: unknown background 'night': choose own, blank, blurred"),
    (vs.EditedImage("x", (AT("dog"), AT("dog", (30.0, 20.0)))), r"x: an object is shown twice \(dog, dog\)"),
    (vs.EditedImage("x", (AT("dog", scale=0.0),)), "the scale of dog is 0.0, but must be above 0"),
    (vs.EditedImage("x", (AT("dog", scale=-1.0),)), "the scale of dog is -1.0"),
    (vs.EditedImage("x", (AT("dog", scale=float("nan")),)), "the scale of dog is nan"),
    (vs.EditedImage("x", (AT("dog", scale=float("inf")),)), "the scale of dog is inf"),
    (vs.EditedImage("x", (AT("dog", scale=0.1),)), "dog at scale 0.1 is 1×2 pixels, which is too small to be seen"),
    (vs.EditedImage("x", (AT("dog", scale=3.0),)), r"does not fit around \(12, 16\) in the image of 56×40"),
    (vs.EditedImage("x", (AT("dog", (2.0, 20.0)),)), r"does not fit around \(2, 20\)"),
    (vs.EditedImage("x", (AT("dog", (54.0, 20.0)),)), "does not fit around"),
    (vs.EditedImage("x", (AT("dog", (20.0, 3.0)),)), "does not fit around"),
    (vs.EditedImage("x", (AT("dog", (20.0, 38.0)),)), "choose a smaller scale or another place"),
    (vs.EditedImage("x", (AT("dog", (float("nan"), 20.0)),)), "dog"),
    (vs.EditedImage("x", (AT("dog", (20.0, float("nan"))),)), "dog"),
    (vs.EditedImage("x", (AT("dog", (float("inf"), 20.0)),)), "dog"),
]


@pytest.mark.parametrize(("edited_image", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_invalid_edited_images_are_refused_in_one_line(edited_image: vs.EditedImage, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        stage(photo_of("bytes"), DOG, CAT).prepare(edited_image)
    assert "\n" not in str(caught.value)


def test_a_place_half_a_pixel_beyond_the_edge_is_allowed() -> None:
    scene = stage(photo_of("bytes"), CAT)
    edge = vs.EditedImage("edge", (AT("dog", (49.4, 20.0)),))
    scene.prepare(edge)
    assert scene.render(edge).shape == (HEIGHT, WIDTH, 3)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"feather": -1.0}, r"feather is -1.0: pass 0 to 10 pixels \(a quarter of the shorter side\)"),
    ({"feather": 10.5}, "feather is 10.5: pass 0 to 10"),
    ({"feather": float("nan")}, "feather is nan"),
    ({"feather": "soft"}, "feather is 'soft'"),
    ({"fill": "inpant"}, "fill is 'inpant': choose inpaint, mean, blur"),
    ({"fill": "drop"}, "fill is 'drop', but a hole needs pixels"),
    ({"fill": 300}, "a colour is one number or three, each from 0 to 255"),
    ({"fill": "nowhere.png"}, "nowhere.png does not exist"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_invalid_options_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        stage(photo_of("bytes"), DOG, **options)
    assert "\n" not in str(caught.value)


def test_objects_that_leave_no_background_are_refused() -> None:
    left_half, right_half = boxed(40, 56, (0, 0, 27, 40)), boxed(40, 56, (28, 0, 27, 40))
    with pytest.raises(
        vs.CallError, match=r"dog and cat and a margin cover 100% of the image, so no background is left"
    ):
        stage(photo_of("bytes"), left_half, right_half)
    with pytest.raises(vs.CallError, match=r"dog is too small in this image of 560×400 pixels"):
        Stage(photo_of("bytes"), objects(boxed(400, 560, (95, 100, 12, 90))), (560, 400))
