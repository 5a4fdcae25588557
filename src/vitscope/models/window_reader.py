"""Reading a Swin through CLS tokens in its windows: the tokens' way through each block, and a head that reads them."""

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
from vitscope.models.unwatched import unwatched
from vitscope.models.vision_model import VisionModel
from vitscope.typing import Pixels, Slots

WindowRows = Float[Tensor, "batch window head slot_and_self"]
Entered = Mapping[str, tuple[Float[Tensor, "batch token channel"], Slots]]


class WindowReader(nn.Module):
    """One learned token for each stage of a Swin, and a small head that reads what the tokens gather.

    In each block the stage's token enters every window, attends to itself and the window through the block's own
    weights, and takes up what that adds. The mean over windows and blocks of a stage is the stage's summary; a
    LayerNorm and one linear layer make logits of the summaries of all stages. Tokens of the image do not attend to
    it, so the backbone computes what it always did, and its weights get no gradient.
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
        """Logits of preprocessed images through this backbone; gradients flow to the tokens and the head."""
        entered, projections = entering_blocks(model, pixels), block_projections(model)
        summaries: list[list[Tensor]] = [[] for _ in self.tokens]
        with unwatched():  # what the stages' tokens attend to is no attention of the backbone's
            for path, (tokens, slots) in entered.items():
                stage = self._stages[path]
                token = self.tokens[stage]
                _, added = read_window(projections[path], tokens, slots, token)
                summaries[stage].append(added.mean(1) + token)
            stages = [torch.stack(blocks).mean(0) for blocks in summaries]
            return self.head(self.norm(torch.cat(stages, dim=-1)))


def entering_blocks(model: VisionModel, pixels: Pixels) -> Entered:
    """For each block the tokens that enter it and which of them each window holds, in order of running.

    The model runs as it is, in evaluation mode and without gradients; nothing of its attention is looked at.
    """
    assert model.layout is not None
    assert model.layout.hierarchy is not None
    entered: dict[str, tuple[Tensor, Slots]] = {}
    grid = model.layout.grid(*pixels.shape[-2:])
    with _watching(model.layout.hierarchy, grid, entered), torch.no_grad(), model.running():
        model.answer_or_none(pixels)
    return entered


@contextmanager
def _watching(hierarchy: Hierarchy, grid: Any, entered: dict[str, tuple[Tensor, Slots]]) -> Iterator[None]:
    known: dict[Any, Slots] = {}

    def enter(path: str) -> Any:
        def note(_: nn.Module, inputs: Any) -> None:
            windows = hierarchy.blocks[path].windows(grid)
            if (grid, windows) not in known:
                known[grid, windows] = windows.slots(grid).to(inputs[0].device)
            # (batch, token, channel) or (batch, row, column, channel)
            entered[path] = inputs[0].detach().flatten(1, -2), known[grid, windows]

        return note

    def merge(*_: Any) -> None:
        nonlocal grid
        grid = merged_grid(grid)

    handles = [block.module.register_forward_pre_hook(enter(path)) for path, block in hierarchy.blocks.items()]
    handles += [merging.module.register_forward_pre_hook(merge) for merging in hierarchy.mergings.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_projections(model: VisionModel) -> dict[str, Projection]:
    """The weights of each block, by the path of its attention; a CallError where they are not known."""
    blocks = {} if model.layout is None or model.layout.hierarchy is None else model.layout.hierarchy.blocks
    known = {path: block.projection for path, block in blocks.items() if block.projection is not None}
    if not known:
        raise UnsupportedModelError(
            f"{model.name} has no windows that a CLS token can be put into: Swin (version 1) has"
        )
    return known


def stage_widths(projections: Mapping[str, Projection]) -> list[int]:
    """How many channels the tokens of each stage have."""
    return list(dict.fromkeys(projection.out.out_features for projection in projections.values()))


def stage_of_block(projections: Mapping[str, Projection]) -> dict[str, int]:
    """The stage of each block, from 0: the blocks of a stage are equally wide."""
    widths = stage_widths(projections)
    return {path: widths.index(projection.out.out_features) for path, projection in projections.items()}


def read_window(
    projection: Projection,
    tokens: Float[Tensor, "batch token channel"],
    slots: Slots,
    entering: Float[Tensor, " channel"] | None = None,
) -> tuple[WindowRows, Float[Tensor, "batch window channel"]]:
    """One token in each window, through the block's own attention.

    Args:
        tokens: what enters the block.
        slots: which of them each window holds.
        entering: the vector that enters each window; by default the mean of its tokens.

    Returns:
        the token's attention to itself and then to each slot, and what attention adds to it.
    """
    real = slots >= 0
    if entering is None:
        inside = tokens[:, slots.clamp_min(0)] * real[..., None]
        own = inside.sum(2) / real.sum(1, keepdim=True)
    else:
        own = entering.expand(len(tokens), len(slots), -1)
    windows = projection.normed(tokens)[:, slots.clamp_min(0)] * real[..., None]  # padding is zero after the LayerNorm
    own = projection.normed(own)[:, :, None]
    query, key, value = projection.qkv(torch.cat([own, windows], dim=2))
    query, key, value = (
        part.unflatten(-1, (projection.num_heads, -1)).transpose(2, 3) for part in (query[:, :, :1], key, value)
    )  # (batch, window, head, slot, channel)
    with in_float32(query):
        weights = (query.float() @ key.float().transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    added = projection.added((weights.to(value.dtype) @ value).squeeze(-2).flatten(-2))
    return weights.squeeze(-2), added
