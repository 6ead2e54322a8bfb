"""Every variant of MetaImage and NRRD headers, against SimpleITK: one volume, told in many ways."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, save_itk

from crfrefine import io
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.recognition import files_read

REAL = Path(os.environ.get("CRFREFINE_DATA", "nowhere"))
SHAPE = (4, 5, 6)
DATA = numbers(SHAPE[::-1], dtype=np.int16)  # in the order of files, x fastest
VOXELS = DATA.tobytes()
META = ["NDims = 3", "DimSize = 4 5 6", "ElementType = MET_SHORT"]
NRRD = ["NRRD0004", "type: short", "dimension: 3", "sizes: 4 5 6", "endian: little"]
TYPES = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]


def mha(folder, *lines, data=VOXELS, name="a.mha", end="\n"):
    text = end.join([*META, *lines, *([] if any("ElementDataFile" in line for line in lines) else ["ElementDataFile = LOCAL"]), ""])
    (folder / name).write_bytes(text.encode() + data)
    return folder / name


def nrrd(folder, *lines, data=VOXELS, name="a.nrrd", end="\n", first=NRRD):
    encoding = [] if any(line.startswith("encoding") for line in lines) else ["encoding: raw"]
    (folder / name).write_bytes(end.join([*first, *encoding, *lines, "", ""]).encode() + data)
    return folder / name


def assert_as_simpleitk(path):
    ours, itks = io.read_volume(path), sitk.ReadImage(str(path))
    data = itk_array(itks).astype(np.float32)
    np.testing.assert_array_equal(ours.data, np.moveaxis(data, -1, 0) if itks.GetDimension() == 4 else data)
    np.testing.assert_array_equal(ours.affine, itk_affine(itks))


def assert_data(path, stored=DATA):
    np.testing.assert_array_equal(io.read_volume(path).data, stored.transpose())


@pytest.mark.parametrize("suffix", [".mhd", ".mha", ".nrrd", ".nhdr"])
@pytest.mark.parametrize(("compress", "channels", "shape"), [(True, 3, (4, 5)), (True, 0, SHAPE), (False, 3, SHAPE)])
def test_all_pixel_types_that_simpleitk_writes(suffix, compress, channels, shape, tmp_path):
    direction = OBLIQUE if len(shape) == 3 else np.array([[0.8, -0.6], [0.6, 0.8]])
    for dtype in TYPES:
        data = (numbers((channels, *shape) if channels else shape, dtype=np.int64) % 100).astype(dtype)
        path = save_itk(tmp_path / f"a{suffix}", data, channels=bool(channels), compress=compress, direction=direction)
        assert_as_simpleitk(path)
        assert io.read_header(path).dtype == np.dtype(dtype).name


@pytest.mark.parametrize(
    "lines",
    [
        ("ElementSpacing = 5.0e-01 1.5 2",),
        ("ElementSize = 0.7 1.5 2",),
        ("ElementSize = 9 9 9", "ElementSpacing = 0.7 1.5 2"),
        ("ElementSpacing = -1 1.5 2",),
        ("ElementSpacing = 1 1.5 2 3", "Offset = 1 2 3 4"),
        ("Offset = 1 2 3", "CenterOfRotation = 7 8 9", "AnatomicalOrientation = LPI"),
        ("Origin = 1e1 -2 .5",),
        ("Position = 1 2 3",),
        ("ImagePosition = 1 2 3",),
        ("TransformMatrix = 0 1 0 -1 0 0 0 0 1", "ElementSpacing = 1 1.5 2"),
        ("Rotation = 0 0 1 1 0 0 0 1 0", "ElementSpacing = 1 1.5 2"),
        ("Orientation = 0.8 0.6 0 -0.6 0.8 0 0 0 -1", "Offset = 1 2 3"),
        ("TransformMatrix = 1 0.5 0 0 1 0 0 0 1", "ElementSpacing = 1 1.5 2"),
        ("  ElementSpacing=1   1.5\t2 ", "Comment = a = b : c"),
        ("ElementSpacing : 1 1.5 2",),
        ("ElementByteOrderMSB = True",),
        ("BinaryDataByteOrderMSB = true", "ElementNumberOfChannels = 1"),
        ("ElementType = MET_USHORT",),
        ("HeaderSize = -1",),
        ("DimSize = 4.0 5 6e0", ""),
    ],
    ids=lambda lines: lines[0],
)
def test_metaimage_headers_mean_what_simpleitk_says(lines, tmp_path):
    assert_as_simpleitk(mha(tmp_path, *lines))
    assert_as_simpleitk(mha(tmp_path, *lines, end="\r\n"))


def test_metaimage_keys_in_other_letters(tmp_path):
    """SimpleITK passes over keys in lower case without a word; here they count."""
    path = mha(tmp_path, "elementspacing = 1 2 3", "ElementDataFile = local")
    path.write_bytes(path.read_bytes().replace(b"DimSize", b"dimsize"))
    assert_data(path)
    assert io.read_volume(path).spacing == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("line", ["LIST", "LIST 2D", "s%d.raw 1 6 1", "t%03d.raw 10 20 2", "LISTE ä.raw"])
def test_metaimage_voxels_in_files_of_their_own(line, tmp_path):
    for number, plane in enumerate(DATA, 1):
        (tmp_path / f"s{number}.raw").write_bytes(plane.tobytes())
        (tmp_path / f"t{2 * number + 8:03d}.raw").write_bytes(plane.tobytes())
    (tmp_path / "LISTE ä.raw").write_bytes(VOXELS)
    names = [f"s{number}.raw" for number in range(1, 7)] if line.startswith("LIST ") or line == "LIST" else []
    path = mha(tmp_path, f"ElementDataFile = {line}", data="".join(name + "\n" for name in names).encode(), name="a.mhd")
    assert_data(path)
    assert len(files_read(path)) == (2 if "ä" in line else 1)
    io.write_label_map(tmp_path / "labels.mhd", np.ones(SHAPE, np.uint8), io.read_volume(path))
    if "s%d" in line:
        (tmp_path / "s3.raw").write_bytes(bytes(7))
        with pytest.raises(UnsupportedFormatError, match=r"a\.mhd: ITK cannot convert this file"):
            io.read_volume(path)


@pytest.mark.parametrize("line", ["LIST 3", "s%d.raw", "s%d.raw 1 6", "s%d.raw 1 7 1", "CompressedData = True"])
def test_metaimage_files_that_itk_would_misread_are_refused(line, tmp_path):
    lines = [line, "ElementDataFile = s%d.raw 1 6 1"] if "Compressed" in line else [f"ElementDataFile = {line}"]
    with pytest.raises(UnsupportedFormatError, match=r"a\.mhd: (damaged MetaImage header: ElementDataFile|compressed voxels in several)"):
        io.read_volume(mha(tmp_path, *lines, data=b"a.raw\n", name="a.mhd"))


def test_metaimage_voxels_as_text(tmp_path):
    path = mha(tmp_path, "BinaryData = False", data=(" ".join(map(str, DATA.ravel())) + "\n").encode())
    assert_data(path)
    assert_as_simpleitk(path)


def test_metaimage_header_bytes_count_from_the_beginning_of_the_file(tmp_path):
    path = mha(tmp_path, "HeaderSize = 300", data=b"")
    path.write_bytes(path.read_bytes().ljust(300, b"x") + VOXELS)
    assert_data(path)
    assert_as_simpleitk(path)
    (tmp_path / "a.raw").write_bytes(bytes(17) + VOXELS)
    assert_data(mha(tmp_path, "HeaderSize = 17", "ElementDataFile = a.raw", data=b"", name="a.mhd"))


@pytest.mark.parametrize(("suffix", "compress"), [(".mhd", True), (".nrrd", False)])
def test_four_dimensions(suffix, compress, tmp_path):
    image = sitk.GetImageFromArray(numbers((3, 4, 5, 6)), isVector=False)
    image.SetDirection(np.block([[OBLIQUE, np.zeros((3, 1))], [np.zeros((1, 3)), np.eye(1)]]).ravel())
    image.SetSpacing((0.5, 1.25, 3.0, 2.0))
    image.SetOrigin((-7.0, 8.0, 9.5, 1.0))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"), compress)
    assert_as_simpleitk(tmp_path / f"a{suffix}")
    volume = io.read_volume(tmp_path / f"a{suffix}")
    assert volume.spacing == (0.5, 1.25, 3.0)
    io.write_label_map(tmp_path / f"labels{suffix}", np.ones((6, 5, 4), np.uint8), volume)
    np.testing.assert_array_equal(io.read_labels(tmp_path / f"labels{suffix}").affine, volume.affine)


SPACE = ["space directions: (1,0.5,0) (0,2,0) (-.5,0,3e0)", "space origin: (7,-8,9)"]


@pytest.mark.parametrize(
    "lines",
    [
        ("spacings: 0.5 1.5 2",),
        ("spacings: -0.5 1.5 2", "axis mins: 10 20 30"),
        ("axis mins: 10 20 30", "axismaxs: 12 26 42"),
        ("spacings: 1 2 3", "axis mins: 10 20 30", "centers: node cell node"),
        ("space: left-posterior-superior", *SPACE),
        ("space: right-anterior-superior", *SPACE),
        ("space: left-anterior-superior", *SPACE),
        ("space: LPS", *SPACE, 'space units: "mm" "mm" "mm"', "measurement frame: (1,0,0) (0,1,0) (0,0,1)"),
        ("space: RAS", *SPACE, "kinds: domain space domain"),
        ("space: LAS", *SPACE, "kinds: ??? domain none"),
        ("space: scanner-xyz", *SPACE),
        ("space: 3D-left-handed", *SPACE),
        ("space dimension: 3", *SPACE),
        ("space: RAS", "space origin: (1,2,3)"),
        ("space: LAS", "space origin: (1,2,3)"),
        ("space: LPS", "space directions: ( 1 , 0 , 0 )  (0,2,0)\t(0,0,3)", "space origin: (nan,nan,nan)"),
        ("SPACINGS: 1 2 3", "# a comment: with a colon", "key:=value: with one", 'labels: "x: a" "y" "z"'),
        ("content: anything: at all", "number: 120", "old min: 3", "oldmax: 4"),
    ],
    ids=lambda lines: lines[0],
)
def test_nrrd_headers_mean_what_simpleitk_says(lines, tmp_path):
    assert_as_simpleitk(nrrd(tmp_path, *lines))
    assert_as_simpleitk(nrrd(tmp_path, *lines, end="\r\n"))


def test_nrrd_names_of_types_and_order_of_bytes(tmp_path):
    for alias in ("short int", "signed short", "signed short int", "int16", "int16_t", "SHORT"):
        assert_as_simpleitk(nrrd(tmp_path, first=[NRRD[0], f"type: {alias}", *NRRD[2:]]))
    path = nrrd(tmp_path, data=DATA.astype(">i2").tobytes(), first=[*NRRD[:-1], "endian: big"])
    assert_data(path)
    assert_as_simpleitk(path)


@pytest.mark.parametrize(
    ("lines", "data"),
    [
        (["encoding: gz"], gzip.compress(VOXELS)),
        (["encoding: gzip", "byte skip: 5"], gzip.compress(b"abcde" + VOXELS)),
        (["encoding: gzip", "line skip: 2", "byte skip: 3"], b"ab\ncde\n" + gzip.compress(b"xyz" + VOXELS)),
        (["encoding: raw", "byte skip: 5"], b"abcde" + VOXELS),
        (["encoding: raw", "byteskip: -1"], b"abcde" + VOXELS),
        (["encoding: raw", "lineskip: 2", "byte skip: 3"], b"ab\ncde\nxyz" + VOXELS),
        (["encoding: hex"], VOXELS.hex(" ", 7).encode()),
        (["encoding: ascii"], "\n".join(map(str, DATA.ravel())).encode()),
        (["encoding: txt", "line skip: 1"], b"1 2 3\n" + ", ".join(map(str, DATA.ravel())).encode()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nrrd_encodings(lines, data, tmp_path):
    for path in (nrrd(tmp_path, *lines, data=data), nrrd(tmp_path, *lines, "data file: a.bin", data=b"", name="a.nhdr")):
        (tmp_path / "a.bin").write_bytes(data)
        assert_data(path)
        assert_as_simpleitk(path)


@pytest.mark.parametrize("line", ["LIST", "LIST 2", "s%d.raw 1 6 1", "s%01d.raw 1 6 1 2", "s%d.raw 6 1 -1", "./all.raw"])
def test_nrrd_voxels_in_files_of_their_own(line, tmp_path):
    for number, plane in enumerate(DATA, 1):
        (tmp_path / f"s{7 - number if '-1' in line else number}.raw").write_bytes(plane.tobytes())
    (tmp_path / "all.raw").write_bytes(VOXELS)
    names = [f"s{number}.raw" for number in range(1, 7)] if "LIST" in line else []
    path = nrrd(tmp_path, "encoding: raw", f"data file: {line}", data=b"", name="a.nhdr")
    path.write_bytes(path.read_bytes().rstrip(b"\n") + b"\n" + "".join(name + "\n" for name in names).encode())
    assert_data(path)
    assert_as_simpleitk(path)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_nrrd_channels_on_any_axis(axis, tmp_path):
    channels = numbers((3, 6, 5, 4), dtype=np.int16)  # channel, z, y, x
    sizes, kinds, directions = [4, 5, 6], ["domain"] * 3, ["(1,0,0)", "(0,2,0)", "(0,0,3)"]
    sizes.insert(axis, 3)
    kinds.insert(axis, "list")
    directions.insert(axis, "none")
    first = ["NRRD0005", "type: short", "dimension: 4", f"sizes: {' '.join(map(str, sizes))}", "endian: little"]
    lines = ["space: LPS", f"space directions: {' '.join(directions)}", "space origin: (1,2,3)"]
    data = np.moveaxis(channels, 0, 3 - axis).tobytes()
    for kinds_line in ([f"kinds: {' '.join(kinds)}"], []):
        path = nrrd(tmp_path, *lines, *kinds_line, first=first, data=data)
        volume = io.read_volume(path)
        np.testing.assert_array_equal(volume.data, channels.transpose(0, 3, 2, 1))
        np.testing.assert_array_equal(volume.affine, affine_of((-1, -2, 3), (-1, -2, 3), np.eye(3)))
        if kinds_line:
            assert_as_simpleitk(path)


def test_a_label_map_stays_in_the_world_of_its_image(tmp_path):
    space = "left-anterior-superior"
    like = io.read_volume(nrrd(tmp_path, f"space: {space}", "space directions: (1,0,0) (0,2,0) (0,0,3)", "space origin: (7,-8,9)"))
    io.write_label_map(tmp_path / "labels.nrrd", np.ones(SHAPE, np.uint8), like)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "labels.nrrd").affine, like.affine)
    assert f"space: {space}\n".encode() in (tmp_path / "labels.nrrd").read_bytes()


def test_a_header_of_any_length_is_read_to_its_end(tmp_path):
    """Segmentations of many segments have long headers; the text beyond 64 KiB was once read as voxels."""
    lines = [f"Segment{number}_Name:=a name of a segment that makes the header long {'x' * 50}" for number in range(700)]
    path = nrrd(tmp_path, "space: LPS", *SPACE, *lines)
    assert_data(path)
    assert_as_simpleitk(path)
    assert_data(nrrd(tmp_path, "note:=" + "x" * (1 << 20)))
    assert_data(mha(tmp_path, "Comment = " + "x" * (1 << 20)))


def test_remarks_are_not_handed_on(tmp_path):
    """Only what places the grid is copied to what is written, and only as text that any reader takes."""
    remarks = [
        "AnatomicalOrientation = R\x1b[2JAI",
        "DistanceUnits = " + "m" * 5000,
        "CenterOfRotation = 1 2 %s",
        "ElementSpacing = 1.000000e+000 1.5 2",
    ]
    volume = io.read_volume(mha(tmp_path, *remarks))
    assert volume.header.orientation == "LPS"
    io.write_label_map(tmp_path / "out.mha", np.ones(SHAPE, np.uint8), volume)
    text = (tmp_path / "out.mha").read_bytes().split(b"LOCAL")[0]
    assert b"ElementSpacing = 1.000000e+000 1.5 2\n" in text
    for key in (b"AnatomicalOrientation", b"DistanceUnits", b"CenterOfRotation"):
        assert key not in text


@pytest.mark.data
@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real cases: CRFREFINE_DATA is not set")
def test_real_files_mean_what_simpleitk_says():
    paths = sorted(path for path in REAL.glob("hippocampus_mhd/*/*") if path.suffix in (".mhd", ".mha"))
    assert len(paths) == 15
    for path in [*paths, REAL / "mhd_vtk" / "HeadMRVolume.mhd"]:
        assert_as_simpleitk(path)


@pytest.mark.parametrize("name", ["../other/a.raw", "{absolute}"])
def test_voxels_outside_of_the_folder_may_be_forbidden(name, tmp_path, monkeypatch):
    for folder in ("here", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "other" / "a.raw").write_bytes(VOXELS)
    line = f"ElementDataFile = {name.format(absolute=tmp_path / 'other' / 'a.raw')}"
    path = mha(tmp_path / "here", line, data=b"", name="a.mhd")
    assert_data(path)
    assert_as_simpleitk(path)
    monkeypatch.setenv("CRFREFINE_OUTSIDE_FILES", "refuse")
    with pytest.raises(InputError, match=r"here/a\.mhd: its voxels are in .*, outside its folder, and CRFREFINE_OUTSIDE_FILES"):
        io.read_header(path)
    (tmp_path / "here" / "a.raw").write_bytes(VOXELS)
    assert_data(mha(tmp_path / "here", "ElementDataFile = ./a.raw", data=b"", name="a.mhd"))
    monkeypatch.setenv("CRFREFINE_OUTSIDE_FILES", "sometimes")
    with pytest.raises(CrfRefineError, match="expected allow or refuse, found 'sometimes'"):
        io.read_header(path)
