"""Ctrl-C waits while flags and hooks are set or restored."""

import os
import signal

import pytest
import torch
from torch import nn

import vitscope as vs
from tests.helpers.tiny import tiny_vit
from vitscope.interrupts import uninterrupted
from vitscope.models import evaluation


def test_an_interrupt_is_raised_at_the_end_of_the_block() -> None:
    steps: list[str] = []

    def step() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("after the signal")

    with pytest.raises(KeyboardInterrupt), uninterrupted():
        step()
    assert steps == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_flags_are_restored_if_an_interrupt_comes_while_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes with the third flag; without the guard, three modules would stay in evaluation mode."""
    module = tiny_vit().train()
    set_flag = nn.Module.__setattr__
    changes = 0

    def interrupting(self: nn.Module, name: str, value: object) -> None:
        nonlocal changes
        set_flag(self, name, value)
        changes += name == "training"
        if name == "training" and changes == 3:
            os.kill(os.getpid(), signal.SIGINT)

    model = vs.load(module)
    monkeypatch.setattr(nn.Module, "__setattr__", interrupting)
    with pytest.raises(KeyboardInterrupt):
        vs.capture(model, torch.zeros(1, 3, 32, 32, device="cpu"))
    monkeypatch.undo()
    assert all(child.training for child in module.modules())
    assert not any(child in evaluation._training._runs for child in module.modules())
