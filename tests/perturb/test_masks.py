"""Sampling of masks: as lime draws them, in pairs, and from a kernel."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.reference import lime as slow
from vitscope.methods.lime import kernel
from vitscope.perturb.masks import KernelSampler, PairedSampler, UniformSampler


def test_uniform_masks_equal_those_of_lime() -> None:
    random = np.random.RandomState(11)
    random.randint(0, 1000)
    expected = random.randint(0, 2, 40 * 7).reshape(40, 7)
    expected[0] = 1
    assert np.array_equal(UniformSampler(7, 11).draw(40), expected.astype(bool))


def kernel_sampler(segments: int, seed: int) -> KernelSampler:
    return KernelSampler(segments, seed, lambda counts: kernel(counts / segments, 0.25))


@pytest.mark.parametrize("make", [UniformSampler, PairedSampler])
@pytest.mark.parametrize("sizes", [[1, 39], [17, 23], [2, 2, 36], [1] * 40, [0, 40]], ids=str)
def test_masks_drawn_in_chunks_equal_those_drawn_at_once(make: Callable[..., Any], sizes: list[int]) -> None:
    expected, sampler = make(5, 3).draw(40), make(5, 3)
    chunks = [sampler.draw(chunk) for chunk in sizes]
    assert [len(chunk) for chunk in chunks] == sizes
    assert np.array_equal(np.concatenate(chunks), expected)


@pytest.mark.parametrize("make", [UniformSampler, PairedSampler, kernel_sampler])
def test_only_the_first_mask_shows_everything(make: Callable[..., Any]) -> None:
    sampler = make(12, 0)
    assert sampler.draw(1).all()
    rest = sampler.draw(500)
    assert rest.shape == (500, 12)
    assert not rest.all(1).all()
    assert rest.mean() == pytest.approx(0.5 if make is not kernel_sampler else 0.58, abs=0.08)


def test_each_even_mask_is_the_complement_of_the_one_before() -> None:
    rows = PairedSampler(9, 4).draw(101)
    assert rows[0].all()
    assert np.array_equal(rows[2::2], ~rows[1::2])
    assert len(np.unique(rows[1::2], axis=0)) > 40


@pytest.mark.slow
@pytest.mark.parametrize("segments", [4, 10, 300])
def test_masks_are_drawn_in_proportion_to_the_kernel(segments: int) -> None:
    rows = kernel_sampler(segments, 0).draw(20_001)[1:]
    counts = np.arange(segments + 1)
    logs = [math.log(math.comb(segments, int(k))) for k in counts]
    shares = np.exp(np.array(logs) - max(logs)) * np.array([slow.kernel(counts[:segments] < k) for k in counts])
    expected = shares / shares.sum()
    frequencies = np.bincount(rows.sum(1), minlength=segments + 1) / len(rows)
    assert np.abs(frequencies - expected).max() < 4 * np.sqrt(expected.max() / len(rows))
    # Which segments are visible is random.
    assert rows.mean(0) == pytest.approx(np.full(segments, rows.mean()), abs=0.02)
    assert abs(np.corrcoef(rows[:, 0], rows[:, -1])[0, 1]) < 0.35
