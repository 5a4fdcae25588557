"""Run a model with attention heads, whole blocks or keys switched off. Nothing of the model changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from vitscope.attention.axes import Axes
from vitscope.attention.flow import Flow
from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.attention.step import AttentionStep, require_index
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.attention.windows import PADDING
from vitscope.errors import CallError, UnsupportedModelError, WorkError
from vitscope.grid import Grid
from vitscope.interventions.token_dropping import attend_without
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import run_and_capture
from vitscope.tracing.experiment import axes_of_call
from vitscope.typing import Groups, Pixels, Slots
from vitscope.validation import require_integer, short_repr

Head = tuple[int, int]  # layer, head
Key = str | tuple[int, int]  # the name of a prefix token, or (row, column) of a patch of the finest grid
Replacement = Literal["mean", "zero"]


def check_replacement(replacement: str) -> None:
    """Raise a CallError if ``replacement`` is neither "mean" nor "zero"."""
    if replacement not in get_args(Replacement):
        raise CallError(f"unknown replacement {replacement!r}: choose {' or '.join(get_args(Replacement))}")


@dataclass(frozen=True)
class Ablation:
    """The parts of a model's attention that are switched off for one image.

    Attributes:
        heads: (layer, head) of each head whose output is replaced.
        keys: tokens that no token attends to, in any block: names of prefix tokens, or patches as (row, column).
    """

    heads: frozenset[Head] = frozenset()
    keys: frozenset[Key] = frozenset()


@dataclass(frozen=True, eq=False)
class _Block:
    """An attention block: what :class:`~vitscope.AttentionStep` says about it, without its scores."""

    layer: int
    module: str
    windows: int
    num_heads: int
    slots: Slots | None
    grid: Grid | None

    @classmethod
    def from_step(cls, step: AttentionStep) -> "_Block":
        return cls(step.layer, step.module, step.scores.shape[1], step.num_heads, step.slots, step.grid)

    @cached_property
    def is_token(self) -> Bool[Tensor, "window slot"] | None:
        """Whether each slot holds a token; None if all do."""
        if self.slots is None or bool((self.slots != PADDING).all()):
            return None
        return self.slots != PADDING


class AblatedModel:
    """A model whose attention heads and keys can be switched off while it runs, by changing its attention calls.

    The output of a head is o(q) = Σ_k A(q, k) v(k) for each query q, before the projection of the block. Mean ablation
    replaces it by (1/n) Σ_q o(q), the mean over all n tokens of the image, prefix tokens included and padding excluded,
    in all windows of the block. The head then tells every token the same. Zero ablation replaces it by zero. With all
    heads of a block at zero, its attention adds only the bias of the projection.

    A key that is switched off gets no attention, and the other keys of its window share it. Its token still attends
    to others, and a classifier that reads it still does. After patch merging, a token is switched off if all of its
    patches are. The attention output of a window in which all keys are off is zero.

    Args:
        model: the model. One image runs through it to find its blocks.
        pixels: preprocessed images, (batch, channel, height, width), of the size that it will run on.

    Raises:
        NoAttentionError: as for :func:`vitscope.capture`.
        UnsupportedModelError: as for :func:`vitscope.capture`.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, torch, vitscope as vs
        >>> from vitscope.interventions.head_ablation import AblatedModel, Ablation
        >>> model = vs.load("vit-nano")
        >>> pixels, _ = model.prepare(skimage.data.chelsea())
        >>> ablated = AblatedModel(model, pixels)
        >>> only_two = Ablation(ablated.heads - {(5, 0), (5, 1)})
        >>> with torch.no_grad(), model.running():
        ...     ablated.run(model.logits, pixels, [only_two]).shape
        torch.Size([1, 10])
    """

    def __init__(self, model: VisionModel, pixels: Pixels) -> None:
        self.model, self._shape = model, pixels.shape[1:]
        result = run_and_capture(model, pixels[:1], merge="equal", by_class=False)
        self.prefix_names, self.grid = result.trace.prefix_names, result.trace.grid
        # The blocks, and the groups of each patch merging between them, in the order in which they run.
        self._path: list[_Block | Groups] = [
            step.groups if isinstance(step, MergeStep) else _Block.from_step(step) for step in result.trace.steps
        ]
        self.blocks = [block for block in self._path if isinstance(block, _Block)]
        self._calls = dict(zip(result.calls, self.blocks, strict=True))

    @property
    def heads(self) -> frozenset[Head]:
        """All heads, as (layer, head)."""
        return frozenset(head for block in self.blocks for head in self.heads_of(block.layer))

    def heads_of(self, layer: int) -> frozenset[Head]:
        """Return all heads of a block; negative layers count from the end.

        Raises:
            CallError: there is no such layer.
        """
        layer = require_index(layer, len(self.blocks), "layer", self.model.name) % len(self.blocks)
        return frozenset((layer, head) for head in range(self.blocks[layer].num_heads))

    def run(
        self,
        evaluate: Callable[[Pixels], Tensor],
        pixels: Pixels,
        ablations: Sequence[Ablation],
        replacement: Replacement = "mean",
    ) -> Tensor:
        """Return the output of the model, with a different ablation for each image.

        Args:
            evaluate: a function that runs the model once on pixels, inside ``model.running()``.
            pixels: preprocessed images, (batch, channel, height, width).
            ablations: one for each image.
            replacement: ``"mean"`` or ``"zero"``.

        Raises:
            CallError: a layer, head or key does not exist, or there is not one ablation for each image.
            UnsupportedModelError: the order of heads and windows is ambiguous, or for ``"mean"`` the positions of the
                windows or the product of weights and values are unknown.
            WorkError: the model fails, or runs other attention than before.
        """
        check_replacement(replacement)
        if len(ablations) != len(pixels):
            raise CallError(f"{len(ablations)} ablations for {len(pixels)} images: pass one for each image")
        if pixels.shape[1:] != self._shape:
            shapes = ["×".join(map(str, shape)) for shape in (pixels.shape[1:], self._shape)]
            raise CallError(f"images of {shapes[0]} (channel×height×width) were given: {shapes[1]} is expected")
        self._check_heads(ablations)
        heads = {block.layer: self._head_mask(block, ablations, pixels.device) for block in self.blocks}
        run = _Run(self.model, pixels, self._calls, heads, self._hidden_slots(ablations, pixels.device), replacement)
        tap = Tap(self.model.module, run.on_attention, Flow(), SoftmaxTracker(on_product=run.on_product))
        with tap, tap.follow():
            output = evaluate(pixels)
        run.check_complete()
        return output

    def _check_heads(self, ablations: Sequence[Ablation]) -> None:
        """Raise a CallError if a head does not exist."""
        for layer, head in sorted(frozenset().union(*(ablation.heads for ablation in ablations)) - self.heads):
            if not 0 <= layer < len(self.blocks):
                raise CallError(
                    f"layer {layer} is out of range: {self.model.name} has layers 0 to {len(self.blocks) - 1}"
                )
            last = self.blocks[layer].num_heads - 1
            raise CallError(f"head {head} is out of range: layer {layer} has heads 0 to {last}")

    @staticmethod
    def _head_mask(
        block: _Block, ablations: Sequence[Ablation], device: torch.device
    ) -> Bool[Tensor, "batch head"] | None:
        """Return whether each head of a block is switched off for each image; None if none is."""
        mask = [[(block.layer, head) in ablation.heads for head in range(block.num_heads)] for ablation in ablations]
        return torch.tensor(mask, dtype=torch.bool, device=device) if any(map(any, mask)) else None

    def _hidden_slots(
        self, ablations: Sequence[Ablation], device: torch.device
    ) -> dict[int, Bool[Tensor, "batch window slot"]]:
        """Return, for each layer, whether the key in each slot is switched off; empty if no key is."""
        if not any(ablation.keys for ablation in ablations):
            return {}
        if self.grid is None:
            raise UnsupportedModelError(
                f"the token grid of {self.model.name} is unknown, so its keys have no positions: pass patch_size, "
                "prefix and readout to vitscope.load"
            )
        off = torch.zeros(len(ablations), self.grid.num_tokens, dtype=torch.bool, device=device)
        for row, ablation in zip(off, ablations, strict=True):
            row[[self._token(self.grid, key) for key in ablation.keys]] = True
        hidden = {}
        for step in self._path:
            if isinstance(step, Tensor):
                groups = step.to(device)
                off = (off[:, groups.clamp_min(0)] | (groups == PADDING)).all(-1)
                continue
            if step.grid is None or step.slots is None or step.grid.num_tokens != off.shape[1]:
                raise UnsupportedModelError(
                    f"keys cannot be switched off in {step.module}: the positions of its tokens are unknown"
                )
            slots = step.slots.to(device)
            hidden[step.layer] = off[:, slots.clamp_min(0)] & (slots != PADDING)
        return hidden

    def _token(self, grid: Grid, key: Any) -> int:
        """Return the token of a key."""
        if isinstance(key, str):
            if key not in self.prefix_names:
                names = ", ".join(repr(name) for name in self.prefix_names)
                raise CallError(
                    f"unknown key {key!r}: choose {names + ' or ' if names else ''}a patch as (row, column)"
                )
            return self.prefix_names.index(key)
        try:
            row, column = key
        except (TypeError, ValueError):
            raise CallError(
                f"unknown key {short_repr(key)}: pass the name of a prefix token or (row, column)"
            ) from None
        return grid.token(require_integer(row, "the key's row"), require_integer(column, "the key's column"))


class _Run:
    """One forward pass in which heads and keys are switched off."""

    def __init__(
        self,
        model: VisionModel,
        pixels: Pixels,
        calls: dict[int, _Block],
        heads: dict[int, Bool[Tensor, "batch head"] | None],
        hidden: dict[int, Bool[Tensor, "batch window slot"]],
        replacement: Replacement,
    ) -> None:
        self.model, self.pixels, self.calls = model, pixels, calls
        self.heads, self.hidden, self.replacement = heads, hidden, replacement
        self.seen: set[int] = set()
        self.pending: dict[int, AttentionCall] = {}

    def on_attention(self, call: AttentionCall) -> Tensor:
        """Return the output of an attention call without the heads and keys that are switched off."""
        block = self.calls.get(call.index)
        if block is None:
            return call.run()
        if not f"{call.module}.".startswith(f"{block.module}." if block.module else ""):
            raise WorkError(
                f"{self.model.name} calls the attention of {call.module or 'the model'} instead of {block.module}: its "
                "attention calls differ between images"
            )
        self.seen.add(call.index)
        output = self._output(call, block)
        if self.heads[block.layer] is None:
            return output
        if call.logits is not None and self.replacement == "mean" and block.windows > 1:
            # The mean over windows depends on the values of all of them, so the product with the values is replaced.
            self.pending[call.index] = call
            return output
        # The mean of the weights over queries gives the mean of their products, and zero weights give zero.
        return self._replace(call, block, output)

    def on_product(self, index: int, product: Tensor) -> Tensor:
        """Return the product of weights and values, replaced for the heads that are switched off."""
        call = self.pending.get(index)
        if call is None or product.shape[:-1] != (*call.leading_axes, call.num_queries):
            return product
        return self._replace(self.pending.pop(index), self.calls[index], product)

    def check_complete(self) -> None:
        """Check that all blocks ran, and that every product to replace was observed.

        Raises:
            UnsupportedModelError: a product of weights and values was not observed.
            WorkError: a block did not run.
        """
        for index, block in self.calls.items():
            if index not in self.seen:
                raise WorkError(f"{block.module} of {self.model.name} did not run: its attention calls differ by image")
        for index in self.pending:
            raise UnsupportedModelError(
                f"{self.calls[index].module} does not multiply its weights with its values in a plain matrix product, "
                "so the mean over its windows is not available: use the replacement 'zero'"
            )

    def _output(self, call: AttentionCall, block: _Block) -> Tensor:
        """Return the output of a call without the keys that are switched off."""
        hidden = self.hidden.get(block.layer)
        if hidden is None or not bool(hidden.any()):
            return call.run()
        axes = axes_of_call(self.model, call, self.pixels)
        visible = ~hidden if block.is_token is None else ~hidden & block.is_token.to(hidden.device)
        empty = ~visible.any(-1)
        masked = hidden[:, :, None, None].expand(-1, -1, block.num_heads, -1, -1)
        output = attend_without(call, axes.join(masked, call.leading_axes))
        windowed = axes.split(output)  # NaN in a window without keys
        return _with_memory_of(
            output, axes, torch.where(empty[:, :, None, None, None], torch.zeros_like(windowed), windowed)
        )

    def _replace(self, call: AttentionCall, block: _Block, output: Tensor) -> Tensor:
        """Return an output (…, query, channel), or weights, in which the heads that are switched off are replaced."""
        axes, off = axes_of_call(self.model, call, self.pixels), self.heads[block.layer]
        assert off is not None
        windowed = axes.split(output)
        replacement = torch.zeros_like(windowed) if self.replacement == "zero" else self._mean(block, windowed)
        return _with_memory_of(output, axes, torch.where(off[:, None, :, None, None], replacement, windowed))

    def _mean(self, block: _Block, windowed: Tensor) -> Tensor:
        """Return the mean of outputs (batch, window, head, token, channel) over all tokens, with two axes of size 1."""
        if block.windows > 1 and block.slots is None:
            raise UnsupportedModelError(
                f"{block.module} attends in {block.windows} windows at unknown positions, so the mean over the tokens "
                "is not available: use the replacement 'zero'"
            )
        numbers = windowed if windowed.dtype == torch.float64 else windowed.float()
        if block.is_token is None:
            return numbers.mean((1, 3), keepdim=True).to(windowed.dtype)
        is_token = block.is_token.to(windowed.device)[:, None, :, None]
        total = torch.where(is_token, numbers, torch.zeros_like(numbers)).sum((1, 3), keepdim=True)
        return (total / is_token.sum()).to(windowed.dtype)


def _with_memory_of(output: Tensor, axes: Axes, windowed: Tensor) -> Tensor:
    """Return (batch, window, head, …) in the axes and in the memory order of an attention call's output."""
    return torch.empty_like(output).copy_(axes.join(windowed, output.shape[:-2]))
