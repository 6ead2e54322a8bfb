"""Inputs of the readers of volumes: small files of every kind, damaged before or after they are compressed or packed."""

from __future__ import annotations

import bz2
import gzip
import io as streams
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
from fuzz_mutations import mutated, mutated_numbers, mutated_text
from fuzz_worker import Target

from crfrefine import io

SHAPE = (2, 3, 4)
VOXELS = np.arange(24, dtype="<i2").tobytes()


def read_volume(path: Path, rng: random.Random) -> None:
    """Read a file in one of the ways in which the package does."""
    match rng.randrange(8):
        case 0:
            _require_labels(io.read_labels(path).data)
        case 1:
            assert io.read_mask(path).data.dtype == np.bool_
        case 2:
            io.is_whole(path)
            io.suffix_of(path)
        case 3:
            header = io.read_header(path)
            _require_header(header)
            for piece in io.read_pieces(header, planes=slice(0, 1), most_bytes=64):
                assert np.isfinite(piece.values).all()
        case 4:
            values = io.read_logits([path], fewest=1).values
            assert np.isfinite(values).all()
        case _:
            header = io.read_header(path)
            _require_header(header)
            values = io.allocate(header)
            values.fill(np.nan)
            io.read_into(header, values)
            assert np.isfinite(values).all()


def _require_header(header: io.VolumeHeader) -> None:
    assert len(header.grid_shape) in (1, 2, 3)
    assert all(isinstance(size, int) and size >= 1 for size in (*header.grid_shape, header.num_channels))
    assert header.dtype.isprintable()
    assert all(remark.isprintable() and len(remark) < 500 for remark in header.remarks)
    if header.affine is not None and header.spacing is not None:
        assert np.isfinite(header.affine).all()
        assert all(0 < size < np.inf for size in header.spacing)
        assert header.orientation is not None


def _require_labels(labels: np.ndarray) -> None:
    assert labels.dtype in (np.uint8, np.uint16)


@cache
def _nifti_files() -> tuple[bytes, ...]:
    """NIfTI-1 and NIfTI-2 in either byte order, with channels, scaling, only one transform, and a plane."""
    found = []
    affine = np.array([[-1.5, 0.1, 0, 3], [0.1, 2, 0, -4], [0, 0.2, 3, 5], [0, 0, 0, 1]])
    for kind, order, dtype, shape in (
        (nib.Nifti1Header, "<", np.int16, SHAPE),
        (nib.Nifti1Header, ">", np.float32, SHAPE),
        (nib.Nifti2Header, "<", np.float64, (*SHAPE, 2)),
        (nib.Nifti2Header, ">", np.uint8, (*SHAPE, 1, 3)),
        (nib.Nifti1Header, "<", np.uint8, SHAPE[:2]),
        (nib.Nifti1Header, "<", np.int64, SHAPE),
    ):
        header = kind(endianness=order)
        header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
        header.set_data_shape(shape)
        header.set_sform(affine, 1)
        header.set_qform(np.diag([1.5, 2, 3, 1]), 1 if order == "<" else 0)
        header["magic"], header["vox_offset"] = header.single_magic, header.single_vox_offset
        if dtype is np.int16:
            header.set_slope_inter(0.5, -3)
        block = header.binaryblock
        values = np.arange(int(np.prod(shape))).astype(np.dtype(dtype).newbyteorder(order))
        found.append(block + bytes(int(header["vox_offset"]) - len(block)) + values.tobytes())
    return tuple(found)


def _damaged_nifti(rng: random.Random) -> bytes:
    content = rng.choice(_nifti_files())
    header = 540 if content[4:8] == b"n+2\0" else 348
    match rng.randrange(5):
        case 0 | 1 | 2:  # Fields of the header.
            return mutated_numbers(content[:header], rng) + content[header:]
        case 3:
            return content[:header] + mutated(content[header:], rng)
        case _:
            return mutated(content, rng)


def _nifti(rng: random.Random) -> Mapping[str, bytes]:
    return {"a.nii": _damaged_nifti(rng)}


def _compressed_nifti(rng: random.Random) -> Mapping[str, bytes]:
    packed = gzip.compress(_damaged_nifti(rng) if rng.random() < 0.7 else rng.choice(_nifti_files()), 1, mtime=0)
    if rng.random() < 0.15:
        packed += rng.choice((bytes(9), packed, b"garbage", gzip.compress(b"", mtime=0)))
    return {"a.nii.gz": packed if rng.random() < 0.5 else mutated(packed, rng)}


@cache
def _mgh_files() -> tuple[bytes, ...]:
    """FreeSurfer's volumes of every type, one of two frames, one without a place in the world."""
    affine = np.array([[-1.5, 0.1, 0, 3], [0.1, 2, 0, -4], [0, 0.2, 3, 5], [0, 0, 0, 1]])
    found = [
        nib.MGHImage(np.arange(int(np.prod(shape))).reshape(shape, order="F").astype(dtype), affine).to_bytes()
        for dtype, shape in ((np.uint8, SHAPE), (np.int16, SHAPE), (np.int32, (*SHAPE, 2)), (np.float32, SHAPE))
    ]
    return (*found, found[0][:28] + bytes(2) + found[0][30:])


def _mgh(rng: random.Random) -> Mapping[str, bytes]:
    content = rng.choice(_mgh_files())
    match rng.randrange(5):
        case 0 | 1:
            content = mutated_numbers(content[:284], rng) + content[284:]
        case 2:
            content = content[:284] + mutated(content[284:], rng)
        case 3:
            content = mutated(content, rng)
        case _:
            packed = gzip.compress(content, 1, mtime=0)
            return {"a.mgz": mutated(packed, rng) if rng.random() < 0.7 else packed}
    return {"a.mgz": gzip.compress(content, 1, mtime=0)} if rng.random() < 0.3 else {"a.mgh": content}


@cache
def _pair_files() -> tuple[tuple[bytes, bytes], ...]:
    """Headers of NIfTI pairs and of Analyze, each with its voxels."""
    found = []
    kinds = (nib.Nifti1Pair, np.int16), (nib.Nifti2Pair, np.float32), (nib.AnalyzeImage, np.uint8), (nib.Spm2AnalyzeImage, np.int16)
    for kind, dtype in kinds:
        data = np.arange(24).reshape(SHAPE).astype(dtype)
        image = kind(data, np.diag([-1.5, 2, 3, 1]))
        found.append((image.header.binaryblock, data.tobytes(order="F")))
    return tuple(found)


def _pair(rng: random.Random) -> Mapping[str, bytes]:
    header, voxels = rng.choice(_pair_files())
    if rng.random() < 0.15:
        return {"a.hdr": header, "a.img": mutated(voxels, rng)}
    return {"a.hdr": mutated(header, rng) if rng.random() < 0.6 else mutated_numbers(header, rng), "a.img": voxels}


def meta_text(lines: Mapping[str, str]) -> bytes:
    """The text of a MetaImage header; ElementDataFile comes last."""
    fields = {"ObjectType": "Image", "NDims": "3", "DimSize": "2 3 4", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL", **lines}
    fields["ElementDataFile"] = fields.pop("ElementDataFile")
    return "".join(f"{key} = {value}\n" for key, value in fields.items()).encode()


GEOMETRY = {
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "1.5 -2 3e1",
    "CenterOfRotation": "0 0 0",
    "AnatomicalOrientation": "RAI",
    "ElementSpacing": "0.5 1 2",
}
_ZLIB = zlib.compress(VOXELS)
_META = (
    (meta_text({**GEOMETRY, "BinaryData": "True", "BinaryDataByteOrderMSB": "False"}), VOXELS),
    (meta_text({"CompressedData": "True", "CompressedDataSize": str(len(_ZLIB))}), _ZLIB),
    (meta_text({"BinaryData": "False"}), b" ".join(b"%d" % number for number in range(24))),
    (meta_text({"NDims": "4", "DimSize": "2 3 2 2", "Offset": "0 0 0 0"}), VOXELS),
    (meta_text({"DimSize": "2 3 2", "ElementNumberOfChannels": "2", "HeaderSize": "-1"}), VOXELS),
)


def _metaimage(rng: random.Random) -> Mapping[str, bytes]:
    text, voxels = rng.choice(_META)
    return {"a.mha": _text_and_voxels(text, voxels, rng)}


_META_DETACHED = (
    (meta_text({**GEOMETRY, "ElementDataFile": "a.raw"}), {"a.raw": VOXELS}),
    (meta_text({"ElementDataFile": "a.zraw", "CompressedData": "True"}), {"a.zraw": _ZLIB}),
    (meta_text({"ElementDataFile": "s%02d.raw 1 4 1"}), {f"s{n + 1:02d}.raw": VOXELS[12 * n : 12 * n + 12] for n in range(4)}),
    (
        meta_text({"ElementDataFile": "LIST"}) + b"s1.raw\ns2.raw\ns3.raw\ns4.raw\n",
        {f"s{n + 1}.raw": VOXELS[12 * n : 12 * n + 12] for n in range(4)},
    ),
    (
        meta_text({"ElementDataFile": "LIST 3D", "NDims": "4", "DimSize": "2 3 2 2"}) + b"h1.raw\nh2.raw\n",
        {"h1.raw": VOXELS[:24], "h2.raw": VOXELS[24:]},
    ),
)


def nrrd_text(*lines: str, **changes: str) -> bytes:
    """The text of an NRRD header, with the empty line at its end."""
    fields = {"type": "short", "dimension": "3", "sizes": "2 3 4", "endian": "little", "encoding": "raw", **changes}
    return "\n".join(["NRRD0004", *(f"{key}: {value}" for key, value in fields.items()), *lines, "", ""]).encode()


_WORLD = ("space: RAS", "space directions: (1,0,0) (0,2.5,0.1) (0,0,3e0)", "space origin: (1,-2,3)", "kinds: domain domain domain")
_NRRD = (
    (nrrd_text(*_WORLD, 'space units: "mm" "mm" "mm"', "measurement frame: (1,0,0) (0,1,0) (0,0,1)", "key:=value", "# a comment"), VOXELS),
    (nrrd_text("spacings: 1 2 3", "axis mins: 1 2 3", "centers: cell cell node", encoding="hex"), VOXELS.hex().encode()),
    (nrrd_text(*_WORLD, encoding="gzip"), gzip.compress(VOXELS, 1, mtime=0)),
    (nrrd_text(encoding="bzip2"), bz2.compress(VOXELS)),
    (nrrd_text(encoding="ascii", type="float"), b", ".join(b"%d.5" % number for number in range(24))),
    (nrrd_text("space: left-posterior-superior", "space directions: none (1,0,0) (0,1,0) (0,0,2)", dimension="4", sizes="2 3 2 2"), VOXELS),
    (nrrd_text("line skip: 1", "byte skip: -1"), b"a line\n" + VOXELS),
)
_SEGMENTS = [
    line
    for number in range(3)
    for line in (
        f"Segment{number}_ID:=Segment_{number}",
        f"Segment{number}_Name:=name {number}",
        f"Segment{number}_Extent:=0 1 0 2 0 3",
        f"Segment{number}_LabelValue:={number + 1}",
        f"Segment{number}_Layer:={number // 2}",
        f"Segment{number}_Tags:=Terminology~Segmentation category and type - 3D Slicer General Anatomy list~SCT^85756007^Tissue|",
    )
]
_SEGMENTATIONS = (
    (nrrd_text(*_WORLD, *_SEGMENTS, type="unsigned char", sizes="2 3 4", encoding="gzip"), gzip.compress(bytes(range(24)), 1, mtime=0)),
    (
        nrrd_text(
            "space: left-posterior-superior", "space directions: none (1,0,0) (0,1,0) (0,0,2)", *_SEGMENTS, dimension="4", sizes="2 2 3 4"
        ),
        b"".join(bytes((voxel % 3, 0, 3 * (voxel % 5 == 3), 0)) for voxel in range(24)),
    ),
)


def _nrrd(rng: random.Random) -> Mapping[str, bytes]:
    text, voxels = rng.choice(_NRRD)
    return {"a.nrrd": _text_and_voxels(text, voxels, rng)}


def _segmentation(rng: random.Random) -> Mapping[str, bytes]:
    text, voxels = rng.choice(_SEGMENTATIONS)
    return {"a.seg.nrrd": _text_and_voxels(text, voxels, rng)}


_NRRD_DETACHED = (
    (nrrd_text(*_WORLD, "data file: a.raw", "byte skip: -1")[:-1], {"a.raw": VOXELS}),
    (nrrd_text("datafile: a.raw.gz", encoding="gzip"), {"a.raw.gz": gzip.compress(VOXELS, 1, mtime=0)}),
    (nrrd_text("data file: s%02d.raw 1 4 1 2"), {f"s{n + 1:02d}.raw": VOXELS[12 * n : 12 * n + 12] for n in range(4)}),
    (
        nrrd_text("data file: LIST 2")[:-1] + b"s1.raw\ns2.raw\ns3.raw\ns4.raw\n",
        {f"s{n + 1}.raw": VOXELS[12 * n : 12 * n + 12] for n in range(4)},
    ),
)


def _detached(name: str, kinds: tuple[tuple[bytes, Mapping[str, bytes]], ...]) -> Callable[[random.Random], Mapping[str, bytes]]:
    def make(rng: random.Random) -> Mapping[str, bytes]:
        text, others = rng.choice(kinds)
        if rng.random() < 0.2:
            damaged = rng.choice(list(others))
            return {name: text, **others, damaged: mutated(others[damaged], rng)}
        return {name: mutated_text(text, rng), **others}

    return make


def _text_and_voxels(text: bytes, voxels: bytes, rng: random.Random) -> bytes:
    match rng.randrange(6):
        case 0:
            return text + mutated(voxels, rng)
        case 1:
            return mutated(text + voxels, rng)
        case _:
            return mutated_text(text, rng) + voxels


@cache
def _arrays() -> tuple[bytes, ...]:
    values = np.random.default_rng(5).normal(size=(3, 2, 4, 5))
    found = []
    for array in (
        values.astype(np.float32),
        np.asfortranarray(values.astype(">f8")),
        values.astype(np.float16)[:, 0],
        values.astype(np.int8),
    ):
        buffer = streams.BytesIO()
        np.save(buffer, array)
        found.append(buffer.getvalue())
    return tuple(found)


def _damaged_array(rng: random.Random) -> bytes:
    """An array whose header is damaged, of the length that it announces or of another."""
    content = rng.choice(_arrays())
    text = mutated_text(content[10:128].rstrip(), rng)
    match rng.randrange(4):
        case 0:
            return b"\x93NUMPY\2\0" + struct.pack("<I", len(text)) + text + content[128:]
        case 1:
            return content[:10] + text.ljust(118)[:118] + content[128:]
        case 2:
            return mutated(content[:128], rng) + content[128:]
        case _:
            return content[:128] + mutated(content[128:], rng)


def archive(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive, the same whenever it is made."""
    buffer = streams.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as packed:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            packed.writestr(entry, content)
    return buffer.getvalue()


@cache
def _archives() -> tuple[bytes, ...]:
    first, second, *_ = _arrays()
    return (
        archive({"logits.npy": first}),
        archive({"probabilities.npy": second}, zipfile.ZIP_STORED),
        archive({f"{number}.npy": b"" for number in range(50)}, zipfile.ZIP_BZIP2),
        archive({"x": b"", "logits.npy": first}, zipfile.ZIP_LZMA),
    )


_NAMES = ("logits", "logits.npy", "softmax.npy", "x/logits.npy", "probabilities", "l.npy", "\x1b[31m.npy", "x" * 5000, "arr_0.npy")


def _npz(rng: random.Random) -> Mapping[str, bytes]:
    match rng.randrange(4):
        case 0:
            content = archive(
                {rng.choice(("logits.npy", "probabilities.npy")): _damaged_array(rng)},
                rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)),
            )
        case 1:
            content = archive({rng.choice(_NAMES): rng.choice(_arrays()), "other": b""})
        case 2:  # The lengths, offsets and flags of the archive.
            packed = rng.choice(_archives())
            directory = packed.rindex(b"PK\1\2")
            content = packed[:directory] + mutated_numbers(packed[directory:], rng)
            if rng.random() < 0.5:
                content = mutated_numbers(content[:30], rng) + content[30:]
        case _:
            content = mutated(rng.choice(_archives()), rng)
    return {"a.npz": content}


def _npy(rng: random.Random) -> Mapping[str, bytes]:
    return {rng.choice(("a.npy", "a", "a.npz", "a.dat")): _damaged_array(rng)}


def _misnamed(rng: random.Random) -> Mapping[str, bytes]:
    """A damaged file of one kind under the name of another one, or of none."""
    make = rng.choice((_nifti, _compressed_nifti, _metaimage, _nrrd, _mgh, _npz))
    (content,) = make(rng).values()
    names = ("a.nii", "a.nii.gz", "a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.npz", "a.img", "a.mgz", "a.dcm", "a", "a.gz")
    return {rng.choice(names): content}


def volume_targets() -> Iterator[Target]:
    """The readers of volumes."""
    for name, make in (
        ("nii", _nifti),
        ("nii.gz", _compressed_nifti),
        ("mha", _metaimage),
        ("mhd", _detached("a.mhd", _META_DETACHED)),
        ("nrrd", _nrrd),
        ("nhdr", _detached("a.nhdr", _NRRD_DETACHED)),
        ("seg.nrrd", _segmentation),
        ("mgh", _mgh),
        ("hdr", _pair),
        ("npz", _npz),
        ("npy", _npy),
        ("misnamed", _misnamed),
    ):
        yield Target(name, make, read_volume)
