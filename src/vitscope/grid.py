"""The token grid: which token belongs to which patch."""

from dataclasses import dataclass

from torch import Tensor

from vitscope.errors import CallError
from vitscope.validation import require_at_least


@dataclass(frozen=True)
class Grid:
    """The layout of a token sequence: prefix tokens, then ``height`` × ``width`` patches, row by row.

    Attributes:
        height: rows of patches, at least 1.
        width: columns of patches, at least 1.
        prefix: number of tokens before the patches (CLS, distillation, registers).

    Raises:
        CallError: an attribute is not a whole number, or is too small.

    Examples:
        >>> import vitscope as vs
        >>> grid = vs.Grid(height=2, width=3, prefix=1)
        >>> grid.num_tokens, grid.token(1, 0)
        (7, 4)
    """

    height: int
    width: int
    prefix: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("height", 1), ("width", 1), ("prefix", 0)):
            number = require_at_least(minimum, getattr(self, name), f"{name} of a grid")
            object.__setattr__(self, name, number)

    @property
    def num_patches(self) -> int:
        """The number of patches."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """The number of tokens, including the prefix."""
        return self.prefix + self.num_patches

    def token(self, row: int, column: int) -> int:
        """Return the index of a patch's token.

        Args:
            row: row of the patch, from 0 at the top.
            column: column of the patch, from 0 on the left.

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
        """Return the values of the patches, arranged on the grid, without the prefix tokens.

        Args:
            tokens: one value per token, (…, token), prefix tokens first.

        Returns:
            (…, height, width).

        Raises:
            CallError: the number of tokens does not fit the grid.
        """
        if tokens.shape[-1] != self.num_tokens:
            raise CallError(
                f"{tokens.shape[-1]} tokens do not fit the grid of {self.prefix} + {self.height}×{self.width} tokens"
            )
        return tokens[..., self.prefix :].unflatten(-1, (self.height, self.width))
