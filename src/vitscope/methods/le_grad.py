"""LeGrad (Bousselham et al., 2024): how each block's attention raises the output for that block's own tokens."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.attention.step import AttentionStep
from vitscope.attention.trace import Trace
from vitscope.errors import UnsupportedModelError
from vitscope.methods._gradient import from_windows, gradient_result, in_batches, to_finest
from vitscope.methods.attention_map import grid_of, require_start_layer
from vitscope.models.blocks import Block
from vitscope.models.outputs import copied_images
from vitscope.models.targets import SIMILARITY, ScoreOutput, score
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel
from vitscope.results.attribution import Attribution
from vitscope.tracing.capture import as_vision_model
from vitscope.tracing.gradient_recorder import Tape
from vitscope.tracing.gradients import GradientCapture, GradientOptions, capture_gradients
from vitscope.typing import Target, Weights


def le_grad(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    start_layer: int = 0,
) -> Attribution:
    """Explain a class by the gradient with respect to the attention of each block, without the attention itself.

    The score s_l of block l is the model's output if every token after the last block is the mean of the tokens after
    block l. With the N tokens and h heads of that block, the result is the mean over the blocks of
    ``1 / (h N) Σ_heads Σ_queries (∂s_l / ∂A_l)⁺``. All blocks take one forward and one backward pass.

    If a pooling layer with attention reads the tokens, it reads the tokens of block l instead of their mean, and A_l is
    its attention. A window transformer has one classifier for the last stage, so only the blocks of that stage count;
    their values are spread with equal shares over the finest tokens. The values are not scaled to [0, 1].

    Reference: Bousselham, Boggust, Chaybouti, Strobelt & Kuehne, 2024 (arXiv 2404.03214).

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: see :func:`vitscope.capture`.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        start_layer: index of the first block to include, from 0; negative from the end.

    Returns:
        an attribution whose ``values`` (batch, height, width) are at least 0, in units of the logit.
        ``provenance["layers"]`` are the blocks that count and ``provenance["padding_mass"]`` is the part on padding.

    Raises:
        CallError: an option is out of range, or the model has no such class.
        UnsupportedModelError: the blocks are unknown or cannot be chained, or the model has no gradients.
        WorkError: as for :func:`vitscope.capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.le_grad(vs.load("vit-nano"), skimage.data.chelsea(), target="cat")
        >>> result.values.shape, result.provenance["layers"]
        (torch.Size([1, 8, 8]), [0, 1, 2, 3, 4, 5])
    """
    model = as_vision_model(model)
    if model.layout is not None and any(name.startswith("test_register") for name in model.layout.prefix_names):
        raise UnsupportedModelError(
            "le_grad is not available inside vitscope.test_time_registers, which takes tokens away after the last "
            "block: use generic_attention"
        )
    pools = model.layout is not None and "pooling" in model.layout.readout

    def explain(images: Any, target: Any) -> Attribution:
        options = GradientOptions(separate_blocks=True)
        with ExitStack() as stack:
            with copied_images() as set_copies:  # in the forward pass alone: a target may run the model again
                copies = _BlockCopies(model.name, start_layer, pools, set_copies)
                run = stack.enter_context(capture_gradients(model, images, options, finish=copies.hooks))
            grid = grid_of(run.trace)
            run.trace.require_chain("le_grad")
            layers = copies.require_layers(run.trace)
            outputs = run.output.unflatten(0, (-1, len(run.pixels)))
            kind: ScoreOutput = "probability" if run.model.meaning == "probabilities" else "logit"
            explained = score(run.model, outputs[-1], run.has_classes, target, kind)
            fixed = explained.fixed_target
            if not run.has_classes and isinstance(target, str) and target == SIMILARITY:
                fixed = _along(outputs[-1])
            scores = [score(run.model, logits, run.has_classes, fixed, kind).values for logits in outputs]
            total = torch.stack(scores[: len(layers)]).sum(0)
            if pools:
                tokens, padding = _pooling_gradients(run, total, copies.outputs, layers)
            else:
                tokens, padding = _block_gradients(run, total, layers)
            facts = {"layers": list(layers), "padding_mass": padding.tolist()}
            parameters = {"start_layer": copies.start}
            values = grid.patches(tokens)
            return gradient_result(run, "le_grad", parameters, explained, values, grid, signed=False, facts=facts)

    return in_batches(images, target, explain)


class _BlockCopies:
    """Hooks that give the layers after the last block one copy of each image per block.

    In each copy, the tokens are the mean of a block's tokens, or those tokens themselves if a pooling layer with
    attention reads them. The last copy is always the output of the last block, so its output is the model's own.

    Args:
        name: name of the model, for messages.
        start_layer: index of the first block.
        pools: whether a pooling layer with attention reads the tokens.
        set_copies: function that announces the number of copies.
    """

    def __init__(self, name: str, start_layer: int, pools: bool, set_copies: Callable[[int], Any]) -> None:
        self._name, self._start_layer, self._pools = name, start_layer, pools
        self._set_copies = set_copies
        self.start = self._num_blocks = self._num_runs = 0
        self.outputs: list[Tensor] = []

    def hooks(self, layers: Sequence[Block], _: Tape) -> Sequence[Any]:
        """Add the hooks and return their handles."""
        if not layers:
            raise UnsupportedModelError(
                f"the blocks of {self._name} are unknown, so le_grad is not available: use generic_attention"
            )
        self.start = require_start_layer(self._start_layer, len(layers))
        *inner, last = layers[self.start :]
        self._num_blocks = 1 + len(inner)
        handles = [block.module.register_forward_hook(in_this_thread(self._keep)) for block in inner]
        return [*handles, last.module.register_forward_hook(in_this_thread(self._replace))]

    def require_layers(self, trace: Trace) -> Sequence[int]:
        """Return the indices of the blocks that have a copy.

        Raises:
            UnsupportedModelError: they are not the blocks of the last stage.
        """
        first = max(self.start, trace.stages[-1][0].layer)
        layers = range(first, trace.num_layers)
        if len(self.outputs) != len(layers):
            raise UnsupportedModelError(
                f"{self._name} has {trace.num_layers} attention calls, which are not those of its blocks, so le_grad "
                "is not available: use generic_attention"
            )
        return layers

    def _keep(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Keep the output of a block; at the start of a new stage, forget those of the stage before."""
        self._num_runs += 1
        if self._num_runs > self._num_blocks:
            raise UnsupportedModelError(
                f"the blocks of {self._name} run several times for an image, so le_grad is not available: use "
                "input_x_gradient with at='pixels'"
            )
        tokens = output[0] if isinstance(output, tuple) else output
        if self.outputs and self.outputs[-1].shape != tokens.shape:
            self.outputs.clear()
        self.outputs.append(tokens)

    def _replace(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the copies instead of the output of the last block."""
        self._keep(module, args, output)
        copies = self.outputs
        if not self._pools:
            axes = tuple(range(1, copies[-1].ndim - 1))
            means = [tokens.mean(axes, keepdim=True).expand_as(tokens) for tokens in copies]
            copies = [*means, copies[-1].detach()]
        self._set_copies(len(copies))
        batch = torch.cat(copies)
        return (batch, *output[1:]) if isinstance(output, tuple) else batch


def _along(output: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the length of features along the direction of the model's own output, for every copy."""
    direction = torch.nn.functional.normalize(output.detach(), dim=-1)
    return lambda features: (features * direction).sum(-1)


def _block_gradients(run: GradientCapture, total: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mean positive gradient of the attention of blocks to each finest token, and the part on padding."""
    sums: dict[int, Tensor] = {}

    def on_weights(step: AttentionStep, _rows: slice, _weights: Weights, gradient: Weights) -> None:
        sums[step.layer] = sums.get(step.layer, 0) + gradient.clamp_min(0).mean(2).sum(2)  # (batch, window, key)

    run.gradients(total, [run.streams[layer] for layer in layers], on_weights)
    missing = set(layers) - set(sums)
    if missing:
        raise UnsupportedModelError(
            f"no gradient reached the attention of layer {max(missing)} of {run.model.name}: its module detaches it"
        )
    grid = run.grid(layers[-1])
    placed = [from_windows(run.trace.step(layer), sums[layer] / grid.num_tokens) for layer in layers]
    tokens = torch.stack([values for values, _ in placed]).mean(0)
    lost = torch.stack([padding for _, padding in placed]).mean(0)
    finest, padding = to_finest(run.trace, tokens, grid, "le_grad")
    return finest, lost + padding


def _pooling_gradients(
    run: GradientCapture, total: Tensor, outputs: Sequence[Tensor], layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the mean positive gradient of a pooling layer's attention to each token, and zeros for padding."""
    gradients: list[Tensor] = []

    def on_pooling(_rows: slice, _weights: Weights, gradient: Weights) -> None:
        gradients.append(gradient.clamp_min(0).mean((1, 2)))  # (copy · batch, query, key)

    run.gradients(total, outputs, on_pooling=on_pooling)
    if not gradients:
        raise UnsupportedModelError(f"no gradient reached the pooling layer of {run.model.name}: use generic_attention")
    received = torch.cat(gradients, dim=1).mean(1).unflatten(0, (len(layers), -1)).mean(0)
    grid = run.grid(layers[-1])
    tokens = torch.nn.functional.pad(received, (grid.num_tokens - received.shape[-1], 0))
    return tokens, tokens.new_zeros(len(tokens))
