"""Training recipes: the settings of a run, two presets, and recipes in TOML files."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_args

from vitscope.errors import CallError, first_line
from vitscope.files import require_path
from vitscope.validation import require_at_least, require_number, require_ratio, require_seed

Optimizer = Literal["adamw", "muon"]
Schedule = Literal["constant", "cosine", "trapezoid"]
Precision = Literal["float32", "bfloat16", "float16"]
Augmentation = Literal["mirror", "shift", "crop", "light"]
InitialClassifier = Literal["fitted", "random"]

# New weights (classifier, adapters) learn fast; full tuning changes pretrained weights and learns slowly.
FAST, SLOW = 1e-3, 1e-4

DEFAULT_AUGMENT: tuple[Augmentation, ...] = ("mirror", "crop")

# The length of a run follows the number of training images: more epochs for few images, until there are enough steps.
MIN_EPOCHS, MAX_EPOCHS, ENOUGH_STEPS = 10, 20, 300

# Training images from which they are augmented: a run on fewer is too short to learn from altered images.
AUGMENTED_FROM = 1000

# The largest number of float32, the format of the weights.
LARGEST = 3.4e38


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run.

    Attributes:
        epochs: Number of passes over the training images. None chooses it: 10 to 20, the smallest number with 300
            optimizer steps; ``head`` then only fits its classifier, which converges.
        learning_rate: Highest learning rate. None means 1e-4 for full tuning and 1e-3 for every other method.
        weight_decay: Weight decay of weight matrices. Biases, normalizations and embedding tables do not decay.
        schedule: Learning-rate schedule. ``"constant"``; ``"cosine"``, which falls to zero; ``"trapezoid"``, which is
            constant and then falls linearly to zero.
        warmup: Share of all steps over which the learning rate rises from zero.
        decay: Share of all steps over which the learning rate of a trapezoid falls.
        batch_size: Images per forward pass.
        accumulate: Forward passes per optimizer step.
        optimizer: Optimizer. ``"adamw"``, or ``"muon"`` for the matrices of the blocks, with AdamW for the rest.
        muon_learning_rate: Learning rate of the matrices that Muon updates.
        betas: The two momentum coefficients of AdamW.
        clip: Largest norm of the gradient. 0 turns clipping off.
        label_smoothing: Share of a label that is spread evenly over all classes.
        augment: Augmentations of each training image, drawn again in every epoch. None chooses by the
            number of images: ``"mirror"`` and ``"crop"`` from 1,000 images on, none for fewer or for ``head``.
            ``"mirror"``; ``"shift"`` by up to an eighth of the side; ``"crop"`` to between half and all of the
            area; ``"light"``, brightness and contrast.
        initial_classifier: Weights of the classifier before the first step. ``"fitted"`` is a logistic regression on
            the features of the untuned backbone, with a penalty chosen by cross-validation; ``"random"``.
        precision: Number format of the forward pass. The weights stay as they are.
        validation: Share of the training images held out to monitor training.
        early_stop: Number of epochs without a better validation accuracy after which training stops. The best epoch is
            kept. None trains for all epochs and keeps the last one.
        seed: Random seed of the new classifier, the order of the images, the augmentations and dropout.

    Raises:
        CallError: a setting has another type or is out of range.

    Examples:
        >>> Recipe(epochs=3, augment=("mirror",)).schedule
        'cosine'
    """

    epochs: int | None = None
    learning_rate: float | int | None = None
    weight_decay: float | int = 0.05
    schedule: Schedule = "cosine"
    warmup: float | int = 0.1
    decay: float | int = 0.6
    batch_size: int = 32
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    muon_learning_rate: float | int = 4e-3
    betas: tuple[float | int, float | int] = (0.9, 0.999)
    clip: float | int = 1.0
    label_smoothing: float | int = 0.1
    augment: tuple[Augmentation, ...] | None = None
    initial_classifier: InitialClassifier = "fitted"
    precision: Precision = "float32"
    validation: float | int = 0.0
    early_stop: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            if name != "epochs" or self.epochs is not None:
                require_at_least(1, getattr(self, name), name)
        for name in ("warmup", "decay", "label_smoothing", "validation"):
            require_ratio(getattr(self, name), name)
        for name in ("weight_decay", "clip", "muon_learning_rate", "learning_rate"):
            if getattr(self, name) is not None and not 0 <= require_number(getattr(self, name), name) <= LARGEST:
                raise CallError(f"{name} is {getattr(self, name)}: choose 0 to {LARGEST:g}")
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        if not pair or not all(0 <= require_number(beta, "a beta of betas") < 1 for beta in self.betas):
            raise CallError(f"betas is {self.betas!r}: pass two numbers from 0 to below 1")
        for name, names in (
            ("schedule", Schedule),
            ("optimizer", Optimizer),
            ("precision", Precision),
            ("initial_classifier", InitialClassifier),
        ):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in get_args(names):
                raise CallError(f"unknown {name} {getattr(self, name)!r}: choose {', '.join(get_args(names))}")
        choices = ", ".join(get_args(Augmentation))
        augment = () if self.augment is None else self.augment
        if not isinstance(augment, tuple) or not all(isinstance(name, str) for name in augment):
            raise CallError(f"augment is {self.augment!r}: pass a tuple of some of {choices}")
        unknown = [name for name in augment if name not in get_args(Augmentation)]
        if unknown:
            raise CallError(f"unknown augmentation {unknown[0]!r}: choose {choices}")
        if self.early_stop is not None:
            require_at_least(1, self.early_stop, "early_stop")
            if not self.validation:
                raise CallError("early_stop needs validation, a share of the training images to hold out")
        require_seed(self.seed)

    def resolved(self, tuning: str, num_images: int) -> "Recipe":
        """Return the recipe with every setting that it leaves open, chosen from the tuning method and the data.

        Args:
            tuning: the tuning method.
            num_images: number of training images.
        """
        trained = round(num_images * (1 - float(self.validation)))
        augment, epochs = self.augment, self.epochs
        if augment is None:
            augment = DEFAULT_AUGMENT if tuning != "head" and trained >= AUGMENTED_FROM else ()
        recipe = replace(self, augment=augment)
        if epochs is None and not recipe.only_fits(tuning):
            steps_per_epoch = math.ceil(trained / (self.batch_size * self.accumulate))
            epochs = min(max(math.ceil(ENOUGH_STEPS / max(steps_per_epoch, 1)), MIN_EPOCHS), MAX_EPOCHS)
        return replace(recipe, epochs=epochs)

    def only_fits(self, tuning: str) -> bool:
        """Return whether a resolved recipe ends with the fitted classifier: ``head``, if no setting asks for steps."""
        steps = self.epochs, self.learning_rate, self.early_stop, self.augment or None
        return tuning == "head" and self.initial_classifier == "fitted" and all(setting is None for setting in steps)

    def rate(self, tuning: str) -> float:
        """Return the learning rate for a tuning method."""
        if self.learning_rate is not None:
            return float(self.learning_rate)
        return SLOW if tuning == "full" else FAST

    def as_json(self) -> dict[str, Any]:
        """Return every setting in types that JSON supports."""
        return asdict(self)


class RecipeChanges(TypedDict, total=False):
    """Settings of a :class:`Recipe` to change, as keyword arguments."""

    epochs: int | None
    learning_rate: float | int | None
    weight_decay: float | int
    schedule: Schedule
    warmup: float | int
    decay: float | int
    batch_size: int
    accumulate: int
    optimizer: Optimizer
    muon_learning_rate: float | int
    betas: tuple[float | int, float | int]
    clip: float | int
    label_smoothing: float | int
    augment: tuple[Augmentation, ...] | None
    initial_classifier: InitialClassifier
    precision: Precision
    validation: float | int
    early_stop: int | None
    seed: int


PRESETS: Mapping[str, Recipe] = {
    # The report names epochs, learning rate, weight decay and no schedule; everything else is switched off.
    "report": Recipe(
        epochs=10,
        learning_rate=1e-3,
        weight_decay=1e-4,
        schedule="constant",
        warmup=0.0,
        clip=0.0,
        label_smoothing=0.0,
        augment=(),
        initial_classifier="random",
    ),
    "modern": Recipe(),
}


def read_recipe(recipe: str | Path | Recipe, **changes: Unpack[RecipeChanges]) -> Recipe:
    """Return a preset or the recipe in a TOML file, with some settings replaced.

    Args:
        recipe: ``"report"``, ``"modern"``, the path of a TOML file, or a recipe.
        changes: settings that replace those of the recipe; None keeps the recipe's.

    Raises:
        CallError: there is no such preset, file or setting, or a value is out of range.
    """
    if not isinstance(recipe, Recipe):
        path = require_path(recipe, "recipe")
        recipe = PRESETS[str(path)] if str(path) in PRESETS else _recipe_of_file(path)
    return _replace(recipe, {name: value for name, value in changes.items() if value is not None}, "a recipe")


def _recipe_of_file(path: Path) -> Recipe:
    """Return the recipe in a TOML file."""
    from vitscope.images.sources import require_regular_file

    if path.suffix.lower() != ".toml":
        raise CallError(f"unknown recipe {str(path)!r}: choose {', '.join(PRESETS)}, or pass a TOML file")
    require_regular_file(path)
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CallError(f"{path} is not a recipe: it is nested too deeply") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise CallError(f"{path} is not a recipe: {first_line(error)}") from None
    base = settings.pop("base", "modern")
    tables = [name for name, value in settings.items() if isinstance(value, dict)]
    if tables:
        raise CallError(f"{path} has a table {tables[0]!r}: write settings as name = value, without tables")
    if not isinstance(base, str) or base not in PRESETS:
        raise CallError(f"{path} has the base {base!r}: choose {', '.join(PRESETS)}")
    return _replace(PRESETS[base], settings, str(path))


def _replace(recipe: Recipe, changes: Mapping[str, Any], source: str) -> Recipe:
    """Return the recipe with other settings; ``source`` is their origin in error messages."""
    names = {field.name for field in fields(Recipe)}
    unknown = sorted(set(changes) - names)
    if unknown:
        raise CallError(f"{source} has no setting {unknown[0]!r}: choose {', '.join(sorted(names))}")
    # TOML has lists instead of tuples. Text must not become a tuple of letters.
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    try:
        return replace(recipe, **values)
    except TypeError as error:
        raise CallError(f"{source}: {error}") from None
