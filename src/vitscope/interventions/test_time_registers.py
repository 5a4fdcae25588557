"""Test-time registers: tokens without a patch that take over the activations of register neurons."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.errors import CallError, UnsupportedModelError
from vitscope.interrupts import uninterrupted
from vitscope.interventions.artefacts import require_plain_blocks
from vitscope.interventions.register_neurons import Neuron, output_layer
from vitscope.models.backends.names import RELATIVE_BIAS_TABLES, ROTARY_MODULES
from vitscope.models.blocks import Block
from vitscope.models.inserted_tokens import inserted_tokens, names_of_inserted_tokens, with_inserted_tokens
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import as_vision_model
from vitscope.validation import require_at_least, require_integer, short_repr


@contextmanager
def test_time_registers(
    model: VisionModel | nn.Module,
    neurons: Sequence[Neuron],
    count: int = 1,  # noqa: PT028 (not a test)
) -> Iterator[VisionModel]:
    """Run a model with register tokens inside a context, so that its patches need no artefacts.

    Zero tokens, which have no patch, enter the first block behind the prefix and leave after the last block. Each of
    the neurons is moved to them: on the registers its activation is the one of largest magnitude among all tokens of
    the image, with its sign; on patches it is zero; on the other prefix tokens it is unchanged.

    Inside the context, on this thread, everything sees the registers: predictions, traces, maps, rollout and the
    perturbation methods. The prefix of the token grid ends in ``"test_register_1"``, …. Weights do not change, and the
    hooks are removed afterwards, also after an exception.

    Reference: Vision Transformers Don't Need Trained Registers, Jiang et al., 2025 (arXiv 2506.08010).

    Args:
        model: as for :func:`vitscope.artefact_tokens`.
        neurons: (block, neuron) of each neuron, as :func:`vitscope.register_neurons` returns them; negative indices
            count from the end. If there are none, the zero tokens alone are added.
        count: number of registers, at least 1.

    Yields:
        The model, whose layout names the registers. Inside the context, ``model`` itself can be passed as well.

    Raises:
        CallError: a neuron does not exist, ``count`` is below 1, or the model has test-time registers already.
        UnsupportedModelError: the model is a window transformer, its blocks depend on the number of tokens (rotary
            positions, relative bias), its classifier reads all tokens, or its tokens or blocks are unknown.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> model, photo = vs.load("vit-nano"), skimage.data.chelsea()
        >>> with vs.test_time_registers(model, [(2, 17)], count=2):
        ...     trace = vs.capture(model, photo)
        >>> trace.prefix_names
        ('cls', 'test_register_1', 'test_register_2')
    """
    vision = as_vision_model(model)
    count = require_at_least(1, count, "count")
    layers, prefix_names = _require_insertable(vision)
    first, prefix = layers[0].module, len(prefix_names)
    registers = slice(prefix, prefix + count)
    channels = _channels(vision, layers, neurons)
    handles: list[Any] = []

    def insert(_: nn.Module, args: Any, kwargs: Any) -> Any:
        name = None if args else "hidden_states"
        tokens = args[0] if name is None else kwargs[name]
        zeros = tokens.new_zeros(len(tokens), count, tokens.shape[-1])
        tokens = torch.cat([tokens[:, :prefix], zeros, tokens[:, prefix:]], dim=1)
        return ((tokens, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: tokens})

    def remove(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (_without(output[0], registers), *output[1:])
        return _without(output, registers)

    def move(columns: Tensor, _: nn.Module, args: Any) -> Any:
        return (_on_registers(args[0], registers, columns.to(args[0].device)), *args[1:])

    try:
        with uninterrupted():
            handles.append(first.register_forward_pre_hook(in_this_thread(insert), with_kwargs=True))
            handles.append(layers[-1].module.register_forward_hook(in_this_thread(remove)))
            handles += [
                linear.register_forward_pre_hook(in_this_thread(partial(move, columns)))
                for linear, columns in channels.items()
            ]
        with inserted_tokens(vision.module, tuple(f"test_register_{i + 1}" for i in range(count))):
            yield with_inserted_tokens(vision)
    finally:
        with uninterrupted():
            for handle in handles:
                handle.remove()


def _without(tokens: Tensor, registers: slice) -> Tensor:
    """Return (batch, token, channel) without the registers."""
    return torch.cat([tokens[:, : registers.start], tokens[:, registers.stop :]], dim=1)


def _on_registers(activations: Tensor, registers: slice, columns: Tensor) -> Tensor:
    """Return (batch, token, neuron) with some neurons moved from the patches to the registers."""
    selected = activations[..., columns]
    largest = selected.gather(1, selected.abs().argmax(1, keepdim=True))  # (batch, 1, selected)
    count = registers.stop - registers.start
    patches = torch.zeros_like(selected[:, registers.stop :])
    changed = torch.cat([selected[:, : registers.start], largest.expand(-1, count, -1), patches], dim=1)
    return activations.index_copy(-1, columns, changed)


def _require_insertable(model: VisionModel) -> tuple[list[Block], tuple[str, ...]]:
    """Return the blocks and prefix of a model that runs with more tokens than it was built for."""
    if names_of_inserted_tokens(model.module):
        raise CallError(f"{model.name} has test-time registers already: leave the other context first")
    layers, prefix_names = require_plain_blocks(model, "test-time registers")
    assert model.layout is not None
    module_names = (path.rpartition(".")[2] for path, _ in model.module.named_modules())
    weight_names = (path.rpartition(".")[2] for path, _ in model.module.named_parameters())
    reason = None
    if any(name in ROTARY_MODULES for name in module_names):
        reason = "its rotary positions are those of the patches, and a register has none"
    elif any(name in RELATIVE_BIAS_TABLES for name in weight_names):
        reason = "its relative position bias has no entry for a register"
    elif "tokens" in model.layout.readout or ("pooling" in model.layout.readout and prefix_names):
        reason = "its classifier reads all tokens"
    if reason is not None:
        raise UnsupportedModelError(f"test-time registers are not supported for {model.name}: {reason}")
    return layers, prefix_names


def _channels(model: VisionModel, layers: Sequence[Block], neurons: Any) -> dict[nn.Linear, Tensor]:
    """Return the channels of the neurons for each layer that they enter."""
    channels: dict[nn.Linear, set[int]] = defaultdict(set)
    if isinstance(neurons, str) or not hasattr(neurons, "__iter__"):
        raise CallError(f"neurons is {short_repr(neurons)}, a list of (block, neuron) is expected")
    for pair in neurons:
        if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise CallError(f"neurons holds {short_repr(pair)}, pairs of (block, neuron) are expected")
        block, neuron = (
            require_integer(index, noun) for index, noun in zip(pair, ("a block", "a neuron"), strict=True)
        )
        if not -len(layers) <= block < len(layers):
            raise CallError(f"block {block} does not exist: {model.name} has blocks 0 to {len(layers) - 1}")
        linear = output_layer(layers[block], model.name)
        if not -linear.in_features <= neuron < linear.in_features:
            raise CallError(
                f"neuron {neuron} does not exist: block {block} of {model.name} has neurons 0 to "
                f"{linear.in_features - 1}"
            )
        channels[linear].add(neuron % linear.in_features)
    return {linear: torch.tensor(sorted(indices), device="cpu") for linear, indices in channels.items()}
