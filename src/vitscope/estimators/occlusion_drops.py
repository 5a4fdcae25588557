"""The map of occlusion (Zeiler & Fergus, 2014): the mean drop of the output over the windows that hide a patch."""

import numpy as np
from jaxtyping import Bool, Float


def mean_drops(
    hidden: Bool[np.ndarray, "window patch"], outputs: Float[np.ndarray, " window"], original: float
) -> Float[np.ndarray, " patch"]:
    """Return the mean drop over the windows that cover each patch; 0 for a patch that none covers.

    Args:
        hidden: True if the window covers the patch.
        outputs: the model's output without each window.
        original: the model's output for the unchanged image.
    """
    return (original - outputs) @ hidden / np.maximum(hidden.sum(0), 1)
