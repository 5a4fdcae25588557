"""A pre-norm block of a vision transformer with bottleneck adapters, in float64."""

from collections.abc import Mapping

import numpy as np
from scipy.special import erf

Array = np.ndarray
Linear = tuple[Array, Array]  # weight (out, in), bias

Bottleneck = tuple[Linear, Linear]  # down, up


def linear(x: Array, layer: Linear) -> Array:
    return x @ layer[0].T + layer[1]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def relu(x: Array) -> Array:
    return np.where(x > 0, x, 0.0)


def layer_norm(x: Array, norm: Linear, eps: float) -> Array:
    middle = x - x.mean(-1, keepdims=True)
    return middle / np.sqrt((middle**2).mean(-1, keepdims=True) + eps) * norm[0] + norm[1]


def self_attention(x: Array, joint: Linear, out: Linear, heads: int) -> Array:
    """Return attention, (token, channel); one layer computes queries, keys and values, in this order."""
    query, key, value = np.split(linear(x, joint), 3, axis=1)
    results = []
    for q, k, v in zip(*(np.split(joined, heads, axis=1) for joined in (query, key, value)), strict=True):
        scores = np.exp(q @ k.T / np.sqrt(q.shape[1]))
        results.append(scores / scores.sum(1, keepdims=True) @ v)
    return linear(np.concatenate(results, axis=1), out)


def serial(branch: Array, adapter: Bottleneck) -> Array:
    """Return h + W_u GELU(W_d h)."""
    down, up = adapter
    return branch + linear(gelu(linear(branch, down)), up)


def parallel(stream: Array, adapter: Bottleneck) -> Array:
    """Return 0.1 · W_u ReLU(W_d x)."""
    down, up = adapter
    return 0.1 * linear(relu(linear(stream, down)), up)


def block(x: Array, layers: Mapping[str, Linear], adapters: Mapping[str, Bottleneck], heads: int, eps: float) -> Array:
    """Return (token, channel) after attention and MLP; "scale1" and "scale2" multiply the branches if present."""
    branch = self_attention(layer_norm(x, layers["norm1"], eps), layers["joint"], layers["out"], heads)
    branch = branch * layers["scale1"][0] if "scale1" in layers else branch
    stream = x + (serial(branch, adapters["attention"]) if "attention" in adapters else branch)
    hidden = gelu(linear(layer_norm(stream, layers["norm2"], eps), layers["first"]))
    branch = linear(hidden, layers["second"])
    branch = branch * layers["scale2"][0] if "scale2" in layers else branch
    parallel_branch = parallel(stream, adapters["parallel"]) if "parallel" in adapters else 0.0
    return stream + (serial(branch, adapters["mlp"]) if "mlp" in adapters else branch) + parallel_branch


def merged(weight: Array, factors: list[tuple[Array, Array, list[int]]], scale: float) -> Array:
    """Return W + scale · BA, computed row by row from (A, B, rows) of each factor."""
    result = weight.copy()
    for a, b, rows in factors:
        for index, row in enumerate(rows):
            for column in range(weight.shape[1]):
                result[row, column] += scale * sum(b[index, i] * a[i, column] for i in range(len(a)))
    return result
