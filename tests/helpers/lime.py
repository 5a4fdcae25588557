"""Segments, samplers and regressions for tests of LIME."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

import vitscope as vs
from tests.reference import lime as slow
from vitscope.estimators.surrogate import Surrogate, fit
from vitscope.methods.lime import kernel
from vitscope.perturb.masks import KernelSampler, PairedSampler, Sampler, UniformSampler

SAMPLINGS = ["lime", "paired", "glime"]


every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)


def shrunk(name: str, size: tuple[int, int]) -> np.ndarray:
    """Return one of scikit-image's photos, resized to (width, height) pixels."""
    import skimage.data

    return np.asarray(Image.fromarray(getattr(skimage.data, name)()).resize(size, Image.Resampling.LANCZOS))


def blocks(height: int, width: int, side: int) -> np.ndarray:
    """Return square segments with labels that neither start at 0 nor are consecutive."""
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return 10 + 3 * (rows[:, None] * (columns[-1] + 1) + columns)


def sampler_of(sampling: str, segments: int, seed: int) -> Sampler:
    if sampling == "glime":
        return KernelSampler(segments, seed, lambda counts: kernel(counts / segments, 0.25))
    return {"lime": UniformSampler, "paired": PairedSampler}[sampling](segments, seed)


def fitted(sampling: str, rows: np.ndarray, outputs: np.ndarray, alpha: float = 1.0) -> Surrogate:
    """Fit the regression for a sampling: GLIME has no weights, and pairs form groups."""
    count = len(rows)
    weights = np.ones(count) if sampling == "glime" else kernel(rows.mean(1), 0.25)
    groups = (np.arange(count) + 1) // 2 if sampling == "paired" else np.arange(count)
    return fit(rows, outputs, weights, alpha, groups)


def assert_close(got: Any, expected: Any, rel: float = 1e-6) -> None:
    """Check equality relative to the largest number."""
    got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= rel * np.abs(expected).max()


COEFFICIENTS = np.array([[1.5, 0.0], [-0.5, 0.25], [0.75, -1.0], [0.0, 2.0], [-2.0, 0.5]])


def linear_model() -> tuple[vs.VisionModel, np.ndarray]:
    labels = slow.stripes(5)
    return vs.load(slow.linear(labels, COEFFICIENTS, 0.5), image_size=(8, 16)), labels
