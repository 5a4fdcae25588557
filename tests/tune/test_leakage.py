"""The check of a data set: copies, near copies, contradictions and damaged files, against a naive double loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import vitscope as vs
from tests.helpers.coloured import coloured_folder
from vitscope.errors import CallError, WorkError
from vitscope.tune import leakage
from vitscope.tune.data import Data, LabeledImages, load_data
from vitscope.tune.data_options import DataOptions
from vitscope.tune.leakage import check_data

SIDE = 48


def smooth(seed: int, side: int = SIDE) -> Image.Image:
    """Return an image with structure that survives saving: enlarged coarse noise."""
    coarse = np.random.default_rng(seed).integers(0, 200, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def data_of(train: list[Any], test: list[Any], classes: tuple[list[int], list[int]] | None = None) -> Data:
    """Return a data set in memory, by default of two classes in turn."""
    sources = [np.asarray(image) if isinstance(image, Image.Image) else image for image in (*train, *test)]
    labels = classes or ([i % 2 for i in range(len(train))], [i % 2 for i in range(len(test))])
    indices = np.arange(len(train)), len(train) + np.arange(len(test))
    splits = (LabeledImages(sources, index, np.asarray([*labels[0], *labels[1]])[index]) for index in indices)
    return Data("synthetic", ("no", "yes"), *splits)


def naive(data: Data, threshold: float) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return exact and near pairs, comparing every training image with every test image."""

    def grey(image: Image.Image) -> np.ndarray:
        return np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64).ravel()

    exact, near = [], []
    for a in range(len(data.train)):
        for b in range(len(data.test)):
            first, second = data.train.read(a), data.test.read(b)
            if first.size == second.size and np.array_equal(np.asarray(first), np.asarray(second)):
                exact.append((a, b))
                continue
            greys = grey(first), grey(second)
            if min(pixels.std() for pixels in greys) > 2 and np.corrcoef(*greys)[0, 1] >= threshold:
                near.append((a, b))
    return exact, near


def resaved(original: Image.Image, folder: Path) -> Image.Image:
    original.save(folder / "again.jpg", quality=80)
    with Image.open(folder / "again.jpg") as image:
        return image.convert("RGB")


COPIES: dict[str, Callable[[Image.Image, Path], Image.Image]] = {
    "jpeg": resaved,
    "larger": lambda image, _: image.resize((96, 96), Image.Resampling.BICUBIC),
    "smaller": lambda image, _: image.resize((32, 32), Image.Resampling.BICUBIC),
    "brighter": lambda image, _: ImageEnhance.Brightness(image).enhance(1.2),
    "contrast": lambda image, _: ImageEnhance.Contrast(image).enhance(0.7),
}
OTHERS: dict[str, Callable[[Image.Image, Path], Image.Image]] = {
    "mirrored": lambda image, _: ImageOps.mirror(image),
    "inverted": lambda image, _: ImageOps.invert(image),
    "turned": lambda image, _: image.rotate(90),
    "another": lambda *_: smooth(99),
}


@pytest.mark.parametrize("change", [*COPIES, *OTHERS])
def test_copies_are_near_duplicates_and_other_images_are_not(change: str, tmp_path: Path) -> None:
    images = [smooth(seed) for seed in range(4)]
    changed = (COPIES | OTHERS)[change](images[2], tmp_path)
    check = check_data(data_of(images, [smooth(50), changed]))
    assert check.exact == ()
    assert check.near == (((2, 1),) if change in COPIES else ())


def test_exact_and_near_pairs_match_a_double_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [smooth(seed) for seed in range(8)]
    train = [*images, images[0], smooth(3, 40)]
    test = [images[0], resaved(images[1], tmp_path), ImageOps.mirror(images[2]), smooth(3, 40), smooth(60)]
    data = data_of(train, test)
    for block in (2048, 3):
        monkeypatch.setattr("vitscope.tune.leakage.BLOCK", block)
        for threshold in (0.99, 0.6, 0.2):
            check = check_data(data, threshold=threshold)
            exact, near = naive(data, threshold)
            assert sorted(check.exact) == exact
            assert sorted(check.near) == near
    assert check_data(data).repeated == 1
    assert len(naive(data, 0.2)[1]) > len(naive(data, 0.99)[1])


def test_flat_images_can_be_exact_duplicates_but_not_near_ones() -> None:
    flat = [np.full((32, 32, 3), level, np.uint8) for level in (0, 100, 100, 255)]
    check = check_data(data_of(flat, [flat[1], np.full((32, 32, 3), 101, np.uint8)]))
    assert check.exact == ((1, 0), (2, 0))
    assert check.near == ()
    assert check.repeated == 1
    grain = np.kron(np.random.default_rng(0).integers(0, 3, (8, 8, 1)), np.ones((4, 4, 3))).astype(np.uint8)
    assert check_data(data_of([100 + grain, smooth(0)], [101 + grain, smooth(1)])).near == ()
    assert check_data(data_of([100 + 9 * grain, smooth(0)], [101 + 9 * grain, smooth(1)])).near == ((0, 0),)


def test_the_same_bytes_in_another_shape_are_another_image() -> None:
    flat = [np.full(shape, 7, np.uint8) for shape in ((4, 8, 3), (8, 4, 3), (2, 16, 3))]
    assert check_data(data_of([flat[0], flat[2]], [flat[1], flat[0]])).exact == ((0, 1),)


def test_copies_with_different_labels_are_contradictions() -> None:
    images = [smooth(seed) for seed in range(4)]
    brighter = ImageEnhance.Brightness(images[1]).enhance(1.1)
    classes = [0, 1, 0, 1], [1, 1, 0]
    check = check_data(data_of(images, [images[0], brighter, smooth(9)], classes))
    assert (check.exact, check.near, check.contradictions) == (((0, 0),), ((1, 1),), 1)
    record = check.as_json()
    assert record["contradictions"] == 1
    assert [(pair["train"], pair["test"], pair["exact"]) for pair in record["duplicates"]] == [
        ("image 0", "image 4", True),
        ("image 1", "image 5", False),
    ]
    assert record["classes"] == {"no": {"train": 2, "test": 1}, "yes": {"train": 2, "test": 2}}


def test_duplicates_are_dropped_from_train_only() -> None:
    images = [smooth(seed) for seed in range(6)]
    data = data_of(images, [images[0], ImageEnhance.Brightness(images[3]).enhance(1.1)])
    check = check_data(data)
    remaining = check.without_duplicates()
    assert remaining.train.index.tolist() == [1, 2, 4, 5]
    assert remaining.test.index.tolist() == data.test.index.tolist()
    with pytest.warns(
        vs.VitscopeWarning,
        match=r"^synthetic: 2 training images are also in the test set \(1 exact pair and 1 near\): ",
    ):
        assert len(check.clean_data().train) == 6
    assert check.clean_data(DataOptions(drop_duplicates=True)).train.index.tolist() == [1, 2, 4, 5]


def test_files_that_are_not_images_are_named_and_refused_or_skipped(tmp_path: Path) -> None:
    for name, seed in (("train", 0), ("test", 1)):
        coloured_folder(tmp_path / "d" / name, {"red": 4, "blue": 4}, seed)
    bad = [tmp_path / "d" / name for name in ("train/red/1.png", "train/blue/0.png", "test/red/3.png")]
    bad[0].write_bytes(bad[0].read_bytes()[:60])
    bad[1].write_bytes(b"")
    bad[2].write_bytes(b"a page of text")
    data = load_data(tmp_path / "d")
    steps: list[vs.Progress] = []
    check = check_data(data, progress=steps.append)
    assert steps == [vs.Progress("reading images", i + 1, 16) for i in range(16)]
    assert [(name, index) for name, index, _ in check.unreadable] == [("train", 0), ("train", 5), ("test", 7)]
    for path in bad:
        assert any(str(path) in reason for _, _, reason in check.unreadable)
    with pytest.raises(WorkError, match=r"^3 images of d cannot be read: .*repair, delete or skip them") as error:
        check.clean_data()
    assert "\n" not in str(error.value)
    with pytest.warns(vs.VitscopeWarning, match="3 images of d cannot be read: .*: skipped"):
        remaining = check.clean_data(DataOptions(unreadable="skip"))
    assert (remaining.train.index.tolist(), remaining.test.index.tolist()) == ([1, 2, 3, 4, 6, 7], list(range(8, 15)))
    assert check.without_unreadable().counts() == remaining.counts() == {"blue": (3, 4), "red": (3, 3)}


def test_the_mean_image_of_a_class_is_the_mean_of_its_readable_images() -> None:
    levels = [10, 20, 60, 30]
    images = [np.full((20, 30, 3), level, np.uint8) for level in levels]
    check = check_data(data_of(images, [smooth(0), smooth(1)]))
    assert check.means.shape == (2, 64, 64, 3)
    assert np.allclose(check.means[0], 35)
    assert np.allclose(check.means[1], 25)
    half = np.zeros((64, 64, 3), np.uint8)
    half[:, 32:] = 200
    (mean, _) = check_data(data_of([half, half], [half, half])).means
    assert np.array_equal(mean, half)
    empty = check_data(data_of([half, b"none", half, b"none"], [half, half])).means[1]
    assert np.isnan(empty).all()


def test_the_order_is_kept_with_more_images_than_threads() -> None:
    levels = np.random.default_rng(0).integers(0, 256, 150)
    images = [np.full((4, 4, 3), level, np.uint8) for level in levels]
    check = check_data(data_of(images, images[:3]))
    expected = [(a, b) for b in range(3) for a in range(150) if levels[a] == levels[b]]
    assert list(check.exact) == expected
    assert check.repeated == 150 - len(set(levels.tolist()))


@pytest.mark.parametrize("threshold", [-0.1, 1.01, float("nan")])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(CallError, match="threshold is"):
        check_data(data_of([smooth(0), smooth(1)], [smooth(2), smooth(3)]), threshold=threshold)


@pytest.mark.parametrize("block", [1, 7, 1 << 24])
def test_the_accuracy_of_looking_images_up_matches_a_plain_loop(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With copies the nearest image is the copy; without them it is the most similar other image."""
    monkeypatch.setattr(leakage, "BLOCK", block)
    train = [smooth(seed) for seed in range(9)]
    test = [resaved(train[2], tmp_path), train[5], smooth(50), smooth(51)]
    data = data_of(train, test, ([0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1]))
    greys = [
        np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64).ravel()
        for image in (*train, *test)
    ]
    similarity = np.corrcoef(greys)[9:, :9]
    with_copies = data.train.classes[similarity.argmax(1)] == data.test.classes
    similarity[:, [2, 5]] = -2
    without = data.train.classes[similarity.argmax(1)] == data.test.classes
    check = check_data(data)
    assert (check.nearest, check.nearest_without) == (with_copies.mean(), without.mean())
    assert with_copies[:2].all()


def test_a_data_set_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_text("no image")
    with pytest.raises(WorkError, match=r"has no image that can be read: .*0\.png is not an image"):
        check_data(load_data(tmp_path))
