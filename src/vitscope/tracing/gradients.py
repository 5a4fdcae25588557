"""A run with gradients: capture a model with its graph alive, then differentiate a score once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.alpha_beta_rules import AlphaBetaRules
from vitscope.attention.flow import tensors_of
from vitscope.attention.rule_set import RuleSet
from vitscope.attention.rules import LocalRules, RuleName
from vitscope.attention.scores import in_float32
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.attention.trace import Trace
from vitscope.errors import UnsupportedModelError, WorkError
from vitscope.grid import Grid
from vitscope.models.blocks import Block
from vitscope.models.evaluation import without_checkpointing
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.block_hooks import BlockInputs, check_differentiable, hooked_blocks
from vitscope.tracing.capture import PreparedRun, blocks_or_none, prepare_run
from vitscope.tracing.gradient_recorder import BiasTerm, GradientRecorder, OnPooling, OnWeights, Tape, as_tokens


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """What a run with gradients records.

    Attributes:
        rules: rules of the backward pass, see :mod:`vitscope.attention.rules`; or ``"alpha_beta"`` for those of
            :mod:`vitscope.attention.alpha_beta_rules`, see :meth:`GradientCapture.relevance`.
        gamma: γ of the γ-rule of linear layers; 0 for the derivative.
        conv_gamma: γ of the γ-rule of convolutions; 0 for the derivative.
        pixels: whether the graph starts at the pixels, as it always does if the blocks of the model are unknown;
            otherwise it starts at the input of the first block.
        weights: whether the gradients of attention weights are wanted, for ``on_weights`` of
            :meth:`GradientCapture.gradients`; without them, the backward pass is faster.
        biases: whether to record what each bias contributes to the score.
        separate_blocks: whether the graph of each block starts at its own input.
        merge_norms: whether to record the inputs of patch merging, for ``merge="norm"``.
        start: function that returns the value at which the graph starts, from the model's own value there; None for
            that value.
    """

    rules: RuleName | Literal["alpha_beta"] = "plain"
    gamma: float = 0.0
    conv_gamma: float = 0.0
    pixels: bool = False
    weights: bool = True
    biases: bool = False
    separate_blocks: bool = False
    merge_norms: bool = False
    start: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class GradientCapture:
    """A run with its graph alive. Yielded by :func:`capture_gradients`.

    Attributes:
        model: the model, with a verified layout.
        pixels: its input, (batch, channel, height, width).
        trace: attention of the run.
        output: logits (batch, class) or, without a classifier, features (batch, channel), in the dtype of the model.
        has_classes: whether the output is logits.
        streams: input of each block, in the order in which they ran; empty if the blocks are unknown.
        outputs: the first output of each watched module.
        layers: the blocks of the model; empty if they are unknown.
    """

    model: VisionModel
    pixels: Tensor
    trace: Trace
    output: Tensor
    has_classes: bool
    streams: Sequence[Tensor]
    outputs: dict[nn.Module, Tensor]
    layers: Sequence[Block]
    _tape: Tape = field(repr=False)
    _rules: RuleSet = field(repr=False)

    def gradients(
        self,
        score: Float[Tensor, " batch"],
        tensors: Sequence[Tensor],
        on_weights: OnWeights | None = None,
        *,
        on_pooling: OnPooling | None = None,
        keep_graph: bool = False,
    ) -> list[Tensor]:
        """Return the gradient of the score with respect to each tensor, in one backward pass.

        A batch is a sum of independent scores, so each image has its own gradient.

        Args:
            score: the number of each image to differentiate, computed from :attr:`output`.
            tensors: tensors of this run.
            on_weights: function that receives the weights of each block with their gradient, the last block first.
            on_pooling: function that receives the weights of a pooling layer with their gradient.
            keep_graph: whether another backward pass follows.

        Raises:
            UnsupportedModelError: the score does not depend on a tensor by differentiable functions.
            WorkError: a gradient is NaN or infinite.
        """
        if not score.requires_grad or not all(tensor.requires_grad for tensor in tensors):
            raise UnsupportedModelError(self._why_no_gradient())
        self._tape.on_weights, self._tape.on_pooling = on_weights, on_pooling
        try:
            with in_float32(score):
                results = torch.autograd.grad(score.sum(), list(tensors), retain_graph=keep_graph, allow_unused=True)
        finally:
            self._tape.on_weights = self._tape.on_pooling = None
        if any(gradient is None for gradient in results):
            raise UnsupportedModelError(self._why_no_gradient())
        if not all(bool(torch.isfinite(gradient).all()) for gradient in results):
            # Gradients flow from the last block to the first, so the last block with NaN is where they begin.
            blocks = [index for index, finite in self._tape.finite.items() if not bool(finite)]
            place = f"the input of block {max(blocks)}" if blocks else "the pixels"
            raise WorkError(
                f"the gradients of {self.model.name} are NaN or infinite, first at {place}: run the model in float32"
            )
        return list(results)

    def relevance(
        self, score: Float[Tensor, " batch"], tensors: Sequence[Tensor], on_weights: OnWeights
    ) -> list[Tensor]:
        """Return the relevance of each tensor for the score, in two backward passes. The relevance of the score is 1.

        Afterwards, :attr:`relevance_on_zeros` holds what activations that are exactly 0 kept.

        Args:
            score: as for :meth:`gradients`.
            tensors: tensors of this run.
            on_weights: function that receives the weights A of each block with ∇A ⊙ dA, the product of their derivative
                and their relevance gradient, the last block first.

        Raises:
            UnsupportedModelError: as for :meth:`gradients`.
            WorkError: as for :meth:`gradients`.
        """
        assert isinstance(self._rules, AlphaBetaRules), "the run has the rules alpha_beta"
        self._rules.relevance = False
        self.gradients(score, tensors, keep_graph=True)
        self._rules.relevance = True
        self._rules.on_zeros = torch.zeros_like(self._rules.on_zeros)
        gradients = self.gradients(score / score.detach(), tensors, on_weights)
        return [tensor.detach() * gradient for tensor, gradient in zip(tensors, gradients, strict=True)]

    @property
    def relevance_on_zeros(self) -> Float[Tensor, " batch"]:
        """The relevance of the last :meth:`relevance` that ended on activations that are exactly 0, as padding is."""
        assert isinstance(self._rules, AlphaBetaRules), "the run has the rules alpha_beta"
        return self._rules.on_zeros

    def tokens(self, tensor: Tensor, layer: int) -> Tensor:
        """Return a tensor of a block as (batch, token, channel).

        Args:
            tensor: a stream, the output of a block or a gradient of either.
            layer: index of the block whose grid it has.
        """
        return as_tokens(tensor, len(self.pixels), self.grid(layer), self.model.name)

    def patches(self, tensor: Tensor, grid: Grid) -> Tensor:
        """Return a tensor on a grid as (batch, patch, channel), without the prefix tokens."""
        return as_tokens(tensor, len(self.pixels), grid, self.model.name)[:, grid.prefix :]

    def grid(self, layer: int) -> Grid:
        """Return the token grid of a block."""
        return self.trace.step(layer).require_grid()

    def require_streams(self, instead: str = "at='pixels'") -> Sequence[Tensor]:
        """Return the input of each block.

        Args:
            instead: what to use for a model without them, for the message.

        Raises:
            UnsupportedModelError: the blocks of the model are unknown, or run several times for an image.
        """
        self._check_single_run()
        if len(self.streams) != self.trace.num_layers:
            raise UnsupportedModelError(
                f"{len(self.streams)} blocks of {self.model.name} are known and {self.trace.num_layers} attend, so "
                f"their inputs are not available: use {instead}"
            )
        return self.streams

    @property
    def start(self) -> Tensor:
        """The tensor at which the graph starts: the pixels or the input of the first block.

        Raises:
            UnsupportedModelError: the blocks of the model run several times for an image.
        """
        self._check_single_run()
        return self.pixels if self.pixels.requires_grad or not self.streams else self.streams[0]

    def _check_single_run(self) -> None:
        """Check that the graph starts at the input of one block, not of several."""
        if not self._tape.linked and self.trace.unchained is not None:
            raise UnsupportedModelError(
                f"the blocks of {self.model.name} run several times for an image, and no run depends on another, so "
                "that there are several inputs: use input_x_gradient with at='pixels'"
            )

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the run: that of the weights, or the lower one of the caller's autocast."""
        device = self.pixels.device.type
        autocast = torch.is_autocast_enabled(device) and self.model.dtype == torch.float32
        return torch.get_autocast_dtype(device) if autocast else self.model.dtype

    def detached(self) -> "GradientCapture":
        """Return the run without its graph, whose activations need no memory any more."""
        streams = tuple(stream.detach() for stream in self.streams)
        return replace(self, pixels=self.pixels.detach(), output=self.output.detach(), streams=streams, outputs={})

    def bias_terms(self) -> list[BiasTerm]:
        """Return what the biases contributed in the last call of :meth:`gradients`, one term per block and grid."""
        return self._tape.bias_terms()

    def _why_no_gradient(self) -> str:
        """Return the reason why the output has no gradient, with the module in which the graph ends."""
        module = _end_of_graph(self.model, self.pixels.detach())
        place = f"the graph ends in {module}" if module else "a module detaches its activations"
        return (
            f"the output of {self.model.name} has no gradient with respect to its tokens: {place}; use a method "
            "without gradients, such as vitscope.lime"
        )


@contextmanager
def capture_gradients(
    model: VisionModel | nn.Module,
    images: Any,
    options: GradientOptions | None = None,
    *,
    watch: Callable[[Sequence[Block]], Sequence[nn.Module]] = lambda _: (),
    finish: Callable[[Sequence[Block], Tape], Sequence[Any]] = lambda *_: (),
) -> Iterator[GradientCapture]:
    """Run a model with its graph alive inside a context.

    Weights are constants: no ``.grad`` appears and no flag of the model changes. The context also works inside
    ``torch.no_grad`` and ``torch.inference_mode``.

    Args:
        model: as for :func:`vitscope.capture`.
        images: as for :func:`vitscope.capture`.
        options: what to record.
        watch: function that returns the modules whose outputs are kept, from the blocks of the model.
        finish: function that adds hooks to the model, from its blocks and the tape, and returns their handles.

    Yields:
        The run.

    Raises:
        UnsupportedModelError: as for :func:`vitscope.capture`; or the weights are integers or were created in inference
            mode, so that there are no gradients.
        CallError: as for :func:`vitscope.capture`.
        ImageError: as for :func:`vitscope.capture`.
        WorkError: as for :func:`vitscope.capture`.
    """
    options = options or GradientOptions()
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        run = prepare_run(model, images)
        module, pixels = run.model.module, run.pixels.detach()
        check_differentiable(run.model)
        pixels = pixels.clone() if pixels.is_inference() else pixels
        layers = blocks_or_none(run.model)
        options = options if layers else replace(options, pixels=True)
        if options.pixels:
            pixels = (pixels if options.start is None else options.start(pixels)).detach().requires_grad_()
        run = PreparedRun(run.model, pixels, run.views, run.grid, run.target)
        stack.enter_context(run.model.running())
        stack.enter_context(without_checkpointing(module))
        tape, tracker = Tape(), SoftmaxTracker()
        recorder = GradientRecorder(run, tape, weights=options.weights)
        recorder.rules = rules = _rule_set(options, run, recorder, tracker)
        has_classes = run.model.meaning != "features"
        inputs = BlockInputs(tape, _leaves(options), options.start)
        with hooked_blocks(layers, inputs, tape, watch(layers), lambda: finish(layers, tape)):
            watched = recorder.watched_modules(norms=options.merge_norms, pooled=False)
            predict = run.model.logits if has_classes else run.model.features
            result = run.forward(
                recorder,
                watched,
                predict=lambda image: _pair(predict(image), has_classes),
                softmax_tracker=tracker,
                run=rules,
            )
        output = result.output
        if output is None:
            raise UnsupportedModelError(f"{run.model.name} returns neither classes nor features to differentiate")
        capture = GradientCapture(
            run.model,
            pixels,
            result.trace,
            output,
            has_classes,
            tuple(tape.streams),
            tape.outputs,
            layers,
            tape,
            rules,
        )
        try:
            yield capture
        finally:
            tape.clear()


def _rule_set(
    options: GradientOptions, run: PreparedRun, recorder: GradientRecorder, tracker: SoftmaxTracker
) -> RuleSet:
    """Return the rules of a run."""
    if options.rules == "alpha_beta":
        return AlphaBetaRules(len(run.pixels), run.model.name)
    return LocalRules(
        options.rules,
        tracker,
        gamma=options.gamma,
        conv_gamma=options.conv_gamma,
        on_bias=recorder.record_bias if options.biases else None,
    )


def _leaves(options: GradientOptions) -> Literal["first", "all"] | None:
    """Return at which block inputs the graph starts."""
    if options.separate_blocks:
        return "all"
    return None if options.pixels else "first"


def _pair(output: Tensor | None, has_classes: bool) -> tuple[Tensor | None, Tensor | None]:
    """Return the logits, or None for features, and the output."""
    return (output if has_classes else None), output


def _end_of_graph(model: VisionModel, pixels: Tensor) -> str:
    """Return the path of the first module whose input has a gradient and whose output has none; empty if none has."""
    names = {module: path for path, module in model.module.named_modules() if path}
    ends: list[str] = []

    def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        enters = any(tensor.requires_grad for tensor in tensors_of((args, kwargs)))
        outputs = list(tensors_of(output))
        if enters and outputs and not any(tensor.requires_grad for tensor in outputs):
            ends.append(names[module])

    def watch(_: Sequence[Block], __: Tape) -> list[Any]:
        return [module.register_forward_hook(in_this_thread(compare), with_kwargs=True) for module in names]

    with capture_gradients(model, pixels, finish=watch):
        return ends[0] if ends else ""
