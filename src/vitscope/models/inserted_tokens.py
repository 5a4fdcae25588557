"""Prefix tokens that a context inserts into a model on the current thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from vitscope.models.vision_model import VisionModel


class _Inserted(threading.local):
    """The names of the tokens inserted into each module, by the id of the module."""

    def __init__(self) -> None:
        self.names: dict[int, tuple[str, ...]] = {}


_inserted = _Inserted()


@contextmanager
def inserted_tokens(module: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """While held, :func:`with_inserted_tokens` adds these names to the layout of every model of a module.

    This affects the current thread alone. The caller inserts the tokens themselves.
    """
    _inserted.names[id(module)] = names
    try:
        yield
    finally:
        del _inserted.names[id(module)]


def names_of_inserted_tokens(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the tokens that are inserted into a module now."""
    return _inserted.names.get(id(module), ())


def with_inserted_tokens(model: VisionModel) -> VisionModel:
    """Return a model whose prefix ends with the tokens that are inserted now; the model itself if there are none."""
    names, layout = names_of_inserted_tokens(model.module), model.layout
    if not names or layout is None or layout.prefix_names[-len(names) :] == names:
        return model
    return replace(model, layout=replace(layout, prefix_names=(*layout.prefix_names, *names)))
