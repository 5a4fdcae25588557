"""Threads that share a model: explanations do not see each other's runs, and a plain run is left alone."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitscope as vs
from tests.contracts.test_hostile_wrappers import METHODS, assert_same, deep_vit, explain
from tests.contracts.test_leaks import assert_same as assert_same_state
from tests.contracts.test_leaks import frequent_switches, state, together
from tests.helpers.live import hf_vit, images, timm_swin

__all__ = ["frequent_switches"]  # a fixture

SHARED = ("input_x_gradient", "libra", "le_grad", "token_tm", "grad_cam", "activation_patching", "rollout")
# The type checks draw random numbers of their own.
pytestmark = pytest.mark.usefixtures("unchecked")


def explaining(model: Any, method: str, expected: Tensor, times: int = 3) -> Callable[[], None]:
    def work() -> None:
        for _ in range(times):
            assert_same(method, explain(method, model, images()), expected)

    return work


@pytest.mark.slow
@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize("build", [deep_vit, lambda: timm_swin(5)], ids=["vit", "swin"])
def test_one_model_in_several_threads(build: Callable[[], nn.Module]) -> None:
    """Also a plain forward and backward pass, as in training, at the same time."""
    module = build().requires_grad_(True)
    module.set_grad_checkpointing(True)  # type: ignore[operator]
    model = vs.load(module)
    methods = [method for method in SHARED if method != "token_tm" or build is deep_vit]
    works = [explaining(model, method, explain(method, model, images())) for method in methods]
    output = module(images()).detach()
    before = state(module)
    gradients: list[bool] = []

    def plain() -> None:
        for _ in range(10):
            values = module(images())
            torch.testing.assert_close(values.detach(), output, rtol=0, atol=1e-6)
            received = torch.autograd.grad(values.sum(), list(module.parameters()), allow_unused=True)
            gradients.append(all(gradient is not None for gradient in received))

    together(*works, plain)
    assert len(gradients) == 10
    assert all(gradients)
    assert_same_state(state(module), before)


@pytest.mark.slow
@pytest.mark.usefixtures("frequent_switches")
def test_two_models_in_two_threads() -> None:
    models = [vs.load(deep_vit()), vs.load(hf_vit(5)), vs.load(timm_swin(5))]
    methods = ("generic_attention", "input_x_gradient of pixels", "attn_lrp")
    works = [
        explaining(model, method, explain(method, model, images()))
        for model, method in zip(models, methods, strict=True)
    ]
    together(*works)


@pytest.mark.slow
def test_a_forward_pass_of_another_thread_during_a_run_changes_nothing() -> None:
    """A hook of the user lets another thread run the whole model in the middle of each run."""
    module = deep_vit()
    expected = {method: explain(method, module, images()) for method in METHODS}
    output, owner = module(images()).detach(), threading.get_ident()
    outputs: list[Tensor] = []

    def run_elsewhere(*_: Any) -> None:
        if threading.get_ident() == owner:
            thread = threading.Thread(target=lambda: outputs.append(module(images())))
            thread.start()
            thread.join()

    module.blocks[1].register_forward_hook(run_elsewhere)
    for method, values in expected.items():
        assert_same(method, explain(method, module, images()), values)
    assert len(outputs) > len(METHODS)
    for values in outputs:
        assert values.requires_grad
        torch.testing.assert_close(values.detach(), output, rtol=0, atol=1e-6)


def test_checkpointing_is_off_until_the_last_run_ends() -> None:
    from vitscope.models.evaluation import without_checkpointing

    module = deep_vit()
    module.set_grad_checkpointing(True)  # type: ignore[operator]
    first, second = without_checkpointing(module), without_checkpointing(module)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert module.grad_checkpointing is False
    second.__exit__(None, None, None)
    assert module.grad_checkpointing is True
