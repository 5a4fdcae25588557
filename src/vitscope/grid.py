"""The token grid: which token is which patch, and which pixels a patch covers."""

from dataclasses import dataclass

from torch import Tensor

from vitscope.errors import CallError
from vitscope.validation import at_least


@dataclass(frozen=True)
class Grid:
    """``prefix`` tokens without a place, then ``height`` × ``width`` patches, row by row.

    >>> grid = Grid(height=2, width=3, prefix=1)
    >>> grid.num_tokens, grid.token(1, 0)
    (7, 4)
    """

    height: int
    width: int
    prefix: int = 0

    def __post_init__(self) -> None:
        for name, least in (("height", 1), ("width", 1), ("prefix", 0)):
            number = at_least(least, getattr(self, name), f"{name} of a grid")
            object.__setattr__(self, name, number)

    @property
    def num_patches(self) -> int:
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.prefix + self.num_patches

    def token(self, row: int, column: int) -> int:
        """The token of the patch at ``row``, ``column``; both count from the top left.

        Raises:
            CallError: the patch lies outside the grid.
        """
        if not (0 <= row < self.height and 0 <= column < self.width):
            raise CallError(
                f"patch ({row}, {column}) lies outside the grid of {self.height} rows and {self.width} columns: "
                f"rows run from 0 to {self.height - 1}, columns from 0 to {self.width - 1}"
            )
        return self.prefix + row * self.width + column

    def patches(self, tokens: Tensor) -> Tensor:
        """(…, token) → (…, height, width): the patch part, on the grid."""
        if tokens.shape[-1] != self.num_tokens:
            raise CallError(
                f"{tokens.shape[-1]} tokens do not fit the grid of {self.prefix} + {self.height}×{self.width} tokens"
            )
        return tokens[..., self.prefix :].unflatten(-1, (self.height, self.width))
