"""Whether what was seen of a run is the model's attention, and whether its blocks follow one another."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

from vitscope.attention.axes import head_count
from vitscope.attention.flow import call_bit
from vitscope.attention.omitted import OmittedCall
from vitscope.attention.softmax_use import Use
from vitscope.errors import NoAttentionError, UnsupportedModelError, VitscopeError
from vitscope.grid import Grid
from vitscope.tracing.recorder import AttentionNote


def check_weights(blocks: Sequence[AttentionNote], uses: Mapping[int, Use]) -> None:
    """Refuse a model that changes a softmax before it multiplies the values."""
    for block in blocks:
        if block.is_softmax and not uses[block.index].multiplies and uses[block.index].changes:
            changes = ", ".join(dict.fromkeys(uses[block.index].changes))
            raise UnsupportedModelError(
                f"{_name(block)} changes the result of its softmax ({changes}) before anything multiplies the values, "
                "so the softmax is not the attention that the model computes and cannot be shown as such"
            )


def check_modules(blocks: Sequence[AttentionNote], module: nn.Module) -> None:
    """Refuse a module that attends several times in one run, side by side or one head at a time."""
    runs: dict[int, list[AttentionNote]] = defaultdict(list)
    for block in blocks:
        runs[block.invocation].append(block)
    for run in runs.values():
        for i, later in enumerate(run):
            if any(not later.inputs & call_bit(earlier.index) for earlier in run[:i]):
                raise UnsupportedModelError(
                    f"{_name(later)} computes attention {len(run)} times side by side and combines the results, so "
                    "none of them alone is the attention of the block: it cannot be shown as such"
                )
        if len(run) > 1 and len(run) == head_count(module, run[0].module):
            raise UnsupportedModelError(
                f"{_name(run[0])} computes attention {len(run)} times in one run, one head at a time, and vitscope "
                "would take each head for a block: its attention cannot be shown"
            )


def why_unchained(blocks: Sequence[AttentionNote], output: int | None) -> str | None:
    """Return why blocks do not follow one another, or None if each depends on all before it.

    Args:
        blocks: the blocks in order of running.
        output: the mask of the model's output, or None if nothing is known of it.
    """
    for earlier, later in itertools.pairwise(blocks):
        if not later.inputs & call_bit(earlier.index):
            if earlier.module == later.module:
                what = f"{_name(later)} runs twice side by side"
            else:
                what = f"{_name(earlier)} and {_name(later)} run side by side: neither leads to the other"
            return f"{what}, so there is no order to multiply them in: attention_map shows each"
    if blocks and output is not None and not output & call_bit(blocks[-1].index):
        return (
            f"the output of the model does not depend on {_name(blocks[-1])}, its last block: attention_map shows each"
        )
    return None


def nothing_seen(name: str, grid: Grid | None, omitted: Sequence[OmittedCall], backbone: str) -> VitscopeError:
    """Return the error for a run that left no block."""
    if not omitted:
        return NoAttentionError(f"{name} has no attention that could be seen: vitscope explains vision transformers")
    inside = [call for call in omitted if call.reason != "outside the backbone"]
    if not inside:
        return UnsupportedModelError(
            f"{name} attends {len(omitted)} times, but never inside its backbone {backbone!r}, e.g. in {omitted[0]}"
        )
    square = [call for call in inside if call.queries == call.keys and call.reason == "other tokens"]
    if grid is not None and square:
        sizes = ", ".join(str(size) for size in dict.fromkeys(call.keys for call in square))
        prefix = f"{grid.prefix} before {grid.height}×{grid.width} patches"
        return UnsupportedModelError(
            f"{name} attends ({len(square)} calls of {sizes} tokens), but its layout says {grid.num_tokens} tokens "
            f"({prefix}): pass the right patch_size, prefix and readout to vitscope.load"
        )
    if all(call.reason == "not the image" for call in inside):
        return UnsupportedModelError(
            f"{name} attends {len(inside)} times, but none of it depends on the image, e.g. {inside[0]}"
        )
    return UnsupportedModelError(
        f"{name} attends {len(inside)} times, but never among the tokens of the image alone, e.g. in {inside[0]}: "
        "vitscope shows attention of as many queries as keys"
    )


def _name(note: AttentionNote) -> str:
    return note.module or "the model itself"
