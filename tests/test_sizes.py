"""Sizes as users write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import InvalidArgumentError
from offload.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * 2**30),
        ("  1.5 MiB ", 3 * 2**19),
        (".5KiB", 512),
        ("1KB", 1000),
        ("3TiB", 3 * 2**40),
        ("2tb", 2 * 10**12),
        ("7", 7),
        ("7B", 7),
        ("7b", 7),
        ("1.9B", 1),
        (1, 1),
        (2**60 + 1, 2**60 + 1),
    ],
)
def test_a_size_is_read(text: int | str, nbytes: int) -> None:
    assert parse_size(text, "ram") == nbytes


def test_no_digit_is_lost() -> None:
    assert parse_size(str(2**53 + 1), "ram") == 2**53 + 1
    assert parse_size("0.1GB", "ram") == 10**8
    assert parse_size("4.35GB", "ram") == 4_350_000_000


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["KiB", "MiB", "GiB", "TiB", "KB", "MB", "GB", "TB", "B", ""]))
def test_case_of_the_unit_does_not_matter(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit.upper()}", "ram") == parse_size(f"{number} {unit.lower()}", "ram")


@pytest.mark.parametrize(("text", "fix"), [("8Gb", "GB"), ("8Mb", "MB"), ("8Gib", "GiB"), ("1Kb", "KB")])
def test_bits_are_refused_with_a_hint(text: str, fix: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f'means bits; write "{fix}"'):
        parse_size(text, "ram")


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "GiB", "24 G iB", "24XB", "24Glub", "24GiB more", "24\nGiB\n!", "..5GB", "5.GB", "1,5GB"),
        *("-1GiB", "+1GiB", "1e9", "1_000", "0x10", "inf", "nan", "NaNGB", "\u0661GB"),
        *("9" * 5000 + "GB", "1." + "0" * 5000),
    ],
)
def test_what_is_no_size_is_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidArgumentError, match="ram="):
        parse_size(value, "ram")


@pytest.mark.parametrize("value", [0, -1, "0", "0GiB", "0.4B", "0.0000001KB"])
def test_a_size_is_positive(value: int | str) -> None:
    with pytest.raises(InvalidArgumentError, match="must be positive"):
        parse_size(value, "ram")


@pytest.mark.parametrize("value", [True, False, None, 1.5, float("nan"), float("inf"), b"1GiB", [1], {"cpu": 1}])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="nvme="):
        parse_size(value, "nvme")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 30, "3.00 GiB"),
        (5 << 40, "5.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@settings(deadline=None)
@given(st.integers(1, 2**50))
def test_what_is_written_is_read_back(nbytes: int) -> None:
    # Two decimals of at least 1.00 are off by half a percent at most, and a byte may be cut off.
    assert parse_size(format_size(nbytes), "ram") == pytest.approx(nbytes, abs=nbytes * 0.005 + 1)
