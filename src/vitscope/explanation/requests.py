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
# The options that name a baseline: what hidden parts become, or the image without information. A value of either is
# passed to methods that have the other. Methods that are compared have the same baseline.
BASELINE_OPTIONS = ("hide", "baseline")
COMPARISON_BASELINE = "mean"


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
            ``hide`` and ``baseline`` are names for the same. If several methods have one of them, it is by default
            :data:`COMPARISON_BASELINE` in all of them.

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
    shared = {**_comparison_baseline(list(own_options), options), **options}
    requests = [MethodRequest(name, {**_taken(name, shared), **own}) for name, own in own_options.items()]
    _check_baselines(requests)
    return requests


def _comparison_baseline(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the baseline of a comparison as an option, if several of its methods have one and none was passed."""
    takers = [name for name in names if option_of(name, "hide") is not None]
    return {"hide": COMPARISON_BASELINE} if len(takers) > 1 and not set(BASELINE_OPTIONS) & set(options) else {}


def _taken(name: str, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shared options that a method takes, under its own names."""
    taken: dict[str, Any] = {}
    own = options_of(name)
    for option in sorted(shared, key=own.__contains__):  # its own name of a baseline comes last: it takes precedence
        if (key := option_of(name, option)) is not None:
            taken[key] = shared[option]
    return taken


def _check_baselines(requests: Sequence[MethodRequest]) -> None:
    """Check that no method that needs an image as its baseline has "drop", which leaves none.

    Raises:
        CallError: there is one.
    """
    baselines = {request.name: request.options.get("baseline") for request in requests}
    names = [name for name, baseline in baselines.items() if isinstance(baseline, str) and baseline == "drop"]
    if names:
        raise CallError(
            f"hide is 'drop', which leaves no image, but {', '.join(names)} needs one as the baseline: choose another "
            "hide, or leave this method out"
        )


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


def option_of(name: str, option: str) -> str | None:
    """Return the name under which a method takes a shared option: a baseline has two. None if it takes none.

    Examples:
        >>> option_of("rise", "hide"), option_of("integrated_gradients", "hide"), option_of("libra", "hide")
        ('hide', 'baseline', None)
    """
    own = options_of(name)
    names = BASELINE_OPTIONS if option in BASELINE_OPTIONS else ()
    return option if option in own else next((name for name in names if name in own), None)


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
    takers = [name for name in METHODS if option_of(name, option) is not None]
    if not takers:
        raise TypeError(f"explain() got an unexpected keyword argument {option!r}")
    if not set(takers) & set(names):
        verb = "has" if len(names) == 1 else "have"
        raise CallError(f"{', '.join(names)} {verb} no option {option!r}: add one of {', '.join(takers)}")


def _kind_of(target: ImageTarget) -> str:
    if isinstance(target, tuple):
        return "a contrast"
    return "a function" if callable(target) else "a reference image"
