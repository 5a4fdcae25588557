"""Code that the gradient methods share: batches, maps on the finest grid, and the result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor

from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.rules import RuleName
from vitscope.attention.step import AttentionStep
from vitscope.attention.trace import Trace
from vitscope.errors import CallError, UnsupportedModelError, WorkError, warn
from vitscope.grid import Grid
from vitscope.images.reading import photos
from vitscope.models.evaluation import lacks_memory
from vitscope.models.targets import SIMILARITY, Score, target_list
from vitscope.results.attribution import Attribution
from vitscope.tracing.gradients import GradientCapture
from vitscope.validation import require_finite_tensor

Result = TypeVar("Result")

# Entries of the provenance that are lists with one value per image.
PER_IMAGE = ("score", "completeness", "convergence", "row_sums", "padding_mass", "relevance", "padding_relevance")

# Methods whose gradients are those at other points than the image alone.
AVERAGED = ("integrated_gradients", "smooth_grad", "transition_attention", "le_grad")
OWN_REFERENCE = 1e-6  # distance of a cosine similarity from 1 that is rounding


def require_choice(value: Any, choices: Any, name: str) -> Any:
    """Return a value if it is one of the choices of a Literal.

    Raises:
        CallError: it is none of them.
    """
    if value not in get_args(choices):
        raise CallError(f"{name} is {value!r}: choose {', '.join(map(str, get_args(choices)))}")
    return value


def require_rules(rules: Any) -> RuleName:
    """Return the name of a rule set.

    Raises:
        CallError: it is unknown.
    """
    name: RuleName = require_choice(rules, RuleName, "rules")
    return name


def in_batches(images: Any, target: Any, explain: Callable[[Any, Any], Attribution]) -> Attribution:
    """Return the result of ``explain(images, target)``, in halves if there is not enough memory.

    Raises:
        WorkError: there is not enough memory for a single image.
    """

    def join(batches: Sequence[Attribution]) -> Attribution:
        joined = batches[0].join([result for batch in batches for result in batch])
        return replace(joined, provenance=_joined_provenance([batch.provenance for batch in batches]))

    return _with_records(in_halves(images, target, explain, join))


def in_halves(
    images: Any,
    target: Any,
    explain: Callable[[Any, Any], Result],
    join: Callable[[Sequence[Result]], Result],
) -> Result:
    """Return the result of ``explain(images, target)``, joined from two halves if there is not enough memory.

    Raises:
        WorkError: there is not enough memory for a single image.
    """
    images, target = images if isinstance(images, Tensor) else photos(images), target_list(target)
    count = len(images)
    try:
        # Tensors that a caller's inference mode creates could not enter a graph.
        with torch.inference_mode(False), torch.no_grad():
            return explain(images, target)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        if count < 2:
            raise WorkError(
                "not enough memory for the gradients of a single image: use a smaller model or image size"
            ) from error
    half = count // 2
    warn(f"not enough memory for a batch of {count}: continuing with {half}")
    return join(
        [
            in_halves(images[items], target[items] if isinstance(target, list) else target, explain, join)
            for items in (slice(0, half), slice(half, count))
        ]
    )


def _with_records(result: Attribution) -> Attribution:
    """Return the result of a batch with the provenance of each image, so that ``result[i]`` has its own target."""
    record = {name: entry for name, entry in result.provenance.items() if name != "images"}
    if len(result) == 1:
        return result
    images = []
    for index, label in enumerate(record["parameters"]["target"]):
        lists = {name: [record[name][index]] for name in PER_IMAGE if name in record}
        parameters = {**record["parameters"], "target": [label]}
        images.append({**record, **lists, "parameters": parameters, "target": label})
    return replace(result, provenance={**record, "images": images})


def _joined_provenance(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the provenance of a batch from that of its parts: lists with an entry per image are joined."""
    targets = [label for record in records for label in record["parameters"]["target"]]
    lists = {name: [entry for record in records for entry in record[name]] for name in PER_IMAGE if name in records[0]}
    return {**records[0], "parameters": {**records[0]["parameters"], "target": targets}, **lists}


def to_finest(trace: Trace, tokens: Tensor, grid: Grid, method: str) -> tuple[Tensor, Tensor]:
    """Return values of the tokens of a grid as values of the finest tokens, with equal shares in patch merging.

    Args:
        trace: the run.
        tokens: (batch, token) of ``grid``.
        grid: a grid of the run.
        method: name of the method, for messages.

    Returns:
        (batch, finest token), and the part on padding, (batch,).

    Raises:
        UnsupportedModelError: the path from the finest grid to this one is unknown.
    """
    rows, padding = tokens[:, None], tokens.new_zeros(len(tokens))
    if grid == trace.grid:
        return tokens, padding
    trace.require_chain(method)
    started = False
    for step in reversed(trace.steps):
        if isinstance(step, MergeStep) and (started or step.merged_grid == grid):
            started = True
            rows, on_padding = step.pull(rows, "equal")
            padding = padding + on_padding[:, 0]
    count = trace.step(0).require_grid().num_tokens
    if rows.shape[-1] != count:
        raise UnsupportedModelError(
            f"{method} is not available for this model: how its {count} tokens become {grid.num_tokens} in a later "
            "block is unknown; use input_x_gradient"
        )
    return rows[:, 0], padding


def from_windows(step: AttentionStep, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return values of the slots of a block's windows as values of tokens.

    Args:
        step: the block.
        values: (batch, window, slot).

    Returns:
        (batch, token), and the sum on padding, (batch,).
    """
    if step.is_plain:
        return values[:, 0], values.new_zeros(len(values))
    slots = step.require_slots()
    is_token = slots >= 0
    tokens = values.new_zeros(len(values), step.require_grid().num_tokens)
    tokens[:, slots[is_token]] = values[:, is_token]
    return tokens, (values * ~is_token).sum((1, 2))


def pixel_map(run: GradientCapture, relevance: Tensor) -> tuple[Tensor, Grid]:
    """Return the relevance of pixels, (batch, height, width), in the region that the patches cover, and its grid."""
    grid, layout = run.trace.grid, run.model.layout
    if grid is None or layout is None:
        return relevance, Grid(*relevance.shape[1:])
    height, width = grid.height * layout.patch_size[0], grid.width * layout.patch_size[1]
    bottom, right = max(height - relevance.shape[1], 0), max(width - relevance.shape[2], 0)
    relevance = torch.nn.functional.pad(relevance, (0, right, 0, bottom))[:, :height, :width]
    return relevance, Grid(height, width)


def _warn_of_own_references(method: str, score: Score) -> None:
    """Warn if an image is the reference of its own similarity, which is then at its maximum."""
    targets = score.fixed_target if isinstance(score.fixed_target, list) else []
    similarities = zip(targets, score.values.tolist(), strict=False)
    own = [
        index
        for index, (target, value) in enumerate(similarities)
        if target.output == SIMILARITY != target.label and value > 1 - OWN_REFERENCE
    ]
    if own:
        images = f"image{'s' * (len(own) > 1)} {', '.join(map(str, own))}"
        warn(
            f"{images} of {len(targets)} and the reference of SimilarTo are the same: their similarity is at its "
            f"maximum, where its gradient is zero, so {method} shows rounding noise; pass target='similarity', or use "
            "vitscope.occlusion"
        )


def without_rounding(values: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a map, with zeros for an image in which all sums cancel, so that only their rounding is left.

    Args:
        values: sums of signed terms, (batch, …).
        magnitude: the same sums of the absolute terms.
        dtype: precision of the terms.
    """
    share = min(8 * torch.finfo(dtype).eps, 0.01)
    is_rounding = values.abs().flatten(1).amax(1) <= share * magnitude.flatten(1).amax(1)
    return values.masked_fill(is_rounding.view(-1, *(1,) * (values.ndim - 1)), 0.0)


def gradient_result(
    run: GradientCapture,
    method: str,
    parameters: Mapping[str, Any],
    score: Score,
    values: Tensor,
    grid: Grid,
    *,
    signed: bool,
    facts: Mapping[str, Any] | None = None,
) -> Attribution:
    """Return the result of a gradient method.

    Args:
        run: the run.
        method: name of the method.
        parameters: its options.
        score: what was differentiated.
        values: (batch, height, width).
        grid: grid of the values.
        signed: whether negative values oppose the target.
        facts: other entries of the provenance.

    Warns:
        VitscopeWarning: the map of an image is zero everywhere, or rounding noise.
    """
    if method not in AVERAGED:
        _warn_of_own_references(method, score)
    values = require_finite_tensor(values.detach().float(), method)
    for label, image in zip(score.labels, values, strict=True):
        if not bool(image.any()):
            reason = "does not depend on" if signed else "is not raised by"
            warn(f"{method} of {label!r} is zero everywhere: its {score.output} {reason} these activations")
    provenance = {
        **run.trace.provenance,
        "method": method,
        "parameters": {**parameters, "target": list(score.labels), "output": score.output},
        "dtype": str(run.dtype).removeprefix("torch."),
        "score": score.values.detach().double().tolist(),
        **(facts or {}),
    }
    return Attribution(values, grid, run.trace.images, provenance, score.label, signed)
