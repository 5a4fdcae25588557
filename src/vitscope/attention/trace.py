"""What one run of a model left behind: its attention, step by step, and who reads the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitscope.attention.omitted import OmittedCall, of_the_image
from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.scores import Compact, Head, Scores, check_head_fusion, fuse_heads, in_float32
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.typing import DenseAttention, Fallen, Fused, Maps, ReadoutRow, Rows, Slots, Weights
from vitscope.validation import class_index, only_finite, whole_number

Query = str | tuple[int, int]

# A block of attention weights holds about this many numbers: it stays in a processor's cache.
BLOCK_NUMBERS = 1 << 21


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """One call of attention: who looked at whom, and which tokens they are.

    ``slots[window, slot]`` is the token that a row and a column of a window stand for, −1 for padding. A plain
    ViT is one window with ``slots = arange``. ``slots`` is None where a foreign module gives no way to know.
    Padding is not part of the token grid: what tokens look at there is given apart, never spread over the rest.
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
        """The sizes of the step in words."""
        _, windows, heads, tokens, _ = self.scores.shape
        return f"{f'{windows} windows × ' if windows > 1 else ''}{heads} heads × {tokens} tokens"

    @property
    def num_heads(self) -> int:
        return self.scores.shape[2]

    def row_slices(self) -> list[slice]:
        """The queries, cut so that a block of weights of all heads stays small."""
        batch, window, head, query, key = self.scores.shape
        rows = max(16, BLOCK_NUMBERS // (batch * window * head * key))
        return [slice(start, min(start + rows, query)) for start in range(0, query, rows)]

    def weights(self) -> Weights:
        """All attention weights, float32, rows sum to one. Memory: windows × heads × slots²."""
        return next(self.scores.blocks([slice(None)]))

    def fused(self, head: Head) -> Fused:
        """The heads fused (or one of them), in row blocks: heads × tokens² is never in memory."""
        head = self.require_head(head)
        slices = self.row_slices()
        parts = [fuse_heads(block, head) for block in self.scores.blocks(slices)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def attention(self) -> DenseAttention:
        """Dense (batch, head, token, token), float32: every window put where its tokens are, zero elsewhere.

        Memory: heads × tokens²; for small grids and tests.
        """
        weights = self.weights()
        if self.is_plain:
            return weights[:, 0]
        slots, num_tokens = self.require_slots(), self.require_grid().num_tokens
        batch, _, heads = weights.shape[:3]
        sink = torch.where(slots < 0, num_tokens, slots)  # one row and column more, for padding
        dense = weights.new_zeros(batch, heads, num_tokens + 1, num_tokens + 1)
        dense[:, :, sink[:, :, None], sink[:, None, :]] = weights.transpose(1, 2)
        return dense[:, :, :-1, :-1]

    def on_padding(self) -> Float[Tensor, "batch head token"]:
        """The share of each token's attention that falls on padding, where there is no image."""
        weights, slots, grid = self.weights(), self.require_slots(), self.require_grid()
        real = slots >= 0
        lost = (weights * ~real[:, None, None]).sum(-1).transpose(1, 2)  # (batch, head, window, slot)
        shares = weights.new_zeros(*lost.shape[:2], grid.num_tokens)
        shares[:, :, slots[real]] = lost[:, :, real]
        return shares

    @property
    def is_plain(self) -> bool:
        """One window that holds every token in order."""
        windows, tokens = self.scores.shape[1], self.scores.shape[3]
        if windows != 1:
            return False
        return self.slots is None or bool((self.slots[0] == torch.arange(tokens, device=self.slots.device)).all())

    @property
    def pairs(self) -> Tensor | None:
        """(window, query, key), True where both are tokens; None where there is no padding."""
        if self.slots is None or bool((self.slots >= 0).all()):
            return None
        real = self.slots >= 0
        return real[:, :, None] & real[:, None, :]

    def row_sums(self, fused: Fused) -> ReadoutRow:
        """(batch, token): the sum of each token's row of fused attention, what falls on padding included."""
        if self.is_plain:
            return fused[:, 0].sum(-1)
        slots = self.require_slots()
        real = slots >= 0
        sums = fused.new_zeros(len(fused), self.require_grid().num_tokens)
        sums[:, slots[real]] = fused.sum(-1)[:, real]
        return sums

    def pull(self, rows: Rows, fused: Fused) -> tuple[Rows, Fallen]:
        """Row vectors through fused attention: ``rows @ A`` with A on the token grid, and what fell on padding."""
        with in_float32(rows):
            if self.is_plain:
                return rows @ fused[:, 0], rows.new_zeros(rows.shape[:2])
            slots = self.require_slots()
            real = slots >= 0
            inside = rows[:, :, slots.clamp_min(0)] * real  # (batch, row, window, slot)
            looked_at = torch.einsum("brwq,bwqk->brwk", inside, fused)
        pulled = torch.zeros_like(rows)
        pulled[:, :, slots[real]] = looked_at[:, :, real]
        return pulled, (looked_at * ~real).sum((2, 3))

    def looked_at(self, rows: Rows, head: Head) -> tuple[Rows, Fallen]:
        """:meth:`pull` for one head or fused heads, computing only the rows of A that are asked for."""
        head = self.require_head(head)
        if not self.is_plain:
            return self.pull(rows, self.fused(head))
        needed = rows.abs().sum((0, 1)).nonzero().flatten()
        step = self.row_slices()[0].stop
        parts = needed.split(max(step, 1))
        pulled = torch.zeros_like(rows)
        for part, block in zip(parts, self.scores.blocks(parts), strict=True):
            with in_float32(rows):
                pulled += rows[:, :, part] @ fuse_heads(block, head)[:, 0]
        return pulled, rows.new_zeros(rows.shape[:2])

    def require_head(self, head: Head) -> Head:
        """The head as it was meant; a CallError where there is none."""
        if isinstance(head, str):
            check_head_fusion(head)
            return head
        head = whole_number(head, "head")
        if not -self.num_heads <= head < self.num_heads:
            raise CallError(f"head {head} is not there: layer {self.layer} has heads 0 to {self.num_heads - 1}")
        return head

    def require_grid(self) -> Grid:
        """The token grid, or a CallError where nobody knows it."""
        if self.grid is None:
            raise UnsupportedModelError(
                f"{self.module} belongs to a model whose token grid vitscope does not know; for a live module of your "
                "own, pass patch_size, prefix and readout to vitscope.load"
            )
        return self.grid

    def require_slots(self) -> Slots:
        """Which tokens the windows hold, or a CallError where nobody knows."""
        if self.slots is None:
            raise UnsupportedModelError(
                f"{self.module} attends in {self.scores.shape[1]} windows whose places on the grid are unknown: "
                "step.weights() gives each window by itself"
            )
        return self.slots


@dataclass(frozen=True, eq=False)
class PooledClassifier(Compact):
    """A classifier that is linear in the mean of its tokens, so each logit is a sum over tokens, exactly.

    ``logit_c = bias_c + mean_i weight_c · features_i``.
    """

    features: Float[Tensor, "batch token channel"]  # what is averaged: the last tokens after the last LayerNorm
    weight: Float[Tensor, "label channel"]

    def contributions(self, index: int) -> Float[Tensor, "batch token"]:
        """What each token adds to the logit of a class: weight_c · features_i / tokens."""
        with in_float32(self.features):
            return self.features.float() @ self.weight[index].float() / self.features.shape[1]

    def shares(self, index: int, label: str) -> ReadoutRow:
        """The share of each token in what speaks for a class; tokens that speak against it have none."""
        positive = self.contributions(index).clamp_min(0)
        totals = positive.sum(-1, keepdim=True)
        if not bool((totals > 0).all()):
            raise CallError(f"no token speaks for {label!r}, so its readout has no row: take another target, or none")
        return positive / totals


Step = AttentionStep | MergeStep


@dataclass(frozen=True, eq=False)
class Trace:
    """A model's run: attention and merging in order of running, and the readout the classifier reads.

    ``readout`` is (batch, token) over the last grid, non-negative, rows sum to one: one-hot on CLS, uniform where
    the model mean-pools, the pooling attention where it attends, both where it concatenates. None for a foreign model.
    ``omitted`` lists the attention calls of the run that are no step. ``unchained`` says why the blocks do not follow
    one another, and is None if each depends on all before it.
    """

    steps: Sequence[Step]
    num_layers: int
    readout: ReadoutRow | None
    images: Sequence[InputImage]
    prefix_names: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    classifier: PooledClassifier | None = None
    omitted: tuple[OmittedCall, ...] = ()
    unchained: str | None = None

    def __repr__(self) -> str:
        blocks, kept = f"{self.num_layers} attention blocks", len(self.blocks)
        lines = [
            f"<Trace of {self.provenance.get('model', 'a model')}: {len(self.images)} "
            f"{'image' if len(self.images) == 1 else 'images'}, {blocks}"
            + ("" if kept == self.num_layers else f", {kept} kept")
        ]
        shapes = dict.fromkeys(step.shape_text for step in self.blocks)
        lines.append("  " + "; ".join([*list(shapes)[:4], *(["…"] if len(shapes) > 4 else [])]))
        prefix = f" after {', '.join(self.prefix_names)}" if self.prefix_names else ""
        grid = self.grid if self.steps else None
        lines.append("  grid unknown" if grid is None else f"  grid {grid.height}×{grid.width}{prefix}")
        if self.omitted:
            lines.append(f"  {len(self.omitted)} attention calls are not in the trace (trace.omitted)")
        source = self.provenance.get("readout")
        named = " + ".join(f"{weight:g} {name}" for name, weight in source.items()) if source else "given"
        lines.append(f"  readout {'unknown' if self.readout is None else named}>")
        return "\n".join(lines)

    @property
    def grid(self) -> Grid | None:
        """The grid of the first step, on which results that went through all blocks lie; None for a foreign model."""
        return self.steps[0].grid

    @property
    def blocks(self) -> list[AttentionStep]:
        """The attention steps alone."""
        return [step for step in self.steps if isinstance(step, AttentionStep)]

    @property
    def stages(self) -> list[list[AttentionStep]]:
        """The blocks between one merging and the next, empty where none was kept; a plain ViT is one stage."""
        stages: list[list[AttentionStep]] = [[]]
        for step in self.steps:
            if isinstance(step, MergeStep):
                stages.append([])
            elif stages[-1] and stages[-1][-1].grid != step.grid:
                stages.append([step])
            else:
                stages[-1].append(step)
        return stages

    def step(self, layer: int) -> AttentionStep:
        """The attention of one block; ``layer`` counts blocks from 0, negative from the end."""
        layer = whole_number(layer, "layer")
        if not -self.num_layers <= layer < self.num_layers:
            raise CallError(f"layer {layer} is not there: the model has layers 0 to {self.num_layers - 1}")
        wanted = layer % self.num_layers
        for step in self.blocks:
            if step.layer == wanted:
                return step
        raise CallError(f"layer {layer} was not kept: this trace holds layers {[step.layer for step in self.blocks]}")

    def attention(self, layer: int) -> DenseAttention:
        """Dense attention of one block, on the block's own token grid.

        Returns:
            float32 (batch, head, token, token), prefix tokens included; zero between windows. Rows sum to one, less
            what falls on padding (:meth:`AttentionStep.on_padding`).
        """
        return self.step(layer).attention()

    def map(self, layer: int, head: Head = "mean", query: Query = "readout") -> Maps:
        """What one query looks at in one block.

        Args:
            layer: counts attention blocks from 0, negative from the end.
            head: a head's number, or ``"mean"``, ``"max"``, ``"min"`` over heads.
            query: ``"readout"`` (what the classifier reads), the name of a prefix token (``"cls"``,
                ``"distillation"``, ``"register_1"``, …), or a patch of the block's grid as (row, column).

        Returns:
            (batch, height, width) attention weights of the patches, on the block's grid; the share of prefix tokens
            and padding is left out and nothing is rescaled.
        """
        return self.map_and_padding(layer, head, query)[0]

    def map_and_padding(self, layer: int, head: Head, query: Query) -> tuple[Maps, Float[Tensor, " batch"]]:
        """:meth:`map`, and the share of the query's attention that fell on padding."""
        step = self.step(layer)
        grid = step.require_grid()
        rows, fallen = step.looked_at(self.query_row(step, query)[:, None], head)
        return only_finite(grid.patches(rows[:, 0]), "attention"), fallen[:, 0]

    def query_row(self, step: AttentionStep, query: Query) -> ReadoutRow:
        """The row vector of a query over a block's tokens: the readout, or one-hot on a token."""
        grid = step.require_grid()
        if isinstance(query, str) and query == "readout":
            return self.readout_at(step)
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

    @property
    def why_unchained(self) -> str | None:
        """Why the image cannot be followed from block to block, or None if it can."""
        calls = of_the_image(self.omitted)
        if self.unchained is None and calls:
            some = "1 attention call of the image is" if len(calls) == 1 else f"{len(calls)} attention calls are"
            return (
                f"{some} not among the blocks of the trace, e.g. {calls[0]}, so the blocks alone do not say how the "
                "image reaches the output: attention_map shows each"
            )
        return self.unchained

    def require_chain(self) -> None:
        """Refuse what follows the image from block to block if the blocks, as seen, are not one chain.

        Raises:
            UnsupportedModelError: blocks run side by side, or calls between them are not in the trace.
        """
        reason = self.why_unchained
        if reason is not None:
            raise UnsupportedModelError(f"{self.provenance.get('model', 'this model')} has no rollout: {reason}")

    def readout_at(self, step: AttentionStep) -> ReadoutRow:
        """The readout over a block's tokens: the last grid's row brought back through merging alone, equal parts."""
        rows = self.readout_row(None)[:, None]
        for later in reversed(self.steps):
            if later is step:
                break
            if isinstance(later, MergeStep):
                self.require_chain()
                rows, _ = later.pull(rows, "equal")
        if rows.shape[-1] != step.require_grid().num_tokens:
            raise UnsupportedModelError(
                f"how tokens of layer {step.layer} reach the readout is unknown in this model: name a patch as "
                "(row, column)"
            )
        return rows[:, 0]

    def readout_row(self, target: int | str | None) -> ReadoutRow:
        """The row over the last grid that a result starts from: what the classifier reads, or a class's own.

        Args:
            target: None for the readout; an index or a label for the share of each token in that class's logit,
                ∝ (weight_c · features_i)⁺. Known where the classifier is linear in the mean of its tokens.
        """
        if self.readout is None:
            raise UnsupportedModelError(
                "the readout of this model is unknown: name a query, or pass readout to vitscope.load; for one tuned "
                "with CLS tokens in its windows vitscope.window_cls shows what they look at"
            )
        if target is None:
            return self.readout
        if self.classifier is None:
            raise UnsupportedModelError(
                f"{self.provenance.get('model', 'this model')} does not add up its logits token by token, so it has no "
                "readout by class: leave target out"
            )
        index = self.target_index(target)
        return self.classifier.shares(index, self.label(index))

    def target_index(self, target: int | str) -> int:
        """The class that was meant."""
        classifier = self.classifier
        return class_index(target, self.labels, 0 if classifier is None else len(classifier.weight))

    def label(self, index: int) -> str:
        return self.labels[index] if self.labels and index < len(self.labels) else f"class {index}"


def _pair(query: Any) -> tuple[int, int]:
    try:
        row, column = query
    except (TypeError, ValueError):
        raise CallError(
            f"unknown query {query!r}: pass 'readout', the name of a prefix token or (row, column)"
        ) from None
    return whole_number(row, "the query's row"), whole_number(column, "the query's column")
