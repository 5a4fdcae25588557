"""Classification with CLS tokens in the windows of a Swin: the tokens' path through each block, and a head."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitscope.attention.scores import in_float32
from vitscope.attention.windows import merged_grid
from vitscope.errors import UnsupportedModelError
from vitscope.models.hierarchy import Hierarchy, Projection
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.unwatched import unwatched
from vitscope.models.vision_model import VisionModel
from vitscope.typing import Pixels, Slots

WindowRows = Float[Tensor, "batch window head slot_and_self"]
BlockInputs = Mapping[str, tuple[Float[Tensor, "batch token channel"], Slots]]


class WindowReader(nn.Module):
    """One learned token for each stage of a Swin, and a small head that reads what the tokens collect.

    In each block, the stage's token enters every window, attends to itself and to the window's tokens through the
    block's own weights, and adds the result to itself. The mean over the windows and blocks of a stage is the stage's
    summary. A LayerNorm and one linear layer compute logits from the summaries of all stages. The image's tokens do not
    attend to the learned ones, so the output of the backbone does not change, and its weights receive no gradient.
    """

    def __init__(self, model: VisionModel, num_classes: int) -> None:
        super().__init__()
        projections = block_projections(model)
        self._stages = stage_of_block(projections)
        widths = stage_widths(projections)
        device, dtype = model.device, model.dtype
        self.tokens = nn.ParameterList(
            nn.Parameter(torch.randn(width, device=device, dtype=dtype) * 0.02) for width in widths
        )
        self.norm = nn.LayerNorm(sum(widths), device=device, dtype=dtype)
        self.head = nn.Linear(sum(widths), num_classes, device=device, dtype=dtype)

    def read(self, model: VisionModel, pixels: Pixels) -> Float[Tensor, "batch label"]:
        """Return logits of preprocessed images through this backbone; gradients reach the tokens and the head."""
        inputs, projections = block_inputs(model, pixels), block_projections(model)
        summaries: list[list[Tensor]] = [[] for _ in self.tokens]
        with unwatched():  # the attention of the stages' tokens is not the backbone's own
            for path, (tokens, slots) in inputs.items():
                stage = self._stages[path]
                token = self.tokens[stage]
                _, added = read_window(projections[path], tokens, slots, token)
                summaries[stage].append(added.mean(1) + token)
            stages = [torch.stack(blocks).mean(0) for blocks in summaries]
            return self.head(self.norm(torch.cat(stages, dim=-1)))


def block_inputs(model: VisionModel, pixels: Pixels) -> BlockInputs:
    """Return the tokens that enter each block, and the slots of its windows, in the order in which the blocks run.

    The model runs unchanged, in evaluation mode and without gradients; its attention is not captured.
    """
    assert model.layout is not None
    assert model.layout.hierarchy is not None
    inputs: dict[str, tuple[Tensor, Slots]] = {}
    grid = model.layout.grid(*pixels.shape[-2:])
    with _record_inputs(model.layout.hierarchy, grid, inputs), torch.no_grad(), model.running():
        model.logits_or_none(pixels)
    return inputs


@contextmanager
def _record_inputs(hierarchy: Hierarchy, grid: Any, inputs: dict[str, tuple[Tensor, Slots]]) -> Iterator[None]:
    """Record the input of every block inside the context."""
    slots_by_windows: dict[Any, Slots] = {}

    def recorder(path: str) -> Any:
        def record(_: nn.Module, args: Any) -> None:
            windows = hierarchy.blocks[path].windows(grid)
            if (grid, windows) not in slots_by_windows:
                slots_by_windows[grid, windows] = windows.slots(grid).to(args[0].device)
            # (batch, token, channel) or (batch, row, column, channel)
            inputs[path] = args[0].detach().flatten(1, -2), slots_by_windows[grid, windows]

        return record

    def merge(*_: Any) -> None:
        nonlocal grid
        grid = merged_grid(grid)

    handles = [
        block.module.register_forward_pre_hook(in_this_thread(recorder(path)))
        for path, block in hierarchy.blocks.items()
    ]
    handles += [
        merging.module.register_forward_pre_hook(in_this_thread(merge)) for merging in hierarchy.mergings.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_projections(model: VisionModel) -> dict[str, Projection]:
    """Return the layers around attention of each block, by the path of its attention module.

    Raises:
        UnsupportedModelError: the model is not a Swin (version 1).
    """
    blocks = {} if model.layout is None or model.layout.hierarchy is None else model.layout.hierarchy.blocks
    projections = {path: block.projection for path, block in blocks.items() if block.projection is not None}
    if not projections:
        raise UnsupportedModelError(
            f"{model.name} has no windows that a CLS token can enter: only Swin (version 1) is supported"
        )
    return projections


def stage_widths(projections: Mapping[str, Projection]) -> list[int]:
    """Return the number of channels of each stage's tokens."""
    return list(dict.fromkeys(projection.out.out_features for projection in projections.values()))


def stage_of_block(projections: Mapping[str, Projection]) -> dict[str, int]:
    """Return the stage of each block, from 0: the blocks of a stage have the same width."""
    widths = stage_widths(projections)
    return {path: widths.index(projection.out.out_features) for path, projection in projections.items()}


def read_window(
    projection: Projection,
    tokens: Float[Tensor, "batch token channel"],
    slots: Slots,
    entering: Float[Tensor, " channel"] | None = None,
) -> tuple[WindowRows, Float[Tensor, "batch window channel"]]:
    """Return the attention of one token in each window of a block, and what it adds to the token.

    Args:
        projection: layers of the block around attention.
        tokens: tokens that enter the block.
        slots: index of the token in each slot of each window; negative for padding.
        entering: vector that enters each window; by default the mean of the window's tokens.

    Returns:
        The token's attention to itself and then to each slot, and what attention adds to it.
    """
    occupied = slots >= 0
    if entering is None:
        content = tokens[:, slots.clamp_min(0)] * occupied[..., None]
        token = content.sum(2) / occupied.sum(1, keepdim=True)
    else:
        token = entering.expand(len(tokens), len(slots), -1)
    # Padding is zero after the LayerNorm, as in the model itself.
    windows = projection.normalize(tokens)[:, slots.clamp_min(0)] * occupied[..., None]
    token = projection.normalize(token)[:, :, None]
    query, key, value = projection.qkv(torch.cat([token, windows], dim=2))
    query, key, value = (
        tensor.unflatten(-1, (projection.num_heads, -1)).transpose(2, 3) for tensor in (query[:, :, :1], key, value)
    )  # (batch, window, head, slot, channel)
    with in_float32(query):
        weights = (query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    added = projection.project_out((weights.to(value.dtype) @ value).squeeze(-2).flatten(-2))
    return weights.squeeze(-2), added
