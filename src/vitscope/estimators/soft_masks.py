"""The map of RISE (Petsiuk et al., 2018): the mean of soft masks, weighted by the output for each."""

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image


def soft_mask(
    bits: Bool[np.ndarray, "cell cell"], shift: Float[np.ndarray, " 2"], size: tuple[int, int]
) -> Float[np.ndarray, "pixel_height pixel_width"]:
    """Return a mask in [0, 1]: a coarse grid, enlarged to one cell more per side than the image, then cropped.

    Args:
        bits: True for each visible cell.
        shift: first row and column of the crop, as shares of a cell.
        size: (height, width) of the mask.
    """
    cells = len(bits)
    cell = [-(-side // cells) for side in size]
    coarse = Image.fromarray(bits.astype(np.float32))
    enlarged = coarse.resize(((cells + 1) * cell[1], (cells + 1) * cell[0]), Image.Resampling.BILINEAR)
    top, left = (int(share * side) for share, side in zip(shift, cell, strict=True))
    return np.asarray(enlarged)[top : top + size[0], left : left + size[1]]


def mean_output_if_visible(
    bits: Bool[np.ndarray, "sample cell cell"],
    shifts: Float[np.ndarray, "sample 2"],
    outputs: Float[np.ndarray, " sample"],
    original: float,
    keep_probability: float,
    size: tuple[int, int],
) -> Float[np.ndarray, "height width"]:
    """Return the expected output given that a pixel is visible.

    Args:
        bits: visible cells of each mask.
        shifts: see :func:`soft_mask`.
        outputs: the model's output for each mask.
        original: the model's output for the unchanged image.
        keep_probability: probability that a cell is visible.
        size: (height, width) of the map.
    """
    if len(outputs) > 1 and bool((outputs == original).all()):
        # The mean of random masks has a pattern of its own, which would be all that the map shows.
        return np.full(size, float(original))
    total = np.zeros(size)
    for grid, shift, output in zip(bits, shifts, outputs, strict=True):
        total += output * soft_mask(grid, shift, size)
    return total / (len(outputs) * keep_probability)
