"""The options that all perturbation methods share: declared once, checked once, shown by help()."""

import inspect
import pydoc
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import vitscope as vs
from tests.helpers.tiny import tiny_vit
from vitscope.perturb.options import EvaluationArguments, PerturbationArguments, PerturbationOptions

METHODS: dict[str, Callable[..., Any]] = {
    "lime": vs.lime,
    "kernel_shap": vs.kernel_shap,
    "occlusion": vs.occlusion,
    "rise": vs.rise,
}
# Keyword options of each method and their defaults: they are part of the public API.
DEFAULTS: dict[str, dict[str, Any]] = {
    "lime": {
        "target": None,
        "num_samples": 1000,
        "segments": "quickshift",
        "sampling": None,
        "top_labels": 5,
        "kernel_width": 0.25,
        "alpha": 1.0,
        "confidence": 0.95,
        "top_segments": 5,
        "tie": 0.1,
        "hide": "mean",
    },
    "kernel_shap": {
        "target": None,
        "num_samples": 2048,
        "segments": "quickshift",
        "top_labels": 5,
        "hide": "mean",
    },
    "occlusion": {"target": None, "window": 1, "stride": 1, "hide": "mean"},
    "rise": {"target": None, "num_samples": 4000, "cells": 7, "keep_probability": 0.5, "hide": "mean"},
}
SHARED = {"output": "probability", "seed": 0, "batch_size": 64, "progress": False}
PHOTO = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

every_method = pytest.mark.parametrize("name", METHODS)


def test_the_dataclass_and_the_typed_dict_have_the_same_fields() -> None:
    options = {option.name: option.type for option in fields(PerturbationOptions)}
    assert PerturbationArguments.__optional_keys__ == set(options)
    assert set(PerturbationArguments.__annotations__) == set(options)
    assert set(EvaluationArguments.__annotations__) == set(options) - {"hide"}
    for name, annotation in PerturbationArguments.__annotations__.items():
        assert annotation == options[name], name


def test_compose_takes_the_shared_options_but_hide() -> None:
    parameters = inspect.signature(vs.compose).parameters
    assert {name: parameters[name].default for name in list(parameters)[-len(SHARED) :]} == SHARED
    text = pydoc.render_doc(vs.compose, renderer=pydoc.plaintext)
    assert "**options" not in text
    for option in SHARED:
        assert sum(line.startswith(f"        {option}: ") for line in text.splitlines()) == 1, option
    with pytest.raises(TypeError, match=r"^compose\(\) got an unexpected keyword argument 'hide'$"):
        vs.compose(vs.load(tiny_vit()), PHOTO, (2, 2, 9, 9), hide="mean")


@every_method
def test_the_signature_holds_every_option_with_its_default(name: str) -> None:
    parameters = inspect.signature(METHODS[name]).parameters
    assert [parameter for parameter in parameters if parameter not in ("model", "images")] == [
        *DEFAULTS[name],
        *SHARED,
    ]
    for option, default in (DEFAULTS[name] | SHARED).items():
        assert parameters[option].default == default, option
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY, option


@every_method
def test_help_describes_every_option_once(name: str) -> None:
    text = pydoc.render_doc(METHODS[name], renderer=pydoc.plaintext)
    assert "**options" not in text
    for option in DEFAULTS[name] | SHARED:
        assert sum(line.startswith(f"        {option}: ") for line in text.splitlines()) == 1, option


@every_method
def test_an_unknown_keyword_is_a_type_error_that_names_it(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'hidden'$"):
        METHODS[name](vs.load(tiny_vit()), PHOTO, hidden="mean")


def test_a_missing_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="images"):
        vs.lime(vs.load(tiny_vit()))  # type: ignore[call-arg]


@pytest.mark.parametrize(("name", "hide"), [(name, defaults["hide"]) for name, defaults in DEFAULTS.items()])
def test_the_default_of_the_signature_is_the_one_that_is_used(name: str, hide: str) -> None:
    options: dict[str, Any] = {} if name == "occlusion" else {"num_samples": 40}
    options |= {"segments": "patches"} if name in ("lime", "kernel_shap") else {}
    model = vs.load(tiny_vit())
    assert METHODS[name](model, PHOTO, **options).provenance["parameters"]["hide"] == hide
    assert METHODS[name](model, PHOTO, hide="blur", **options).provenance["parameters"]["hide"] == "blur"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "odds"}, "unknown output 'odds': choose logit, log_odds, probability, log_probability"),
        ({"seed": -1}, "seed is -1, a whole number from 0 to"),
        ({"seed": "x"}, "seed is 'x', a whole number is expected"),
        ({"batch_size": 0}, "batch_size is 0, at least 1 is expected"),
        ({"batch_size": 1.5}, "batch_size is 1.5, a whole number is expected"),
    ],
    ids=str,
)
def test_an_option_out_of_range_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(vs.CallError, match=message) as caught:
        PerturbationOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_numpy_numbers_become_python_numbers() -> None:
    options = PerturbationOptions(seed=np.uint8(3), batch_size=np.int64(5))  # type: ignore[arg-type]
    assert (type(options.seed), type(options.batch_size)) == (int, int)
