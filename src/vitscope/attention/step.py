"""One attention block of a trace: its weights, and their place on the token grid."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitscope.attention.scores import Head, Scores, check_head_fusion, fuse_heads, in_float32
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.grid import Grid
from vitscope.typing import DenseAttention, Fused, PaddingMass, ReadoutRow, Rows, Slots, Weights
from vitscope.validation import require_integer

# A block of attention weights holds about this many numbers, so that it fits a processor's cache.
BLOCK_NUMBERS = 1 << 21


def require_index(index: Any, length: int, noun: str, owner: str) -> int:
    """Return an index as an int; negative indices count from the end.

    Raises:
        CallError: the index is not a whole number or out of range.
    """
    index = require_integer(index, noun)
    if not -length <= index < length:
        raise CallError(f"{noun} {index} is out of range: {owner} has {noun}s 0 to {length - 1}")
    return index


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """The attention of one block.

    A window transformer computes attention inside windows; a plain ViT is a single window that holds all tokens.
    Padding is not part of the token grid. Attention to padding is reported separately and never distributed over other
    tokens.

    Attributes:
        layer: index of the block in the model, from 0.
        module: path of the attention module.
        scores: queries and keys, logits or weights, (batch, window, head, query, key).
        slots: (window, slot), the token in each row and column of a window, −1 for padding; None if unknown.
        grid: the token grid of the block; None if unknown.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
        >>> trace.blocks[0]
        <AttentionStep 0 vit.layers.0.attention: 12 heads × 65 tokens, grid 8×8 + 1>
    """

    layer: int
    module: str
    scores: Scores
    slots: Slots | None
    grid: Grid | None

    def __repr__(self) -> str:
        grid = "unknown" if self.grid is None else f"{self.grid.height}×{self.grid.width} + {self.grid.prefix}"
        return f"<AttentionStep {self.layer} {self.module}: {self.shape_text}, grid {grid}>"

    @property
    def shape_text(self) -> str:
        """The numbers of windows, heads and tokens as text: "12 heads × 65 tokens"."""
        _, windows, heads, tokens, _ = self.scores.shape
        return f"{f'{windows} windows × ' if windows > 1 else ''}{heads} heads × {tokens} tokens"

    @property
    def num_heads(self) -> int:
        """The number of heads; 1 if the run fused them."""
        return self.scores.shape[2]

    @property
    def is_plain(self) -> bool:
        """Whether a single window holds all tokens in order."""
        windows, tokens = self.scores.shape[1], self.scores.shape[3]
        if windows != 1:
            return False
        return self.slots is None or bool((self.slots[0] == torch.arange(tokens, device=self.slots.device)).all())

    @property
    def pairs(self) -> Tensor | None:
        """A boolean (window, query, key) mask of pairs without padding; None if there is no padding."""
        if self.slots is None or bool((self.slots >= 0).all()):
            return None
        is_token = self.slots >= 0
        return is_token[:, :, None] & is_token[:, None, :]

    def row_slices(self) -> list[slice]:
        """Return slices of the queries, each short enough for the weights of all heads to fit a processor's cache.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.blocks[0].row_slices()
            [slice(0, 65, None)]
        """
        batch, window, head, query, key = self.scores.shape
        rows = max(16, BLOCK_NUMBERS // (batch * window * head * key))
        return [slice(start, min(start + rows, query)) for start in range(0, query, rows)]

    def weights(self) -> Weights:
        """Return the attention weights of all windows and heads.

        Returns:
            float32 (batch, window, head, query, key); rows sum to one. The memory is proportional to windows × heads ×
            slots².

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> trace.step(0).weights().shape
            torch.Size([1, 16, 4, 16, 16])
        """
        return next(self.scores.blocks([slice(None)]))

    def fused(self, head: Head) -> Fused:
        """Return the attention weights of one head, or of all heads fused.

        The weights are computed in blocks of rows, so heads × tokens² numbers are never in memory.

        Args:
            head: index of a head, or ``"mean"``, ``"max"`` or ``"min"`` over heads.

        Returns:
            float32 (batch, window, query, key).

        Raises:
            CallError: the head is out of range or the fusion unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.step(-1).fused("max").shape
            torch.Size([1, 1, 65, 65])
        """
        head = self.require_head(head)
        slices = self.row_slices()
        blocks = [fuse_heads(block, head) for block in self.scores.blocks(slices)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)

    def attention(self) -> DenseAttention:
        """Return the dense attention matrix on the token grid, zero between tokens of different windows.

        Returns:
            float32 (batch, head, token, token). Rows sum to one, less the attention to padding
            (:meth:`padding_share`). The memory is proportional to heads × tokens², so this suits small grids.

        Raises:
            UnsupportedModelError: the positions of the windows or the token grid are unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> trace.step(0).attention().shape
            torch.Size([1, 4, 256, 256])
        """
        weights = self.weights()
        if self.is_plain:
            return weights[:, 0]
        slots, num_tokens = self.require_slots(), self.require_grid().num_tokens
        batch, _, heads = weights.shape[:3]
        tokens = torch.where(slots < 0, num_tokens, slots)  # padding goes to an extra row and column
        dense = weights.new_zeros(batch, heads, num_tokens + 1, num_tokens + 1)
        dense[:, :, tokens[:, :, None], tokens[:, None, :]] = weights.transpose(1, 2)
        return dense[:, :, :-1, :-1]

    def padding_share(self) -> Float[Tensor, "batch head token"]:
        """Return the share of each token's attention that falls on padding.

        Returns:
            float32 (batch, head, token), from 0 to 1.

        Raises:
            UnsupportedModelError: the positions of the windows or the token grid are unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> float(trace.step(0).padding_share().max())
            0.0
        """
        weights, slots, grid = self.weights(), self.require_slots(), self.require_grid()
        is_token = slots >= 0
        lost = (weights * ~is_token[:, None, None]).sum(-1).transpose(1, 2)  # (batch, head, window, slot)
        shares = weights.new_zeros(*lost.shape[:2], grid.num_tokens)
        shares[:, :, slots[is_token]] = lost[:, :, is_token]
        return shares

    def row_sums(self, fused: Fused) -> ReadoutRow:
        """Return the row sums of fused attention, attention to padding included.

        Args:
            fused: float32 (batch, window, query, key), see :meth:`fused`.

        Returns:
            float32 (batch, token).

        Raises:
            UnsupportedModelError: the positions of the windows or the token grid are unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> step = trace.step(-1)
            >>> step.row_sums(step.fused("mean")).shape
            torch.Size([1, 65])
        """
        if self.is_plain:
            return fused[:, 0].sum(-1)
        slots = self.require_slots()
        is_token = slots >= 0
        sums = fused.new_zeros(len(fused), self.require_grid().num_tokens)
        sums[:, slots[is_token]] = fused.sum(-1)[:, is_token]
        return sums

    def pull(self, rows: Rows, fused: Fused) -> tuple[Rows, PaddingMass]:
        """Return the product of row vectors and fused attention on the token grid.

        Args:
            rows: float32 (batch, row, token).
            fused: float32 (batch, window, query, key), see :meth:`fused`.

        Returns:
            The products, float32 (batch, row, token), and the sums that fall on padding, float32 (batch, row).

        Raises:
            UnsupportedModelError: the positions of the windows are unknown.

        Examples:
            >>> import skimage.data, torch, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> step = trace.step(-1)
            >>> rows, padding = step.pull(trace.readout[:, None], step.fused("mean"))
            >>> rows.shape, padding.tolist()
            (torch.Size([1, 1, 65]), [[0.0]])
        """
        with in_float32(rows):
            if self.is_plain:
                return rows @ fused[:, 0], rows.new_zeros(rows.shape[:2])
            slots = self.require_slots()
            is_token = slots >= 0
            in_windows = rows[:, :, slots.clamp_min(0)] * is_token  # (batch, row, window, slot)
            attended = torch.einsum("brwq,bwqk->brwk", in_windows, fused)
        pulled = torch.zeros_like(rows)
        pulled[:, :, slots[is_token]] = attended[:, :, is_token]
        return pulled, (attended * ~is_token).sum((2, 3))

    def pull_head(self, rows: Rows, head: Head) -> tuple[Rows, PaddingMass]:
        """Return the product of row vectors and the attention of one head or of fused heads.

        This equals :meth:`pull` with ``fused(head)``, but computes only the rows of the attention matrix that the row
        vectors need.

        Args:
            rows: float32 (batch, row, token).
            head: index of a head, or ``"mean"``, ``"max"`` or ``"min"`` over heads.

        Returns:
            The products, float32 (batch, row, token), and the sums that fall on padding, float32 (batch, row).

        Raises:
            CallError: the head is out of range or the fusion unknown.
            UnsupportedModelError: the positions of the windows are unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> rows, _ = trace.step(-1).pull_head(trace.readout[:, None], head=0)
            >>> rows.shape
            torch.Size([1, 1, 65])
        """
        head = self.require_head(head)
        if not self.is_plain:
            return self.pull(rows, self.fused(head))
        queries = rows.abs().sum((0, 1)).nonzero().flatten()
        selections = queries.split(max(self.row_slices()[0].stop, 1))
        pulled = torch.zeros_like(rows)
        for selection, block in zip(selections, self.scores.blocks(selections), strict=True):
            with in_float32(rows):
                pulled += rows[:, :, selection] @ fuse_heads(block, head)[:, 0]
        return pulled, rows.new_zeros(rows.shape[:2])

    def require_head(self, head: Head) -> Head:
        """Return a valid head: an int, or the name of a fusion.

        Args:
            head: index of a head, or ``"mean"``, ``"max"`` or ``"min"`` over heads.

        Raises:
            CallError: the head is out of range or the fusion unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.blocks[0].require_head(3), trace.blocks[0].require_head("mean")
            (3, 'mean')
        """
        if isinstance(head, str):
            check_head_fusion(head)
            return head
        return require_index(head, self.num_heads, "head", f"layer {self.layer}")

    def require_grid(self) -> Grid:
        """Return the token grid.

        Raises:
            UnsupportedModelError: the token grid is unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.blocks[0].require_grid()
            Grid(height=8, width=8, prefix=1)
        """
        if self.grid is None:
            raise UnsupportedModelError(
                f"the token grid of {self.module} is unknown, so its attention cannot be placed on the image: pass "
                "patch_size, prefix and readout to vitscope.load"
            )
        return self.grid

    def require_slots(self) -> Slots:
        """Return the token in each slot of each window, (window, slot); −1 for padding.

        Raises:
            UnsupportedModelError: the positions of the windows are unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> trace.blocks[0].require_slots().shape
            torch.Size([16, 16])
        """
        if self.slots is None:
            raise UnsupportedModelError(
                f"{self.module} attends in {self.scores.shape[1]} windows at unknown positions, so its attention "
                "cannot be placed on the token grid: use step.weights(), which returns the weights of each window"
            )
        return self.slots
