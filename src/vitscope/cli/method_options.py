"""Options of methods, read from the command line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscope.cli.inputs import check_file_name, parse_fill, parse_numbers
from vitscope.errors import CallError, first_line

if TYPE_CHECKING:
    import numpy as np

Methods = Sequence[str] | Mapping[str, Mapping[str, Any]] | None


def parse_num_samples(text: str) -> int | str:
    """Return the value of ``--num-samples``: a number, or "auto"."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise CallError(f"--num-samples is {text!r}: pass a whole number, or 'auto'") from None


def parse_segments(text: str) -> "str | np.ndarray":
    """Return the name of a segmentation, or the labels in a file."""
    path = Path(text)
    if not path.suffix:
        return text
    check_file_name(path, "--segments")
    import numpy as np
    from PIL import Image

    from vitscope.images.sources import require_regular_file

    require_regular_file(path)
    try:
        return np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.asarray(Image.open(path))
    except (OSError, ValueError, EOFError) as error:
        raise CallError(f"{path} holds no segment labels: {first_line(error)}") from None


PARSERS = {"hide": parse_fill, "num_samples": parse_num_samples, "segments": parse_segments}


def shared_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were passed, by their names in Python."""
    return {
        name: PARSERS[name](value) if name in PARSERS else value for name, value in values.items() if value is not None
    }


def with_assignments(
    methods: Sequence[str] | None, shared: Mapping[str, Any], assignments: Sequence[str]
) -> tuple[Methods, dict[str, Any]]:
    """Return the methods with their own options, and the shared options, after all values of ``--option``.

    Args:
        methods: the names of the methods; None for the default maps.
        shared: the options that hold for all methods that take them.
        assignments: values of ``--option``: ``name=value``, or ``method.name=value`` for one method.

    Raises:
        CallError: a value is no assignment, names a method that was not chosen or an option that no method has, or an
            option has two values.
    """
    from vitscope.explanation.requests import method_requests, option_of

    chosen = [request.name for request in method_requests(methods, {})]
    own: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    shared = dict(shared)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        method, dot, name = key.strip().rpartition(".")
        name = name.strip().replace("-", "_")
        if not equals or not name or (dot and not method):
            raise CallError(f"--option is {assignment!r}: pass name=value, or method.name=value")
        if dot and method not in own:
            raise CallError(f"--option is {assignment!r}, but the methods are {', '.join(own)}: pass --method {method}")
        takers = [method] if dot else chosen
        if all(option_of(taker, name) is None for taker in takers):
            raise CallError(_unknown(assignment, name, takers))
        # The options of the default maps have different names, so that each belongs to one of them anyway.
        target = own[method] if dot and methods is not None else shared
        if name in target:
            raise CallError(f"--option is {assignment!r}, but {name} has a value already: pass one")
        target[name] = parse_value(text)
    return (methods if not any(own.values()) else own), shared


def parse_value(text: str) -> Any:
    """Return a value: a number, true, false, null or a list as in JSON, numbers separated by commas, or the text.

    Examples:
        >>> parse_value("0.5"), parse_value("true"), parse_value("3,4"), parse_value("libra")
        (0.5, True, (3, 4), 'libra')
    """
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return tuple(parse_numbers(text, "--option"))
    except CallError:
        return text


def _unknown(assignment: str, name: str, methods: Sequence[str]) -> str:
    """Return what is wrong with an option that no chosen method has: the methods that have it, or all options."""
    from vitscope.explanation.requests import option_of, options_of
    from vitscope.methods.registry import METHODS

    takers = [taker for taker in METHODS if option_of(taker, name) is not None]
    noun = f"{', '.join(methods)} {'has' if len(methods) == 1 else 'have'} no option {name!r}"
    if takers:
        return f"--option is {assignment!r}, but {noun}: add --method {' or '.join(takers)}"
    options = "; ".join(f"{method}: {', '.join(options_of(method)) or 'none'}" for method in methods)
    return f"--option is {assignment!r}, but {noun}: choose from {options}"
