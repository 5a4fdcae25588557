"""Tests of recorded calls: whether they are the model's attention, and whether the blocks form a chain."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from vitscope.attention.axes import head_count
from vitscope.attention.flow import call_bit
from vitscope.attention.omitted import OmittedCall
from vitscope.attention.softmax_use import SoftmaxUse
from vitscope.attention.unsupported import BLOCK_BY_BLOCK, WITHOUT_ATTENTION, unsupported_attention
from vitscope.errors import NoAttentionError, UnsupportedModelError
from vitscope.grid import Grid
from vitscope.tracing.recorder import RecordedCall


def check_softmax_uses(blocks: Sequence[RecordedCall], uses: Mapping[int, SoftmaxUse]) -> None:
    """Check that every softmax of a block multiplies the values unchanged.

    Raises:
        UnsupportedModelError: a module changes the result of its softmax before it multiplies the values.
    """
    for block in blocks:
        use = uses[block.index] if block.is_softmax else None
        if use is not None and not use.multiplies and use.changes:
            changes = ", ".join(dict.fromkeys(use.changes))
            raise unsupported_attention(
                block.name, f"it changes the result of its softmax ({changes}) before multiplying the values"
            )


def check_module_runs(blocks: Sequence[RecordedCall], module: nn.Module) -> None:
    """Check that no module runs several attention calls in parallel, or a separate call for each head.

    Raises:
        UnsupportedModelError: a module does either.
    """
    runs: dict[int, list[RecordedCall]] = defaultdict(list)
    for block in blocks:
        runs[block.invocation].append(block)
    for run in runs.values():
        for i, later in enumerate(run):
            if any(not later.input_mask & call_bit(earlier.index) for earlier in run[:i]):
                raise unsupported_attention(
                    later.name, f"it runs {len(run)} attention calls in parallel and combines their results"
                )
        if len(run) > 1 and len(run) == head_count(module, run[0].module):
            raise unsupported_attention(run[0].name, f"it runs {len(run)} separate attention calls, one for each head")


def why_unchained(blocks: Sequence[RecordedCall], output: int | None) -> str | None:
    """Return why the blocks do not form a chain, or None if each depends on the one before it.

    Args:
        blocks: the blocks in the order in which they ran.
        output: mask of the model's output; None if unknown.
    """
    for earlier, later in itertools.pairwise(blocks):
        if not later.input_mask & call_bit(earlier.index):
            if earlier.module == later.module:
                relation = f"{later.name} runs twice in parallel"
            else:
                relation = f"{earlier.name} and {later.name} run in parallel"
            return f"{relation}, so there is no order in which to multiply their attention matrices: {BLOCK_BY_BLOCK}"
    if blocks and output is not None and not output & call_bit(blocks[-1].index):
        return f"the output of the model does not depend on its last block, {blocks[-1].name}: {BLOCK_BY_BLOCK}"
    return None


def why_incomplete(paths: Sequence[str], calls: Sequence[RecordedCall], backbone: str) -> str | None:
    """Return why the attention of a known block is missing, or None if each block made an attention call.

    Args:
        paths: paths of the blocks inside the backbone.
        calls: all attention calls of the run.
        backbone: path of the vision transformer inside the model; empty for the model itself.
    """
    prefix = f"{backbone}." if backbone else ""
    for path in paths:
        if not any(f"{call.module}.".startswith(f"{prefix}{path}.") for call in calls):
            return (
                f"{prefix}{path} mixes tokens without attention that vitscope can observe, so the product of the "
                f"attention matrices leaves it out: {BLOCK_BY_BLOCK}"
            )
    return None


def first_blocks(blocks: Sequence[RecordedCall]) -> tuple[int, ...]:
    """Return the indices of the blocks that depend on no other block."""
    bits = [call_bit(block.index) for block in blocks]
    return tuple(index for index, block in enumerate(blocks) if not block.input_mask & sum(bits[:index]))


def no_blocks_error(
    name: str, grid: Grid | None, omitted: Sequence[OmittedCall], backbone: str
) -> UnsupportedModelError:
    """Return the error for a run in which no attention call is a block.

    Args:
        name: name of the model.
        grid: its token grid; None if unknown.
        omitted: all attention calls of the run.
        backbone: path of the vision transformer inside the model; empty for the model itself.
    """
    if not omitted:
        return NoAttentionError(f"{name} has no attention that vitscope can observe: {WITHOUT_ATTENTION}")
    inside = [call for call in omitted if call.reason != "outside the backbone"]
    if not inside:
        return UnsupportedModelError(
            f"none of the {len(omitted)} attention calls of {name} is inside its backbone {backbone!r}, e.g. "
            f"{omitted[0]}: pass another backbone to vitscope.load"
        )
    square = [call for call in inside if call.queries == call.keys and call.reason == "other tokens"]
    if grid is not None and square:
        sizes = ", ".join(str(size) for size in dict.fromkeys(call.keys for call in square))
        tokens = f"{grid.prefix} before {grid.height}×{grid.width} patches"
        return UnsupportedModelError(
            f"{name} attends among {sizes} tokens ({len(square)} calls), but its layout says {grid.num_tokens} tokens "
            f"({tokens}): pass the right patch_size, prefix and readout to vitscope.load"
        )
    if all(call.reason == "not the image" for call in inside):
        return UnsupportedModelError(
            f"none of the {len(inside)} attention calls of {name} depends on the image, e.g. {inside[0]}: "
            f"{WITHOUT_ATTENTION}"
        )
    return UnsupportedModelError(
        f"none of the {len(inside)} attention calls of {name} is among image tokens alone, with as many queries as "
        f"keys, e.g. {inside[0]}: {WITHOUT_ATTENTION}"
    )
