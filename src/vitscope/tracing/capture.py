"""capture(): run a model once and keep what its attention did."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vitscope.attention.flow import IMAGE, Flow, call_bit, constants_of
from vitscope.attention.omitted import warning
from vitscope.attention.patch_merging import Merge
from vitscope.attention.scores import HeadFusion
from vitscope.attention.softmax_use import SoftmaxUses
from vitscope.attention.tap import OnModule, Tap
from vitscope.attention.trace import Trace
from vitscope.errors import CallError, UnsupportedModelError, VitscopeWarning, warn
from vitscope.grid import Grid
from vitscope.images.image import InputImage
from vitscope.models.loader import load
from vitscope.models.outputs import UnclearOutputError
from vitscope.models.vision_model import Layout, VisionModel
from vitscope.tracing.experiment import experiment, preserved_random_state
from vitscope.tracing.layer_selection import LayerSelection as _Kept
from vitscope.tracing.recorder import Recorder as _Recorder
from vitscope.tracing.recorder import Target
from vitscope.tracing.verdicts import check_modules, check_weights, nothing_seen, why_unchained
from vitscope.tracing.verification import ReadoutError, verified_readout
from vitscope.typing import ReadoutRow


@dataclass(frozen=True, eq=False)
class CaptureResult:
    """A trace and what the model answered: logits (batch, class), or None without a classifier.

    ``calls`` numbers the attention calls of the run that are the trace's blocks.
    """

    trace: Trace
    logits: Tensor | None
    calls: tuple[int, ...] = ()


def capture(model: VisionModel | nn.Module, images: Any, *, layers: Sequence[int] | None = None) -> Trace:
    """Run the model once and keep its attention, whatever kernel computes it.

    Queries and keys are kept, not maps: for each layer 2 · heads · tokens · channels numbers in the model's dtype; of
    small windows the weights, where they take no more room.
    Weights, hooks and training flags are as before afterwards, also after an exception.

    Args:
        model: from :func:`vitscope.load`, or a live module.
        images: a path, PIL image or uint8 array (H, W, 3), a list of these, or a tensor (batch, 3, height, width)
            taken as already preprocessed.
        layers: keep only these attention blocks, negative from the end; all by default.

    Raises:
        NoAttentionError: the model has no attention.
        CallError: a layer is not there, or the images are not what is expected.

    Example:
        >>> import skimage.data, vitscope as vs
        >>> trace = vs.capture(vs.load("vit-nano"), skimage.data.chelsea())
        >>> trace.map(layer=-1, head="mean").shape
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
    """:func:`capture`, with the model's answer.

    Args:
        fuse: keep one map a layer, heads fused while the model runs, wherever that takes less memory than queries
            and keys. The fused step computes softmax(q·kᵀ) itself, once, and uses it for the output too.
        start_layer: blocks before this one run untouched and leave no step.
        merge: ``"equal"`` where the norms of patch merging will not be asked for.
        by_class: False where no class will be asked for.
        watch: modules whose first argument and output are asked for, and who asks.
    """
    model = as_vision_model(model)
    pixels, views = model.prepare(images)
    if not model.verified:
        model = _verified(model, pixels[:1])
    evidence = experiment(model, (pixels.shape[-2], pixels.shape[-1]), pixels.shape[1])
    grid = None if model.layout is None else model.layout.grid(*pixels.shape[-2:])
    target = Target.of(model, evidence)
    recorder = _Recorder(target, len(pixels), grid, _Kept(layers), fuse, start_layer)
    watched = {**recorder.watch(norms=merge != "equal", pooled=by_class), **(watch or {})}
    flow, uses = Flow(constants_of(model.module)), SoftmaxUses()
    pixels = pixels.view_as(pixels)  # a tensor of our own to follow
    flow.mark(pixels, IMAGE)
    tap = Tap(model.module, recorder, flow, uses)
    with torch.no_grad(), model.running(), tap, tap.follow(watched):
        logits, output = _answered(model, pixels)
    trace = _trace(
        model, recorder, views, pixels, uses, flow.known_mask(output), None if logits is None else logits.shape[-1]
    )
    return CaptureResult(trace, _in_float32(logits), tuple(block.index for block in recorder.blocks))


def _answered(model: VisionModel, pixels: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the logits, and the tensor that the model returned, which need not be logits."""
    try:
        logits = model.answer(pixels)
    except UnclearOutputError as error:
        return None, error.returned
    return logits, logits


# For each module, what the claims of its layout came to at an input size: the layout that holds, or an error.
_claims: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Layout | UnsupportedModelError]] = WeakKeyDictionary()


def _verified(model: VisionModel, pixels: Tensor) -> VisionModel:
    """Return a model whose layout was taken from a class that it contains or derives from, after verifying it.

    A module around a known backbone may read it in a way of its own: its readout is then unknown, not wrong.
    """
    believed = replace(model, verified=True)
    if model.layout is None:
        return believed
    claims = _claims.setdefault(model.module, {})
    claim = (*pixels.shape[-2:], *sorted(model.layout.readout.items()))
    if claim not in claims:
        claims[claim] = _verdict(believed, model.layout, pixels)
    verdict = claims[claim]
    if isinstance(verdict, UnsupportedModelError):
        raise type(verdict)(str(verdict))
    return replace(believed, layout=verdict)


def _verdict(model: VisionModel, layout: Layout, pixels: Tensor) -> Layout | UnsupportedModelError:
    with preserved_random_state(model.device), warnings.catch_warnings():
        warnings.simplefilter("ignore", VitscopeWarning)  # the capture itself will warn
        captured = run_and_capture(model, pixels)
        try:
            verified_readout(model, pixels, captured.trace, captured.calls, has_classes=captured.logits is not None)
        except ReadoutError as error:
            return replace(layout, readout={}) if model.backbone and not layout.states_readout else error
        except UnsupportedModelError as error:
            return error
    return layout


def _in_float32(logits: Tensor | None) -> Tensor | None:
    return None if logits is None else logits.float()


def _trace(
    model: VisionModel,
    recorder: _Recorder,
    images: Sequence[InputImage],
    pixels: Tensor,
    uses: SoftmaxUses,
    output: int | None,
    classes: int | None,
) -> Trace:
    """The trace of a run, after everything that was seen is found to be the model's attention."""
    omitted = tuple(
        replace(call, reason="not read") if output is not None and not output & call_bit(note.index) else call
        for note, call in recorder.omitted
        if not note.is_softmax or uses.uses[note.index].multiplies
    )
    if recorder.count == 0:
        raise nothing_seen(model.name, recorder.grid, omitted, model.backbone)
    check_weights(recorder.blocks, uses.uses)
    if recorder.hierarchy is None:
        check_modules(recorder.blocks, model.module)
    message = warning(model.name, omitted, recorder.count)
    if message is not None:
        warn(message)
    return Trace(
        steps=recorder.kept.resolve(recorder.count),
        num_layers=recorder.count,
        readout=_readout(model.layout, recorder.grid, recorder.pooling, len(pixels), pixels.device),
        images=images,
        prefix_names=() if model.layout is None else model.layout.prefix_names,
        provenance=provenance(model),
        labels=model.labels if classes in (None, len(model.labels or ())) else None,
        classifier=recorder.classifier,
        omitted=omitted,
        unchained=why_unchained(recorder.blocks, output),
    )


def as_vision_model(model: Any) -> VisionModel:
    """What the user passed, as a VisionModel."""
    if isinstance(model, VisionModel):
        return model
    if isinstance(model, nn.Module):
        return load(model)
    raise CallError(f"a model is expected, from vitscope.load or an nn.Module, not {type(model).__name__}")


def provenance(model: VisionModel) -> dict[str, Any]:
    """Which model in which libraries a result comes from."""
    versions = {"vitscope": version("vitscope"), "torch": torch.__version__, **(model.versions or {})}
    about: dict[str, Any] = {"model": model.name, "library": model.library, "versions": versions}
    if model.layout is not None:
        about["readout"] = dict(model.layout.readout)
    about["output"] = model.meaning
    prepared = model.preprocessing
    about["preprocessing"] = None if prepared is None else prepared.as_json()
    return about


def _readout(
    layout: Layout | None, grid: Grid | None, pooling: Tensor | None, batch: int, device: torch.device
) -> ReadoutRow | None:
    """The row over tokens that the classifier reads."""
    if layout is None or grid is None or not layout.readout:
        return None
    row = torch.zeros(batch, grid.num_tokens, dtype=torch.float32, device=device)
    for source, weight in layout.readout.items():
        if source == "patches":
            row[:, grid.prefix :] += weight / grid.num_patches
        elif source == "tokens":
            row += weight / grid.num_tokens
        elif source == "pooling":
            if pooling is None:
                raise UnsupportedModelError(
                    "the readout is a pooling layer's attention, but no such layer ran: none has other queries over "
                    f"all {grid.num_tokens} tokens or the {grid.num_patches} patches"
                )
            row += weight * pooling
        else:
            row[:, layout.prefix_names.index(source)] += weight
    return row
