"""stub"""

from typing import Any
from dataclasses import dataclass


@dataclass(frozen=True)
class Evidence:
    heads_first: bool = False


def experiment(model: Any, size: Any) -> Evidence:
    return Evidence()
