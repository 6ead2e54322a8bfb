"""Seeded mutations of small files: what nobody would write by hand, and everything must end in a result or in an error of ours."""

from __future__ import annotations

import io
import json
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

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
)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes: bits, bytes, pieces cut out, repeated, moved or put in."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 40, 400)))
        match rng.randrange(7):
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
            case _:
                del data[start:]
    return bytes(data)


def _archive(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def archives(rng: random.Random) -> list[bytes]:
    """Small .npz files; an array's header is mutated before it is packed, with a right checksum, and once with a right length as well."""
    values = np.random.default_rng(5).normal(size=(3, 2, 4, 5)).astype(np.float32)
    array = io.BytesIO()
    np.save(array, values)
    fortran = io.BytesIO()
    np.save(fortran, np.asfortranarray(values.astype(">f8")))
    inside = mutated(array.getvalue()[:128], rng) + array.getvalue()[128:]
    text = mutated(array.getvalue()[10:128].rstrip(), rng)
    announced = b"\x93NUMPY\2\0" + struct.pack("<I", len(text)) + text + array.getvalue()[128:]
    return [
        _archive({"logits.npy": array.getvalue()}),
        _archive({"probabilities.npy": fortran.getvalue()}, zipfile.ZIP_STORED),
        _archive({"logits.npy": inside}),
        _archive({"logits.npy": announced}),
        _archive({rng.choice(("logits", "logits.npy", "softmax.npy", "x/logits.npy", "probabilities", "l\0.npy")): inside}),
        _archive({f"{number}.npy": b"" for number in range(50)}, rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED))),
    ]


DESCRIPTIONS = (
    {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "file_ending": ".nii.gz",
    },
    {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior"},
        "training": [{"image": "a", "label": "b"}],
        "numTraining": 2,
    },
    {"labels": {"background": 0, "a": 1}, "regions": {"all": [1]}, "channel_names": ["CT"]},
)


def descriptions(rng: random.Random) -> bytes:
    """A `dataset.json`, some with a value of the wrong type somewhere."""
    content = json.loads(json.dumps(rng.choice(DESCRIPTIONS)))
    if rng.random() < 0.5:
        wrong = rng.choice(
            (None, True, 1.5, -1, 10**40, "", "x" * 5000, "\x1b[31m", [], {}, [[]], {"a": {"b": 1}}, [None], ["1", 2], float("nan"))
        )
        place = content
        while isinstance(place, dict | list) and place:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if rng.random() < 0.5 or not isinstance(place[key], dict | list) or not place[key]:
                place[key] = wrong
                break
            place = place[key]
    return json.dumps(content, indent=rng.choice((None, 1))).encode()


def seeds(number: int, first: int = 0) -> Iterator[tuple[int, random.Random]]:
    """A generator of random numbers for each mutation, so that one that fails can be made again by its number."""
    for seed in range(first, first + number):
        yield seed, random.Random(seed)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
