"""Numbers as text with significant digits, so that a small effect does not read as zero."""

MINUS = "−"
IMPROBABLE = 0.01  # below this probability, its changes are too small to read


def signed_number(value: int | float, digits: int = 3, *, minus: str = "-") -> str:
    """Return a number with its sign and a number of significant digits.

    Args:
        value: the number.
        digits: significant digits.
        minus: the minus sign.

    Examples:
        >>> signed_number(0.1), signed_number(-0.00001234), signed_number(0)
        ('+0.100', '-1.23e-05', '0')
    """
    return "0" if value == 0 else f"{value:+#.{digits}g}".rstrip(".").replace("-", minus)


def percentage(value: int | float) -> str:
    """Return a probability in percent with one decimal, and two significant digits below 1 %.

    Examples:
        >>> percentage(0.9312), percentage(0.00012345), percentage(0)
        ('93.1%', '0.012%', '0%')
    """
    return f"{value:.1%}" if value >= IMPROBABLE else f"{100 * value:.2g}%"
