"""What all sets of rules for the backward pass share: they run every torch function, perhaps with another gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitscope.attention.recomputed_attention import OnRows
from vitscope.attention.tap import AttentionCall

Arguments = Sequence[Any]
Keywords = Mapping[str, Any]
# Runs a torch function on its arguments, with the gradient of a rule.
Rule = Callable[[Any, Arguments, Keywords], Any]


class RuleSet(ABC):
    """The rules of one run, applied by a :class:`~vitscope.attention.tap.Tap` to every torch function.

    Args:
        rules: the rule of each torch function that has one.
    """

    def __init__(self, rules: Mapping[Any, Rule]) -> None:
        self._rules = rules

    def __call__(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Return the result of a torch function, with the gradient of its rule."""
        rule = self._rules.get(func)
        return func(*args, **kwargs) if rule is None else rule(func, args, kwargs)

    @abstractmethod
    def attend(self, call: AttentionCall, on_rows: OnRows | None) -> Tensor:
        """Return the output of an attention call or of its softmax.

        Args:
            call: the call.
            on_rows: function that receives weights and their gradients during the backward pass; None if nothing does.
        """


class ScaledGradient(torch.autograd.Function):
    """The identity, with a factor on the gradient.

    Args of ``apply``: the activation; the factor; a function that returns whether the factor applies in the running
    backward pass, or None for every pass.
    """

    @staticmethod
    def forward(ctx: Any, activation: Tensor, factor: float, applies: Callable[[], bool] | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.factor, ctx.applies = factor, applies
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        is_scaled = gradient is not None and (ctx.applies is None or ctx.applies())
        return gradient * ctx.factor if is_scaled else gradient, None, None


def is_active(value: Any) -> bool:
    """Return whether a value depends on the image by differentiable functions."""
    return isinstance(value, Tensor) and value.requires_grad


def active_operands(args: Arguments, kwargs: Keywords) -> list[Tensor]:
    """Return the active tensors among the arguments of a function, also those in lists and tuples."""
    arguments = (*args, *kwargs.values())
    values = (item for value in arguments for item in (value if isinstance(value, list | tuple) else [value]))
    return [value for value in values if is_active(value)]
