"""The valley between the norms of ordinary tokens and those of artefact tokens."""

import math

import numpy as np
from jaxtyping import Float
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks

MIN_BANDWIDTH = 0.06  # of the density of log-norms
MAX_DEPTH = 0.5  # density in the valley, as a share of the highest density to its right
MIN_RATIO = 2.0  # median norm above the valley, as a multiple of the median of all norms
MIN_TOKENS, MIN_SHARE = 10, 0.0005  # above the valley
CELLS = 20  # cells of the grid per bandwidth
REACH = 6.0  # of the kernel in bandwidths


def norm_valley(norms: Float[np.ndarray, " token"]) -> float | None:
    """Return the norm in the valley right of the bulk of norms; None if there is no such valley.

    The density of the log-norms is estimated with a Gaussian kernel. Its bandwidth is Silverman's, but at least 0.06.
    A minimum to the right of the median is a valley if the density there is at most half of the highest density to its
    right, if the median norm above it is at least twice the median of all norms, and if at least 10 tokens, and 0.05 %
    of all tokens, lie above it. Of several valleys, the deepest is taken; of several valleys
    without any norm within six bandwidths, the lowest.

    Args:
        norms: norms of all patches of all images. Norms of zero are ignored.
    """
    logs = np.log(norms[norms > 0].astype(np.float64))
    if len(logs) < MIN_TOKENS:
        return None
    centres, density = _density(logs)
    ordered, median = np.sort(logs), float(np.median(logs))
    highest_right = np.maximum.accumulate(density[::-1])[::-1]
    depths: dict[float, float] = {}
    for index in find_peaks(-density)[0]:  # of a flat minimum, the middle
        first = int(np.searchsorted(ordered, centres[index], side="right"))
        enough = len(logs) - first >= max(MIN_TOKENS, MIN_SHARE * len(logs))
        if (
            centres[index] > median
            and enough
            and density[index] <= MAX_DEPTH * highest_right[index]
            and np.median(ordered[first:]) >= median + math.log(MIN_RATIO)
        ):
            depths[math.exp(centres[index])] = density[index]
    return min(depths, key=lambda norm: depths[norm], default=None)


def _density(
    logs: Float[np.ndarray, " token"],
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Return the centres of a grid's cells and the density of the values in each, up to a constant factor."""
    lower, upper = np.percentile(logs, [25, 75])
    spread = min(float(logs.std()), float(upper - lower) / 1.34)
    bandwidth = max(0.9 * spread * len(logs) ** -0.2, MIN_BANDWIDTH)
    cell, margin = bandwidth / CELLS, REACH * bandwidth
    count = math.ceil((logs.max() - logs.min() + 2 * margin) / cell)
    edges = logs.min() - margin + cell * np.arange(count + 1)
    counts, _ = np.histogram(logs, edges)
    density = gaussian_filter1d(counts.astype(np.float64), CELLS, mode="constant", truncate=REACH)
    return (edges[:-1] + edges[1:]) / 2, density
