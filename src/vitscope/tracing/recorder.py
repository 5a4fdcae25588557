"""The recorder of a run: it turns attention calls into the steps of a trace."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from vitscope.attention.axes import Axes, head_count
from vitscope.attention.flow import IMAGE, call_bit
from vitscope.attention.omitted import OmittedCall, Reason
from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.readout import PooledClassifier
from vitscope.attention.scores import Factored, HeadFusion, Logits, Scores, StoredWeights, fuse_heads
from vitscope.attention.step import AttentionStep
from vitscope.attention.tap import AttentionCall, OnModule
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
class RecordedCall:
    """The facts of an attention call that are kept after the run.

    Attributes:
        module: path of the module that made the call.
        index: number of attention calls before this one.
        input_mask: mask of its arguments, see :mod:`vitscope.attention.flow`.
        invocation: number of the module's forward pass that made the call.
        is_softmax: True for a softmax, False for a fused kernel.
    """

    module: str
    index: int
    input_mask: int
    invocation: int
    is_softmax: bool

    @property
    def name(self) -> str:
        """The path of the module, for messages."""
        return self.module or "the model itself"


@dataclass(frozen=True)
class CaptureTarget:
    """The facts of a model that decide what is recorded.

    Attributes:
        module: the model.
        backbone: path of the vision transformer inside the model; empty for the model itself.
        hierarchy: windows and merging layers; None for a plain transformer or an unknown layout.
        pools: True if the readout is the attention of a pooling layer.
        evidence: result of the experiment.
    """

    module: nn.Module
    backbone: str = ""
    hierarchy: Hierarchy | None = None
    pools: bool = False
    evidence: Evidence = field(default_factory=Evidence)

    @classmethod
    def from_model(cls, model: VisionModel, evidence: Evidence) -> "CaptureTarget":
        """Return the facts of a model and the evidence from its experiment."""
        layout = model.layout
        if layout is None:
            return cls(model.module, model.backbone, evidence=evidence)
        return cls(model.module, model.backbone, layout.hierarchy, "pooling" in layout.readout, evidence)


class Recorder:
    """A recorder that turns attention calls and merging layers into steps while the model runs.

    Args:
        target: facts of the model.
        batch: number of images.
        grid: token grid of the input; None if unknown.
        selection: the layers to store.
        fuse: head fusion of stored weights; None to store all heads.
        start_layer: index of the first block to store, from 0.
    """

    def __init__(
        self,
        target: CaptureTarget,
        batch: int,
        grid: Grid | None,
        selection: LayerSelection,
        fuse: HeadFusion | None,
        start_layer: int,
    ) -> None:
        self.target, self.hierarchy = target, target.hierarchy
        self.batch, self.grid, self.selection = batch, grid, selection
        self.fuse, self.start_layer = fuse, start_layer
        self.slab = SlabAllocator()
        self.blocks: list[RecordedCall] = []
        self.omitted: list[tuple[RecordedCall, OmittedCall]] = []
        self.pooling: Tensor | None = None
        self.classifier: PooledClassifier | None = None
        self.running: Callable[[], str] = lambda: ""  # path of the running module
        self._slots_cache: dict[tuple[Grid, Windows | None], Slots] = {}
        self._learned_mask, self._learned_sizes = 0, set[int]()

    @property
    def count(self) -> int:
        """The number of blocks so far."""
        return len(self.blocks)

    def watched_modules(self, *, norms: bool, pooled: bool) -> dict[nn.Module, OnModule]:
        """Return functions for the modules of a window transformer whose input or output is recorded.

        Args:
            norms: whether to record the input of merging layers.
            pooled: whether to record the tokens that the classifier averages.
        """
        hierarchy = self.hierarchy
        watched: dict[nn.Module, OnModule] = {}
        if hierarchy is None:
            return watched
        for path, merging in hierarchy.mergings.items():
            watched[merging.module] = partial(self._record_merging, path, merging, norms)
        for module in hierarchy.downsampling:
            watched[module] = lambda *_: setattr(self, "grid", merged_grid(self._require_grid()))
        if pooled and hierarchy.before_pooling is not None and hierarchy.classifier is not None:
            watched[hierarchy.before_pooling] = partial(self._record_classifier, hierarchy.classifier)
        return watched

    def __call__(self, call: AttentionCall) -> Tensor:
        """Record an attention call and return its output."""
        path = call.module
        if self.hierarchy is not None:
            call = replace(call, module=self.hierarchy.block_of(path) or "")
        reason = self._reason(call, path)
        recorded = RecordedCall(path, call.index, call.input_mask, call.invocation, call.logits is not None)
        if reason is None:
            layer = self.count
            self.blocks.append(recorded)
            if layer >= self.start_layer:
                return self._record_block(call, layer)
        elif reason == "pooling":
            self._record_pooling(call)
        else:
            self.omitted.append((recorded, OmittedCall(path, call.num_queries, call.num_keys, reason)))
        return call.run()

    def _reason(self, call: AttentionCall, path: str) -> Reason | Literal["pooling"] | None:
        """Return why a call is not a block of the trace; None for a block."""
        backbone, grid = self.target.backbone, self.grid
        if backbone and path != backbone and not path.startswith(f"{backbone}."):
            return "outside the backbone"
        if not call.input_mask & IMAGE:
            return "not the image"
        if call.num_queries == call.num_keys:
            if self.hierarchy is not None:
                return None if call.module else "other tokens"
            if grid is not None:
                return None if call.num_keys == grid.num_tokens else "other tokens"
            if call.input_mask & self._learned_mask and call.num_keys in self._learned_sizes:
                return "learned queries"
            return None if call.num_keys > 1 else "one token"
        if self.target.pools and grid is not None and call.num_keys in (grid.num_tokens, grid.num_patches):
            return "pooling"
        if not call.query_mask & IMAGE:
            self._learned_mask |= call_bit(call.index)
            self._learned_sizes.add(call.num_queries)
        return "other tokens"

    def _record_merging(self, path: str, merging: Merging, norms: bool, tokens: Tensor, _: Tensor) -> None:
        """Add the step of a merging layer and continue on the coarser grid."""
        grid = self._require_grid()
        groups = merge_groups(grid).to(tokens.device)
        tokens = tokens.detach().reshape(len(tokens), grid.num_tokens, -1)
        reduction = merging.reduction_of(self.slab.copy(tokens)) if norms else None
        self.grid = merged_grid(grid)
        self.selection.add(MergeStep(path, groups, grid, self.grid, reduction))

    def _record_classifier(self, classifier: nn.Linear, _: Tensor, features: Tensor) -> None:
        """Store the tokens that the classifier averages, and its weight."""
        features = features.detach().flatten(1, -2)
        self.classifier = PooledClassifier(features, classifier.weight.detach().clone())

    def _require_grid(self) -> Grid:
        """Return the token grid of a model with a hierarchy."""
        assert self.grid is not None, "a model with a hierarchy has a grid"
        return self.grid

    def _record_block(self, call: AttentionCall, layer: int) -> Tensor:
        """Add the step of a block and return its output."""
        axes = self._axes(call, self.batch)
        scores: Scores = self._scores(call, axes)
        step = AttentionStep(layer, call.module, scores, self._slots(call.module, scores), self.grid)
        if axes.in_order and self._weights_are_smaller(scores):
            output, scores = self._output_and_weights(call, step)
        else:
            output = call.run()
            if isinstance(scores, Factored):
                query, key = self.slab.copy(scores.query), self.slab.copy(scores.key)
                bias = None if scores.bias is None else self.slab.copy(scores.bias.detach())
                scores = Factored(query, key, scores.scale, bias)
        self.selection.add(replace(step, scores=scores))
        return output

    def _axes(self, call: AttentionCall, batch: int) -> Axes:
        """Return the order of images, windows and heads in a call."""
        heads = None if self.hierarchy is not None else head_count(self.target.module, call.module)
        return self.target.evidence.axes(call, batch, heads)

    def _scores(self, call: AttentionCall, axes: Axes) -> Factored | Logits:
        """Return the scores of a call as (batch, window, head, …), without a copy."""
        if call.query is None or call.key is None:
            assert call.logits is not None
            return Logits(axes.split(call.logits))
        bias = call.bias
        if bias is not None:
            if not axes.in_order:
                bias = bias.expand(*call.leading_axes, *bias.shape[-2:])
            # A bias with an entry for each image, window or head of the call is split in the same way as the queries.
            if bias.ndim == call.query.ndim and len(bias) == len(call.query):
                bias = axes.split(bias.expand(*call.leading_axes, *bias.shape[-2:]))
            while bias.ndim < 5:
                bias = bias.unsqueeze(0)
        return Factored(axes.split(call.query), axes.split(call.key), call.scale, bias)

    def _weights_are_smaller(self, scores: Scores) -> bool:
        """Return whether the weights, all or fused, take no more memory than the scores, as in small windows."""
        batch, window, head, query, key = scores.shape
        if self.fuse is not None:
            head = 1
        elif self.hierarchy is None:
            return False  # a module of an unknown class might change its weights in place
        return batch * window * head * query * key * torch.float32.itemsize <= scores.num_bytes

    def _slots(self, module: str, scores: Scores) -> Slots | None:
        """Return the token in each slot of each window, computed once for each kind of block; None if unknown."""
        if self.grid is None:
            return None
        windows = None if self.hierarchy is None else self.hierarchy.blocks[module].windows(self.grid)
        if windows is None and scores.shape[1] != 1:
            return None
        if (self.grid, windows) not in self._slots_cache:
            slots = (
                torch.arange(self.grid.num_tokens, device=scores.device)[None]
                if windows is None
                else windows.slots(self.grid)
            )
            self._slots_cache[self.grid, windows] = slots.to(scores.device)
        slots = self._slots_cache[self.grid, windows]
        if slots.shape != (scores.shape[1], scores.shape[3]):
            raise WorkError(
                f"{module} attends in {scores.shape[1]} windows of {scores.shape[3]} tokens, but its settings say "
                f"{slots.shape[0]} of {slots.shape[1]}: the module was changed, load it again"
            )
        return slots

    def _output_and_weights(self, call: AttentionCall, step: AttentionStep) -> tuple[Tensor, StoredWeights]:
        """Return the output of a call and its weights, all or fused, from a single softmax."""
        if call.value is None or call.query is None:
            output = call.run()
            if output.dtype == torch.float32:
                # The model's own softmax has just computed the weights.
                return output, StoredWeights(self._fuse(output.view(step.scores.shape)))
            return output, StoredWeights(step.weights() if self.fuse is None else step.fused(self.fuse)[:, :, None])
        batch, windows, heads, tokens, _ = step.scores.shape
        heads = heads if self.fuse is None else 1
        weights = self.slab.empty((batch, windows, heads, tokens, tokens), torch.float32, step.scores.device)
        leading = call.query.shape[:-2]  # (batch·window, head), or both in one axis
        value = call.value.contiguous()
        # Libraries move the heads next to the channels afterwards. With this memory order, that needs no copy.
        output = value.new_empty(*leading[:-1], call.num_queries, leading[-1], value.shape[-1]).transpose(-3, -2)
        slices = step.row_slices()
        for rows, block in zip(slices, step.scores.blocks(slices), strict=True):
            weights[:, :, :, rows] = self._fuse(block)
            output[..., rows, :] = block.reshape(*leading, *block.shape[-2:]).to(value.dtype) @ value
        return output, StoredWeights(weights)

    def _fuse(self, weights: Weights) -> Tensor:
        """Return the weights of all heads, or the fused weights as those of a single head."""
        return weights if self.fuse is None else fuse_heads(weights, self.fuse)[:, :, None]

    def _record_pooling(self, call: AttentionCall) -> None:
        """Store the attention of a pooling layer to all tokens; 0 for prefix tokens if it reads the patches alone."""
        (weights,) = self._scores(call, self._pooling_axes(call, self.batch)).blocks([slice(None)])
        self._store_pooling(weights)

    def _pooling_axes(self, call: AttentionCall, batch: int) -> Axes:
        """Return the order of images and heads in the call of a pooling layer."""
        return Axes((batch, 1, -1), (0, 1, 2)) if len(call.leading_axes) == 1 else self._axes(call, batch)

    def _store_pooling(self, weights: Weights) -> None:
        row = weights.mean((1, 2, 3))
        self.pooling = torch.nn.functional.pad(row, (self._require_grid().num_tokens - row.shape[-1], 0))
