"""Refinement of masks with OpenCV's GrabCut (Rother, Kolmogorov & Blake, 2004). No other file imports OpenCV."""

import numpy as np
from jaxtyping import Bool, UInt8
from scipy.ndimage import binary_dilation, label

from vitscope.errors import CallError, ModelUnavailableError, warn

MAX_PIXELS = 400_000  # larger photos are refined on a smaller copy
ROUNDS = 5
MARGIN = 0.04  # share of the image's shorter side by which the object may extend beyond the rough mask
SMALLEST_SHARE = 0.2  # of the rough mask: a smaller result is probably a failure
PIECE_RATIO = 10  # pieces smaller than the largest one divided by this are dropped


def refine_mask(
    photo: UInt8[np.ndarray, "height width 3"], rough_mask: Bool[np.ndarray, "height width"], name: str
) -> Bool[np.ndarray, "height width"]:
    """Return the object inside a rough mask, or slightly beyond it, separated from its surroundings by colour.

    Pieces smaller than a tenth of the largest one are dropped.

    Raises:
        ModelUnavailableError: OpenCV is not installed.
        CallError: nothing of the object was found.
    """
    try:
        import cv2
    except ImportError as error:
        raise ModelUnavailableError(
            f"refine needs OpenCV ({error}): pip install 'vitscope[opencv]', or mark {name} by a polygon or a mask"
        ) from None
    height, width = rough_mask.shape
    shrink = min((MAX_PIXELS / rough_mask.size) ** 0.5, 1.0)
    size = (max(round(width * shrink), 2), max(round(height * shrink), 2))
    small = cv2.resize(np.ascontiguousarray(photo[..., ::-1]), size, interpolation=cv2.INTER_AREA)
    inside = cv2.resize(rough_mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    reach = max(round(MARGIN * min(size)), 1)
    near = binary_dilation(inside, iterations=reach)
    marks = np.where(inside, cv2.GC_PR_FGD, np.where(near, cv2.GC_PR_BGD, cv2.GC_BGD)).astype(np.uint8)
    cv2.setRNGSeed(0)  # the clustering of colours starts at random
    cv2.grabCut(small, marks, None, np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_MASK)
    refined = _without_small_pieces((marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD))
    share = refined.sum() / max(inside.sum(), 1)
    if not refined.any():
        raise CallError(f"GrabCut found nothing of {name} inside its mask: mark it by a polygon or a finer mask")
    if share < SMALLEST_SHARE:
        warn(f"GrabCut kept only {share:.0%} of the mask of {name}: check the figure, or mark it by a polygon")
    return cv2.resize(refined.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0


def _without_small_pieces(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Return the connected pieces of a mask that are at least a tenth as large as the largest."""
    pieces, _ = label(mask)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.isin(pieces, np.flatnonzero(sizes >= max(sizes.max() / PIECE_RATIO, 1)))
