"""Laws of every method that differentiates a model."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import vitscope as vs
from vitscope.attention import recomputed_attention

Explain = Callable[..., vs.Attribution]


def target_of(model: vs.VisionModel) -> Any:
    return "similarity" if model.meaning == "features" else None


def in_float64(model: vs.VisionModel) -> vs.VisionModel:
    return vs.load(model.module.double())


def check_batch(explain: Explain, model: vs.VisionModel, pixels: Tensor, tolerance: float) -> vs.Attribution:
    """Check that a batch equals its images, and return its result."""
    target = target_of(model)
    together = explain(model, pixels, target=target)
    assert bool(torch.isfinite(together.values).all())
    assert float(together.values.min()) >= 0
    assert bool((together.values.flatten(1).amax(1) > 0).all())
    for index, values in enumerate(together.values):
        alone = explain(model, pixels[index : index + 1], target=target).values[0]
        torch.testing.assert_close(values, alone, rtol=tolerance, atol=tolerance * float(alone.max()))
    return together


def check_row_blocks(explain: Explain, model: vs.VisionModel, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the number of queries that are recomputed together changes nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(recomputed_attention, "CPU_BLOCK", 1 << 30)
        expected = explain(model, pixels, target=3).values
        patch.setattr(recomputed_attention, "CPU_BLOCK", 1)  # 16 queries
        torch.testing.assert_close(explain(model, pixels, target=3).values, expected)


def check_gradient_modes(explain: Explain, model: vs.VisionModel, pixels: Tensor) -> None:
    """Check that a caller's gradient mode changes nothing."""
    expected = explain(model, pixels, target=3).values
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(explain(model, pixels.clone(), target=3).values, expected)


def check_nothing_left(explain: Explain, model: vs.VisionModel, pixels: Tensor) -> None:
    """Check that weights, flags, hooks and the random state are the same, also after an error in each module."""
    module = model.module.train()
    module.get_parameter(next(iter(dict(module.named_parameters())))).requires_grad_(False)
    before, random = deepcopy(module.state_dict()), torch.get_rng_state()
    flags = _flags(module)
    explain(model, pixels, target=3)
    _check_unchanged(module, before, flags)
    assert torch.equal(torch.get_rng_state(), random)
    leaves = [child for child in module.modules() if not list(child.children())]
    for child in (leaves[0], leaves[len(leaves) // 2], leaves[-1]):
        handle = child.register_forward_hook(_fail)
        with pytest.raises(_PlannedError):
            explain(model, pixels, target=3)
        handle.remove()
        _check_unchanged(module, before, flags)
    with pytest.raises(vs.CallError):
        explain(model, pixels, target="no such class")
    _check_unchanged(module, before, flags)
    module.eval()


class _PlannedError(Exception):
    """An error of a caller's hook."""


def _fail(*_: Any) -> None:
    raise _PlannedError


def _flags(module: torch.nn.Module) -> list[Any]:
    modes = [child.training for child in module.modules()]
    return [*modes, *(parameter.requires_grad for parameter in module.parameters())]


def _check_unchanged(module: torch.nn.Module, before: dict[str, Tensor], flags: list[Any]) -> None:
    assert _flags(module) == flags
    assert all(parameter.grad is None for parameter in module.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    for child in module.modules():
        assert not child._forward_hooks
        assert not child._forward_pre_hooks
        assert not child._backward_hooks
