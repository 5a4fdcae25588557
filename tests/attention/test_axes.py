"""The order of images, windows and heads can be changed and restored."""

import pytest
import torch

from vitscope.attention.axes import Axes


@pytest.mark.parametrize(
    ("leading", "axes"),
    [
        ((2, 4), Axes((2, 1, 4), (0, 1, 2))),
        ((24,), Axes((2, 3, 4), (0, 1, 2))),
        ((4, 6), Axes((4, 2, 3), (1, 2, 0))),
        ((2, 4, 3), Axes((2, 4, 3), (0, 2, 1))),
        ((2, 5, 4, 3), Axes((2, 5, 4, 3), (0, 1, 3, 2))),
    ],
)
def test_join_restores_what_split_rearranges(leading: tuple[int, ...], axes: Axes) -> None:
    tensor = torch.randn(*leading, 6, 7)
    assert torch.equal(axes.join(axes.split(tensor), leading), tensor)
    assert axes.join(axes.split(tensor)[..., :1, :], leading).shape == (*leading, 1, 7)
