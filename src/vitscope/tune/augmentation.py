"""Changes to training images, drawn anew for every image and epoch from its own random numbers."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

Photo = np.ndarray  # (height, width, 3) bytes

SHIFT = 1 / 8  # of a side
CROP_AREA, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
LIGHT = 0.2


def changed(photo: Photo, changes: Sequence[str], seed: int, epoch: int, at: int) -> Photo:
    """The image with these changes; the same seed, epoch and place give the same image, in whatever order asked."""
    generator = np.random.default_rng((seed, epoch, at))
    for change in changes:
        photo = CHANGES[change](photo, generator)
    return photo


def _mirror(photo: Photo, generator: np.random.Generator) -> Photo:
    return photo[:, ::-1] if generator.random() < 0.5 else photo


def _shift(photo: Photo, generator: np.random.Generator) -> Photo:
    """Moved by up to an eighth of each side; what comes in is the mirrored edge."""
    height, width = photo.shape[:2]
    down, across = max(round(height * SHIFT), 1), max(round(width * SHIFT), 1)
    wide = np.pad(photo, ((down, down), (across, across), (0, 0)), mode="reflect")
    top, left = generator.integers(0, 2 * down + 1), generator.integers(0, 2 * across + 1)
    return wide[top : top + height, left : left + width]


def _crop(photo: Photo, generator: np.random.Generator) -> Photo:
    """A part of random size and proportions, made as large as the whole."""
    height, width = photo.shape[:2]
    area = generator.uniform(*CROP_AREA) * height * width
    ratio = np.exp(generator.uniform(*np.log(CROP_RATIO)))
    rows = min(max(round(np.sqrt(area / ratio)), 1), height)
    columns = min(max(round(np.sqrt(area * ratio)), 1), width)
    top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
    part = Image.fromarray(np.ascontiguousarray(photo[top : top + rows, left : left + columns]))
    return np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))


def _light(photo: Photo, generator: np.random.Generator) -> Photo:
    """Brightness and contrast times a random factor around one."""
    brightness, contrast = generator.uniform(1 - LIGHT, 1 + LIGHT, 2)
    values = photo.astype(np.float32) * brightness
    mean = values.mean()
    return ((values - mean) * contrast + mean).round().clip(0, 255).astype(np.uint8)


CHANGES: Mapping[str, Callable[[Photo, np.random.Generator], Photo]] = {
    "mirror": _mirror,
    "shift": _shift,
    "crop": _crop,
    "light": _light,
}
