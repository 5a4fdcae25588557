"""Changes to training images, and the batches that a model is fed with."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.coloured import coloured, small_vit
from tests.helpers.every_model import case
from tests.helpers.tiny import photo
from vitscope.images.preprocessing import Preprocessing
from vitscope.tune import dataset as feeding
from vitscope.tune.augmentation import CHANGES, changed
from vitscope.tune.data import Data, LabeledImages
from vitscope.tune.dataset import FeatureDataset, ImageDataset, as_they_come

PHOTO = np.asarray(photo(40, 24))
each_change = pytest.mark.parametrize("change", CHANGES)


def photos(count: int = 6) -> LabeledImages:
    """Of several sizes."""
    sources = [np.asarray(photo(40 + 3 * i, 50 - 2 * i, i)) for i in range(count)]
    return LabeledImages(sources, np.arange(count)[::-1].copy(), np.arange(count) % 2)


@each_change
def test_a_change_hangs_on_seed_epoch_and_place_alone(change: str) -> None:
    first = changed(PHOTO, [change], 3, 1, 7)
    np.random.seed(0)
    changed(PHOTO, [change], 3, 2, 7)
    assert np.array_equal(changed(PHOTO, [change], 3, 1, 7), first)
    for vary in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        others = [changed(PHOTO, [change], *(np.add(vary, (0, 100 * i, 0)).tolist())) for i in range(4)]
        assert any(not np.array_equal(other, first) for other in others)


@each_change
def test_a_change_keeps_size_and_kind_and_really_changes(change: str) -> None:
    made = [changed(PHOTO, [change], 0, 0, at) for at in range(40)]
    assert all(one.shape == PHOTO.shape and one.dtype == np.uint8 for one in made)
    others = sum(not np.array_equal(one, PHOTO) for one in made)
    assert (10 < others < 30) if change == "mirror" else others > 30
    assert len({one.tobytes() for one in made}) > (1 if change == "mirror" else 25)


def test_each_change_does_what_it_says() -> None:
    mirrored = {changed(PHOTO, ["mirror"], 0, 0, at).tobytes() for at in range(20)}
    assert mirrored == {PHOTO.tobytes(), PHOTO[:, ::-1].tobytes()}
    wide = np.pad(PHOTO, ((3, 3), (5, 5), (0, 0)), mode="reflect")
    parts = {wide[i : i + 24, j : j + 40].tobytes(): (i, j) for i in range(7) for j in range(11)}
    shifts = {parts[changed(PHOTO, ["shift"], 0, 0, at).tobytes()] for at in range(300)}
    assert {i for i, _ in shifts} == set(range(7))
    assert {j for _, j in shifts} == set(range(11))
    grey = np.full((8, 8, 3), 100, np.uint8)
    levels = [int(changed(grey, ["light"], 0, 0, at)[0, 0, 0]) for at in range(200)]
    assert 80 <= min(levels) < 84
    assert 116 < max(levels) <= 120
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))
    for one in (ramp, ramp.swapaxes(0, 1)):
        spans = [np.ptp(changed(one, ["crop"], 0, 0, at)[:, :, 0].astype(int)) / 252 for at in range(200)]
        assert 0.55 < min(spans) < 0.75
        assert max(spans) > 0.95


def test_changes_follow_one_another_and_none_leaves_the_image() -> None:
    assert np.array_equal(changed(PHOTO, [], 0, 0, 0), PHOTO)
    both = {changed(PHOTO, ["mirror", "light"], 0, 0, at).tobytes() for at in range(5)}
    assert len(both) == 5


@pytest.mark.parametrize("name", ["transformers-vit", "transformers-clip", "timm-vit", "torchvision-vit"])
def test_a_batch_is_what_the_model_prepares(name: str) -> None:
    model, images = case(name).model(), photos()
    assert model.preprocessing is not None
    feed = ImageDataset(images, model.preprocessing)
    for places in ([0, 1, 2, 3, 4, 5], [4, 0, 4]):
        batch = feed.__getitems__(places)
        expected, _ = model.prepare([images.read(at) for at in places])
        assert torch.equal(batch["pixel_values"], expected)
        assert batch["labels"].tolist() == [at % 2 for at in places]
    one = feed[3]
    assert torch.equal(one["pixel_values"], model.prepare(images.read(3))[0][0])
    assert len(feed) == 6


def test_a_feed_does_not_hang_on_order_or_on_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    images, settings = photos(), Preprocessing((16, 16))
    feeds = [ImageDataset(images, settings, changes=tuple(CHANGES), seed=5) for _ in range(2)]
    monkeypatch.setattr(feeding, "MOST_KEPT", 0)
    feeds.append(ImageDataset(images, settings, changes=tuple(CHANGES), seed=5))
    assert [feed._kept is None for feed in feeds] == [False, False, True]
    feeds[0].__getitems__([5, 1, 3])
    for feed in feeds:
        feed.set_epoch(2)
    batches = [feeds[0].__getitems__([0, 1, 2]), feeds[1].__getitems__([2, 0, 1]), feeds[2].__getitems__([1, 2, 0])]
    first, second, third = (batch["pixel_values"] for batch in batches)
    assert torch.equal(first, second[[1, 2, 0]])
    assert torch.equal(first, third[[2, 0, 1]])
    assert torch.equal(feeds[0].__getitems__([0, 1, 2])["pixel_values"], first)
    feeds[0].set_epoch(3)
    assert not torch.equal(feeds[0].__getitems__([0, 1, 2])["pixel_values"], first)
    other = ImageDataset(images, settings, changes=tuple(CHANGES), seed=6)
    other.set_epoch(2)
    assert not torch.equal(other.__getitems__([0, 1, 2])["pixel_values"], first)


def test_a_kept_image_is_read_once() -> None:
    reads: list[int] = []

    class Counting(list):
        def __getitem__(self, at: int) -> np.ndarray:
            reads.append(at)
            return super().__getitem__(at)

    images = photos()
    feed = ImageDataset(LabeledImages(Counting(images.source), images.index, images.classes), Preprocessing((16, 16)))
    for _ in range(3):
        feed.__getitems__([0, 1])
    assert reads == [5, 4]


def test_features_and_batches_come_as_they_are() -> None:
    feed = FeatureDataset(torch.arange(12.0).view(4, 3), np.array([1, 0, 2, 1]))
    assert len(feed) == 4
    batch = feed.__getitems__([2, 0])
    assert as_they_come(batch) is batch
    assert batch["features"].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert batch["labels"].tolist() == [2, 1]
    stacked = as_they_come([feed[2], feed[0]])
    assert torch.equal(stacked["features"], batch["features"])
    assert torch.equal(stacked["labels"], batch["labels"])


def test_a_loader_of_torch_takes_whole_batches() -> None:
    data: Data = coloured()
    model = small_vit()
    assert model.preprocessing is not None
    feed = ImageDataset(data.train, model.preprocessing)
    loader = torch.utils.data.DataLoader(feed, batch_size=5, collate_fn=as_they_come)
    batches = [batch["pixel_values"] for batch in loader]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]
    whole, _ = model.prepare([Image.fromarray(data.train.source[at]) for at in range(24)])
    assert torch.equal(torch.cat(batches), whole)
