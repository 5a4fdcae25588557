"""Activation patching: the change in the output if a baseline's forward pass gets one patch of the image."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Unpack

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.step import require_index
from vitscope.attention.trace import Trace
from vitscope.attention.windows import PADDING
from vitscope.errors import CallError, UnsupportedModelError, warn
from vitscope.grid import Grid
from vitscope.interrupts import uninterrupted
from vitscope.methods._gradient import to_finest
from vitscope.methods._perturbation import one_by_one, perturbation_method, warn_if_interrupted
from vitscope.methods.attention_map import grid_of
from vitscope.models.blocks import Block, blocks
from vitscope.models.targets import one_per_image
from vitscope.models.thread_hooks import in_this_thread
from vitscope.models.vision_model import VisionModel
from vitscope.perturb.baselines import describe_hide
from vitscope.perturb.batching import BatchedPredictor, Evaluations
from vitscope.perturb.options import BatchArguments, PerturbationOptions
from vitscope.perturb.rendering import Subject, baseline_pixels, subjects
from vitscope.progress import ProgressCallback
from vitscope.results.attribution import Attribution
from vitscope.results.samples import ROUNDING_SHARE
from vitscope.tracing.capture import as_vision_model, run_and_capture
from vitscope.tracing.gradient_recorder import as_tokens
from vitscope.typing import ImageTarget, Pixels, Target
from vitscope.validation import require_integer

INSTEAD = "a method that hides pixels, such as vitscope.occlusion"


@perturbation_method(BatchArguments, output="logit")
def activation_patching(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    target: Target | None = None,
    layers: int | Sequence[int] | None = None,
    baseline: Any = "mean",
    **options: Unpack[BatchArguments],
) -> Attribution:
    """Explain a prediction by what the activations of each patch change in an image without information.

    The model runs once on the image, and once on the baseline for each patch. In this run, the token of the patch that
    enters each of the chosen blocks is replaced by the token that enters the block in the run of the image. The value
    of a patch is the output of this run minus the output for the baseline alone.

    A patch of blocks on different grids is a token of the coarsest one: on a finer grid, all tokens that are merged
    into it are replaced. Prefix tokens are not replaced.

    Reference: CAAP, 2026 (arXiv 2603.13652). This is a reading of its description in one sentence, not of its code.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: an image, a list of images, or a tensor (batch, 3, height, width) that is already preprocessed.
        target: what to explain, see :data:`~vitscope.typing.Target`; by default the most probable class of each image.
        layers: index of a block, or of several, from 0; negative from the end. By default the middle third of the
            blocks, which ``provenance["parameters"]["layers"]`` lists.
        baseline: the image without information: ``"mean"`` (of the image), ``"black"``, ``"grey"``, ``"blur"``,
            ``"noise"``, a colour, an image, or a preprocessed tensor of the same shape as the input.
        **options: see :class:`~vitscope.perturb.options.PerturbationOptions`.

    Returns:
        a signed attribution whose ``values`` (batch, height, width) are the changes. They lie on the finest grid; the
        tokens that are merged into a coarser token have equal shares of its change.

    Raises:
        CallError: a layer, the baseline or another option is out of range, or the model has no such class.
        KeyboardInterrupt: Ctrl-C was pressed before the first patch was evaluated. After that, Ctrl-C ends the
            evaluation early, with a warning.
        UnsupportedModelError: as for :func:`vitscope.capture`, or the blocks of the model or their tokens are unknown.
        WorkError: as for :func:`vitscope.lime`.

    Warns:
        VitscopeWarning: no patch changes the output.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> result = vs.activation_patching(vs.load("vit-nano"), skimage.data.chelsea(), target="cat")
        >>> result.values.shape, result.provenance["parameters"]["layers"]
        (torch.Size([1, 8, 8]), [2, 3])
    """
    settings = PerturbationOptions(**options)
    vision = as_vision_model(model)
    inputs = subjects(vision, images)
    if not inputs:
        raise CallError("no image was given")
    model_blocks = blocks(vision.module.get_submodule(vision.backbone))
    selected = _selected(layers, len(model_blocks), vision.name)
    name = "a tensor" if isinstance(baseline, Tensor) else describe_hide(baseline, "baseline")
    baselines = baseline_pixels(vision, inputs, baseline)

    def explain(item: tuple[Subject, Pixels, ImageTarget | None], report: ProgressCallback) -> Attribution:
        subject, origin, image_target = item
        predictor = _PatchedModel(vision, subject, origin, model_blocks, selected, settings, report)
        column = predictor.target(image_target)
        evaluations = predictor.evaluate(column)
        samples = int(evaluations.evaluated.sum())
        warn_if_interrupted(evaluations.interrupted, samples, len(evaluations.evaluated))
        parameters = {"layers": selected, "baseline": name, "output": predictor.output_of(column)}
        record = {"method": "activation_patching", "parameters": parameters, "samples": samples}
        trace, grid = predictor.trace, grid_of(predictor.trace)
        return Attribution(
            grid.patches(predictor.values(evaluations, column)),
            grid,
            [subject.view],
            {**trace.provenance, **record, "interrupted": evaluations.interrupted},
            predictor.label(column),
            True,
        )

    items = list(zip(inputs, baselines, one_per_image(target, len(inputs)), strict=True))
    results = one_by_one(items, explain, lambda result: bool(result.provenance["interrupted"]), settings.progress)
    return results[0] if len(inputs) == 1 else results[0].join(results)


def _selected(layers: Any, num_layers: int, name: str) -> list[int]:
    """Return the indices of the blocks whose input is patched, in order."""
    if layers is None:
        return list(range(num_layers // 3, num_layers - num_layers // 3))
    if isinstance(layers, str):
        raise CallError(f"layers is {layers!r}: pass the index of a block, or a list of several")
    indices = list(layers) if hasattr(layers, "__iter__") else [require_integer(layers, "layers")]
    if not indices:
        raise CallError("layers is empty: pass at least one block, or omit layers for the middle third of the blocks")
    return sorted({require_index(index, num_layers, "layer", name) % num_layers for index in indices})


@dataclass(frozen=True, eq=False)
class _Patches:
    """The tokens of one block that are replaced, patch by patch.

    Attributes:
        grid: token grid of the block.
        index: the patch that each token belongs to; −1 for a prefix token.
        activations: the tokens that enter the block in the run of the image, (1, token, channel).
    """

    grid: Grid
    index: Int[Tensor, " token"]
    activations: Tensor


class _PatchedModel(BatchedPredictor):
    """A model and one image: the outputs for the baseline with single patches of the image.

    Args:
        model, subject, options, report: see :class:`~vitscope.perturb.batching.BatchedPredictor`.
        baseline: the model's input for the baseline, (1, channel, height, width).
        model_blocks: the blocks of the model.
        selected: indices of the blocks whose input is patched.
    """

    def __init__(
        self,
        model: VisionModel,
        subject: Subject,
        baseline: Pixels,
        model_blocks: Sequence[Block],
        selected: Sequence[int],
        options: PerturbationOptions,
        report: ProgressCallback,
    ) -> None:
        super().__init__(model, subject, options, report=report)
        self._baseline, self._modules = baseline, [block.module for block in model_blocks]
        streams: list[Tensor] = []
        with _block_inputs(self._modules, lambda _, stream: streams.append(stream)):
            self._logits(subject.pixels)
        self.trace = run_and_capture(model, subject.pixels, merge="equal", by_class=False).trace
        if len(streams) != self.trace.num_layers:
            raise UnsupportedModelError(
                f"{len(streams)} blocks of {model.name} are known and {self.trace.num_layers} attend, so their inputs "
                f"cannot be patched: use {INSTEAD}"
            )
        if self.trace.unchained is not None:
            raise UnsupportedModelError(
                f"the blocks of {model.name} do not run one after the other, so a patch has no single token in each: "
                f"use {INSTEAD}"
            )
        grids = [self.trace.step(layer).require_grid() for layer in selected]
        self._grid = min(grids, key=lambda grid: grid.num_patches)
        indices = _patches_by_grid(self.trace, self._grid, subject.pixels.device)
        if not set(grids) <= set(indices):
            raise UnsupportedModelError(
                f"the blocks {', '.join(map(str, selected))} of {model.name} have different tokens, and how these are "
                "merged is unknown: pass layers with the same token grid"
            )
        self._to_finest(torch.zeros(self._grid.num_patches, device="cpu"))  # refuse before the evaluation
        self._patches = {
            layer: _Patches(grid, indices[grid], as_tokens(streams[layer], 1, grid, model.name, INSTEAD))
            for layer, grid in zip(selected, grids, strict=True)
        }

    def evaluate(self, column: int) -> Evaluations:
        """Return the outputs for the baseline alone, and then for the baseline with each patch of the image."""
        num_variants = 1 + self._grid.num_patches

        def finish(batch: list[int], _: Any) -> Tensor:
            pixels = self._baseline.expand(len(batch), -1, -1, -1)
            patch = torch.tensor(batch, device=pixels.device) - 1
            with _block_inputs(self._modules, lambda layer, stream: self._patched(layer, stream, patch)):
                return self._logits(pixels)

        no_preparation: Callable[..., None] = lambda *_: None  # noqa: E731
        return self._evaluate(num_variants, self._batches_in_order(num_variants), no_preparation, finish, [column])

    def values(self, evaluations: Evaluations, column: int) -> Tensor:
        """Return the changes of the output as values of the tokens of the finest grid, (1, token).

        Patches that were not evaluated have no change.

        Warns:
            VitscopeWarning: no patch changes the output.
        """
        outputs = torch.from_numpy(evaluations.outputs[:, 0])
        changes = (outputs[1:] - outputs[0]).nan_to_num(nan=0.0)
        if float(changes.abs().max()) <= ROUNDING_SHARE * self._magnitude(column):
            changes = torch.zeros_like(changes)
            warn(
                f"activation_patching of {self.label(column)!r} is zero everywhere: no patch changes the "
                f"{self.output_of(column)} of the baseline"
            )
        return self._to_finest(changes.float())

    def _to_finest(self, changes: Tensor) -> Tensor:
        """Return one number per patch, (patch,), as values of the tokens of the finest grid, (1, token)."""
        tokens = torch.cat([changes.new_zeros(self._grid.prefix), changes])[None]
        values, _ = to_finest(self.trace, tokens.to(self.subject.pixels.device), self._grid, "activation_patching")
        return values.cpu()

    def _patched(self, layer: int, stream: Tensor, patch: Int[Tensor, " batch"]) -> Tensor | None:
        """Return the input of a block with one patch of the image in each row; −1 for none."""
        patches = self._patches.get(layer)
        if patches is None:
            return None
        tokens = as_tokens(stream, len(patch), patches.grid, self.model.name, INSTEAD)
        belongs = (patches.index == patch[:, None]) & (patch[:, None] >= 0)
        return torch.where(belongs[..., None], patches.activations, tokens).view_as(stream)


def _patches_by_grid(trace: Trace, coarsest: Grid, device: torch.device) -> dict[Grid, Int[Tensor, " token"]]:
    """Return the patch of each token, for a grid whose tokens are the patches and for the grids before it."""
    index = torch.arange(coarsest.num_tokens, device=device) - coarsest.prefix
    indices = {coarsest: index.clamp_min(-1)}
    for step in reversed(trace.steps):
        if isinstance(step, MergeStep) and step.merged_grid in indices:
            is_token = step.groups != PADDING
            merged = indices[step.merged_grid][:, None].expand_as(step.groups)
            index = torch.full((step.grid.num_tokens,), -1, device=merged.device)
            index[step.groups[is_token]] = merged[is_token]
            indices[step.grid] = index
    return indices


@contextmanager
def _block_inputs(modules: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While held, replace the input of each block that runs in this thread by ``change(layer, input)``, if not None."""
    layers = count()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = change(next(layers), args[0] if args else kwargs["hidden_states"])
        if stream is None:
            return None
        return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})

    handles: list[Any] = []
    try:
        with uninterrupted():
            for module in modules:
                handles.append(module.register_forward_pre_hook(in_this_thread(enter), with_kwargs=True))
        yield
    finally:
        with uninterrupted():
            for handle in handles:
                handle.remove()
