"""Inputs of commands: models, file names, numbers and colours."""

import errno
import os
from collections.abc import Mapping
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
        description: more keyword arguments of :func:`vitscope.load`.
    """
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
        model = load(name, device=device, image_size=image_size, **(description or {}))
    if examples is None:
        return model
    from vitscope.models.nearest_class_mean import few_shot_classifier

    return few_shot_classifier(model, examples)


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


def split_list(text: str) -> list[str]:
    """Return names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]
