"""The table of formats, and files that are not what their names say: read as what they are, with a note, or told with a way out."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import run_here
from io_helpers import numbers, save_itk, save_nifti

from crfrefine import io
from crfrefine.errors import UnsupportedFormatError
from crfrefine.io.paths import FORMAT_OF_SUFFIX, FORMATS, files_read, recognize, stem_of, suffix_of

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
    table = (Path(__file__).parents[2] / "docs/reference/formats.md").read_text(encoding="utf-8").partition("### ")[0]
    assert all(f"`{suffix}`" in table for suffix in SUFFIXES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_recognizes_its_own_files_and_no_other(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    like = io.read_volume(save_nifti(tmp_path / "like.nii", numbers(SHAPE), AFFINE))
    if FORMAT_OF_SUFFIX[suffix_of(path)].is_read_only:
        write_as(path, suffix)
    elif suffix == ".seg.nrrd":
        io.write_label_map(path, numbers(SHAPE, dtype=np.int16) % 3, like)
    else:
        io.write_channels(path, numbers((3, *SHAPE)), like)
    start = path.read_bytes()[:4096]
    expected = FORMAT_OF_SUFFIX[suffix_of(path)].name
    assert [known.name for known in FORMATS if known.load().recognizes(start)] == [expected]
    nameless = path.rename(tmp_path / "nameless")
    assert recognize(nameless).name == expected


@pytest.mark.parametrize("content", [".nii", ".nii.gz", ".mha", ".nrrd", ".mgz", ".mgh"])
def test_content_wins_over_the_name_and_a_note_says_so(content, tmp_path):
    names = ("a.img", "scan", "a.nii", "a.nii.gz", "a.mha", "a.nrrd", "a.mhd", "a.nhdr", "a.npz", "a.mgz", "a.mgh")
    by_suffix = content.startswith((".nii", ".mg"))
    for name in names:
        path = write_as(tmp_path / name, content)
        read = io.read_volume(path)
        np.testing.assert_array_equal(read.data, numbers(SHAPE))
        np.testing.assert_allclose(read.affine, AFFINE if by_suffix else np.diag([-1.0, -1.5, 2.25, 1.0]), atol=1e-6)
        assert read.header.family == FORMAT_OF_SUFFIX[content].name
        is_right = name.endswith(content) if by_suffix else FORMAT_OF_SUFFIX.get(suffix_of(path)) is FORMAT_OF_SUFFIX[content]
        assert (read.header.misnamed is None) == is_right
        assert io.is_whole(path) == is_right, "an output that is not what its name says is written anew"
        path.write_bytes(path.read_bytes()[:-50])
        with pytest.raises(UnsupportedFormatError, match="cut off"):
            io.read_volume(path)


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_a_header_without_its_suffix_brings_its_voxels_along(suffix, tmp_path):
    """They must not be replaced."""
    save_itk(tmp_path / f"right{suffix}", numbers(SHAPE), compress=False)
    header, voxels = (tmp_path / f"right{suffix}").rename(tmp_path / "a.txt"), (tmp_path / "right.raw").rename(tmp_path / "a.zraw")
    header.write_text(header.read_text().replace("right.raw", "a.zraw"))
    np.testing.assert_array_equal(io.read_volume(header).data, numbers(SHAPE))
    assert files_read(header) == (header, voxels)
    before = voxels.read_bytes()
    assert "would replace an input" in run_here("convert", header, tmp_path / "a.mhd", status=1).stderr
    assert voxels.read_bytes() == before


PNG = b"\x89PNG\r\n\x1a\n" + bytes(500)
FOREIGN = {
    "DICOM": (bytes(128) + b"DICM" + bytes(300), "a DICOM file: `crfrefine convert` makes NIfTI .*series"),
    "PNG": (PNG, "a picture: .*export the volume as NIfTI"),
    "zip": (b"PK\3\4" + bytes(500), "an archive: unpack it"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(500), r"an HDF5 file \(MINC\?\): .*savez_compressed"),
    "bzip2": (b"BZh9" + bytes(500), "an archive: unpack it"),
    "PyTorch": (b"PK\3\4" + bytes(26) + b"model/data.pkl" + bytes(300), "a file of PyTorch or a pickle: save its array"),
    "MINC": (b"CDF\1" + bytes(300), "a MINC volume: .*mnc2nii"),
}


@pytest.mark.parametrize(("content", "expected"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_read_is_told_with_a_way_out(content, expected, tmp_path):
    for name in ("a.nii.gz", "a.nrrd", "IM0001"):
        path = tmp_path / name
        path.write_bytes(content)
        for read in (io.read_volume, lambda path: io.read_logits([path])):
            with pytest.raises(UnsupportedFormatError, match=rf"{name}: .*\n  It is {expected}.*\.$"):
                read(path)


def test_a_pipe_is_not_looked_into(tmp_path):
    """Opening it would wait for ever for somebody who writes."""
    os.mkfifo(tmp_path / "a.bin")
    assert recognize(tmp_path / "a.bin") is None
    with pytest.raises(UnsupportedFormatError, match="unknown file type"):
        io.read_header(tmp_path / "a.bin")
