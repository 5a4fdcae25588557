"""GrabCut (Rother, Kolmogorov & Blake, 2004), as OpenCV has it: the one file that knows OpenCV."""

import numpy as np
from jaxtyping import Bool, UInt8
from scipy.ndimage import binary_dilation, label

from vitscope.errors import CallError, ModelUnavailableError, warn

MAX_PIXELS = 400_000  # larger photos are refined on a smaller copy
ROUNDS = 5
MARGIN = 0.04  # how far beyond a rough outline the object may reach, as a share of the shorter side
LEAST_KEPT = 0.2  # of the rough outline: less is more likely a failure than an object


def refined(
    photo: UInt8[np.ndarray, "height width 3"], rough: Bool[np.ndarray, "height width"], name: str
) -> Bool[np.ndarray, "height width"]:
    """The object inside a rough outline, or a little beyond, told from its surroundings by colour.

    Crumbs are left out: the largest piece stays, and those at least a tenth as large.

    Raises:
        ModelUnavailableError: OpenCV is not installed.
        CallError: nothing of the object was found.
    """
    try:
        import cv2
    except ImportError as error:
        raise ModelUnavailableError(
            f"refine needs OpenCV ({error}): pip install 'vitscope[opencv]', or outline {name} by a polygon or a mask"
        ) from None
    height, width = rough.shape
    shrink = min((MAX_PIXELS / rough.size) ** 0.5, 1.0)
    size = (max(round(width * shrink), 2), max(round(height * shrink), 2))
    small = cv2.resize(np.ascontiguousarray(photo[..., ::-1]), size, interpolation=cv2.INTER_AREA)
    inside = cv2.resize(rough.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    reach = max(round(MARGIN * min(size)), 1)
    near = binary_dilation(inside, iterations=reach)
    marks = np.where(inside, cv2.GC_PR_FGD, np.where(near, cv2.GC_PR_BGD, cv2.GC_BGD)).astype(np.uint8)
    cv2.setRNGSeed(0)  # the colours are clustered from a random start
    cv2.grabCut(small, marks, None, np.zeros((1, 65)), np.zeros((1, 65)), ROUNDS, cv2.GC_INIT_WITH_MASK)
    found = _pieces((marks == cv2.GC_FGD) | (marks == cv2.GC_PR_FGD))
    kept = found.sum() / max(inside.sum(), 1)
    if not found.any():
        raise CallError(f"GrabCut found nothing of {name} in its outline: outline it by a polygon or a mask")
    if kept < LEAST_KEPT:
        warn(f"GrabCut kept {kept:.0%} of the outline of {name}: look at the figure, or outline it by a polygon")
    return cv2.resize(found.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0


def _pieces(found: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    pieces, _ = label(found)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.isin(pieces, np.flatnonzero(sizes >= max(sizes.max() / 10, 1)))
