"""How a model is trained: the report's recipe, a modern one, or one of your own in a TOML file."""

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from vitscope.errors import CallError
from vitscope.files import require_path
from vitscope.images.reading import check_file
from vitscope.tune.augmentation import CHANGES
from vitscope.validation import at_least, number, ratio, seed_number

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["constant", "cosine", "trapezoid"]
Precision = Literal["float32", "bfloat16", "float16"]

# The classifier and what is put in are new and learn fast; weights that know something learn slowly.
FAST, SLOW = 1e-3, 1e-4

# The largest that float32, in which the weights are, can hold.
LARGEST = 3.4e38


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Attributes:
        epochs: passes over the training images.
        learning_rate: the highest; None means 1e-4 for full tuning and 1e-3 for everything else.
        weight_decay: on matrices; biases, norms and tables are left out.
        schedule: ``"constant"``; ``"cosine"`` to zero; ``"trapezoid"``, constant and then linearly to zero.
        warmup: the share of all steps over which the learning rate rises from zero.
        decay: the share of all steps over which a trapezoid falls.
        batch_size: images to a forward; ``accumulate`` of these to a step.
        optimizer: ``"adamw"``; ``"muon"`` for the matrices of the blocks, AdamW (at ``learning_rate``) for the rest.
        muon_learning_rate: of Muon's matrices.
        betas: of AdamW.
        clip: the largest norm of all gradients together; 0 lets them be.
        label_smoothing: the share of a label that is spread over all classes.
        augment: changes made to each training image anew in every epoch: ``"mirror"``, ``"shift"`` (up to an eighth
            of the side), ``"crop"`` (a random half to whole of the area), ``"light"`` (brightness and contrast).
        precision: of the forward; weights stay as they are.
        validation: the share of the training images held out to watch the training.
        early_stop: so many epochs without a better validation accuracy end the run, and the best epoch is kept;
            None lets it run to its end, and the last epoch is kept.
        seed: of the classifier's first weights, of the order and the augmentation, of dropout.
    """

    epochs: int = 10
    learning_rate: float | int | None = None
    weight_decay: float | int = 0.05
    schedule: str = "cosine"
    warmup: float | int = 0.1
    decay: float | int = 0.6
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    muon_learning_rate: float | int = 4e-3
    betas: tuple[float | int, float | int] = (0.9, 0.999)
    clip: float | int = 1.0
    label_smoothing: float | int = 0.1
    augment: tuple[str, ...] = ("mirror", "crop")
    precision: str = "float32"
    validation: float | int = 0.0
    early_stop: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            at_least(1, getattr(self, name), name)
        for name in ("warmup", "decay", "label_smoothing", "validation"):
            ratio(getattr(self, name), name)
        for name in ("weight_decay", "clip", "muon_learning_rate", "learning_rate"):
            if getattr(self, name) is not None and not 0 <= number(getattr(self, name), name) <= LARGEST:
                raise CallError(f"{name} is {getattr(self, name)}: choose 0 to {LARGEST:g}")
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        if not pair or not all(0 <= number(beta, "a beta of betas") < 1 for beta in self.betas):
            raise CallError(f"betas is {self.betas!r}, two numbers from 0 to below 1 are expected")
        for name, known in (("schedule", Schedule), ("optimizer", Optimizer), ("precision", Precision)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in get_args(known):
                raise CallError(f"unknown {name} {getattr(self, name)!r}: choose {', '.join(get_args(known))}")
        if not isinstance(self.augment, tuple) or not all(isinstance(change, str) for change in self.augment):
            raise CallError(f"augment is {self.augment!r}: a tuple of some of {', '.join(CHANGES)} is expected")
        unknown = [change for change in self.augment if change not in CHANGES]
        if unknown:
            raise CallError(f"unknown augmentation {unknown[0]!r}: choose {', '.join(CHANGES)}")
        if self.early_stop is not None:
            at_least(1, self.early_stop, "early_stop")
            if not self.validation:
                raise CallError("early_stop needs validation, a share of the training images to watch")
        seed_number(self.seed)

    def rate(self, tuning: str) -> float:
        """The learning rate for a tuning."""
        if self.learning_rate is not None:
            return float(self.learning_rate)
        return SLOW if tuning == "full" else FAST

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


PRESETS: Mapping[str, Recipe] = {
    # Epochs, learning rate, weight decay and the missing schedule are the report's; it names nothing else.
    "report": Recipe(
        epochs=10,
        learning_rate=1e-3,
        weight_decay=1e-4,
        schedule="constant",
        warmup=0.0,
        clip=0.0,
        label_smoothing=0.0,
        augment=(),
    ),
    "modern": Recipe(),
}


def read_recipe(recipe: str | Path | Recipe, **changes: Any) -> Recipe:
    """A preset by name (``"report"``, ``"modern"``), or the settings in a TOML file, with changes.

    Args:
        changes: settings to take in place of the recipe's; None leaves it.

    Raises:
        CallError: no such preset or file, or a setting that is none.
    """
    if not isinstance(recipe, Recipe):
        path = require_path(recipe, "recipe")
        recipe = PRESETS[str(path)] if str(path) in PRESETS else _from_file(path)
    return _changed(recipe, {name: value for name, value in changes.items() if value is not None}, "a recipe")


def _from_file(path: Path) -> Recipe:
    if path.suffix.lower() != ".toml":
        raise CallError(f"unknown recipe {str(path)!r}: choose {', '.join(PRESETS)}, or pass a TOML file")
    check_file(path)
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CallError(f"{path} is no recipe: it is nested too deeply") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise CallError(f"{path} is no recipe: {str(error).splitlines()[0]}") from None
    base = read.pop("base", "modern")
    tables = [name for name, value in read.items() if isinstance(value, dict)]
    if tables:
        raise CallError(f"{path} has a table {tables[0]!r}: write its settings as name = value, without tables")
    if not isinstance(base, str) or base not in PRESETS:
        raise CallError(f"{path} builds on {base!r}: choose {', '.join(PRESETS)}")
    return _changed(PRESETS[base], read, str(path))


def _changed(recipe: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise CallError(f"{where} has no setting {unknown[0]!r}: it has {', '.join(sorted(known))}")
    # TOML has no tuples. A text is a sequence too: it must not become its letters.
    listed: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in changes.items()}
    try:
        return replace(recipe, **listed)
    except TypeError as error:
        raise CallError(f"{where}: {error}") from None
