"""An experiment on a model of an unknown class: one forward pass of three images before the first capture.

Two of the images are identical. The third differs from them in a small region. The arguments of the attention calls
then show whether tokens are random, whether attention is between channels instead of tokens, and which axes are
images, windows and heads. Models of known classes need no experiment.
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

from vitscope.attention.axes import Axes, axes_of, head_count
from vitscope.attention.flow import IMAGE, Flow, constants_of
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.attention.tap import AttentionCall, Tap
from vitscope.attention.unsupported import unsupported_attention
from vitscope.errors import UnsupportedModelError
from vitscope.models.vision_model import VisionModel

COPIES = 3  # the same image twice, and a copy with a changed region
MIN_SIDE = 8  # minimum rows and columns of the values; fewer do not show where a change is


@dataclass(frozen=True)
class Evidence:
    """The result of the experiment for a model whose attention is supported.

    Attributes:
        heads_first: True if the first axis holds the heads, and each head the images.
        heads_before_windows: True if the heads come first in the axes (image, head, window), False if the windows do;
            None if the experiment does not show it.
    """

    heads_first: bool = False
    heads_before_windows: bool | None = None

    def axes(self, call: AttentionCall, batch: int, heads: int | None) -> Axes:
        """Return the order of images, windows and heads in a call.

        Args:
            call: an attention call.
            batch: number of images.
            heads: number of heads that the module declares; None if unknown.

        Raises:
            UnsupportedModelError: the order is ambiguous.
        """
        return axes_of(
            call.leading_axes,
            batch,
            heads,
            call.module,
            heads_first=self.heads_first,
            heads_before_windows=self.heads_before_windows,
        )


@dataclass
class _Findings:
    """Observations of one forward pass.

    Attributes:
        module: the module whose attention is not supported, or the model.
        refusal: reason why its attention is not supported; None if it is.
        heads_first: see :class:`Evidence`.
        heads_before_windows: see :class:`Evidence`.
        sums: sum of the absolute queries or logits of each call, to compare two forward passes.
    """

    module: str = ""
    refusal: str | None = None
    heads_first: bool = False
    heads_before_windows: bool | None = None
    sums: list[float] = field(default_factory=list)

    def refuse(self, module: str, reason: str) -> None:
        """Record that the attention of a module is not supported, and why."""
        self.module, self.refusal = module, reason


_cache: WeakKeyDictionary[nn.Module, dict[tuple[int, int], _Findings]] = WeakKeyDictionary()


def experiment(model: VisionModel, size: tuple[int, int], channels: int = 3) -> Evidence:
    """Return the evidence from a forward pass of three images, which runs once per module and input size.

    Random number generators, training flags and hooks are unchanged afterwards.

    Args:
        model: the model; it is not run if its class is known.
        size: height and width of the input in pixels.
        channels: number of input channels.

    Raises:
        UnsupportedModelError: tokens are random, attention is between channels, or heads and windows share an axis.
    """
    if model.layout is not None and model.library != "module":
        return Evidence()
    sizes = _cache.setdefault(model.module, {})
    if size not in sizes:
        sizes[size] = _run_twice_if_random(model, size, channels)
    findings = sizes[size]
    if findings.refusal is not None:
        raise unsupported_attention(findings.module, findings.refusal)
    return Evidence(findings.heads_first, findings.heads_before_windows)


def axes_of_call(model: VisionModel, call: AttentionCall, pixels: Tensor) -> Axes:
    """Return the order of images, windows and heads in an attention call.

    Args:
        model: the model.
        call: an attention call of its run.
        pixels: the input of the run, (batch, channel, height, width).

    Raises:
        UnsupportedModelError: the order is ambiguous.
    """
    evidence = experiment(model, (pixels.shape[-2], pixels.shape[-1]), pixels.shape[1])
    has_hierarchy = model.layout is not None and model.layout.hierarchy is not None
    return evidence.axes(call, len(pixels), None if has_hierarchy else head_count(model.module, call.module))


def _run_twice_if_random(model: VisionModel, size: tuple[int, int], channels: int) -> _Findings:
    """Return the findings of a forward pass; a model that draws random numbers is run again and compared."""
    with preserved_random_state(model.device):
        before = _random_state(model.device)
        try:
            findings = _findings(model, size, channels)
            if findings.refusal is not None or torch.equal(before, _random_state(model.device)):
                return findings
            again = _findings(model, size, channels)
        except Exception:
            return _Findings()  # the capture itself reports what is wrong with the model
        if again.sums != findings.sums:
            findings.refuse(
                model.name, "it draws random numbers, and the same image gives different tokens in each run"
            )
        return findings


def changed_region(size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns of a small region away from the centre of an image."""
    sides = [max(side // 8, 1) for side in size]
    starts = [side * 5 // 16 for side in size]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    return rows, columns


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Return standard normal noise on the CPU, without using the global random number generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _findings(model: VisionModel, size: tuple[int, int], channels: int) -> _Findings:
    """Return the findings of one forward pass."""
    image = noise((1, channels, *size))
    images = image.repeat(COPIES, 1, 1, 1)
    rows, columns = changed_region(size)
    region = images[-1:, :, rows, columns]
    images[-1:, :, rows, columns] = noise(tuple(region.shape), seed=1) * 2
    pixels = images.to(model.device, model.dtype)
    observer = _Observer(model)
    flow = Flow(constants_of(model.module))
    flow.set_mask(pixels, IMAGE)
    tap = Tap(model.module, observer.on_attention, flow, SoftmaxTracker(observer.on_values))
    with torch.no_grad(), model.running(), tap, tap.follow():
        model.logits_or_none(pixels)
    return observer.findings


class _Observer:
    """An observer that examines the arguments of every attention call."""

    def __init__(self, model: VisionModel) -> None:
        self.model, self.findings = model, _Findings()
        self.pending: dict[int, AttentionCall] = {}
        self.examined: set[type[nn.Module]] = set()
        self.tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2

    def on_attention(self, call: AttentionCall) -> Tensor:
        """Examine an attention call that depends on the image, and return its output."""
        if call.input_mask & IMAGE and self.findings.refusal is None:
            self._compare_copies(call)
            if call.num_queries == call.num_keys:
                if call.value is not None:
                    self._examine_values(call, call.value)
                else:
                    self.pending[call.index] = call
        return call.run()

    def on_values(self, index: int, values: Tensor) -> None:
        """Examine the values of a softmax, which are known only after the call."""
        call = self.pending.pop(index, None)
        if call is not None and self.findings.refusal is None:
            self._examine_values(call, values)

    def _refuse(self, call: AttentionCall, reason: str) -> None:
        """Record that the attention of the calling module is not supported, and why."""
        self.findings.refuse(call.module or self.model.name, reason)

    def _compare_copies(self, call: AttentionCall) -> None:
        """Compare the tokens of the two identical images."""
        tensor = call.queries_or_logits
        self.findings.sums.append(float(tensor.double().nan_to_num(0, 0, 0).abs().sum()))
        outer, inner = _copies(tensor, within=False), _copies(tensor, within=True)
        if outer is None and inner is None:
            return  # the images are packed into one sequence, which the capture reports
        if outer is not None and self._equal(outer):
            return
        if inner is not None and self._equal(inner):
            self.findings.heads_first = True
            return
        self._refuse(
            call, "its tokens are masked, shuffled or sampled at random (two identical images have different tokens)"
        )

    def _equal(self, copies: Tensor) -> bool:
        """Return whether the tokens of the first two images are equal."""
        first, second = copies[0].float(), copies[1].float()
        scale = float(first.nan_to_num(0, 0, 0).abs().max())
        return bool(torch.allclose(first, second, rtol=self.tolerance, atol=self.tolerance * scale, equal_nan=True))

    def _examine_values(self, call: AttentionCall, values: Tensor) -> None:
        """Examine the first call of each class of module, before attention has mixed all tokens."""
        module_class = type(self.model.module.get_submodule(call.module))
        copies = _copies(values, within=self.findings.heads_first)
        if module_class in self.examined or copies is None:
            return
        self.examined.add(module_class)
        copies = copies.float().flatten(1, -3)
        change, size = (copies[-1] - copies[0]).square(), copies[0].square()
        rows, columns = (_spread(change.sum(axis), size.sum(axis)) for axis in (-1, -2))
        if min(values.shape[-2:]) >= MIN_SIDE and columns < 0.3 and columns < rows / 2:
            self._refuse(
                call,
                f"it attends between channels, not tokens (a changed image region affects few of {values.shape[-1]} "
                f"columns and many of {values.shape[-2]} rows of its values)",
            )
            return
        affected = change.sum((-1, -2)) > self.tolerance**2 * size.sum((-1, -2)).max()
        self._examine_axes(call, affected)

    def _examine_axes(self, call: AttentionCall, affected: Tensor) -> None:
        """Distinguish heads from windows: a changed region affects all heads or none, but only some windows."""
        leading = call.leading_axes
        heads = head_count(self.model.module, call.module)
        if affected.numel() < 2 or affected.numel() * COPIES != torch.Size(leading).numel():
            return
        if len(leading) == COPIES and leading[1] == leading[2] == heads and leading[0] == COPIES:
            table = affected.view(leading[1:])
            by_row, by_column = _rows_are_constant(table), _rows_are_constant(table.mT)
            if by_row != by_column:
                self.findings.heads_before_windows = by_column
            return
        try:
            axes = Evidence(self.findings.heads_first).axes(call, COPIES, heads)
        except UnsupportedModelError:
            return  # the capture reports it
        if not axes.in_order:
            return
        num_heads = axes.shape[-1]
        if not _rows_are_constant(affected.view(affected.numel() // num_heads, num_heads)):
            self._refuse(
                call,
                f"some of its {num_heads} apparent heads are windows (a changed image region affects only "
                f"{int(affected.sum())} of {affected.numel()})",
            )


def _copies(tensor: Tensor, *, within: bool) -> Tensor | None:
    """Return (copy, …, token, channel) if the copies are outermost in the first axis or, ``within``, innermost."""
    leading = tensor.shape[:-2]
    if not within:
        return tensor.unflatten(0, (COPIES, -1)) if leading and leading[0] % COPIES == 0 else None
    if len(leading) == 2 and leading[1] == COPIES:
        return tensor.transpose(0, 1)[:, None]
    if len(leading) == 1 and leading[0] % COPIES == 0:
        return tensor.unflatten(0, (-1, COPIES)).transpose(0, 1)
    return None


def _spread(change: Tensor, size: Tensor) -> float:
    """Return the share of entries over which a relative change is spread: 1 if even, 1 / n if in a single entry."""
    relative = change / (size + size.mean())
    total = relative.sum().square()
    return float(total / (relative.numel() * relative.square().sum())) if float(total) > 0 else 1.0


def _rows_are_constant(table: Tensor) -> bool:
    """Return whether each row of a boolean table is all True or all False."""
    return bool((table == table[:, :1]).all())


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random number generators of Python, NumPy and torch afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _random_state(device: torch.device) -> Tensor:
    """Return the state of torch's random number generators."""
    state: Any = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
