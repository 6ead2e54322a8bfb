"""Seeded changes of the content of files: what damage does, and what nobody would write by hand."""

import copy
import gzip
import json
import re

import numpy as np

_INTERESTING = (
    *(
        b"\0",
        b"\xff",
        b"\n",
        b"\t",
        b"\r\n",
        b"[" * 3000,
        b'{"a":' * 2000,
        b"9" * 5000,
        b"0x" + b"f" * 4000,
        b"\0" * 500,
    ),
    *b"\xef\xbb\xbf \xed\xa0\x80 \xe2\x80\xae \x1b[31m PK\1\2 PK\3\4 PK\5\6".split(),
    *b"\x1f\x8b\x08 BZh9 \x93NUMPY".split(),
    *b'" "a":1, NaN true null inf 1979-05-27T07:32:00Z labels ../ /dev/zero'.split(),
)
_NUMBERS = (
    *b"0 -1 1 2 255 65536 1000000 2147483647 -2147483649 9223372036854775807".split(),
    *b"18446744073709551615 99999999999999999999".split(),
    *b"0.5 1e-320 1e9 1e38 3.5e38 1e300 1e999 nan inf -inf 0x10 1_0 \xd9\xa3 1. .5 +1 01".split(),
    *(b"9" * 400, b"9" * 5000),
)
_WORDS = (
    *b"none LIST LOCAL %s %n a%d%d /dev/zero ../a.raw . () (1,0,0) true False vector".split(),
    *b"domain gzip ascii hex bz2 raw big int8 double MET_CHAR MET_FLOAT background ignore".split(),
    *b'[] {} null "\\ud800" \xff\xfe \x1b]0;x\x07 \0 \xe2\x80\xae'.split(),
    *(b"", b"%d 1 4 1", b"x" * 2000),
)
_MAX_BYTES = 1 << 20
_INTEGERS = (
    0,
    7,
    255,
    32767,
    65535,
    *(sign * (1 << bits) for bits in (0, 1, 3, 8, 15, 16, 31, 62) for sign in (1, -1)),
)
_FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-40,
    1e-320,
    3e38,
    1e300,
    float("inf"),
    float("-inf"),
    float("nan"),
    352.0,
    1e9,
    2.0**53,
)
_ENCODINGS = ("utf-16", "utf-16-be", "utf-32", "utf-8-sig", "cp1252", "utf-7")


def mutated(content, rng):
    """The content with one to four changes: bits, bytes, pieces cut out, repeated or put in, or the
    end cut off.
    """
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 40, 400)))
        match rng.randrange(6):
            case 0 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start:end] = rng.choice((b"", rng.randbytes(end - start)))
            case 2:
                data[start:start] = data[start:end] * rng.choice((1, 3, 30))
            case 3 | 4:
                data[start : rng.choice((start, end))] = rng.choice(_INTERESTING)
            case _:
                del data[start:]
    return bytes(data)


def mutated_text(content, rng):
    """The content with one to three changes to its lines, numbers and words, or in another
    encoding.
    """
    for _ in range(rng.choice((1, 1, 2, 3))):
        match rng.randrange(7):
            case 0:
                lines = content.splitlines(keepends=True) or [b""]
                number = rng.randrange(len(lines))
                times = min(rng.choice((0, 2, 500)), 1 + _MAX_BYTES // max(1, len(lines[number])))
                lines[number : number + 1] = [lines[number]] * times
                content = b"".join(lines)
            case 1 | 2 | 3:
                content = _replaced(
                    content, rb"[-+0-9.eE]*[0-9][-+0-9.eE]*", rng.choice(_NUMBERS), rng
                )
            case 4 | 5:
                content = _replaced(content, rb"[^\s=:,(){}\[\]\"]+", rng.choice(_WORDS), rng)
            case _ if rng.random() < 0.2:
                content = content.decode("latin-1").encode(rng.choice(_ENCODINGS), "replace")
            case _:
                content = mutated(content, rng)
        content = content[:_MAX_BYTES]
    return content


def _replaced(content, pattern, word, rng):
    start, end = rng.choice(
        [match.span() for match in re.finditer(pattern, content[:4000])] or [(0, 0)]
    )
    return content[:start] + word + content[end:]


def mutated_numbers(content, rng):
    """The content with one to three binary numbers in the place of its own, in either byte order,
    at a multiple of their size.
    """
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        dtype = np.dtype(
            rng.choice("<>") + rng.choice(("u1", "u2", "u2", "u4", "u8", "f4", "f4", "f8"))
        )
        number = (
            rng.choice(_FLOATS)
            if dtype.kind == "f"
            else rng.choice(_INTEGERS) & ((1 << 8 * dtype.itemsize) - 1)
        )
        place = rng.randrange(max(1, len(data) // dtype.itemsize)) * dtype.itemsize
        with np.errstate(all="ignore"):
            data[place : place + dtype.itemsize] = (
                np.array(number, np.float64 if dtype.kind == "f" else np.uint64)
                .astype(dtype)
                .tobytes()
            )
    return bytes(data)


def damaged(files, rng):
    """One of the files, most often the first, is damaged, before or after those that end in .gz or
    .mgz are compressed; or none is.
    """
    chosen = rng.choice((next(iter(files)), *files)) if rng.random() < 0.95 else None
    before = rng.random() < 0.6
    found = {}
    for name, content in files.items():
        is_packed = name.endswith((".gz", ".mgz"))
        if name == chosen and (before or not is_packed):
            content = damaged_part(content, rng)
        if is_packed:
            content = gzip.compress(content, 1, mtime=0)
            if name == chosen and not before:
                content = rng.choice(
                    (mutated(content, rng), content + rng.choice((bytes(9), content, b"garbage")))
                )
        found[name] = content
    return found


def damaged_part(content, rng):
    """Of a text lines, numbers and words, of a binary header numbers, of voxels anything."""
    start = 0
    end = 352
    change = mutated_numbers
    if content.startswith(b"PK"):  # Lengths, offsets and flags of an archive.
        start, end = rng.choice(((0, 30), (content.rindex(b"PK\1\2"), len(content))))
    elif content.startswith(b"\x93NUMPY"):
        start = 10
        end = 128

        def change(text, rng):
            return mutated_text(text, rng).ljust(118)[:118]

    elif text := re.match(rb"(?s)NRRD.*?(\n\n|$)|[^\0]*?ElementDataFile = [^\0]*?\n", content):
        end = text.end()
        change = mutated_text
    if rng.random() < 0.25:
        start = rng.choice((0, min(end, len(content))))
        end = len(content)
        change = mutated
    return content[:start] + change(content[start:end], rng) + content[end:]


_WRONG = (
    *(
        None,
        True,
        1.5,
        -1,
        0,
        65536,
        10**40,
        float("nan"),
        float("inf"),
        [],
        {},
        [[]],
        [None],
        ["1", 2],
        list(range(300)),
        {"a": {"b": 1}},
    ),
    *(
        "",
        "x" * 5000,
        "y" * 300,
        "\x1b[31m",
        "a\0b",
        "..",
        "a\nb",
        "\ud800",
        "/dev/zero",
        {"0": "a", "00": "b"},
        {"background": 0},
    ),
)


def wrong_somewhere(content, rng):
    """JSON with a value of the wrong type or size somewhere, a key removed, or damage to the text;
    once in a while as it is.
    """
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
