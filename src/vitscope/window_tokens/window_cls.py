"""A CLS token in every window: what a token that reads its window, and that nothing reads, looks at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.scores import Head, fuse_heads
from vitscope.attention.trace import Trace
from vitscope.errors import CallError
from vitscope.models.heads import WindowClassified
from vitscope.models.vision_model import VisionModel
from vitscope.models.window_reader import WindowRows, block_projections, read_window, stage_of_block, stage_widths
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.typing import Maps
from vitscope.validation import only_finite

WindowAttention = Float[Tensor, "batch window head query key"]


@dataclass(frozen=True, eq=False)
class WindowCls:
    """A run with a CLS token in every window of every block.

    ``rows[layer]`` is what the tokens look at, (batch, window, head, 1 + slots): themselves first, then the slots of
    their window. ``logits`` are the model's own, which the tokens do not touch.
    """

    trace: Trace
    rows: Mapping[int, WindowRows]
    logits: Tensor | None

    def attention(self, layer: int) -> WindowAttention:
        """Attention with the token in it.

        Returns:
            float32 (batch, window, head, 1 + slots, 1 + slots), rows sum to one. Row 0 is the token; column 0 is zero
            below it, for nothing attends to it. ``trace.step(layer).slots`` says which token each slot is.
        """
        step = self.trace.step(layer)
        weights = step.weights()
        whole = weights.new_zeros(*weights.shape[:3], weights.shape[3] + 1, weights.shape[4] + 1)
        whole[..., 0, :] = self.rows[step.layer]
        whole[..., 1:, 1:] = weights
        return whole

    def map(self, layer: int = -1, head: Head = "mean") -> Maps:
        """The first row without its first column, put back on the block's grid: each window's own summary.

        Returns:
            (batch, height, width). Each window sums to one less what its token keeps for itself and what falls on
            padding; nothing is rescaled, so windows can be compared.
        """
        return self._map_and_padding(layer, head)[0]

    def attribution(self, layer: int = -1, head: Head = "mean") -> Attribution:
        """:meth:`map` as a result: to lay over the photo, to save, with its provenance."""
        step = self.trace.step(layer)
        values, fallen = self._map_and_padding(layer, head)
        about = {
            **self.trace.provenance,
            "method": "window_cls",
            "parameters": {"layer": step.layer, "head": step.require_head(head)},
            "rows_sum_to_one": False,
            "padding_mass": fallen.tolist(),
        }
        return Attribution(values, step.require_grid(), self.trace.images, about)

    def _map_and_padding(self, layer: int, head: Head) -> tuple[Maps, Float[Tensor, " batch"]]:
        """The map, and the share of the tokens' attention, all windows together, that fell on padding."""
        step = self.trace.step(layer)
        slots, grid = step.require_slots(), step.require_grid()
        fused = fuse_heads(self.rows[step.layer][..., None, 1:], step.require_head(head)).squeeze(-2)
        real = slots >= 0
        tokens = fused.new_zeros(len(fused), grid.num_tokens)
        tokens[:, slots[real]] = fused[:, real]
        return only_finite(grid.patches(tokens), "attention"), (fused * ~real).sum((1, 2)) / len(slots)


def window_cls(model: VisionModel | nn.Module, images: Any, *, tokens: Sequence[Tensor] | None = None) -> WindowCls:
    """What a CLS token in every window looks at, in every block; nothing is trained and the model is not changed.

    The token enters each block as the mean of its window's tokens and goes through the block's own LayerNorm, query,
    key and softmax: softmax(q_cls · [k_cls, k_1, …, k_M]ᵀ / √d). It has no place in the window, so no position bias and
    no mask between regions of a shifted window apply to it. No token attends to it.

    Reference: the window attention is Liu et al., 2021 (arXiv 2103.14030).

    Args:
        model: Swin (version 1) of transformers, timm or torchvision.
        images: as for :func:`vitscope.capture`.
        tokens: for each stage a vector, as wide as the stage, that enters instead of the windows' means;
            :class:`WindowHead` learns such. Of a model tuned with ``window-cls`` its own by default.

    Raises:
        CallError: the model is not of a kind whose blocks can be read this way.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.window_cls(vs.load("swin-nano"), skimage.data.chelsea())
        >>> result.attention(0).shape, result.map(0).shape
        (torch.Size([1, 16, 4, 17, 17]), torch.Size([1, 16, 16]))
    """
    model = as_vision_model(model)
    projections = block_projections(model)
    stages = stage_of_block(projections)
    if tokens is None and isinstance(model.module, WindowClassified):
        tokens = [token.detach() for token in model.module.reader.tokens]
    if tokens is not None:
        given, widths = [token.numel() for token in tokens], stage_widths(projections)
        if given != widths:
            raise CallError(f"tokens are {given} wide, but the stages of {model.name} are {widths}")
    inputs, trace, logits = block_inputs(model, images)
    rows = {}
    with torch.no_grad():
        for step in trace.blocks:
            entering = None if tokens is None else tokens[stages[step.module]]
            weights, _ = read_window(projections[step.module], inputs[step.module], step.require_slots(), entering)
            rows[step.layer] = weights
    return WindowCls(trace, rows, logits)


def block_inputs(
    model: VisionModel, images: Any
) -> tuple[dict[str, Float[Tensor, "batch token channel"]], Trace, Tensor | None]:
    """The tokens that enter each block, the run's trace, and its logits."""
    assert model.layout is not None
    assert model.layout.hierarchy is not None
    inputs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def note(tokens: Tensor, _: Any) -> None:
            # (batch, token, channel) or (batch, row, column, channel)
            inputs[path] = tokens.detach().flatten(1, -2)

        return note

    watch = {block.module: keep(path) for path, block in model.layout.hierarchy.blocks.items()}
    done = run_and_capture(model, images, by_class=False, merge="equal", watch=watch)
    return inputs, done.trace, done.logits
