"""The ways to tune a model: which weights learn, and what is put in for that."""

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
from vitscope.validation import at_least

READS_WINDOWS = "window-cls"
ADAPTER_RANK, LORA_RANK, LORA_ALPHA = 64, 8, 16.0


@dataclass(frozen=True)
class TuningMethod:
    """One row of the table: what learns besides the classifier."""

    about: str
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
        "a bottleneck beside the MLP (AdaptFormer, Chen et al., 2022, arXiv 2205.13535)", ("parallel",), ADAPTER_RANK
    ),
    READS_WINDOWS: TuningMethod("a CLS token in every window of a Swin, see vitscope.WindowHead"),
    "lora": TuningMethod("W + (α/r)·BA for queries and values (Hu et al., 2021, arXiv 2106.09685)", rank=LORA_RANK),
}


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model ready to train.

    Attributes:
        adapters: what was put in and stays, as :func:`~vitscope.models.checkpoints.serialization.save_folder` wants
            it; None for nothing.
        num_trained: weights that learn, the classifier's not counted.
        num_head: the classifier's.
        finish: turns what was only put in for training into ordinary weights.
    """

    adapters: Mapping[str, Any] | None
    num_trained: int
    num_head: int
    finish: Callable[[], None]


def require_tuning(name: str) -> TuningMethod:
    """The row of the table, or one line that offers the nearest."""
    if name not in TUNING_METHODS:
        close = difflib.get_close_matches(name, TUNING_METHODS, n=1)
        hint = f": did you mean {close[0]}?" if close else f": choose {', '.join(TUNING_METHODS)}"
        raise CallError(f"unknown tuning {name!r}{hint}")
    return TUNING_METHODS[name]


def prepare(model: VisionModel, tuning: str, *, rank: int | None = None) -> Prepared:
    """Freeze and unfreeze the weights of a model, and put in what the tuning adds; the logits stay as they are.

    Args:
        model: with its new classifier, from :func:`~vitscope.models.heads.reset_classifier`. It is changed.
        rank: channels of a bottleneck or of LoRA's matrices; by default 64 for adapters, 8 for LoRA (α is twice that).

    Raises:
        CallError: an unknown tuning, a rank for one that has none, or a rank below 1 or above four times the width.
    """
    way, module = require_tuning(tuning), model.module
    if rank is not None and way.rank is None:
        raise CallError(f"{tuning} has no rank: adapters and lora do")
    chosen = _checked(rank, module) if rank is not None else way.rank
    adapters: Mapping[str, Any] | None = None
    finish: Callable[[], None] = lambda: None  # noqa: E731
    for parameter in module.parameters():
        parameter.requires_grad_(tuning == "full")
    if tuning == "bitfit":
        _learn(parameter for name, parameter in module.named_parameters() if _is_bias(name))
    elif tuning == "layernorm":
        _learn(
            parameter for part in module.modules() if isinstance(part, nn.LayerNorm) for parameter in part.parameters()
        )
    elif isinstance(module, WindowClassified):
        _learn(module.reader.parameters())
    elif way.places:
        assert chosen is not None
        add_adapters(module, way.places, chosen)
        adapters = {"places": list(way.places), "rank": chosen}
    elif tuning == "lora":
        assert chosen is not None
        finish = add_low_rank(module, chosen, LORA_ALPHA * chosen / LORA_RANK)
    head = [parameter for layer in get_classifiers(model) for parameter in layer.parameters()]
    _learn(head)
    learning = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    num_head = sum(parameter.numel() for parameter in head)
    return Prepared(adapters, learning - num_head, num_head, finish)


def _checked(rank: int, module: nn.Module) -> int:
    """Refuse what fills the memory sooner than it helps: an MLP has four times the width, no bottleneck needs more."""
    most = 4 * max(block.width for block in blocks(module))
    if at_least(1, rank, "rank") > most:
        raise CallError(f"rank is {rank}: choose at most {most}, four times the width of this model")
    return rank


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def _learn(parameters: Any) -> None:
    for parameter in parameters:
        parameter.requires_grad_(True)
