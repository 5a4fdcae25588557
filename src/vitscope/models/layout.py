"""Layout: the tokens of a transformer, and which of them its classifier reads."""

from collections.abc import Mapping
from dataclasses import dataclass

from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.models.hierarchy import Hierarchy


@dataclass(frozen=True)
class Layout:
    """The tokens of a transformer, and which of them its classifier reads.

    Attributes:
        patch_size: (height, width) of a patch in pixels of the input.
        prefix_names: names of the tokens before the patches, in order.
        readout: weights over token sources that sum to one. A source is the name of a prefix token, ``"patches"`` or
            ``"tokens"`` (their mean), or ``"pooling"`` (the attention of a pooling layer, captured while the model
            runs). Empty if what the classifier reads is not derived from tokens of the grid.
        hierarchy: windows and merging layers; None if every block computes attention among all tokens.
        partial_patches: whether a last patch that the input fills only partly is padded; otherwise it is cut off.
        readout_from_caller: whether the caller of :func:`vitscope.load` passed the readout. A wrong readout is then an
            error.

    Examples:
        >>> import vitscope as vs
        >>> layout = vs.load("vit-nano").layout
        >>> layout.patch_size, layout.prefix_names, layout.readout
        ((4, 4), ('cls',), {'cls': 1.0})
        >>> layout.grid(32, 32).num_tokens
        65
    """

    patch_size: tuple[int, int]
    prefix_names: tuple[str, ...]
    readout: Mapping[str, float]
    hierarchy: Hierarchy | None = None
    partial_patches: bool = False
    readout_from_caller: bool = False

    def grid(self, height: int, width: int) -> Grid:
        """Return the (finest) token grid of an input.

        Args:
            height: height of the input in pixels.
            width: width of the input in pixels.

        Returns:
            The grid of patches, with the prefix tokens before them.

        Raises:
            CallError: the input is smaller than one patch.

        Examples:
            >>> import vitscope as vs
            >>> vs.load("vit-nano").layout.grid(32, 48)
            Grid(height=8, width=12, prefix=1)
        """
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        if self.partial_patches:
            rows, columns = -(-height // self.patch_size[0]), -(-width // self.patch_size[1])
        if not rows or not columns:
            patch = "×".join(map(str, self.patch_size))
            raise CallError(f"an input of {height}×{width} pixels is smaller than one patch of {patch}")
        return Grid(rows, columns, len(self.prefix_names))
