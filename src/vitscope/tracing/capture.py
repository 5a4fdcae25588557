"""capture(): run a model once and record its attention."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitscope.attention.flow import IMAGE, Flow, call_bit, constants_of
from vitscope.attention.omitted import omission_warning
from vitscope.attention.patch_merging import Merge
from vitscope.attention.scores import HeadFusion
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.attention.tap import OnModule, Runner, Tap
from vitscope.attention.trace import Trace
from vitscope.errors import (
    CallError,
    ReadoutError,
    UnclearOutputError,
    UnknownModelError,
    UnsupportedModelError,
    VitscopeWarning,
    warn,
)
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.models.blocks import Block, blocks
from vitscope.models.inserted_tokens import names_of_inserted_tokens, with_inserted_tokens
from vitscope.models.layout import Layout
from vitscope.models.loader import load
from vitscope.models.vision_model import VisionModel
from vitscope.models.weights_hash import weights_hash
from vitscope.tracing.experiment import experiment, preserved_random_state
from vitscope.tracing.layer_selection import LayerSelection
from vitscope.tracing.recorder import CaptureTarget
from vitscope.tracing.recorder import Recorder as Recorder
from vitscope.tracing.verdicts import (
    check_module_runs,
    check_softmax_uses,
    first_blocks,
    no_blocks_error,
    why_incomplete,
    why_unchained,
)
from vitscope.tracing.verification import verify_readout
from vitscope.typing import ReadoutRow

VERSION = version("vitscope")


@dataclass(frozen=True, eq=False)
class CaptureResult:
    """The attention and the outputs of one run. Returned by :func:`run_and_capture`.

    Attributes:
        trace: attention of the run.
        logits: float32 (batch, class); None if the model has no classifier.
        calls: index of the attention call of each block of the trace, among all attention calls of the run.
        output: the tensor that the model returned: logits, features or, if its classes are unclear, another tensor.
        first_blocks: indices of the blocks that depend on no other block.
    """

    trace: Trace
    logits: Tensor | None
    calls: tuple[int, ...] = ()
    output: Tensor | None = None
    first_blocks: tuple[int, ...] = (0,)


def capture(model: VisionModel | nn.Module, images: Any, *, layers: Sequence[int] | None = None) -> Trace:
    """Run a model once and return a trace of its attention, computed by any kernel.

    The trace stores queries and keys instead of attention maps: 2 · heads · tokens · channels numbers per layer and
    image, in the dtype of the model. For small windows it stores the weights if they take no more memory. Weights,
    hooks and training flags of the model are unchanged afterwards, also after an exception.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: a path, a PIL image, a uint8 array (height, width, 3), a list of these, or a preprocessed tensor
            (batch, channel, height, width).
        layers: indices of the attention blocks to store, from 0; negative indices count from the end. The default is
            all blocks.

    Returns:
        The trace of all images.

    Raises:
        NoAttentionError: the model calls no attention that can be observed.
        UnsupportedModelError: the attention weights, the order of heads and windows, or the readout cannot be
            determined, or no attention is among the tokens of the image.
        CallError: a layer is out of range, or the images are not valid.
        ImageError: an image file cannot be read.
        WorkError: the model fails on the input.

    Warns:
        VitscopeWarning: attention calls that depend on the image are not in the trace; ``trace.omitted`` lists them.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
        >>> trace.map(layer=-1, head="mean").shape
        torch.Size([1, 8, 8])
        >>> vs.rollout(trace).values.shape
        torch.Size([1, 8, 8])
    """
    return run_and_capture(model, images, layers=layers).trace


def run_and_capture(
    model: VisionModel | nn.Module,
    images: Any,
    *,
    layers: Sequence[int] | None = None,
    fuse: HeadFusion | None = None,
    start_layer: int = 0,
    merge: Merge | None = None,
    by_class: bool = True,
    watch: Mapping[nn.Module, OnModule] | None = None,
) -> CaptureResult:
    """Run a model once and return a trace of its attention together with its logits.

    The options omit what a method does not need, to save time and memory.

    Args:
        model: as for :func:`capture`.
        images: as for :func:`capture`.
        layers: as for :func:`capture`.
        fuse: head fusion of the stored weights, used if one map per layer takes less memory than queries and keys. The
            fused step computes softmax(q·kᵀ) itself, once, and uses it for the output too. None stores all heads.
        start_layer: index of the first block to store, from 0; earlier blocks run without being stored.
        merge: ``"equal"`` omits the inputs of patch merging, which are only needed for ``"norm"``.
        by_class: False omits the tokens of the classifier, which are only needed for a readout of one class.
        watch: functions by module, each called with the first argument and the output of its module.

    Returns:
        The trace and the logits.

    Raises:
        NoAttentionError: as for :func:`capture`.
        UnsupportedModelError: as for :func:`capture`.
        CallError: as for :func:`capture`.
        ImageError: as for :func:`capture`.
        WorkError: as for :func:`capture`.

    Examples:
        >>> import skimage.data, vitscope as vs
        >>> from vitscope.tracing.capture import run_and_capture
        >>> result = run_and_capture(vs.load("vit-nano"), skimage.data.chelsea(), fuse="mean")
        >>> result.logits.shape, result.trace.num_layers
        (torch.Size([1, 10]), 6)
    """
    run = prepare_run(model, images)
    recorder = Recorder(run.target, len(run.pixels), run.grid, LayerSelection(layers), fuse, start_layer)
    watched = {**recorder.watched_modules(norms=merge != "equal", pooled=by_class), **(watch or {})}
    with torch.no_grad(), run.model.running():
        result = run.forward(recorder, watched)
    return replace(result, logits=None if result.logits is None else result.logits.float())


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A model with its input, ready to run under a tap. Returned by :func:`prepare_run`.

    Attributes:
        model: the model, with a verified layout.
        pixels: its input, (batch, channel, height, width).
        views: the photos.
        grid: token grid of the input; None if unknown.
        target: facts of the model for the recorder.
    """

    model: VisionModel
    pixels: Tensor
    views: Sequence[InputImage]
    grid: Grid | None
    target: CaptureTarget

    def forward(
        self,
        recorder: Recorder,
        watched: Mapping[nn.Module, OnModule],
        *,
        predict: Callable[[Tensor], tuple[Tensor | None, Tensor | None]] | None = None,
        softmax_tracker: SoftmaxTracker | None = None,
        run: Runner | None = None,
    ) -> CaptureResult:
        """Run the model once under a tap. The logits have the dtype of the model.

        Args:
            recorder: recorder of the attention calls.
            watched: functions by module, see :meth:`~vitscope.attention.tap.Tap.follow`.
            predict: function that runs the model and returns its logits, or None, and its output.
            softmax_tracker: tracker of the softmaxes; None for a new one.
            run: see :class:`~vitscope.attention.tap.Tap`.
        """
        model, flow = self.model, Flow(constants_of(self.model.module))
        softmax_tracker = softmax_tracker or SoftmaxTracker()
        pixels = self.pixels.view_as(self.pixels)  # the image's mask belongs to a new tensor, which no caller holds
        flow.set_mask(pixels, IMAGE)
        tap = Tap(model.module, recorder, flow, softmax_tracker, run)
        recorder.running = lambda: tap.module
        with tap, tap.follow(watched):
            logits, output = _logits_and_output(model, pixels) if predict is None else predict(pixels)
        trace = _trace(model, recorder, self.views, pixels, softmax_tracker, flow.mask_or_none(output), logits)
        calls = tuple(block.index for block in recorder.blocks)
        return CaptureResult(trace, logits, calls, output, first_blocks(recorder.blocks))


def prepare_run(model: VisionModel | nn.Module, images: Any) -> PreparedRun:
    """Return a model with the input for its images, after its layout was verified.

    Raises:
        UnsupportedModelError: as for :func:`capture`.
        CallError: as for :func:`capture`.
        ImageError: as for :func:`capture`.
    """
    model = as_vision_model(model)
    pixels, views = model.prepare(images)
    if not model.verified:
        model = _with_verified_layout(model, pixels[:1])
    evidence = experiment(model, (pixels.shape[-2], pixels.shape[-1]), pixels.shape[1])
    grid = None if model.layout is None else model.layout.grid(*pixels.shape[-2:])
    return PreparedRun(model, pixels, views, grid, CaptureTarget.from_model(model, evidence))


def blocks_or_none(model: VisionModel) -> Sequence[Block]:
    """Return the blocks of a model's backbone; none if they are unknown."""
    try:
        return blocks(model.module.get_submodule(model.backbone))
    except UnknownModelError:
        return ()


def _logits_and_output(model: VisionModel, pixels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the logits, and the tensor that the model returned, which may not be logits."""
    try:
        logits = model.logits(pixels)
    except UnclearOutputError as error:
        return None, error.returned
    return logits, logits


# For each module and input size: the verified layout, or the error of its verification.
_verifications: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Layout | UnsupportedModelError]] = (
    WeakKeyDictionary()
)


def _with_verified_layout(model: VisionModel, pixels: Tensor) -> VisionModel:
    """Return the model with a verified layout, after its layout was derived from a contained module or a base class."""
    trusted = replace(model, verified=True)
    if model.layout is None:
        return trusted
    verifications = _verifications.setdefault(model.module, {})
    key = (*pixels.shape[-2:], model.layout.prefix_names, *sorted(model.layout.readout.items()))
    if key not in verifications:
        verifications[key] = _layout_or_error(trusted, model.layout, pixels)
    layout = verifications[key]
    if isinstance(layout, UnsupportedModelError):
        raise type(layout)(str(layout))
    return replace(trusted, layout=layout)


def _layout_or_error(model: VisionModel, layout: Layout, pixels: Tensor) -> Layout | UnsupportedModelError:
    """Return the layout if a run confirms it, or the error.

    A module around a known backbone may read the backbone's tokens differently. Its readout is then unknown, which is
    not an error.
    """
    with preserved_random_state(model.device), warnings.catch_warnings():
        warnings.simplefilter("ignore", VitscopeWarning)  # the capture itself will warn
        captured = run_and_capture(model, pixels)
        try:
            verify_readout(
                model,
                pixels,
                captured.trace,
                captured.calls,
                captured.first_blocks,
                has_classes=captured.logits is not None,
            )
        except ReadoutError as error:
            return replace(layout, readout={}) if model.backbone and not layout.readout_from_caller else error
        except UnsupportedModelError as error:
            return error
    return layout


def _trace(
    model: VisionModel,
    recorder: Recorder,
    images: Sequence[InputImage],
    pixels: Tensor,
    softmax_tracker: SoftmaxTracker,
    output_mask: int | None,
    logits: Tensor | None,
) -> Trace:
    """Return the trace of a run, after checking that the recorded calls are the model's attention."""
    uses = softmax_tracker.uses
    omitted = tuple(
        replace(call, reason="not read")
        if output_mask is not None and not output_mask & call_bit(recorded.index)
        else call
        for recorded, call in recorder.omitted
        if not recorded.is_softmax or uses[recorded.index].multiplies
    )
    if recorder.count == 0:
        raise no_blocks_error(model.name, recorder.grid, omitted, model.backbone)
    check_softmax_uses(recorder.blocks, uses)
    if recorder.hierarchy is None:
        check_module_runs(recorder.blocks, model.module)
    message = omission_warning(model.name, omitted, recorder.count)
    if message is not None:
        warn(message)
    paths = [block.path for block in blocks_or_none(model)]
    calls = [*recorder.blocks, *(recorded for recorded, _ in recorder.omitted)]
    labels_fit = logits is None or logits.shape[-1] == len(model.labels or ())
    return Trace(
        steps=recorder.selection.resolve(recorder.count),
        num_layers=recorder.count,
        readout=_readout(model, recorder, pixels),
        images=images,
        prefix_names=() if model.layout is None else model.layout.prefix_names,
        provenance=provenance(model),
        labels=model.labels if labels_fit else None,
        classifier=recorder.classifier,
        omitted=omitted,
        unchained=why_unchained(recorder.blocks, output_mask) or why_incomplete(paths, calls, model.backbone),
    )


def as_vision_model(model: Any) -> VisionModel:
    """Return a model as a VisionModel, whose layout names all tokens with which it runs; a live module is loaded first.

    Raises:
        CallError: it is neither a VisionModel nor an nn.Module.
    """
    if isinstance(model, VisionModel):
        return with_inserted_tokens(model)
    if isinstance(model, nn.Module):
        return with_inserted_tokens(load(model))
    raise CallError(f"a model is expected, from vitscope.load or an nn.Module, not {type(model).__name__}")


def provenance(model: VisionModel) -> dict[str, Any]:
    """Return the name, library, versions, readout, output, hash and preprocessing of a model, for saved results."""
    versions = {"vitscope": VERSION, "torch": torch.__version__, **(model.versions or {})}
    record: dict[str, Any] = {"model": model.name, "library": model.library, "versions": versions}
    if model.layout is not None:
        record["readout"] = dict(model.layout.readout)
        inserted = names_of_inserted_tokens(model.module)
        if inserted:
            record["inserted_tokens"] = list(inserted)
    record["output"] = model.meaning
    record["weights_sha256"] = weights_hash(model.module)
    preprocessing = model.preprocessing
    record["preprocessing"] = None if preprocessing is None else preprocessing.as_json()
    return record


def _readout(model: VisionModel, recorder: Recorder, pixels: Tensor) -> ReadoutRow | None:
    """Return the share of each token of the last grid in what the classifier reads; None if unknown."""
    layout, grid = model.layout, recorder.grid
    if layout is None or grid is None or not layout.readout:
        return None
    row = torch.zeros(len(pixels), grid.num_tokens, dtype=torch.float32, device=pixels.device)
    for source, weight in layout.readout.items():
        if source == "patches":
            row[:, grid.prefix :] += weight / grid.num_patches
        elif source == "tokens":
            row += weight / grid.num_tokens
        elif source == "pooling":
            if recorder.pooling is None:
                raise UnsupportedModelError(
                    f"the layout of {model.name} says that the classifier reads the attention of a pooling layer, but "
                    f"no pooling layer over all {grid.num_tokens} tokens or the {grid.num_patches} patches ran: pass "
                    "the right readout to vitscope.load"
                )
            row += weight * recorder.pooling
        else:
            row[:, layout.prefix_names.index(source)] += weight
    return row
