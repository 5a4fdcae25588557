"""The registry of attribution methods, which the command line reads. New methods are added here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vitscope.methods.attention_flow import attention_flow
from vitscope.methods.attention_map import attention_map
from vitscope.methods.kernel_shap import kernel_shap
from vitscope.methods.lime import lime
from vitscope.methods.occlusion import occlusion
from vitscope.methods.rise import rise
from vitscope.methods.rollout import rollout

Kind = Literal["attention", "perturbation", "gradient"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """An attribution method.

    Attributes:
        compute: (model, images, **options) → :class:`~vitscope.Attribution`.
        kind: ``"attention"`` reads the attention of one forward pass, ``"perturbation"`` evaluates the model on many
            perturbed images, ``"gradient"`` differentiates the output.
        takes_target: whether ``compute`` takes ``target``, the class to explain.
        summary: what the map shows, in a few words and without a full stop.
        source: authors and year.
        forwards: number of forward passes with default options.
    """

    compute: Callable[..., Any]
    kind: Kind
    takes_target: bool
    summary: str
    source: str
    forwards: str = "1"


METHODS: dict[str, Method] = {
    "attention": Method(
        compute=attention_map,
        kind="attention",
        takes_target=False,
        summary="what the last block attends to",
        source="Dosovitskiy et al., 2020",
    ),
    "rollout": Method(
        compute=rollout,
        kind="attention",
        takes_target=True,
        summary="what reaches the readout through all blocks",
        source="Abnar & Zuidema, 2020",
    ),
    "attention_flow": Method(
        compute=attention_flow,
        kind="attention",
        takes_target=False,
        summary="the most that can flow from the readout to each patch",
        source="Abnar & Zuidema, 2020",
    ),
    "lime": Method(
        compute=lime,
        kind="perturbation",
        takes_target=True,
        summary="what each segment adds to a class, linearly",
        source="Ribeiro et al., 2016",
        forwards="1,000",
    ),
    "kernel_shap": Method(
        compute=kernel_shap,
        kind="perturbation",
        takes_target=True,
        summary="each segment's fair share of the output",
        source="Lundberg & Lee, 2017",
        forwards="2,050",
    ),
    "occlusion": Method(
        compute=occlusion,
        kind="perturbation",
        takes_target=True,
        summary="the drop in the output without each patch",
        source="Zeiler & Fergus, 2014",
        forwards="one per patch",
    ),
    "rise": Method(
        compute=rise,
        kind="perturbation",
        takes_target=True,
        summary="the expected output if a pixel is visible",
        source="Petsiuk et al., 2018",
        forwards="4,000",
    ),
}
