"""Sums of pixels over cells: exact for whole pixels, for fractions of pixels, and beyond the pixels."""

import itertools

import numpy as np
import pytest

from vitscope.images.cell_sums import cell_sums


def test_cells_of_whole_pixels_are_plain_sums() -> None:
    pixels = np.random.default_rng(0).random((6, 8))
    sums = cell_sums(pixels, [0, 2, 6], [0, 3, 4, 8])
    assert sums == pytest.approx(
        np.array([[pixels[a:b, c:d].sum() for c, d in ((0, 3), (3, 4), (4, 8))] for a, b in ((0, 2), (2, 6))])
    )


def test_cells_of_fractions_of_pixels_are_sums_of_a_finer_raster() -> None:
    pixels = np.random.default_rng(1).random((3, 5))
    rows, columns = [0.25, 1.5, 2.0, 3.0], [-1.0, 0.5, 4.75, 6.0]
    fine = np.pad(pixels, ((0, 0), (1, 1))).repeat(4, 0).repeat(4, 1) / 16
    expected = [
        [
            fine[round(4 * a) : round(4 * b), round(4 * (c + 1)) : round(4 * (d + 1))].sum()
            for c, d in itertools.pairwise(columns)
        ]
        for a, b in itertools.pairwise(rows)
    ]
    np.testing.assert_allclose(cell_sums(pixels, rows, columns), expected)


def test_cells_beyond_the_pixels_are_empty() -> None:
    sums = cell_sums(np.ones((2, 2)), [-3, -1, 0, 2, 5], [-2, 0, 2, 9])
    assert sums.tolist() == [[0, 0, 0], [0, 0, 0], [0, 4, 0], [0, 0, 0]]
