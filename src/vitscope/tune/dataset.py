"""Torch data sets of preprocessed images, and of the features that a frozen backbone computes from them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitscope.images.preprocessing import Preprocessing
from vitscope.tune.augmentation import augment
from vitscope.tune.data import LabeledImages
from vitscope.tune.recipe import Augmentation

CACHE_BYTES = 1 << 31  # images are kept in memory up to this size


class ImageDataset(Dataset[Any]):
    """Preprocessed images and their classes, read in whole batches.

    Args:
        images: the images and their classes.
        preprocessing: how the model crops, resizes and normalizes an image.
        augmentations: names of the augmentations. Their random numbers depend only on ``seed``, the epoch and the
            image's index, not on the order in which images are read or on where a run was interrupted.
        seed: random seed of the augmentations.
    """

    def __init__(
        self,
        images: LabeledImages,
        preprocessing: Preprocessing,
        *,
        augmentations: Sequence[Augmentation] = (),
        seed: int = 0,
    ) -> None:
        self.images, self.preprocessing, self.augmentations, self.seed = images, preprocessing, augmentations, seed
        self.epoch = 0
        height, width = preprocessing.size
        self._cache: dict[int, np.ndarray] | None = {} if len(images) * height * width * 3 <= CACHE_BYTES else None

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the augmentations depend on."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        crops = [augment(self._crop(index), self.augmentations, self.seed, self.epoch, index) for index in indices]
        pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        return {
            "pixel_values": self.preprocessing.normalized(pixels),
            "labels": torch.from_numpy(self.images.classes[indices]),
        }

    def _crop(self, index: int) -> np.ndarray:
        """Return an image at the model's input size, from the cache if possible."""
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        crop, _ = self.preprocessing.resize_and_crop(self.images.read(index))
        if self._cache is not None:
            self._cache[index] = crop
        return crop


class FeatureDataset(Dataset[Any]):
    """Features of a frozen backbone, computed once, with the class of each image."""

    def __init__(self, features: Tensor, classes: np.ndarray) -> None:
        self.features, self.classes = features, torch.from_numpy(classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"features": self.features[indices], "labels": self.classes[indices]}


def collate(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the batch. The data sets of this file return whole batches, which do not change."""
    if isinstance(batch, dict):
        return batch
    return {name: torch.stack([item[name] for item in batch]) for name in batch[0]}
