"""A CLS token in every window, which attends to the tokens of its window while no other token attends to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.scores import Head, fuse_heads
from vitscope.attention.trace import Trace
from vitscope.display import Drawn, counted, one_line
from vitscope.errors import CallError
from vitscope.models.heads import WindowClassified
from vitscope.models.vision_model import VisionModel
from vitscope.models.window_reader import WindowRows, block_projections, read_window, stage_of_block, stage_widths
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.typing import Maps
from vitscope.validation import require_finite_tensor, short_text

WindowAttention = Float[Tensor, "batch window head query key"]


@dataclass(frozen=True, eq=False)
class WindowCls(Drawn):
    """The attention of a CLS token in every window of every block.

    Attributes:
        trace: trace of the forward pass that the CLS tokens read.
        rows: for each layer, the attention of the CLS tokens, (batch, window, head, 1 + slots): to themselves first,
            then to the slots of their window.
        logits: the model's own logits, which the CLS tokens do not change; None if it has no classifier.
    """

    trace: Trace
    rows: Mapping[int, WindowRows]
    logits: Tensor | None

    def __repr__(self) -> str:
        model = short_text(self.trace.provenance.get("model"), "no model")
        layers = f"layers {min(self.rows)} to {max(self.rows)}" if self.rows else "no layers"
        return one_line(f"WindowCls of {model}: {counted(len(self.trace.images), 'image')}", layers)

    def attention(self, layer: int) -> WindowAttention:
        """Return the attention of a layer, including the CLS token.

        Args:
            layer: index of the attention block, from 0; negative from the end.

        Returns:
            float32 (batch, window, head, 1 + slots, 1 + slots), whose rows sum to one. Row 0 is the CLS token. Column
            0 is zero below it, because no token attends to it. ``trace.step(layer).slots`` is the token in each slot.
        """
        step = self.trace.step(layer)
        weights = step.weights()
        extended = weights.new_zeros(*weights.shape[:3], weights.shape[3] + 1, weights.shape[4] + 1)
        extended[..., 0, :] = self.rows[step.layer]
        extended[..., 1:, 1:] = weights
        return extended

    def map(self, layer: int = -1, head: Head = "mean") -> Maps:
        """Return the attention of the CLS tokens on the block's grid: a summary of each window.

        Args:
            layer: index of the attention block, from 0; negative from the end.
            head: index of the head, or ``"mean"``, ``"max"``, ``"min"`` over heads.

        Returns:
            (batch, height, width). Each window sums to one, less the attention of its CLS token to itself and to
            padding. The values are not rescaled, so windows can be compared.
        """
        return self._map_and_padding(layer, head)[0]

    def attribution(self, layer: int = -1, head: Head = "mean") -> Attribution:
        """Return :meth:`map` as an attribution with its provenance, which can be drawn over the photo or saved.

        Args:
            layer: see :meth:`map`.
            head: see :meth:`map`.
        """
        step = self.trace.step(layer)
        values, padding = self._map_and_padding(layer, head)
        provenance = {
            **self.trace.provenance,
            "method": "window_cls",
            "parameters": {"layer": step.layer, "head": step.require_head(head)},
            "rows_sum_to_one": False,
            "padding_mass": padding.tolist(),
        }
        return Attribution(values, step.require_grid(), self.trace.images, provenance)

    def _map_and_padding(self, layer: int, head: Head) -> tuple[Maps, Float[Tensor, " batch"]]:
        """Return the map, and the share of the CLS tokens' attention that falls on padding, over all windows."""
        step = self.trace.step(layer)
        slots, grid = step.require_slots(), step.require_grid()
        fused = fuse_heads(self.rows[step.layer][..., None, 1:], step.require_head(head)).squeeze(-2)
        is_token = slots >= 0
        tokens = fused.new_zeros(len(fused), grid.num_tokens)
        tokens[:, slots[is_token]] = fused[:, is_token]
        return require_finite_tensor(grid.patches(tokens), "attention"), (fused * ~is_token).sum((1, 2)) / len(slots)


def window_cls(model: VisionModel | nn.Module, images: Any, *, tokens: Sequence[Tensor] | None = None) -> WindowCls:
    """Compute the attention of a CLS token in every window of every block, without training or changing the model.

    The token enters each block as the mean of its window's tokens and passes through the block's own LayerNorm, query,
    key and softmax: softmax(q_cls · [k_cls, k_1, …, k_M]ᵀ / √d). It has no position in the window, so neither the
    position bias nor the mask between regions of a shifted window applies to it. No token attends to it.

    Reference: for window attention, Liu et al., 2021 (arXiv 2103.14030).

    Args:
        model: a Swin (version 1) of transformers, timm or torchvision; from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        tokens: a vector for each stage, with the stage's number of channels, that enters instead of the windows'
            means; :class:`WindowHead` learns such vectors. By default the means, or the vectors that a model has
            learned by fine-tuning with ``window-cls``.

    Returns:
        the attention of the CLS tokens, and the trace of the forward pass.

    Raises:
        CallError: ``tokens`` do not fit the model's stages.
        UnsupportedModelError: the model has no windows that a CLS token can be put into.

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
        token_widths, widths = [token.numel() for token in tokens], stage_widths(projections)
        if token_widths != widths:
            raise CallError(f"tokens are {token_widths} wide, but the stages of {model.name} are {widths}")
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
    """Run the model and return the tokens that enter each block, the trace, and the logits."""
    assert model.layout is not None
    assert model.layout.hierarchy is not None
    inputs: dict[str, Tensor] = {}

    def recorder(path: str) -> Any:
        def record(tokens: Tensor, _: Any) -> None:
            # (batch, token, channel) or (batch, row, column, channel)
            inputs[path] = tokens.detach().flatten(1, -2)

        return record

    watch = {block.module: recorder(path) for path, block in model.layout.hierarchy.blocks.items()}
    captured = run_and_capture(model, images, by_class=False, merge="equal", watch=watch)
    return inputs, captured.trace, captured.logits
