"""Arguments of compose: what is refused before the first prediction, and what may be written shorter."""

from typing import Any

import numpy as np
import pytest
import torch

import vitscope as vs
from tests.compositing.test_result import OBJECTS, PHOTO, composed, family
from tests.helpers.tiny import tiny_vit
from tests.reference import stage as slow
from tests.reference.stage import seeing

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tests": "sizes"}, "unknown test 'sizes': choose size, location, split, controls"),
    ({"tests": ("size", "place")}, "unknown test 'place'"),
    ({"tests": 5}, "test"),
    ({"scales": []}, r"scales is \[\]: pass numbers above 0"),
    ({"scales": [0.5, 0]}, "pass numbers above 0"),
    ({"scales": [-1]}, "pass numbers above 0"),
    ({"scales": ["half"]}, "a scale is 'half', a number"),
    ({"scales": [float("nan")]}, "a scale is nan"),
    ({"scales": [3.0]}, "object × 3: object at scale 3 is 48×30 pixels and does not fit"),
    ({"scales": [0.1]}, "object × 0.1: .* too small to be seen: choose a larger scale"),
    ({"places": 1}, "places is 1, at least 2"),
    ({"places": (3, 1)}, "places is 1, at least 2"),
    ({"places": (3, 3, 3)}, r"places is \(3, 3, 3\): pass rows and columns"),
    ({"places": 2.5}, "places is 2.5, a whole number"),
    ({"places": "many"}, "places is 'many'"),
    ({"location_scale": 0}, "location_scale is 0: pass a number above 0"),
    ({"location_scale": "half"}, "location_scale is 'half', a number"),
    (
        {"location_scale": 5.0},
        r"cannot move object: at scale 5 it is 80×50 pixels, and the model sees 56×40: .* well below 3.50",
    ),
    ({"fill": "inpant"}, "inpant"),
    ({"feather": 99.0}, "feather is 99.0: pass 0 to 10"),
    ({"background": "nowhere.png", "tests": "controls"}, "nowhere.png does not exist"),
    ({"output": "odds"}, "unknown output 'odds': choose logit, log_odds, probability, log_probability"),
    ({"target": "thing 33"}, "did you mean thing 3"),
    ({"target": 7}, "target 7 does not exist"),
    ({"batch_size": 0}, "batch_size is 0, at least 1"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 0.5}, "seed is 0.5, a whole number"),
    ({"progress": "yes"}, "progress is 'yes': pass True, False, or a function"),
    ({"edited_images": [vs.EditedImage("x", (vs.Placement("cow"),))]}, "no object 'cow'"),
    ({"edited_images": [vs.EditedImage("x"), vs.EditedImage("x")]}, "two edited images are called 'x'"),
    ({"edited_images": [vs.EditedImage("original")]}, "two edited images are called 'original'"),
    ({"edited_images": [vs.EditedImage("no object", (vs.Placement("object"),))], "tests": "controls"}, "'no object'"),
    ({"edited_images": [vs.EditedImage("x", (vs.Placement("object"),) * 2)]}, "an object is shown twice"),
    ({"edited_images": [vs.EditedImage("x", background="night")]}, "unknown background 'night'"),
    ({"objects": []}, "no object was marked"),
    ({"objects": (0, 0, 56, 40)}, "object is the whole image"),
    ({"objects": (50, 5, 10, 10)}, "reaches outside the image of 56×40"),
    ({"objects": {"a": (4, 6, 16, 10), "b": (10, 10, 9, 9)}}, "a and b overlap in 54 pixels"),
    ({"objects": np.zeros((40, 56), bool)}, "the mask of object is empty"),
    ({"objects": np.zeros((56, 40), bool)}, "is 56×40 \\(height×width\\), the image is 40×56"),
    ({"objects": (1, 1, 54, 38)}, "no background is left"),
    ({"image": [PHOTO, PHOTO]}, "compose takes one image, not 2"),
    ({"image": torch.zeros(2, 3, 32, 32)}, "compose takes one image, not 2"),
    ({"image": "nowhere.png"}, "nowhere.png does not exist"),
    ({"model": "vit-nano"}, r"a model is expected, from vitscope\.load"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_invalid_arguments_are_refused_before_the_first_prediction(options: dict[str, Any], message: str) -> None:
    arguments = {"model": None, "image": PHOTO, "objects": OBJECTS["a"], "places": 2} | options
    model, image, objects = (arguments.pop(name) for name in ("model", "image", "objects"))
    reports: list[int] = []
    arguments = {"progress": lambda *_: reports.append(1)} | arguments
    with pytest.raises(vs.CallError, match=message) as caught:
        vs.compose(vs.load(tiny_vit()) if model is None else model, image, objects, **arguments)
    assert "\n" not in str(caught.value)
    assert not reports


def test_one_edited_image_needs_no_list() -> None:
    image = vs.EditedImage("alone", (vs.Placement("a"),))
    assert composed(tests=(), edited_images=image).names == composed(tests=(), edited_images=[image]).names


def test_an_invalid_background_is_refused_even_if_no_test_uses_it() -> None:
    with pytest.raises(vs.CallError, match=r"nowhere.png does not exist"):
        composed(tests="split", background="nowhere.png")


def test_a_list_of_one_photo_is_one_photo() -> None:
    result = vs.compose(vs.load(tiny_vit()), [PHOTO], OBJECTS, tests="split")
    np.testing.assert_array_equal(result.outputs, composed(tests="split").outputs)


def test_rotary_positions_cannot_be_neutral() -> None:
    chosen = family("timm-dinov3")
    neutral = vs.EditedImage("nowhere", (vs.Placement("object"),), neutral=True)
    with pytest.raises(
        vs.UnsupportedModelError, match=r"nowhere: neutral positions are not supported for .*, because they are rotary"
    ):
        vs.compose(chosen.model(), PHOTO, OBJECTS["a"], tests=(), edited_images=[neutral])
    model = seeing(slow.share_of_red, 40, 56)
    with pytest.raises(
        vs.UnsupportedModelError,
        match=r"nowhere: neutral positions are not supported for .*, because it has none that are known",
    ):
        vs.compose(model, PHOTO, OBJECTS["a"], tests=(), edited_images=[neutral])
