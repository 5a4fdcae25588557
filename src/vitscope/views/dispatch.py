"""The functions that return the scene or the table of a result; each class of results is registered elsewhere."""

from functools import singledispatch
from typing import Any

from vitscope.errors import CallError
from vitscope.views.scene import Scene


@singledispatch
def scene_of(result: Any, index: int | None) -> Scene:  # noqa: ARG001 (the signature of all implementations)
    """Return the figure of a result as a scene.

    Args:
        result: any result with a figure.
        index: index of the image; None for the first, or for the first six maps.

    Raises:
        CallError: there is no such image.
    """
    raise TypeError(f"{type(result).__name__} has no figure")


@singledispatch
def table_of(result: Any) -> str:
    """Return the table of a result as HTML."""
    raise TypeError(f"{type(result).__name__} has no table")


def refuse_index(result: Any, index: int | None) -> None:
    """Refuse the index of an image for a result whose figure is of no single image."""
    if index is not None:
        raise CallError(f"index is {index!r}: the figure of a {type(result).__name__} is not of a single image")
