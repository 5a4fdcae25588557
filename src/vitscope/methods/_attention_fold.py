"""The fold of a row vector over attention and its gradient, inside the backward pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from vitscope.attention.patch_merging import Merge, MergeStep
from vitscope.attention.step import AttentionStep
from vitscope.attention.trace import Trace
from vitscope.errors import UnsupportedModelError, WorkError
from vitscope.methods.rollout import discard_smallest
from vitscope.typing import Fused, Rows, Weights

# (weights, gradient), both (batch, window, head, query, key) → (batch, window, query, key).
Combine = Callable[[Weights, Weights], Fused]


class RowFold(ABC):
    """A row vector that each block multiplies from the right, as soon as the gradient of its attention is known.

    Gradients arrive from the last block to the first, some queries at a time, which is the order of the fold. No map of
    all heads is ever stored.

    Args:
        trace: the run; the row starts from its readout.
        method: name of the method, for messages.
        start_layer: index of the first block to include, not negative.
        merge: shares of the four tokens that patch merging joins.
    """

    def __init__(self, trace: Trace, method: str, *, start_layer: int, merge: Merge = "equal") -> None:
        trace.require_chain(method)
        self._trace, self._method, self._start, self._merge = trace, method, start_layer, merge
        self._row = trace.readout_row(None)[:, None]
        self._padding = self._row.new_zeros(self._row.shape[:2])
        self._remaining = list(reversed(trace.steps))
        self._step: AttentionStep | None = None
        self._layers: set[int] = set()

    def __call__(self, step: AttentionStep, rows: slice, weights: Weights, gradient: Weights) -> None:
        """Take the weights and gradients of some queries of a block."""
        if step.layer < self._start:
            return
        if self._step is None or step.layer != self._step.layer:
            self._close()
            self._merge_until(step.layer)
            self._require_tokens(step)
            self._step = step
            self._layers.add(step.layer)
            self._open(step)
        self._receive(rows, weights, gradient)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the row over the finest tokens, (batch, token), and the part on padding, (batch,).

        Raises:
            WorkError: a block received no gradient.
        """
        self._close()
        missing = {block.layer for block in self._trace.blocks if block.layer >= self._start} - self._layers
        if missing:
            raise WorkError(f"no gradient reached the attention of layer {max(missing)}: its module detaches it")
        self._merge_until(None)
        return self._row[:, 0], self._padding[:, 0]

    def _require_tokens(self, step: AttentionStep) -> None:
        """Raise an error unless the row has an entry for each token of a block."""
        if self._row.shape[-1] != step.require_grid().num_tokens:
            raise UnsupportedModelError(
                f"{self._method} is not supported for this model: how its tokens change after layer {step.layer} is "
                "unknown; use attention_map for each block"
            )

    @abstractmethod
    def _open(self, step: AttentionStep) -> None:
        """Begin the product with a block."""

    @abstractmethod
    def _receive(self, rows: slice, weights: Weights, gradient: Weights) -> None:
        """Take the weights and gradients of some queries of the current block."""

    @abstractmethod
    def _product(self, step: AttentionStep) -> Tensor:
        """Return the product of the row and a block, all of whose queries were received."""

    def _close(self) -> None:
        """Finish the product with the current block."""
        if self._step is not None:
            self._row = self._product(self._step)
        self._step = None

    def _merge_until(self, layer: int | None) -> None:
        """Carry the row through patch merging, back to a block, or to the finest grid for None."""
        while self._remaining:
            step = self._remaining.pop(0)
            if isinstance(step, MergeStep):
                self._row, on_padding = step.pull(self._row, self._merge)
                self._padding = self._padding + on_padding
            elif step.layer == layer:
                return


class AttentionFold(RowFold):
    """A row vector that each block multiplies from the right by a matrix of its attention and gradient.

    Args:
        trace, method, start_layer, merge: as for :class:`RowFold`.
        combine: function that returns the matrix Ā of some queries from their weights and gradients.
        normalize: False for r ← r + r·Ā, True for r ← r · rownorm(Ā + I).
        discard_ratio: share of the smallest entries of each image's Ā that become zero.
    """

    def __init__(
        self,
        trace: Trace,
        method: str,
        combine: Combine,
        *,
        start_layer: int,
        normalize: bool = False,
        discard_ratio: float = 0.0,
        merge: Merge = "equal",
    ) -> None:
        super().__init__(trace, method, start_layer=start_layer, merge=merge)
        self._combine, self._normalize, self._discard = combine, normalize, discard_ratio
        self._blocks: list[tuple[slice, Fused]] = []

    def _open(self, step: AttentionStep) -> None:
        self._plain = step.is_plain
        self._row = self._through_mlp(step.layer, self._row)
        self._pulled, self._scaled = torch.zeros_like(self._row), self._row.clone()

    def _receive(self, rows: slice, weights: Weights, gradient: Weights) -> None:
        fused = self._combine(weights, gradient)
        if self._discard or not self._plain:
            self._blocks.append((rows, fused))
        else:
            self._pull(rows, fused)

    def _pull(self, rows: slice, fused: Fused) -> None:
        """Add the product of some entries of the row with their queries."""
        self._row, self._scaled = self._row.to(fused.dtype), self._scaled.to(fused.dtype)
        scaled = self._row[:, :, rows]
        if self._normalize:
            scaled = scaled / (1 + fused[:, 0].sum(-1))[:, None]
            self._scaled[:, :, rows] = scaled
        with torch.autocast(fused.device.type, enabled=False):
            self._pulled = self._pulled.to(fused.dtype) + scaled @ fused[:, 0]

    def _product(self, step: AttentionStep) -> Tensor:
        if self._blocks:
            fused = torch.cat([block for _, block in self._blocks], dim=2)
            self._blocks = []
            if self._discard:
                fused = discard_smallest(fused, self._discard, step.pairs)
            if self._plain:
                self._pull(slice(0, fused.shape[2]), fused)
            else:
                self._scaled = self._row.to(fused.dtype)
                if self._normalize:
                    self._scaled = self._scaled / (1 + step.row_sums(fused))[:, None]
                self._pulled, on_padding = step.pull(self._scaled, fused)
                self._padding = self._padding + on_padding
        return self._through_attention(step.layer, self._scaled, self._pulled)

    def _through_mlp(self, _layer: int, row: Rows) -> Rows:
        """Return the row before the MLP of a block from the row after it: the same, because tokens do not mix."""
        return row

    def _through_attention(self, _layer: int, row: Rows, pulled: Rows) -> Rows:
        """Return the row before a block from the row before its MLP and the product of that row with its attention."""
        return row + pulled
