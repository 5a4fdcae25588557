"""Public docstrings: an imperative first line, and Google-style sections that name every parameter."""

import inspect
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

import vitscope as vs

griffe = pytest.importorskip("griffe")

# First words that begin a description where an instruction is wanted.
NO_VERBS = {"The", "A", "An", "What", "Where", "Which", "How", "Whether", "One", "Every", "All", "This", "It", "That"}
FUNCTIONS = [name for name in vs.__all__ if inspect.isfunction(getattr(vs, name))]
CLASSES = [name for name in vs.__all__ if inspect.isclass(getattr(vs, name))]


def methods() -> Iterator[tuple[str, Any]]:
    """Yield the public functions and the public methods of public classes."""
    for name in FUNCTIONS:
        yield name, getattr(vs, name)
    for name in CLASSES:
        for member, value in vars(getattr(vs, name)).items():
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not member.startswith("_") and inspect.isfunction(function):
                yield f"{name}.{member}", function


@pytest.mark.parametrize(("name", "function"), [pytest.param(*case, id=case[0]) for case in methods()])
def test_the_first_line_is_an_instruction(name: str, function: Any) -> None:
    doc = inspect.getdoc(function)
    assert doc, f"{name} has no docstring"
    first = doc.splitlines()[0]
    assert first.split()[0] not in NO_VERBS, first
    assert first.endswith("."), first


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function = getattr(vs, name)
    with caplog.at_level(logging.WARNING):
        sections = griffe.Docstring(inspect.getdoc(function)).parse("google", warnings=True)
    documented = {
        parameter.name.lstrip("*")
        for section in sections
        if section.kind is griffe.DocstringSectionKind.parameters
        for parameter in section.value
    }
    for parameter in inspect.signature(function).parameters:
        assert parameter in documented, f"{name} does not document {parameter}"
    assert any(section.kind is griffe.DocstringSectionKind.examples for section in sections), f"{name} has no Example"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_is(name: str) -> None:
    doc = inspect.getdoc(getattr(vs, name))
    assert re.match(r"[A-Z].*\.$", (doc or "").split("\n\n")[0].replace("\n", " ")), name
