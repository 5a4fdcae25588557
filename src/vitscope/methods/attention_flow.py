"""Attention flow (Abnar & Zuidema, 2020): the maximum flow from the readout to each patch through all blocks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import nn

from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.scores import HeadFusion, check_head_fusion
from vitscope.attention.trace import AttentionStep, Trace
from vitscope.errors import UnsupportedModelError
from vitscope.grid import Grid
from vitscope.methods.attention_map import grid_of, require_start_layer, trace_of
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import run_and_capture
from vitscope.validation import require_at_least, require_finite_tensor, require_integer

# The flow is computed in whole numbers of 32 bits. All flows are at most 1, the sum of the readout.
SCALE = 2**30


def attention_flow(
    model: VisionModel | nn.Module | Trace,
    images: Any = None,
    *,
    head_fusion: HeadFusion = "mean",
    start_layer: int = 0,
    max_tokens: int = 200,
) -> Attribution:
    """Compute the maximum flow from the readout to each patch through all blocks.

    The graph has a node for each token before and after each block. With E the head fusion, an edge from token i after
    a block to token j before it has the capacity Â_ij of Â = rownorm(E A + I), as in :func:`vitscope.rollout`. In a
    window transformer only tokens of the same window are connected, and each merged token is connected to its four
    tokens with a capacity of ¼. Padding is no node, so capacity on padding is lost. A source is connected to each token
    of the readout, with its share as the capacity: 1 for a CLS token, 1/n for each of n patches that are averaged.

    A patch's value is the maximum flow from the source to the patch, one patch at a time. The flows of different
    patches may use the same edges, so the values do not sum to one. With many blocks, there are enough paths to almost
    every patch, and most values come close to 1, the capacity of the readout. Fewer blocks (``start_layer``)
    distinguish patches better.

    Capacities are rounded down to multiples of 2⁻³⁰, so a value is at most the exact flow.
    ``provenance["max_error"]`` is an upper bound of the difference, from the minimum cut. There is one flow per patch,
    in a graph of layers · tokens² edges, so the time grows with tokens³: a plain ViT of 197 tokens and 12 blocks takes
    about ten seconds per image.

    Reference: Abnar & Zuidema, 2020 (arXiv 2005.00928).

    Args:
        model: from :func:`vitscope.load`, or a live module; or a :class:`~vitscope.Trace`, without ``images``.
        images: see :func:`vitscope.capture`; None for a trace, which has its own.
        head_fusion: ``"mean"``, ``"max"`` or ``"min"`` over heads.
        start_layer: index of the first block to include, from 0; negative from the end. Merging before it is always
            included, so the result lies on the finest grid.
        max_tokens: maximum number of tokens of the finest grid, at least 1; a model with more is refused, because the
            flow would take long.

    Returns:
        an attribution whose ``values`` (batch, height, width), from 0 to 1, are the flows.

    Raises:
        CallError: an option is out of range, or ``images`` are missing or not valid.
        UnsupportedModelError: there are more than ``max_tokens`` tokens, or the model's blocks cannot be chained.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.attention_flow(vs.load("vit-nano"), skimage.data.chelsea(), start_layer=4)
        >>> result.values.shape, result.provenance["max_error"] < 1e-6
        (torch.Size([1, 8, 8]), True)
    """
    check_head_fusion(head_fusion)
    start, max_tokens = require_integer(start_layer, "start_layer"), require_at_least(1, max_tokens, "max_tokens")
    trace = trace_of(
        model,
        images,
        lambda m, i: (
            run_and_capture(m, i, start_layer=max(start, 0), fuse=head_fusion, merge="equal", by_class=False).trace
        ),
    )
    start = require_start_layer(start, trace.num_layers)
    grid = _require_small_grid(trace, max_tokens)
    readout = trace.readout_row(None)
    for layer in range(start, trace.num_layers):
        trace.step(layer)
    steps = [step for step in trace.steps if isinstance(step, MergeStep) or step.layer >= start]
    values = np.zeros((len(readout), grid.num_patches))
    errors = np.zeros_like(values)
    for image, shares in enumerate(readout):
        graph = _Graph.from_steps(steps, _numbers(shares), head_fusion, image)
        for patch in range(grid.num_patches):
            values[image, patch], errors[image, patch] = graph.flow(grid.prefix + patch)
    provenance = {
        **trace.provenance,
        "method": "attention_flow",
        "parameters": {"head_fusion": head_fusion, "start_layer": start},
        "max_error": float(errors.max()),
    }
    maps = torch.from_numpy(values).float().view(-1, grid.height, grid.width)
    return Attribution(maps, grid, trace.images, provenance)


def _require_small_grid(trace: Trace, max_tokens: int) -> Grid:
    """Return the token grid of a trace if a flow through its blocks is available.

    Raises:
        UnsupportedModelError: it has too many tokens, or the blocks cannot be chained.
    """
    grid, model = grid_of(trace), trace.provenance.get("model", "this model")
    trace.require_chain("attention_flow")
    if grid.num_tokens > max_tokens:
        raise UnsupportedModelError(
            f"{model} has {grid.num_tokens} tokens and attention_flow takes at most {max_tokens}: use a smaller image, "
            f"or vitscope.rollout, or pass max_tokens={grid.num_tokens} and wait"
        )
    return grid


@dataclass(frozen=True)
class _Edges:
    """Edges between two neighbouring levels of tokens, from the side of the output to that of the input.

    Attributes:
        sources: token of the upper level, of each edge.
        ends: token of the lower level, of each edge.
        capacities: capacity of each edge.
        num_sources: number of tokens of the upper level.
        num_ends: number of tokens of the lower level.
    """

    sources: Int[np.ndarray, " edge"]
    ends: Int[np.ndarray, " edge"]
    capacities: Float[np.ndarray, " edge"]
    num_sources: int
    num_ends: int

    @classmethod
    def of_step(cls, step: AttentionStep | MergeStep, fusion: HeadFusion, image: int) -> "_Edges":
        """Return the edges of a block, rownorm(E A + I), or of a patch merging, ¼ each; there are none to padding."""
        if isinstance(step, MergeStep):
            groups, shares = step.groups.cpu().numpy(), _numbers(step.shares("equal")[0])
            merged, quarter = np.nonzero(groups >= 0)
            sizes = step.merged_grid.num_tokens, step.grid.num_tokens
            return cls(merged, groups[merged, quarter], shares[merged, quarter], *sizes)
        weights = _numbers(require_finite_tensor(step.fused(fusion), "attention")[image])
        slots = step.require_slots().cpu().numpy()
        window, query, key = np.nonzero((slots[:, :, None] >= 0) & (slots[:, None, :] >= 0))
        capacities = (weights + np.eye(slots.shape[1])) / (weights.sum(-1, keepdims=True) + 1)
        tokens = step.require_grid().num_tokens
        return cls(slots[window, query], slots[window, key], capacities[window, query, key], tokens, tokens)


@dataclass(frozen=True)
class _Graph:
    """The graph of one image without its last level, in which only the token of interest matters.

    Attributes:
        upper: capacities between the nodes: the source, the tokens of all levels but the last, and the sink.
        last: edges from the lowest of these levels to the last.
        first_node: index of the first node of that level.
    """

    upper: csr_array
    last: _Edges
    first_node: int

    @classmethod
    def from_steps(
        cls,
        steps: list[AttentionStep | MergeStep],
        readout: Float[np.ndarray, " token"],
        fusion: HeadFusion,
        image: int,
    ) -> "_Graph":
        """Return the graph of one image, with the source as node 0 and the sink as the last node."""
        tokens = np.arange(len(readout))
        levels = [_Edges(np.zeros_like(tokens), tokens, readout / readout.sum(), 1, len(tokens))]
        starts, size = [0], 1  # the first node of each level
        for step in reversed(steps):
            edges = _Edges.of_step(step, fusion, image)
            if edges.num_sources != levels[-1].num_ends:
                raise UnsupportedModelError(
                    f"attention_flow is not supported for this model: how its tokens change after {step.module} is "
                    "unknown; use attention_map for each block"
                )
            starts.append(size)
            size += edges.num_sources
            levels.append(edges)
        *upper, last = levels
        sources = np.concatenate([edges.sources + start for edges, start in zip(upper, starts, strict=False)])
        ends = np.concatenate([edges.ends + start for edges, start in zip(upper, starts[1:], strict=True)])
        capacities = np.concatenate([edges.capacities for edges in upper])
        return cls(coo_array((capacities, (sources, ends)), shape=(size + 1, size + 1)).tocsr(), last, starts[-1])

    def flow(self, token: int) -> tuple[float, float]:
        """Return the maximum flow to a token of the last level, rounded down, and an upper bound of the rounding."""
        size = self.upper.shape[0]
        reaches = self.last.ends == token
        sources = self.last.sources[reaches] + self.first_node
        column = coo_array(
            (self.last.capacities[reaches], (sources, np.full_like(sources, size - 1))), shape=(size, size)
        )
        capacities = (self.upper + column.tocsr()).tocsr()
        integers = capacities.copy()
        integers.data = np.floor(capacities.data * SCALE).astype(np.int32)
        result = maximum_flow(integers, 0, size - 1)
        residual = (integers - result.flow).tocsr()
        residual.eliminate_zeros()
        reached = np.zeros(size, dtype=bool)
        reached[breadth_first_order(residual, 0, return_predecessors=False)] = True
        edges = capacities.tocoo()
        cut = edges.data[reached[edges.row] & ~reached[edges.col]].sum()
        flow = result.flow_value / SCALE
        return flow, max(float(cut) - flow, 0.0)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
