"""A weighted ridge regression over masks, for many classes at once, and how sure its coefficients are."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import stdtr, stdtrit

LEAST = 1e-3  # of what a sample's leverage leaves


@dataclass(frozen=True, eq=False)
class Surrogate:
    """Linear models of a model's answers to masks, one for each class.

    Attributes:
        weights: (class, segment).
        intercepts, scores: of each class; the score is the weighted R².
        influences: what each group of samples moves each coefficient by, (class, group, segment): their squares sum to
            its variance, those of differences to the variance of the difference.
        shrinkage: (class, segment), what the penalty has taken from each coefficient, to first order.
        freedom: degrees of freedom that are left.
    """

    weights: Float[np.ndarray, "label segment"]
    intercepts: Float[np.ndarray, " label"]
    scores: Float[np.ndarray, " label"]
    influences: Float[np.ndarray, "label group segment"]
    shrinkage: Float[np.ndarray, "label segment"]
    freedom: int

    def intervals(self, confidence: float) -> Float[np.ndarray, "label segment 2"]:
        """Where the coefficients of infinitely many samples lie.

        The sandwich estimate of their variance supposes neither that the model is linear nor that its answers scatter
        evenly. The penalty, which infinitely many samples would outweigh, is undone, and the interval reaches at least
        to the coefficient itself.
        """
        spread = quantile(confidence, self.freedom) * np.sqrt((self.influences**2).sum(1))
        centre = self.weights + self.shrinkage
        low, high = np.minimum(self.weights, centre - spread), np.maximum(self.weights, centre + spread)
        return np.stack([low, high], axis=-1)


def fit(
    rows: Bool[np.ndarray, "sample segment"],
    answers: Float[np.ndarray, "sample label"],
    sample_weights: Float[np.ndarray, " sample"],
    alpha: float,
    groups: Int[np.ndarray, " sample"],
) -> Surrogate:
    """``argmin_β Σ w (y − β₀ − z·β)² + α‖β‖²`` for every class, with one factorisation.

    The variance is the heteroscedasticity-robust sandwich over residuals that are taken as if their own sample, or
    the group of two that was not drawn apart, had been left out (HC3, MacKinnon & White, 1985; CR3, Bell & McCaffrey,
    2002).
    """
    masks, total = rows.astype(np.float64), sample_weights.sum()
    centred = masks - sample_weights @ masks / total
    means = sample_weights @ answers / total
    moved = answers - means
    moved[:, np.ptp(answers, axis=0) == 0] = 0.0  # rounding in the mean is no answer
    weighted = centred * sample_weights[:, None]
    # Without a penalty the matrix may have no inverse; the smallest coefficients that fit are then as good as any.
    gram = centred.T @ weighted + alpha * np.eye(masks.shape[1])
    inverse = np.linalg.inv(gram) if alpha > 0 else np.linalg.pinv(gram, hermitian=True)
    weights = inverse @ (weighted.T @ moved)
    residuals = moved - centred @ weights

    projected = weighted @ inverse  # what a unit of each sample's answer moves the coefficients by
    errors = _left_out(residuals, centred @ inverse, weighted, sample_weights, groups)
    influences = np.zeros((answers.shape[1], int(groups.max()) + 1, masks.shape[1]))
    for label, column in enumerate(errors.T):
        np.add.at(influences[label], groups, projected * column[:, None])

    return Surrogate(
        weights=weights.T,
        intercepts=means - (sample_weights @ masks / total) @ weights,
        scores=r_squared(residuals, moved, sample_weights),
        influences=influences,
        shrinkage=alpha * (inverse @ weights).T,
        freedom=max(influences.shape[1] - masks.shape[1] - 1, 1),
    )


def r_squared(
    residuals: Float[np.ndarray, "sample label"],
    moved: Float[np.ndarray, "sample label"],
    sample_weights: Float[np.ndarray, " sample"],
) -> Float[np.ndarray, " label"]:
    """The weighted share that is explained of what answers vary by, ``moved`` from their mean; 1 if nothing varies."""
    varied = sample_weights @ moved**2
    return np.where(varied > 0, 1 - (sample_weights @ residuals**2) / np.where(varied > 0, varied, 1.0), 1.0)


def _left_out(
    residuals: Float[np.ndarray, "sample label"],
    sandwich: Float[np.ndarray, "sample segment"],
    weighted: Float[np.ndarray, "sample segment"],
    sample_weights: Float[np.ndarray, " sample"],
    groups: Int[np.ndarray, " sample"],
) -> Float[np.ndarray, "sample label"]:
    """Each residual as if its group had not been in the fit: (1 − H)⁻¹ e with H the group's block of the hat matrix.

    Groups hold one sample or two.
    """
    total = sample_weights.sum()
    own = 1 - (sandwich * weighted).sum(1) - sample_weights / total
    order = np.argsort(groups, kind="stable")
    twins = np.flatnonzero(groups[order][1:] == groups[order][:-1])
    first, second = order[twins], order[twins + 1]
    corrected = residuals / np.maximum(own, LEAST)[:, None]
    shared = (sandwich[first] * weighted[second]).sum(1) / sample_weights[second] + 1 / total
    room = np.maximum(own[first] * own[second] - sample_weights[first] * sample_weights[second] * shared**2, LEAST**2)
    for one, other in ((first, second), (second, first)):
        moved = own[other][:, None] * residuals[one] + (sample_weights[other] * shared)[:, None] * residuals[other]
        corrected[one] = moved / room[:, None]
    return corrected


def quantile(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t."""
    return float(stdtrit(freedom, 0.5 + confidence / 2))


def upper_tail(values: Float[np.ndarray, " value"], freedom: int) -> Float[np.ndarray, " value"]:
    """The chance that Student's t lies above each value."""
    return stdtr(freedom, -values)
