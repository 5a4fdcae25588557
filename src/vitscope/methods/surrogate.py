"""A weighted ridge regression over masks, for many classes at once, and how sure its coefficients are."""

from dataclasses import dataclass
from math import erfc, sqrt
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int


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

    The variance is the heteroscedasticity-robust sandwich with each residual divided by 1 − its leverage (HC3;
    MacKinnon & White, 1985), summed first within ``groups`` of samples that were not drawn apart (Liang & Zeger, 1986).
    """
    masks, total = rows.astype(np.float64), sample_weights.sum()
    centred = masks - sample_weights @ masks / total
    means = sample_weights @ answers / total
    moved = answers - means
    moved[:, np.ptp(answers, axis=0) == 0] = 0.0  # rounding in the mean is no answer
    weighted = centred * sample_weights[:, None]
    inverse = np.linalg.inv(centred.T @ weighted + alpha * np.eye(masks.shape[1]))
    weights = inverse @ (weighted.T @ moved)
    residuals = moved - centred @ weights

    projected = weighted @ inverse  # what a unit of each sample's answer moves the coefficients by
    leverage = (projected * centred).sum(1) + sample_weights / total
    errors = residuals / np.maximum(1 - leverage, 1e-3)[:, None]
    influences = np.zeros((answers.shape[1], int(groups.max()) + 1, masks.shape[1]))
    for label, column in enumerate(errors.T):
        np.add.at(influences[label], groups, projected * column[:, None])

    unexplained = sample_weights @ residuals**2
    varied = sample_weights @ moved**2
    scores = np.where(varied > 0, 1 - unexplained / np.where(varied > 0, varied, 1.0), 1.0)
    return Surrogate(
        weights=weights.T,
        intercepts=means - (sample_weights @ masks / total) @ weights,
        scores=scores,
        influences=influences,
        shrinkage=alpha * (inverse @ weights).T,
        freedom=max(influences.shape[1] - masks.shape[1] - 1, 1),
    )


def quantile(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t, from the normal one (Fisher & Cornish, 1960)."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def upper_tail(values: Float[np.ndarray, " value"], freedom: int) -> Float[np.ndarray, " value"]:
    """The chance that Student's t lies above each value, from the normal one (Wallace, 1959)."""
    values = np.clip(values, -1e6, 1e6)  # squares have to stay finite
    normal = np.sign(values) * np.sqrt(freedom * np.log1p(values**2 / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)
    return np.array([0.5 * erfc(value / sqrt(2)) for value in normal])
