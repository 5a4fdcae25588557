"""The methods of an explanation, each with its options: checked before anything is computed."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitscope.errors import CallError, UnsupportedModelError
from vitscope.methods.registry import METHODS, Method
from vitscope.models.vision_model import VisionModel
from vitscope.progress import ProgressLike
from vitscope.results.attribution import Attribution
from vitscope.typing import ImageTarget
from vitscope.validation import short_repr

DEFAULT = ("rollout", "libra")
ARGUMENTS = {"model", "images", "target", "progress"}  # of methods: all other parameters are their options


@dataclass(frozen=True)
class MethodRequest:
    """A method with its options.

    Attributes:
        name: in the registry.
        options: keyword arguments of the method, without target and progress.
    """

    name: str
    options: Mapping[str, Any]

    @property
    def method(self) -> Method:
        """The entry of the registry."""
        return METHODS[self.name]

    @property
    def takes_progress(self) -> bool:
        """Whether the method reports its progress."""
        return "progress" in inspect.signature(self.method.compute).parameters

    def takes(self, target: ImageTarget) -> bool:
        """Return whether the method takes a target; attention has a readout of a class, but none of other targets."""
        return self.method.takes_target and (self.method.kind != "attention" or isinstance(target, int | str))

    def compute(
        self,
        model: VisionModel,
        image: Any,
        target: ImageTarget | None,
        requests: Sequence["MethodRequest"],
        *,
        progress: ProgressLike,
    ) -> Attribution:
        """Compute the method, for the target if it takes one.

        Whether rollout has a readout of a class depends on the model. If it has none, it is computed without the
        target, as long as another of the ``requests`` explains it.
        """
        options = {**self.options, **({"progress": progress} if self.takes_progress else {})}
        if target is None or not self.takes(target):
            return self._compute(model, image, options)
        try:
            return self._compute(model, image, {"target": target, **options})
        except UnsupportedModelError:
            if self.method.kind != "attention" or all(request.method.kind == "attention" for request in requests):
                raise
            return self._compute(model, image, options)

    def _compute(self, model: VisionModel, image: Any, options: Mapping[str, Any]) -> Attribution:
        result: Attribution = self.method.compute(model, image, **options)
        return result


def method_requests(methods: Any, options: Mapping[str, Any]) -> list[MethodRequest]:
    """Return the methods to compute, each with its options.

    This is the one place where options that several methods share are passed on to those that take them.

    Args:
        methods: a name, a list of names, or a mapping from names to the options of each method; None for the default.
        options: shared by all methods that have an option of this name; those of a single method take precedence.

    Raises:
        CallError: there is no such method, a method has no such option, or none has a shared one.
        TypeError: no method at all has an option of this name.
    """
    own_options = _own_options(list(DEFAULT) if methods is None else methods)
    if methods is None and "head_fusion" in options:
        raise CallError(
            f"head_fusion is {short_repr(options['head_fusion'])}, but the default maps are rollouts with the mean and "
            "with the max of heads: pass methods"
        )
    for option in options:
        _check_shared_option(option, list(own_options))
    return [
        MethodRequest(name, {**{key: options[key] for key in options if key in options_of(name)}, **own})
        for name, own in own_options.items()
    ]


def check_target(requests: Sequence[MethodRequest], target: ImageTarget | None) -> None:
    """Check that one of the methods takes the target of an image if there is one.

    Raises:
        CallError: none of them does.
    """
    if target is None or any(request.takes(target) for request in requests):
        return
    takers = ", ".join(name for name in METHODS if MethodRequest(name, {}).takes(target))
    value, noun = (short_repr(target), "target") if isinstance(target, int | str) else (_kind_of(target),) * 2
    names = ", ".join(request.name for request in requests)
    raise CallError(f"target is {value}, but {names} takes no {noun.removeprefix('a ')}: add one of {takers}")


def options_of(name: str) -> list[str]:
    """Return the names of the options of a method.

    Examples:
        >>> options_of("attention")
        ['layer', 'head', 'query', 'drop_artefacts']
    """
    return [option for option in inspect.signature(METHODS[name].compute).parameters if option not in ARGUMENTS]


def _own_options(methods: Any) -> dict[str, Mapping[str, Any]]:
    """Return the methods, each with the options that were passed for it alone.

    Raises:
        CallError: there is no such method, or it has no such option.
    """
    names = [methods] if isinstance(methods, str) else methods
    if not isinstance(names, Sequence | Mapping) or not names or not all(isinstance(name, str) for name in names):
        raise CallError(
            f"methods is {short_repr(methods)}: pass the name of a method, a list of names, or a mapping from names to "
            f"options; the methods are {', '.join(METHODS)}"
        )
    own_options: dict[str, Mapping[str, Any]] = {}
    for name in names:
        if name not in METHODS:
            raise CallError(f"unknown method {name!r}: choose {', '.join(METHODS)}")
        own = methods[name] if isinstance(methods, Mapping) else {}
        if not isinstance(own, Mapping):
            raise CallError(f"the options of {name} are {short_repr(own)}: pass a mapping from names to values")
        for option in own:
            if option not in options_of(name):
                raise CallError(f"{name} has no option {option!r}: choose {', '.join(options_of(name))}")
        own_options[name] = own
    return own_options


def _check_shared_option(option: str, names: Sequence[str]) -> None:
    """Check that one of the methods has an option.

    Raises:
        CallError: only other methods have it.
        TypeError: no method has it, as for any unknown keyword argument.
    """
    takers = [name for name in METHODS if option in options_of(name)]
    if not takers:
        raise TypeError(f"explain() got an unexpected keyword argument {option!r}")
    if not set(takers) & set(names):
        raise CallError(f"{', '.join(names)} has no option {option!r}: add one of {', '.join(takers)}")


def _kind_of(target: ImageTarget) -> str:
    if isinstance(target, tuple):
        return "a contrast"
    return "a function" if callable(target) else "a reference image"
