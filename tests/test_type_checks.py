"""The type checks of the tests themselves: what they refuse, and what switches them off."""

import pytest
import torch

import vitscope as vs
from tests.helpers.type_checks import has_shapes
from vitscope.methods.rollout import discard_smallest
from vitscope.validation import require_ratio

TYPE_ERROR = r"type"


def test_wrong_types_are_refused() -> None:
    with pytest.raises(Exception, match=TYPE_ERROR):
        require_ratio(0.5, name=3)  # type: ignore[arg-type]
    with pytest.raises(Exception, match=TYPE_ERROR):
        vs.Grid("8", 8)  # type: ignore[arg-type]


def test_wrong_shapes_are_refused() -> None:
    assert has_shapes(discard_smallest)
    with pytest.raises(Exception, match=TYPE_ERROR):
        discard_smallest(torch.zeros(2), 0.5, None)  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_they_can_be_switched_off() -> None:
    assert require_ratio(0.5, name=3) == 0.5  # type: ignore[arg-type]
