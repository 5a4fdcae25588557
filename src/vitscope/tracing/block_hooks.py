"""The hooks of a run with gradients: where the graph starts, and the inputs of blocks that are kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitscope.errors import UnsupportedModelError
from vitscope.interrupts import uninterrupted
from vitscope.models.blocks import Block
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.gradient_recorder import Tape


def check_differentiable(model: VisionModel) -> None:
    """Check that the weights take part in a differentiable computation.

    Raises:
        UnsupportedModelError: they are integers, quantised, or were created in inference mode.
    """
    for name, parameter in model.module.named_parameters():
        if not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"{model.name} has no gradients: its weights are integers ({name} is {parameter.dtype}); load it "
                "without quantisation, or use a perturbation method such as vitscope.lime"
            )
        if parameter.is_inference():
            raise UnsupportedModelError(
                f"{model.name} has no gradients: it was created under torch.inference_mode; create it outside"
            )
    for name, module in model.module.named_modules():
        if hasattr(module, "_packed_params"):  # torch packs quantised weights into an object, not into parameters
            reason = f"the weights of {name} are quantised; load it without quantisation, or use a perturbation method"
            raise UnsupportedModelError(f"{model.name} has no gradients: {reason} such as vitscope.lime")


class BlockInputs:
    """A hook that starts the graph at the first block and keeps the input of each block.

    Args:
        tape: notes of the run, which receive the inputs.
        leaves: ``"first"`` if the graph starts at the first block, ``"all"`` if the graph of each block starts at its
            own input, None if it starts before the blocks.
        start: function that returns the value at which the graph starts; None for the model's own.
    """

    def __init__(
        self, tape: Tape, leaves: Literal["first", "all"] | None, start: Callable[[Tensor], Tensor] | None
    ) -> None:
        self._tape, self._leaves, self._start = tape, leaves, start

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Keep the input of a block and return its arguments, with the leaf of the graph if it starts here."""
        stream = args[0] if args else kwargs["hidden_states"]
        starts = self._leaves is not None and not self._tape.streams
        if starts or self._leaves == "all":
            value = stream if self._start is None or not starts else self._start(stream)
            leaf = value.detach().requires_grad_()
            self._keep(leaf)
            stream = leaf.clone()  # a module may change its input in place, which a leaf does not allow
        else:
            self._tape.linked &= stream.requires_grad or self._leaves is None
            self._keep(stream)
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    def _keep(self, stream: Tensor) -> None:
        tape, index = self._tape, len(self._tape.streams)
        tape.streams.append(stream)
        if stream.requires_grad:
            # Not a bool, which would wait for the device.
            stream.register_hook(lambda gradient: tape.finite.update({index: torch.isfinite(gradient).all()}))


@contextmanager
def hooked_blocks(
    layers: Sequence[Block],
    inputs: BlockInputs,
    tape: Tape,
    watched: Sequence[nn.Module],
    extra_hooks: Callable[[], Sequence[Any]],
) -> Iterator[None]:
    """Keep the input of each block and the first output of each watched module, in the current thread alone.

    Args:
        layers: the blocks.
        inputs: hook of the blocks.
        tape: notes of the run, which receive the outputs.
        watched: modules whose output is kept.
        extra_hooks: function that adds other hooks and returns their handles.
    """

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        tape.outputs.setdefault(module, output[0] if isinstance(output, tuple) else output)

    handles: list[Any] = []
    try:
        with uninterrupted():
            for block in layers:
                handles.append(block.module.register_forward_pre_hook(in_this_thread(inputs), with_kwargs=True))
            for module in watched:
                # First, because another hook may take tokens away from the output (vitscope.test_time_registers).
                handles.append(module.register_forward_hook(in_this_thread(keep), prepend=True))
            handles.extend(extra_hooks())
        yield
    finally:
        with uninterrupted():
            for handle in handles:
                handle.remove()
