"""Attention without artefact tokens: they are left out as keys, and each row is the softmax over the other tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from vitscope.attention.patch_merging import MergeStep
from vitscope.attention.scores import without_keys
from vitscope.attention.trace import Trace
from vitscope.display import ordinal
from vitscope.errors import CallError, UnsupportedModelError
from vitscope.images.image import InputImage
from vitscope.interventions.artefacts import Artefacts, artefact_tokens
from vitscope.models.vision_model import VisionModel
from vitscope.typing import Maps
from vitscope.validation import require_number, short_repr

DropArtefacts = bool | float | Artefacts


@dataclass(frozen=True, eq=False)
class DroppedArtefacts:
    """The artefact tokens that a map leaves out.

    Attributes:
        places: bool (image, height, width), the patches that are left out, on the CPU.
        threshold: norm above which a patch is left out; None if the norms have no valley.
        layer: index of the block after which norms are compared with the threshold.
        reason: why nothing is left out; empty if there is a threshold.
    """

    places: Bool[Tensor, "image height width"]
    threshold: float | None
    layer: int
    reason: str = ""

    @property
    def places_or_none(self) -> Bool[Tensor, "image height width"] | None:
        """The patches that are left out; None if there are none."""
        return self.places if bool(self.places.any()) else None

    @property
    def record(self) -> dict[str, Any]:
        """The threshold, and the number and the (row, column) of the patches of each image, for the provenance."""
        record: dict[str, Any] = {"threshold": self.threshold, "layer": self.layer}
        if self.reason:
            record["reason"] = self.reason
        patches = [places.nonzero().tolist() for places in self.places]
        return {**record, "count": [len(each) for each in patches], "patches": patches}

    def shares(self, maps: Maps) -> list[float]:
        """Return the share of each image's map, computed without dropping, that lies on these patches."""
        maps = maps.cpu()
        totals = maps.sum((1, 2)).clamp_min(torch.finfo(maps.dtype).tiny)
        return ((maps * self.places).sum((1, 2)) / totals).tolist()

    def summary(self, index: int = 0) -> str:
        """Return what is left out of one image, in a few words."""
        if self.reason:
            return "no artefacts, nothing is left out"
        places = self.places[index]
        return (
            f"{int(places.sum())} of {places.numel()} patches left out: norm above {self.threshold:.4g} after "
            f"{ordinal('block', self.layer)}"
        )

    def masked(self, trace: Trace) -> Trace:
        """Return a trace whose blocks and readout leave out the artefacts.

        In each head and block, the rows are the softmax over the remaining tokens. The readout is divided by the sum of
        the remaining tokens.

        Raises:
            UnsupportedModelError: a block attends in windows.
        """
        if not bool(self.places.any()):
            return trace
        steps = []
        for step in trace.steps:
            if isinstance(step, MergeStep) or not step.is_plain:
                raise UnsupportedModelError(
                    f"{step.module} works on windows, so artefacts cannot be dropped: pass drop_artefacts=False"
                )
            steps.append(replace(step, scores=without_keys(step.scores, self.tokens(trace))))
        readout = trace.readout
        if readout is not None:
            remaining = readout.masked_fill(self.tokens(trace).to(readout.device), 0.0)
            readout = remaining / remaining.sum(-1, keepdim=True)
        return replace(trace, steps=steps, readout=readout)

    def tokens(self, trace: Trace) -> Bool[Tensor, "image token"]:
        """Return the tokens of a trace that are left out, on the CPU."""
        patches = self.places.flatten(1)
        prefix = torch.zeros(len(patches), len(trace.prefix_names), dtype=torch.bool, device="cpu")
        return torch.cat([prefix, patches], dim=1)


def require_drop_artefacts(value: Any) -> DropArtefacts:
    """Return the option ``drop_artefacts``: False, True, a threshold, or artefacts.

    Raises:
        CallError: it is something else.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Artefacts):
        return value
    try:
        return require_number(value, "drop_artefacts")
    except CallError:
        raise CallError(
            f"drop_artefacts is {short_repr(value)}: pass True, a norm as the threshold, or the result of "
            "artefact_tokens"
        ) from None


def dropped_artefacts(
    trace: Trace, drop: DropArtefacts, model: VisionModel | nn.Module | Trace, images: Any = None
) -> DroppedArtefacts | None:
    """Return the artefacts to leave out of a trace; None for ``drop=False``.

    With a model, the norms of its images decide, for which these run once more. Without one, the artefacts are those
    found on the same photos.

    Args:
        trace: the run of the images.
        drop: see :func:`require_drop_artefacts`.
        model: the model of the trace; the trace itself if there is no model.
        images: the images of the trace, for a model.

    Raises:
        CallError: the artefacts belong to another model, another token grid or other photos; all patches of an image
            are above the threshold; or there is only a trace, and ``drop`` does not hold artefacts.
        UnsupportedModelError: as for :func:`vitscope.artefact_tokens`.
        WorkError: as for :func:`vitscope.artefact_tokens`.
    """
    if drop is False:
        return None
    if isinstance(drop, Artefacts):
        name = trace.provenance.get("model")
        if drop.model != name:
            raise CallError(f"drop_artefacts holds the artefacts of {drop.model}, and this model is {name}")
        if drop.threshold is None:
            return _nothing(trace, drop)
    if isinstance(model, Trace):
        return _checked(_found_on_the_same_photos(trace, drop))
    layer = drop.layer if isinstance(drop, Artefacts) else -1
    artefacts = artefact_tokens(model, images, layer=layer)
    threshold = artefacts.threshold if drop is True else drop.threshold if isinstance(drop, Artefacts) else drop
    if threshold is None:
        return _nothing(trace, artefacts)
    norms = artefacts.grid.patches(artefacts.norms[:, artefacts.layer])
    return _checked(DroppedArtefacts(norms > threshold, threshold, artefacts.layer))


def _nothing(trace: Trace, artefacts: Artefacts) -> DroppedArtefacts:
    """Return the record that artefacts were looked for, and that there are none."""
    grid = artefacts.grid
    places = torch.zeros(len(trace.images), grid.height, grid.width, dtype=torch.bool, device="cpu")
    return DroppedArtefacts(places, None, artefacts.layer, artefacts.summary)


def _found_on_the_same_photos(trace: Trace, drop: DropArtefacts) -> DroppedArtefacts:
    """Return the artefacts of the photos of a trace."""
    if not isinstance(drop, Artefacts):
        raise CallError(
            f"drop_artefacts is {drop}, but a trace holds no norms: pass the model with its images, or the result of "
            "artefact_tokens for the same images"
        )
    if drop.grid != trace.grid:
        raise CallError(
            f"drop_artefacts holds artefacts of {drop.grid}, and the trace has {trace.grid}: find the artefacts of the "
            "same run"
        )
    indices = [_index_of(image, drop.images) for image in trace.images]
    return DroppedArtefacts(drop.places[indices], drop.threshold, drop.layer)


def _index_of(image: InputImage, images: Sequence[InputImage]) -> int:
    """Return the index of an image among others, by its pixels."""
    for index, candidate in enumerate(images):
        if candidate.box == image.box and np.array_equal(np.asarray(candidate.photo), np.asarray(image.photo)):
            return index
    raise CallError(
        "drop_artefacts holds the artefacts of other images than the trace: pass the model with its images, or find "
        "the artefacts of these images"
    )


def _checked(dropped: DroppedArtefacts) -> DroppedArtefacts:
    """Return the artefacts if a patch of each image remains."""
    for index, places in enumerate(dropped.places):
        if bool(places.all()):
            raise CallError(
                f"all patches of image {index} have a norm above {dropped.threshold:.4g} after "
                f"{ordinal('block', dropped.layer)}, so no map would remain: pass a higher threshold"
            )
    return dropped
