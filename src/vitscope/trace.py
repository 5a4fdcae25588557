"""What one run of a model left behind: its attention, step by step, and who reads the result."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitscope.arguments import whole_number
from vitscope.attribution import only_finite
from vitscope.errors import CallError
from vitscope.grid import Grid
from vitscope.picture import Picture
from vitscope.shapes import DenseAttention, Fused, Maps, ReadoutRow, Rows, Slots, Weights

HeadFusion = Literal["mean", "max", "min"]
Head = int | HeadFusion
Query = str | tuple[int, int]
Part = slice | Int[Tensor, " _"]  # some queries: a run of them, or their numbers

# A block of attention weights holds about this many numbers: it stays in a processor's cache.
BLOCK_NUMBERS = 1 << 21


def check_head_fusion(head: str) -> None:
    if head not in get_args(HeadFusion):
        raise CallError(f"unknown head fusion {head!r}: choose mean, max or min, or the number of a head")


def fuse_heads(weights: Weights, head: Head) -> Fused:
    """One map for all heads: a single head, or their mean, maximum or minimum."""
    if isinstance(head, int):
        return weights[:, :, head]
    if head == "mean":
        return weights.mean(2)
    return weights.amax(2) if head == "max" else weights.amin(2)


def in_float32(tensor: Tensor) -> torch.autocast:
    """While held, a caller's autocast does not reach our arithmetic."""
    return torch.autocast(tensor.device.type, enabled=False)


class _Compact:
    """Pickles its tensors alone: they may lie on slabs that are much larger."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Factored(_Compact):
    """Scores as the fused kernels get them: softmax(scale · q·kᵀ + bias)."""

    query: Float[Tensor, "batch window head query channel"]
    key: Float[Tensor, "batch window head key channel"]
    scale: float
    bias: Tensor | None = None  # added to the scores; broadcasts to (batch, window, head, query, key)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, window, head, query, _ = self.query.shape
        return batch, window, head, query, self.key.shape[3]

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def num_bytes(self) -> int:
        return self.query.nbytes + self.key.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def blocks(self, parts: Sequence[Part]) -> Iterator[Weights]:
        """float32 attention weights of some queries at a time."""
        # bmm copies a transposed key for every block unless it lies in one piece.
        keys = self.key.float().contiguous().transpose(-1, -2)
        queries = self.query.float() * self.scale
        for part in parts:
            with in_float32(keys):
                scores = queries[:, :, :, part] @ keys
                if self.bias is not None:
                    scores += self.bias if self.bias.shape[-2] == 1 else self.bias[..., part, :]
                # In place, a block is half as large and stays in cache; only the CPU's kernel is known to allow it.
                in_place = scores.device.type == "cpu" and not scores.requires_grad
                weights = torch.softmax(scores, -1, out=scores if in_place else None)
            yield weights


@dataclass(frozen=True, eq=False)
class Logits(_Compact):
    """Scores that the model computed itself and put through a softmax."""

    logits: Float[Tensor, "batch window head query key"]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, window, head, query, key = self.logits.shape
        return batch, window, head, query, key

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def num_bytes(self) -> int:
        return self.logits.nbytes

    def blocks(self, parts: Sequence[Part]) -> Iterator[Weights]:
        for part in parts:
            with in_float32(self.logits):
                weights = self.logits[:, :, :, part].float().softmax(-1)
            yield weights


@dataclass(frozen=True, eq=False)
class FusedWeights(_Compact):
    """Attention whose heads were fused while the model ran: one map, as if there were one head."""

    weights: Float[Tensor, "batch window 1 query key"]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        batch, window, head, query, key = self.weights.shape
        return batch, window, head, query, key

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def num_bytes(self) -> int:
        return self.weights.nbytes

    def blocks(self, parts: Sequence[Part]) -> Iterator[Weights]:
        for part in parts:
            yield self.weights[:, :, :, part]


Scores = Factored | Logits | FusedWeights


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """One call of attention: who looked at whom, and which tokens they are.

    ``slots[window, slot]`` is the token that a row and a column of a window stand for, −1 for padding. A plain
    ViT is one window with ``slots = arange``. ``slots`` is None where a foreign module gives no way to know.
    """

    layer: int
    module: str
    scores: Scores
    slots: Slots | None
    grid: Grid | None

    @property
    def num_heads(self) -> int:
        return self.scores.shape[2]

    def row_slices(self) -> list[slice]:
        """The queries, cut so that a block of weights of all heads stays small."""
        batch, window, head, query, key = self.scores.shape
        rows = max(16, BLOCK_NUMBERS // (batch * window * head * key))
        return [slice(start, min(start + rows, query)) for start in range(0, query, rows)]

    def weights(self) -> Weights:
        """All attention weights, float32, rows sum to one. Memory: heads × tokens²."""
        return next(self.scores.blocks([slice(None)]))

    def fused(self, head: Head) -> Fused:
        """The heads fused (or one of them), in row blocks: heads × tokens² is never in memory."""
        head = self.known_head(head)
        slices = self.row_slices()
        parts = [fuse_heads(block, head) for block in self.scores.blocks(slices)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def attention(self) -> DenseAttention:
        """Dense (batch, head, token, token), float32: every window put where its tokens are, zero elsewhere."""
        weights = self.weights()
        if self.is_plain:
            return weights[:, 0]
        slots, num_tokens = self._known_slots(), self._known_grid().num_tokens
        batch, windows, heads = weights.shape[:3]
        dense = weights.new_zeros(batch, heads, num_tokens, num_tokens)
        for window in range(windows):
            real = slots[window] >= 0
            tokens = slots[window][real]
            dense[:, :, tokens[:, None], tokens] = weights[:, window][:, :, real][..., real]
        return dense

    @property
    def is_plain(self) -> bool:
        """One window that holds every token in order."""
        windows, tokens = self.scores.shape[1], self.scores.shape[3]
        if windows != 1:
            return False
        return self.slots is None or bool((self.slots[0] == torch.arange(tokens, device=self.slots.device)).all())

    def row_sums(self, fused: Fused) -> ReadoutRow:
        """(batch, token): the sum of each token's row of fused attention on the token grid."""
        if self.is_plain:
            return fused[:, 0].sum(-1)
        slots = self._known_slots()
        real = slots >= 0
        sums = (fused * real[:, None]).sum(-1) * real
        total = sums.new_zeros(len(sums), self._known_grid().num_tokens)
        return total.index_add_(1, slots.clamp_min(0).flatten(), sums.flatten(1))

    def pull(self, rows: Rows, fused: Fused) -> Rows:
        """Row vectors through fused attention: ``rows @ A`` with A on the token grid."""
        with in_float32(rows):
            if self.is_plain:
                return rows @ fused[:, 0]
            slots = self._known_slots()
            real = slots >= 0
            inside = rows[:, :, slots.clamp_min(0)] * real  # (batch, row, window, slot)
            looked_at = torch.einsum("brwq,bwqk->brwk", inside, fused) * real
        pulled = torch.zeros_like(rows)
        return pulled.index_add_(2, slots.clamp_min(0).flatten(), looked_at.flatten(2))

    def looked_at(self, rows: Rows, head: Head) -> Rows:
        """``rows @ A`` for one head or fused heads, computing only the rows of A that are asked for."""
        head = self.known_head(head)
        if not self.is_plain:
            return self.pull(rows, self.fused(head))
        needed = rows.abs().sum((0, 1)).nonzero().flatten()
        step = self.row_slices()[0].stop
        parts = needed.split(max(step, 1))
        pulled = torch.zeros_like(rows)
        for part, block in zip(parts, self.scores.blocks(parts), strict=True):
            with in_float32(rows):
                pulled += rows[:, :, part] @ fuse_heads(block, head)[:, 0]
        return pulled

    def known_head(self, head: Head) -> Head:
        """The head as it was meant; a CallError where there is none."""
        if isinstance(head, str):
            check_head_fusion(head)
            return head
        head = whole_number(head, "head")
        if not -self.num_heads <= head < self.num_heads:
            raise CallError(f"head {head} is not there: layer {self.layer} has heads 0 to {self.num_heads - 1}")
        return head

    def _known_slots(self) -> Slots:
        if self.slots is None:
            raise CallError(
                f"{self.module} attends in {self.scores.shape[1]} windows whose places on the grid are unknown: "
                "step.weights() gives each window by itself"
            )
        return self.slots

    def _known_grid(self) -> Grid:
        if self.grid is None:
            raise CallError(
                f"{self.module} belongs to a model whose token grid vitscope does not know; for a live module of your "
                "own, pass patch_size, prefix and readout to vitscope.load"
            )
        return self.grid


@dataclass(frozen=True, eq=False)
class Trace:
    """A model's run: attention steps in order of running, and the readout the classifier reads.

    ``readout`` is (batch, token), non-negative, rows sum to one: one-hot on CLS, uniform where the model
    mean-pools, the pooling attention where it attends, both where it concatenates. None for a foreign model.
    """

    steps: Sequence[AttentionStep]
    num_layers: int
    readout: ReadoutRow | None
    pictures: Sequence[Picture]
    prefix_names: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def step(self, layer: int) -> AttentionStep:
        """The attention of one block; ``layer`` counts blocks from 0, negative from the end."""
        layer = whole_number(layer, "layer")
        if not -self.num_layers <= layer < self.num_layers:
            raise CallError(f"layer {layer} is not there: the model has layers 0 to {self.num_layers - 1}")
        wanted = layer % self.num_layers
        for step in self.steps:
            if step.layer == wanted:
                return step
        raise CallError(f"layer {layer} was not kept: this trace holds layers {[step.layer for step in self.steps]}")

    def attention(self, layer: int) -> DenseAttention:
        """Dense attention of one block.

        Returns:
            float32 (batch, head, token, token), prefix tokens included, rows sum to one.
        """
        return self.step(layer).attention()

    def map(self, layer: int, head: Head = "mean", query: Query = "readout") -> Maps:
        """What one query looks at in one block.

        Args:
            layer: counts attention blocks from 0, negative from the end.
            head: a head's number, or ``"mean"``, ``"max"``, ``"min"`` over heads.
            query: ``"readout"`` (what the classifier reads), the name of a prefix token (``"cls"``,
                ``"distillation"``, ``"register_1"``, …), or a patch as (row, column).

        Returns:
            (batch, height, width) attention weights of the patches; the prefix tokens' share is left out and
            nothing is rescaled.
        """
        step = self.step(layer)
        grid = step._known_grid()
        rows = self.query_row(step, query)[:, None]
        return only_finite(grid.patches(step.looked_at(rows, head)[:, 0]), "attention")

    def query_row(self, step: AttentionStep, query: Query) -> ReadoutRow:
        """The row vector of a query: the readout, or one-hot on a token."""
        grid = step._known_grid()
        if isinstance(query, str) and query == "readout":
            if self.readout is None:
                raise CallError("the readout of this model is unknown: name a query, or pass readout to vitscope.load")
            return self.readout
        if isinstance(query, str):
            if query not in self.prefix_names:
                names = ", ".join(repr(name) for name in ("readout", *self.prefix_names))
                raise CallError(f"unknown query {query!r}: this model has {names} and patches as (row, column)")
            token = self.prefix_names.index(query)
        else:
            token = grid.token(*_pair(query))
        row = torch.zeros(step.scores.shape[0], grid.num_tokens, dtype=torch.float32, device=step.scores.device)
        row[:, token] = 1
        return row


def _pair(query: Any) -> tuple[int, int]:
    try:
        row, column = query
    except (TypeError, ValueError):
        raise CallError(
            f"unknown query {query!r}: pass 'readout', the name of a prefix token or (row, column)"
        ) from None
    return whole_number(row, "the query's row"), whole_number(column, "the query's column")
