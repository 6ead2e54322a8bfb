"""Inputs of the readers of DICOM: a series of two or three small slices, one of them damaged, and segmentations."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from dicom_helpers import enhanced, save, slices
from fuzz_mutations import mutated, mutated_numbers
from fuzz_volumes import read_volume
from fuzz_worker import Target
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from crfrefine import io

SHAPE = (4, 3, 3)
AFFINE = np.array([[-0.7, 0, 0, 3], [0, -1.1, 0.2, -4], [0, 0.1, 2.5, 5], [0, 0, 0, 1]])


def _bytes(found: pydicom.Dataset) -> bytes:
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, found, enforce_file_format=True)
    return buffer.getvalue()


@cache
def _series() -> tuple[tuple[bytes, ...], ...]:
    """Series in several transfer syntaxes, of 8 and 16 bits, one with a scaling per slice; gaps need three slices, syntaxes only two.

    The last two are single files of several frames.
    """
    found = []
    for kind, dtype in enumerate((np.int16, np.uint8, np.int16, np.uint16, np.int16)):
        stored = np.arange(36).reshape(SHAPE).astype(dtype)
        series = list(slices(stored, AFFINE, slope=1.5, intercept=-3.0))
        for number, one in enumerate(series):
            if kind == 1:
                one.compress(RLELossless, generate_instance_uid=False)
            elif kind == 2:
                one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
            elif kind == 3:
                one.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
                one["PixelData"].VR = "OW"
            elif kind == 4:
                one.RescaleSlope = number + 1
        found.append(tuple(map(_bytes, series if kind in (0, 4) else series[:2])))
    frames = enhanced(slices(np.arange(36).reshape(SHAPE).astype(np.int16), AFFINE, slope=1.5))
    found.append((_bytes(frames),))
    frames.compress(RLELossless, generate_instance_uid=False)
    found.append((_bytes(frames),))
    return tuple(found)


@cache
def _segmentations() -> tuple[bytes, ...]:
    """Binary segments, one and two of them, deflated, and a label map."""
    found = []
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(place)
        like = io.read_volume(save(folder / "case", slices(np.arange(36).reshape(SHAPE).astype(np.int16), AFFINE)))
        labels = np.arange(36).reshape(SHAPE) % 3
        for path, values in ((folder / "one.dcm", labels % 2), (folder / "two.dcm", labels)):
            io.write_label_map(path, values, like)
            found.append(path.read_bytes())
        deflated = pydicom.dcmread(folder / "two.dcm")
        deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        found.append(_bytes(deflated))
        label_map = pydicom.dcmread(folder / "one.dcm")
        label_map.SegmentationType, label_map.BitsAllocated, label_map.BitsStored, label_map.HighBit = "LABELMAP", 8, 8, 7
        label_map.PixelData = bytes(number % 2 for number in range(36))
        found.append(_bytes(label_map))
    return tuple(found)


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """The elements behind the preamble, with other numbers, texts or lengths."""
    match rng.randrange(4):
        case 0:
            return content[:132] + mutated_numbers(content[132:], rng)
        case 1:  # Digits in the texts that DICOM keeps its numbers in.
            data = bytearray(content)
            places = [place for place in range(300, len(data)) if 0x2E <= data[place] <= 0x39]
            for place in rng.sample(places, min(len(places), rng.choice((1, 3, 20)))):
                data[place] = rng.choice(b"0123456789.-eE \\\0n")
            return bytes(data)
        case _:
            return content[:132] + mutated(content[132:], rng)


def _slices(rng: random.Random) -> Mapping[str, bytes]:
    files = list(rng.choice(_series()))
    if rng.random() < 0.9:
        number = rng.randrange(len(files))
        files[number] = _damaged(files[number], rng)
    return {f"{number}.dcm": content for number, content in enumerate(files)}


def _segmentation(rng: random.Random) -> Mapping[str, bytes]:
    content = rng.choice(_segmentations())
    return {"a.dcm": _damaged(content, rng) if rng.random() < 0.9 else content}


def dicom_targets() -> Iterator[Target]:
    """The readers of DICOM."""
    yield Target("dcm", _slices, lambda path, rng: read_volume(path.parent, rng))
    yield Target("dcm-seg", _segmentation, read_volume)
