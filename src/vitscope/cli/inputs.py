"""Inputs of commands: models, file names, numbers and colours."""

import errno
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.errors import CallError, ModelUnavailableError
from vitscope.validation import MAX_NAME_BYTES

if TYPE_CHECKING:
    from vitscope.models import VisionModel


def load_model(
    name: str,
    device: str | None,
    examples: Path | None = None,
    image_size: int | None = None,
    description: Mapping[str, Any] | None = None,
) -> "VisionModel":
    """Load a model.

    Args:
        name: the value of ``--model``.
        device: the value of ``--device``; None for cuda if it is available.
        examples: a folder with one subfolder of images per class, for a model without a classifier.
        image_size: side of the model's input in pixels.
        description: more keyword arguments of :func:`vitscope.load`, and ``examples``.

    Raises:
        CallError: there are several names, or one that is no possible file name.
    """
    description = dict(description or {})
    examples = description.pop("examples", examples)
    names = split_models([name])
    if names != [name] and len(names or ()) > 1:
        raise CallError(f"--model is {_quoted(name)}: this command takes one model")
    check_file_name(name, "--model")
    if examples is not None:
        check_file_name(examples, "--examples")
    import torch

    from vitscope.models import load

    if device is not None and device.partition(":")[0].strip() == "meta":
        raise ModelUnavailableError("--device is 'meta', which holds no numbers: pass cpu, cuda or mps")
    device = device or ("cuda" if torch.cuda.is_available() else None)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # for random weights
        model = load(name, device=device, **{"image_size": image_size, **description})
    if examples is None:
        return model
    from vitscope.models.nearest_class_mean import few_shot_classifier

    return few_shot_classifier(model, examples)


def load_models(
    names: Sequence[str] | None, more: Sequence[str] | None, device: str | None, description: Mapping[str, Any]
) -> list["VisionModel"]:
    """Load the models of a comparison.

    Args:
        names: the values of ``--model``; None for vit-nano.
        more: the values of ``--compare``.
        device: the value of ``--device``.
        description: keyword arguments of :func:`vitscope.load`, and ``examples``. The size and the examples hold for
            all models, everything else describes the first one.

    """
    first, *others = [*(names or ["vit-nano"]), *(more or ())]
    shared = {name: description[name] for name in ("image_size", "examples") if name in description}
    return [
        load_model(first, device, description=description),
        *(load_model(name, device, description=shared) for name in others),
    ]


def check_file_name(path: Path | str, option: str) -> None:
    """Check that a file could have this name.

    Raises:
        CallError: the name is too long for the file system, or holds the character NUL.
    """
    try:
        os.lstat(path)
    except ValueError:
        raise CallError(f"{option} is {_quoted(path)}: pass a name without the character NUL") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            longest = max(len(os.fsencode(name)) for name in Path(path).parts)
            raise CallError(
                f"{option} is {_quoted(path)}, a name of {longest} bytes: at most {MAX_NAME_BYTES} are possible here"
            ) from None


def _quoted(path: Path | str) -> str:
    """Return a path for a message, shortened if it is long."""
    text = str(path)
    return repr(text if len(text) <= 60 else f"{text[:40]}…{text[-12:]}")


TargetNames = str | tuple[str | None, str]  # a class, or the two of a contrast; None is the most likely class


def with_contrast(target: str | None, contrast: str | None) -> TargetNames | None:
    """Return what to explain: the target, or its contrast with another class."""
    return target if contrast is None else (target, contrast)


def parse_fill(text: str) -> str | list[float]:
    """Return a colour such as ``128`` or ``0,64,255`` as a list of numbers, and any other fill unchanged."""
    try:
        channels = [float(number) for number in parse_numbers(text, "a colour")]
    except CallError:
        return text
    return channels * 3 if len(channels) == 1 else channels


def parse_numbers(text: str, option: str) -> list[int | float]:
    """Return numbers separated by commas; whole numbers become ``int``.

    Raises:
        CallError: one of them is not a number.
    """
    try:
        return [int(item) if item.strip().lstrip("-").isdecimal() else float(item) for item in text.split(",")]
    except ValueError:
        raise CallError(f"{option} is {text!r}: pass numbers separated by commas") from None


def split_values(texts: list[str] | None) -> list[str] | None:
    """Return the values of an option that was repeated, or whose values are separated by commas; None for none.

    Raises:
        CallError: there are only commas.
    """
    if not texts:
        return None
    values = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not values:
        raise CallError(f"{texts[-1]!r} is no list: pass a name, or several separated by commas")
    return values


def split_models(texts: list[str] | None) -> list[str] | None:
    """Return the names of models, as :func:`split_values` does; a path with a comma is one name if it exists."""
    if texts is None:
        return None
    return [name for text in texts for name in ([text] if os.path.lexists(text) else split_values([text]) or [])]


def split_objects(texts: list[str] | None) -> list[str] | None:
    """Return the values of an option; those with a name may be separated by commas: ``a=1,2,3,4,b=5,6,7,8``."""
    if texts is None:
        return None
    return [value for text in texts for value in re.split(r",(?=[^,=]*[^,=\d\s.+-][^,=]*=)", text)]


def split_targets(texts: Sequence[str], labels: Sequence[str] | None) -> list[str]:
    """Return classes separated by commas. A label that contains commas, such as "tabby, tabby cat", is one class.

    Args:
        texts: the values of ``--target``.
        labels: the labels of the model; None if it has none.
    """
    known = {label.casefold() for label in labels or ()}
    targets: list[str] = []
    for text in texts:
        words = text.split(",")
        while words:
            joined = [",".join(words[:count]).strip() for count in range(len(words), 0, -1)]
            target = next((name for name in joined if name.casefold() in known), joined[-1])
            targets += [target] if target else []
            words = words[len(words) - joined.index(target) :]
    return targets
