"""Attention flow by Abnar & Zuidema (2020) on a graph of networkx, in float64, from dense matrices."""

from collections.abc import Sequence

import networkx
import torch
from torch import Tensor


def with_residual(attention: Tensor, head_fusion: str = "mean") -> Tensor:
    """Return rownorm(E A + I) of the attention of one image, (head, token, token)."""
    heads = attention.double()
    fused = {"mean": heads.mean(0), "max": heads.max(0).values, "min": heads.min(0).values}[head_fusion]
    matrix = fused + torch.eye(len(fused), dtype=torch.float64)
    return matrix / matrix.sum(1, keepdim=True)


def graph_of(matrices: Sequence[Tensor], readout: Tensor) -> networkx.DiGraph:
    """Return the graph with a node (level, token) for each token, level 0 the input, and the node "source".

    Args:
        matrices: capacities between levels, (token after, token before), first block first.
        readout: share of each last token.
    """
    graph = networkx.DiGraph()
    for token, share in enumerate(readout.tolist()):
        graph.add_edge("source", (len(matrices), token), capacity=share)
    for level, matrix in enumerate(matrices):
        for after, row in enumerate(matrix.tolist()):
            for before, capacity in enumerate(row):
                if capacity > 0:
                    graph.add_edge((level + 1, after), (level, before), capacity=capacity)
    return graph


def flow(matrices: Sequence[Tensor], readout: Tensor, tokens: Sequence[int]) -> Tensor:
    """Return the maximum flow from the source to each of these input tokens."""
    graph = graph_of(matrices, readout)
    return torch.tensor(
        [networkx.maximum_flow_value(graph, "source", (0, token)) if (0, token) in graph else 0.0 for token in tokens],
        dtype=torch.float64,
    )
