"""capture(): run a model once and keep what its attention did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.arguments import whole_number
from vitscope.errors import CallError, NoAttentionError, WorkError
from vitscope.grid import Grid
from vitscope.merging import Merge, MergeStep
from vitscope.models.hierarchy import Hierarchy, Merging
from vitscope.models.loading import load
from vitscope.models.vision_model import Layout, VisionModel
from vitscope.scores import Factored, HeadFusion, KnownWeights, Logits, Scores, fuse_heads
from vitscope.shapes import ReadoutRow, Slots, Weights
from vitscope.shelf import Shelf
from vitscope.tap import AttentionCall, OnModule, Tap
from vitscope.trace import AttentionStep, PooledClassifier, Step, Trace
from vitscope.windows import Windows, merge_groups, merged_grid


@dataclass(frozen=True, eq=False)
class Run:
    """A trace and what the model answered: logits (batch, class), or None without a classifier."""

    trace: Trace
    logits: Tensor | None


def capture(model: VisionModel | nn.Module, images: Any, *, layers: Sequence[int] | None = None) -> Trace:
    """Run the model once and keep its attention, whatever kernel computes it.

    Queries and keys are kept, not maps: for each layer 2 · heads · tokens · channels numbers in the model's dtype; of
    small windows the weights, where they take no more room.
    Weights, hooks and training flags are as before afterwards, also after an exception.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: a path, PIL image or uint8 array (H, W, 3), a list of these, or a tensor (batch, 3, height, width)
            taken as already preprocessed.
        layers: keep only these attention blocks, negative from the end; all by default.

    Raises:
        NoAttentionError: the model has no attention.
        CallError: a layer is not there, or the images are not what is expected.

    Example:
        >>> import skimage.data, vitscope as vs
        >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
        >>> trace.map(layer=-1, head="mean").shape
        torch.Size([1, 8, 8])
    """
    return run(model, images, layers=layers).trace


def run(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    layers: Sequence[int] | None = None,
    fuse: HeadFusion | None = None,
    start_layer: int = 0,
    merge: Merge | None = None,
    by_class: bool = True,
    watch: Mapping[nn.Module, OnModule] | None = None,
) -> Run:
    """:func:`capture`, with the model's answer.

    Args:
        fuse: keep one map a layer, heads fused while the model runs, wherever that takes less memory than queries
            and keys. The fused step computes softmax(q·kᵀ) itself, once, and uses it for the output too.
        start_layer: blocks before this one run untouched and leave no step.
        merge: ``"equal"`` where the norms of patch merging will not be asked for.
        by_class: False where no class will be asked for.
        watch: modules whose first argument and output are asked for, and who asks.
    """
    model = as_vision_model(model)
    pixels, pictures = model.prepare(images)
    grid = None if model.layout is None else model.layout.grid(*pixels.shape[-2:])
    recorder = _Recorder(len(pixels), grid, _Kept(layers), fuse, start_layer)
    hierarchy = None if model.layout is None else model.layout.hierarchy
    watched = {} if hierarchy is None else recorder.watch(hierarchy, norms=merge != "equal", pooled=by_class)
    with torch.no_grad(), model.running(), Tap(model.module, recorder) as tap, tap.follow({**watched, **(watch or {})}):
        logits = model.answer(pixels)
    if recorder.count == 0:
        raise NoAttentionError(
            f"{model.name} has no attention that could be seen: vitscope explains vision transformers"
        )
    trace = Trace(
        steps=recorder.kept.resolve(recorder.count),
        num_layers=recorder.count,
        readout=_readout(model.layout, recorder.grid, recorder.pooling, len(pixels), pixels.device),
        pictures=pictures,
        prefix_names=() if model.layout is None else model.layout.prefix_names,
        provenance=provenance(model),
        labels=model.labels,
        classifier=recorder.classifier,
    )
    return Run(trace, None if logits is None else logits.float())


def as_vision_model(model: Any) -> VisionModel:
    """What the user passed, as a VisionModel."""
    if isinstance(model, VisionModel):
        return model
    if isinstance(model, nn.Module):
        return load(model)
    raise CallError(f"a model is expected, from vitscope.load or an nn.Module, not {type(model).__name__}")


def provenance(model: VisionModel) -> dict[str, Any]:
    """Which model in which libraries a result comes from."""
    versions = {"vitscope": version("vitscope"), "torch": torch.__version__, **(model.versions or {})}
    about: dict[str, Any] = {"model": model.name, "library": model.library, "versions": versions}
    if model.layout is not None:
        about["readout"] = dict(model.layout.readout)
    return about


class _Kept:
    """The steps that were asked for; negative layers are known only when the run is over."""

    def __init__(self, layers: Sequence[int] | None) -> None:
        self._layers = None if layers is None else _listed(layers)
        self._depth = max((-layer for layer in self._layers or () if layer < 0), default=0)
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        self._steps.append(step)
        if self._layers is not None and isinstance(step, AttentionStep):
            passed = step.layer - self._depth
            if passed not in self._layers:
                self._steps = [kept for kept in self._steps if getattr(kept, "layer", None) != passed]

    def resolve(self, count: int) -> list[Step]:
        if self._layers is None:
            return self._steps
        for layer in self._layers:
            if not -count <= layer < count:
                raise CallError(f"layer {layer} is not there: the model has layers 0 to {count - 1}")
        wanted = {layer % count for layer in self._layers}
        return [step for step in self._steps if isinstance(step, MergeStep) or step.layer in wanted]


def _listed(layers: Any) -> list[int]:
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise CallError(f"layers is {layers!r}, a list of whole numbers is expected")
    listed = [whole_number(layer, "a layer") for layer in layers]
    if not listed:
        raise CallError("layers is empty: name at least one attention block, or leave it out for all")
    return listed


class _Recorder:
    """Turns attention calls, and merging between them, into steps while the model runs."""

    def __init__(self, batch: int, grid: Grid | None, kept: _Kept, fuse: HeadFusion | None, start_layer: int) -> None:
        self.batch, self.grid, self.kept, self.fuse, self.start_layer = batch, grid, kept, fuse, start_layer
        self.shelf = Shelf()
        self.count = 0
        self.pooling: Tensor | None = None
        self.classifier: PooledClassifier | None = None
        self.hierarchy: Hierarchy | None = None
        self.known_slots: dict[tuple[Grid, Windows | None], Slots] = {}

    def watch(self, hierarchy: Hierarchy, *, norms: bool, pooled: bool) -> dict[nn.Module, OnModule]:
        """What the recorder wants to see of a window transformer besides its attention."""
        self.hierarchy = hierarchy
        watched: dict[nn.Module, OnModule] = {}
        for path, merging in hierarchy.mergings.items():
            watched[merging.module] = partial(self._merge, path, merging, norms)
        for module in hierarchy.shrinking:
            watched[module] = lambda *_: setattr(self, "grid", merged_grid(self._known_grid()))
        if pooled and hierarchy.pooled is not None and hierarchy.classifier is not None:
            watched[hierarchy.pooled] = partial(self._pool, hierarchy.classifier)
        return watched

    def __call__(self, call: AttentionCall) -> Tensor:
        if self.hierarchy is not None:
            call = replace(call, module=self.hierarchy.block_of(call.module) or "")
        if self.grid is not None and call.num_keys == self.grid.num_tokens != call.num_queries:
            self._keep_pooling(call)
        elif self._is_self_attention(call):
            layer, self.count = self.count, self.count + 1
            if layer >= self.start_layer:
                return self._record(call, layer)
        return call.run()

    def _is_self_attention(self, call: AttentionCall) -> bool:
        if call.num_queries != call.num_keys or call.leading_axes == () or call.leading_axes[0] % self.batch:
            return False
        if self.hierarchy is not None:
            return call.module != ""
        return call.num_keys == self.grid.num_tokens if self.grid is not None else call.num_keys > 1

    def _merge(self, path: str, merging: Merging, norms: bool, tokens: Tensor, _: Tensor) -> None:
        grid = self._known_grid()
        groups = merge_groups(grid).to(tokens.device)
        tokens = tokens.detach().reshape(len(tokens), grid.num_tokens, -1)
        reduction = merging.given(self.shelf.copy(tokens)) if norms else None
        self.grid = merged_grid(grid)
        self.kept.add(MergeStep(path, groups, grid, self.grid, reduction))

    def _pool(self, classifier: nn.Linear, _: Tensor, features: Tensor) -> None:
        features = features.detach().flatten(1, -2)
        self.classifier = PooledClassifier(features, classifier.weight.detach().clone())

    def _known_grid(self) -> Grid:
        assert self.grid is not None, "a model with a hierarchy has a grid"
        return self.grid

    def _record(self, call: AttentionCall, layer: int) -> Tensor:
        scores: Scores = self._scores(call)
        step = AttentionStep(layer, call.module, scores, self._slots(call.module, scores), self.grid)
        if self._weighing_pays(scores):
            output, scores = self._weigh(call, step)
        else:
            output = call.run()
            if isinstance(scores, Factored):
                query, key = self.shelf.copy(scores.query), self.shelf.copy(scores.key)
                bias = None if scores.bias is None else self.shelf.copy(scores.bias.detach())
                scores = Factored(query, key, scores.scale, bias)
        self.kept.add(replace(step, scores=scores))
        return output

    def _scores(self, call: AttentionCall) -> Factored | Logits:
        if call.query is None or call.key is None:
            assert call.logits is not None
            return Logits(self._windowed(call.logits))
        bias = call.bias
        if bias is not None:
            # A bias of its own for each picture, window or head of the call is split as the queries are.
            if bias.ndim == call.query.ndim and len(bias) == len(call.query):
                bias = self._windowed(bias)
            while bias.ndim < 5:
                bias = bias.unsqueeze(0)
        return Factored(self._windowed(call.query), self._windowed(call.key), call.scale, bias)

    def _windowed(self, tensor: Tensor) -> Tensor:
        """(batch·window, head, …) or (batch·head, …) to (batch, window, head, …)."""
        if tensor.ndim == 3:
            return tensor.unflatten(0, (self.batch, 1, -1))
        # Axes between the batch and the heads are windows of some kind.
        return tensor.reshape(self.batch, -1, *tensor.shape[-3:])

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
        if (self.grid, windows) not in self.known_slots:
            slots = torch.arange(self.grid.num_tokens)[None] if windows is None else windows.slots(self.grid)
            self.known_slots[self.grid, windows] = slots.to(scores.device)
        slots = self.known_slots[self.grid, windows]
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
                return output, KnownWeights(self._fused(self._windowed(output)))
            return output, KnownWeights(step.weights() if self.fuse is None else step.fused(self.fuse)[:, :, None])
        batch, windows, heads, tokens, _ = step.scores.shape
        kept_heads = heads if self.fuse is None else 1
        kept = self.shelf.empty((batch, windows, kept_heads, tokens, tokens), torch.float32, step.scores.device)
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
        (weights,) = self._scores(call).blocks([slice(None)])
        self.pooling = weights.mean((1, 2, 3))


def _readout(
    layout: Layout | None, grid: Grid | None, pooling: Tensor | None, batch: int, device: torch.device
) -> ReadoutRow | None:
    """The row over tokens that the classifier reads."""
    if layout is None or grid is None or not layout.readout:
        return None
    row = torch.zeros(batch, grid.num_tokens, dtype=torch.float32, device=device)
    for source, weight in layout.readout.items():
        if source == "patches":
            row[:, grid.prefix :] += weight / grid.num_patches
        elif source == "tokens":
            row += weight / grid.num_tokens
        elif source == "pooling":
            if pooling is None:
                raise CallError("the readout is a pooling layer's attention, but no such layer ran")
            row += weight * pooling
        else:
            row[:, layout.prefix_names.index(source)] += weight
    return row
