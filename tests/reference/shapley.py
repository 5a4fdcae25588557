"""Shapley values by definition: the gain of a player over every coalition of the others."""

from collections.abc import Callable
from itertools import combinations
from math import factorial

import numpy as np


def shapley(value: Callable[[np.ndarray], float], players: int) -> np.ndarray:
    """Return Σ |S|! (n − |S| − 1)! / n! · (value(S and player) − value(S)) over all S without the player."""
    values = np.zeros(players)
    for player in range(players):
        others = [index for index in range(players) if index != player]
        for size in range(players):
            share = factorial(size) * factorial(players - size - 1) / factorial(players)
            for chosen in combinations(others, size):
                row = np.zeros(players, dtype=bool)
                row[list(chosen)] = True
                joined = row.copy()
                joined[player] = True
                values[player] += share * (value(joined) - value(row))
    return values
