"""The three backend modules offer every function of their protocol, with the same arguments."""

import inspect
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest

from vitscope.models.backends.libraries import LIBRARIES, backend
from vitscope.models.backends.protocol import Backend, TimmBackend, TorchvisionBackend, TransformersBackend

PROTOCOLS: dict[str, type] = {
    "transformers": TransformersBackend,
    "timm": TimmBackend,
    "torchvision": TorchvisionBackend,
}


def members(protocol: type) -> dict[str, Any]:
    """The functions that a protocol declares itself or inherits."""
    return {name: value for name, value in inspect.getmembers(protocol, inspect.isfunction) if name[0] != "_"}


CASES = [(library, name) for library, protocol in PROTOCOLS.items() for name in members(protocol)]
every_member = pytest.mark.parametrize(("library", "name"), CASES, ids=[f"{a}-{b}" for a, b in CASES])


def alternatives(annotation: Any) -> set[Any]:
    return set(get_args(annotation)) or {annotation}


def test_every_library_has_a_protocol() -> None:
    assert tuple(PROTOCOLS) == LIBRARIES
    assert all(members(Backend).keys() <= members(protocol).keys() for protocol in PROTOCOLS.values())


@every_member
def test_a_backend_accepts_the_arguments_of_its_protocol(library: str, name: str) -> None:
    pytest.importorskip(library)
    declared = list(inspect.signature(members(PROTOCOLS[library])[name]).parameters.values())[1:]  # without self
    actual = inspect.signature(getattr(backend(library), name)).parameters
    positional = [parameter for parameter in actual.values() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    count = sum(parameter.kind is parameter.POSITIONAL_ONLY for parameter in declared)
    assert len(positional) >= count
    assert all(parameter.default is not parameter.empty for parameter in positional[count:])
    for parameter in declared[count:]:
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert actual[parameter.name].kind is parameter.KEYWORD_ONLY
        assert actual[parameter.name].default == parameter.default
    accepted = {parameter.name for parameter in declared}
    for parameter in actual.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in accepted:
            assert parameter.default is not parameter.empty, f"{name} of {library} requires {parameter.name}"


@every_member
def test_a_backend_has_the_types_of_its_protocol(library: str, name: str) -> None:
    """A backend may accept more than the protocol says, and return less."""
    pytest.importorskip(library)
    declared = get_type_hints(members(PROTOCOLS[library])[name])
    actual = get_type_hints(getattr(backend(library), name))
    for parameter, annotation in actual.items():
        if parameter == "return":
            assert alternatives(annotation) <= alternatives(declared["return"]) | {NoneType}
        elif parameter in declared and annotation is not Any:
            assert alternatives(declared[parameter]) <= alternatives(annotation) | {Any}


@every_member
def test_every_function_of_a_protocol_has_a_docstring(library: str, name: str) -> None:
    assert members(PROTOCOLS[library])[name].__doc__
