"""Where windows, shifts and merges put tokens, as index maps."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from vitscope.grid import Grid
from vitscope.typing import Groups, Slots

PADDING = -1  # the slot of a window that holds no token


@dataclass(frozen=True)
class Windows:
    """How a block cuts its grid into windows that attend separately.

    Attributes:
        size: (rows, columns) of a window.
        shift: how far the grid is rolled up and to the left before it is cut (Liu et al., 2021, arXiv 2103.14030).
        roll_first: the grid is rolled and then padded to whole windows (timm); otherwise padded and then rolled
            (transformers, torchvision). They differ wherever there is padding.
        dilated: a window takes tokens at even distances over the whole grid instead of neighbours (the grid
            attention of MaxViT, Tu et al., 2022, arXiv 2204.01697).

    >>> Windows((2, 2), shift=(1, 1)).slots(Grid(2, 4)).tolist()
    [[5, 6, 1, 2], [7, 4, 3, 0]]
    """

    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    roll_first: bool = False
    dilated: bool = False

    def slots(self, grid: Grid) -> Slots:
        """Which token each slot of each window holds; −1 for padding."""
        tokens = torch.arange(grid.num_patches, device="cpu").view(grid.height, grid.width)
        height, width = self.size
        below, beside = -grid.height % height, -grid.width % width
        if self.roll_first:
            tokens = self._rolled(tokens)
        tokens = F.pad(tokens, (0, beside, 0, below), value=PADDING)
        if not self.roll_first:
            tokens = self._rolled(tokens)
        down, across = tokens.shape[0] // height, tokens.shape[1] // width
        if self.dilated:
            cut = tokens.view(height, down, width, across).permute(1, 3, 0, 2)
        else:
            cut = tokens.view(down, height, across, width).permute(0, 2, 1, 3)
        return cut.reshape(down * across, height * width)

    def _rolled(self, tokens: Tensor) -> Tensor:
        return tokens.roll((-self.shift[0], -self.shift[1]), (0, 1))


def window_of_token(slots: Slots, num_tokens: int) -> Int[Tensor, " token"]:
    """The window that each token is in.

    >>> window_of_token(Windows((2, 2)).slots(Grid(2, 4)), 8).tolist()
    [0, 0, 1, 1, 0, 0, 1, 1]
    """
    owner = torch.empty(num_tokens, dtype=torch.long, device=slots.device)
    windows = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)
    real = slots != PADDING
    owner[slots[real]] = windows[real]
    return owner


def merged_grid(grid: Grid) -> Grid:
    """The grid after patch merging: each side halved, rounded up."""
    return Grid((grid.height + 1) // 2, (grid.width + 1) // 2)


def merge_groups(grid: Grid) -> Groups:
    """The four tokens of each merged token, in the order top left, bottom left, top right, bottom right.

    An odd grid is padded at the right and at the bottom; what is padded is −1.

    >>> merge_groups(Grid(2, 3)).tolist()
    [[0, 3, 1, 4], [2, 5, -1, -1]]
    """
    tokens = torch.arange(grid.num_patches, device="cpu").view(grid.height, grid.width)
    tokens = F.pad(tokens, (0, grid.width % 2, 0, grid.height % 2), value=PADDING)
    quarters = [tokens[row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return torch.stack(quarters, dim=-1).flatten(0, 1)
