"""The tap: a context that observes every attention call, in any library and with any kernel.

A :class:`Tap` is a ``TorchFunctionMode``. While it is active, every call of ``F.scaled_dot_product_attention`` and
every softmax over (…, head, query, key) in the current thread passes through it. No class is patched and no setting is
changed. The tap hands each call to a function as an :class:`AttentionCall` and returns what the function returns, so
the same interface can record, fuse or change attention.
"""

import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from vitscope.attention.flow import Flow, call_bit
from vitscope.attention.softmax_use import SoftmaxTracker
from vitscope.interrupts import uninterrupted


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """An attention call before it runs.

    A call of a fused kernel has ``query``, ``key``, ``value``, ``scale`` and ``bias``; a softmax has ``logits``. The
    last four attributes are set only if the tap records the data flow.

    Attributes:
        module: path of the running module.
        run: function that computes the output with the library's own kernel.
        query: queries (…, query, channel), or None for a softmax.
        key: keys (…, key, channel), or None for a softmax. Grouped keys are repeated for every query head.
        value: values (…, key, channel), or None for a softmax.
        scale: factor of the products of queries and keys.
        bias: float32 or float64 tensor added to the scores; None for no bias.
        logits: scores (…, query, key) before the softmax, or None for a fused kernel.
        arguments: arguments of the fused kernel by name; empty for a softmax.
        index: number of attention calls before this one.
        input_mask: mask of all arguments, see :mod:`vitscope.attention.flow`.
        query_mask: mask of the queries.
        invocation: number of the module's forward pass that makes the call; calls in one pass share it.
    """

    module: str
    run: Callable[[], Tensor]
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    logits: Tensor | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    index: int = 0
    input_mask: int = 0
    query_mask: int = 0
    invocation: int = 0

    @property
    def queries_or_logits(self) -> Tensor:
        """The tensor whose axis −2 holds the queries."""
        tensor = self.query if self.query is not None else self.logits
        assert tensor is not None
        return tensor

    @property
    def num_queries(self) -> int:
        """The number of queries."""
        return self.queries_or_logits.shape[-2]

    @property
    def leading_axes(self) -> tuple[int, ...]:
        """The sizes of the axes before tokens and channels: (batch, head), (batch·head,), (batch·window, head), …"""
        return tuple(self.queries_or_logits.shape[:-2])

    @property
    def num_keys(self) -> int:
        """The number of keys."""
        if self.key is not None:
            return self.key.shape[-2]
        assert self.logits is not None
        return self.logits.shape[-1]


OnAttention = Callable[[AttentionCall], Tensor]
# Runs a torch function on its arguments, perhaps with another gradient.
Runner = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]
OnModule = Callable[[Tensor, Any], None]  # the first argument of a module and its output

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})


class Tap(TorchFunctionMode):
    """A context that hands every attention call of the current thread to a function.

    Args:
        module: the model; the paths of its submodules name the calls.
        on_attention: function that takes an attention call and returns its output.
        flow: record of the attention calls that each tensor depends on; None to record none.
        softmax_tracker: tracker of the result of every softmax; needs ``flow``. None to track none.
        run: function that runs every torch function but attention, for a run with gradients. Weights are then
            constants, so ``requires_grad`` says which tensors depend on the image. None for a run without gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        on_attention: OnAttention,
        flow: Flow | None = None,
        softmax_tracker: SoftmaxTracker | None = None,
        run: Runner | None = None,
    ) -> None:
        super().__init__()
        self._names = {id(child): name for name, child in module.named_modules(remove_duplicate=True)}
        self._on_attention, self._run = on_attention, run
        self._flow, self._softmax_tracker = flow, softmax_tracker
        self._running: list[tuple[str, int]] = []  # path and number of invocation
        self._invocations = 0
        self._paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # A mode is inactive while it handles a call, so calls inside the function would not be observed.
            with self:
                return _unguarded_multi_head_attention(*args, **kwargs)
        # The data flow is recorded with the original arguments, which identify the weights.
        values, named = (args, kwargs) if self._run is None else (self._constants(args), self._constants(kwargs))
        if func is F.scaled_dot_product_attention:
            return self._attend(self._factored_call(func, values, named), func, args, kwargs)
        if func in _SOFTMAX:
            logits = values[0] if values else named.get("input")
            dim = values[1] if len(values) > 1 else named.get("dim")
            if isinstance(logits, Tensor) and logits.ndim >= 3 and dim in (-1, logits.ndim - 1):
                run = lambda: func(*values, **named)  # noqa: E731
                return self._attend(AttentionCall(self.module, run, logits=logits), func, args, kwargs)
        result = func(*values, **named) if self._run is None else self._run(func, values, named)
        if self._softmax_tracker is not None:
            result = self._softmax_tracker.record(func, args, kwargs, result)
        if self._flow is not None:
            self._flow.record(func, args, kwargs, result)
        return result

    def _attend(self, call: AttentionCall, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        """Return the output of an attention call and record its data flow."""
        flow = self._flow
        if flow is None:
            return self._on_attention(call)
        index, flow.num_calls = flow.num_calls, flow.num_calls + 1
        call = replace(
            call,
            index=index,
            input_mask=flow.mask(args) | flow.mask(kwargs),
            query_mask=flow.mask(args[0] if args else kwargs.get("query", kwargs.get("input"))),
            invocation=self._running[-1][1] if self._running else 0,
        )
        output = self._on_attention(call)
        flow.record(func, args, kwargs, output, call_bit(index))
        if self._softmax_tracker is not None and call.logits is not None:
            self._softmax_tracker.start(index, output)
        return output

    def _constants(self, value: Any) -> Any:
        """Return a value with every weight in it, also in lists, tuples and mappings, replaced by a constant."""
        if isinstance(value, Tensor):
            # Weights need not be parameters: a module may keep others, or compute its weights before the run.
            is_weight = isinstance(value, nn.Parameter) or (
                value.requires_grad and self._flow is not None and self._flow.is_weight(value)
            )
            return value.detach() if is_weight else value
        if type(value) in (list, tuple):
            return type(value)(self._constants(item) for item in value)
        if type(value) is dict:
            return {name: self._constants(item) for name, item in value.items()}
        return value

    @property
    def module(self) -> str:
        """The path of the running module; empty outside of all modules."""
        return self._running[-1][0] if self._running else ""

    @contextmanager
    def follow(self, watched: Mapping[nn.Module, OnModule] | None = None) -> Iterator[None]:
        """Keep track of the running module of the current thread; modules in other threads are ignored.

        Args:
            watched: functions by module, each called with the first argument and the output of its module. Attention
                calls inside these functions are not observed.
        """
        thread, callbacks = threading.get_ident(), watched or {}

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self._invocations += 1
                self._running.append((self._names.get(id(module), self.module), self._invocations))
                if self._flow is not None:
                    self._flow.enter_module(args)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != thread or not self._running:
                return
            self._running.pop()
            if self._flow is not None:
                self._flow.leave_module(output)
            if module in callbacks and output is not None:
                self._paused = True
                try:
                    callbacks[module](args[0], output)
                finally:
                    self._paused = False

        handles: list[Any] = []
        try:
            with uninterrupted():
                handles.append(register_module_forward_pre_hook(enter))
                handles.append(register_module_forward_hook(leave, always_call=True))
            yield
        finally:
            with uninterrupted():
                for handle in handles:
                    handle.remove()
            self._running.clear()
            if self._flow is not None:
                self._flow.clear_modules()

    def _factored_call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AttentionCall:
        """Return the attention call for the arguments of F.scaled_dot_product_attention."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = arguments["query"], arguments["key"], arguments["value"]
        if key.ndim > 2 and key.shape[-3] != query.shape[-3]:
            # Grouped-query attention: one key head serves several query heads.
            repeats = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
        scale = arguments.get("scale")
        return AttentionCall(
            self.module,
            lambda: func(*args, **kwargs),
            query=query,
            key=key,
            value=value,
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            bias=_bias(arguments.get("attn_mask"), bool(arguments.get("is_causal")), query, key),
            arguments=arguments,
        )


def _bias(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Return a mask, in any form that the kernel accepts, as a bias of the scores in float32 or float64."""
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    return mask if mask.dtype == torch.float64 else mask.float()


def _without_guard(function: Any) -> Callable[..., Any]:
    """Return a copy of a torch function that does not pass the call to the active mode.

    Inside a mode, the original would call the mode again and never return. The copy shares the code, so it computes
    what the library computes, and every call inside it is observed.
    """
    scope = dict(function.__globals__) | {"has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_unguarded_multi_head_attention = _without_guard(F.multi_head_attention_forward)
