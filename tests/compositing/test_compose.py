"""compose(): properties that hold for every model, and models whose outputs are known."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vitscope as vs
from tests.helpers import families
from tests.helpers.families import Family
from tests.helpers.tiny import tiny_vit
from tests.reference import stage as slow
from tests.reference.stage import boxed, noise, painted, seeing
from vitscope.images.preprocessing import Preprocessing

ALL_TESTS = ("size", "location", "split", "controls")


def family(name: str) -> Family:
    return next(family for family in families.ALL if family.name == name)


def outputs_of(model: vs.VisionModel, pixels: Tensor, *, logit: bool = False) -> np.ndarray:
    with torch.no_grad(), model.running():
        logits = model.logits(pixels)
    assert logits is not None
    return (logits if logit else logits.softmax(-1)).double().numpy()


# Unmoved objects

RECIPES = {
    "squash": Preprocessing((32, 48)),
    "crop": Preprocessing((32, 48), fit="crop", resize_to=(40, 60)),
    "unchanged": Preprocessing((50, 70)),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_unmoved_objects_leave_the_input_unchanged_to_the_bit(recipe: Preprocessing) -> None:
    inputs: list[Tensor] = []
    base = seeing(slow.share_of_red, *recipe.size)

    def forward(pixels: Tensor) -> Tensor | None:
        inputs.extend(pixels)
        return base.forward(pixels)

    model = dataclasses.replace(base, preprocessing=recipe, forward=forward)
    photo = noise(50, 70)
    unmoved = vs.EditedImage("unmoved", (vs.Placement("b", (31.0, 25.5)), vs.Placement("a")))
    objects = {"a": (3, 4, 20, 12), "b": (26, 20, 10, 11)}
    result = vs.compose(model, photo, objects, tests="size", scales=[1.0], edited_images=[unmoved])
    expected = model.prepare(photo)[0][0]
    assert len(inputs) == 5  # with the prediction for the photo itself
    assert all(torch.equal(pixels, expected) for pixels in inputs)
    assert all(np.array_equal(np.asarray(result.image(index)), photo) for index in range(4))


def test_unchanged_pixels_of_a_tensor_are_kept_to_the_bit() -> None:
    inputs: list[Tensor] = []
    base = vs.load(slow.Seeing(slow.share_of_red))
    assert base.preprocessing is None
    for model in (base, family("timm-vit").model()):

        def forward(pixels: Tensor, model: vs.VisionModel = model) -> Tensor | None:
            inputs.extend(pixels)
            return model.forward(pixels)

        inputs.clear()
        pixels = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 3
        edited_image = vs.EditedImage("moved", (vs.Placement("object", (36.0, 20.0)),))
        watched = dataclasses.replace(model, forward=forward)
        vs.compose(watched, pixels, (4, 5, 12, 9), tests=(), edited_images=[edited_image], feather=0)
        assert torch.equal(inputs[1], pixels[0])
        touched = torch.from_numpy(slow.hole(boxed(32, 48, (4, 5, 12, 9)), 1) | boxed(32, 48, (30, 16, 12, 9)))
        assert torch.equal(inputs[2][:, ~touched], pixels[0, :, ~touched])
        torch.testing.assert_close(inputs[2][:, 16:25, 30:42], pixels[0, :, 5:14, 4:16], atol=1e-4, rtol=1e-5)
        assert not torch.equal(inputs[2][:, 5:14, 4:16], pixels[0, :, 5:14, 4:16])


# Models whose outputs are known

LOGIT: dict[str, Any] = {"output": "logit", "target": 0, "feather": 0}


def test_the_map_of_a_model_that_ignores_places_is_flat() -> None:
    photo = painted(40, 56, (6, 9, 12, 10))
    model = seeing(slow.share_of_red, 40, 56)
    result = vs.compose(model, photo, (6, 9, 12, 10), tests=("location", "split"), places=(5, 6), **LOGIT)
    values = result.location_map().values
    assert values.shape == (1, 5, 6)
    np.testing.assert_allclose(values, 120 / 2240, atol=1e-6)
    soft = vs.compose(model, photo, (6, 9, 12, 10), tests="location", places=4, **(LOGIT | {"feather": 3.0}))
    values = soft.location_map().values
    assert float(values.max() - values.min()) < 1e-4
    assert result.value("object mirrored") == pytest.approx(120 / 2240, abs=1e-6)
    assert result.value("object left out") == pytest.approx(0, abs=1e-6)


def test_the_map_of_a_model_that_looks_at_the_centre_peaks_there() -> None:
    photo = painted(40, 56, (6, 9, 6, 4))
    model = seeing(slow.red_at_the_centre, 40, 56)
    result = vs.compose(model, photo, (6, 9, 6, 4), tests="location", places=(5, 7), **LOGIT)
    values = result.location_map().values[0].numpy()
    assert np.unravel_index(values.argmax(), values.shape) == (2, 3)
    assert values == pytest.approx(values[::-1, ::-1], abs=1e-3)
    assert (np.diff(values[2, :4]) > 0).all()
    assert (np.diff(values[:3, 3]) > 0).all()
    # Each place alone: the weight of the kernel under the box.
    for row in range(5):
        for column in range(7):
            left, top = column * (56 - 6) / 6, row * (40 - 4) / 4
            mask = boxed(40, 56, (round(left), round(top), 6, 4))
            pixels = np.where(mask[..., None], np.uint8(slow.RED), np.uint8(slow.GROUND))
            alone = outputs_of(model, model.prepare(pixels)[0], logit=True)
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


def test_scales_that_do_not_fit_are_skipped_by_default_and_refused_if_passed() -> None:
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
    centres = [image.show[-1].centre for image in result.edited_images[1:]]
    xs, ys = sorted({x for x, _ in centres}), sorted({y for _, y in centres})
    assert xs == pytest.approx([20, 26, 32, 38, 44])
    assert ys == pytest.approx([2, 16, 30])
    assert [image.place for image in result.edited_images[1:]] == [(i // 5, i % 5) for i in range(15)]
    assert result.visible_fraction("object") == 1
    cropped = vs.compose(model, photo, (10, 15, 8, 4), tests=(), **LOGIT)
    assert cropped.visible_fraction("object") == pytest.approx(2 / 8)  # of columns 10 to 17 the model sees 16 and 17
    assert cropped.as_json()["objects"][0]["visible_fraction"] == cropped.visible_fraction("object")
    location_map = result.location_map()
    np.testing.assert_allclose(location_map.values, 8 * 4 / 32 / 32, atol=1e-6)
    assert location_map.images[0].box == pytest.approx((17, -5, 47, 37))


def test_exchanged_objects_are_scaled_down_to_fit_the_models_view() -> None:
    recipe = Preprocessing((32, 32), fit="crop", resize_to=(32, 32))
    model = dataclasses.replace(seeing(slow.share_of_red, 32, 32), preprocessing=recipe)
    objects = {"a": (2, 3, 48, 8), "b": (20, 18, 10, 10)}
    result = vs.compose(model, noise(32, 64), objects, tests="split", **LOGIT)
    (image,) = [image for image in result.edited_images if "exchanged" in image.name]
    assert image.name == "a and b exchanged × 0.67"
    placed = {placement.name: placement for placement in image.show}
    assert placed["a"].scale == placed["b"].scale == pytest.approx(32 / 48)
    assert placed["a"].centre == pytest.approx((32, 23))  # as wide as the view, from 16 to 48
    assert placed["b"].centre == pytest.approx((26, 7))


def test_an_object_with_little_room_has_few_places() -> None:
    photo = painted(40, 56, (1, 10, 53, 8))
    options = {"tests": "location", "places": (3, 9)} | LOGIT
    result = vs.compose(seeing(slow.share_of_red, 40, 56), photo, (1, 10, 53, 8), **options)
    assert result.location_map().values.shape == (1, 3, 4)
    assert result.location_map().images[0].box == pytest.approx((26, -4, 30, 44))
    single = vs.compose(seeing(slow.share_of_red, 40, 56), painted(40, 56, (0, 9, 56, 8)), (0, 9, 56, 8), **options)
    assert single.location_map().values.shape == (1, 3, 1)


def test_a_larger_location_scale_moves_a_larger_object() -> None:
    photo = painted(80, 112, (20, 20, 20, 20))
    model = seeing(slow.share_of_red, 80, 112)
    result = vs.compose(model, photo, (20, 20, 20, 20), tests="location", places=3, location_scale=2, **LOGIT)
    np.testing.assert_allclose(result.location_map().values, 1600 / 8960, rtol=0.03)
    assert {image.show[-1].scale for image in result.edited_images[1:]} == {2.0}


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
    apart, exchanged = result.edited_images[1:3]
    assert {placement.name: (placement.centre, placement.scale) for placement in apart.show} == {
        "a": ((5.0, 14.0), 1.0),
        "b": ((54.0, 22.0), 1.0),
    }
    assert {placement.name: placement.centre for placement in exchanged.show} == {"a": (46.0, 22.0), "b": (9.0, 14.0)}
    assert [placement.mirrored for placement in result.edited_images[3].show] == [True, False]
    assert [placement.name for placement in result.edited_images[5].show] == ["b"]
    assert result.value("a left out") == pytest.approx(192 / 2400, abs=1e-6)
    assert result.value("a and b exchanged") == pytest.approx((80 + 192) / 2400, abs=1e-6)


def test_objects_too_large_to_be_apart_are_scaled_down() -> None:
    photo = painted(40, 60, (2, 3, 40, 15), (2, 20, 44, 18))
    objects = {"a": (2, 3, 40, 15), "b": (2, 20, 44, 18)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), photo, objects, tests="split", **LOGIT)
    apart = result.edited_images[1]
    assert apart.name == "a and b apart"  # one above the other, they fit
    wide = {"a": (0, 8, 25, 24), "b": (26, 10, 33, 22)}
    apart = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), wide, tests="split", **LOGIT).edited_images[1]
    scale = 0.95 * 60 / 58
    assert apart.name == f"a and b apart × {scale:.2f}"
    assert {placement.name: placement.centre for placement in apart.show} == {
        "a": pytest.approx((25 * scale / 2, 20.0)),
        "b": pytest.approx((60 - 33 * scale / 2, 21.0)),
    }


def test_objects_set_apart_move_to_their_nearest_edges() -> None:
    objects = {"right": (40, 14, 12, 16), "left": (4, 10, 10, 8)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="split")
    assert {placement.name: placement.centre for placement in result.edited_images[1].show} == {
        "left": (5.0, 14.0),
        "right": (54.0, 22.0),
    }


def test_objects_apart_or_exchanged_are_inside_the_models_view() -> None:
    """The model sees a centre crop, and one object is outside of it."""
    recipe = Preprocessing((40, 40), fit="crop", resize_to=(40, 40))
    model = dataclasses.replace(seeing(slow.share_of_red, 40, 40), preprocessing=recipe)
    objects = {"a": (2, 3, 10, 8), "b": (30, 80, 8, 14)}
    apart, exchanged = vs.compose(model, noise(100, 40), objects, tests="split").edited_images[1:3]
    assert {placement.name: placement.centre for placement in apart.show} == {"a": (5.0, 34.0), "b": (36.0, 63.0)}
    assert {placement.name: placement.centre for placement in exchanged.show} == {"a": (34.0, 66.0), "b": (7.0, 37.0)}
    wide = {"a": (80, 2, 14, 8), "b": (50, 20, 8, 14)}
    side_by_side = vs.compose(model, noise(40, 100), wide, tests="split").edited_images[1]
    assert all(30 <= placement.centre[0] <= 70 for placement in side_by_side.show)


def test_every_two_of_three_objects_are_split_and_the_third_does_not_move() -> None:
    objects = {"a": (2, 2, 8, 8), "b": (20, 12, 8, 8), "c": (40, 24, 8, 8)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="split")
    pairs = [name for name in result.names if " and " in name]
    assert pairs == [
        f"{a} and {b} {arrangement}" for a, b in ("ab", "ac", "bc") for arrangement in ("apart", "exchanged")
    ]
    assert all({placement.name for placement in image.show} == set("abc") for image in result.edited_images[1:7])


def test_controls_show_the_object_alone_on_every_background_and_at_every_place() -> None:
    objects = {"a": (4, 10, 10, 8), "b": (40, 14, 12, 16)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="controls", places=2)
    for name in "ab":
        alone = [result.edited_images[index] for index in result.select("controls", name, placed=False)]
        assert [(image.name, image.background) for image in alone] == [
            (f"{name} alone", "own"),
            (f"{name} on blank background", "blank"),
            (f"{name} on blurred background", "blurred"),
            (f"{name} on shuffled background", "shuffled"),
            (f"{name} on another background", "other"),
            (f"no {name}", "own"),
        ]
        assert [[placement.name for placement in image.show] for image in alone] == [[name]] * 5 + [
            ["b" if name == "a" else "a"]
        ]
        for setting in ("own", "blank"):
            placed = [
                result.edited_images[index]
                for index in result.select("controls", name, background=setting, placed=True)
            ]
            assert [image.place for image in placed] == [(0, 0), (0, 1), (1, 0), (1, 1)]
            assert all([placement.name for placement in image.show] == [name] for image in placed)
    assert not any(image.neutral for image in result.edited_images)


def test_custom_images_come_after_the_original() -> None:
    free = vs.EditedImage("both small", (vs.Placement("b", scale=0.5), vs.Placement("a", (30.0, 20.0), 0.5)), "blank")
    objects = {"a": (4, 10, 10, 8), "b": (40, 14, 12, 16)}
    result = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests="split", edited_images=[free])
    assert result.names[:3] == ["original", "both small", "a and b apart"]
    assert result.edited_images[1] is free
    only = vs.compose(seeing(slow.share_of_red, 40, 60), noise(40, 60), objects, tests=(), edited_images=[free])
    assert only.names == ["original", "both small"]


@pytest.mark.slow
def test_a_large_photo_is_edited_on_a_smaller_copy() -> None:
    photo = painted(1000, 1400, (600, 400, 200, 160))
    result = vs.compose(seeing(slow.share_of_red, 40, 56), photo, (600, 400, 200, 160), tests="size", **LOGIT)
    height, width = result.provenance["parameters"]["composed_at"]
    assert height * width == pytest.approx(400_000, rel=0.01)
    assert result.image(0).size == (width, height)
    curve = result.size_curve()
    assert curve.values == pytest.approx(curve.areas, rel=0.15)
    assert result.objects["object"].box == (600, 400, 200, 160)
    uncropped = vs.compose(vs.load(tiny_vit()), photo, (600, 400, 200, 160), tests="location", places=2)
    assert uncropped.view_of(0).photo.size == (width, height)
    assert uncropped.view_of(0).box == pytest.approx((0, 0, width, height))


def test_a_photo_smaller_than_the_input_works() -> None:
    photo = painted(20, 24, (8, 6, 6, 6))
    result = vs.compose(seeing(slow.share_of_red, 64, 96), photo, (8, 6, 6, 6), tests=ALL_TESTS, places=2, **LOGIT)
    assert np.isfinite(result.outputs).all()
    assert result.location_map().values == pytest.approx(np.full((1, 2, 2), 36 / 480), rel=0.2)
