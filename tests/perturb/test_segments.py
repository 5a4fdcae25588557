"""Segments of a photo: quickshift, slic, patches and given labels."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.helpers.perturbed import CROPS, cut, family, noise, squares, view_of
from vitscope.images.preprocessing import Preprocessing
from vitscope.perturb.masks import PixelMasks, SegmentMasks
from vitscope.perturb.rendering import subjects
from vitscope.perturb.segments import Segments, patch_points, segment


@pytest.fixture(scope="module")
def cat() -> np.ndarray:
    import skimage.data

    return np.asarray(Image.fromarray(skimage.data.chelsea()).resize((90, 60)))


def test_quickshift_equals_limes(cat: np.ndarray) -> None:
    lime = pytest.importorskip("lime.wrappers.scikit_image", reason="the reference is PyPI's lime 0.2.0.1")
    algorithm = lime.SegmentationAlgorithm("quickshift", kernel_size=4, max_dist=200, ratio=0.2, random_seed=5)
    expected = algorithm(cat)
    segments = cut(cat, "quickshift")
    assert np.array_equal(segments.labels, expected)
    assert np.array_equal(segments.index, expected)
    assert (segments.count, segments.name) == (len(np.unique(expected)), "quickshift")


def test_quickshift_is_called_with_limes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "vitscope.perturb.segments.quickshift", lambda _, **options: calls.append(options) or squares(6, 9, 3)
    )
    assert cut(noise(6, 9), "quickshift").count == 6
    assert calls == [{"kernel_size": 4, "max_dist": 200, "ratio": 0.2}]


def test_slic_makes_about_a_hundred_segments(cat: np.ndarray) -> None:
    segments = cut(cat, "slic")
    assert 40 <= segments.count <= 130
    assert segments.labels.min() == 0
    assert np.array_equal(np.unique(segments.index), np.arange(segments.count))
    assert segments.name == "slic"


@pytest.mark.parametrize("algorithm", ["quickshift", "slic"])
def test_a_large_photo_is_segmented_on_a_smaller_copy(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscope.perturb.segments.MAX_SEGMENTED_PIXELS", 1500)
    photo = np.zeros((60, 100, 3), np.uint8)
    photo[:, 50:] = 255
    segments = cut(photo, algorithm)
    assert segments.labels.shape == (60, 100)
    # No segment lies on both sides of the edge, which has the same place in the smaller copy.
    assert not set(np.unique(segments.index[:, :48])) & set(np.unique(segments.index[:, 52:]))


def test_given_labels_are_kept_and_counted() -> None:
    photo = noise(6, 9)
    labels = np.array([7, -3, 100])[np.arange(9) // 3] * np.ones((6, 1), dtype=int)
    for segmentation in (labels, labels.tolist(), labels.astype(float), labels.astype(np.int16), lambda _: labels):
        segments = cut(photo, segmentation)
        assert np.array_equal(segments.labels, labels)
        assert segments.count == 3
        # −3, 7, 100: in the order of the labels, not of their positions.
        assert np.array_equal(segments.index[0], [1, 1, 1, 0, 0, 0, 2, 2, 2])
        assert segments.sizes.tolist() == [18, 18, 18]


def test_a_function_receives_the_photo() -> None:
    photo, photos = noise(6, 9), []

    def halves(image: np.ndarray) -> np.ndarray:
        photos.append(image)
        return squares(6, 9, 5)

    assert cut(photo, halves).name == "halves"
    assert np.array_equal(photos[0], photo)


def test_segments_of_a_smaller_copy_have_the_same_positions() -> None:
    segments = cut(noise(8, 12), squares(8, 12, 4))
    assert segments.resized((8, 12)) is segments
    small = segments.resized((4, 6))
    assert np.array_equal(small.index, squares(4, 6, 2))
    assert small.count == segments.count


@pytest.mark.parametrize("size", [(64, 96), (90, 60), (33, 47), (40, 60)], ids=str)
@pytest.mark.parametrize("recipe", CROPS.values(), ids=CROPS)
def test_patches_lie_on_the_token_grid(recipe: Preprocessing, size: tuple[int, int]) -> None:
    """The colour of each pixel encodes its patch, and the model's input has that colour in the patch."""
    base = family("timm-vit").model()
    model = dataclasses.replace(base, preprocessing=dataclasses.replace(recipe, resample=Image.Resampling.NEAREST))
    (subject,) = subjects(model, noise(*size))
    segments = segment(subject.values, "patches", subject.view, vs.Grid(4, 6))
    assert (segments.count, segments.name) == (24, "patches")
    painted = np.repeat((segments.index + 1)[..., None].astype(np.uint8) * 5, 3, axis=2)
    recipe_of_bytes = dataclasses.replace(model.preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = (recipe_of_bytes(Image.fromarray(painted))[0][0].numpy() * 255).round() / 5 - 1
    expected = squares(32, 48, 8)
    inside = np.zeros((32, 48), dtype=bool)
    inside[2:-2, 2:-2] = True
    # The input is black beyond the photo. Away from borders the nearest pixels belong to the patch.
    for row in range(4):
        for column in range(6):
            centre = seen[8 * row + 3 : 8 * row + 5, 8 * column + 3 : 8 * column + 5]
            assert set(centre.ravel().tolist()) <= {float(expected[8 * row + 4, 8 * column + 4]), -1.0}
    if recipe is not CROPS["padded"]:
        assert np.mean(seen == expected) > 0.6
    # Outside the model's view no pixel has a patch, and inside every pixel has one.
    left, top, right, bottom = subject.view.box
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    visible = ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))
    assert np.array_equal(segments.index >= 0, visible)


def test_pixels_that_the_model_does_not_see_are_never_hidden() -> None:
    model = family("timm-vit").model()
    photo = noise(40, 90)
    result = vs.lime(model, photo, target=0, num_samples=60, segments="patches")
    unseen = result.index < 0
    assert bool(unseen.any())
    assert not unseen.all()
    assert not result.values[0][unseen].any()
    assert not result.regions(24, sign="both")[unseen].any()
    rows = np.zeros((1, 24), dtype=bool)
    visible = SegmentMasks(rows, Segments(result.index.numpy(), result.index.numpy(), 24, "patches")).visible(0)
    assert np.array_equal(visible, unseen.numpy())


def test_patches_that_do_not_fill_the_input_leave_a_margin() -> None:
    """37 pixels hold four patches of 8: the model does not see the rest."""
    model = dataclasses.replace(family("timm-vit").model(), preprocessing=Preprocessing((37, 50)))
    (subject,) = subjects(dataclasses.replace(model, forward=lambda pixels: pixels.mean((2, 3))), noise(37, 50))
    segments = segment(subject.values, "patches", subject.view, vs.Grid(4, 6))
    assert np.array_equal(segments.index[:32, :48], squares(32, 48, 8))
    assert (segments.index[32:] == -1).all()
    assert (segments.index[:, 48:] == -1).all()


def test_points_of_a_patch_lie_inside_it() -> None:
    photo = noise(64, 96)
    points = patch_points((64, 96), view_of(photo), vs.Grid(4, 6))
    assert points.shape == (24, 64)
    inside = squares(64, 96, 16).ravel()[points]
    assert np.array_equal(inside, np.arange(24)[:, None].repeat(64, 1))
    rows, columns = np.divmod(patch_points((24, 24), view_of(noise(24, 24)), vs.Grid(1, 1)), 24)
    assert (rows.mean(), columns.mean()) == (11.5, 11.5)
    half = patch_points((32, 48), view_of(photo), vs.Grid(4, 6))
    assert np.array_equal(squares(32, 48, 8).ravel()[half], inside)


def test_coverage_is_the_share_of_a_patch_in_each_segment() -> None:
    photo, labels = noise(16, 16), np.zeros((16, 16), int)
    labels[:, 4:] = 1
    labels[8:, 12:] = 2
    segments, points = cut(photo, labels), patch_points((16, 16), view_of(photo), vs.Grid(2, 2))
    expected = [[0.5, 0.5, 0], [0, 1, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]
    assert segments.coverage(points).tolist() == expected
    masks = SegmentMasks(np.array([[True, False, True], [False, True, False]]), segments)
    assert masks.patch_shares([0, 1], points).tolist() == [[0.5, 0, 0.5, 0.5], [0.5, 1, 0.5, 0.5]]
    pixels = PixelMasks(2, lambda index: masks.visible(index).astype(np.float32))
    assert pixels.patch_shares([0, 1], points).tolist() == masks.patch_shares([0, 1], points).tolist()


WRONG_SEGMENTS: list[tuple[Any, str]] = [
    ("voronoi", "unknown segments 'voronoi': choose quickshift, slic, patches"),
    ("patches", "the patches of this model are unknown"),
    (np.zeros((6, 9), int), "one segment only"),
    (lambda _: np.ones((6, 9), int), "one segment only"),
    (squares(9, 6, 3), "segment labels are 9×6, but the image is 6×9"),
    (np.arange(54), "segment labels are 54, but the image is 6×9"),
    (3, "segment labels are one number, but the image"),
    (squares(6, 9, 3) + 0.5, "segment labels are float64, whole numbers are expected"),
    (squares(6, 9, 3) > 2, "segment labels are bool, whole numbers are expected"),
    (np.full((6, 9), np.nan), "whole numbers are expected"),
]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    WRONG_SEGMENTS,
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_invalid_segments_are_refused(segmentation: Any, message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        cut(noise(6, 9), segmentation)
    assert "\n" not in str(caught.value)
