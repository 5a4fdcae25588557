"""The registry says what each method is and takes, and the methods themselves agree."""

import inspect
import re

import pytest

from vitscope.methods.registry import METHODS, Method

every_method = pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=METHODS)


def test_every_kind_is_named() -> None:
    kinds = {name: method.kind for name, method in METHODS.items()}
    assert kinds == {
        "attention": "attention",
        "rollout": "attention",
        "attention_flow": "attention",
        "lime": "perturbation",
        "kernel_shap": "perturbation",
        "occlusion": "perturbation",
        "rise": "perturbation",
        "activation_patching": "perturbation",
        "grad_cam": "gradient",
        "input_x_gradient": "gradient",
        "integrated_gradients": "gradient",
        "smooth_grad": "gradient",
        "generic_attention": "gradient",
        "gradient_rollout": "gradient",
        "attn_lrp": "gradient",
        "libra": "gradient",
        "transformer_attribution": "gradient",
        "le_grad": "gradient",
        "token_tm": "gradient",
        "att_cat": "gradient",
        "transition_attention": "gradient",
    }


@every_method
def test_takes_target_is_what_the_signature_says(name: str, method: Method) -> None:
    assert method.takes_target == ("target" in inspect.signature(method.compute).parameters)
    assert method.takes_target == (name not in ("attention", "attention_flow"))


@every_method
def test_a_perturbation_method_reports_progress(name: str, method: Method) -> None:
    assert ("progress" in inspect.signature(method.compute).parameters) == (method.kind == "perturbation"), name


def test_every_method_that_hides_parts_fills_them_alike() -> None:
    """Otherwise maps side by side would answer different questions."""
    signatures = {name: inspect.signature(method.compute).parameters for name, method in METHODS.items()}
    assert {name: options["hide"].default for name, options in signatures.items() if "hide" in options} == {
        "lime": "mean",
        "kernel_shap": "mean",
        "occlusion": "mean",
        "rise": "mean",
    }
    assert signatures["activation_patching"]["baseline"].default == "mean"


@every_method
def test_every_method_is_described(name: str, method: Method) -> None:
    assert method.compute.__name__ in (name, f"{name}_map")
    assert re.fullmatch(r".*, (19|20)\d\d", method.source)
    assert method.summary
    assert method.forwards
