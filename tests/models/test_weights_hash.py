"""The hash of weights depends on every tensor, is computed once, and follows changes in place."""

import copy

import pytest
import torch
from torch import nn

from vitscope.models import weights_hash as hashing
from vitscope.models.weights_hash import weights_hash


@pytest.fixture(name="module")
def small_module() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2, device="cpu"), nn.BatchNorm1d(2, device="cpu"))


def test_a_copy_has_the_same_hash_and_a_change_another(module: nn.Module) -> None:
    first = weights_hash(module)
    assert first is not None
    assert len(first) == 64
    assert weights_hash(copy.deepcopy(module)) == first
    seen = {first}
    for tensor in module.state_dict().values():  # parameters and buffers, changed in place
        tensor += 1
        seen.add(weights_hash(module))
    assert len(seen) == 1 + len(module.state_dict())
    module[0].weight = nn.Parameter(torch.zeros(2, 3, device="cpu"))
    assert weights_hash(module) not in seen
    assert weights_hash(module.double()) != weights_hash(module.float())


def test_it_is_computed_once(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_hash(module)
    monkeypatch.setattr(hashing.hashlib, "sha256", None)
    assert weights_hash(module) == first


def test_weights_without_bytes_have_no_hash(module: nn.Module) -> None:
    assert weights_hash(copy.deepcopy(module).to("meta")) is None
    with torch.inference_mode():
        assert weights_hash(nn.Linear(2, 2, device="cpu")) is None


def test_half_precision_and_scalars_are_hashed() -> None:
    module = nn.Linear(2, 2, device="cpu", dtype=torch.bfloat16)
    module.register_buffer("scale", torch.tensor(1.0, device="cpu"))
    assert weights_hash(module) is not None
