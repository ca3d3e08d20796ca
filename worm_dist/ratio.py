"""Ratio: a share of channels, read from a decimal number or a fraction, and its exact value."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = ["exact", "parse_ratio"]

_LEAST_DIGITS = 6


def parse_ratio(value: object) -> object:
    """Read a fraction such as ``"1/3"``; anything else is returned as it is.

    Raises:
        ValueError: the fraction's denominator is zero.
    """
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", value) if type(value) is str else None
    if match is None:
        return value
    if not int(match[2]):
        raise ValueError(f"the denominator of {value} is zero")
    return int(match[1]) / int(match[2])


def exact(ratio: float) -> Fraction:
    """The number that a float was written for, so that a share of a count can be exact.

    That is its shortest decimal, 0.29 and not 0.28999999999999998; or, if that has six digits or
    more and is a simple fraction to one unit of its last digit, this fraction: 1/3 for 0.333333,
    and for the float 1/3 itself.  A fraction is simple if its denominator is much smaller than the
    root of the number of decimals with so many digits, so that hardly any other is meant.
    """
    text = repr(float(ratio))
    decimal = Fraction(text)
    num_digits = 0 if "e" in text else len(text.partition(".")[2])
    if num_digits < _LEAST_DIGITS:
        return decimal
    simple = decimal.limit_denominator(10 ** (num_digits // 2 - 1))
    is_meant = float(simple) == ratio or abs(simple - decimal) * 10**num_digits <= 1
    return simple if is_meant else decimal
