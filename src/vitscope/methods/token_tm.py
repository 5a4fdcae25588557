"""TokenTM (Wu et al., 2024): attention, its gradient, and how each half of a block transforms the tokens."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.patch_merging import Merge, check_merge
from vitscope.attention.rules import RuleName
from vitscope.errors import UnsupportedModelError
from vitscope.methods._attention_fold import AttentionFold
from vitscope.methods._gradient import gradient_result, in_batches, require_rules
from vitscope.methods.attention_map import grid_of, require_start_layer
from vitscope.models.blocks import Block
from vitscope.models.targets import ScoreOutput, score
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradient_recorder import Tape
from vitscope.tracing.gradients import GradientCapture, GradientOptions, capture_gradients
from vitscope.typing import Fused, Rows, Target, Weights

# Numbers of tokens: their lengths, or their transformation weights.
TokenNumbers = Float[Tensor, "batch token"]


def token_tm(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    start_layer: int = 0,
    rules: RuleName = "plain",
    merge: Merge = "equal",
    output: ScoreOutput = "logit",
) -> Attribution:
    """Explain a class by attention, its gradient and the transformation of the tokens, folded over all blocks.

    Each half of a block, attention and MLP, changes token j of the residual stream from e_j to e′_j. The weight of this
    transformation is w_j = ‖e′_j‖ / ‖e_j‖ · softmax_j cos(e_j, e′_j): how much longer the token becomes, times how well
    it keeps its direction compared with all other tokens of the image. With r the readout row, from the last block to
    the first::

        r ← r + r · diag(w_mlp)
        r ← r + r · ((E_h[A] · diag(w_attention)) ⊙ E_h[(∂f/∂A)⁺])

    The result is r_j · ‖h_j‖, with h the tokens that enter the first block of the fold.

    The streams before and after a half include its skip connection. In a window transformer the softmax runs over all
    tokens of the block's grid, not over each window, because the MLP has no windows. Attention to the padding of
    windows is left out, and so is the part on the padding of a patch merging. A token of length 0 has weight 0.

    The softmax makes the weights about 1/N for N tokens, so a block changes the row little. If the classifier reads the
    mean of its tokens, the row starts with equal parts and the map stays close to the lengths ‖h_j‖ for every class.

    Reference: Wu, Duan, Kang, Tang & Yan, 2024 (arXiv 2403.14552).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class.
        start_layer: index of the first block to include, from 0; negative from the end.
        rules: rules of the backward pass: ``"plain"``, ``"libra"`` or ``"attn_lrp"``.
        merge: the share of each of the four tokens in a merged token, see :func:`vitscope.rollout`.
        output: the number of the target to explain, see :func:`vitscope.generic_attention`.

    Returns:
        an attribution whose ``values`` (batch, height, width), at least 0, are the patches' part of r_j · ‖h_j‖ on the
        finest grid. ``provenance["row_sums"]`` is the sum over patches and prefix tokens.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks or the stream between their halves are unknown, the blocks cannot be chained,
            or the model has no gradients.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.token_tm(vs.load("vit-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 8, 8])
        >>> vs.token_tm(vs.load("swin-nano"), skimage.data.chelsea(), target="cat").values.shape
        torch.Size([1, 16, 16])
    """
    options = GradientOptions(rules=require_rules(rules), merge_norms=merge == "norm")
    check_merge(merge)

    def explain(images: Any, target: Any) -> Attribution:
        middles = _Middles()
        with capture_gradients(
            model, images, options, watch=lambda layers: [block.module for block in layers], finish=middles.hooks
        ) as run:
            grid = grid_of(run.trace)
            start = require_start_layer(start_layer, run.trace.num_layers)
            explained = score(run.model, run.output, run.has_classes, target, output)
            fold = _TransformationFold(run, middles.require_streams(run), start_layer=start, merge=merge)
            run.gradients(explained.values, [run.start], fold)
            row, _ = fold.finish()
            parameters = {"start_layer": start, "rules": rules, "merge": merge}
            facts = {"row_sums": row.sum(-1).tolist()}
            values = grid.patches(row)
            return gradient_result(run, "token_tm", parameters, explained, values, grid, signed=False, facts=facts)

    return in_batches(images, target, explain)


class _Middles:
    """Hooks that keep the residual stream between the attention and the MLP of each block."""

    def __init__(self) -> None:
        self._streams: list[Tensor] = []
        self._num_ends = 0
        self._in_order = True

    def hooks(self, layers: Sequence[Block], _: Tape) -> Sequence[Any]:
        """Add the hooks and return their handles."""
        starts = [block.stream.register_forward_pre_hook(in_this_thread(self._keep)) for block in layers]
        return [*starts, *(block.mlp_end.register_forward_hook(in_this_thread(self._end)) for block in layers)]

    def require_streams(self, run: GradientCapture) -> Sequence[Tensor]:
        """Return the stream before the MLP of each block.

        Raises:
            UnsupportedModelError: the blocks are unknown, or are not attention followed by an MLP.
        """
        blocks = len(run.require_streams("generic_attention"))
        if not self._in_order or not len(self._streams) == self._num_ends == blocks:
            raise UnsupportedModelError(
                f"token_tm is not available for {run.model.name}: the residual stream between the attention and the "
                "MLP of its blocks is unknown; use generic_attention"
            )
        return self._streams

    def _keep(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._streams.append(args[0])

    def _end(self, *_: Any) -> None:
        self._num_ends += 1
        # A block that normalises behind its MLP calls the norm, whose input would be the stream, too late.
        self._in_order = self._in_order and len(self._streams) == self._num_ends


class _TransformationFold(AttentionFold):
    """A fold in which each half of a block also multiplies the row by its transformation weights.

    Args:
        run: the run.
        middles: the stream before the MLP of each block.
        start_layer: index of the first block to include, not negative.
        merge: shares of the four tokens that patch merging joins.
    """

    def __init__(self, run: GradientCapture, middles: Sequence[Tensor], *, start_layer: int, merge: Merge) -> None:
        super().__init__(run.trace, "token_tm", _product_of_means, start_layer=start_layer, merge=merge)
        self._run, self._middles = run, middles
        self._dtype = torch.promote_types(run.start.dtype, torch.float32)

    def _through_mlp(self, layer: int, row: Rows) -> Rows:
        after = self._run.outputs[self._run.layers[layer].module]
        weights = _transformation_weights(*self._tokens(layer, self._middles[layer], after))
        return row + row * weights[:, None]

    def _through_attention(self, layer: int, row: Rows, pulled: Rows) -> Rows:
        before, after = self._tokens(layer, self._run.streams[layer], self._middles[layer])
        row = row + pulled * _transformation_weights(before, after)[:, None]
        return row * _lengths(before)[:, None] if layer == self._start else row

    def _tokens(self, layer: int, *streams: Tensor) -> list[Tensor]:
        """Return streams of a block as (batch, token, channel), without their graph."""
        return [self._run.tokens(stream.detach(), layer).to(self._dtype) for stream in streams]


def _product_of_means(weights: Weights, gradient: Weights) -> Fused:
    """Return E_h[A] ⊙ E_h[(∇A)⁺]."""
    return weights.mean(2) * gradient.clamp_min(0).mean(2)


def _lengths(tokens: Float[Tensor, "batch token channel"]) -> TokenNumbers:
    """Return the Euclidean norm of each token."""
    return torch.linalg.vector_norm(tokens, dim=-1)


def _transformation_weights(
    before: Float[Tensor, "batch token channel"], after: Float[Tensor, "batch token channel"]
) -> TokenNumbers:
    """Return ‖e′_j‖ / ‖e_j‖ · softmax_j cos(e_j, e′_j), and 0 for a token of length 0."""
    lengths = _lengths(before)
    growth = torch.where(lengths > 0, _lengths(after) / lengths, 0.0)
    return growth * torch.cosine_similarity(before, after, dim=-1).softmax(-1)
