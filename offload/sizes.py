"""Sizes as users write them: "24GiB" is 24·2^30 bytes, "24GB" is 24·10^9, an int is bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from offload.errors import InvalidArgumentError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power

_SIZE = re.compile(r"\s*(?P<number>[0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})\s*(?P<unit>[A-Za-z]*)\s*")


def parse_size(value: int | str, what: str) -> int:
    """Bytes of a size.

    Args:
        value: bytes as an int, or a number with a unit: B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB
            (powers of 1024); letter case does not matter, except that "Gb" and the like (bits) are refused.
        what: the argument's name, for the message.

    Raises:
        InvalidArgumentError: not a size, not positive, or a unit that means bits.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise InvalidArgumentError(f'{what}={value!r}: expected a size such as "24GiB", "24GB" or a number of bytes')
    if isinstance(value, int):
        nbytes = value
    else:
        match = _SIZE.fullmatch(value)
        unit = match["unit"] if match else ""
        if unit.lower() in _UNITS and len(unit) >= 2 and unit[-1] == "b" and unit[0].isupper():
            raise InvalidArgumentError(f'{what}="{value}": "{unit}" means bits; write "{unit[:-1]}B" for bytes')
        if match is None or unit.lower() not in _UNITS:
            raise InvalidArgumentError(
                f'{what}="{value}": expected a number and a unit such as "24GiB" (2^30) or "24GB" (10^9)'
            )
        nbytes = int(Fraction(match["number"]) * _UNITS[unit.lower()])
    if nbytes <= 0:
        raise InvalidArgumentError(f"{what}={value!r}: a size must be positive")
    return nbytes


def format_size(nbytes: int) -> str:
    """A size for people, in binary units: "3.50 GiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
