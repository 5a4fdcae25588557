"""check(): verify what vitscope believes about a model by running it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitscope.axes import Axes, axes_of, head_count
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.experiment import experiment, noise, preserved_random_state
from vitscope.flow import Flow
from vitscope.grid import Grid
from vitscope.models.vision_model import VisionModel
from vitscope.run import as_vision_model, run
from vitscope.softmax_use import SoftmaxUses
from vitscope.tap import AttentionCall, Tap
from vitscope.trace import AttentionStep, Trace

# Places of the patches that are changed, as shares of the grid: off the centre, and not mirror images of each other.
_PLACES = ((0.3, 0.6), (0.8, 0.1))


@dataclass(frozen=True)
class CheckReport:
    """What :func:`check` verified.

    Attributes:
        model: the name of the model.
        layers: the number of attention blocks.
        grid: the token grid, verified by changing patches; None if the model has no known layout.
        readout: what the classifier reads, verified by changing tokens; None if the layout or the output is unknown, or
            the output depends on no token.
        unchained: why the blocks do not follow one another, or None if they do.
    """

    model: str
    layers: int
    grid: Grid | None
    readout: Mapping[str, float] | None
    unchained: str | None

    @property
    def chained(self) -> bool:
        """Whether each block depends on all before it, which rollout needs."""
        return self.unchained is None

    def __repr__(self) -> str:
        grid = (
            "grid unknown" if self.grid is None else f"grid {self.grid.height}×{self.grid.width} + {self.grid.prefix}"
        )
        readout = "unknown" if self.readout is None else " + ".join(f"{v:g} {k}" for k, v in self.readout.items())
        order = "one after the other" if self.chained else "not one after the other"
        return f"<CheckReport {self.model}: {self.layers} blocks {order}, {grid}, readout {readout}>"


def check(model: VisionModel | nn.Module, images: Any = None) -> CheckReport:
    """Verify grid, readout and order of a model by experiments, and return what holds.

    Three forward passes: one is captured; in one, single patches of the image are changed, which must change their own
    tokens most; in one, single tokens are changed in the output of the last attention block, which must change the
    prediction for exactly the tokens that the readout names.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: as for :func:`vitscope.capture`, of which the first is used; by default noise of the model's input size.

    Raises:
        UnsupportedModelError: the experiments contradict what the layout says.

    Example:
        >>> import vitscope as vs
        >>> vs.check(vs.load("vit-nano"))
        <CheckReport vit-nano: 6 blocks one after the other, grid 8×8 + 1, readout 1 cls>
    """
    model = as_vision_model(model)
    pixels = _pixels(model, images)
    with preserved_random_state(model.device):
        captured = run(model, pixels)
        trace, calls = captured.trace, captured.calls
        readout = None
        if trace.grid is not None and model.layout is not None:
            _check_grid(model, pixels, trace.blocks[0], calls[0])
            predict = model.answer if captured.logits is not None else model.embed
            if predict is not None and trace.readout is not None:
                readout = _check_readout(model, pixels, trace, calls[-1], predict)
    return CheckReport(model.name, trace.num_layers, trace.grid, readout, trace.why_unchained)


def _pixels(model: VisionModel, images: Any) -> Tensor:
    if images is not None:
        return model.prepare(images)[0][:1]
    if model.preprocessing is None:
        raise CallError(f"the input size of {model.name} is unknown: pass images, or image_size to vitscope.load")
    return noise((1, 3, *model.preprocessing.size)).to(model.device, model.dtype)


def _places(grid: Grid) -> list[tuple[int, int]]:
    places = [(int(grid.height * row), int(grid.width * column)) for row, column in _PLACES]
    return list(dict.fromkeys(places))


def _check_grid(model: VisionModel, pixels: Tensor, step: AttentionStep, index: int) -> None:
    """Change single patches of the image; each must change its own token most in the first block's values."""
    assert model.layout is not None
    grid, (high, wide) = step.known_grid(), model.layout.patch_size
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

    _observe(model, model.answer, images, on_attention, on_values)
    if not changes:
        return
    for (row, column), change in zip(places, changes[0], strict=True):
        token = int(change.argmax())
        if not _is_place(grid, token, (row, column), exact=bool(change.max() > 0.99 * change.sum())):
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
    slots = step.known_slots()
    tokens = change.new_zeros(len(change), step.known_grid().num_tokens)
    tokens[:, slots[slots >= 0]] = change[:, slots >= 0]
    return tokens


def _check_readout(
    model: VisionModel, pixels: Tensor, trace: Trace, index: int, predict: Callable[[Tensor], Tensor | None]
) -> Mapping[str, float] | None:
    """Change single tokens in the last block's output; the prediction must change for those that the readout names."""
    assert model.layout is not None
    step = trace.blocks[-1]
    grid = step.known_grid()
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
            raise UnsupportedModelError(
                f"the layout of {model.name} says the classifier reads {read}, but changing {name} after the last "
                f"attention block {what}: pass the right readout to vitscope.load"
            )
    return dict(model.layout.readout)


def _axes(model: VisionModel, call: AttentionCall, batch: int, pixels: Tensor) -> Axes:
    evidence = experiment(model, (pixels.shape[-2], pixels.shape[-1]))
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
        return predict(images)
