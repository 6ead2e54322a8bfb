"""Seeded changes of the content of files: what damage does, and what nobody would write by hand."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from typing import Any

INTERESTING = (
    *(
        b"\0",
        b"\xff",
        b"\n",
        b"\t",
        b'"',
        b"[" * 3000,
        b"{" * 50,
        b'{"a":' * 2000,
        b"9" * 5000,
        b"-1",
        b"1e999",
        b"NaN",
        b"0x" + b"f" * 4000,
    ),
    *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"\x93NUMPY", b"true", b"null", b"inf", b"x" * 3000),
    *(b"2147483648", b"18446744073709551616", b"\x1b[31m", b"\xe2\x80\xae", b"1979-05-27T07:32:00Z", b"labels", b'"a":1,'),
    *(b"\x1f\x8b\x08", b"BZh9", b"n+1\0", b"\0" * 500, b"../", b"/dev/zero", b"\r\n", b"\r", b"\xc3\xa9"),
)
NUMBERS = (
    *(b"0", b"-0", b"1", b"-1", b"2", b"7", b"255", b"256", b"65535", b"65536", b"1000000", b"2147483647", b"-2147483649", b"4294967296"),
    *(b"9223372036854775807", b"18446744073709551615", b"99999999999999999999", b"9" * 400, b"9" * 5000, b"0.5", b"1e-320", b"1e-400"),
    *(
        b"1e9",
        b"1e18",
        b"1e38",
        b"3.5e38",
        b"1e300",
        b"1e999",
        b"nan",
        b"inf",
        b"-inf",
        b"0x10",
        b"1_0",
        b"\xd9\xa3",
        b"1.",
        b".5",
        b"+1",
        b"01",
    ),
)
WORDS = (
    *(
        b"",
        b"none",
        b"LIST",
        b"LOCAL",
        b"%d 1 4 1",
        b"%s",
        b"%n",
        b"%01000d",
        b"a%d%d",
        b"/dev/zero",
        b"../a.raw",
        b".",
        b"(",
        b"()",
        b"(1,0,0)",
    ),
    *(
        b"true",
        b"False",
        b"vector",
        b"domain",
        b"gzip",
        b"ascii",
        b"hex",
        b"bz2",
        b"raw",
        b"big",
        b"little",
        b"int8",
        b"double",
        b"MET_CHAR",
    ),
    *(
        b"MET_FLOAT",
        b"background",
        b"ignore",
        b"[]",
        b"{}",
        b"null",
        b'"\\ud800"',
        b"\xff\xfe",
        b"x" * 2000,
        b"\x1b]0;x\x07",
        b"\0",
        b"\xe2\x80\xae",
    ),
)
_MOST_BYTES = 1 << 20
_LENGTHS = (1, 2, 4, 8, 40, 400)
_INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    127,
    -128,
    255,
    256,
    32767,
    -32768,
    65535,
    65536,
    2**31 - 1,
    -(2**31),
    2**32 - 1,
    2**62,
    2**63 - 1,
    -(2**63),
)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-40, 1e-320, 3e38, 1e300, float("inf"), float("-inf"), float("nan"), 352.0, 1e9, 2.0**53)
_ENCODINGS = ("utf-16", "utf-16-be", "utf-32", "utf-8-sig", "cp1252", "utf-7")


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes: bits, bytes, pieces cut out, repeated, moved or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice(_LENGTHS))
        match rng.randrange(8):
            case 0 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 1 if start < len(data):
                data[start:end] = rng.randbytes(end - start)
            case 2:
                del data[start:end]
            case 3:
                data[start:start] = data[start:end] * rng.choice((1, 3, 30))
            case 4:
                data[start:start] = rng.choice(INTERESTING)
            case 5:
                data[start:end] = rng.choice(INTERESTING)
            case 6:
                piece = data[start:end]
                del data[start:end]
                place = rng.randrange(len(data) + 1)
                data[place:place] = piece
            case _:
                del data[start:]
    return bytes(data)


def mutated_text(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three changes to its lines, numbers and words, or in another encoding."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        match rng.randrange(7):
            case 0:
                lines = content.splitlines(keepends=True)
                if lines:
                    number = rng.randrange(len(lines))
                    times = min(rng.choice((2, 2, 500)), 1 + _MOST_BYTES // max(1, len(lines[number])))
                    lines[number : number + 1] = rng.choice(([], [lines[number]] * times, lines[number:] + lines[:number]))
                content = b"".join(lines)
            case 1 | 2 | 3:
                content = _replaced(content, rb"[-+0-9.eE]*[0-9][-+0-9.eE]*", rng.choice(NUMBERS), rng)
            case 4 | 5:
                content = _replaced(content, rb"[^\s=:,(){}\[\]\"]+", rng.choice(WORDS), rng)
            case _ if rng.random() < 0.2:
                content = content.decode("latin-1").encode(rng.choice(_ENCODINGS), "replace")
            case _:
                content = mutated(content, rng)
        content = content[:_MOST_BYTES]
    return content


def mutated_numbers(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three binary numbers in the place of its own, in either byte order, at a multiple of their size."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        order, size = rng.choice("<>"), rng.choice((1, 2, 2, 4, 4, 8))
        if size >= 4 and rng.random() < 0.5:
            number = rng.choice(_FLOATS)
            with_overflow = number if size == 8 or abs(number) < 3.4e38 or number != number else float("inf")
            written = struct.pack(f"{order}{'f' if size == 4 else 'd'}", with_overflow)
        else:
            written = (rng.choice(_INTEGERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little" if order == "<" else "big")
        place = rng.randrange(max(1, (len(data) - size) // size + 1)) * size
        data[place : place + size] = written
    return bytes(data)


def _replaced(content: bytes, pattern: bytes, word: bytes, rng: random.Random) -> bytes:
    found = [match.span() for match in re.finditer(pattern, content[:4000])]
    if not found:
        return content
    start, end = rng.choice(found)
    return content[:start] + word + content[end:]


_WRONG: tuple[Any, ...] = (
    *(
        None,
        True,
        1.5,
        -1,
        0,
        65536,
        10**40,
        "",
        "x" * 5000,
        "\x1b[31m",
        "a\0b",
        "..",
        "a\nb",
        [],
        {},
        [[]],
        {"a": {"b": 1}},
        [None],
        ["1", 2],
    ),
    *(float("nan"), float("inf"), {"0": "a", "00": "b"}, {"background": 0}, list(range(300)), "\ud800", "/dev/zero", "y" * 300),
)


def wrong_somewhere(content: Any, rng: random.Random) -> bytes:
    """JSON with a value of the wrong type or size somewhere, a key removed, or damage to the text; once in a while as it is."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((0, 1, 1, 2))):
        place = content
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if rng.random() < 0.4 or not isinstance(place[key], dict | list) or not place[key]:
                if rng.random() < 0.2:
                    del place[key]
                elif isinstance(place, dict) and rng.random() < 0.2:
                    place[str(rng.choice(_WRONG))] = place.pop(key)
                else:
                    place[key] = copy.deepcopy(rng.choice(_WRONG))
                break
            place = place[key]
    text = json.dumps(content, indent=rng.choice((None, 1))).encode()
    return text if rng.random() < 0.4 else rng.choice((mutated, mutated_text))(text, rng)
