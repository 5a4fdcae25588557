"""The options shared by all methods that evaluate a model on perturbed images."""

from dataclasses import dataclass
from typing import Any, TypedDict

from vitscope.models.targets import ScoreOutput, check_output
from vitscope.progress import ProgressLike
from vitscope.validation import require_at_least, require_seed


class BatchArguments(TypedDict, total=False):
    """The keyword arguments of :class:`PerturbationOptions` for a method that draws and hides nothing."""

    output: ScoreOutput
    batch_size: int
    progress: ProgressLike


class EvaluationArguments(BatchArguments, total=False):
    """The keyword arguments of :class:`PerturbationOptions` without ``hide``, for ``**options: Unpack[...]``."""

    seed: int


class PerturbationArguments(EvaluationArguments, total=False):
    """The keyword arguments of :class:`PerturbationOptions`, for ``**options: Unpack[...]``."""

    hide: Any


@dataclass(frozen=True, kw_only=True)
class PerturbationOptions:
    """Checked options of a method that evaluates a model on perturbed images.

    Attributes:
        hide: replacement of hidden pixels: ``"mean"`` (of each segment, which in occlusion is a patch; in RISE, which
            has no segments, of the image), ``"black"``, ``"grey"``, ``"blur"``, ``"noise"``, a colour (one number or
            three, 0 to 255), or an image. ``"drop"`` replaces nothing: patches that are more than half hidden are left
            out of the computation, which makes it faster.
        output: the number of a class to explain: ``"probability"``, ``"log_probability"``, ``"logit"``, or
            ``"log_odds"`` against all other classes.
        seed: seed of all random numbers, 0 to 2³² − 1.
        batch_size: maximum number of images per forward pass. It limits memory use and changes nothing else.
        progress: True for a bar on stderr, or a function that receives each :class:`vitscope.Progress`.

    Raises:
        CallError: an option is out of range.
    """

    hide: Any = "mean"
    output: ScoreOutput = "probability"
    seed: int = 0
    batch_size: int = 64
    progress: ProgressLike = False

    def __post_init__(self) -> None:
        check_output(self.output)
        object.__setattr__(self, "seed", require_seed(self.seed))
        object.__setattr__(self, "batch_size", require_at_least(1, self.batch_size, "batch_size"))
