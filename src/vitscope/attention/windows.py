"""Index maps of windows, shifts and patch merging."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from vitscope.grid import Grid
from vitscope.typing import Groups, Slots

PADDING = -1  # the value of a slot that holds no token


@dataclass(frozen=True)
class Windows:
    """The partition of a token grid into windows that attend separately.

    Attributes:
        size: rows and columns of a window.
        shift: number of rows and columns by which the grid is rolled up and to the left before it is partitioned
            (Liu et al., 2021, arXiv 2103.14030).
        roll_first: True if the grid is rolled and then padded to a multiple of the window size (timm), False if it is
            padded and then rolled (transformers, torchvision). The two differ if there is padding.
        dilated: True if a window contains tokens at equal distances across the entire grid instead of neighbouring
            tokens (the grid attention of MaxViT, Tu et al., 2022, arXiv 2204.01697).

    Examples:
        >>> Windows((2, 2), shift=(1, 1)).slots(Grid(2, 4)).tolist()
        [[5, 6, 1, 2], [7, 4, 3, 0]]
    """

    size: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    roll_first: bool = False
    dilated: bool = False

    def slots(self, grid: Grid) -> Slots:
        """Return the token in each slot of each window, (window, slot); −1 for padding."""
        tokens = torch.arange(grid.num_patches, device="cpu").view(grid.height, grid.width)
        height, width = self.size
        pad_bottom, pad_right = -grid.height % height, -grid.width % width
        if self.roll_first:
            tokens = self._roll(tokens)
        tokens = F.pad(tokens, (0, pad_right, 0, pad_bottom), value=PADDING)
        if not self.roll_first:
            tokens = self._roll(tokens)
        rows, columns = tokens.shape[0] // height, tokens.shape[1] // width
        if self.dilated:
            windows = tokens.view(height, rows, width, columns).permute(1, 3, 0, 2)
        else:
            windows = tokens.view(rows, height, columns, width).permute(0, 2, 1, 3)
        return windows.reshape(rows * columns, height * width)

    def _roll(self, tokens: Tensor) -> Tensor:
        """Return the grid rolled by the shift."""
        return tokens.roll((-self.shift[0], -self.shift[1]), (0, 1))


def window_of_token(slots: Slots, num_tokens: int) -> Int[Tensor, " token"]:
    """Return the index of the window that holds each token.

    Examples:
        >>> window_of_token(Windows((2, 2)).slots(Grid(2, 4)), 8).tolist()
        [0, 0, 1, 1, 0, 0, 1, 1]
    """
    indices = torch.empty(num_tokens, dtype=torch.long, device=slots.device)
    windows = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)
    is_token = slots != PADDING
    indices[slots[is_token]] = windows[is_token]
    return indices


def merged_grid(grid: Grid) -> Grid:
    """Return the grid after patch merging: half the height and width, rounded up."""
    return Grid((grid.height + 1) // 2, (grid.width + 1) // 2)


def merge_groups(grid: Grid) -> Groups:
    """Return the four tokens of each merged token: top left, bottom left, top right, bottom right.

    A grid with an odd side is padded at the bottom or at the right; padding is −1.

    Examples:
        >>> merge_groups(Grid(2, 3)).tolist()
        [[0, 3, 1, 4], [2, 5, -1, -1]]
    """
    tokens = torch.arange(grid.num_patches, device="cpu").view(grid.height, grid.width)
    tokens = F.pad(tokens, (0, grid.width % 2, 0, grid.height % 2), value=PADDING)
    quarters = [tokens[row::2, column::2] for column in (0, 1) for row in (0, 1)]
    return torch.stack(quarters, dim=-1).flatten(0, 1)
