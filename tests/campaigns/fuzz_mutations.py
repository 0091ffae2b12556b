"""Files changed so that they are wrong in every way: bytes, values, keys, nesting, names of files, headers."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

__all__ = ["NAMES", "mutate"]

NAMES = (
    *("../../etc/passwd", "/etc/passwd", "/dev/zero", "/dev/stdin", "/dev/null", "/proc/self/mem", ".", "..", "/"),
    *("fifo", "folder", "loop", "outside.safetensors", "a\0b", "x" * 5000, "none/none", "", " ", "\x1b[31m", "~root"),
)
"""Of other files, in a value; the workspace has the pipe, the folder, the circular link and the link out."""

_NUMBERS = (
    *("NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e400", "5e-324", "-0.0", "0", "-1", "1", "2", "1.5"),
    *("2147483648", "9223372036854775807", "9223372036854775808", "18446744073709551616", "-9223372036854775809"),
    *("1000", "65537", "1000000", "1000000000", "9" * 30, "9" * 400, "9" * 5000, "1e999999", "0x10", "01", "1_000"),
)
_LARGE = (
    *("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000, "[[" * 500 + "]]" * 500),
    *("[" + "0," * 1_000_000 + "0]", "[" + "{}," * 300_000 + "{}]", "[" + '"a",' * 20_000 + '"a"]'),
    *('"' + "x" * 2**20 + '"', '"' + "é" * 2**18 + "\U0001d538" * 1000 + '"', " " * 2**20 + "1"),
    "{" + ",".join(f'"k{number}":{number}' for number in range(50_000)) + "}",
)
_TOKENS = (
    *_NUMBERS,
    *_NUMBERS,
    *("true", "false", "null", '""', '"8"', '"\\ud800"', '"\\u0000"', '"\\u001b[31mred"', '"nan"', "[]", "{}", "[[]]"),
    *('{"a": 1}', "", "}", "'text'", '"\\u202e\\u200b"', '"%s{0}\\n\\r"', '"torch.load"', "[null]", '["a", 1, []]'),
    *(json.dumps(name) for name in NAMES),
    *_LARGE,
)


def mutate(raw: bytes, form: str, rng: random.Random) -> bytes:
    """A file of one of the forms ``json``, ``jsonl``, ``toml``, ``text``, ``safetensors`` changed."""
    ways = _WAYS[form]
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        changed = rng.choice(ways)(raw, rng)
        raw = changed if len(changed) < 8 * 2**20 else raw
    return raw


def _damage(raw: bytes, rng: random.Random) -> bytes:
    """Bits, bytes and blocks."""
    changed = bytearray(raw)
    way, place = rng.randrange(10), rng.randrange(len(raw) + 1)
    end = min(place + rng.choice([1, 8, 100, 10_000]), len(raw))
    if way == 0:
        for _ in range(rng.randint(1, 8) if raw else 0):
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif way == 1:
        del changed[place:]
    elif way == 2:
        del changed[place:end]
    elif way == 3:
        changed[place:place] = changed[place:end] * rng.choice([1, 2, 50])
    elif way == 4:
        changed[place:place] = bytes(rng.choice([1, 16, 2**20]))
    elif way == 5:
        changed[place:place] = rng.choice(
            [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"\x1b[31m"]
        )
    elif way == 6:
        changed[:0] = rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b", b"PK\x03\x04", b"\x80\x04"])
    elif way == 7:
        changed[place:place] = rng.choice([b" ", b"\n", b"\r\n", b"\t", b"\x0b", b"\xc2\xa0"]) * rng.choice([1, 2**20])
    elif way == 8:
        changed[place:end] = rng.randbytes(end - place)
    else:
        return rng.choice([b"", raw * 2, raw.decode("utf-8", "replace").encode("utf-16"), raw.replace(b"\n", b"\r")])
    return bytes(changed)


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys or positions."""
    found: list[tuple[Any, Any]] = []
    left = [content]
    while left:
        container = left.pop()
        keys = (
            list(container)
            if isinstance(container, dict)
            else range(len(container))
            if isinstance(container, list)
            else []
        )
        found += [(container, key) for key in keys]
        left += [container[key] for key in keys]
    return found


def _json(raw: bytes, rng: random.Random) -> bytes:
    """A value, a key or an entry of JSON; what is no JSON any more is damaged instead."""
    try:
        content = json.loads(raw)
        places = _places(content)
        container, key = rng.choice(places)
    except (ValueError, RecursionError, IndexError):
        return _damage(raw, rng)
    way = rng.randrange(8)
    if way <= 2:
        container[key] = "@place@"
        return json.dumps(content).replace('"@place@"', rng.choice(_TOKENS)).encode("utf-8", "surrogatepass")
    if way == 3:
        del container[key]
    elif way == 4 and isinstance(container, dict):
        names = [key.upper(), "", key + " ", "\ud800", "x" * 10_000, "\x1b[31m", "lp_plugin", *NAMES]
        container[rng.choice(names)] = container.pop(key)
    elif way == 5 and isinstance(container, dict):
        twice = json.dumps({key: container[key]})[:-1] + f", {json.dumps(key)}: {rng.choice(_NUMBERS)}}}"
        return json.dumps(content).replace(json.dumps({key: container[key]})[1:-1], twice[1:-1], 1).encode()
    elif way == 6:
        other = rng.choice(places)
        container[key] = json.loads(json.dumps(other[0][other[1]]))
    elif isinstance(container, list):
        container.extend([container[key]] * rng.choice([1, 1000, 100_000]))
    else:
        extra = rng.choice(["auto_map", "quantization_config", "text_config", "dtype", "rope_scaling", "extra"])
        container[extra] = json.loads(rng.choice(['"fp8"', "{}", "[]", "7", '{"AutoConfig": "a.B"}', "null", '"x"']))
    return json.dumps(content).encode("utf-8", "surrogatepass")


def _jsonl(raw: bytes, rng: random.Random) -> bytes:
    """One line of many, or the lines' order and number."""
    lines = raw.split(b"\n")
    place = rng.randrange(len(lines))
    if rng.random() < 0.8:
        lines[place] = _json(lines[place], rng)
    else:
        lines = lines[:place] + [lines[place]] * rng.choice([0, 2, 2000]) + lines[place + 1 :]
    return b"\n".join(lines)


def _toml(raw: bytes, rng: random.Random) -> bytes:
    """A value, a key, a table or a line of TOML."""
    text = raw.decode("utf-8", "replace")
    way = rng.randrange(6)
    matches = list(re.finditer(r"^([\w.-]+)\s*=\s*(.*)$", text, re.MULTILINE)) if way < 4 else []
    if matches:
        match = rng.choice(matches)
        if way <= 2:
            values = (*_TOKENS, "inf", "-inf", "nan", "1979-05-27", "'''\n'''", '"80 GB"', '"1e99 s"', "{ a = 1 }")
            values += (
                "{a={" * 200,
                "[" * 9999,
                '{ "x" = [1, { y = 2 }] }',
                '"' + "9" * 31 + ' TB"',
                "-9e99",
                '"1 parsec"',
            )
            start, stop, put = *match.span(2), rng.choice(values)
        else:
            start, stop = match.span(1)
            put = rng.choice(
                ["x", "", '""', "a.b.c", ".".join("a" * 30), match[1].upper(), match[1] + "s", '"\\u0000"']
            )
        return (text[:start] + put + text[stop:]).encode("utf-8", "surrogatepass")
    tables = re.split(r"(?m)^(?=\[)", text)
    place = rng.randrange(len(tables))
    tables[place : place + 1] = [tables[place]] * rng.choice([0, 2, 2, 60])
    return "".join(tables).encode("utf-8", "surrogatepass")


def _header(raw: bytes, rng: random.Random) -> bytes:
    """The length or the JSON of a safetensors header, or what its tensors say."""
    size = min(int.from_bytes(raw[:8], "little"), len(raw))
    header, data = raw[8 : 8 + size], raw[8 + size :]
    way = rng.randrange(6)
    if way == 0:
        lengths = [0, 1, size - 1, size + 1, 10**6, 10**8, 2**31, 2**32, 2**62, 2**63, 2**63 - 1, 2**64 - 1, len(raw)]
        return struct.pack("<Q", rng.choice(lengths) % 2**64) + raw[8:]
    if way == 1:
        return raw[:8] + _damage(header, rng) + data
    try:
        entries = json.loads(header)
        entry = entries[rng.choice([name for name in entries if name != "__metadata__"])]
    except (ValueError, RecursionError, IndexError, TypeError):
        return _damage(raw, rng)
    if way == 2:
        changed = _json(header, rng)
    else:
        numbers = [0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, len(data), len(data) + 1, 1.5, "8", None]
        if way == 3 and isinstance(entry, dict):
            entry["data_offsets"] = rng.choice([[rng.choice(numbers), rng.choice(numbers)], [], [0], [0, 0, 0], None])
        elif way == 4 and isinstance(entry, dict):
            shapes = [
                [rng.choice(numbers) for _ in range(rng.randrange(5))],
                [2**32, 2**32],
                [2**63, 2],
                [1] * 10_000,
                None,
            ]
            entry["shape"] = rng.choice(shapes)
        elif isinstance(entry, dict):
            kinds = [
                "F8_E4M3",
                "F4",
                "I64",
                "BOOL",
                "U8",
                "C64",
                "F128",
                "",
                "f32",
                None,
                32,
                "object",
                "\x1b[31m",
                "x" * 10**5,
            ]
            entry["dtype"] = rng.choice(kinds)
        changed = json.dumps(entries).encode()
    return struct.pack("<Q", len(changed)) + changed + data


_WAYS: dict[str, tuple[Callable[[bytes, random.Random], bytes], ...]] = {
    "json": (_json, _json, _damage),
    "jsonl": (_jsonl, _jsonl, _damage),
    "toml": (_toml, _toml, _damage),
    "text": (_damage,),
    "safetensors": (_header, _header, _damage),
}
