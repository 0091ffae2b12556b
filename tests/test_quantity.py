"""Text to numbers and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lp_plugin.errors import InvalidInputError
from lp_plugin.quantity import (
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_flops,
    parse_rate,
    parse_seconds,
    printable,
    shown,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80 GB", 80 * 10**9),
        ("50 MiB", 50 * 2**20),
        ("1024", 1024),
        (1024, 1024),
        (" 1.61GB ", 1_610_000_000),
        ("1e3 kB", 10**6),
        ("2.5 KiB", 2560),
        ("9007199254740993 B", 9007199254740993),  # not a float
        (0, 0),
    ],
)
def test_parse_bytes_is_exact(text, num_bytes):
    assert parse_bytes(text) == num_bytes
    assert isinstance(parse_bytes(text), int)


def test_parse_rates_and_times():
    assert parse_rate("3.35 TB/s") == 3.35e12
    assert parse_rate(5) == 5.0
    assert parse_seconds("35 us") == parse_seconds("35 \u00b5s") == parse_seconds("35 \u03bcs") == 35e-6
    assert parse_seconds("1.5 ms") == 1.5e-3
    assert parse_seconds("2 h") == 7200
    assert parse_seconds(0.25) == 0.25
    assert parse_flops("989 TFLOP/s") == 989e12


BAD_VALUES = ["", "GB", "-5 GB", "5 GiG", "5 Gb", "5 gb", "1/3", "1_000", "nan", "inf", "1e999999999", "9" * 5000,
              "5 GB GB", -1, math.nan, math.inf, -math.inf, 10**400, 1e300, True, None, [5], "5\u0663"]  # fmt: skip


@pytest.mark.parametrize("parse", [parse_bytes, parse_rate, parse_seconds, parse_flops])
@pytest.mark.parametrize("value", BAD_VALUES)
def test_bad_values_are_refused(parse, value):
    with pytest.raises(InvalidInputError, match="is not understood; write a number of at least 0 and a unit"):
        parse(value)


def test_the_message_says_what_value_and_accepted_forms():
    with pytest.raises(InvalidInputError) as error:
        parse_rate("3.35 TB")
    assert str(error.value).startswith("rate '3.35 TB' is not understood")
    assert 'as in "3.35 TB/s" (units: B/s, kB/s' in str(error.value)
    assert str(error.value).endswith("or the number alone in B/s.")


def test_a_long_value_is_cut_in_messages():
    with pytest.raises(InvalidInputError, match=r"rate '9{59}\.\.\. \(1000002 characters\) is not understood") as error:
        parse_rate("9" * 10**6)
    assert len(str(error.value)) < 400
    with pytest.raises(InvalidInputError, match="size a number of more digits than can be shown is not understood"):
        parse_bytes(10**5000)


def test_values_are_shown_as_python_writes_them():
    nested: list[object] = []
    for _ in range(10_000):
        nested = [nested]
    assert [shown(value) for value in ("x\n", 1.5, "a" * 78)] == [repr(value) for value in ("x\n", 1.5, "a" * 78)]
    assert shown("a" * 79) == "'" + "a" * 59 + "... (81 characters)"
    assert shown(nested) == "a value nested too deeply"


def test_part_of_a_byte_is_refused():
    with pytest.raises(InvalidInputError, match=r"size '1\.5' is 1\.5 bytes; write a whole number"):
        parse_bytes("1.5")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (35e-6, "35.0 us"),
        (19.4e-3, "19.4 ms"),
        (1.23, "1.23 s"),
        (850e-9, "850 ns"),
        (999.6e-6, "1.00 ms"),
        (59.96, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (2 * 3600 + 3 * 60, "2 h 03 min"),
    ],
)
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (1_610_612_736, "1.61 GB"),
     (167.8e9, "168 GB"), (5.37e12, "5.37 TB"), (3e18, "3000 PB")],
)  # fmt: skip
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


@given(st.integers(min_value=0, max_value=10**20))
def test_bytes_come_back_within_three_digits(num_bytes):
    assert math.isclose(parse_bytes(format_bytes(num_bytes)), num_bytes, rel_tol=5.1e-3)


@given(st.integers(min_value=0, max_value=10**29))
def test_whole_bytes_come_back_exactly(num_bytes):
    assert parse_bytes(f"{num_bytes} B") == parse_bytes(str(num_bytes)) == parse_bytes(num_bytes) == num_bytes


@given(st.floats(min_value=1e-9, max_value=59.9))
def test_seconds_come_back_within_three_digits(seconds):
    assert math.isclose(parse_seconds(format_seconds(seconds)), seconds, rel_tol=5.1e-3)


@given(st.text() | st.floats() | st.integers())
def test_anything_is_parsed_to_a_finite_number_or_refused(value):
    for parse in (parse_bytes, parse_rate, parse_seconds, parse_flops):
        try:
            number = parse(value)
        except InvalidInputError:
            continue
        assert 0 <= number < math.inf


def test_a_terminal_gets_no_control_characters() -> None:
    assert printable("a\tb\n\u00e9 \u4e2d") == "a\tb\n\u00e9 \u4e2d"
    assert printable("\x1b]0;title\x07 \x9b \ud800 \r") == r"\x1b]0;title\x07 \x9b \ud800 \r"
