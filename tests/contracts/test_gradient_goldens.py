"""The maps of the gradient methods stay what they are: golden arrays, written by scripts/goldens."""

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vitscope as vs
from vitscope.methods.registry import METHODS

ROOT = Path(__file__).parents[2]


def script() -> Any:
    """Return scripts/goldens as a module."""
    loader = SourceFileLoader("goldens", str(ROOT / "scripts" / "goldens"))
    spec = spec_from_loader("goldens", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_maps_equal_the_golden_arrays() -> None:
    with np.load(ROOT / "tests" / "reference" / "gradient_maps.npz") as file:
        expected = dict(file)
    maps = script().maps()
    assert maps.keys() == expected.keys()
    for name, values in maps.items():
        scale = np.abs(expected[name]).max()
        assert scale > 0
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def test_every_gradient_method_has_a_golden_array() -> None:
    with np.load(ROOT / "tests" / "reference" / "gradient_maps.npz") as file:
        methods = {name.partition("/")[2] for name in file}
    assert methods == {name for name, method in METHODS.items() if method.kind == "gradient"} & set(dir(vs))
