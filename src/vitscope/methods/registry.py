"""The registry of attribution methods, which the command line reads. New methods are added here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vitscope.methods.activation_patching import activation_patching
from vitscope.methods.att_cat import att_cat
from vitscope.methods.attention_flow import attention_flow
from vitscope.methods.attention_map import attention_map
from vitscope.methods.generic_attention import generic_attention, gradient_rollout
from vitscope.methods.grad_cam import grad_cam
from vitscope.methods.input_x_gradient import attn_lrp, input_x_gradient, smooth_grad
from vitscope.methods.integrated_gradients import integrated_gradients
from vitscope.methods.kernel_shap import kernel_shap
from vitscope.methods.le_grad import le_grad
from vitscope.methods.libra import libra
from vitscope.methods.lime import lime
from vitscope.methods.occlusion import occlusion
from vitscope.methods.rise import rise
from vitscope.methods.rollout import rollout
from vitscope.methods.token_tm import token_tm
from vitscope.methods.transformer_attribution import transformer_attribution
from vitscope.methods.transition_attention import transition_attention

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
    "activation_patching": Method(
        compute=activation_patching,
        kind="perturbation",
        takes_target=True,
        summary="what each patch's activations change",
        source="CAAP, 2026",
        forwards="one per patch",
    ),
    "grad_cam": Method(
        compute=grad_cam,
        kind="gradient",
        takes_target=True,
        summary="what the last block's patches add to a class",
        source="Selvaraju et al., 2017",
        forwards="1 + a backward",
    ),
    "input_x_gradient": Method(
        compute=input_x_gradient,
        kind="gradient",
        takes_target=True,
        summary="each patch's linear part of a class",
        source="Shrikumar et al., 2016",
        forwards="1 + a backward",
    ),
    "integrated_gradients": Method(
        compute=integrated_gradients,
        kind="gradient",
        takes_target=True,
        summary="each patch's part on the way from a baseline",
        source="Sundararajan et al., 2017",
        forwards="50 + 50 backward",
    ),
    "smooth_grad": Method(
        compute=smooth_grad,
        kind="gradient",
        takes_target=True,
        summary="each patch's part, averaged under noise",
        source="Smilkov et al., 2017",
        forwards="20 + 20 backward",
    ),
    "generic_attention": Method(
        compute=generic_attention,
        kind="gradient",
        takes_target=True,
        summary="attention that raises a class, through all blocks",
        source="Chefer et al., 2021",
        forwards="1 + a backward",
    ),
    "gradient_rollout": Method(
        compute=gradient_rollout,
        kind="gradient",
        takes_target=True,
        summary="rollout of attention times its gradient",
        source="Gildenblat, 2020",
        forwards="1 + a backward",
    ),
    "attn_lrp": Method(
        compute=attn_lrp,
        kind="gradient",
        takes_target=True,
        summary="each patch's relevance for a class",
        source="Achtibat et al., 2024",
        forwards="1 + a backward",
    ),
    "libra": Method(
        compute=libra,
        kind="gradient",
        takes_target=True,
        summary="each patch's share of a class, complete",
        source="Mehri et al., 2024",
        forwards="1 + a backward",
    ),
    "transformer_attribution": Method(
        compute=transformer_attribution,
        kind="gradient",
        takes_target=True,
        summary="relevance of attention, through all blocks",
        source="Chefer et al., 2021",
        forwards="1 + 2 backward",
    ),
    "le_grad": Method(
        compute=le_grad,
        kind="gradient",
        takes_target=True,
        summary="how each block's attention raises a class",
        source="Bousselham et al., 2024",
        forwards="1 + a backward",
    ),
    "token_tm": Method(
        compute=token_tm,
        kind="gradient",
        takes_target=True,
        summary="attention and changes of tokens, by block",
        source="Wu et al., 2024",
        forwards="1 + a backward",
    ),
    "att_cat": Method(
        compute=att_cat,
        kind="gradient",
        takes_target=True,
        summary="attended tokens times their gradients",
        source="Qiang et al., 2022",
        forwards="1 + a backward",
    ),
    "transition_attention": Method(
        compute=transition_attention,
        kind="gradient",
        takes_target=True,
        summary="attention by head, and what raises a class",
        source="Chen et al., 2023",
        forwards="21 + 21 backward",
    ),
}
