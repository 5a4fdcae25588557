"""Verification of a layout: patches of the image and tokens of the last block are changed one at a time."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vitscope.attention.axes import Axes
from vitscope.attention.flow import Flow
from vitscope.attention.readout import readout_text
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.attention.step import AttentionStep
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.attention.trace import Trace
from vitscope.errors import ReadoutError, UnclearOutputError, UnsupportedModelError
from vitscope.grid import Grid
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.experiment import axes_of_call, noise

# Positions of the changed patches as fractions of the grid: off the centre, and not mirror images of each other.
_POSITIONS = ((0.3, 0.6), (0.8, 0.1))


def verify_readout(
    model: VisionModel,
    pixels: Tensor,
    trace: Trace,
    calls: tuple[int, ...],
    first_blocks: Sequence[int],
    *,
    has_classes: bool,
) -> Mapping[str, float] | None:
    """Verify the token grid and the readout of a captured run.

    Args:
        model: the model.
        pixels: the preprocessed image of the run, (1, channel, height, width).
        trace: trace of the run.
        calls: index of the attention call of each block of the trace.
        first_blocks: indices of the blocks that depend on no other block. A model that runs its transformer on several
            views of an image has one for each view.
        has_classes: whether the model returns logits; if not, its features are compared.

    Returns:
        The verified readout; None if the layout is unknown or the output depends on no token.

    Raises:
        ReadoutError: the output does not depend on exactly those tokens that the layout names.
        UnsupportedModelError: a patch does not correspond to the token that the layout names.
    """
    if trace.grid is None or model.layout is None:
        return None
    for index in first_blocks:
        _check_grid(model, pixels, trace.blocks[index], calls[index])
    predict = model.logits if has_classes else model.embed
    if predict is None or trace.readout is None:
        return None
    return _verified_sources(model, pixels, trace, calls[-1], predict)


def _axes(model: VisionModel, call: AttentionCall, images: Tensor) -> Axes:
    """Return the order of images, windows and heads in an attention call of several images.

    Raises:
        UnsupportedModelError: the call does not hold all images.
    """
    try:
        return axes_of_call(model, call, images)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"the layout of {model.name} cannot be verified, because {call.module or 'it'} does not attend in "
            "all images of a batch at once: load the model inside it instead, or pass patch_size, prefix and readout "
            "to vitscope.load"
        ) from error


def _positions(grid: Grid) -> list[tuple[int, int]]:
    """Return the patches to change, as rows and columns."""
    positions = [(int(grid.height * row), int(grid.width * column)) for row, column in _POSITIONS]
    return list(dict.fromkeys(positions))


def _check_grid(model: VisionModel, pixels: Tensor, step: AttentionStep, index: int) -> None:
    """Check that changing a patch of the image changes its own token most, in the values of the first block."""
    assert model.layout is not None
    grid, (patch_height, patch_width) = step.require_grid(), model.layout.patch_size
    if grid != model.layout.grid(*pixels.shape[-2:]):  # merged before the first block
        patch_height, patch_width = pixels.shape[-2] // grid.height, pixels.shape[-1] // grid.width
    positions = _positions(grid)
    images = pixels.repeat(len(positions) + 1, 1, 1, 1)
    for image, (row, column) in zip(images[1:], positions, strict=True):
        top, left = row * patch_height, column * patch_width
        patch = image[:, top : top + patch_height, left : left + patch_width]
        patch.copy_(noise(tuple(patch.shape), seed=1).to(patch) * 2)
    changes: list[Tensor] = []

    def compare(call: AttentionCall, values: Tensor) -> None:
        windowed = _axes(model, call, images).split(values).float()
        change = (windowed[1:] - windowed[:1]).square().sum((2, 4))  # (copy, window, slot)
        changes.append(_change_of_tokens(step, change))

    waiting: list[AttentionCall] = []

    def on_attention(call: AttentionCall) -> Tensor:
        if call.index == index and call.value is not None:
            compare(call, call.value)
        elif call.index == index:
            waiting.append(call)
        return call.run()

    def on_values(call: int, values: Tensor) -> None:
        if call == index:
            compare(waiting[0], values)

    _run_tapped(model, model.logits_or_none, images, on_attention, on_values)
    if not changes:
        return
    for position, change in zip(positions, changes[0], strict=True):
        expected, token = grid.token(*position), int(change.argmax())
        exact = bool(change.max() > 0.99 * change.sum())
        # Convolutions may spread a change, but the patch's own token always changes too.
        if not _is_near(grid, token, position, exact=exact) or change[expected] < 0.01 * change.max():
            prefix = f"{grid.prefix} prefix token{'' if grid.prefix == 1 else 's'}"
            if step.layer > 0:
                raise UnsupportedModelError(
                    f"{model.name} runs its blocks several times for an image, and patch {position} is not token "
                    f"{expected} in each run (flipped or cropped views?): load the model inside it instead"
                )
            raise UnsupportedModelError(
                f"the layout of {model.name} says {grid.height}×{grid.width} patches after {prefix}, so patch "
                f"{position} is token {expected}, but changing it changes token {token} most: pass the right "
                "patch_size and prefix to vitscope.load"
            )


def _is_near(grid: Grid, token: int, position: tuple[int, int], *, exact: bool) -> bool:
    """Return whether a token belongs to a patch or, unless ``exact``, to a patch next to it."""
    row, column = divmod(token - grid.prefix, grid.width)
    distance = max(abs(row - position[0]), abs(column - position[1]))
    return token >= grid.prefix and distance <= (0 if exact else 1)


def _change_of_tokens(step: AttentionStep, change: Tensor) -> Tensor:
    """Return a change of slots (copy, window, slot) as a change of tokens (copy, token)."""
    if step.is_plain:
        return change[:, 0]
    slots = step.require_slots()
    tokens = change.new_zeros(len(change), step.require_grid().num_tokens)
    tokens[:, slots[slots >= 0]] = change[:, slots >= 0]
    return tokens


def _verified_sources(
    model: VisionModel, pixels: Tensor, trace: Trace, index: int, predict: Callable[[Tensor], Tensor | None]
) -> Mapping[str, float] | None:
    """Return the readout if the output changes with exactly those tokens of the last block that the readout names."""
    assert model.layout is not None
    step = trace.blocks[-1]
    grid = step.require_grid()
    tokens = [*range(grid.prefix), *(grid.token(*position) for position in _positions(grid))]
    images = pixels.repeat(len(tokens) + 1, 1, 1, 1)
    slots = torch.arange(grid.num_tokens, device="cpu")[None] if step.slots is None else step.slots.cpu()
    changed: list[bool] = []

    def on_attention(call: AttentionCall) -> Tensor:
        output = call.run()
        axes = _axes(model, call, images)
        if call.index != index or not axes.in_order:
            return output
        windowed = axes.split(output).clone()
        scale = 1.0 if call.logits is not None else 3 * float(output.float().std())
        for copy, token in enumerate(tokens, start=1):
            window, slot = (int(number) for number in (slots == token).nonzero()[0])
            row = windowed[copy, window, :, slot]
            row += noise(tuple(row.shape), seed=copy).to(row) * scale
        changed.append(True)
        return windowed.reshape(output.shape)

    prediction = _run_tapped(model, predict, images, on_attention)
    if not changed or prediction is None or trace.readout is None:
        return None
    output = prediction.float().flatten(1)
    tolerance = 1e-4 if prediction.dtype in (torch.float32, torch.float64) else 2e-2
    changes = (output[1:] - output[:1]).abs().amax(1) > tolerance * output[0].abs().max()
    if not bool(changes.any()):
        return None  # the weights after the last block are zero, as some classes initialize them
    names = [*trace.prefix_names, *(["a patch"] * (len(tokens) - grid.prefix))]
    for name, token, matters in zip(names, tokens, changes.tolist(), strict=True):
        if matters != bool(trace.readout[0, token] > 0):
            raise ReadoutError(
                f"the layout of {model.name} says that the classifier reads {readout_text(model.layout.readout)}, but "
                f"changing {name} after the last attention block {'changes' if matters else 'does not change'} the "
                "output: pass the right readout to vitscope.load"
            )
    return dict(model.layout.readout)


def _run_tapped(
    model: VisionModel,
    predict: Callable[[Tensor], Tensor | None],
    images: Tensor,
    on_attention: Callable[[AttentionCall], Tensor],
    on_values: Callable[[int, Tensor], None] | None = None,
) -> Tensor | None:
    """Run the model under a tap and return its prediction; None if the classes in its output are unclear."""
    tap = Tap(model.module, on_attention, Flow(), SoftmaxTracker(on_values))
    with torch.no_grad(), model.running(), tap, tap.follow():
        try:
            return predict(images)
        except UnclearOutputError:
            return None
