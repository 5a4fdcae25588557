"""Augmentations of training images, which depend only on the seed, the epoch and the index of the image."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from vitscope.tune.recipe import Augmentation

Pixels = np.ndarray  # (height, width, 3) bytes

SHIFT = 1 / 8  # share of a side
CROP_AREA, CROP_RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
LIGHT = 0.2


def augment(pixels: Pixels, augmentations: Sequence[Augmentation], seed: int, epoch: int, index: int) -> Pixels:
    """Return the augmented image; the same seed, epoch and index give the same image in any order of calls."""
    generator = np.random.default_rng((seed, epoch, index))
    for name in augmentations:
        pixels = AUGMENTATIONS[name](pixels, generator)
    return pixels


def _mirror(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """Flip half of the images from left to right."""
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


def _shift(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """Shift by up to an eighth of each side; the mirrored edge fills the gap."""
    height, width = pixels.shape[:2]
    down, across = max(round(height * SHIFT), 1), max(round(width * SHIFT), 1)
    padded = np.pad(pixels, ((down, down), (across, across), (0, 0)), mode="reflect")
    top, left = generator.integers(0, 2 * down + 1), generator.integers(0, 2 * across + 1)
    return padded[top : top + height, left : left + width]


def _crop(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """Crop to a random area and aspect ratio, and resize the crop to the size of the image."""
    height, width = pixels.shape[:2]
    area = generator.uniform(*CROP_AREA) * height * width
    aspect_ratio = np.exp(generator.uniform(*np.log(CROP_RATIO)))
    rows = min(max(round(np.sqrt(area / aspect_ratio)), 1), height)
    columns = min(max(round(np.sqrt(area * aspect_ratio)), 1), width)
    top, left = generator.integers(0, height - rows + 1), generator.integers(0, width - columns + 1)
    crop = Image.fromarray(np.ascontiguousarray(pixels[top : top + rows, left : left + columns]))
    return np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))


def _light(pixels: Pixels, generator: np.random.Generator) -> Pixels:
    """Multiply brightness and contrast by random factors around 1."""
    brightness, contrast = generator.uniform(1 - LIGHT, 1 + LIGHT, 2)
    values = pixels.astype(np.float32) * brightness
    mean = values.mean()
    return ((values - mean) * contrast + mean).round().clip(0, 255).astype(np.uint8)


AUGMENTATIONS: Mapping[Augmentation, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "mirror": _mirror,
    "shift": _shift,
    "crop": _crop,
    "light": _light,
}
