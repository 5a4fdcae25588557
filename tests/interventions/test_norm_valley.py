"""The valley between the norms of ordinary patches and of artefacts."""

import numpy as np
import pytest

from tests.reference import artefacts as reference
from vitscope.interventions.norm_valley import norm_valley


def mixture(share: float, ratio: float, count: int = 13_690, seed: int = 0) -> np.ndarray:
    """Return lognormal norms around 40, of which a share is multiplied by a ratio."""
    noise = np.random.default_rng(seed)
    norms = 40 * np.exp(0.15 * noise.standard_normal(count))
    norms[: round(share * count)] *= ratio
    return norms


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.002, 0.01, 0.02, 0.1])
def test_a_hump_at_six_times_the_norm_is_found_and_its_share_recovered(share: float, seed: int) -> None:
    norms = mixture(share, 6.0, seed=seed)
    threshold = norm_valley(norms)
    assert threshold is not None
    assert abs(float((norms > threshold).mean()) - share) < 0.005 * max(share, 0.1)


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_a_hump_at_three_times_the_norm_is_found(share: float) -> None:
    norms = mixture(share, 3.0)
    threshold = norm_valley(norms)
    assert threshold is not None
    assert float((norms > threshold).mean()) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1])
def test_a_hump_below_twice_the_norm_is_not(share: float) -> None:
    assert norm_valley(mixture(share, 1.9)) is None


def test_the_median_above_a_valley_is_at_least_twice_that_of_all() -> None:
    narrow = np.exp(0.03 * np.random.default_rng(0).standard_normal(2_000))
    for ratio, expected in ((1.9, False), (2.2, True)):
        norms = np.where(np.arange(2_000) < 100, ratio * narrow, narrow)
        assert (norm_valley(norms) is not None) == expected


def test_a_share_of_all_patches_is_needed() -> None:
    plain = mixture(0.0, 1.0, 60_000)
    assert norm_valley(np.concatenate([plain, np.full(29, 400.0)])) is None
    assert norm_valley(np.concatenate([plain, np.full(32, 400.0)])) is not None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [64, 1_369, 13_690, 68_450])
def test_no_valley_in_one_population(count: int, seed: int) -> None:
    noise = np.random.default_rng(seed)
    for sigma in (0.1, 0.3, 0.6, 1.0):
        assert norm_valley(np.exp(sigma * noise.standard_normal(count))) is None
    for freedom in (3, 5, 10):
        assert norm_valley(np.abs(noise.standard_t(freedom, count))) is None
        assert norm_valley(np.abs(10 + noise.standard_t(freedom, count))) is None


@pytest.mark.parametrize(
    "norms",
    [
        mixture(0.02, 6.0, 2_000),
        mixture(0.1, 3.0, 1_000, seed=1),
        mixture(0.0, 1.0, 1_000),
        np.concatenate([mixture(0.05, 5.0, 1_000, seed=2), mixture(1.0, 30.0, 40)]),
        mixture(0.4, 8.0, 600, seed=3),
        np.exp(0.2 * np.random.default_rng(4).standard_t(2, 1_500)),
    ],
    ids=["two percent", "ten percent", "none", "two humps", "forty percent", "heavy tail"],
)
def test_the_threshold_is_that_of_the_density_summed_directly(norms: np.ndarray) -> None:
    threshold, expected = norm_valley(norms), reference.valley(norms)
    assert (threshold is None) == (expected is None)
    if threshold is not None and expected is not None:
        between = (norms > min(threshold, expected)) & (norms <= max(threshold, expected))
        assert between.mean() <= 0.001  # in a flat valley the two may differ, but no norm lies between


def test_ten_patches_are_needed() -> None:
    plain = mixture(0.0, 1.0, 1_000)
    assert norm_valley(np.concatenate([plain, np.full(9, 400.0)])) is None
    assert norm_valley(np.concatenate([plain, np.full(10, 400.0)])) is not None
    assert norm_valley(np.full(5, 1.0)) is None


def test_the_scale_of_the_norms_does_not_matter() -> None:
    norms = mixture(0.02, 6.0)
    assert norm_valley(1_000 * norms) == pytest.approx(1_000 * norm_valley(norms), rel=0.02)


def test_norms_of_zero_and_equal_norms() -> None:
    assert norm_valley(np.zeros(100)) is None
    assert norm_valley(np.ones(100)) is None
    norms = mixture(0.02, 6.0)
    assert norm_valley(np.concatenate([norms, np.zeros(5)])) == pytest.approx(norm_valley(norms), rel=0.02)
