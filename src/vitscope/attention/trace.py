"""The trace of a run: attention and merging in order, and the tokens that the classifier reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitscope.attention.omitted import OmittedCall, image_token_calls
from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.readout import PooledClassifier, readout_text
from vitscope.attention.scores import Head
from vitscope.attention.step import AttentionStep as AttentionStep
from vitscope.attention.step import require_index
from vitscope.attention.unsupported import BLOCK_BY_BLOCK
from vitscope.display import Drawn, counted, one_line
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.typing import DenseAttention, Maps, ReadoutRow
from vitscope.validation import require_class_index, require_finite_tensor, require_integer, short_text

Query = str | tuple[int, int]
Step = AttentionStep | MergeStep


@dataclass(frozen=True, eq=False)
class Trace(Drawn):
    """The attention of one run of a model. Returned by :func:`vitscope.capture`.

    Attributes:
        steps: attention blocks and patch merging layers, in the order in which they ran.
        num_layers: number of attention blocks of the model, captured or not.
        readout: (batch, token) over the last token grid, the share of each token in what the classifier reads.
            Non-negative, rows sum to one: one-hot for a CLS token, uniform for mean pooling, the pooling attention for
            attention pooling. None if unknown.
        images: the input images, one for each element of the batch.
        prefix_names: names of the tokens before the patches, in order.
        provenance: model, library, versions, readout, meaning of the output and preprocessing.
        labels: labels of the classes; None if there are none.
        classifier: the classifier, if it is linear in the mean of its tokens; None otherwise.
        omitted: attention calls of the run that are not blocks of the trace.
        unchained: reason why a block does not depend on the block before it; None if the blocks form a chain.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
        <Trace of vit-nano: 1 image, 6 attention blocks, 12 heads × 65 tokens, grid 8×8 after cls, readout cls>
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
        held = "" if len(self.blocks) == self.num_layers else f"{len(self.blocks)} of "
        shapes = list(dict.fromkeys(step.shape_text for step in self.blocks))
        prefix = f" after {', '.join(self.prefix_names)}" if self.prefix_names else ""
        grid = self.grid if self.steps else None
        sources = self.provenance.get("readout")
        readout = "unknown" if self.readout is None else readout_text(sources) if sources else "custom"
        return one_line(
            f"Trace of {short_text(self._model, '')}: {counted(len(self.images), 'image')}",
            f"{held}{counted(self.num_layers, 'attention block')}",
            "; ".join([*shapes[:2], *(["…"] if len(shapes) > 2 else [])]),
            "grid unknown" if grid is None else f"grid {grid.height}×{grid.width}{prefix}",
            f"{len(self.omitted)} attention calls omitted" if self.omitted else "",
            f"readout {readout}",
        )

    @property
    def _model(self) -> str:
        """The name of the model, for messages."""
        return str(self.provenance.get("model", "this model"))

    @property
    def grid(self) -> Grid | None:
        """The finest token grid, which is the grid of results over all blocks; None if unknown."""
        return self.steps[0].grid

    @property
    def blocks(self) -> list[AttentionStep]:
        """The attention blocks, without the patch merging layers."""
        return [step for step in self.steps if isinstance(step, AttentionStep)]

    @property
    def stages(self) -> list[list[AttentionStep]]:
        """The attention blocks of each stage; a plain ViT is one stage.

        A stage ends where the token grid changes. It is empty if none of its blocks was captured.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> [len(stage) for stage in trace.stages]
            [2, 4, 2]
        """
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
        """Return one attention block.

        Args:
            layer: index of the block, from 0; negative indices count from the end.

        Returns:
            The block.

        Raises:
            CallError: the layer is out of range or was not captured.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea(), layers=[-1])
            >>> trace.step(-1).layer
            5
        """
        index = require_index(layer, self.num_layers, "layer", "the model") % self.num_layers
        for step in self.blocks:
            if step.layer == index:
                return step
        layers = [step.layer for step in self.blocks]
        raise CallError(f"layer {layer} was not captured: this trace holds layers {layers}")

    def attention(self, layer: int) -> DenseAttention:
        """Return the dense attention matrix of one block on the token grid of the block.

        Args:
            layer: index of the block, from 0; negative indices count from the end.

        Returns:
            float32 (batch, head, token, token), prefix tokens included, zero between tokens of different windows. Rows
            sum to one, less the attention to padding (:meth:`AttentionStep.padding_share`).

        Raises:
            CallError: the layer is out of range or was not captured.
            UnsupportedModelError: the positions of the windows are unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.attention(-1).shape
            torch.Size([1, 12, 65, 65])
        """
        return self.step(layer).attention()

    def map(self, layer: int, head: Head = "mean", query: Query = "readout") -> Maps:
        """Return the attention of one query to the patches in one block.

        Args:
            layer: index of the block, from 0; negative indices count from the end.
            head: index of a head, or ``"mean"``, ``"max"`` or ``"min"`` over heads.
            query: ``"readout"`` for the tokens that the classifier reads, the name of a prefix token (``"cls"``,
                ``"distillation"``, ``"register_1"``, …), or a patch of the block's grid as (row, column).

        Returns:
            float32 (batch, height, width), attention weights on the block's grid. Attention to prefix tokens and
            padding is omitted and nothing is rescaled, so the sum is at most one.

        Raises:
            CallError: the layer, head or query does not exist, or the layer was not captured.
            UnsupportedModelError: the token grid, the positions of the windows or the readout is unknown.
            WorkError: the weights are NaN or infinite.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.map(layer=-1, head=0, query=(3, 4)).shape
            torch.Size([1, 8, 8])
        """
        return self.map_and_padding(layer, head, query)[0]

    def map_and_padding(self, layer: int, head: Head, query: Query) -> tuple[Maps, Float[Tensor, " batch"]]:
        """Return :meth:`map` and the share of the query's attention that falls on padding.

        Args:
            layer: index of the block, from 0; negative indices count from the end.
            head: index of a head, or ``"mean"``, ``"max"`` or ``"min"`` over heads.
            query: as for :meth:`map`.

        Returns:
            The map, float32 (batch, height, width), and the share of padding, float32 (batch,).

        Raises:
            CallError: the layer, head or query does not exist, or the layer was not captured.
            UnsupportedModelError: the token grid, the positions of the windows or the readout is unknown.
            WorkError: the weights are NaN or infinite.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> attention, padding = trace.map_and_padding(-1, "mean", "cls")
            >>> attention.shape, padding.tolist()
            (torch.Size([1, 8, 8]), [0.0])
        """
        step = self.step(layer)
        grid = step.require_grid()
        rows, fallen = step.pull_head(self.query_row(step, query)[:, None], head)
        return require_finite_tensor(grid.patches(rows[:, 0]), "attention"), fallen[:, 0]

    def query_row(self, step: AttentionStep, query: Query) -> ReadoutRow:
        """Return the row vector of a query over the tokens of a block: one-hot for a token, or the readout.

        Args:
            step: a block of this trace.
            query: as for :meth:`map`.

        Returns:
            float32 (batch, token); rows sum to one.

        Raises:
            CallError: the query does not exist.
            UnsupportedModelError: the token grid or the readout is unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> int(trace.query_row(trace.step(-1), (0, 2)).argmax())
            3
        """
        grid = step.require_grid()
        if isinstance(query, str) and query == "readout":
            return self.readout_at(step)
        if isinstance(query, str):
            if query not in self.prefix_names:
                names = ", ".join(repr(name) for name in ("readout", *self.prefix_names))
                raise CallError(f"unknown query {query!r}: choose {names} or a patch as (row, column)")
            token = self.prefix_names.index(query)
        else:
            token = grid.token(*_row_and_column(query))
        row = torch.zeros(step.scores.shape[0], grid.num_tokens, dtype=torch.float32, device=step.scores.device)
        row[:, token] = 1
        return row

    @property
    def why_unchained(self) -> str | None:
        """The reason why the blocks do not show the full path from the image to the output; None if they do."""
        calls = image_token_calls(self.omitted)
        if self.unchained is None and calls:
            subject = "1 attention call" if len(calls) == 1 else f"{len(calls)} attention calls"
            verb = "is" if len(calls) == 1 else "are"
            return (
                f"{subject} of image tokens {verb} not among the blocks of the trace, e.g. {calls[0]}, so the blocks "
                f"alone do not show how the image reaches the output: {BLOCK_BY_BLOCK}"
            )
        return self.unchained

    def require_chain(self, method: str = "rollout") -> None:
        """Check that the blocks show the full path from the image to the output.

        Args:
            method: name of the method that needs the path, for the message.

        Raises:
            UnsupportedModelError: blocks run in parallel, or attention calls between them are not in the trace.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.require_chain()
        """
        reason = self.why_unchained
        if reason is not None:
            raise UnsupportedModelError(f"{method} is not available for {self._model}: {reason}")

    def readout_at(self, step: AttentionStep) -> ReadoutRow:
        """Return the readout over the tokens of a block, pulled back through patch merging only, with equal shares.

        Args:
            step: a block of this trace.

        Returns:
            float32 (batch, token); rows sum to one, less the share that falls on padding.

        Raises:
            UnsupportedModelError: the readout or its path to the block is unknown.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> int(trace.readout_at(trace.step(-1)).argmax())
            0
        """
        rows = self.readout_row(None)[:, None]
        for later in reversed(self.steps):
            if later is step:
                break
            if isinstance(later, MergeStep):
                self.require_chain("the readout as a query")
                rows, _ = later.pull(rows, "equal")
        if rows.shape[-1] != step.require_grid().num_tokens:
            raise UnsupportedModelError(
                f"{self._model} changes its tokens between layer {step.layer} and the classifier in an unknown way, so "
                "the readout is not available as a query: pass a patch as (row, column)"
            )
        return rows[:, 0]

    def readout_row(self, target: int | str | None) -> ReadoutRow:
        """Return the row vector over the last token grid from which a result starts.

        Args:
            target: None for the readout. An index or label for the share of each token in the logit of that class,
                proportional to max(0, weight_c · features_i), which needs a classifier that is linear in the mean of
                its tokens.

        Returns:
            float32 (batch, token); rows sum to one.

        Raises:
            CallError: the class does not exist, or no token contributes to it.
            UnsupportedModelError: the readout is unknown, or the logits are not sums over tokens.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("swin-nano"), skimage.data.chelsea())
            >>> trace.readout_row("cat").shape
            torch.Size([1, 16])
        """
        if self.readout is None:
            raise UnsupportedModelError(
                "the readout of this model is unknown: pass readout to vitscope.load, or a query; for a model tuned "
                "with CLS tokens in its windows, use vitscope.window_cls"
            )
        if target is None:
            return self.readout
        if self.classifier is None:
            raise UnsupportedModelError(
                f"the logits of {self._model} are not sums over tokens, so a readout of one class is not available: "
                "omit target"
            )
        index = self.target_index(target)
        return self.classifier.shares(index, self.label(index))

    def target_index(self, target: int | str) -> int:
        """Return the index of a class.

        Args:
            target: index or label of the class.

        Raises:
            CallError: the class does not exist.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.target_index("cat")
            3
        """
        classifier = self.classifier
        return require_class_index(target, self.labels, 0 if classifier is None else len(classifier.weight))

    def label(self, index: int) -> str:
        """Return the label of a class, such as "cat", or "class 3" if the model has no labels.

        Args:
            index: index of the class, from 0.

        Examples:
            >>> import skimage.data, vitscope as vs
            >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
            >>> trace.label(3)
            'cat'
        """
        return self.labels[index] if self.labels and index < len(self.labels) else f"class {index}"


def _row_and_column(query: Any) -> tuple[int, int]:
    """Return the row and column of a query that is a patch."""
    try:
        row, column = query
    except (TypeError, ValueError):
        raise CallError(
            f"unknown query {query!r}: pass 'readout', the name of a prefix token or (row, column)"
        ) from None
    return require_integer(row, "the query's row"), require_integer(column, "the query's column")
