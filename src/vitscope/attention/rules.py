"""Local rules: the backward pass of single functions, changed for relevance methods.

Every rule returns the library's own forward value, bit for bit, and changes only the gradient with respect to the
activations. Weights are constants.

==========================  ====================  ==========================  ====================================
function                    plain                 libra (2411.16760)          attn_lrp (2402.05602)
==========================  ====================  ==========================  ====================================
weights · values            both                  values alone                half to each
softmax                     its derivative        constant                    its derivative
queries · keys              both                  nothing                     half to each, so a quarter in all
layer, RMS, group norm      derivative            deviation constant          deviation constant
GELU, SiLU, … = x · γ(x)    derivative            γ(x) constant               γ(x) constant
product of two activations  both                  half to each                half to each
sigmoid, tanh, erf, roots   derivative            constant                    constant
GLU = x · σ(y)              derivative            σ(y) constant               σ(y) constant
linear, convolution         derivative            derivative or γ-rule        derivative or γ-rule
==========================  ====================  ==========================  ====================================
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.attention.linear_rules import gamma_pull
from vitscope.attention.norm_rules import GroupNormPull, NormPull
from vitscope.attention.recomputed_attention import OnRows, RecomputedAttention
from vitscope.attention.rule_set import Arguments, Keywords, Rule, RuleSet, ScaledGradient, active_operands, is_active
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.attention.tap import AttentionCall

RuleName = Literal["plain", "libra", "attn_lrp"]
OnBias = Callable[[Tensor, Tensor], None]  # a tensor that was computed, and the constant that was added in it
Pull = Callable[[Tensor, Tensor], Tensor]  # (input, gradient of the output) → gradient of the input


class _Local(torch.autograd.Function):
    """A function of one activation whose gradient a rule computes."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, run: Callable[[], Tensor], pull: Pull) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(activation)
        ctx.pull = pull
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return None, None, None
        (activation,) = ctx.saved_tensors
        return ctx.pull(activation, gradient).to(activation.dtype), None, None


class _ObservedWeights(torch.autograd.Function):
    """The weights that a softmax returned: their gradient is handed to a function, and perhaps ends here."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, constant: bool, on_rows: OnRows | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.constant, ctx.on_rows = constant, on_rows
        ctx.weights = weights.detach()
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if gradient is not None and ctx.on_rows is not None:
            ctx.on_rows(slice(0, gradient.shape[-2]), ctx.weights, gradient)
        return None if ctx.constant else gradient, None, None


class LocalRules(RuleSet):
    """The rules of one backward pass, each of a single function.

    Args:
        rules: ``"plain"``, ``"libra"`` or ``"attn_lrp"``, see the table of this module.
        tracker: tracker of the results of softmaxes, which tells attention weights from other activations.
        gamma: γ of the γ-rule of linear layers; 0 for the derivative.
        conv_gamma: γ of the γ-rule of convolutions; 0 for the derivative.
        on_bias: function that receives each tensor with a constant that was added in it; None to ignore them.
    """

    def __init__(
        self,
        rules: RuleName,
        tracker: SoftmaxTracker,
        *,
        gamma: float = 0.0,
        conv_gamma: float = 0.0,
        on_bias: OnBias | None = None,
    ) -> None:
        self.rules, self._tracker = rules, tracker
        self._gamma, self._conv_gamma, self._on_bias = gamma, conv_gamma, on_bias
        functions: dict[Any, Rule] = {}
        if on_bias is not None:
            functions |= dict.fromkeys(_ADDITIONS, self._add)
        if gamma or conv_gamma or on_bias is not None:
            functions |= dict.fromkeys(_LINEAR, self._linear)
            functions |= dict.fromkeys(_BATCH_NORMS, self._batch_norm)
        if rules != "plain":
            functions |= dict.fromkeys(_CONSTANTS, _constant)
            functions |= dict.fromkeys(_GATES, _gated)
            functions |= dict.fromkeys(PRODUCTS, self._multiply)
            functions |= dict.fromkeys(_QUOTIENTS, _divide)
            functions |= dict.fromkeys(_POWERS, _power)
            functions |= dict.fromkeys(_SQUARES, _square)
            functions |= {F.normalize: _normalize, F.glu: _gated_linear_unit}
        if rules != "plain" or on_bias is not None:
            functions |= dict.fromkeys(_NORMS, self._norm)
            functions |= dict.fromkeys(_GROUP_NORMS, self._group_norm)
        if rules == "libra":
            functions |= dict.fromkeys(_SOFTMAX, _constant_weights)
        super().__init__(functions)

    def attend(self, call: AttentionCall, on_rows: OnRows | None) -> Tensor:
        """Return the output of an attention call or of its softmax.

        Args:
            call: the call.
            on_rows: function that receives weights and their gradients during the backward pass; None if nothing does.
                The library's own backward pass then serves all rules but Libra's.
        """
        constant = self.rules == "libra"
        if call.query is not None and call.key is not None and call.value is not None:
            tensors = (call.query, call.key, call.value, call.bias)
            if not any(tensor is not None and tensor.requires_grad for tensor in tensors):
                return call.run()
            if on_rows is None and not constant:
                return call.run() if self.rules == "plain" else _with_shares(call)
            factor = 0.5 if self.rules == "attn_lrp" else 1.0
            output: Tensor = RecomputedAttention.apply(*tensors, call, constant, factor, on_rows)
            return output
        weights = call.run()
        if not weights.requires_grad:
            return weights
        if on_rows is None:
            return weights.detach() if constant else weights
        observed: Tensor = _ObservedWeights.apply(weights, constant, on_rows)
        return observed

    def _multiply(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Halve the gradient of a product of two activations."""
        result = func(*args, **kwargs)
        operands = active_operands(args, kwargs)
        if len(operands) < 2 or not is_active(result):
            return result
        if self.rules == "libra" and any(self._tracker.holds(operand) for operand in operands):
            return result  # attention weights are a constant
        return ScaledGradient.apply(result, 0.5, None)

    def _norm(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Hold the deviation of a LayerNorm or RMSNorm constant."""
        centred = func in _LAYER_NORMS  # an RMSNorm subtracts no mean and has no bias
        names = ("input", "normalized_shape", "weight", *(("bias",) if centred else ()), "eps")
        arguments = _named(names, args, kwargs)
        activation, weight, bias = arguments["input"], arguments.get("weight"), arguments.get("bias")
        if not is_active(activation):
            return func(*args, **kwargs)
        if self.rules == "plain":
            result = func(*args, **kwargs)
        else:
            eps = arguments.get("eps")
            if eps is None:
                eps = 1e-5 if centred else torch.finfo(activation.dtype).eps
            axes = tuple(range(-len(arguments["normalized_shape"]), 0))
            pull = NormPull(axes, weight, float(eps), centred)
            result = _Local.apply(activation, lambda: func(*args, **kwargs), pull)
        if self._on_bias is not None and isinstance(bias, Tensor):
            self._on_bias(result, bias)
        return result

    def _group_norm(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Hold the deviation of a GroupNorm constant."""
        arguments = _named(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
        activation, weight, bias = arguments["input"], arguments.get("weight"), arguments.get("bias")
        if self.rules == "plain" or not is_active(activation):
            result = func(*args, **kwargs)
        else:
            pull = GroupNormPull(arguments["num_groups"], weight, arguments.get("eps", 1e-5))
            result = _Local.apply(activation, lambda: func(*args, **kwargs), pull)
        if self._on_bias is not None and isinstance(bias, Tensor) and is_active(result):
            self._on_bias(result, bias.view(-1, *(1,) * (result.ndim - 2)))
        return result

    def _batch_norm(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Report the constant that a BatchNorm with fixed statistics adds."""
        result = func(*args, **kwargs)
        arguments = _named(("input", "running_mean", "running_var", "weight", "bias", "training"), args, kwargs)
        if self._on_bias is not None and is_active(result) and not arguments.get("training"):
            zeros = torch.zeros_like(arguments["input"].detach())
            self._on_bias(result, func(zeros, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"}))
        return result

    def _linear(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Apply the γ-rule, and report the bias."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        arguments = _named(names, args, kwargs)
        activation, weight, bias = arguments["input"], arguments["weight"], arguments.get("bias")
        gamma = self._gamma if func is F.linear else self._conv_gamma if func in _CONVOLUTIONS else 0.0
        if not is_active(activation):
            return func(*args, **kwargs)
        if gamma and isinstance(weight, Tensor) and not weight.requires_grad:
            options = {name: arguments[name] for name in names[3:] if name in arguments}
            pull = gamma_pull(func, weight, bias, gamma, options)
            result = _Local.apply(activation, lambda: func(*args, **kwargs), pull)
        else:
            result = func(*args, **kwargs)
        if self._on_bias is not None and isinstance(bias, Tensor):
            self._on_bias(result, bias.view(-1, *(1,) * (weight.ndim - 2)))
        return result

    def _add(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Report a constant that is added to an activation."""
        terms = args[:2] if len(args) > 1 else [*args, kwargs.get("other")]
        constants = [index for index, term in enumerate(terms) if not is_active(term)]
        if len(constants) != 1:
            return func(*args, **kwargs)
        (index,) = constants
        if func in _IN_PLACE_ADDITIONS and index == 0:
            terms = [terms[0].clone(), terms[1]]
        result = func(*args, **kwargs)
        if not is_active(result):
            return result
        subtracted = func in _SUBTRACTIONS and index == (0 if func is Tensor.__rsub__ else 1)
        factor = (-1 if subtracted else 1) * (kwargs.get("alpha", 1) if index == 1 else 1)
        constant = terms[index]
        if not isinstance(constant, Tensor):
            constant = result.new_full((1,) * result.ndim, constant)
        assert self._on_bias is not None
        self._on_bias(result, factor * constant)
        return result


def _named(names: Sequence[str], args: Arguments, kwargs: Keywords) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _with_shares(call: AttentionCall) -> Tensor:
    """Return the output of a fused kernel, with half of the gradient to each factor of its two products."""
    arguments = dict(call.arguments)
    for name, share in (("query", 0.25), ("key", 0.25), ("value", 0.5), ("attn_mask", 0.5)):
        if is_active(arguments.get(name)):
            arguments[name] = ScaledGradient.apply(arguments[name], share, None)
    return F.scaled_dot_product_attention(**arguments)


def _constant(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Treat the result of a function as a constant."""
    with torch.no_grad():
        return func(*args, **kwargs)


def _constant_weights(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Treat the result of a softmax over tokens as a constant, but not that over the classes of (batch, class)."""
    activation = args[0] if args else kwargs["input"]
    return func(*args, **kwargs) if activation.ndim < 3 else _constant(func, args, kwargs)


def _gated(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Hold the gate γ(x) of x · γ(x) constant."""
    activation = args[0] if args else kwargs["input"]
    if not is_active(activation):
        return func(*args, **kwargs)
    keywords = dict(kwargs)
    if func in _HAVE_INPLACE:  # in place, the input would be lost before the backward pass
        args, keywords["inplace"] = args[:1], False
    gate = _GATES[func](keywords)
    return _Local.apply(activation, lambda: func(*args, **keywords), lambda x, gradient: gate(x).mul_(gradient))


def _divide(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Treat the denominator of a quotient of two activations as a constant."""
    reverse = func in _REVERSE_QUOTIENTS
    position = 0 if reverse else 1
    if len(args) > 1 and is_active(args[position]):
        args = [value.detach() if index == position else value for index, value in enumerate(args)]
    return func(*args, **kwargs)


def _power(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Treat a root or a reciprocal as a constant, and halve the gradient of a square."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    if exponent == 2:
        return _square(func, args, kwargs)
    is_root = isinstance(exponent, int | float) and exponent < 1
    return _constant(func, args, kwargs) if is_root else func(*args, **kwargs)


def _square(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Halve the gradient of the product of an activation with itself."""
    result = func(*args, **kwargs)
    return ScaledGradient.apply(result, 0.5, None) if is_active(result) else result


def _gated_linear_unit(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Hold the gate σ(y) of x · σ(y) constant."""
    arguments = {"dim": -1} | _named(("input", "dim"), args, kwargs)
    activation, dim = arguments["input"], arguments["dim"]
    if not is_active(activation):
        return func(*args, **kwargs)

    def pull(x: Tensor, gradient: Tensor) -> Tensor:
        gate = torch.sigmoid(x.chunk(2, dim)[1])
        return torch.cat([gradient * gate, torch.zeros_like(gate)], dim)

    return _Local.apply(activation, lambda: func(*args, **kwargs), pull)


def _normalize(func: Any, args: Arguments, kwargs: Keywords) -> Any:
    """Hold the norm in F.normalize constant."""
    arguments = {"p": 2.0, "dim": 1, "eps": 1e-12} | _named(("input", "p", "dim", "eps"), args, kwargs)
    activation = arguments["input"]
    if not is_active(activation):
        return func(*args, **kwargs)

    def pull(x: Tensor, gradient: Tensor) -> Tensor:
        return gradient / x.norm(arguments["p"], arguments["dim"], keepdim=True).clamp_min(arguments["eps"])

    return _Local.apply(activation, lambda: func(*args, **kwargs), pull)


def _gelu_gate(keywords: Keywords) -> Callable[[Tensor], Tensor]:
    """Return Φ(x), or its approximation by tanh, computed in a single tensor."""
    if keywords.get("approximate", "none") == "tanh":
        factor = math.sqrt(2 / math.pi)
        return lambda x: x.square().mul_(0.044715).add_(1).mul_(x).mul_(factor).tanh_().add_(1).mul_(0.5)
    return lambda x: torch.mul(x, math.sqrt(0.5)).erf_().add_(1).mul_(0.5)


def _mish_gate(x: Tensor) -> Tensor:
    return torch.tanh(F.softplus(x))


def _hardswish_gate(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


_GATES: dict[Any, Callable[[Keywords], Callable[[Tensor], Tensor]]] = {
    F.gelu: _gelu_gate,
    F.silu: lambda _: torch.sigmoid,
    F.mish: lambda _: _mish_gate,
    F.hardswish: lambda _: _hardswish_gate,
}
_HAVE_INPLACE = frozenset({F.silu, F.mish, F.hardswish})
_SOFTMAX = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)
_CONSTANTS = (
    *(torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.sigmoid, F.hardsigmoid, torch.special.expit),
    *(torch.tanh, Tensor.tanh, F.tanh, torch.erf, Tensor.erf, torch.special.erf),
    *(torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.norm, Tensor.norm),
    *(torch.linalg.norm, torch.linalg.vector_norm),
)
_ELEMENTWISE = (
    *(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__),
    Tensor.__imul__,
)
_MATRIX = (
    *(torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm),
    *(torch.baddbmm, Tensor.baddbmm, torch.mm, Tensor.mm, torch.einsum),
)
PRODUCTS = (*_ELEMENTWISE, *_MATRIX)
_REVERSE_QUOTIENTS = frozenset({Tensor.__rtruediv__, Tensor.__rdiv__})
_QUOTIENTS = (
    *(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.div_, Tensor.__truediv__),
    *(Tensor.__itruediv__, *_REVERSE_QUOTIENTS),
)
_LAYER_NORMS = frozenset({F.layer_norm, torch.layer_norm})
_NORMS = (*_LAYER_NORMS, F.rms_norm, torch.rms_norm)
_GROUP_NORMS = (F.group_norm, torch.group_norm)
_BATCH_NORMS = (F.batch_norm, torch.batch_norm)
_CONVOLUTIONS = (F.conv2d, torch.conv2d)
_LINEAR = (F.linear, *_CONVOLUTIONS, F.conv1d, torch.conv1d)
_POWERS = (torch.pow, Tensor.pow, Tensor.__pow__, torch.float_power, Tensor.float_power)
_SQUARES = (torch.square, Tensor.square)
_SUBTRACTIONS = frozenset({torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__, Tensor.__rsub__})
_IN_PLACE_ADDITIONS = frozenset({Tensor.add_, Tensor.sub_, Tensor.__iadd__, Tensor.__isub__})
_ADDITIONS = (
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    *_SUBTRACTIONS,
)
