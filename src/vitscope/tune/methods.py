"""Tuning methods: the weights that learn, and the layers that are added."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vitscope.errors import CallError
from vitscope.models.adapters import add_adapters
from vitscope.models.blocks import blocks
from vitscope.models.heads import WindowClassified, get_classifiers
from vitscope.models.vision_model import VisionModel
from vitscope.tune.low_rank import add_low_rank
from vitscope.validation import require_at_least

READS_WINDOWS = "window-cls"
ADAPTER_RANK, LORA_RANK, LORA_ALPHA = 64, 8, 16.0


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune a model.

    Attributes:
        description: the weights that learn besides the classifier.
        places: where adapters are added, as :func:`~vitscope.models.adapters.add_adapters` takes them.
        rank: default width of the adapters or of LoRA; None if the method has no rank.
    """

    description: str
    places: tuple[str, ...] = ()
    rank: int | None = None


TUNING_METHODS: Mapping[str, TuningMethod] = {
    "head": TuningMethod("the classifier alone"),
    "full": TuningMethod("every weight"),
    "bitfit": TuningMethod("every bias (Ben Zaken et al., 2021, arXiv 2106.10199)"),
    "layernorm": TuningMethod("scale and shift of every LayerNorm"),
    "adapter-attention": TuningMethod("a bottleneck after attention", ("attention",), ADAPTER_RANK),
    "adapter-mlp": TuningMethod(
        "a bottleneck after the MLP (Pfeiffer et al., 2020, arXiv 2005.00247)", ("mlp",), ADAPTER_RANK
    ),
    "adapter-both": TuningMethod(
        "a bottleneck after each (Houlsby et al., 2019, arXiv 1902.00751)", ("attention", "mlp"), ADAPTER_RANK
    ),
    "adapter-parallel": TuningMethod(
        "a bottleneck parallel to the MLP (AdaptFormer, Chen et al., 2022, arXiv 2205.13535)",
        ("parallel",),
        ADAPTER_RANK,
    ),
    READS_WINDOWS: TuningMethod("a CLS token in every window of a Swin, see vitscope.WindowHead"),
    "lora": TuningMethod("W + (α/r)·BA for queries and values (Hu et al., 2021, arXiv 2106.09685)", rank=LORA_RANK),
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """The changes that :func:`prepare` made to a model.

    Attributes:
        adapters: the adapters that were added, as
            :func:`~vitscope.models.checkpoints.serialization.save_folder` takes them; None if there are none.
        num_trained: number of weights that learn, without the classifier's.
        num_head: number of weights of the classifier.
        finish: a function that merges the layers that were added only for training into ordinary weights.
    """

    adapters: Mapping[str, Any] | None
    num_trained: int
    num_head: int
    finish: Callable[[], None]


def require_tuning(name: str) -> TuningMethod:
    """Return the tuning method of this name.

    Raises:
        CallError: there is no such method; the message suggests the closest name.
    """
    if name not in TUNING_METHODS:
        close = difflib.get_close_matches(name, TUNING_METHODS, n=1)
        hint = f": did you mean {close[0]}?" if close else f": choose {', '.join(TUNING_METHODS)}"
        raise CallError(f"unknown tuning {name!r}{hint}")
    return TUNING_METHODS[name]


def prepare(model: VisionModel, tuning: str, *, rank: int | None = None) -> Prepared:
    """Freeze and unfreeze the weights of a model, and add the layers of the tuning method; the logits do not change.

    Args:
        model: a model with its new classifier, from :func:`~vitscope.models.heads.reset_classifier`; changed in
            place.
        tuning: one of :data:`TUNING_METHODS`.
        rank: width of a bottleneck or of LoRA's matrices. By default 64 for adapters and 8 for LoRA, whose α is
            twice the rank.

    Raises:
        CallError: the method is unknown or has no rank, or the rank is below 1 or above four times the model's width.
    """
    method, module = require_tuning(tuning), model.module
    if rank is not None and method.rank is None:
        raise CallError(f"{tuning} has no rank: pass rank for adapters and lora only")
    rank = _require_rank(rank, module) if rank is not None else method.rank
    adapters: Mapping[str, Any] | None = None
    finish: Callable[[], None] = lambda: None  # noqa: E731
    for parameter in module.parameters():
        parameter.requires_grad_(tuning == "full")
    if tuning == "bitfit":
        _unfreeze(parameter for name, parameter in module.named_parameters() if _is_bias(name))
    elif tuning == "layernorm":
        norms = [child for child in module.modules() if isinstance(child, nn.LayerNorm)]
        _unfreeze(parameter for norm in norms for parameter in norm.parameters())
    elif isinstance(module, WindowClassified):
        _unfreeze(module.reader.parameters())
    elif method.places:
        assert rank is not None
        add_adapters(module, method.places, rank)
        adapters = {"places": list(method.places), "rank": rank}
    elif tuning == "lora":
        assert rank is not None
        finish = add_low_rank(module, rank, LORA_ALPHA * rank / LORA_RANK)
    head = [parameter for layer in get_classifiers(model) for parameter in layer.parameters()]
    _unfreeze(head)
    num_unfrozen = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    num_head = sum(parameter.numel() for parameter in head)
    return Prepared(adapters, num_unfrozen - num_head, num_head, finish)


def _require_rank(rank: int, module: nn.Module) -> int:
    """Return the rank if it is at most four times the width, like an MLP's: more would only cost memory."""
    most = 4 * max(block.width for block in blocks(module))
    if require_at_least(1, rank, "rank") > most:
        raise CallError(f"rank is {rank}: choose at most {most}, four times the width of this model")
    return rank


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def _unfreeze(parameters: Any) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
