"""The recorder of a run with gradients: it observes attention and biases in the forward and the backward pass."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.attention.recomputed_attention import OnRows
from vitscope.attention.rule_set import RuleSet
from vitscope.attention.scores import Factored, Logits, Scores, StoredWeights
from vitscope.attention.step import AttentionStep
from vitscope.attention.tap import AttentionCall
from vitscope.attention.windows import merged_grid
from vitscope.errors import UnsupportedModelError
from vitscope.grid import Grid
from vitscope.models.outputs import num_rows
from vitscope.tracing.capture import PreparedRun
from vitscope.tracing.layer_selection import LayerSelection
from vitscope.tracing.recorder import Recorder
from vitscope.typing import Slots

# The block of some weights, their queries, the weights and their gradient, each (batch, window, head, query, key).
OnWeights = Callable[[AttentionStep, slice, Tensor, Tensor], None]
# Some queries of a pooling layer, their weights and the gradient, each (copy · batch, 1, head, query, key).
OnPooling = Callable[[slice, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class BiasTerm:
    """What the biases between two block inputs contribute to the score.

    Attributes:
        block: index of the block in which, or after which, the biases are added.
        grid: token grid of the values; None if the biases belong to no token (behind the pooling).
        values: (batch, token) for a grid, otherwise (batch, 1).
        padding: the part on padding of windows, (batch,).
    """

    block: int
    grid: Grid | None
    values: Tensor
    padding: Tensor


class Tape:
    """What a run writes down for its backward pass."""

    def __init__(self) -> None:
        self.on_weights: OnWeights | None = None
        self.on_pooling: OnPooling | None = None
        self.streams: list[Tensor] = []
        self.linked = True  # whether the input of each block depends on the input of the first one
        self.finite: dict[int, Tensor] = {}  # by block: whether the gradient of its input is finite
        self.outputs: dict[nn.Module, Tensor] = {}
        # By block and grid: (batch, token), and the part on padding in a last column.
        self.biases: dict[tuple[int, Grid | None], list[Tensor]] = defaultdict(list)

    def clear(self) -> None:
        """Drop all tensors, which hold the graph and hooks that refer to this tape."""
        for notes in (self.streams, self.finite, self.outputs, self.biases):
            notes.clear()

    def receive(self, step: AttentionStep, split: Callable[[Tensor], Tensor], *tensors: Any) -> None:
        """Hand the weights of some queries, and their gradient, to the function that wants them."""
        if self.on_weights is not None:
            rows, weights, gradient = tensors
            self.on_weights(step, rows, split(_precise(weights)), split(_precise(gradient)))

    def receive_pooling(self, split: Callable[[Tensor], Tensor], *tensors: Any) -> None:
        """Hand the weights of a pooling layer, and their gradient, to the function that wants them."""
        if self.on_pooling is not None:
            rows, weights, gradient = tensors
            self.on_pooling(rows, split(_precise(weights)), split(_precise(gradient)))

    def bias_terms(self) -> list[BiasTerm]:
        """Return what the biases contributed in the last backward pass, one term per block and grid."""
        terms = []
        for (block, grid), values in sorted(self.biases.items(), key=lambda item: item[0][0]):
            total = torch.stack(values).sum(0)
            terms.append(BiasTerm(block, grid, total[:, :-1], total[:, -1]))
        return terms


class GradientRecorder(Recorder):
    """A recorder whose attention calls obey local rules and report the gradients of their weights.

    Args:
        run: the model and its input.
        tape: notes of the run for the backward pass.
        weights: whether the gradients of the weights are reported.
    """

    rules: RuleSet

    def __init__(self, run: PreparedRun, tape: Tape, *, weights: bool) -> None:
        super().__init__(run.target, len(run.pixels), run.grid, LayerSelection(None), None, 0)
        self._tape, self._weights = tape, weights
        self._on_rows: OnRows | None = None
        self._module = run.model.module

    def __call__(self, call: AttentionCall) -> Tensor:
        """Record an attention call and return its output, with the gradient of its rule."""
        self._on_rows = None
        return super().__call__(replace(call, run=lambda: self.rules.attend(call, self._on_rows)))

    def _record_block(self, call: AttentionCall, layer: int) -> Tensor:
        """Add the step of a block and return its output."""
        axes = self._axes(call, self.batch)
        scores: Scores = self._scores(call, axes)
        if isinstance(scores, Factored):
            bias = None if scores.bias is None else scores.bias.detach()
            scores = Factored(scores.query.detach(), scores.key.detach(), scores.scale, bias)
        elif isinstance(scores, Logits):
            scores = Logits(scores.logits.detach())
        step = AttentionStep(layer, call.module, scores, self._slots(call.module, scores), self.grid)
        if self._weights:
            self._on_rows = partial(self._tape.receive, step, axes.split)
        output = call.run()
        if call.logits is not None and output.dtype == torch.float32:
            # The graph keeps these weights, so they need no more memory; the scores would.
            step = replace(step, scores=StoredWeights(axes.split(output.detach())))
        self.selection.add(step)
        return output

    def _record_pooling(self, call: AttentionCall) -> None:
        """Store the attention of a pooling layer in the last copy of the images, and report its gradient."""
        axes = self._pooling_axes(call, num_rows(self.batch))
        with torch.no_grad():
            (weights,) = self._scores(call, axes).blocks([slice(None)])
            self._store_pooling(weights[-self.batch :])
        self._on_rows = partial(self._tape.receive_pooling, axes.split)

    def record_bias(self, result: Tensor, constant: Tensor) -> None:
        """Note what a constant that was added in a tensor contributes, and to which tokens, in the backward pass."""
        if not result.requires_grad or not self._tape.streams:
            return
        block = len(self._tape.streams) - 1
        place = self._place(result)

        def receive(gradient: Tensor | None) -> None:
            if gradient is None:  # nothing flows here, as into queries and keys under Libra's rules
                return
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            values = _summed_product(gradient.to(dtype), constant.detach().to(dtype))
            grid, tokens = place(values)
            self._tape.biases[block, grid].append(tokens)

        result.register_hook(receive)

    def _place(self, tensor: Tensor) -> Callable[[Tensor], tuple[Grid | None, Tensor]]:
        """Return a function that sums a tensor like this one over its channels, for each token of a grid."""
        batch, grid = self.batch, self.grid
        shape, count = tuple(tensor.shape), tensor[..., 0].numel() // batch
        if grid is None or tensor.ndim < 2 or tensor.shape[-1] == count * batch == tensor.numel():
            return partial(_unplaced, batch)
        tokens_first = isinstance(self._module.get_submodule(self.running()), nn.MultiheadAttention)
        if count == grid.num_tokens:
            if tokens_first and (tensor.ndim == 2 or shape[1] == batch):
                return lambda values: (grid, _with_padding(values.reshape(count, batch, -1).sum(-1).T))
            if len(tensor) == batch:
                return lambda values: (grid, _with_padding(values.reshape(batch, count, -1).sum(-1)))
        slots = self._running_slots(grid)
        if slots is not None and slots.numel() == count:
            return partial(_from_slots, batch, grid, slots)
        merged = merged_grid(grid)
        if self.hierarchy is not None and count == merged.num_patches and len(tensor) == batch:
            return lambda values: (merged, _with_padding(values.reshape(batch, count, -1).sum(-1)))
        return partial(_unplaced, batch)

    def _running_slots(self, grid: Grid) -> Slots | None:
        """Return the token in each slot of the running block's windows; None outside of window blocks."""
        module = None if self.hierarchy is None else self.hierarchy.block_of(self.running())
        if module is None or self.hierarchy is None:
            return None
        return self.hierarchy.blocks[module].windows(grid).slots(grid)


def _summed_product(gradient: Tensor, constant: Tensor) -> Tensor:
    """Return gradient · constant, already summed over channels, which keep an axis, if the constant is a vector."""
    if (
        constant.ndim == 1
        and len(constant) == gradient.shape[-1]
        and not torch.is_autocast_enabled(gradient.device.type)
    ):
        return (gradient @ constant)[..., None]
    return gradient * constant


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it has that: folds in half precision would lose most digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _with_padding(values: Tensor) -> Tensor:
    """Return (batch, token) with a last column of zeros, the part on padding."""
    return torch.nn.functional.pad(values, (0, 1))


def _unplaced(batch: int, values: Tensor) -> tuple[Grid | None, Tensor]:
    """Return the sum of each image, which belongs to no token."""
    per_image = values.reshape(batch, -1) if len(values) == batch else values.new_zeros(batch, 1) + values.sum() / batch
    return None, _with_padding(per_image.sum(1, keepdim=True))


def _from_slots(batch: int, grid: Grid, slots: Slots, values: Tensor) -> tuple[Grid | None, Tensor]:
    """Return values of the slots of windows as values of tokens, with the part on padding in a last column."""
    in_slots = values.reshape(batch, slots.numel(), -1).sum(-1)
    columns = torch.where(slots < 0, grid.num_tokens, slots).flatten().to(values.device)
    tokens = in_slots.new_zeros(batch, grid.num_tokens + 1)
    return grid, tokens.index_add_(1, columns, in_slots)


def as_tokens(tensor: Tensor, batch: int, grid: Grid, name: str, instead: str = "at='pixels'") -> Tensor:
    """Return (batch, token, channel) or (batch, height, width, channel) as (batch, token, channel)."""
    if len(tensor) == batch and tensor.ndim >= 3 and tensor[0, ..., 0].numel() == grid.num_tokens:
        return tensor.reshape(batch, grid.num_tokens, tensor.shape[-1])
    raise UnsupportedModelError(
        f"a block of {name} takes a tensor of shape {tuple(tensor.shape)}, which does not hold one row for each of "
        f"{grid.num_tokens} tokens: use {instead}"
    )
