"""Activation patching with plain hooks: one forward pass of one image for each patch, and grids by counting rows.

It does not use vitscope. A patch is a cell of the coarsest grid of the patched blocks. In a block whose grid has twice
as many rows, the tokens of a patch are a square of 2 × 2, and so on.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, int]


def block_inputs(blocks: Sequence[nn.Module], predict: Callable[[], Tensor]) -> list[Tensor]:
    """Return a copy of the first argument of each block."""
    inputs: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append((args[0] if args else kwargs["hidden_states"]).clone()),
            with_kwargs=True,
        )
        for block in blocks
    ]
    predict()
    for handle in handles:
        handle.remove()
    return inputs


def halved(shape: Shape, times: int) -> Shape:
    for _ in range(times):
        shape = (-(-shape[0] // 2), -(-shape[1] // 2))
    return shape


def halvings(finest: Shape, patches: int) -> int:
    """Return how often the finest grid is halved until it has this number of patches."""
    return next(times for times in range(8) if halved(finest, times)[0] * halved(finest, times)[1] == patches)


def with_patch(stream: Tensor, source: Tensor, prefix: int, shape: Shape, rows: range, columns: range) -> Tensor:
    """Return the input of a block, (1, token, channel) or (1, row, column, channel), with some tokens of another."""
    patched = stream.clone()
    flat, donor = patched.view(-1, patched.shape[-1]), source.reshape(-1, source.shape[-1])
    for row in rows:
        for column in columns:
            if row < shape[0] and column < shape[1]:
                token = prefix + row * shape[1] + column
                flat[token] = donor[token]
    return patched


def activation_patching(
    blocks: Sequence[nn.Module],
    score: Callable[[Tensor], Tensor],
    image: Tensor,
    baseline: Tensor,
    layers: Sequence[int],
    prefix: int,
    finest: Shape,
) -> Tensor:
    """Return the change of the score with each patch, spread evenly over its square of finest cells, (row, column).

    Args:
        blocks: the blocks in the order in which they run.
        score: runs the module on pixels (1, channel, height, width) and returns one number.
        image, baseline: pixels.
        layers: indices of the patched blocks.
        prefix: number of prefix tokens.
        finest: rows and columns of patches in the first block.
    """
    sources = block_inputs(blocks, lambda: score(image))
    times = {layer: halvings(finest, sources[layer][0, ..., 0].numel() - prefix) for layer in layers}
    coarsest = max(times.values())
    height, width = halved(finest, coarsest)
    alone, values = score(baseline), torch.zeros(finest, dtype=torch.float64)

    def put(layer: int, row: int, column: int) -> Callable[..., Any]:
        side = 2 ** (coarsest - times[layer])
        rows, columns = (range(first * side, (first + 1) * side) for first in (row, column))

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            stream = with_patch(stream, sources[layer], prefix, halved(finest, times[layer]), rows, columns)
            return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

        return hook

    for row in range(height):
        for column in range(width):
            handles = [
                blocks[layer].register_forward_pre_hook(put(layer, row, column), with_kwargs=True) for layer in layers
            ]
            change = score(baseline) - alone
            for handle in handles:
                handle.remove()
            side = 2**coarsest
            cells = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            values[cells] = change / side**2
    return values
