"""Images as a model takes them, batch by batch: read once, kept if there is room, changed anew in every epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vitscope.images.preprocessing import Preprocessing
from vitscope.tune.augmentation import changed
from vitscope.tune.data import LabeledImages

MOST_KEPT = 1 << 31  # bytes of images that are kept in memory


class ImageDataset(Dataset[Any]):
    """Preprocessed images and their classes; whole batches at a time.

    Args:
        changes: augmentations, drawn from ``seed``, the epoch and the image's place alone: nothing hangs on the
            order in which images are asked for, or on where a run was broken off.
    """

    def __init__(
        self, images: LabeledImages, preprocessing: Preprocessing, *, changes: Sequence[str] = (), seed: int = 0
    ) -> None:
        self.images, self.preprocessing, self.changes, self.seed = images, preprocessing, changes, seed
        self.epoch = 0
        height, width = preprocessing.size
        self._kept: dict[int, np.ndarray] | None = {} if len(images) * height * width * 3 <= MOST_KEPT else None

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([at]).items()}

    def __getitems__(self, places: list[int]) -> dict[str, Tensor]:
        cuts = [changed(self._cut(at), self.changes, self.seed, self.epoch, at) for at in places]
        bytes_ = torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2)
        return {
            "pixel_values": self.preprocessing.normalized(bytes_),
            "labels": torch.from_numpy(self.images.classes[places]),
        }

    def _cut(self, at: int) -> np.ndarray:
        if self._kept is not None and at in self._kept:
            return self._kept[at]
        cut, _ = self.preprocessing.cut(self.images.read(at))
        if self._kept is not None:
            self._kept[at] = cut
        return cut


class FeatureDataset(Dataset[Any]):
    """What a frozen backbone makes of the images, computed once."""

    def __init__(self, features: Tensor, classes: np.ndarray) -> None:
        self.features, self.classes = features, torch.from_numpy(classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([at]).items()}

    def __getitems__(self, places: list[int]) -> dict[str, Tensor]:
        return {"features": self.features[places], "labels": self.classes[places]}


def as_they_come(batch: dict[str, Tensor] | list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch is one already, from the feeds above."""
    if isinstance(batch, dict):
        return batch
    return {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
