"""Run a model without hidden patches: a plain transformer drops their tokens, a window transformer masks their keys."""

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
from vitscope.errors import UnsupportedModelError, first_line
from vitscope.grid import Grid
from vitscope.models.hierarchy import Hierarchy
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel
from vitscope.tracing.capture import run_and_capture
from vitscope.typing import Pixels

# A mask may be filled with hidden tokens up to this multiple of its visible patches, to share a batch with others.
MAX_FILL = 1.1

VisiblePatches = Bool[Tensor, "mask patch"]
Evaluate = Callable[[Pixels, VisiblePatches], Tensor]


def without_hidden(model: VisionModel, pixels: Pixels, evaluate: Callable[[Pixels], Tensor]) -> Evaluate:
    """Return a function that evaluates a model on one image without its hidden patches.

    The function takes the pixels of the image and the visible patches, (mask, patch), and evaluates one mask per row.

    A plain transformer runs on the visible tokens. Their positions are added before the others are dropped; rotary
    positions and a relative bias are reduced to the visible tokens. If no patch is visible, a model that reads patches
    gets an empty image: zeros after normalisation.

    In a window transformer no token attends to a hidden one. Patch merging may mix hidden pixels with visible ones, so
    hidden pixels get the mean colour of the visible ones. Tokens that are completely hidden are left out of the mean
    that the classifier reads.

    Args:
        model: the model.
        pixels: an image to try it on, (1, channel, height, width).
        evaluate: a function that runs the model on pixels, (batch, channel, height, width).

    Raises:
        UnsupportedModelError: the model's tokens are unknown, or it cannot run without some of them.
    """
    layout = model.layout
    if layout is None:
        raise UnsupportedModelError(
            f"hide='drop' needs a model whose tokens are known, but those of {model.name} are not: pass patch_size to "
            "vitscope.load"
        )
    grid = layout.grid(*pixels.shape[-2:])
    if layout.hierarchy is not None:
        if layout.hierarchy.before_pooling is None:
            raise UnsupportedModelError(
                f"hide='drop' is not supported for {model.name}: its classifier does not average the last tokens"
            )
        return partial(_evaluate_masked, model, evaluate, grid, layout.hierarchy)
    evaluate_dropped = partial(_evaluate_dropped, model, evaluate, grid, _Entry(model, pixels, grid))
    _check_dropping(model, evaluate_dropped, pixels, grid)
    return evaluate_dropped


def _check_dropping(model: VisionModel, evaluate: Evaluate, pixels: Pixels, grid: Grid) -> None:
    """Refuse a model that fails without one token, for example because its attention adds a bias for all tokens."""
    visible = torch.ones(1, grid.num_patches, dtype=torch.bool, device=pixels.device)
    visible[0, -1] = grid.num_patches == 1
    try:
        evaluate(pixels, visible)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{model.name} does not run without some of its tokens ({first_line(error)}): let it use fused attention "
            "(attn_implementation='sdpa', or fused_attn in timm), or choose another hide"
        ) from None


class _Entry:
    """The first block of a plain transformer, which receives the tokens with positions added, and its stack."""

    def __init__(self, model: VisionModel, pixels: Pixels, grid: Grid) -> None:
        trace = run_and_capture(model, pixels, layers=[0]).trace
        step = trace.step(0)
        self.biased = _has_bias(step)
        for path in _ancestors(step.module):
            module, parent = model.module.get_submodule(path), model.module.get_submodule(path.rpartition(".")[0])
            is_stack = isinstance(parent, nn.ModuleList | nn.Sequential)
            if is_stack and self._receives_tokens(model, module, pixels, grid):
                self.first, self.blocks = module, list(parent.children())
                return
        raise UnsupportedModelError(
            f"hide='drop' is not supported for {model.name}: where its tokens enter the first block is unknown"
        )

    @staticmethod
    def _receives_tokens(model: VisionModel, module: nn.Module, pixels: Pixels, grid: Grid) -> bool:
        """Run the model and return whether the module's first input is (1, token, channel)."""
        shapes: list[tuple[int, ...]] = []

        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = (*args[:1], kwargs.get("hidden_states"))
            shapes.extend(tuple(value.shape) for value in inputs if isinstance(value, Tensor))

        handle = module.register_forward_pre_hook(in_this_thread(record), with_kwargs=True)
        try:
            with torch.no_grad(), model.running():
                model.logits(pixels)
        finally:
            handle.remove()
        return any(len(shape) == 3 and shape[:2] == (1, grid.num_tokens) for shape in shapes)


def _has_bias(step: AttentionStep) -> bool:
    return getattr(step.scores, "bias", None) is not None


def _ancestors(path: str) -> list[str]:
    """Return the paths of the modules around an attention module, outermost first, without the model itself."""
    names = path.split(".")
    return [".".join(names[: i + 1]) for i in range(len(names) - 1)]


def _evaluate_dropped(
    model: VisionModel,
    evaluate: Callable[[Pixels], Tensor],
    grid: Grid,
    entry: _Entry,
    pixels: Pixels,
    visible: VisiblePatches,
) -> Tensor:
    """Evaluate a plain transformer on its visible tokens.

    Rows of ``visible`` with fewer patches than others are filled with hidden tokens that no token attends to.
    """
    counts = visible.sum(1)
    max_count = int(counts.max())
    assert model.layout is not None
    if max_count == 0 and (grid.prefix == 0 or "patches" in model.layout.readout):
        return evaluate(torch.zeros_like(pixels).expand(len(visible), -1, -1, -1))
    patches = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, :max_count]  # visible patches first, in order
    prefix = torch.arange(grid.prefix, device=visible.device).expand(len(visible), -1)
    tokens = torch.cat([prefix, patches + grid.prefix], dim=1)
    filler = torch.arange(tokens.shape[1], device=visible.device) >= (grid.prefix + counts)[:, None]
    pixels = pixels.expand(len(visible), -1, -1, -1)
    with _gathering(entry, grid, tokens, patches):
        if not entry.biased and not bool(filler.any()):
            return evaluate(pixels)
        with Tap(model.module, partial(_attend_among_remaining, tokens, filler, grid.num_tokens)):
            return evaluate(pixels)


@contextmanager
def _gathering(
    entry: _Entry, grid: Grid, tokens: Int[Tensor, "batch remaining"], patches: Int[Tensor, "batch visible"]
) -> Iterator[None]:
    """While held, pass only ``tokens`` to the first block, and only positions of ``patches`` to every block.

    This affects the current thread alone.
    """

    def positions(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(positions(element) for element in value)
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-2] != grid.num_patches:
            return value
        # (patch, channel) or (head, patch, channel) → (batch, 1 or head, patch, channel)
        heads = value if value.ndim > 2 else value[None]
        return heads[..., patches, :].movedim(-3, 0)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        first, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if module is entry.first:
            first = first[torch.arange(len(tokens), device=tokens.device)[:, None], tokens]
        return (first, *(positions(arg) for arg in rest)), {key: positions(arg) for key, arg in kwargs.items()}

    handles = [block.register_forward_pre_hook(in_this_thread(enter), with_kwargs=True) for block in entry.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attend_among_remaining(
    tokens: Int[Tensor, "mask remaining"], filler: Bool[Tensor, "mask remaining"], num_tokens: int, call: AttentionCall
) -> Tensor:
    """Attend among the remaining tokens: a bias of all tokens is reduced to them, and filler is masked."""
    heads, remainder = divmod(call.leading_axes[0], len(tokens))  # 1, unless heads share an axis with the masks
    if call.num_keys != tokens.shape[1] or remainder:
        return call.run()
    if call.bias is not None and call.bias.shape[-1] == num_tokens:
        # (1, head, token, token) → (mask, head, remaining, remaining)
        call = replace(call, bias=call.bias[0][:, tokens[:, :, None], tokens[:, None, :]].transpose(0, 1))
    hidden = filler.repeat_interleave(heads, dim=0)
    return attend_without(call, hidden.view(call.leading_axes[0], *[1] * len(call.leading_axes), -1))


def attend_without(call: AttentionCall, hidden: Bool[Tensor, "..."]) -> Tensor:
    """Return the call's output with the hidden keys masked.

    Args:
        call: an attention call.
        hidden: True for each key that no query attends to, as a bias of the scores: (…, 1, key).
    """
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


def _evaluate_masked(
    model: VisionModel,
    evaluate: Callable[[Pixels], Tensor],
    grid: Grid,
    hierarchy: Hierarchy,
    pixels: Pixels,
    visible: VisiblePatches,
) -> Tensor:
    """Evaluate a window transformer in which no token attends to a hidden one."""
    assert model.layout is not None
    patch_height, patch_width = model.layout.patch_size
    blocks = visible.unflatten(1, (grid.height, grid.width))
    blocks = blocks.repeat_interleave(patch_height, 1).repeat_interleave(patch_width, 2)
    # The last patch may reach beyond the input, and the input beyond the last patch.
    beyond = (0, pixels.shape[-1] - blocks.shape[-1], 0, pixels.shape[-2] - blocks.shape[-2])
    visible_pixels = F.pad(blocks, beyond, value=False)[:, None]
    weights = visible_pixels.float()
    colour = (weights * pixels).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True).clamp_min(1)
    pixels = torch.where(visible_pixels, pixels, colour.to(pixels.dtype))
    keys = _KeyMask(grid, hierarchy, visible)
    assert hierarchy.before_pooling is not None
    handle = hierarchy.before_pooling.register_forward_hook(in_this_thread(keys.pool))
    try:
        with Tap(model.module, keys) as tap, tap.follow(keys.watched()):
            return evaluate(pixels)
    finally:
        handle.remove()


class _KeyMask:
    """The visible tokens of a window transformer, block by block, and attention restricted to them."""

    def __init__(self, grid: Grid, hierarchy: Hierarchy, visible: VisiblePatches) -> None:
        self.grid, self.hierarchy, self.visible = grid, hierarchy, visible

    def watched(self) -> dict[nn.Module, Callable[[Tensor, Any], None]]:
        """Return a callback for each module that merges patches."""
        return {merging.module: self._merge for merging in self.hierarchy.mergings.values()}

    def _merge(self, *_: Any) -> None:
        """Merge the mask as the tokens are merged: a merged token is hidden if all four of its tokens are."""
        groups = merge_groups(self.grid).to(self.visible.device)
        self.visible = (self.visible[:, groups.clamp_min(0)] & (groups != PADDING)).any(-1)
        self.grid = merged_grid(self.grid)

    def __call__(self, call: AttentionCall) -> Tensor:
        path = self.hierarchy.block_of(call.module)
        if path is None:
            return call.run()
        slots = self.hierarchy.blocks[path].windows(self.grid).slots(self.grid).to(self.visible.device)
        visible = self.visible[:, slots.clamp_min(0)] & (slots != PADDING)  # (batch, window, slot)
        hidden = ~self.visible[:, slots.clamp_min(0)] & (slots != PADDING)
        hidden &= visible.any(-1, keepdim=True)  # a window without visible tokens is not masked: nothing reads it
        return attend_without(call, hidden.view(*call.leading_axes[:-1], 1, 1, -1))

    def pool(self, _: nn.Module, __: Any, features: Tensor) -> Tensor | None:
        """Return the last tokens, scaled so that their mean is that of the visible ones."""
        weight = self.visible.float() / self.visible.float().mean(1, keepdim=True)
        weight = torch.where(self.visible.any(1, keepdim=True), weight, torch.ones_like(weight))
        return features * weight.view(len(weight), *features.shape[1:-1], 1).to(features.dtype)


def similar_batches(model: VisionModel, visible: Bool[np.ndarray, "mask patch"], size: int) -> list[list[int]]:
    """Group masks into batches that leave about the same number of tokens, so that little computation is wasted.

    If the model averages its patches, all masks of a batch leave exactly the same number, because such a model must
    not see filler tokens. The order of the batches is random, so that an interrupted run has seen masks of every kind.
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
