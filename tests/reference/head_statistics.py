"""Entropy and mean attention distance of a head, token by token and in float64."""

import math

from torch import Tensor


def head_statistics(attention: Tensor, height: int, width: int, prefix: int) -> tuple[float, float]:
    """Of one head's (token, token) attention: the entropy in nats and the distance in patches.

    The entropy is the mean over all queries. For the distance each patch looks at patches only: the prefix
    tokens have no place, so their share is left out and the rest made to sum to one.
    """
    rows = attention.double().tolist()
    entropies = [-sum(weight * math.log(weight) for weight in row if weight > 0) for row in rows]
    places = [(y, x) for y in range(height) for x in range(width)]
    distances = []
    for here, row in zip(places, rows[prefix:], strict=True):
        patches = row[prefix:]
        far = sum(weight * math.dist(here, there) for weight, there in zip(patches, places, strict=True))
        distances.append(far / sum(patches))
    return sum(entropies) / len(entropies), sum(distances) / len(distances)
