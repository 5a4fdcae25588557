"""Maps of different sizes in one tensor are enlarged without loss."""

import pytest
import torch

from vitscope.results.map_sizes import common_size, enlarged, restored


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 4), (12, 11), (13, 13)])
def test_an_enlarged_map_is_restored(size: tuple[int, int]) -> None:
    values = torch.rand(1, *size, device="cpu")
    for height in range(size[0], 3 * size[0] + 1):
        for width in (size[1], size[1] + 1, 2 * size[1], 2 * size[1] + 3):
            large = enlarged(values, (height, width))
            assert large.shape == (1, height, width)
            assert set(large.flatten().tolist()) == set(values.flatten().tolist())
            assert torch.equal(restored(large, size), values)


def test_rows_are_repeated_evenly() -> None:
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device="cpu")
    assert enlarged(values, (3, 4)).tolist() == [[[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4]]]
    assert enlarged(values, (2, 2)) is values


def test_the_common_size_is_the_largest_of_each_side() -> None:
    assert common_size([(2, 9), (5, 3), (4, 4)]) == (5, 9)
