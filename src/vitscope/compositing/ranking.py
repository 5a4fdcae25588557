"""Parts of a result: the ranked classes of an edited image, and the output by the size of an object."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from vitscope.display import counted, ends, one_line


@dataclass(frozen=True)
class Ranked:
    """One class of an edited image.

    Attributes:
        label: the class.
        index: the index of the class.
        value: the output for the class.
        change: the output minus the output for the original.
    """

    label: str
    index: int
    value: float
    change: float


@dataclass(frozen=True)
class Ranking:
    """The most probable classes of an edited image in descending order: a row of the table.

    Attributes:
        name: the name of the edited image.
        test: the test it belongs to.
        classes: the classes and their outputs.
    """

    name: str
    test: str
    classes: tuple[Ranked, ...]


@dataclass(frozen=True, eq=False)
class SizeCurve:
    """The output for a class, by the size of an object.

    Attributes:
        name: the name of the object.
        target: the class.
        scales: the scales of the object's sides, ascending.
        areas: the share of the photo that the object covers at each scale.
        values: the output at each scale.
    """

    name: str
    target: str
    scales: Float[np.ndarray, " size"]
    areas: Float[np.ndarray, " size"]
    values: Float[np.ndarray, " size"]

    def __repr__(self) -> str:
        sizes = f"{counted(len(self.scales), 'size')} of scale {ends(self.scales)}"
        return one_line(f"SizeCurve of {self.target} by the size of {self.name}: {sizes}", ends(self.values))
