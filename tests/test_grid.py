"""Tokens and patches: every patch has exactly one token."""

import pytest
import torch

from vitscope.errors import CallError
from vitscope.grid import Grid

GRIDS = [Grid(1, 1), Grid(2, 3), Grid(3, 2, 1), Grid(4, 4, 5), Grid(1, 7, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_patches_puts_the_value_of_each_token_at_its_patch(grid: Grid) -> None:
    placed = grid.patches(torch.arange(grid.num_tokens))
    assert placed.shape == (grid.height, grid.width)
    for row in range(grid.height):
        for column in range(grid.width):
            assert placed[row, column] == grid.token(row, column)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_token_is_a_prefix_token_or_exactly_one_patch(grid: Grid) -> None:
    tokens = [grid.token(row, column) for row in range(grid.height) for column in range(grid.width)]
    assert [*range(grid.prefix), *tokens] == list(range(grid.num_tokens))
    assert len(tokens) == grid.num_patches


def test_patches_keeps_leading_axes() -> None:
    grid = Grid(2, 3, 1)
    values = torch.arange(2 * 5 * 7).view(2, 5, 7)
    placed = grid.patches(values)
    assert placed.shape == (2, 5, 2, 3)
    assert torch.equal(placed.flatten(-2), values[..., 1:])


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (2, 0), (0, 3), (2, 3)], ids=str)
def test_a_patch_outside_the_grid_is_refused_with_the_range(position: tuple[int, int]) -> None:
    with pytest.raises(CallError, match=r"rows run from 0 to 1, columns from 0 to 2") as error:
        Grid(2, 3, 1).token(*position)
    assert str(position) in str(error.value)


@pytest.mark.parametrize("count", [6, 8, 1])
def test_a_wrong_number_of_tokens_is_refused(count: int) -> None:
    with pytest.raises(CallError, match=rf"{count} tokens do not fit the grid of 1 \+ 2×3 tokens"):
        Grid(2, 3, 1).patches(torch.zeros(count))
