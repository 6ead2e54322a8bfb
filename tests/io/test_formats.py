"""The table of formats, and files that are not what their names say: read as what they are, with a
note, or told with a way out.
"""

import gzip
import os
import random
import re
from importlib import import_module
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import run_here
from io_helpers import meta_text, nrrd_text, numbers, save_itk, save_nifti

from crfrefine import io
from crfrefine.errors import CapacityError, CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.formats import FORMAT_OF_SUFFIX, FORMATS
from crfrefine.io.paths import describe_others, files_read, recognize, stem_of, suffix_of

SUFFIXES = [suffix for known in FORMATS for suffix in known.suffixes]
SHAPE = (5, 6, 7)
AFFINE = np.diag([1.0, 1.5, 2.25, 1.0])


def write_as(path, suffix, data=None):
    data = numbers(SHAPE, dtype=np.int16) if data is None else data
    right = path.with_name(f"right{suffix}")
    if suffix.startswith(".nii"):
        save_nifti(right, data, AFFINE)
    elif suffix.startswith(".mg"):
        nib.save(nib.MGHImage(data, AFFINE), right)
    else:
        save_itk(right, data, spacing=(1.0, 1.5, 2.25), origin=(0.0, 0.0, 0.0))
    return right.rename(path)


def test_every_suffix_has_one_format_and_is_documented():
    assert len(set(SUFFIXES)) == len(SUFFIXES)
    for suffix in SUFFIXES:
        path = Path(f"a.b{suffix.upper()}")
        assert suffix in FORMAT_OF_SUFFIX[suffix_of(path)].suffixes
        assert stem_of(path) == "a.b"
    table = (
        (Path(__file__).parents[2] / "docs/reference/formats.md")
        .read_text(encoding="utf-8")
        .partition("### ")[0]
    )
    assert all(f"`{suffix}`" in table for suffix in SUFFIXES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_recognizes_its_own_files_and_no_other(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    like = io.read_header(save_nifti(tmp_path / "like.nii", numbers(SHAPE), AFFINE))
    if FORMAT_OF_SUFFIX[suffix_of(path)].is_read_only:
        write_as(path, suffix)
    elif suffix == ".seg.nrrd":
        io.write_label_map(path, numbers(SHAPE, dtype=np.int16) % 3, like)
    else:
        io.write_channels(path, numbers((3, *SHAPE)), like)
    start = path.read_bytes()[:4096]
    expected = FORMAT_OF_SUFFIX[suffix_of(path)].name
    assert [known.name for known in FORMATS if import_module(known.module).recognizes(start)] == [
        expected
    ]
    nameless = path.rename(tmp_path / "nameless")
    assert recognize(nameless).name == expected


@pytest.mark.parametrize("content", [".nii", ".nii.gz", ".mha", ".nrrd", ".mgz", ".mgh"])
def test_content_wins_over_the_name_and_a_note_says_so(content, tmp_path):
    names = (
        "a.img",
        "scan",
        "a.nii",
        "a.nii.gz",
        "a.mha",
        "a.nrrd",
        "a.mhd",
        "a.nhdr",
        "a.npz",
        "a.mgz",
        "a.mgh",
    )
    by_suffix = content.startswith((".nii", ".mg"))
    for name in names:
        path = write_as(tmp_path / name, content)
        read = io.read_volume(path)
        np.testing.assert_array_equal(read.data, numbers(SHAPE))
        np.testing.assert_allclose(
            read.affine, AFFINE if by_suffix else np.diag([-1.0, -1.5, 2.25, 1.0]), atol=1e-6
        )
        assert read.header.family == FORMAT_OF_SUFFIX[content].name
        if by_suffix:
            is_right = name.endswith(content)
        else:
            is_right = FORMAT_OF_SUFFIX.get(suffix_of(path)) is FORMAT_OF_SUFFIX[content]
        assert (read.header.misnamed is None) == is_right
        assert io.is_intact(path) == is_right, (
            "an output that is not what its name says is written anew"
        )
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(UnsupportedFormatError, match="cut off"):
            io.read_volume(path)


def test_a_header_that_itk_reads_is_told_the_suffix_that_it_lacks(tmp_path):
    """SimpleITK reads it under its own name alone; that is no bug of the program."""
    path = tmp_path / "a.nii"
    path.write_bytes(nrrd_text("axis mins: 0 0 0") + bytes(48))
    with pytest.raises(
        UnsupportedFormatError, match=r"a\.nii: .*\n  It is NRRD by its content: name it \.nrrd"
    ):
        io.read_header(path)


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_header_without_its_suffix_brings_its_voxels_along(suffix, tmp_path):
    """They must not be replaced."""
    save_itk(tmp_path / f"right{suffix}", numbers(SHAPE), compress=False)
    header = (tmp_path / f"right{suffix}").rename(tmp_path / "a.txt")
    voxels = (tmp_path / "right.raw").rename(tmp_path / "a.zraw")
    header.write_text(header.read_text().replace("right.raw", "a.zraw"))
    np.testing.assert_array_equal(io.read_volume(header).data, numbers(SHAPE))
    assert files_read(header) == (header, voxels)
    before = voxels.read_bytes()
    assert (
        "would replace an input" in run_here("convert", header, tmp_path / "a.mhd", status=1).stderr
    )
    assert voxels.read_bytes() == before


PNG = b"\x89PNG\r\n\x1a\n" + bytes(500)
FOREIGN = {
    "DICOM": (
        bytes(128) + b"DICM" + bytes(300),
        "a DICOM file: `crfrefine convert` makes NIfTI .*series",
    ),
    "PNG": (PNG, "a picture: .*export the volume as NIfTI"),
    "zip": (b"PK\3\4" + bytes(500), "an archive: unpack it"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(500), r"an HDF5 file \(MINC\?\): .*savez_compressed"),
    "bzip2": (b"BZh9" + bytes(500), "an archive: unpack it"),
    "PyTorch": (
        b"PK\3\4" + bytes(26) + b"model/data.pkl" + bytes(300),
        "a file of PyTorch or a pickle: save its array",
    ),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        "a pointer of Git LFS .*: fetch them with git lfs pull",
    ),
    "git-annex": (
        b"/annex/objects/SHA256E-s1--4d7a.nii.gz\n",
        "a pointer of git-annex .*annex get",
    ),
    "HTML": (b"\n<!-- x -->\n<!DOCTYPE html>\n<html><body>log in", "a web page.*download the file"),
    "packed HTML": (gzip.compress(b"\xef\xbb\xbf<HTML>" + bytes(500)), "a web page"),
    "XML": (b"<?xml version='1.0'?>\n<Error><Code>AccessDenied</Code>", "XML, such as the error"),
    "JSON": (b'{\n "message": "Not found"}', "JSON, such as the error message of a server"),
    "packed twice": (gzip.compress(gzip.compress(bytes(3000))), "compressed twice: unpack it once"),
    "tar": (
        gzip.compress(b"a.nii".ljust(257, b"\0") + b"ustar" + bytes(300)),
        "an archive: unpack",
    ),
    "MINC": (b"CDF\1" + bytes(300), "a MINC volume: .*mnc2nii"),
}


@pytest.mark.parametrize(("content", "expected"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_read_is_told_with_a_way_out(content, expected, tmp_path):
    for name in ("a.nii.gz", "a.nrrd", "a.mha", "a.mgz", "a.npz", "IM0001"):
        path = tmp_path / name
        path.write_bytes(content)
        for read in (io.read_volume, lambda path: io.read_logits([path])):
            with pytest.raises(
                UnsupportedFormatError, match=rf"{name}: .*\n  It is {expected}.*\.$"
            ):
                read(path)


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_pointer_in_place_of_the_voxels_of_a_header(suffix, tmp_path):
    save_itk(tmp_path / f"a{suffix}", numbers(SHAPE), compress=False)
    (tmp_path / "a.raw").write_bytes(FOREIGN["Git LFS"][0])
    with pytest.raises(UnsupportedFormatError, match=r"cut off.*\n  .*a\.raw is a pointer of Git"):
        io.read_volume(tmp_path / f"a{suffix}")


def test_a_folder_is_not_described_by_its_texts(tmp_path):
    """dataset.json and pages beside volumes are no volumes."""
    (tmp_path / "a.json").write_bytes(FOREIGN["JSON"][0])
    (tmp_path / "b.html").write_bytes(FOREIGN["HTML"][0])
    (tmp_path / "c.ima").write_bytes(FOREIGN["DICOM"][0])
    assert "There is c.ima, which is a DICOM file" in describe_others(tmp_path)


@pytest.mark.parametrize("voxels", ["x.img", "x.img.gz"])
def test_a_compressed_header_of_a_pair_finds_its_voxels(voxels, tmp_path):
    image = nib.Nifti1Pair(numbers(SHAPE, dtype=np.int16), AFFINE)
    nib.save(image, tmp_path / "x.img")
    header = tmp_path / "x.hdr.gz"
    header.write_bytes(gzip.compress((tmp_path / "x.hdr").read_bytes()))
    (tmp_path / "x.hdr").unlink()
    content = (tmp_path / "x.img").read_bytes()
    (tmp_path / "x.img").unlink()
    with pytest.raises(InputError, match=r"x\.hdr\.gz: its voxels are missing; .*/x\.img,"):
        io.read_header(header)
    is_packed = voxels.endswith(".gz")
    (tmp_path / voxels).write_bytes(gzip.compress(content) if is_packed else content)
    np.testing.assert_array_equal(io.read_volume(header).data, numbers(SHAPE))
    np.testing.assert_array_equal(io.read_volume(tmp_path / voxels).data, numbers(SHAPE))
    assert stem_of(header) == stem_of(tmp_path / voxels) == "x"
    assert files_read(header) == (header, tmp_path / voxels)


def test_a_pipe_is_not_looked_into(tmp_path):
    """Opening it would wait for ever for somebody who writes."""
    os.mkfifo(tmp_path / "a.bin")
    assert recognize(tmp_path / "a.bin") is None
    with pytest.raises(InputError, match="this is a pipe"):
        io.read_header(tmp_path / "a.bin")


VOXELS = np.arange(24, dtype="<i2").tobytes()
PATTERNS = ("%s.raw 1 4 1", "LIST 3", "s%d.raw", "s%d.raw 1 6", "s%d.raw 1 7 1")
META_HEADERS = {
    **{name: (meta_text(ElementDataFile=name), "a running number such as") for name in PATTERNS},
    "packed": (meta_text(CompressedData="T", ElementDataFile="s%d 1 4 1"), "expected one file, as"),
    "list of three": (
        meta_text(ElementDataFile="LIST") + b"a\nb\nc\n\n",
        "expected names of 4 files, .*; found 3",
    ),
    "NDims not of DimSize": (meta_text(NDims="2"), "DimSize = 2 3 4; expected 2 whole numbers"),
    "DimSize past 64 bits": (
        meta_text(DimSize="4000000000 4000000000 4000000000"),
        "promises 128(000){9} bytes .* more than the 48 bytes",
    ),
    "spacing of zero": (
        meta_text(ElementSpacing="1 0 1"),
        "expected voxels that are larger than 0",
    ),
    "spacing in another unit": (
        meta_text(ElementSpacing="1e-6 3e-9 2e-6"),
        "affine is .* -3e-09 .*voxels of 1e-06 mm or more",
    ),
    "offset infinite": (meta_text(Offset="1 inf 1"), "Offset = 1 inf 1; expected 3 finite numbers"),
    "two offsets": (
        meta_text(Offset="1 2 3", Origin="1 2 4"),
        "Offset = 1 2 3; expected one value, found a second one: 1 2 4",
    ),
    "singular matrix": (
        meta_text(TransformMatrix="1 0 0 1 0 0 0 0 1"),
        "geometry in the header is not usable",
    ),
    "zero byte in a name": (meta_text(ElementDataFile="a\0.raw"), "line 4 holds a zero byte"),
    "name missing": (meta_text(ElementDataFile=""), "expected the name of a file"),
    "name with escapes": (
        meta_text(ElementDataFile="\x1b[2Ja.raw"),
        r"expected them in .*\\x1b\[2Ja\.raw",
    ),
    "other object": (meta_text(ObjectType="Tube"), "expected Image"),
    "type unknown": (
        meta_text(ElementType="MET_STRING"),
        "ElementType = MET_STRING; expected one of MET_CHAR",
    ),
    "from the end, compressed": (
        meta_text(HeaderSize="-1", CompressedData="True"),
        "expected 0 before compressed voxels",
    ),
    "a line without a key": (b"NDims = 3\nhello\n", "line 2 is not `Key = Value`: 'hello'"),
    "binary garbage": (
        bytes(random.Random(1).randbytes(5000)),
        "damaged header|not a MetaImage file",
    ),
    "no end": (b"Comment = x\n" * (1 << 19), "does not end within 16 MiB and 262144 lines"),
}
NRRD_HEADERS = {
    "a kind of fruit": (nrrd_text("kinds: domain domain banana"), "ITK cannot convert"),
    "complex numbers": (nrrd_text("kinds: complex domain domain"), "; expected 3 kinds"),
    "bzip2": (nrrd_text(encoding="bzip2"), "encoding: bzip2; expected raw, gzip, ascii or hex"),
    "dimension 0": (nrrd_text(dimension="0"), "expected a whole number from 1 to 16"),
    "dimension 1": (nrrd_text(dimension="1", sizes="24"), "cannot be split into grid and channels"),
    "directions of zero": (
        nrrd_text("space: LPS", "space directions: (0,0,0) (0,1,0) (0,0,1)"),
        "expected vectors that are as long",
    ),
    "unknown field": (
        nrrd_text("space origio: (1,2,3)"),
        "line 7 is not a `field: value` of the format: 'space origio",
    ),
    "field twice": (
        nrrd_text("sizes: 2 3 4", sizes="24"),
        "sizes: 24; expected one value, found a second one: 2 3 4",
    ),
    "origin of 2000 numbers": (
        nrrd_text("space: LPS", f"space origin: ({'1,' * 2000}1)"),
        "expected one vector of 3",
    ),
    "origin and more": (
        nrrd_text("space: LPS", "space origin: (1,2,3) x"),
        "space origin: \\(1,2,3\\) x; expected one vector of 3",
    ),
    "kinds of two channels": (
        nrrd_text("kinds: vector domain list"),
        "2 axes of values cannot be split",
    ),
    "sizes past 64 bits": (
        nrrd_text(sizes="4000000000 4000000000 4000000000"),
        "promises 128000000000000000000000000000 bytes",
    ),
    "sizes of gzip": (
        nrrd_text(encoding="gzip", sizes="9000 9000 9000"),
        "more than the 48 compressed bytes in it can hold",
    ),
    "no endian": (nrrd_text(endian="-"), "no line `endian: ...`"),
    "endian": (nrrd_text(endian="middle"), "expected little or big"),
    "type": (nrrd_text(type="block"), "expected the name of an integer or floating-point type"),
    "not gzip": (nrrd_text(encoding="gzip"), "is not compressed with gzip"),
    "space of 2 dimensions": (
        nrrd_text("space dimension: 2", "space directions: (1,0) (0,1) (1,1)"),
        "3 axes in a space of 2",
    ),
    "directions singular": (
        nrrd_text("space: LPS", "space directions: (1,0,0) (1,0,0) (0,0,1)"),
        "geometry in the header is not usable",
    ),
    "carriage return": (
        nrrd_text("content: a\rdata file: b.raw"),
        "line 7 holds a carriage return before its end",
    ),
    "byte skip": (nrrd_text("byte skip: -5"), "expected a whole number from -1 to"),
    "voxels missing": (
        nrrd_text("datafile: nowhere.raw"),
        "missing; expected them in .*nowhere.raw, put both files into one folder",
    ),
    "no empty line": (nrrd_text().rstrip(b"\n"), "cut off: no empty line ends its header"),
    "version": (
        nrrd_text().replace(b"NRRD0004", b"NRRD0099"),
        "not an NRRD file, although its name says so",
    ),
    "binary garbage": (
        b"NRRD0004\n" + random.Random(1).randbytes(5000),
        "damaged header|damaged NRRD header",
    ),
    "no end": (
        b"NRRD0004\n" + b"key:=value\n" * (1 << 19),
        "does not end within 16 MiB and 262144 lines",
    ),
}
NO_VOXELS = ("list of three", "no empty line", "binary garbage", "no end")
HEADERS = [
    pytest.param(suffix, *case, name not in NO_VOXELS, id=f"{suffix} {name}")
    for suffix, cases in ((".mha", META_HEADERS), (".nrrd", NRRD_HEADERS))
    for name, case in cases.items()
]


@pytest.mark.parametrize(("suffix", "header", "message", "has_voxels"), HEADERS)
def test_a_hostile_header_is_an_error_with_the_name_of_the_file(
    suffix, header, message, has_voxels, tmp_path, capfd
):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(header + (VOXELS if has_voxels else b""))
    with pytest.raises(CrfRefineError, match=message) as caught:
        io.read_volume(path)
    text = str(caught.value)
    assert f"a{suffix}" in text
    assert not isinstance(caught.value, CapacityError), (
        "nothing is allocated for what a file cannot hold"
    )
    assert len(text) < 1000
    assert re.sub(r"\n", "", text).isprintable()
    assert capfd.readouterr() == ("", ""), "only the error itself may report anything"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
@pytest.mark.parametrize("where", ["header", "voxels"])
def test_what_is_no_regular_file_is_refused(kind, where, tmp_path):
    target = tmp_path / ("a.mhd" if where == "header" else "a.raw")
    {"pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[
        kind
    ](target)
    if where == "voxels":
        (tmp_path / "a.mhd").write_bytes(meta_text(ElementDataFile="a.raw"))
    with pytest.raises(InputError, match=r"a\.mhd: expected .*(regular file|this is a folder)"):
        io.read_volume(tmp_path / "a.mhd")
