"""Patches that are not there: tokens left out of a plain transformer, keys masked in a window transformer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vitscope.attention.tap import AttentionCall, Tap
from vitscope.attention.trace import AttentionStep
from vitscope.attention.windows import PADDING, merge_groups, merged_grid
from vitscope.errors import UnsupportedModelError
from vitscope.grid import Grid
from vitscope.models.hierarchy import Hierarchy
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import run_and_capture
from vitscope.typing import Pixels

# A mask may be filled to this multiple of its patches to be evaluated together with others.
MAX_FILL = 1.1

Shown = Bool[Tensor, "mask patch"]
Answer = Callable[[Pixels, Shown], Tensor]


def without_hidden(model: VisionModel, pixels: Pixels, answer: Callable[[Pixels], Tensor]) -> Answer:
    """A function of (pixels of one image, shown patches (mask, patch)) that answers without the hidden ones.

    A plain transformer runs on the tokens that are left, their positions having been added before (rotary ones go with
    them, and so does a relative bias). In a window transformer no token looks at a hidden one; where merging mixes
    them in they are the mean colour of what is shown, and the mean that the classifier reads leaves out what is wholly
    hidden. Where a model that reads patches is shown none, it is given an empty image: zeros after normalisation.

    Raises:
        CallError: the model's tokens are unknown, or it cannot run without some of them.
    """
    layout = model.layout
    if layout is None:
        raise UnsupportedModelError(
            f"hide='drop' needs a model whose tokens are known, {model.name} is not: pass patch_size to load"
        )
    grid = layout.grid(*pixels.shape[-2:])
    if layout.hierarchy is not None:
        if layout.hierarchy.before_pooling is None:
            raise UnsupportedModelError(
                f"hide='drop' is not supported for {model.name}: its classifier does not average the last tokens"
            )
        return partial(_masked, model, answer, grid, layout.hierarchy)
    left_out = partial(_left_out, model, answer, grid, _Entry(model, pixels, grid))
    _try_one_missing(model, left_out, pixels, grid)
    return left_out


def _try_one_missing(model: VisionModel, left_out: Answer, pixels: Pixels, grid: Grid) -> None:
    """Attention that is written out adds a bias between all tokens where nobody can cut it down."""
    shown = torch.ones(1, grid.num_patches, dtype=torch.bool, device=pixels.device)
    shown[0, -1] = grid.num_patches == 1
    try:
        left_out(pixels, shown)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{model.name} does not run without some of its tokens ({str(error).splitlines()[0]}): let it use fused "
            "attention (attn_implementation='sdpa', or fused_attn in timm), or choose another hide"
        ) from None


class _Entry:
    """Where the tokens of a plain transformer, their positions added, enter its stack of blocks."""

    def __init__(self, model: VisionModel, pixels: Pixels, grid: Grid) -> None:
        trace = run_and_capture(model, pixels, layers=[0]).trace
        step = trace.step(0)
        self.biased = _has_bias(step)
        for path in _ancestors(step.module):
            module, around = model.module.get_submodule(path), model.module.get_submodule(path.rpartition(".")[0])
            stacked = isinstance(around, nn.ModuleList | nn.Sequential)
            if stacked and self._is_given_tokens(model, module, pixels, grid):
                self.first, self.blocks = module, list(around.children())
                return
        raise UnsupportedModelError(
            f"hide='drop' is not supported for {model.name}: where its tokens enter the first block is unknown"
        )

    @staticmethod
    def _is_given_tokens(model: VisionModel, module: nn.Module, pixels: Pixels, grid: Grid) -> bool:
        given: list[tuple[int, ...]] = []

        def look(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.extend(tuple(part.shape) for part in (*args[:1], kwargs.get("hidden_states")) if _is_tensor(part))

        handle = module.register_forward_pre_hook(look, with_kwargs=True)
        try:
            with torch.no_grad(), model.running():
                model.answer(pixels)
        finally:
            handle.remove()
        return any(len(shape) == 3 and shape[:2] == (1, grid.num_tokens) for shape in given)


def _has_bias(step: AttentionStep) -> bool:
    return getattr(step.scores, "bias", None) is not None


def _ancestors(path: str) -> list[str]:
    """The modules around an attention module, outermost first, without the model itself."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts) - 1)]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _left_out(
    model: VisionModel, answer: Callable[[Pixels], Tensor], grid: Grid, entry: _Entry, pixels: Pixels, shown: Shown
) -> Tensor:
    """Rows of ``shown`` with fewer patches than others are filled up with hidden ones that nobody looks at."""
    counts = shown.sum(1)
    left = int(counts.max())
    assert model.layout is not None
    if left == 0 and (grid.prefix == 0 or "patches" in model.layout.readout):
        return answer(torch.zeros_like(pixels).expand(len(shown), -1, -1, -1))
    patches = (~shown).to(torch.uint8).argsort(dim=1, stable=True)[:, :left]  # the shown ones first, in order
    prefix = torch.arange(grid.prefix, device=shown.device).expand(len(shown), -1)
    tokens = torch.cat([prefix, patches + grid.prefix], dim=1)
    filler = torch.arange(tokens.shape[1], device=shown.device) >= (grid.prefix + counts)[:, None]
    pixels = pixels.expand(len(shown), -1, -1, -1)
    with _gathering(entry, grid, tokens, patches):
        if not entry.biased and not bool(filler.any()):
            return answer(pixels)
        with Tap(model.module, partial(_among_kept, tokens, filler, grid.num_tokens)):
            return answer(pixels)


@contextmanager
def _gathering(
    entry: _Entry, grid: Grid, tokens: Int[Tensor, "batch kept"], patches: Int[Tensor, "batch left"]
) -> Iterator[None]:
    """While held, this thread's first block is given ``tokens`` alone, and every block the positions of ``patches``."""
    thread = threading.get_ident()

    def positions(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(positions(part) for part in value)
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-2] != grid.num_patches:
            return value
        # (patch, channel) or (head, patch, channel) → (batch, 1 or head, patch, channel)
        heads = value if value.ndim > 2 else value[None]
        return heads[..., patches, :].movedim(-3, 0)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return None
        first, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if module is entry.first:
            first = first[torch.arange(len(tokens), device=tokens.device)[:, None], tokens]
        return (first, *(positions(arg) for arg in rest)), {key: positions(arg) for key, arg in kwargs.items()}

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in entry.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _among_kept(
    tokens: Int[Tensor, "mask kept"], filler: Bool[Tensor, "mask kept"], num_tokens: int, call: AttentionCall
) -> Tensor:
    """Attention among the tokens that are left: a bias between all tokens cut down to them, no filler looked at."""
    heads, apart = divmod(call.leading_axes[0], len(tokens))  # more than one where they share an axis with the masks
    if call.num_keys != tokens.shape[1] or apart:
        return call.run()
    if call.bias is not None and call.bias.shape[-1] == num_tokens:
        # (1, head, token, token) → (mask, head, kept, kept)
        call = replace(call, bias=call.bias[0][:, tokens[:, :, None], tokens[:, None, :]].transpose(0, 1))
    hidden = filler.repeat_interleave(heads, dim=0)
    return _attend_without(call, hidden.view(call.leading_axes[0], *[1] * len(call.leading_axes), -1))


def _attend_without(call: AttentionCall, hidden: Bool[Tensor, "..."]) -> Tensor:
    """The call's output if nobody looks at the hidden keys."""
    bias = torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))
    if call.logits is not None:
        return (call.logits + bias.to(call.logits.dtype)).softmax(-1)
    if call.bias is not None:
        bias = call.bias + bias
    assert call.query is not None
    assert call.key is not None
    assert call.value is not None
    return F.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=bias.to(call.query.dtype), scale=call.scale
    )


def _masked(
    model: VisionModel, answer: Callable[[Pixels], Tensor], grid: Grid, windows: Hierarchy, pixels: Pixels, shown: Shown
) -> Tensor:
    assert model.layout is not None
    high, wide = model.layout.patch_size
    blocks = shown.unflatten(1, (grid.height, grid.width)).repeat_interleave(high, 1).repeat_interleave(wide, 2)
    # The last patch may reach beyond the input, and the input beyond the last patch.
    beyond = (0, pixels.shape[-1] - blocks.shape[-1], 0, pixels.shape[-2] - blocks.shape[-2])
    shown_pixels = F.pad(blocks, beyond, value=False)
    weights = shown_pixels[:, None].float()
    colour = (weights * pixels).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True).clamp_min(1)
    pixels = torch.where(shown_pixels[:, None], pixels, colour.to(pixels.dtype))
    keys = _Keys(grid, windows, shown)
    assert windows.before_pooling is not None
    handle = windows.before_pooling.register_forward_hook(keys.pool)
    try:
        with Tap(model.module, keys) as tap, tap.follow(keys.watched()):
            return answer(pixels)
    finally:
        handle.remove()


class _Keys:
    """Which tokens of a window transformer are hidden, block after block."""

    def __init__(self, grid: Grid, windows: Hierarchy, shown: Shown) -> None:
        self.grid, self.windows, self.shown = grid, windows, shown
        self.thread = threading.get_ident()

    def watched(self) -> dict[nn.Module, Callable[[Tensor, Any], None]]:
        return {merging.module: self._merge for merging in self.windows.mergings.values()}

    def _merge(self, *_: Any) -> None:
        """A merged token is hidden where all of its four are."""
        groups = merge_groups(self.grid).to(self.shown.device)
        self.shown = (self.shown[:, groups.clamp_min(0)] & (groups != PADDING)).any(-1)
        self.grid = merged_grid(self.grid)

    def __call__(self, call: AttentionCall) -> Tensor:
        path = self.windows.block_of(call.module)
        if path is None:
            return call.run()
        slots = self.windows.blocks[path].windows(self.grid).slots(self.grid).to(self.shown.device)
        shown = self.shown[:, slots.clamp_min(0)] & (slots != PADDING)  # (batch, window, slot)
        hidden = ~self.shown[:, slots.clamp_min(0)] & (slots != PADDING)
        hidden &= shown.any(-1, keepdim=True)  # whom nobody shown looks at may look where it likes
        return _attend_without(call, hidden.view(*call.leading_axes[:-1], 1, 1, -1))

    def pool(self, _: nn.Module, __: Any, features: Tensor) -> Tensor | None:
        """The last tokens, scaled so that their mean is that of the shown ones."""
        if threading.get_ident() != self.thread:
            return None
        weight = self.shown.float() / self.shown.float().mean(1, keepdim=True)
        weight = torch.where(self.shown.any(1, keepdim=True), weight, torch.ones_like(weight))
        return features * weight.view(len(weight), *features.shape[1:-1], 1).to(features.dtype)


def similar_batches(model: VisionModel, visible: Bool[np.ndarray, "mask patch"], size: int) -> list[list[int]]:
    """Group masks that leave about the same number of tokens into batches, so that little computation is wasted.

    Masks of a model that averages its patches leave exactly the same number, because such a model must not see filler
    tokens. The order of the batches is random, so that an interrupted run has seen masks of every kind.
    """
    layout = model.layout
    if layout is None or layout.hierarchy is not None:
        return [list(range(start, min(start + size, len(visible)))) for start in range(0, len(visible), size)]
    counts = visible.sum(1).tolist()
    stretch = 1.0 if {"patches", "tokens"} & set(layout.readout) else MAX_FILL
    groups: list[list[int]] = []
    for index in np.argsort(counts, kind="stable").tolist():
        if not groups or len(groups[-1]) == size or counts[index] > stretch * counts[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return [groups[index] for index in np.random.default_rng(0).permutation(len(groups))]
