"""A cheap experiment on a model whose tokens nobody vouches for: one forward of three images before the first capture.

Two of the images are equal and one differs from them in a small region. What the attention calls are handed then says
whether tokens are picked at random, whether attention is between channels instead of tokens, and which axes are images,
windows and heads. Models of known classes are exempt.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from vitscope.attention.axes import axes_of, head_count
from vitscope.attention.flow import IMAGE, Flow, constants_of
from vitscope.attention.softmax_use import SoftmaxUses
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.errors import UnsupportedModelError
from vitscope.models.vision_model import VisionModel

COPIES = 3  # twice the same image, and one with a region changed
ENOUGH = 8  # rows and columns of values; fewer do not show where a change is


@dataclass(frozen=True)
class Evidence:
    """What the experiment says about a model.

    Attributes:
        heads_first: the axis before tokens holds heads, and the images within each head.
        heads_before_windows: of the axes (image, a, b) a are the heads; None if nothing is known.
    """

    heads_first: bool = False
    heads_before_windows: bool | None = None


@dataclass
class _Findings:
    """What was seen of each attention call."""

    refusal: str | None = None
    heads_first: bool = False
    heads_before_windows: bool | None = None
    sums: list[float] = field(default_factory=list)


_done: WeakKeyDictionary[nn.Module, dict[tuple[int, int], _Findings]] = WeakKeyDictionary()


def experiment(model: VisionModel, size: tuple[int, int], channels: int = 3) -> Evidence:
    """Return what one forward of three images says about a model, computed once for each module and input size.

    The state of random number generators, training flags and hooks are as before afterwards.

    Args:
        model: any model; one of a known class is not run.
        size: height and width of the input in pixels.
        channels: channels of the input.

    Raises:
        UnsupportedModelError: tokens are random, or attention is between channels, or heads are windows.
    """
    if model.layout is not None and model.library != "module":
        return Evidence()
    sizes = _done.setdefault(model.module, {})
    if size not in sizes:
        sizes[size] = _run_twice_if_random(model, size, channels)
    findings = sizes[size]
    if findings.refusal is not None:
        raise UnsupportedModelError(findings.refusal)
    return Evidence(findings.heads_first, findings.heads_before_windows)


def _run_twice_if_random(model: VisionModel, size: tuple[int, int], channels: int) -> _Findings:
    with preserved_random_state(model.device):
        before = _random_state(model.device)
        try:
            findings = _findings(model, size, channels)
            if findings.refusal is not None or torch.equal(before, _random_state(model.device)):
                return findings
            again = _findings(model, size, channels)
        except Exception:
            return _Findings()  # the run itself will say what is wrong with the model
        if again.sums != findings.sums:
            findings.refusal = (
                f"{model.name} draws random numbers while it runs, and the same image gives other tokens in every run: "
                "its attention cannot be shown"
            )
        return findings


def changed_region(size: tuple[int, int]) -> tuple[slice, slice]:
    """Return rows and columns of a small region off the centre of an image."""
    sides = [max(side // 8, 1) for side in size]
    starts = [side * 5 // 16 for side in size]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return rows, columns


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return normal noise from a generator of its own, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _findings(model: VisionModel, size: tuple[int, int], channels: int) -> _Findings:
    image = noise((1, channels, *size))
    images = image.repeat(COPIES, 1, 1, 1)
    rows, columns = changed_region(size)
    region = images[-1:, :, rows, columns]
    images[-1:, :, rows, columns] = noise(tuple(region.shape), seed=1) * 2
    pixels = images.to(model.device, model.dtype)
    observer = _Observer(model)
    flow = Flow(constants_of(model.module))
    flow.mark(pixels, IMAGE)
    tap = Tap(model.module, observer.on_attention, flow, SoftmaxUses(observer.on_values))
    with torch.no_grad(), model.running(), tap, tap.follow():
        model.answer_or_none(pixels)
    return observer.findings


class _Observer:
    """Looks at what each attention call is handed."""

    def __init__(self, model: VisionModel) -> None:
        self.model, self.findings = model, _Findings()
        self.pending: dict[int, AttentionCall] = {}
        self.judged: set[type[nn.Module]] = set()
        self.tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2

    def on_attention(self, call: AttentionCall) -> Tensor:
        if call.inputs & IMAGE and self.findings.refusal is None:
            tensor = call.query if call.query is not None else call.logits
            assert tensor is not None
            self._compare_copies(call, tensor)
            if call.num_queries == call.num_keys:
                if call.value is not None:
                    self._judge(call, call.value)
                else:
                    self.pending[call.index] = call
        return call.run()

    def on_values(self, index: int, values: Tensor) -> None:
        call = self.pending.pop(index, None)
        if call is not None and self.findings.refusal is None:
            self._judge(call, values)

    def _compare_copies(self, call: AttentionCall, tensor: Tensor) -> None:
        self.findings.sums.append(float(tensor.double().nan_to_num(0, 0, 0).abs().sum()))
        outer, inner = _copies(tensor, within=False), _copies(tensor, within=True)
        if outer is None and inner is None:
            return  # images are packed into one sequence: the run says so
        if outer is not None and self._equal(outer):
            return
        if inner is not None and self._equal(inner):
            self.findings.heads_first = True
            return
        self.findings.refusal = (
            f"{call.module or self.model.name} is handed different tokens for two equal images of one batch: tokens "
            "are masked, shuffled or sampled at random, so which token is which patch is unknown and cannot be shown"
        )

    def _equal(self, copies: Tensor) -> bool:
        first, second = copies[0].float(), copies[1].float()
        scale = float(first.nan_to_num(0, 0, 0).abs().max())
        return bool(torch.allclose(first, second, rtol=self.tolerance, atol=self.tolerance * scale, equal_nan=True))

    def _judge(self, call: AttentionCall, values: Tensor) -> None:
        """Look at the first call of each class of module, before attention has mixed all tokens."""
        kind = type(self.model.module.get_submodule(call.module))
        copies = _copies(values, within=self.findings.heads_first)
        if kind in self.judged or copies is None:
            return
        self.judged.add(kind)
        copies = copies.float().flatten(1, -3)
        change, size = (copies[-1] - copies[0]).square(), copies[0].square()
        rows, columns = (_spread(change.sum(axis), size.sum(axis)) for axis in (-1, -2))
        if min(values.shape[-2:]) >= ENOUGH and columns < 0.3 and columns < rows / 2:
            self.findings.refusal = (
                f"{call.module or self.model.name} attends between channels, not tokens: a small region of the image "
                f"changes few of the {values.shape[-1]} columns of its values over many of {values.shape[-2]} rows"
            )
            return
        reached = change.sum((-1, -2)) > self.tolerance**2 * size.sum((-1, -2)).max()
        self._judge_axes(call, reached)

    def _judge_axes(self, call: AttentionCall, reached: Tensor) -> None:
        """Heads all see a changed region or none does; windows differ in that."""
        leading = call.leading_axes
        heads = head_count(self.model.module, call.module)
        if reached.numel() < 2 or reached.numel() * COPIES != torch.Size(leading).numel():
            return
        if len(leading) == COPIES and leading[1] == leading[2] == heads and leading[0] == COPIES:
            table = reached.view(leading[1:])
            by_row, by_column = _alike(table), _alike(table.mT)
            if by_row != by_column:
                self.findings.heads_before_windows = by_column
            return
        try:
            axes = axes_of(leading, COPIES, heads, call.module, heads_first=self.findings.heads_first)
        except UnsupportedModelError:
            return  # the run says so
        if not axes.in_order:
            return
        windows, apart = reached.numel() // axes.shape[-1], axes.shape[-1]
        if not _alike(reached.view(windows, apart)):
            self.findings.refusal = (
                f"{call.module or self.model.name} seems to have {apart} heads, but a small region of the "
                f"image reaches {int(reached.sum())} of {reached.numel()}: some are windows, and which is unknown"
            )


def _copies(tensor: Tensor, *, within: bool) -> Tensor | None:
    """Return (copy, …, token, channel), the copies being outermost in the first axis or, ``within``, innermost."""
    leading = tensor.shape[:-2]
    if not within:
        return tensor.unflatten(0, (COPIES, -1)) if leading and leading[0] % COPIES == 0 else None
    if len(leading) == 2 and leading[1] == COPIES:
        return tensor.transpose(0, 1)[:, None]
    if len(leading) == 1 and leading[0] % COPIES == 0:
        return tensor.unflatten(0, (-1, COPIES)).transpose(0, 1)
    return None


def _spread(change: Tensor, size: Tensor) -> float:
    """Return over what share of entries a relative change is spread: 1 if evenly, 1 / n if one entry has it all."""
    relative = change / (size + size.mean())
    total = relative.sum().square()
    return float(total / (relative.numel() * relative.square().sum())) if float(total) > 0 else 1.0


def _alike(table: Tensor) -> bool:
    """Return whether each row is all True or all False."""
    return bool((table == table[:, :1]).all())


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave every random number generator that a model may draw from as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _random_state(device: torch.device) -> Tensor:
    state: Any = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
