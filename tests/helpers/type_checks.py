"""Type checks of all annotated functions of vitscope while the tests run."""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

check_shapes = jaxtyping.jaxtyped


def install() -> None:
    """Check the types, and the shapes if an annotation has them, in every call of a function of vitscope.

    jaxtyping binds the arguments of a function again in each call, to compare their shapes. That is slow, so only
    functions whose annotations have shapes are given to it; all others are checked by beartype alone. Functions inside
    functions are decorated again each time that they are created. Those without shapes are left to mypy.
    """
    jaxtyping.install_import_hook("vitscope", "beartype.beartype")
    jaxtyping.jaxtyped = checked


def checked(function: Any = None, *, typechecker: Any) -> Any:
    """Return a function or class with checks; without one, a decorator, as ``jaxtyping.jaxtyped`` does."""
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if not inspect.isfunction(function) or has_shapes(function):
        return check_shapes(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__:
        return function
    return check_types(function)


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checks the types of its arguments and result, unless jaxtyping is disabled."""
    strict, config = beartype(function), jaxtyping.config

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if config.jaxtyping_disable else strict)(*args, **kwargs)

    # The warnings of vitscope skip the frames of jaxtyping, to point at the calling line.
    as_jaxtyping = types.FunctionType(call.__code__, {"__name__": "jaxtyping"}, closure=call.__closure__)
    return functools.wraps(function)(as_jaxtyping)


def has_shapes(function: Callable[..., Any]) -> bool:
    """Return whether an annotation of a function may have the shape of an array."""
    return any(map(_has_shape, function.__annotations__.values()))


def _has_shape(annotation: Any) -> bool:
    if isinstance(annotation, str):  # its names may not exist yet
        return True
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    nested = annotation if isinstance(annotation, list) else typing.get_args(annotation)  # a list in Callable[[…], …]
    return any(map(_has_shape, nested))
