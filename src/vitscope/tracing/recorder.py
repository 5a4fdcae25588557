"""Turns attention calls into the steps of a trace while the model runs, and judges what was seen."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vitscope.attention.axes import Axes, axes_of, head_count
from vitscope.attention.flow import IMAGE, call_bit
from vitscope.attention.omitted import OmittedCall, Reason
from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.scores import Factored, HeadFusion, KnownWeights, Logits, Scores, fuse_heads
from vitscope.attention.tap import AttentionCall, OnModule
from vitscope.attention.trace import AttentionStep, PooledClassifier
from vitscope.attention.windows import Windows, merge_groups, merged_grid
from vitscope.errors import WorkError
from vitscope.grid import Grid
from vitscope.models.hierarchy import Hierarchy, Merging
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.experiment import Evidence
from vitscope.tracing.layer_selection import LayerSelection
from vitscope.tracing.slab import SlabAllocator
from vitscope.typing import Slots, Weights


@dataclass(frozen=True)
class AttentionNote:
    """What is remembered of an attention call: where it ran, what had reached it, the axes before its tokens."""

    module: str
    index: int
    inputs: int
    invocation: int
    leading: tuple[int, ...]
    is_softmax: bool


@dataclass(frozen=True)
class Target:
    """What of a model is to be recorded: its module, its backbone's path, its windows, what its classifier reads."""

    module: nn.Module
    backbone: str = ""
    hierarchy: Hierarchy | None = None
    pools: bool = False  # the readout is a pooling layer's attention
    evidence: Evidence = field(default_factory=Evidence)

    @staticmethod
    def of(model: VisionModel, evidence: Evidence) -> "Target":
        """Return what is to be recorded of a model."""
        layout = model.layout
        if layout is None:
            return Target(model.module, model.backbone, evidence=evidence)
        return Target(model.module, model.backbone, layout.hierarchy, "pooling" in layout.readout, evidence)


class Recorder:
    """Turns attention calls, and merging between them, into steps while the model runs."""

    def __init__(
        self,
        target: Target,
        batch: int,
        grid: Grid | None,
        kept: LayerSelection,
        fuse: HeadFusion | None,
        start_layer: int,
    ) -> None:
        self.target, self.hierarchy = target, target.hierarchy
        self.batch, self.grid, self.kept, self.fuse, self.start_layer = batch, grid, kept, fuse, start_layer
        self.slab = SlabAllocator()
        self.blocks: list[AttentionNote] = []
        self.omitted: list[tuple[AttentionNote, OmittedCall]] = []
        self.pooling: Tensor | None = None
        self.classifier: PooledClassifier | None = None
        self.require_slots: dict[tuple[Grid, Windows | None], Slots] = {}
        self._learned, self._learned_sizes = 0, set[int]()

    @property
    def count(self) -> int:
        """The number of blocks so far."""
        return len(self.blocks)

    def watch(self, *, norms: bool, pooled: bool) -> dict[nn.Module, OnModule]:
        """Return what the recorder wants to see of a window transformer besides its attention."""
        hierarchy = self.hierarchy
        watched: dict[nn.Module, OnModule] = {}
        if hierarchy is None:
            return watched
        for path, merging in hierarchy.mergings.items():
            watched[merging.module] = partial(self._merge, path, merging, norms)
        for module in hierarchy.downsampling:
            watched[module] = lambda *_: setattr(self, "grid", merged_grid(self._require_grid()))
        if pooled and hierarchy.before_pooling is not None and hierarchy.classifier is not None:
            watched[hierarchy.before_pooling] = partial(self._pool, hierarchy.classifier)
        return watched

    def __call__(self, call: AttentionCall) -> Tensor:
        path = call.module
        if self.hierarchy is not None:
            call = replace(call, module=self.hierarchy.block_of(path) or "")
        reason = self._reason(call, path)
        note = AttentionNote(path, call.index, call.inputs, call.invocation, call.leading_axes, call.logits is not None)
        if reason is None:
            layer = self.count
            self.blocks.append(note)
            if layer >= self.start_layer:
                return self._record(call, layer)
        elif reason == "pooling":
            self._keep_pooling(call)
        else:
            self.omitted.append((note, OmittedCall(path, call.num_queries, call.num_keys, reason)))
        return call.run()

    def _reason(self, call: AttentionCall, path: str) -> Reason | Literal["pooling"] | None:
        """Return why a call is no block of the trace; None for a block."""
        backbone, grid = self.target.backbone, self.grid
        if backbone and path != backbone and not path.startswith(f"{backbone}."):
            return "outside the backbone"
        if not call.inputs & IMAGE:
            return "not the image"
        if call.num_queries == call.num_keys:
            if self.hierarchy is not None:
                return None if call.module else "other tokens"
            if grid is not None:
                return None if call.num_keys == grid.num_tokens else "other tokens"
            if call.inputs & self._learned and call.num_keys in self._learned_sizes:
                return "learned queries"
            return None if call.num_keys > 1 else "one token"
        if self.target.pools and grid is not None and call.num_keys in (grid.num_tokens, grid.num_patches):
            return "pooling"
        if not call.queries & IMAGE:
            self._learned |= call_bit(call.index)
            self._learned_sizes.add(call.num_queries)
        return "other tokens"

    def _merge(self, path: str, merging: Merging, norms: bool, tokens: Tensor, _: Tensor) -> None:
        grid = self._require_grid()
        groups = merge_groups(grid).to(tokens.device)
        tokens = tokens.detach().reshape(len(tokens), grid.num_tokens, -1)
        reduction = merging.given(self.slab.copy(tokens)) if norms else None
        self.grid = merged_grid(grid)
        self.kept.add(MergeStep(path, groups, grid, self.grid, reduction))

    def _pool(self, classifier: nn.Linear, _: Tensor, features: Tensor) -> None:
        features = features.detach().flatten(1, -2)
        self.classifier = PooledClassifier(features, classifier.weight.detach().clone())

    def _require_grid(self) -> Grid:
        assert self.grid is not None, "a model with a hierarchy has a grid"
        return self.grid

    def _record(self, call: AttentionCall, layer: int) -> Tensor:
        axes = self._axes(call)
        scores: Scores = self._scores(call, axes)
        step = AttentionStep(layer, call.module, scores, self._slots(call.module, scores), self.grid)
        if axes.in_order and self._weighing_pays(scores):
            output, scores = self._weigh(call, step)
        else:
            output = call.run()
            if isinstance(scores, Factored):
                query, key = self.slab.copy(scores.query), self.slab.copy(scores.key)
                bias = None if scores.bias is None else self.slab.copy(scores.bias.detach())
                scores = Factored(query, key, scores.scale, bias)
        self.kept.add(replace(step, scores=scores))
        return output

    def _axes(self, call: AttentionCall) -> Axes:
        heads = None if self.hierarchy is not None else head_count(self.target.module, call.module)
        evidence = self.target.evidence
        return axes_of(
            call.leading_axes,
            self.batch,
            heads,
            call.module,
            heads_first=evidence.heads_first,
            heads_before_windows=evidence.heads_before_windows,
        )

    def _scores(self, call: AttentionCall, axes: Axes) -> Factored | Logits:
        if call.query is None or call.key is None:
            assert call.logits is not None
            return Logits(axes.split(call.logits))
        bias = call.bias
        if bias is not None:
            if not axes.in_order:
                bias = bias.expand(*call.leading_axes, *bias.shape[-2:])
            # A bias of its own for each image, window or head of the call is split as the queries are.
            if bias.ndim == call.query.ndim and len(bias) == len(call.query):
                bias = axes.split(bias.expand(*call.leading_axes, *bias.shape[-2:]))
            while bias.ndim < 5:
                bias = bias.unsqueeze(0)
        return Factored(axes.split(call.query), axes.split(call.key), call.scale, bias)

    def _weighing_pays(self, scores: Scores) -> bool:
        """Weights, all or fused, take no more room than what they are made of; so it is for small windows."""
        batch, window, head, query, key = scores.shape
        if self.fuse is not None:
            head = 1
        elif self.hierarchy is None:
            return False  # a module that nobody knows might change its weights in place
        return batch * window * head * query * key * torch.float32.itemsize <= scores.num_bytes

    def _slots(self, module: str, scores: Scores) -> Slots | None:
        """Which token each slot of each window is, computed once for each kind of block; None where nobody knows."""
        if self.grid is None:
            return None
        windows = None if self.hierarchy is None else self.hierarchy.blocks[module].windows(self.grid)
        if windows is None and scores.shape[1] != 1:
            return None
        if (self.grid, windows) not in self.require_slots:
            slots = (
                torch.arange(self.grid.num_tokens, device=scores.device)[None]
                if windows is None
                else windows.slots(self.grid)
            )
            self.require_slots[self.grid, windows] = slots.to(scores.device)
        slots = self.require_slots[self.grid, windows]
        if slots.shape != (scores.shape[1], scores.shape[3]):
            raise WorkError(
                f"{module} attends in {scores.shape[1]} windows of {scores.shape[3]} tokens where its settings say "
                f"{slots.shape[0]} of {slots.shape[1]}: the module was altered, load it anew"
            )
        return slots

    def _weigh(self, call: AttentionCall, step: AttentionStep) -> tuple[Tensor, KnownWeights]:
        """The call's output and its weights, heads fused if asked to, from one softmax instead of two."""
        if call.value is None or call.query is None:
            output = call.run()
            if output.dtype == torch.float32:
                # The model's own softmax has just computed the weights.
                return output, KnownWeights(self._fused(output.view(step.scores.shape)))
            return output, KnownWeights(step.weights() if self.fuse is None else step.fused(self.fuse)[:, :, None])
        batch, windows, heads, tokens, _ = step.scores.shape
        kept_heads = heads if self.fuse is None else 1
        kept = self.slab.empty((batch, windows, kept_heads, tokens, tokens), torch.float32, step.scores.device)
        leading = call.query.shape[:-2]  # (batch·window, head), or both in one
        value = call.value.contiguous()
        # Heads beside channels, as libraries put them next: their own copy is then none.
        output = value.new_empty(*leading[:-1], call.num_queries, leading[-1], value.shape[-1]).transpose(-3, -2)
        slices = step.row_slices()
        for part, block in zip(slices, step.scores.blocks(slices), strict=True):
            kept[:, :, :, part] = self._fused(block)
            output[..., part, :] = block.reshape(*leading, *block.shape[-2:]).to(value.dtype) @ value
        return output, KnownWeights(kept)

    def _fused(self, weights: Weights) -> Tensor:
        """The weights, or their fusion as if there were one head."""
        return weights if self.fuse is None else fuse_heads(weights, self.fuse)[:, :, None]

    def _keep_pooling(self, call: AttentionCall) -> None:
        """Keep what a pooling layer looks at, over all tokens; one that reads the patches alone leaves the rest out."""
        grid, leading = self._require_grid(), call.leading_axes
        axes = Axes((self.batch, 1, -1), (0, 1, 2)) if len(leading) == 1 else self._axes(call)
        (weights,) = self._scores(call, axes).blocks([slice(None)])
        row = weights.mean((1, 2, 3))
        self.pooling = torch.nn.functional.pad(row, (grid.num_tokens - row.shape[-1], 0))
