"""The one place that sees attention happen, in whichever library and under whichever kernel.

A :class:`Tap` is a ``TorchFunctionMode``: while it is held, every call of
``F.scaled_dot_product_attention`` and every softmax over (…, heads, queries, keys) of the thread goes through
it, without a patched class or a changed setting. It is told of each as an :class:`AttentionCall` and decides
what comes out of it, so the same seam can watch, weigh or change attention.
"""

import math
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from vitscope.attention.flow import Flow, call_bit
from vitscope.attention.softmax_use import SoftmaxUses
from vitscope.interrupts import uninterrupted


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of attention, before it ran.

    Either ``query`` and ``key`` (…, token, channel) with ``scale`` and ``bias`` are known, and ``value``; or
    ``logits`` (…, query, key) are. ``run`` lets the library's own kernel compute what it was going to.

    If the tap follows the flow, ``index`` counts calls, ``inputs`` is the mask of what reached this call
    (:mod:`vitscope.attention.flow`), ``queries`` that of what reached the queries, and ``invocation`` numbers the run
    of the module that calls, so two calls with the same number come out of one run of one module.
    """

    module: str
    run: Callable[[], Tensor]
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None
    logits: Tensor | None = None
    index: int = 0
    inputs: int = 0
    queries: int = 0
    invocation: int = 0

    @property
    def num_queries(self) -> int:
        tensor = self.query if self.query is not None else self.logits
        assert tensor is not None
        return tensor.shape[-2]

    @property
    def leading_axes(self) -> tuple[int, ...]:
        """What comes before tokens and channels: (batch, head), (batch·head,), (batch·window, head), …"""
        tensor = self.query if self.query is not None else self.logits
        assert tensor is not None
        return tuple(tensor.shape[:-2])

    @property
    def num_keys(self) -> int:
        if self.key is not None:
            return self.key.shape[-2]
        assert self.logits is not None
        return self.logits.shape[-1]


OnAttention = Callable[[AttentionCall], Tensor]
OnModule = Callable[[Tensor, Any], None]  # a module's first argument and its output

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})


class Tap(TorchFunctionMode):
    """Hands every attention call of this thread to ``on_attention`` and returns what that returns.

    With ``flow`` the tap also follows which calls reached which tensor, and with ``uses`` what becomes of each softmax.
    """

    def __init__(
        self, module: nn.Module, on_attention: OnAttention, flow: Flow | None = None, uses: SoftmaxUses | None = None
    ) -> None:
        super().__init__()
        self._names = {id(child): name for name, child in module.named_modules(remove_duplicate=True)}
        self._on_attention = on_attention
        self._flow, self._uses = flow, uses
        self._running: list[tuple[str, int]] = []  # path and number of invocation
        self._invocations = 0
        self._aside = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._aside:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(self._factored_call(func, args, kwargs), func, args, kwargs)
        if func in _SOFTMAX:
            logits = args[0] if args else kwargs.get("input")
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if isinstance(logits, Tensor) and logits.ndim >= 3 and dim in (-1, logits.ndim - 1):
                run = lambda: func(*args, **kwargs)  # noqa: E731
                return self._attend(AttentionCall(self.module, run, logits=logits), func, args, kwargs)
        if func is F.multi_head_attention_forward:
            # While a mode handles a call it is switched off, so what runs inside would not be seen.
            with self:
                return _unguarded_multi_head_attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if self._flow is not None:
            self._flow.record(func, args, kwargs, result)
        if self._uses is not None:
            self._uses.record(func, args, kwargs, result)
        return result

    def _attend(self, call: AttentionCall, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        flow = self._flow
        if flow is None:
            return self._on_attention(call)
        index, flow.num_calls = flow.num_calls, flow.num_calls + 1
        queries = flow.mask(args[0] if args else kwargs.get("query", kwargs.get("input")))
        inputs = flow.mask(args) | flow.mask(kwargs)
        invocation = self._running[-1][1] if self._running else 0
        output = self._on_attention(replace(call, index=index, inputs=inputs, queries=queries, invocation=invocation))
        flow.record(func, args, kwargs, output, call_bit(index))
        if self._uses is not None and call.logits is not None:
            self._uses.start(index, output)
        return output

    @property
    def module(self) -> str:
        """The path of the module that is running."""
        return self._running[-1][0] if self._running else ""

    @contextmanager
    def follow(self, watch: Mapping[nn.Module, OnModule] | None = None) -> Iterator[None]:
        """While held, this thread's running module is known. Other threads' modules pass unnoticed.

        ``watch`` says which modules' input and output are asked for, and by whom; what is computed there is not
        taken for the model's own attention.
        """
        thread, watched = threading.get_ident(), watch or {}

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self._invocations += 1
                self._running.append((self._names.get(id(module), self.module), self._invocations))
                if self._flow is not None:
                    self._flow.enter(args)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() != thread or not self._running:
                return
            self._running.pop()
            if self._flow is not None:
                self._flow.leave(output)
            if module in watched and output is not None:
                self._aside = True
                try:
                    watched[module](args[0], output)
                finally:
                    self._aside = False

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
                self._flow.clear()

    def _factored_call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> AttentionCall:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = given["query"], given["key"], given["value"]
        if key.ndim > 2 and key.shape[-3] != query.shape[-3]:
            # Grouped-query attention: a key head serves several query heads.
            share = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(share, -3), value.repeat_interleave(share, -3)
        scale = given.get("scale")
        return AttentionCall(
            self.module,
            lambda: func(*args, **kwargs),
            query=query,
            key=key,
            value=value,
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            bias=_bias(given.get("attn_mask"), bool(given.get("is_causal")), query, key),
        )


def _bias(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask in any of the forms the kernel takes, as float32 to be added to the scores."""
    if is_causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, float("-inf"))
    return mask.float()


def _without_guard(function: Any) -> Callable[..., Any]:
    """A copy of a torch function whose opening question "does a mode want this call?" is answered no.

    Inside a mode that question leads straight back to the mode, for ever. The copy shares the code, so it
    computes what the library computes, and every call inside it is seen.
    """
    scope = dict(function.__globals__) | {"has_torch_function": lambda _: False}
    copy = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_unguarded_multi_head_attention = _without_guard(F.multi_head_attention_forward)
