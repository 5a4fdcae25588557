"""The pixels that replace hidden parts: means, colours, noise, blur and other images."""

from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.filters import gaussian

import vitscope as vs
from tests.helpers.perturbed import cut, noise, squares
from tests.reference import lime as slow
from vitscope.perturb.baselines import fill
from vitscope.perturb.segments import Segments


def test_the_mean_of_each_segment_is_truncated_to_bytes() -> None:
    photo, labels = noise(12, 12), squares(12, 12, 5)
    filling = fill(photo, "mean", cut(photo, labels), 0)
    assert filling.dtype == np.uint8
    assert np.array_equal(filling, slow.hidden(photo, labels, np.zeros(9, dtype=bool)))


def test_the_mean_without_segments_is_that_of_the_image() -> None:
    photo = noise(5, 7)
    filling = fill(photo, "mean", None, 0)
    assert np.array_equal(filling, np.broadcast_to(photo.mean((0, 1)).astype(np.uint8), photo.shape))


def test_the_mean_does_not_change_pixels_outside_all_segments() -> None:
    photo, index = noise(4, 4), np.full((4, 4), -1)
    index[:2], index[2] = 0, 1
    filling = fill(photo, "mean", Segments(index, index, 2, "labels"), 0)
    assert np.array_equal(filling[3], photo[3])
    assert np.array_equal(filling[0, 0], photo[:2].reshape(-1, 3).mean(0).astype(np.uint8))


@pytest.mark.parametrize(
    ("hide", "colour"),
    [
        ("black", (0, 0, 0)),
        ("grey", (128, 128, 128)),
        (0, (0, 0, 0)),
        (7, (7, 7, 7)),
        (255.0, (255, 255, 255)),
        ((1, 2, 3), (1, 2, 3)),
        ([9, 8, 7], (9, 8, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_colour_fills_the_image(hide: Any, colour: tuple[int, int, int], dtype: type) -> None:
    photo = noise(4, 6).astype(dtype)
    filling = fill(photo, hide, None, 0)
    assert filling.dtype == dtype
    assert np.array_equal(filling, np.broadcast_to(np.array(colour, dtype=dtype), photo.shape))


def test_noise_depends_on_the_seed() -> None:
    photo = np.zeros((20, 20, 3), np.uint8)
    first, again, reseeded = (fill(photo, "noise", None, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, reseeded)
    assert abs(first.mean() - 127.5) < 8
    assert (first.min(), first.max()) == (0, 255)


def test_blur_is_gaussian_relative_to_the_shorter_side() -> None:
    photo = noise(112, 150)
    expected = gaussian(photo.astype(float), sigma=2.5, channel_axis=-1)
    assert np.array_equal(fill(photo, "blur", None, 0), expected.astype(np.uint8))
    flat = np.full((30, 30, 3), 77, np.uint8)
    assert np.abs(fill(flat, "blur", None, 0).astype(int) - 77).max() <= 1


def test_another_image_is_resized_to_the_photo(tmp_path: Any) -> None:
    photo, larger = noise(10, 14), noise(20, 28, seed=1)
    expected = np.asarray(Image.fromarray(larger).resize((14, 10), Image.Resampling.BICUBIC))
    Image.fromarray(larger).save(tmp_path / "other.png")
    for hide in (larger, Image.fromarray(larger), tmp_path / "other.png", str(tmp_path / "other.png")):
        assert np.array_equal(fill(photo, hide, None, 0), expected)
    same = noise(10, 14, seed=2)
    assert np.array_equal(fill(photo, same, None, 0), same)


WRONG_HIDES: list[tuple[Any, str]] = [
    ("gray", "hide is 'gray': choose mean, black, grey, blur, noise, drop, a colour"),
    (256, "hide is 256: a colour is one number or three, each from 0 to 255"),
    (-1, "each from 0 to 255"),
    (float("nan"), "each from 0 to 255"),
    (True, "each from 0 to 255"),
    ((1, 2), "each from 0 to 255"),
    ((0, 0, 300), "each from 0 to 255"),
    (None, "hide is None: choose mean"),
    (np.zeros((4, 4), float), "choose mean"),
]


@pytest.mark.parametrize(("hide", "message"), WRONG_HIDES, ids=str)
def test_invalid_hides_are_refused(hide: Any, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        fill(noise(4, 6), hide, None, 0)
    assert "\n" not in str(caught.value)
