"""Numbers with significant digits: a small weight does not read as zero."""

import pytest

from vitscope.views.numbers import MINUS, percentage, signed_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "+0.100"),
        (-0.0374, "-0.0374"),
        (0.0000123456, "+1.23e-05"),
        (-4e-12, "-4.00e-12"),
        (123.4, "+123"),
        (0, "0"),
        (0.9996, "+1.00"),
    ],
)
def test_three_digits_of_any_size(value: float, text: str) -> None:
    assert signed_number(value) == text


def test_digits_and_minus_are_chosen() -> None:
    assert signed_number(-0.1234, 2, minus=MINUS) == "−0.12"


@pytest.mark.parametrize(
    ("value", "text"), [(0.9312, "93.1%"), (0.01, "1.0%"), (0.0094, "0.94%"), (0.0000012, "0.00012%"), (0, "0%")]
)
def test_probabilities_below_one_percent_have_two_digits(value: float, text: str) -> None:
    assert percentage(value) == text
