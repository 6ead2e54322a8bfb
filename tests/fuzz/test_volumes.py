"""Readers of volumes on small files of every kind, damaged before or after they are compressed; and
files of any name.
"""

import contextlib
import io as streams
import os
import tempfile
import zipfile
import zlib
from functools import cache, partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_sets import found_cases
from fuzz_mutations import damaged
from fuzzing import Target
from hypothesis import given, settings
from hypothesis import strategies as st
from io_helpers import meta_text, nrrd_text

from crfrefine import io
from crfrefine.errors import CrfRefineError
from crfrefine.io.paths import recognize, suffix_to_write
from crfrefine.io.reading import read_mask, reading_jobs

SHAPE = (2, 3, 4)
VOXELS = np.arange(24, dtype="<i2").tobytes()
AFFINE = np.array([[-1.5, 0.1, 0, 3], [0.1, 2, 0, -4], [0, 0.2, 3, 5], [0, 0, 0, 1]])


def _read_volume(path, rng):
    """Read a file in one of the ways in which the package does."""
    match rng.randrange(8):
        case 0:
            assert io.read_labels(path).data.dtype in (np.uint8, np.uint16)
        case 1:
            assert read_mask(io.read_header(path)).dtype == np.bool_
        case 2:
            io.is_intact(path)
            io.suffix_of(path)
        case 3:
            header = io.read_header(path)
            _require_header(header)
            for piece in io.read_pieces(header, most_bytes=64):
                assert np.isfinite(piece.values).all()
        case 4:
            assert np.isfinite(io.read_logits([path], fewest=1)).all()
        case _:
            header = io.read_header(path)
            _require_header(header)
            values, (job,) = reading_jobs([header])
            values.fill(np.nan)
            job()
            assert np.isfinite(values).all()


def _require_header(header):
    assert len(header.grid_shape) in (1, 2, 3)
    assert all(
        isinstance(size, int) and size >= 1 for size in (*header.grid_shape, header.num_channels)
    )
    assert all(
        remark.isprintable() and len(remark) < 500
        for remark in (header.dtype, *map(str, header.notes))
    )
    if header.affine is not None and header.spacing is not None:
        assert np.isfinite(header.affine).all()
        assert all(0 < size < np.inf for size in header.spacing)
        assert header.orientation is not None


def _nifti(name):
    """NIfTI-1 and NIfTI-2 in either byte order, with channels, scaling, only one transform, and a
    plane.
    """
    for kind, order, dtype, shape in (
        (nib.Nifti1Image, "<", np.int16, SHAPE),
        (nib.Nifti1Image, ">", np.float32, SHAPE),
        (nib.Nifti2Image, "<", np.float64, (*SHAPE, 2)),
        (nib.Nifti2Image, ">", np.uint8, (*SHAPE, 1, 3)),
        (nib.Nifti1Image, "<", np.uint8, SHAPE[:2]),
        (nib.Nifti1Image, "<", np.int64, SHAPE),
    ):
        header = kind.header_class(endianness=order)
        header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
        if dtype is np.int16:
            header.set_slope_inter(0.5, -3)
        values = np.arange(int(np.prod(shape))).reshape(shape, order="F").astype(dtype)
        image = kind(values, AFFINE, header)
        image.set_sform(AFFINE, 1)
        image.set_qform(np.diag([1.5, 2, 3, 1]), 1 if order == "<" else 0)
        yield {name: image.to_bytes()}


def _mgh():
    """FreeSurfer's volumes of every type, one of two frames, one without a place in the world; and
    compressed.
    """
    for dtype, shape in (
        (np.uint8, SHAPE),
        (np.int16, SHAPE),
        (np.int32, (*SHAPE, 2)),
        (np.float32, SHAPE),
    ):
        content = nib.MGHImage(
            np.arange(int(np.prod(shape))).reshape(shape, order="F").astype(dtype), AFFINE
        ).to_bytes()
        yield from (
            {"a.mgh": content},
            {"a.mgz": content},
            {"a.mgh": content[:28] + bytes(2) + content[30:]},
        )


def _pairs():
    """Headers of NIfTI pairs and of Analyze, each with its voxels."""
    kinds = (
        (nib.Nifti1Pair, np.int16),
        (nib.Nifti2Pair, np.float32),
        (nib.AnalyzeImage, np.uint8),
        (nib.Spm2AnalyzeImage, np.int16),
    )
    for kind, dtype in kinds:
        data = np.arange(24).reshape(SHAPE).astype(dtype)
        header = kind(data, np.diag([-1.5, 2, 3, 1])).header.binaryblock
        yield {"a.hdr": header, "a.img": data.tobytes(order="F")}


_GEOMETRY = {
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "1.5 -2 3e1",
    "CenterOfRotation": "0 0 0",
    "ElementSpacing": "0.5 1 2",
}
_ZLIB = zlib.compress(VOXELS)
_GZIP = zlib.compress(VOXELS, wbits=31)
_META = (
    (
        meta_text(
            **_GEOMETRY,
            ObjectType="Image",
            AnatomicalOrientation="RAI",
            BinaryData="True",
            BinaryDataByteOrderMSB="False",
        ),
        VOXELS,
    ),
    (meta_text(CompressedData="True", CompressedDataSize=str(len(_ZLIB))), _ZLIB),
    (meta_text(NDims="4", DimSize="2 3 2 2", Offset="0 0 0 0"), VOXELS),
    (meta_text(DimSize="2 3 2", ElementNumberOfChannels="2"), VOXELS),
)
_META_DETACHED = (
    (meta_text(**_GEOMETRY, ElementDataFile="a.raw"), {"a.raw": VOXELS}),
    (meta_text(ElementDataFile="a.zraw", CompressedData="True"), {"a.zraw": _ZLIB}),
)
_WORLD = (
    "space: RAS",
    "space directions: (1,0,0) (0,2.5,0.1) (0,0,3e0)",
    "space origin: (1,-2,3)",
    "kinds: domain domain domain",
)
_CHANNELS = ("space: left-posterior-superior", "space directions: none (1,0,0) (0,1,0) (0,0,2)")
_NRRD = (
    (
        nrrd_text(
            *_WORLD,
            'space units: "mm" "mm" "mm"',
            "measurement frame: (1,0,0) (0,1,0) (0,0,1)",
            "key:=value",
            "# a comment",
        ),
        VOXELS,
    ),
    (nrrd_text("spacings: 1 2 3", 'labels: "x" "y" "z"'), VOXELS),
    (nrrd_text(*_WORLD, encoding="gzip"), _GZIP),
    (nrrd_text(*_CHANNELS, dimension="4", sizes="2 3 2 2"), VOXELS),
)
_NRRD_DETACHED = (
    (nrrd_text(*_WORLD, "data file: a.raw")[:-1], {"a.raw": VOXELS}),
    (nrrd_text("datafile: a.raw.gz", encoding="gzip"), {"a.raw.gz": VOXELS}),
)


def _texts(name, contents):
    """Texts with their voxels behind them, or in other files."""
    for text, voxels in contents:
        if isinstance(voxels, bytes):
            yield {name: text + voxels}
        else:
            yield {name: text, **voxels}


def _arrays():
    values = np.random.default_rng(5).normal(size=(3, 2, 4, 5))
    for array in (
        values.astype("f4"),
        np.asfortranarray(values.astype(">f8")),
        values.astype("f2")[:, 0],
        values.astype("i1"),
    ):
        buffer = streams.BytesIO()
        np.save(buffer, array)
        yield {"a.npy": buffer.getvalue()}


_NAMES = ("logits", "softmax.npy", "x/logits.npy", "\x1b[31m.npy", "x" * 5000, "arr_0.npy")
_COMPRESSIONS = (
    *[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED] * 5,
    zipfile.ZIP_BZIP2,
    zipfile.ZIP_LZMA,
)


def _npz(rng):
    """Of a damaged array, of one that has another name, or with damage to the archive."""
    sample = rng.choice(_samples("npy"))
    kind = rng.randrange(3)
    names = ("logits.npy", "probabilities.npy")
    if kind == 0:
        sample = damaged(sample, rng)
    elif kind == 1:
        names = _NAMES
    (array,) = sample.values()
    name = rng.choice(names)
    buffer = streams.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for member, content in (
            (name, array),
            *((f"{n}", b"") for n in range(rng.choice((0, 0, 1, 50)))),
        ):
            packed.writestr(
                zipfile.ZipInfo(member), content, rng.choice(_COMPRESSIONS)
            )  # no time of day in it
    files = {"a.npz": buffer.getvalue()}
    if kind == 2:
        return damaged(files, rng)
    return files


def _misnamed(rng):
    """A damaged file of one kind under the name of another one, or of none."""
    (content,) = damaged(
        rng.choice(_samples(rng.choice(("nii", "nii.gz", "mha", "nrrd", "mgh", "npy")))), rng
    ).values()
    suffixes = (
        ".nii",
        ".nii.gz",
        ".mha",
        ".mhd",
        ".nrrd",
        ".nhdr",
        ".npz",
        ".npy",
        ".img",
        ".mgz",
        ".dcm",
        ".dat",
        "",
        ".gz",
    )
    return {f"a{rng.choice(suffixes)}": content}


_SAMPLES = {
    "nii": partial(_nifti, "a.nii"),
    "nii.gz": partial(_nifti, "a.nii.gz"),
    "mha": partial(_texts, "a.mha", _META),
    "mhd": partial(_texts, "a.mhd", _META_DETACHED),
    "nrrd": partial(_texts, "a.nrrd", _NRRD),
    "nhdr": partial(_texts, "a.nhdr", _NRRD_DETACHED),
    "mgh": _mgh,
    "hdr": _pairs,
    "npy": _arrays,
}


@cache
def _samples(name):
    return tuple(_SAMPLES[name]())


_MAKERS = {"npz": _npz, "misnamed": _misnamed}


@pytest.mark.parametrize("kind", [*_SAMPLES, *_MAKERS])
def test_many_inputs(kind, fuzzed):
    fuzzed(
        Target(
            kind,
            _MAKERS.get(kind, lambda rng: damaged(rng.choice(_samples(kind)), rng)),
            _read_volume,
        ),
        200,
    )


ENDINGS = (
    "",
    ".nii.gz",
    ".nii",
    "_0000.nii.gz",
    "_0001.NII",
    ".mha",
    ".seg.nrrd",
    ".npz",
    "_seg.nii",
    "_label0.nii",
    ".json",
    ".",
)
NAMES = st.builds(
    lambda stem, ending: stem[:200] + os.fsencode(ending),
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    ),
    st.sampled_from(ENDINGS),
).filter(lambda name: name not in (b"", b".", b"..") and b"/" not in name and b"\0" not in name)
STARTS = st.sampled_from(
    [b"", b"NRRD0004\n", b"NDims = 3\n", b"\x5c\x01\0\0", b"PK\3\4", b"\x1f\x8b", b"\x93NUMPY"]
)


@settings(max_examples=50)
@given(st.lists(st.tuples(NAMES, STARTS), min_size=1, max_size=5))
def test_any_name_of_a_file(files):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, start in files:
            Path(folder, os.fsdecode(name)).write_bytes(start)
        for path in folder.iterdir():
            assert path.name in (io.stem_of(path) + io.suffix_of(path), path.name)
            recognize(path)
            suffix_to_write(path)
            # Paths stand in errors as they are, and the commands make them printable.
            with contextlib.suppress(CrfRefineError):
                io.read_header(path)
        with contextlib.suppress(CrfRefineError):
            found_cases(folder, folder, folder, folder)
