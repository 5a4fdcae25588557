"""A weighted ridge regression over masks, for many classes at once, with the uncertainty of its coefficients."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtr, stdtrit

from vitscope.estimators.cross_validation import held_out_r_squared

MIN_REMAINDER = 1e-3  # smallest value of 1 − leverage


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Linear models of a model's outputs for masks, one for each class.

    Attributes:
        weights: (class, segment).
        intercepts: (class,), the output if all segments are hidden.
        scores: (class,), the weighted R² on the samples of the fit.
        held_out_scores: (class,), the weighted R² on samples that were left out of the fit, see
            :func:`~vitscope.estimators.cross_validation.held_out_r_squared`.
        influences: (class, group, segment), the effect of each group of samples on each coefficient. The sum of their
            squares is the coefficient's variance. The sum of squared differences between two coefficients' influences
            is the variance of the coefficients' difference.
        shrinkage: (class, segment), the reduction of each coefficient by the penalty, to first order.
        freedom: number of degrees of freedom.
    """

    weights: Float[np.ndarray, "label segment"]
    intercepts: Float[np.ndarray, " label"]
    scores: Float[np.ndarray, " label"]
    held_out_scores: Float[np.ndarray, " label"]
    influences: Float[np.ndarray, "label group segment"]
    shrinkage: Float[np.ndarray, "label segment"]
    freedom: int

    def intervals(self, confidence: float) -> Float[np.ndarray, "label segment 2"]:
        """Return confidence intervals for the coefficients that infinitely many samples would give.

        The sandwich estimate of their variance assumes neither that the model is linear nor that the variance of its
        outputs is constant. The effect of the penalty, which vanishes with infinitely many samples, is removed, and
        the interval is extended to contain the coefficient itself.
        """
        spread = quantile(confidence, self.freedom) * np.sqrt((self.influences**2).sum(1))
        centre = self.weights + self.shrinkage
        low, high = np.minimum(self.weights, centre - spread), np.maximum(self.weights, centre + spread)
        return np.stack([low, high], axis=-1)


def fit(
    rows: Bool[np.ndarray, "sample segment"],
    outputs: Float[np.ndarray, "sample label"],
    sample_weights: Float[np.ndarray, " sample"],
    alpha: float,
    groups: Int[np.ndarray, " sample"],
) -> Surrogate:
    """Return the minimum of ``Σ w (y − β₀ − z·β)² + α‖β‖²`` for every class, computed with one factorisation.

    The result of a class does not depend on the other classes, to the last bit.

    The variance is the heteroscedasticity-robust sandwich estimate with leave-one-out residuals (HC3, MacKinnon &
    White, 1985). Two samples of one group, which were not drawn independently, are left out together (CR3, Bell &
    McCaffrey, 2002).

    Args:
        rows: z, True for each visible segment.
        outputs: y, the model's outputs for these rows.
        sample_weights: w, at least 0.
        alpha: α, at least 0; not applied to the intercept.
        groups: group of each sample, from 0; at most two samples per group.
    """
    masks, total = rows.astype(np.float64), sample_weights.sum()
    centred_masks = masks - sample_weights @ masks / total
    means = by_column(lambda column: sample_weights @ column, outputs) / total
    centred = outputs - means
    centred[:, np.ptp(outputs, axis=0) == 0] = 0.0  # rounding of the mean is not a signal
    weighted = centred_masks * sample_weights[:, None]
    # Without a penalty the matrix may be singular. The pseudoinverse then gives the smallest coefficients that fit.
    gram = centred_masks.T @ weighted + alpha * np.eye(masks.shape[1])
    inverse = np.linalg.inv(gram) if alpha > 0 else np.linalg.pinv(gram, hermitian=True)
    weights = by_column(lambda column: inverse @ (weighted.T @ column), centred)
    residuals = centred - by_column(lambda column: centred_masks @ column, weights)

    projected = weighted @ inverse  # effect of one unit of each sample's output on the coefficients
    sandwich = centred_masks @ inverse
    errors = _leave_out_residuals(residuals, sandwich, weighted, sample_weights, groups)
    influences = np.zeros((outputs.shape[1], int(groups.max()) + 1, masks.shape[1]))
    for label, column in enumerate(errors.T):
        np.add.at(influences[label], groups, projected * column[:, None])

    left_factor = np.column_stack([sandwich, np.ones(len(masks))])
    right_factor = np.column_stack([weighted, sample_weights / total])
    return Surrogate(
        weights=weights.T,
        intercepts=means - by_column(lambda column: (sample_weights @ masks / total) @ column, weights),
        scores=r_squared(residuals, centred, sample_weights),
        held_out_scores=held_out_r_squared(outputs, residuals, left_factor, right_factor, sample_weights, groups),
        influences=influences,
        shrinkage=alpha * by_column(lambda column: inverse @ column, weights).T,
        freedom=max(influences.shape[1] - masks.shape[1] - 1, 1),
    )


def by_column(
    function: Callable[[np.ndarray], np.ndarray], columns: Float[np.ndarray, "sample label"]
) -> Float[np.ndarray, "... label"]:
    """Return a function of each column, side by side.

    A product of two matrices rounds a column differently in other company, so columns are multiplied one by one.
    """
    return np.stack([function(np.ascontiguousarray(column)) for column in columns.T], axis=-1)


def r_squared(
    residuals: Float[np.ndarray, "sample label"],
    centred: Float[np.ndarray, "sample label"],
    sample_weights: Float[np.ndarray, " sample"],
) -> Float[np.ndarray, " label"]:
    """Return the weighted R² of each class, of outputs ``centred`` on their mean; 1 if they do not vary."""
    variation, unexplained = (by_column(lambda column: sample_weights @ column**2, m) for m in (centred, residuals))
    explained = 1 - unexplained / np.where(variation > 0, variation, 1.0)
    return np.where(variation > 0, explained, 1.0)


def _leave_out_residuals(
    residuals: Float[np.ndarray, "sample label"],
    sandwich: Float[np.ndarray, "sample segment"],
    weighted: Float[np.ndarray, "sample segment"],
    sample_weights: Float[np.ndarray, " sample"],
    groups: Int[np.ndarray, " sample"],
) -> Float[np.ndarray, "sample label"]:
    """Return each sample's residual from a fit without its group: (1 − H)⁻¹ e, H the group's block of the hat matrix.

    A group holds one or two samples.
    """
    total = sample_weights.sum()
    remainder = 1 - (sandwich * weighted).sum(1) - sample_weights / total
    order = np.argsort(groups, kind="stable")
    pairs = np.flatnonzero(groups[order][1:] == groups[order][:-1])
    first, second = order[pairs], order[pairs + 1]
    corrected = residuals / np.maximum(remainder, MIN_REMAINDER)[:, None]
    shared = (sandwich[first] * weighted[second]).sum(1) / sample_weights[second] + 1 / total
    determinant = np.maximum(
        remainder[first] * remainder[second] - sample_weights[first] * sample_weights[second] * shared**2,
        MIN_REMAINDER**2,
    )
    for sample, partner in ((first, second), (second, first)):
        solved = (
            remainder[partner][:, None] * residuals[sample]
            + (sample_weights[partner] * shared)[:, None] * residuals[partner]
        )
        corrected[sample] = solved / determinant[:, None]
    return corrected


def quantile(confidence: float, freedom: int) -> float:
    """Return the two-sided quantile of Student's t."""
    return float(stdtrit(freedom, 0.5 + confidence / 2))


def upper_tail(values: Float[np.ndarray, " value"], freedom: int) -> Float[np.ndarray, " value"]:
    """Return the probability that Student's t exceeds each value."""
    return stdtr(freedom, -values)
