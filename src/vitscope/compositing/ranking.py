"""Readings of a composition: the ranked classes of an edited image, and the output by the size of an object."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Ranked:
    """One class of an edited image.

    Attributes:
        label: the class.
        index: of the class.
        value: the output.
        change: the output minus that of the original.
    """

    label: str
    index: int
    value: float
    change: float


@dataclass(frozen=True)
class Ranking:
    """The likeliest classes of an edited image, likeliest first: a row of the table.

    Attributes:
        name: of the edited image.
        test: the test it belongs to.
        classes: the classes.
    """

    name: str
    test: str
    classes: tuple[Ranked, ...]


@dataclass(frozen=True, eq=False)
class SizeCurve:
    """The output for a class, by the size of an object.

    Attributes:
        name: of the object.
        target: the class.
        scales: of the object's sides, ascending.
        areas: the share of the photo that the object covers at each scale.
        values: the output at each scale.
    """

    name: str
    target: str
    scales: Float[np.ndarray, " size"]
    areas: Float[np.ndarray, " size"]
    values: Float[np.ndarray, " size"]
