"""R² on held-out samples: leave-one-out cross-validation of a linear fit, without fitting again."""

import numpy as np
from jaxtyping import Float, Int

# Below this, 1 − leverage is zero up to rounding: the other samples do not determine the prediction.
MIN_REMAINDER = 1e-6


def held_out_r_squared(
    outputs: Float[np.ndarray, "sample label"],
    residuals: Float[np.ndarray, "sample label"],
    left_factor: Float[np.ndarray, "sample term"],
    right_factor: Float[np.ndarray, "sample term"],
    sample_weights: Float[np.ndarray, " sample"],
    groups: Int[np.ndarray, " sample"],
) -> Float[np.ndarray, " label"]:
    """Return the weighted R² of each class, with each sample predicted by a fit without the samples of its group.

    The residual of a group from a fit without it is ``(1 − H)⁻¹ e``, with H the group's block of the hat matrix and e
    its residuals. 0 is as good as predicting the mean of the other samples; negative values are worse.

    Args:
        outputs: y.
        residuals: e, of the fit to all samples.
        left_factor: the hat matrix, whose product with y are the fitted outputs, is ``left_factor @ right_factor.T``.
        right_factor: see ``left_factor``.
        sample_weights: weight of each sample, at least 0.
        groups: group of each sample, from 0.

    Returns:
        NaN for a class whose outputs do not vary, and for all classes if a fit without a group is not determined, as
        with fewer samples than unknowns.
    """
    undetermined = np.full(outputs.shape[1], np.nan)
    if not len(outputs) or groups.max() == 0:
        return undetermined
    held_out = np.empty_like(residuals)
    counts = np.bincount(groups)
    order = np.argsort(groups, kind="stable")
    for size in np.unique(counts):
        # (group, member)
        members = order[np.isin(groups[order], np.flatnonzero(counts == size))].reshape(-1, size)
        remainders = np.eye(size) - np.einsum("gmt,gnt->gmn", left_factor[members], right_factor[members])
        if np.linalg.eigvals(remainders).real.min() < MIN_REMAINDER:
            return undetermined
        # Products by class: a system of several right sides would round each in dependence on the others.
        for column, errors in zip(residuals.T, held_out.T, strict=True):
            errors[members] = (np.linalg.inv(remainders) * column[members][:, None]).sum(-1)
    other_weights = (sample_weights.sum() - np.bincount(groups, weights=sample_weights))[groups]
    if other_weights.min() <= 0:
        return undetermined
    scores = []
    for column, errors in zip(outputs.T, held_out.T, strict=True):
        products = sample_weights * column
        other_means = (products.sum() - np.bincount(groups, weights=products)[groups]) / other_weights
        variation = float((sample_weights * (column - other_means) ** 2).sum())
        varies = np.ptp(column) > 0 and variation > 0
        scores.append(1 - float((sample_weights * errors**2).sum()) / variation if varies else np.nan)
    return np.array(scores)
