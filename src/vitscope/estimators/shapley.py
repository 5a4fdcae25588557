"""The regression of KernelSHAP (Lundberg & Lee, 2017): Shapley values from the outputs for coalitions."""

import numpy as np
from jaxtyping import Bool, Float, Int

from vitscope.estimators.cross_validation import held_out_r_squared
from vitscope.estimators.surrogate import by_column, r_squared


def shapley(
    rows: Bool[np.ndarray, "coalition segment"],
    kernel: Float[np.ndarray, " coalition"],
    outputs: Float[np.ndarray, "coalition label"],
    ends: Float[np.ndarray, "2 label"],
) -> tuple[Float[np.ndarray, "label segment"], Float[np.ndarray, " label"], Float[np.ndarray, " label"]]:
    """Return the weighted least-squares solution whose values add up to ``ends[1] − ends[0]``.

    The result of a class does not depend on the other classes, to the last bit.

    Args:
        rows: the coalitions, True for each visible segment.
        kernel: weight of each coalition.
        outputs: the model's output for each coalition.
        ends: the model's output if everything is hidden, and if nothing is.

    Returns:
        the values, the weighted R² of each class, and its weighted R² on coalitions that were left out of the fit
        together with their complement.
    """
    empty, full = ends
    masks, gains = rows.astype(np.float64), outputs - empty
    # Equal shares plus deviations that add up to zero: the smallest deviations that fit are the solution.
    equal = (full - empty) / masks.shape[1]
    root = np.sqrt(kernel)[:, None]
    sizes = masks.sum(1, keepdims=True)
    design = masks - sizes / masks.shape[1]
    inverse = np.linalg.pinv(root * design, rcond=np.finfo(np.float64).eps * max(design.shape))
    deviations = by_column(lambda column: inverse @ column, root * (gains - sizes * equal))
    values = equal + deviations
    residuals = gains - by_column(lambda column: masks @ column, values)
    total = kernel.sum()
    means = by_column(lambda column: kernel @ column, outputs) / total if total > 0 else 0.0
    held_out = held_out_r_squared(outputs, residuals, design, inverse.T * root, kernel, complements(rows))
    return values.T, r_squared(residuals, outputs - means, kernel), held_out


def complements(rows: Bool[np.ndarray, "coalition segment"]) -> Int[np.ndarray, " coalition"]:
    """Return a group for each coalition: equal coalitions and complements share one.

    A coalition and its complement are the same equation of the values, so they are left out together.
    """
    if not len(rows):
        return np.zeros(0, dtype=np.int64)
    same = np.where(rows[:, :1], rows, ~rows)
    return np.unique(np.packbits(same, axis=1), axis=0, return_inverse=True)[1].ravel()
