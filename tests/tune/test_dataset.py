"""Augmentations of training images, and the batches that a model is trained on."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.coloured import coloured, small_vit
from tests.helpers.every_model import case
from tests.helpers.tiny import photo
from vitscope.images.preprocessing import Preprocessing
from vitscope.tune import dataset as dataset_module
from vitscope.tune.augmentation import AUGMENTATIONS, augment
from vitscope.tune.data import Data, LabeledImages
from vitscope.tune.dataset import FeatureDataset, ImageDataset, collate
from vitscope.tune.recipe import Augmentation

PHOTO = np.asarray(photo(40, 24))
each_augmentation = pytest.mark.parametrize("name", AUGMENTATIONS)


def photos(count: int = 6) -> LabeledImages:
    """Return photos of several sizes."""
    sources = [np.asarray(photo(40 + 3 * i, 50 - 2 * i, i)) for i in range(count)]
    return LabeledImages(sources, np.arange(count)[::-1].copy(), np.arange(count) % 2)


@each_augmentation
def test_an_augmentation_depends_on_seed_epoch_and_index_alone(name: Augmentation) -> None:
    first = augment(PHOTO, [name], 3, 1, 7)
    np.random.seed(0)
    augment(PHOTO, [name], 3, 2, 7)
    assert np.array_equal(augment(PHOTO, [name], 3, 1, 7), first)
    for arguments in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        results = [augment(PHOTO, [name], *(np.add(arguments, (0, 100 * i, 0)).tolist())) for i in range(4)]
        assert any(not np.array_equal(result, first) for result in results)


@each_augmentation
def test_an_augmentation_keeps_size_and_type_and_changes_pixels(name: Augmentation) -> None:
    results = [augment(PHOTO, [name], 0, 0, index) for index in range(40)]
    assert all(result.shape == PHOTO.shape and result.dtype == np.uint8 for result in results)
    num_changed = sum(not np.array_equal(result, PHOTO) for result in results)
    assert (10 < num_changed < 30) if name == "mirror" else num_changed > 30
    assert len({result.tobytes() for result in results}) > (1 if name == "mirror" else 25)


def test_each_augmentation_has_its_documented_range() -> None:
    mirrored = {augment(PHOTO, ["mirror"], 0, 0, index).tobytes() for index in range(20)}
    assert mirrored == {PHOTO.tobytes(), PHOTO[:, ::-1].tobytes()}
    padded = np.pad(PHOTO, ((3, 3), (5, 5), (0, 0)), mode="reflect")
    crops = {padded[i : i + 24, j : j + 40].tobytes(): (i, j) for i in range(7) for j in range(11)}
    shifts = {crops[augment(PHOTO, ["shift"], 0, 0, index).tobytes()] for index in range(300)}
    assert {i for i, _ in shifts} == set(range(7))
    assert {j for _, j in shifts} == set(range(11))
    grey = np.full((8, 8, 3), 100, np.uint8)
    levels = [int(augment(grey, ["light"], 0, 0, index)[0, 0, 0]) for index in range(200)]
    assert 80 <= min(levels) < 84
    assert 116 < max(levels) <= 120
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))
    for image in (ramp, ramp.swapaxes(0, 1)):
        spans = [np.ptp(augment(image, ["crop"], 0, 0, index)[:, :, 0].astype(int)) / 252 for index in range(200)]
        assert 0.55 < min(spans) < 0.75
        assert max(spans) > 0.95


def test_augmentations_are_applied_in_turn_and_none_keeps_the_image() -> None:
    assert np.array_equal(augment(PHOTO, [], 0, 0, 0), PHOTO)
    results = {augment(PHOTO, ["mirror", "light"], 0, 0, index).tobytes() for index in range(5)}
    assert len(results) == 5


@pytest.mark.parametrize("name", ["transformers-vit", "transformers-clip", "timm-vit", "torchvision-vit"])
def test_a_batch_equals_the_prepared_images(name: str) -> None:
    model, images = case(name).model(), photos()
    assert model.preprocessing is not None
    dataset = ImageDataset(images, model.preprocessing)
    for indices in ([0, 1, 2, 3, 4, 5], [4, 0, 4]):
        batch = dataset.__getitems__(indices)
        expected, _ = model.prepare([images.read(index) for index in indices])
        assert torch.equal(batch["pixel_values"], expected)
        assert batch["labels"].tolist() == [index % 2 for index in indices]
    item = dataset[3]
    assert torch.equal(item["pixel_values"], model.prepare(images.read(3))[0][0])
    assert len(dataset) == 6


def test_batches_depend_neither_on_order_nor_on_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    images, settings = photos(), Preprocessing((16, 16))
    datasets = [ImageDataset(images, settings, augmentations=tuple(AUGMENTATIONS), seed=5) for _ in range(2)]
    monkeypatch.setattr(dataset_module, "CACHE_BYTES", 0)
    datasets.append(ImageDataset(images, settings, augmentations=tuple(AUGMENTATIONS), seed=5))
    assert [dataset._cache is None for dataset in datasets] == [False, False, True]
    datasets[0].__getitems__([5, 1, 3])
    for dataset in datasets:
        dataset.set_epoch(2)
    batches = [
        datasets[0].__getitems__([0, 1, 2]),
        datasets[1].__getitems__([2, 0, 1]),
        datasets[2].__getitems__([1, 2, 0]),
    ]
    first, second, third = (batch["pixel_values"] for batch in batches)
    assert torch.equal(first, second[[1, 2, 0]])
    assert torch.equal(first, third[[2, 0, 1]])
    assert torch.equal(datasets[0].__getitems__([0, 1, 2])["pixel_values"], first)
    datasets[0].set_epoch(3)
    assert not torch.equal(datasets[0].__getitems__([0, 1, 2])["pixel_values"], first)
    other_seed = ImageDataset(images, settings, augmentations=tuple(AUGMENTATIONS), seed=6)
    other_seed.set_epoch(2)
    assert not torch.equal(other_seed.__getitems__([0, 1, 2])["pixel_values"], first)


def test_a_cached_image_is_read_once() -> None:
    reads: list[int] = []

    class Counting(list):
        def __getitem__(self, index: int) -> np.ndarray:
            reads.append(index)
            return super().__getitem__(index)

    images = photos()
    dataset = ImageDataset(
        LabeledImages(Counting(images.source), images.index, images.classes), Preprocessing((16, 16))
    )
    for _ in range(3):
        dataset.__getitems__([0, 1])
    assert reads == [5, 4]


def test_features_and_whole_batches_pass_unchanged() -> None:
    dataset = FeatureDataset(torch.arange(12.0).view(4, 3), np.array([1, 0, 2, 1]))
    assert len(dataset) == 4
    batch = dataset.__getitems__([2, 0])
    assert collate(batch) is batch
    assert batch["features"].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert batch["labels"].tolist() == [2, 1]
    stacked = collate([dataset[2], dataset[0]])
    assert torch.equal(stacked["features"], batch["features"])
    assert torch.equal(stacked["labels"], batch["labels"])


def test_a_torch_loader_returns_whole_batches() -> None:
    data: Data = coloured()
    model = small_vit()
    assert model.preprocessing is not None
    dataset = ImageDataset(data.train, model.preprocessing)
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, collate_fn=collate)
    batches = [batch["pixel_values"] for batch in loader]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 4]
    expected, _ = model.prepare([Image.fromarray(data.train.source[index]) for index in range(24)])
    assert torch.equal(torch.cat(batches), expected)
