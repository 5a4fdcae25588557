"""LIME by Ribeiro et al. (2016) in float64 and loops, and models with known outputs."""

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def kernel(row: np.ndarray, width: float = 0.25) -> float:
    """Return the exponential kernel over the cosine distance between a row and the row without hidden segments."""
    ones = np.ones(len(row))
    length = np.linalg.norm(row.astype(float)) * np.linalg.norm(ones)
    distance = 1 - (float(row.astype(float) @ ones) / length if length > 0 else 0.0)
    return float(np.sqrt(np.exp(-(distance**2) / width**2)))


def ridge(rows: np.ndarray, answers: np.ndarray, weights: np.ndarray, alpha: float) -> tuple[np.ndarray, float, float]:
    """Return coefficients, intercept and weighted R² from the normal equations; the intercept is not penalised."""
    segments = rows.shape[1]
    matrix, vector = np.zeros((segments + 1, segments + 1)), np.zeros(segments + 1)
    for row, answer, weight in zip(rows, answers, weights, strict=True):
        entries = np.append(row.astype(float), 1.0)
        for i in range(segments + 1):
            vector[i] += weight * entries[i] * answer
            for j in range(segments + 1):
                matrix[i, j] += weight * entries[i] * entries[j]
    for i in range(segments):
        matrix[i, i] += alpha
    solved = np.linalg.solve(matrix, vector)
    mean = sum(w * y for w, y in zip(weights, answers, strict=True)) / sum(weights)
    residual = total = 0.0
    for row, answer, weight in zip(rows, answers, weights, strict=True):
        predicted = float(solved[-1]) + sum(float(solved[i]) for i in range(segments) if row[i])
        residual += weight * (answer - predicted) ** 2
        total += weight * (answer - mean) ** 2
    return solved[:-1], float(solved[-1]), 1 - residual / total


def variances(
    rows: np.ndarray, answers: np.ndarray, weights: np.ndarray, alpha: float, groups: np.ndarray
) -> np.ndarray:
    """Return the diagonal of the sandwich estimator without the intercept: CR3, or HC3 for groups of one row."""
    segments = rows.shape[1]
    design = np.append(rows.astype(float), np.ones((len(rows), 1)), axis=1)
    penalty = np.diag([alpha] * segments + [0.0])
    bread = np.linalg.inv(design.T @ np.diag(weights) @ design + penalty)
    coefficients = bread @ design.T @ np.diag(weights) @ answers
    meat = np.zeros((segments + 1, segments + 1))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        hat = design[members] @ bread @ design[members].T @ np.diag(weights[members])
        residuals = answers[members] - design[members] @ coefficients
        left_out = np.linalg.solve(np.eye(len(members)) - hat, residuals)
        pull = design[members].T @ (weights[members] * left_out)
        meat += np.outer(pull, pull)
    return np.diag(bread @ meat @ bread)[:-1]


def hidden(photo: np.ndarray, labels: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Return the photo with each segment that is False in ``row`` filled with its mean colour, truncated to bytes."""
    changed = photo.copy()
    for label, visible in zip(np.unique(labels), row, strict=True):
        if not visible:
            for channel in range(3):
                changed[labels == label, channel] = int(photo[labels == label, channel].astype(float).mean())
    return changed


def all_rows(segments: int) -> np.ndarray:
    """Return all possible masks, (2ⁿ, n)."""
    return np.array(list(itertools.product([False, True], repeat=segments)))


def population(answers: np.ndarray, segments: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the coefficients of infinitely many samples: least squares over all masks, weighted by the kernel."""
    rows = all_rows(segments)
    weights = np.array([kernel(row) for row in rows]) if weights is None else weights
    return ridge(rows, answers, weights, 0.0)[0]


def stripes(count: int, size: tuple[int, int] = (8, 16)) -> np.ndarray:
    """Return the labels of vertical stripes."""
    return np.broadcast_to(np.arange(size[1]) * count // size[1], size).copy()


WHITE = np.full((8, 16, 3), 255, np.uint8)


class Known(nn.Module):
    """Logits as a function of the brightness of each segment, 0 to 1; in a white photo, the visible share."""

    def __init__(self, labels: np.ndarray, logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.logits, unique = logits, np.unique(labels)
        inside = np.stack([(labels == label).ravel() for label in unique])
        self.register_buffer("shares", torch.from_numpy(inside / inside.sum(1, keepdims=True)).T.float())

    def forward(self, pixels: Tensor) -> Tensor:
        brightness = (pixels.mean(1).flatten(1) + 1) / 2
        return self.logits(brightness @ self.shares)


def linear(labels: np.ndarray, coefficients: np.ndarray, base: float = 0.0) -> Known:
    """Return a model with the logits base + brightness · coefficients, (segment, class)."""
    matrix = torch.from_numpy(coefficients).float()
    return Known(labels, lambda brightness: base + brightness @ matrix)
