"""Options of methods on the command line of explain."""

import json
from typing import Any

import pytest

import vitscope as vs
from tests.helpers.command_line import call, needs_bundled, photo_in_an_empty_folder
from vitscope.cli.method_options import parse_value, shared_options, with_assignments
from vitscope.errors import CallError

photo = photo_in_an_empty_folder


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-0.5", -0.5),
        ("true", True),
        ("null", None),
        ("[2, 3]", [2, 3]),
        ("3,4", (3, 4)),
        ("libra", "libra"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_values_are_read_as_in_json(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_only_options_that_were_passed_are_shared() -> None:
    values = {"hide": "0,64,255", "num_samples": "auto", "segments": "slic", "seed": None, "output": "logit"}
    assert shared_options(values) == {
        "hide": [0, 64, 255],
        "num_samples": "auto",
        "segments": "slic",
        "output": "logit",
    }


def test_an_assignment_is_for_one_method_or_for_all() -> None:
    methods, shared = with_assignments(
        ["rise", "occlusion"], {"seed": 1}, ["rise.cells=5", "batch-size=8", "rise.hide=0,0,9", "rise.seed=2"]
    )
    assert methods == {"rise": {"cells": 5, "hide": (0, 0, 9), "seed": 2}, "occlusion": {}}
    assert shared == {"seed": 1, "batch_size": 8}
    assert with_assignments(["libra"], {}, []) == (["libra"], {})
    assert with_assignments(None, {}, ["libra.gamma=0.1", "discard_ratio=0.5"]) == (
        None,
        {"gamma": 0.1, "discard_ratio": 0.5},
    )


@pytest.mark.parametrize(
    ("methods", "assignment", "line"),
    [
        (["rise"], "cells", "^--option is 'cells': pass name=value, or method.name=value$"),
        (["rise"], "=3", "pass name=value"),
        (["rise"], ".cells=3", "pass name=value"),
        (["rise"], "lime.alpha=3", "^--option is 'lime.alpha=3', but the methods are rise: pass --method lime$"),
        (["rise"], "alpha=3", "^--option is 'alpha=3', but rise has no option 'alpha': add --method lime$"),
        (["rise", "lime"], "rise.alpha=3", "rise has no option 'alpha': add --method lime$"),
        (
            ["rise", "libra"],
            "x=3",
            r"rise, libra have no option 'x': choose from rise: num_samples, .*; libra: variant",
        ),
        (["rise"], "seed=3", "^--option is 'seed=3', but seed has a value already: pass one$"),
        (["nonsense"], "nonsense.seed=3", "^unknown method 'nonsense': choose attention"),
    ],
)
def test_a_wrong_assignment_is_refused_in_one_line(methods: list[str], assignment: str, line: str) -> None:
    with pytest.raises(CallError, match=line) as caught:
        with_assignments(methods, {"seed": 1}, [assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@needs_bundled
def test_the_command_passes_options_to_the_methods(photo, capsys, monkeypatch) -> None:
    arguments = ("--method", "rise,integrated_gradients", "-n", "9", "--hide", "black", "--output", "log_odds")
    assignments = ("-O", "integrated_gradients.steps=2,cells=3", "--seed", "4", "--batch-size", "5")
    code, out, err = call(capsys, monkeypatch, "explain", photo, *arguments, *assignments, "--no-figure", "--json")
    assert (code, err) == (0, "")
    (entry,) = json.loads(out)["results"]
    parameters = {name: result["provenance"]["parameters"] for name, result in entry["results"].items()}
    rise, gradients = parameters["rise"], parameters["integrated_gradients"]
    assert [rise[key] for key in ("num_samples", "hide", "output", "cells", "seed")] == [9, "black", "log_odds", 3, 4]
    assert [gradients[key] for key in ("steps", "baseline", "output")] == [2, "black", "log_odds"]
    expected = vs.rise(vs.load("vit-nano"), photo, num_samples=9, hide="black", output="log_odds", cells=3, seed=4)
    assert rise == json.loads(json.dumps(expected.provenance["parameters"]))


@needs_bundled
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--hide", "black"), "libra have no option 'hide': add one of lime, kernel_shap, occlusion, rise"),
        (("--method", "libra", "-n", "9"), "libra has no option 'num_samples': add one of lime, kernel_shap, rise"),
        (("--method", "rise", "--num-samples", "many"), "--num-samples is 'many': pass a whole number, or 'auto'"),
        (("--method", "rise", "-O", "x=3"), "rise has no option 'x': choose from rise: num_samples, cells"),
    ],
    ids=str,
)
def test_an_option_that_no_method_takes_is_refused(photo, capsys, monkeypatch, arguments, line) -> None:
    code, out, err = call(capsys, monkeypatch, "explain", photo, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err
