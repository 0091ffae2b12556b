"""Quantities as people write them, such as "80 GB" and "35 us", to and from plain numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from lp_plugin.errors import InvalidInputError

__all__ = ["format_bytes", "format_seconds", "is_plain", "listed", "printable", "said", "shown"]
__all__ += ["parse_bytes", "parse_flops", "parse_rate", "parse_seconds"]

_Units = Mapping[str, Fraction | int]

_DECIMAL = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_BYTES = {**_DECIMAL, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
_RATES = {f"{unit}/s": factor for unit, factor in _BYTES.items()}
_FLOPS = {"FLOP/s": 1, "MFLOP/s": 10**6, "GFLOP/s": 10**9, "TFLOP/s": 10**12, "PFLOP/s": 10**15}
_SHORT: _Units = {"ns": Fraction(1, 10**9), "us": Fraction(1, 10**6), "ms": Fraction(1, 10**3), "s": 1}
_SECONDS: _Units = {**_SHORT, "min": 60, "h": 3600}

_LARGEST = 10**30  # beyond any quantity here; keeps every result a finite float
_TEXT = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?(?:[eE][+-]?[0-9]{1,2})?)\s*(\S*)")


_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

_MOST_SECONDS = 1e12  # beyond, hours say no more than a power of ten


def parse_bytes(value: str | int) -> int:
    """Bytes, exactly, from text such as "80 GB" (1000s), "50 MiB" (1024s) or "1024", or from a number.

    Raises:
        InvalidInputError: If the text has another form, is negative, or is no whole number of bytes.
    """
    num_bytes = _parse(value, "size", _BYTES, "80 GB")
    if num_bytes.denominator != 1:
        raise InvalidInputError(f"size {shown(value)} is {float(num_bytes)} bytes; write a whole number of bytes.")
    return num_bytes.numerator


def parse_rate(value: str | float) -> float:
    """Bytes per second from text such as "3.35 TB/s", or from a number of bytes per second.

    Raises:
        InvalidInputError: If the text has another form, or the value is negative or not finite.
    """
    return float(_parse(value, "rate", _RATES, "3.35 TB/s"))


def parse_seconds(value: str | float) -> float:
    """Seconds from text such as "35 us" or "1.5 ms", or from a number of seconds.

    Raises:
        InvalidInputError: If the text has another form, or the value is negative or not finite.
    """
    return float(_parse(value, "time", _SECONDS, "35 us"))


def parse_flops(value: str | float) -> float:
    """Operations per second from text such as "989 TFLOP/s", or from a number of operations per second.

    Raises:
        InvalidInputError: If the text has another form, or the value is negative or not finite.
    """
    return float(_parse(value, "compute rate", _FLOPS, "989 TFLOP/s"))


def format_bytes(num_bytes: float) -> str:
    """Non-negative bytes with three significant digits in decimal units: "1.61 GB"."""
    return f"{num_bytes:.0f} B" if num_bytes < 999.5 else _scaled(num_bytes, _DECIMAL)


def format_seconds(seconds: float) -> str:
    """Non-negative seconds for reading: "35.0 us", "19.4 ms", "1.23 s", "2 min 05 s", "2 h 03 min"."""
    if seconds == 0:
        return "0 s"
    if seconds > _MOST_SECONDS:
        return f"{seconds:.3g} s"
    if seconds < 59.95:
        return _scaled(seconds, _SHORT)
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shown(value: object) -> str:
    """The value as an error message quotes it: its ``repr``, of which 80 characters at most."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of more digits than can be shown"
    except RecursionError:
        return "a value nested too deeply"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def listed(items: Sequence[object], most: int) -> str:
    """The first items, ``most`` of them, and whether there are more: "0, 1, 2, ..."."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


def is_plain(text: str) -> bool:
    """Whether a text can be printed as it is: no half characters, no control characters but tabs and line ends."""
    return _CONTROLS.search(text) is None


def printable(text: str) -> str:
    """The text as a terminal may get it: half and control characters escaped, but for tabs and line ends."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def said(error: BaseException) -> str:
    """What another library's exception says, as an error message quotes it: its first line, 300 characters at most."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:301])
    return text if len(text) <= 300 else f"{text[:280]}..."


def _parse(value: str | float, what: str, units: _Units, example: str) -> Fraction:
    """The exact value in the base unit, which is also the unit of text without one."""
    exact = _exact(value, units)
    if exact is not None and 0 <= exact <= _LARGEST:
        return exact
    raise InvalidInputError(
        f'{what} {shown(value)} is not understood; write a number of at least 0 and a unit, as in "{example}" '
        f"(units: {', '.join(units)}), or the number alone in {next(u for u in units if units[u] == 1)}."
    )


def _exact(value: str | float, units: _Units) -> Fraction | None:
    """The value in the base unit, or None if it is no finite number with a known unit."""
    if isinstance(value, str):
        match = _TEXT.fullmatch(value.strip().replace("\u00b5", "u").replace("\u03bc", "u"))
        if match is None or (match[2] and match[2] not in units):
            return None
        return Fraction(match[1]) * (units[match[2]] if match[2] else 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST <= value <= _LARGEST:
        return None
    return Fraction(value)


def _scaled(value: float, units: _Units) -> str:
    """Three significant digits in the smallest unit that keeps the number below 1000, else in the largest."""
    unit = next((name for name in units if value / units[name] < 999.5), list(units)[-1])
    scaled = value / float(units[unit])
    decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{decimals}f} {unit}"
