"""What a layout claims about tokens and readout, verified by changing patches and tokens."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vitscope.attention.axes import Axes, axes_of, head_count
from vitscope.attention.flow import Flow
from vitscope.attention.softmax_use import SoftmaxUses
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.attention.trace import AttentionStep, Trace
from vitscope.errors import UnsupportedModelError
from vitscope.grid import Grid
from vitscope.models.outputs import UnclearOutputError
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.experiment import experiment, noise

# Places of the patches that are changed, as shares of the grid: off the centre, and not mirror images of each other.
_PLACES = ((0.3, 0.6), (0.8, 0.1))


class ReadoutError(UnsupportedModelError):
    """The classifier reads other tokens than the layout says."""


def verified_readout(
    model: VisionModel, pixels: Tensor, trace: Trace, calls: tuple[int, ...], *, has_classes: bool
) -> Mapping[str, float] | None:
    """Verify the grid of a captured run and return its readout; None if the output shows none.

    Args:
        pixels: one image, preprocessed, of which ``trace`` is.
        calls: the numbers of the attention calls that the trace's blocks are.

    Raises:
        ReadoutError: the prediction depends on other tokens than the layout says.
        UnsupportedModelError: a patch is another token than the layout says.
    """
    if trace.grid is None or model.layout is None:
        return None
    _check_grid(model, pixels, trace.blocks[0], calls[0])
    predict = model.answer if has_classes else model.embed
    if predict is None or trace.readout is None:
        return None
    return _check_readout(model, pixels, trace, calls[-1], predict)


def _places(grid: Grid) -> list[tuple[int, int]]:
    places = [(int(grid.height * row), int(grid.width * column)) for row, column in _PLACES]
    return list(dict.fromkeys(places))


def _check_grid(model: VisionModel, pixels: Tensor, step: AttentionStep, index: int) -> None:
    """Change single patches of the image; each must change its own token most in the first block's values."""
    assert model.layout is not None
    grid, (high, wide) = step.require_grid(), model.layout.patch_size
    if grid != model.layout.grid(*pixels.shape[-2:]):  # merged before the first block
        high, wide = pixels.shape[-2] // grid.height, pixels.shape[-1] // grid.width
    places = _places(grid)
    images = pixels.repeat(len(places) + 1, 1, 1, 1)
    for image, (row, column) in zip(images[1:], places, strict=True):
        patch = image[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        patch.copy_(noise(tuple(patch.shape), seed=1).to(patch) * 2)
    changes: list[Tensor] = []

    def compare(call: AttentionCall, values: Tensor) -> None:
        parts = _axes(model, call, len(images), pixels).split(values).float()
        change = (parts[1:] - parts[:1]).square().sum((2, 4))  # (copy, window, slot)
        changes.append(_on_tokens(step, change))

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

    _observe(model, model.answer_or_none, images, on_attention, on_values)
    if not changes:
        return
    for (row, column), change in zip(places, changes[0], strict=True):
        token, own = int(change.argmax()), change[grid.token(row, column)]
        exact = bool(change.max() > 0.99 * change.sum())
        # Convolutions may spread a change, but never past the patch's own token.
        if not _is_place(grid, token, (row, column), exact=exact) or own < 0.01 * change.max():
            prefix = f"{grid.prefix} token{'' if grid.prefix == 1 else 's'} before them"
            raise UnsupportedModelError(
                f"the layout of {model.name} says {grid.height}×{grid.width} patches and {prefix}, so patch ({row}, "
                f"{column}) is token {grid.token(row, column)}, but changing it changes token {token} most: pass the "
                "right patch_size and prefix to vitscope.load"
            )


def _is_place(grid: Grid, token: int, place: tuple[int, int], *, exact: bool) -> bool:
    """Return whether a token is that of a patch; convolutions before the blocks may move it by one patch."""
    row, column = divmod(token - grid.prefix, grid.width)
    far = max(abs(row - place[0]), abs(column - place[1]))
    return token >= grid.prefix and far <= (0 if exact else 1)


def _on_tokens(step: AttentionStep, change: Tensor) -> Tensor:
    """(copy, window, slot) → (copy, token)."""
    if step.is_plain:
        return change[:, 0]
    slots = step.require_slots()
    tokens = change.new_zeros(len(change), step.require_grid().num_tokens)
    tokens[:, slots[slots >= 0]] = change[:, slots >= 0]
    return tokens


def _check_readout(
    model: VisionModel, pixels: Tensor, trace: Trace, index: int, predict: Callable[[Tensor], Tensor | None]
) -> Mapping[str, float] | None:
    """Change single tokens in the last block's output; the prediction must change for those that the readout names."""
    assert model.layout is not None
    step = trace.blocks[-1]
    grid = step.require_grid()
    tokens = [*range(grid.prefix), *(grid.token(*place) for place in _places(grid))]
    images = pixels.repeat(len(tokens) + 1, 1, 1, 1)
    slots = torch.arange(grid.num_tokens, device="cpu")[None] if step.slots is None else step.slots.cpu()
    changed: list[bool] = []

    def on_attention(call: AttentionCall) -> Tensor:
        output = call.run()
        axes = _axes(model, call, len(images), pixels)
        if call.index != index or not axes.in_order:
            return output
        windowed = axes.split(output).clone()
        size = 1.0 if call.logits is not None else 3 * float(output.float().std())
        for copy, token in enumerate(tokens, start=1):
            window, slot = (int(part) for part in (slots == token).nonzero()[0])
            row = windowed[copy, window, :, slot]
            row += noise(tuple(row.shape), seed=copy).to(row) * size
        changed.append(True)
        return windowed.reshape(output.shape)

    prediction = _observe(model, predict, images, on_attention)
    if not changed or prediction is None or trace.readout is None:
        return None
    output = prediction.float().flatten(1)
    tolerance = 1e-4 if prediction.dtype in (torch.float32, torch.float64) else 2e-2
    changes = (output[1:] - output[:1]).abs().amax(1) > tolerance * output[0].abs().max()
    if not bool(changes.any()):
        return None  # zero weights after the last block, as some classes are initialised
    names = [*trace.prefix_names, *(["a patch"] * (len(tokens) - grid.prefix))]
    read = " and ".join(f"{weight:g} {source}" for source, weight in model.layout.readout.items())
    for name, token, moves in zip(names, tokens, changes.tolist(), strict=True):
        if moves != bool(trace.readout[0, token] > 0):
            what = "changes the output too" if moves else "does not change the output"
            raise ReadoutError(
                f"the layout of {model.name} says the classifier reads {read}, but changing {name} after the last "
                f"attention block {what}: pass the right readout to vitscope.load"
            )
    return dict(model.layout.readout)


def _axes(model: VisionModel, call: AttentionCall, batch: int, pixels: Tensor) -> Axes:
    evidence = experiment(model, (pixels.shape[-2], pixels.shape[-1]), pixels.shape[1])
    known = model.layout is not None and model.layout.hierarchy is not None
    return axes_of(
        call.leading_axes,
        batch,
        None if known else head_count(model.module, call.module),
        call.module,
        heads_first=evidence.heads_first,
        heads_before_windows=evidence.heads_before_windows,
    )


def _observe(
    model: VisionModel,
    predict: Callable[[Tensor], Tensor | None],
    images: Tensor,
    on_attention: Callable[[AttentionCall], Tensor],
    on_values: Callable[[int, Tensor], None] | None = None,
) -> Tensor | None:
    """Run the model under a tap."""
    tap = Tap(model.module, on_attention, Flow(), SoftmaxUses(on_values))
    with torch.no_grad(), model.running(), tap, tap.follow():
        try:
            return predict(images)
        except UnclearOutputError:
            return None
