"""Layer-wise relevance propagation by Chefer, Gur & Wolf (2021, 2012.09838), as a second gradient of the same graph.

The relevance of an activation is the activation times this gradient. Weights are constants and receive no relevance.

=================================  ==================================================================================
function                           gradient of the input x, for the gradient g of the output y
=================================  ==================================================================================
linear (α = 1, β = 0)              W⁺ᵀs where x > 0, W⁻ᵀs where x < 0, with s = y·g / (W⁺x⁺ + W⁻x⁻)
LayerNorm, GELU, softmax, …        g·y / x: relevance passes unchanged
weights · values                   the derivative, half to each
queries · keys                     half to each, divided by the product itself, without scale and bias
product of two activations         the derivative, half to each
sum of two activations             the derivative, rescaled so that the absolute relevances of an image are shared
activation + constant              g·y / x
=================================  ==================================================================================
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitscope.attention.linear_rules import stabilised
from vitscope.attention.recomputed_attention import OnRows, query_slices
from vitscope.attention.rule_set import Arguments, Keywords, Rule, RuleSet, ScaledGradient, active_operands, is_active
from vitscope.attention.rules import PRODUCTS
from vitscope.attention.scores import weights_of
from vitscope.attention.tap import AttentionCall
from vitscope.errors import UnsupportedModelError

STABILISER = 1e-9  # keeps denominators away from zero, with their sign

# (gradient of the output, output, inputs) → gradient of each input
RelevancePull = Callable[..., tuple[Tensor | None, ...]]


class _TwoGradients(torch.autograd.Function):
    """A computed value with two gradients: its own derivative, or that of a relevance rule with respect to inputs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rules: "AlphaBetaRules", pull: RelevancePull, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(value, *inputs)
        ctx.rules, ctx.pull = rules, pull
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        value, *inputs = ctx.saved_tensors
        nothing = (None,) * len(inputs)
        if gradient is None:
            return None, None, None, *nothing
        if not ctx.rules.relevance:
            return gradient, None, None, *nothing
        return None, None, None, *ctx.pull(gradient, value, *inputs)


class _Attention:
    """The relevance rule of one attention call. It keeps the derivative of the output, not of all weights."""

    def __init__(self, call: AttentionCall, rules: "AlphaBetaRules", on_rows: OnRows | None) -> None:
        self._scale, self._bias, self._rules, self._on_rows = call.scale, call.bias, rules, on_rows
        self._active = [tensor is not None and tensor.requires_grad for tensor in (call.query, call.key, call.value)]
        self._derivative: Tensor | None = None

    def observe(self, gradient: Tensor) -> None:
        """Keep the derivative of the score with respect to the output of the attention call."""
        if not self._rules.relevance:
            self._derivative = gradient.detach()

    def __call__(
        self, gradient: Tensor, _: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        leading = query.shape[:-2]
        dtype = torch.promote_types(query.dtype, torch.float32)
        share = 0.5 if self._active[0] and self._active[1] else 1.0
        derivative = self._derivative
        observed = self._on_rows is not None and derivative is not None
        with torch.autocast(query.device.type, enabled=False):
            queries, keys, values, outputs, derivatives = (
                tensor.to(dtype).expand(*leading, *tensor.shape[-2:]).flatten(0, -3).contiguous()
                for tensor in (query, key, value, gradient, gradient if derivative is None else derivative)
            )
            to_query, to_key, to_value = (torch.zeros_like(tensor) for tensor in (queries, keys, values))
            for rows in query_slices(queries, keys):
                products = torch.bmm(queries[:, rows], keys.mT)
                scores = (products * self._scale).view(*leading, *products.shape[1:])
                bias = self._bias
                if bias is not None:
                    bias = bias if bias.shape[-2] == 1 else bias[..., rows, :]
                    scores = scores + bias
                weights = weights_of(scores, bias).to(dtype).view_as(products)
                to_value.baddbmm_(weights.mT, outputs[:, rows], alpha=0.5)
                to_weights = torch.bmm(outputs[:, rows], values.mT) * 0.5
                relevance = weights * to_weights
                if observed and self._on_rows is not None:
                    product = torch.bmm(derivatives[:, rows], values.mT).mul_(to_weights)
                    self._on_rows(rows, weights.view(scores.shape), product.view(scores.shape))
                self._rules.note_zeros(torch.where(products == 0, relevance, 0.0).view(scores.shape))
                shares = _divided(relevance, products) * share
                to_query[:, rows] = torch.bmm(shares, keys)
                to_key.baddbmm_(shares.mT, queries[:, rows])
        pulled = zip((to_query, to_key, to_value), (query, key, value), self._active, strict=True)
        return tuple(
            tensor.view(*leading, *tensor.shape[1:]).sum_to_size(original.shape).to(original.dtype)
            if is_needed
            else None
            for tensor, original, is_needed in pulled
        )


class AlphaBetaRules(RuleSet):
    """The rules of one run with two backward passes: first the derivative, then relevance.

    In the second pass, the function that observes attention receives the weights A and, as their gradient, the product
    ∇A ⊙ dA of the derivative and the relevance gradient.

    Args:
        batch: number of images.
        name: name of the model, for messages.

    Attributes:
        relevance: whether the next backward pass propagates relevance; otherwise it computes the derivative.
        on_zeros: float (batch,), the relevance in the last backward pass that ends on activations that are exactly 0.
            Such an activation contributes nothing and passes nothing on. Padding consists of zeros, and its keys and
            values of biases alone.
    """

    def __init__(self, batch: int, name: str) -> None:
        self.relevance = False
        self.on_zeros = torch.zeros(batch, dtype=torch.float32, device="cpu")
        self._batch, self._name = batch, name
        functions: dict[Any, Rule] = {F.linear: self._linear}
        functions |= dict.fromkeys(_UNCHANGED, self._unchanged)
        functions |= dict.fromkeys(_SUMS, self._add)
        functions |= dict.fromkeys(_IN_PLACE_SUMS, self._refuse)
        functions |= dict.fromkeys(PRODUCTS, self._multiply)
        functions |= dict.fromkeys(_QUOTIENTS, self._divide)
        super().__init__(functions)

    def attend(self, call: AttentionCall, on_rows: OnRows | None) -> Tensor:
        """Return the output of an attention call or of its softmax.

        Args:
            call: the call.
            on_rows: function that receives weights and products of their gradients in the relevance pass.
        """
        if call.query is not None and call.key is not None and call.value is not None:
            value = call.run()
            if not value.requires_grad:
                return value
            rule = _Attention(call, self, on_rows)
            output = self._with_relevance(value, rule, call.query, call.key, call.value)
            output.register_hook(rule.observe)
            return output
        weights = call.run()
        assert call.logits is not None
        if not weights.requires_grad:
            return weights
        derivatives: list[Tensor] = []

        def pull(gradient: Tensor, weights: Tensor, logits: Tensor) -> tuple[Tensor]:
            if on_rows is not None and derivatives:
                on_rows(slice(0, gradient.shape[-2]), weights, gradient * derivatives[-1])
            return (self._rescaled(gradient, weights, logits),)

        observed = self._with_relevance(weights, pull, call.logits)
        observed.register_hook(lambda gradient: None if self.relevance else derivatives.append(gradient.detach()))
        return observed

    def note_zeros(self, relevance: Tensor) -> None:
        """Add relevance to :attr:`on_zeros`, unless the leading axis of the tensor is not ordered by image."""
        if relevance.ndim and len(relevance) % self._batch == 0:
            sums = relevance.reshape(self._batch, -1).sum(1)
            self.on_zeros = self.on_zeros.to(sums) + sums

    def _with_relevance(self, value: Tensor, pull: RelevancePull, *inputs: Tensor) -> Tensor:
        result: Tensor = _TwoGradients.apply(value, self, pull, *inputs)
        return result

    def _unchanged(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Pass relevance through a function of one activation unchanged."""
        keywords = {name: False if name == "inplace" else value for name, value in kwargs.items()}
        value = func(*args, **keywords)
        activation = args[0] if args else kwargs["input"]
        if not is_active(activation):
            return value
        return self._with_relevance(value, lambda g, y, x: (self._rescaled(g, y, x),), activation)

    def _linear(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Give relevance to positive contributions only."""
        value = func(*args, **kwargs)
        arguments = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs)
        activation, weight = arguments["input"], arguments["weight"]
        if not is_active(activation) or weight.requires_grad:
            return value

        def pull(gradient: Tensor, output: Tensor, x: Tensor) -> tuple[Tensor]:
            dtype = torch.promote_types(x.dtype, torch.float32)
            inputs, matrix = x.to(dtype), weight.to(dtype)
            raising, lowering = matrix.clamp_min(0), matrix.clamp_max(0)
            positive = F.linear(inputs.clamp_min(0), raising) + F.linear(inputs.clamp_max(0), lowering)
            relevance = output.to(dtype) * gradient.to(dtype)
            self.note_zeros(torch.where((inputs == 0).all(-1), relevance.sum(-1), 0.0))
            shares = _divided(relevance, positive)
            pulled = torch.where(inputs > 0, shares @ raising, torch.where(inputs < 0, shares @ lowering, 0.0))
            return (pulled.to(x.dtype),)

        return self._with_relevance(value, pull, activation)

    def _add(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Share relevance between two summands, for each image."""
        first, second = args if len(args) == 2 else (args[0], kwargs["other"])
        active = [term for term in (first, second) if is_active(term)]
        if not active:
            return func(*args, **kwargs)
        value = func(*args, **kwargs)
        if len(active) == 1:
            return self._with_relevance(value, lambda g, y, x: (self._rescaled(g, y, x),), active[0])
        sign = (-1.0 if func in _SUBTRACTIONS else 1.0) * kwargs.get("alpha", 1)
        if len(value) != self._batch:
            raise UnsupportedModelError(
                f"{self._name} adds activations of shape {tuple(value.shape)}, which are not ordered by image, so "
                "transformer_attribution is not available: use generic_attention"
            )
        return self._with_relevance(value, lambda g, _, a, b: _shared(g, a, b, sign), first, second)

    def _multiply(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Halve the gradient of a product of two activations."""
        value = func(*args, **kwargs)
        if len(active_operands(args, kwargs)) < 2:
            return value
        return ScaledGradient.apply(value, 0.5, lambda: self.relevance)

    def _divide(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Give the relevance of a quotient of two activations to the numerator."""
        value = func(*args, **kwargs)
        operands = [operand for operand in args[:2] if is_active(operand)]
        if len(operands) < 2:
            return value
        numerator, denominator = args[0], args[1].detach()
        return self._with_relevance(value, lambda g, _, x: ((g / denominator).sum_to_size(x.shape),), numerator)

    def _rescaled(self, gradient: Tensor, output: Tensor, activation: Tensor) -> Tensor:
        """Return g·y/x, in the shape of x; 0 where x is 0."""
        dtype = torch.promote_types(activation.dtype, torch.float32)
        relevance = (gradient.to(dtype) * output.to(dtype)).sum_to_size(activation.shape)
        values = activation.to(dtype)
        is_zero = values == 0
        self.note_zeros(torch.where(is_zero, relevance, 0.0))
        return torch.where(is_zero, 0.0, relevance / values).to(activation.dtype)

    def _refuse(self, func: Any, args: Arguments, kwargs: Keywords) -> Any:
        """Refuse to add to an activation in place: the summand would be lost."""
        if any(is_active(term) for term in args[:2]):
            raise UnsupportedModelError(
                f"{self._name} adds to its activations in place, so transformer_attribution is not available: use "
                "generic_attention"
            )
        return func(*args, **kwargs)


def _divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, with a stabiliser; 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0.0, numerator / stabilised(denominator, STABILISER))


def _shared(gradient: Tensor, first: Tensor, second: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of the summands of first + sign · second."""
    axes = tuple(range(1, gradient.ndim))

    def total(term: Tensor) -> Tensor:
        return (term.to(dtype) * received).sum(axes, keepdim=True)

    dtype = torch.promote_types(gradient.dtype, torch.float32)
    received = gradient.to(dtype)
    of_first, of_second = total(first), sign * total(second)
    scale = (of_first + of_second) / (of_first.abs() + of_second.abs()).clamp_min(torch.finfo(dtype).tiny)
    # |Σag| / Σag is the sign, so that no small sum is a denominator.
    to_first, to_second = received * of_first.sign() * scale, received * of_second.sign() * scale * sign
    return to_first.sum_to_size(first.shape).to(first.dtype), to_second.sum_to_size(second.shape).to(second.dtype)


_SUBTRACTIONS = frozenset({torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__})
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__rsub__, *_SUBTRACTIONS)
_IN_PLACE_SUMS = (Tensor.add_, Tensor.sub_, Tensor.__iadd__, Tensor.__isub__)
_QUOTIENTS = (torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.__truediv__)
_UNCHANGED = (
    *(F.gelu, F.silu, F.mish, F.hardswish, F.relu, torch.relu, Tensor.relu),
    *(torch.sigmoid, Tensor.sigmoid, F.sigmoid, F.hardsigmoid, torch.special.expit),
    *(torch.tanh, Tensor.tanh, F.tanh, torch.erf, Tensor.erf, torch.special.erf),
    *(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.normalize),
)
