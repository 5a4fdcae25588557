"""Entropy and mean attention distance of a head, one token at a time, in float64."""

import math

from torch import Tensor


def head_statistics(attention: Tensor, height: int, width: int, prefix: int) -> tuple[float, float]:
    """Return the entropy in nats and the distance in patches of one head's (token, token) attention.

    The entropy is the mean over all queries. The distance is between patches only: the prefix tokens have no
    position, so their share is left out and the rest is normalised.
    """
    rows = attention.double().tolist()
    entropies = [-sum(weight * math.log(weight) for weight in row if weight > 0) for row in rows]
    positions = [(y, x) for y in range(height) for x in range(width)]
    distances = []
    for query, row in zip(positions, rows[prefix:], strict=True):
        patches = row[prefix:]
        distance = sum(weight * math.dist(query, key) for weight, key in zip(patches, positions, strict=True))
        distances.append(distance / sum(patches))
    return sum(entropies) / len(entropies), sum(distances) / len(distances)
