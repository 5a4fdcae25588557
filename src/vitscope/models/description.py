"""The arguments of load() that describe a model: its preprocessing, classes, output and tokens."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from vitscope.errors import CallError, UnsupportedModelError
from vitscope.images.preprocessing import Preprocessing
from vitscope.models.backends.libraries import LIBRARIES, backend
from vitscope.models.checkpoints.json_file import parse_object, read_bytes
from vitscope.models.checkpoints.paths import PROCESSOR_FILE
from vitscope.models.forward import Embedding, NoClasses, Observed
from vitscope.models.layout import Layout
from vitscope.models.outputs import Output, Select, require_output
from vitscope.models.text import NO_TEXT_TOWER, TextEncoder, require_text_tower
from vitscope.models.vision_model import VisionModel
from vitscope.models.zero_shot import zero_shot_classifier
from vitscope.validation import require_number

Size = tuple[int, int]
Channels = tuple[float, ...] | float  # a single number applies to every channel


@dataclass(frozen=True)
class Description:
    """The checked arguments of :func:`vitscope.load` that describe a model."""

    image_size: Size | None = None
    layout: Layout | None = None
    readout: Mapping[str, float] | None = None
    backbone: str | None = None
    output: Output | None = None
    labels: tuple[str, ...] | None = None
    select: Select | None = None
    logits: Callable[[Any], Tensor] | None = None
    embed: Callable[[Any], Tensor] | None = None
    preprocessing: Preprocessing | None = None
    mean: Channels | None = None
    std: Channels | None = None
    tokenizer: Any = None
    processor_tokenizer: Any = None

    @property
    def selects_output(self) -> bool:
        """Whether the caller selects an entry of the output or reads it with a function."""
        return any(argument is not None for argument in (self.select, self.logits, self.embed))

    @property
    def reads_features(self) -> bool:
        """Whether the caller's arguments mean that the model is explained by its features."""
        declares_classes = self.logits is not None or self.output not in (None, "features")
        return self.output == "features" or (self.embed is not None and not declares_classes)

    def observe(self, model: VisionModel) -> Observed:
        """Return the forward pass of the model, with its output read as described."""
        run = getattr(model.forward, "run", None)
        return Observed(model.module, model.name, run, self.output, self.select, self.logits, self.labels is not None)

    def apply(self, model: VisionModel) -> VisionModel:
        """Return the model with the description applied.

        Raises:
            CallError: the description does not fit the model.
        """
        changes: dict[str, Any] = {"preprocessing": self._preprocessing_of(model), "text": self._text_of(model)}
        observing = isinstance(model.forward, Observed) and not (self.output is None and self.labels is None)
        if self.output == "features" and model.embed is not None and not self.selects_output:
            changes |= {"forward": NoClasses(getattr(model.forward, "run", None) or model.module), "labels": None}
        elif self.selects_output or self.output == "features" or observing:
            observed = self.observe(model)
            changes |= {"forward": observed, "embed": Embedding(observed, self.embed), "output": None}
            if self.reads_features:
                changes |= {"forward": NoClasses(observed.run or observed.module), "labels": None}
        if self.output is not None and self.output != "features":
            changes["output"] = None if self.output == "logits" and model.output is None else self.output
        if self.labels is not None:
            changes["labels"] = self.labels
        if self.readout is not None:
            if model.layout is None:
                raise CallError("readout needs patch_size: pass it too, because the token layout is unknown")
            readout = require_readout(self.readout, model.layout.prefix_names)
            changes["layout"] = replace(model.layout, readout=readout, readout_from_caller=True)
        result = replace(model, **changes)
        if self.labels is None:
            return result
        if result.text is None:
            if result.library in LIBRARIES and result.meaning == "features":
                raise UnsupportedModelError(f"labels have no classes to name: {NO_TEXT_TOWER.format(result.name)}")
            return result
        if self.output not in (None, "logits", result.text.meaning):
            raise CallError(
                f"output={self.output!r} does not fit the labels of {model.name}, which are texts that it compares "
                f"with an image ({result.text.meaning!r}): omit output, or labels"
            )
        return zero_shot_classifier(result, self.labels)

    def _text_of(self, model: VisionModel) -> TextEncoder | None:
        """Return the text tower of a model with the caller's tokenizer; None if the caller reads other features."""
        if self.tokenizer is not None:
            require_text_tower(model.text, model.name)
        if model.text is None or self.selects_output:
            return None
        tokenizer = self.processor_tokenizer if self.tokenizer is None else self.tokenizer
        return model.text if tokenizer is None else model.text.with_tokenizer(tokenizer)

    def _preprocessing_of(self, model: VisionModel) -> Preprocessing | None:
        """Return the preprocessing of a model with the described changes."""
        base = self.preprocessing or model.preprocessing
        statistics = [name for name in ("mean", "std") if getattr(self, name) is not None]
        if base is None:
            return self._preprocessing_of_size(model)
        if self.preprocessing is not None and self.image_size not in (None, base.size):
            assert self.image_size is not None
            base = base.resized(self.image_size)
        if statistics:
            sources = (base.source, f"{' and '.join(statistics)} passed to load")
            source = "; ".join(text for text in sources if text)
            channels = (None if self.preprocessing else model.channels) or len(base.mean)
            mean = _per_channel(base.mean if self.mean is None else self.mean, channels, "mean")
            std = _per_channel(base.std if self.std is None else self.std, channels, "std")
            base = replace(base, mean=mean, std=std, source=source)
        return base

    def _preprocessing_of_size(self, model: VisionModel) -> Preprocessing | None:
        """Return the preprocessing defined by image_size, with mean and std if these were passed."""
        if self.image_size is None:
            if self.mean is not None or self.std is not None:
                raise CallError(f"mean and std need image_size: the input size of {model.name} is unknown")
            return None
        if self.mean is not None and self.std is not None:
            lengths = [len(values) for values in (self.mean, self.std) if isinstance(values, tuple)]
            channels = model.channels or (lengths[0] if lengths else 3)
            mean, std = _per_channel(self.mean, channels, "mean"), _per_channel(self.std, channels, "std")
            return Preprocessing(self.image_size, mean, std, source="mean, std and image_size passed to load")
        if self.mean is not None or self.std is not None:
            raise CallError("mean and std belong together: pass both")
        if model.backbone or model.library != "module":
            return None
        # As load() documents: for a module of no known library, image_size alone means pixels from -1 to 1.
        return Preprocessing(self.image_size, source="image_size alone: pixels from -1 to 1 (mean 0.5, std 0.5)")


def require_description(
    *,
    image_size: Size | None,
    layout: Layout | None,
    readout: Mapping[str, float] | None,
    backbone: str | None,
    output: Any,
    labels: Any,
    select: Any,
    logits: Any,
    embed: Any,
    processor: Any,
    tokenizer: Any,
    mean: Any,
    std: Any,
) -> Description:
    """Return the checked arguments of :func:`vitscope.load` that describe a model.

    Raises:
        CallError: an argument has an invalid value.
    """
    for name, function in (("logits", logits), ("embed", embed)):
        if function is not None and not callable(function):
            raise CallError(f"{name} is {function!r}: a function of the module's output is expected")
    if select is not None and (isinstance(select, bool) or not isinstance(select, str | int)):
        raise CallError(f"select is {select!r}: pass a key, a position, or keys joined by dots")
    if backbone is not None and not isinstance(backbone, str):
        raise CallError(f"backbone is {backbone!r}: pass the path of a module, such as 'model.encoder'")
    means, deviations = _require_channels(mean, "mean"), _require_channels(std, "std")
    if isinstance(means, tuple) and isinstance(deviations, tuple) and len(means) != len(deviations):
        raise CallError(f"mean has {len(means)} channels and std {len(deviations)}: pass one number for each channel")
    return Description(
        image_size,
        layout,
        readout,
        backbone,
        require_output(output),
        None if labels is None else read_labels(labels),
        select,
        logits,
        embed,
        None if processor is None else read_processor(processor, image_size),
        means,
        deviations,
        tokenizer,
        getattr(processor, "tokenizer", None),
    )


def _require_channels(values: Any, name: str) -> Channels | None:
    """Return mean or std as a tuple, or as one number for all channels."""
    if values is None:
        return None
    single = isinstance(values, int | float) and not isinstance(values, bool)
    if not single and (isinstance(values, str | bool) or not hasattr(values, "__iter__")):
        raise CallError(f"{name} is {values!r}: pass one number for each channel")
    channels = tuple(require_number(value, name) for value in ([values] if single else values))
    if not channels or (name == "std" and 0 in channels):
        raise CallError(f"{name} is {values!r}: pass one number for each channel{', none zero' * (name == 'std')}")
    return channels[0] if single else channels


def _per_channel(values: Channels, channels: int, name: str) -> tuple[float, ...]:
    """Return one number for each channel."""
    if not isinstance(values, tuple):
        return (values,) * channels
    if len(values) != channels:
        raise CallError(f"{name} has {len(values)} numbers, and the model takes {channels} channels: pass one for each")
    return values


def read_labels(labels: Any) -> tuple[str, ...]:
    """Return class names from a sequence, a mapping from index to name, or a file of either (JSON or lines).

    Raises:
        CallError: the labels are not names of the classes 0, 1, 2, …
    """
    if isinstance(labels, str | Path):
        try:
            text = read_bytes(Path(labels)).decode("utf-8")
        except ValueError as error:  # also an invalid file name, and text that is not UTF-8
            raise CallError(f"labels: {str(labels)[:100]!r} {_reason(error)}: pass a file of names") from None
        try:
            labels = json.loads(text)
        except (ValueError, RecursionError):
            labels = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(labels, Mapping):
        try:
            by_index = {int(index): label for index, label in labels.items()}
        except (TypeError, ValueError):
            by_index = {}
        if sorted(by_index) != list(range(len(labels))):
            raise CallError(f"labels has the keys {list(labels)[:5]}: pass indices from 0 without gaps")
        labels = [by_index[index] for index in range(len(by_index))]
    if not isinstance(labels, Sequence) or not labels or not all(isinstance(label, str) for label in labels):
        raise CallError(
            "labels is not a list of class names: pass one name per class, a mapping from index to name, or a file of "
            "either"
        )
    return tuple(labels)


def _reason(error: ValueError) -> str:
    return "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def read_processor(processor: Any, size: Size | None) -> Preprocessing:
    """Return the preprocessing that an image processor, a data configuration or a folder describes.

    Args:
        processor: an image processor of transformers, its settings, or a folder with preprocessor_config.json; timm's
            data configuration; torchvision's ``weights.transforms()``; or a Preprocessing.
        size: height and width of the input in pixels; None for the size in the processor's settings.

    Raises:
        CallError: the processor is none of these, or has no fixed input size.
    """
    if isinstance(processor, Preprocessing):
        return processor
    if isinstance(processor, str | Path):
        try:
            file = Path(processor) / PROCESSOR_FILE if Path(processor).is_dir() else Path(processor)
            settings = parse_object(read_bytes(file), allow_nan=False)
        except (OSError, ValueError) as error:
            raise CallError(
                f"processor: {str(processor)[:100]} cannot be read (it {error}): pass the folder or file of a saved "
                "image processor"
            ) from None
        return _preprocessing_of_settings(settings, size, str(file))
    if isinstance(processor, Mapping):
        return _preprocessing_of_settings(processor, size, "the processor passed to load")
    inner = getattr(processor, "image_processor", processor)
    if hasattr(inner, "to_dict"):
        return _preprocessing_of_settings(inner.to_dict(), size, f"the {type(inner).__name__} passed to load")
    if all(hasattr(processor, name) for name in ("crop_size", "resize_size", "mean", "std", "interpolation")):
        preprocessing: Preprocessing = backend("torchvision").read_transforms(processor, size)
        return replace(preprocessing, source="torchvision's transforms passed to load")
    raise CallError(
        f"processor is a {type(processor).__name__}: pass an image processor of transformers, its folder or settings, "
        "timm's data configuration, or weights.transforms() of torchvision"
    )


def _preprocessing_of_settings(settings: Any, size: Size | None, source: str) -> Preprocessing:
    """Return the preprocessing that saved settings of timm or transformers describe."""
    if not isinstance(settings, Mapping) or not settings:
        raise CallError(f"{source} contains no image processor settings: pass those of timm or transformers")
    if "input_size" in settings or "crop_pct" in settings:
        preprocessing: Preprocessing = backend("timm").read_data_config(settings, size)
    else:
        preprocessing = backend("transformers").saved_processor({}, settings, size, source)
    return replace(preprocessing, source=source)


def require_readout(readout: Mapping[str, float], prefix: Sequence[str]) -> Mapping[str, float]:
    """Return the readout if it names existing tokens and its weights sum to one.

    Raises:
        CallError: a name is unknown, a weight is negative, or the weights do not sum to one.
    """
    sources = {*prefix, "patches", "tokens", "pooling"}
    weights = list(readout.values())
    valid = all(isinstance(weight, int | float) and weight >= 0 for weight in weights)
    if not weights or not sources.issuperset(readout) or not valid or not abs(sum(weights) - 1) <= 1e-6:
        value = dict(readout) if len(readout) != 1 else next(iter(readout))
        raise CallError(f"readout is {value!r}: pass one of {sorted(sources)}, or weights over them that sum to one")
    return dict(readout)
