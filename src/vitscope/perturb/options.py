"""The options shared by all methods that evaluate a model on perturbed images."""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from vitscope.errors import CallError
from vitscope.progress import ProgressLike
from vitscope.validation import require_at_least, require_seed

Output = Literal["probability", "logit"]


class EvaluationArguments(TypedDict, total=False):
    """The keyword arguments of :class:`PerturbationOptions` without ``hide``, for ``**options: Unpack[...]``."""

    output: Output
    seed: int
    batch_size: int
    progress: ProgressLike


class PerturbationArguments(EvaluationArguments, total=False):
    """The keyword arguments of :class:`PerturbationOptions`, for ``**options: Unpack[...]``."""

    hide: Any


@dataclass(frozen=True, kw_only=True)
class PerturbationOptions:
    """Checked options of a method that evaluates a model on perturbed images.

    Attributes:
        hide: replacement of hidden pixels: ``"mean"`` (of each segment), ``"black"``, ``"grey"``, ``"blur"``,
            ``"noise"``, a colour (one number or three, 0 to 255), or an image. ``"drop"`` replaces nothing: patches
            that are more than half hidden are left out of the computation, which makes it faster.
        output: the output to explain: ``"probability"`` or ``"logit"``.
        seed: seed of all random numbers, 0 to 2³² − 1.
        batch_size: maximum number of images per forward pass. It limits memory use and changes nothing else.
        progress: True for a bar on stderr, or a function that receives each :class:`vitscope.Progress`.

    Raises:
        CallError: an option is out of range.
    """

    hide: Any = "mean"
    output: Output = "probability"
    seed: int = 0
    batch_size: int = 64
    progress: ProgressLike = False

    def __post_init__(self) -> None:
        if self.output not in get_args(Output):
            raise CallError(f"unknown output {self.output!r}: choose {' or '.join(get_args(Output))}")
        object.__setattr__(self, "seed", require_seed(self.seed))
        object.__setattr__(self, "batch_size", require_at_least(1, self.batch_size, "batch_size"))
