"""Attention whose backward pass recomputes the weights, some rows at a time, and reports them with their gradient."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vitscope.attention.scores import in_float32, weights_of
from vitscope.attention.tap import AttentionCall

OnRows = Callable[[slice, Tensor, Tensor], None]  # rows of queries, their weights, and the gradient of these weights

# Weights that one block of the backward pass holds. Four tensors of a block share a processor's cache, or one alone.
CPU_BLOCK, CPU_BLOCK_ALONE, DEVICE_BLOCK = 1 << 19, 1 << 21, 1 << 24


def query_slices(queries: Tensor, keys: Tensor, size: int | None = None) -> Iterator[slice]:
    """Yield slices of the queries, each with few enough weights to recompute together.

    Args:
        queries: (batch · head, query, channel).
        keys: (batch · head, key, channel).
        size: number of weights; None for the default of the device.
    """
    size = size or (CPU_BLOCK if queries.device.type == "cpu" else DEVICE_BLOCK)
    count = queries.shape[1]
    step = max(1, min(count, max(16, size // (len(queries) * keys.shape[1]))))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


class RecomputedAttention(torch.autograd.Function):
    """Attention by the library's kernel, with the gradient of a rule.

    Args of ``apply``: queries, keys, values, and the bias; the call; whether the weights are a constant; the factor of
    the gradient of each of the two products, 1 or ½; a function that receives the weights and their gradient, or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        call: AttentionCall,
        constant: bool,
        factor: float,
        on_rows: OnRows | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, bias)
        ctx.scale, ctx.constant, ctx.factor, ctx.on_rows = call.scale, constant, factor, on_rows
        return call.run()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        if gradient is None:
            return (None,) * 8
        query, key, value, bias = ctx.saved_tensors
        with in_float32(query):
            if ctx.constant and ctx.on_rows is None:
                to_value = _pulled_by_weights(query, key, bias, ctx.scale, gradient * ctx.factor)
                return None, None, _shaped_as(to_value, value), None, None, None, None, None
            return (*_pulled_by_rows(ctx, query, key, value, bias, gradient), None, None, None, None)


def _pulled_by_rows(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, gradient: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Return the gradients of queries, keys, values and the bias, and report the weights with their gradient."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    through_scores = not ctx.constant and any(ctx.needs_input_grad[position] for position in (0, 1, 3))
    leading, factor = query.shape[:-2], ctx.factor
    queries, keys, values, outputs = (_flat(tensor, leading, dtype) for tensor in (query, key, value, gradient))
    outputs = outputs * factor if factor != 1 else outputs
    slices = list(query_slices(queries, keys))
    to_query = torch.empty_like(queries) if through_scores else None
    to_key = to_value = None
    to_bias = None if bias is None or not through_scores or not ctx.needs_input_grad[3] else torch.zeros_like(bias)
    for rows in slices:
        block, received = queries[:, rows], outputs[:, rows]
        weights = _weights(block, keys, ctx.scale, leading, bias, rows)
        to_value = _added(to_value, weights, received, 1.0)
        to_weights = torch.bmm(received, values.mT)
        shape = (*leading, *weights.shape[1:])
        if ctx.on_rows is not None:
            ctx.on_rows(rows, weights.view(shape), to_weights.view(shape))
        if to_query is None:
            continue
        to_scores = weights * to_weights
        sums = to_scores.sum(-1, keepdim=True)
        to_scores = torch.sub(to_weights, sums, out=to_scores).mul_(weights)
        if to_bias is not None:
            bias_rows = to_bias if to_bias.shape[-2] == 1 else to_bias[..., rows, :]
            bias_rows += to_scores.view(shape).sum_to_size(bias_rows.shape)
        to_query[:, rows] = torch.baddbmm(to_scores.new_empty(1), to_scores, keys, beta=0, alpha=ctx.scale * factor)
        to_key = _added(to_key, to_scores, block, ctx.scale * factor)
    assert to_value is not None
    pulled = [
        None if tensor is None else _shaped_as(tensor.view(*leading, *tensor.shape[1:]), original)
        for tensor, original in ((to_query, query), (to_key, key))
    ]
    return pulled[0], pulled[1], _shaped_as(to_value.view(*leading, *to_value.shape[1:]), value), to_bias


def _pulled_by_weights(query: Tensor, key: Tensor, bias: Tensor | None, scale: float, gradient: Tensor) -> Tensor:
    """Return Aᵀ · gradient, (…, key, channel): the gradient of the values, if nothing else is wanted."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    leading, count = query.shape[:-2], key.shape[-2]
    size = CPU_BLOCK_ALONE if query.device.type == "cpu" else DEVICE_BLOCK
    # As many images or windows as fit into a block: their weights are complete, so no products are added up.
    step = max(1, size // max(1, leading[1:].numel() * query.shape[-2] * count))
    result = torch.empty((*leading, count, gradient.shape[-1]), dtype=dtype, device=query.device)
    for start in range(0, leading[0], step):
        items = slice(start, min(start + step, leading[0]))
        axes = (items.stop - items.start, *leading[1:])
        tensors = (tensor.expand(*leading, *tensor.shape[-2:])[items] for tensor in (query, key, gradient))
        queries, keys, outputs = (_flat(tensor, axes, dtype) for tensor in tensors)
        has_item_axis = bias is not None and bias.ndim == query.ndim and len(bias) > 1
        item_bias = bias[items] if bias is not None and has_item_axis else bias
        total = None
        for rows in query_slices(queries, keys, size):
            weights = _weights(queries[:, rows], keys, scale, axes, item_bias, rows)
            total = _added(total, weights, outputs[:, rows], 1.0)
        assert total is not None
        result[items] = total.view(*axes, *total.shape[1:])
    return result


def _flat(tensor: Tensor, leading: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return (batch · head, token, channel), contiguous, because bmm copies strided tensors again for every block."""
    return tensor.to(dtype).expand(*leading, *tensor.shape[-2:]).flatten(0, -3).contiguous()


def _weights(
    block: Tensor, keys: Tensor, scale: float, leading: Sequence[int], bias: Tensor | None, rows: slice
) -> Tensor:
    """Return the weights of some rows of queries, (batch · head, row, key)."""
    scores = torch.baddbmm(block.new_empty(1), block, keys.mT, beta=0, alpha=scale)
    shaped = scores.view(*leading, *scores.shape[1:])
    if bias is not None:
        bias = bias if bias.shape[-2] == 1 else bias[..., rows, :]
        shaped += bias
    # In place, a block needs half the memory and stays in cache. Only the CPU kernel is known to allow it.
    return weights_of(shaped, bias, shaped if scores.device.type == "cpu" else None).view_as(scores)


def _added(total: Tensor | None, rows: Tensor, received: Tensor, factor: float) -> Tensor:
    """Return the total and factor · rowsᵀ · received; None is a total of zero."""
    if total is None:
        return torch.baddbmm(rows.new_empty(1), rows.mT, received, beta=0, alpha=factor)
    return total.baddbmm_(rows.mT, received, alpha=factor)


def _shaped_as(tensor: Tensor, original: Tensor) -> Tensor:
    """Return a gradient with the shape and the dtype of its tensor, which may have been expanded."""
    return tensor.sum_to_size(original.shape).to(original.dtype)
