"""MetaImage and NRRD against SimpleITK: one volume, told in many ways, and what one program writes
the other reads.
"""

import gzip
import zlib

import nibabel as nib
import nrrd as pynrrd
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from cli_helpers import infer, run_here, write_folders
from data_sets import found_cases
from io_helpers import OBLIQUE, affine_of, itk_affine, itk_array, numbers, save_itk

from crfrefine import io
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io import read_header, write_label_map
from crfrefine.io.paths import files_read
from crfrefine.io.volume import Segment, header_of_grid

SHAPE = (4, 5, 6)
DATA = numbers(SHAPE[::-1], dtype=np.int16)  # in the order of files, x fastest
VOXELS = DATA.tobytes()
META = ["NDims = 3", "DimSize = 4 5 6", "ElementType = MET_SHORT"]
NRRD = ["NRRD0004", "type: short", "dimension: 3", "sizes: 4 5 6", "endian: little"]
SUFFIXES = [".mhd", ".mha", ".nrrd", ".nhdr"]
TYPES = [
    np.int8,
    np.uint8,
    np.int16,
    np.uint16,
    np.int32,
    np.uint32,
    np.int64,
    np.uint64,
    np.float32,
    np.float64,
]


def mha(folder, *lines, data=VOXELS, name="a.mha", end="\n"):
    text = end.join(
        [
            *META,
            *lines,
            *(
                []
                if any("ElementDataFile" in line for line in lines)
                else ["ElementDataFile = LOCAL"]
            ),
            "",
        ]
    )
    (folder / name).write_bytes(text.encode() + data)
    return folder / name


def nrrd(folder, *lines, data=VOXELS, name="a.nrrd", end="\n", first=NRRD):
    if not any(line.startswith("encoding") for line in lines):
        lines = ("encoding: raw", *lines)
    (folder / name).write_bytes(end.join([*first, *lines, "", ""]).encode() + data)
    return folder / name


def assert_as_simpleitk(path, stored=None):
    ours = io.read_volume(path)
    itks = sitk.ReadImage(str(path))
    data = itk_array(itks).astype(np.float32)
    if itks.GetDimension() == 4:
        data = np.moveaxis(data, -1, 0)
    np.testing.assert_array_equal(ours.data, data)
    np.testing.assert_array_equal(ours.affine, itk_affine(itks))
    if stored is not None:
        np.testing.assert_array_equal(ours.data, stored.transpose())


def assert_data(path):
    np.testing.assert_array_equal(io.read_volume(path).data, DATA.transpose())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("compress", "channels", "shape"), [(True, 3, (4, 5)), (True, 0, SHAPE), (False, 3, SHAPE)]
)
def test_all_pixel_types_that_simpleitk_writes(suffix, compress, channels, shape, tmp_path):
    direction = OBLIQUE if len(shape) == 3 else np.array([[0.8, -0.6], [0.6, 0.8]])
    for dtype in TYPES:
        values = numbers((channels, *shape) if channels else shape, dtype=np.int64)
        data = (values % 100).astype(dtype)
        path = save_itk(
            tmp_path / f"a{suffix}",
            data,
            channels=bool(channels),
            compress=compress,
            direction=direction,
        )
        assert_as_simpleitk(path)
        assert io.read_header(path).dtype == np.dtype(dtype).name


SPACE = ["space directions: (1,0.5,0) (0,2,0) (-.5,0,3e0)", "space origin: (7,-8,9)"]
# What a header says in further lines.
MEANINGS = {
    mha: [
        ("ElementSpacing = 5.0e-01 1.5 2",),
        ("ElementSize = 0.7 1.5 2",),
        ("ElementSpacing = -1 1.5 2",),
        ("ElementSpacing = 1 1.5 2 3", "Offset = 1 2 3 4"),
        ("Offset = 1 2 3", "CenterOfRotation = 7 8 9", "AnatomicalOrientation = LPI"),
        ("Origin = 1e1 -2 .5",),
        ("TransformMatrix = 0 1 0 -1 0 0 0 0 1", "ElementSpacing = 1 1.5 2"),
        ("Orientation = 0.8 0.6 0 -0.6 0.8 0 0 0 -1", "Offset = 1 2 3"),
        ("TransformMatrix = 1 0.5 0 0 1 0 0 0 1", "ElementSpacing = 1 1.5 2"),
        ("  ElementSpacing=1   1.5\t2 ", "Comment = a = b : c"),
        ("ElementSpacing : 1 1.5 2",),
        ("ElementByteOrderMSB = True",),
        ("BinaryDataByteOrderMSB = true", "ElementNumberOfChannels = 1"),
        ("HeaderSize = -1",),
    ],
    nrrd: [
        ("spacings: 0.5 1.5 2",),
        ("axis mins: 10 20 30", "axismaxs: 12 26 42"),
        ("space: scanner-xyz", *SPACE),
        ("space: RAS", "space origin: (1,2,3)"),
        ("space: left-posterior-superior", *SPACE),
        ("space: right-anterior-superior", *SPACE),
        ("space: left-anterior-superior", *SPACE),
        (
            "space: LPS",
            *SPACE,
            'space units: "mm" "mm" "mm"',
            "measurement frame: (1,0,0) (0,1,0) (0,0,1)",
        ),
        ("space: RAS", *SPACE, "kinds: domain space domain"),
        ("space: LAS", *SPACE, "kinds: ??? domain none"),
        ("space dimension: 3", *SPACE),
        (
            "space: LPS",
            "space directions: ( 1 , 0 , 0 )  (0,2,0)\t(0,0,3)",
            "space origin: (1,2,3)",
        ),
        (
            "SPACINGS: 1 2 3",
            "# a comment: with a colon",
            "key:=value: with one",
            'labels: "x: a" "y" "z"',
        ),
        ("content: anything: at all", "number: 120", "old min: 3", "oldmax: 4"),
    ],
}


@pytest.mark.parametrize(
    ("make", "lines"), [(make, lines) for make in MEANINGS for lines in MEANINGS[make]]
)
def test_headers_mean_what_simpleitk_says(make, lines, tmp_path):
    assert_as_simpleitk(make(tmp_path, *lines))
    assert_as_simpleitk(make(tmp_path, *lines, end="\r\n"))


def test_a_field_without_a_value_is_no_damage_if_nothing_needs_it(tmp_path):
    assert_data(nrrd(tmp_path, "content"))
    with pytest.raises(UnsupportedFormatError, match="is not a `field: value`"):
        io.read_header(nrrd(tmp_path, "contents"))


APART = {
    "HeaderSize = 17\nElementDataFile = ä.raw": bytes(17) + VOXELS,
    "HeaderSize = -1\nElementDataFile = ä.raw": bytes(17) + VOXELS,
    "data file: ./ä.raw": VOXELS,
    "encoding: gz\ndata file: ä.raw": gzip.compress(VOXELS),
    "encoding: gzip\nbyte skip: 3\ndata file: ä.raw": gzip.compress(b"xyz" + VOXELS),
    "encoding: raw\nbyteskip: -1\ndatafile: ä.raw": b"abcde" + VOXELS,
    "encoding: raw\nbyte skip: 3\ndatafile: ä.raw": b"abc" + VOXELS + b"de",
}


@pytest.mark.parametrize(("lines", "data"), APART.items(), ids=APART)
def test_voxels_in_another_file(lines, data, tmp_path):
    (tmp_path / "ä.raw").write_bytes(data)
    if "Element" in lines:
        path = mha(tmp_path, *lines.split("\n"), data=b"", name="a.mhd")
    else:
        path = nrrd(tmp_path, *lines.split("\n"), data=b"", name="a.nhdr")
    assert files_read(path) == (path, tmp_path / "ä.raw")
    assert_as_simpleitk(path, DATA)


NAMES = b"".join(b"s%d.raw\n" % number for number in range(1, 7))
TEXT = "\n".join(map(str, DATA.ravel())).encode()
# What a header says of voxels that SimpleITK reads, and the bytes behind it.
RARE = {
    **{f"ElementDataFile = {line}": b"" for line in ("s%d.raw 1 6 1", "t%03d.raw 10 20 2")},
    **{f"ElementDataFile = {line}": NAMES for line in ("LIST", "LIST 2D")},
    "BinaryData = False": TEXT + b"\n",
    **{f"data file: {line}": b"" for line in ("s%d.raw 1 6 1", "s%01d.raw 1 6 1 2")},
    **{f"data file: {line}": NAMES for line in ("LIST", "LIST 2")},
    "encoding: gzip\nline skip: 2\nbyte skip: 3": b"ab\ncde\n" + gzip.compress(b"xyz" + VOXELS),
    "encoding: raw\nlineskip: 2\nbyte skip: 3": b"ab\ncde\nxyz" + VOXELS,
    "encoding: hex": VOXELS.hex(" ", 7).encode(),
    "encoding: ascii": TEXT,
}


@pytest.fixture
def planes(tmp_path):
    """Files of a plane each."""
    for number, plane in enumerate(DATA, 1):
        for name in (f"s{number}", f"t{2 * number + 8:03d}"):
            (tmp_path / f"{name}.raw").write_bytes(plane.tobytes())
    return tmp_path


@pytest.mark.parametrize(("lines", "data"), RARE.items(), ids=RARE)
def test_voxels_in_rare_places_are_read_through_simpleitk(lines, data, planes):
    is_meta = " = " in lines
    if is_meta:
        name = "a.mha" if "Binary" in lines else "a.mhd"
        path = mha(planes, *lines.split("\n"), data=b"", name=name)
    else:
        path = nrrd(planes, *lines.split("\n"), data=b"", name="a.nhdr")
    start = path.read_bytes()
    if "LIST" in lines:
        start = start.rstrip(b"\n") + b"\n"
    path.write_bytes(start + data)
    assert_data(path)
    assert str(io.read_header(path).notes[0]).startswith("read through SimpleITK: its header has ")
    if not is_meta:
        assert_as_simpleitk(path, DATA)


@pytest.mark.parametrize("name", ["a.mhd", "a.mha", "a.nhdr", "a.nrrd"])
@pytest.mark.parametrize("place", ["s%d.raw 1 6 1", "s%d.raw 6 1 -1", "LIST", "text"])
def test_the_files_of_a_rare_header_are_known(name, place, planes):
    """They are inputs that no output may replace, and what they hold is compared."""
    is_meta = name.startswith("a.m")
    if is_meta and (place.endswith("-1") or place == "text"):
        pytest.skip("MetaImage counts upward, and has text in its own file")
    files = [planes / f"s{number}.raw" for number in range(1, 7)]
    lines = [f"data file: {place}"]
    if is_meta:
        lines = [f"ElementDataFile = {place}"]
    if place == "text":
        files = [planes / "text"]
        files[0].write_bytes(TEXT)
        lines.insert(0, "encoding: ascii")
    elif place.endswith("-1"):
        files.reverse()
    write = mha if is_meta else nrrd
    path = write(planes, *lines, data=b"", name=name)
    if place == "LIST":
        names = "\n".join(file.name for file in files)
        path.write_bytes(path.read_bytes().rstrip(b"\n") + f"\n{names}\n".encode())
    assert files_read(path) == (path, *files)
    header = io.read_header(path)
    assert header.voxel_files == tuple(files)
    assert [*header.states] == [path, *files]
    files[0].write_bytes(files[0].read_bytes() + b" ")
    with pytest.raises(CrfRefineError, match="changed"):
        list(io.read_pieces(header))


def test_a_header_of_any_length_is_read_to_its_end(tmp_path):
    """Segmentations of many segments have long headers; the text beyond 64 KiB was once read as
    voxels.
    """
    lines = [
        f"Segment{number}_Name:=a name of a segment that makes the header long {'x' * 50}"
        for number in range(700)
    ]
    path = nrrd(tmp_path, "space: LPS", *SPACE, *lines)
    assert_as_simpleitk(path, DATA)
    assert_data(nrrd(tmp_path, "note:=" + "x" * (1 << 20)))
    assert_data(mha(tmp_path, "Comment = " + "x" * (1 << 20)))


@pytest.mark.parametrize("name", ["../other/a.raw", "{absolute}"])
def test_voxels_outside_of_the_folder_may_be_forbidden(name, tmp_path, monkeypatch):
    here = tmp_path / "here"
    voxels = tmp_path / "other" / "a.raw"
    here.mkdir()
    voxels.parent.mkdir()
    for path in (voxels, here / "a.raw"):
        path.write_bytes(VOXELS)
    path = mha(here, f"ElementDataFile = {name.format(absolute=voxels)}", data=b"", name="a.mhd")
    assert_as_simpleitk(path, DATA)
    for value, message in (
        (
            "refuse",
            r"here/a\.mhd: its voxels are in .*, outside its folder, and CRFREFINE_OUTSIDE_FILES",
        ),
        ("sometimes", "expected allow or refuse, found 'sometimes'"),
    ):
        monkeypatch.setenv("CRFREFINE_OUTSIDE_FILES", value)
        with pytest.raises(CrfRefineError, match=message):
            io.read_header(path)
    monkeypatch.setenv("CRFREFINE_OUTSIDE_FILES", "refuse")
    assert_data(mha(here, "ElementDataFile = ./a.raw", data=b"", name="a.mhd"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_geometry_is_kept_to_the_last_bit(suffix, tmp_path):
    image = save_itk(
        tmp_path / f"image{suffix}",
        DATA.T,
        direction=OBLIQUE,
        spacing=(0.1, 1 / 3, 2.123456789012345),
    )
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / f"image{suffix}"
    io.write_label_map(out, np.ones(SHAPE, np.uint8), io.read_header(image))
    before = sitk.ReadImage(str(image))
    after = sitk.ReadImage(str(out))
    for get in (sitk.Image.GetOrigin, sitk.Image.GetSpacing, sitk.Image.GetDirection):
        assert get(before) == get(after)
    names = {".mhd": {"image.mhd", "image.zraw"}, ".nhdr": {"image.nhdr", "image.raw.gz"}}
    assert {path.name for path in out.parent.iterdir()} == names.get(suffix, {f"image{suffix}"})
    io.write_label_map(tmp_path / "back.nii.gz", np.ones(SHAPE, np.uint8), io.read_header(out))
    np.testing.assert_allclose(
        nib.load(tmp_path / "back.nii.gz").affine, itk_affine(before), atol=1e-5
    )  # float32 in NIfTI


@pytest.mark.parametrize(
    ("suffix", "shape"),
    [(".mhd", (4, 5)), (".mha", (4, 5, 6)), (".nrrd", (4, 5)), (".nhdr", (4, 5, 6))],
)
def test_channels_written_are_read_by_simpleitk(suffix, shape, tmp_path):
    logits = numbers((3, *shape)) - 30.5
    like = io.read_header(save_itk(tmp_path / f"image{suffix}", numbers(shape)))
    io.write_channels(tmp_path / f"logits{suffix}", logits, like)
    itks = sitk.ReadImage(str(tmp_path / f"logits{suffix}"))
    np.testing.assert_array_equal(itk_array(itks), logits)
    np.testing.assert_array_equal(itk_affine(itks), like.affine)
    read = io.read_logits([tmp_path / f"logits{suffix}"])
    np.testing.assert_array_equal(read, logits)
    np.testing.assert_array_equal(io.read_header(tmp_path / f"logits{suffix}").affine, like.affine)
    assert read.strides[1] == 4, "x is the fastest axis"


def test_a_wrong_promise_of_compressed_bytes(tmp_path):
    """Too few bytes promised are not believed: SimpleITK leaves the last voxels at zero without a
    word.
    """
    for voxels in (VOXELS, VOXELS[:120]):
        packed = zlib.compress(voxels)
        (tmp_path / "a.zraw").write_bytes(packed)
        lines = (
            "CompressedData = True",
            f"CompressedDataSize = {len(packed) - 30}",
            "ElementDataFile = a.zraw",
        )
        path = mha(tmp_path, *lines, data=b"", name="a.mhd")
        if voxels is VOXELS:
            assert_data(path)
    with pytest.raises(
        UnsupportedFormatError,
        match=r"a\.zraw: the file is cut off: its header promises 240 bytes .*, it holds 120",
    ):
        io.read_volume(path)


SLICER = affine_of((0.7, 1.1, 2.5), (10.0, -20.0, 30.0), OBLIQUE)
LABELS = np.array((0, 2, 7, 300))[numbers((5, 6, 7), dtype=np.int64) % 4]


def slicer(path, array):
    """Write a file as Slicer does, (x, y, z) or (layer, x, y, z), by pynrrd."""
    lps = np.diag([-1, -1, 1, 1]) @ SLICER
    header = {
        "space": "left-posterior-superior",
        "space origin": lps[:3, 3],
        "space directions": [*np.full((array.ndim - 3, 3), np.nan), *lps[:3, :3].T],
        "kinds": ["list"] * (array.ndim - 3) + ["domain"] * 3,
        "encoding": "gzip",
        **{
            "Segment0_Name": "one",
            "Segment0_LabelValue": "2",
            "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        },
    }
    pynrrd.write(str(path), array, header)
    return path


def test_one_layer_is_a_label_map_and_several_are_an_error_and_neither_is_a_case(tmp_path):
    path = slicer(tmp_path / "a.seg.nrrd", LABELS.astype(np.int16))
    read = io.read_labels(path)
    np.testing.assert_array_equal(read.data, LABELS)
    np.testing.assert_allclose(read.affine, SLICER, atol=1e-6)
    slicer(path, np.zeros((2, *LABELS.shape), np.uint8))
    with pytest.raises(
        UnsupportedFormatError,
        match=r"a\.seg\.nrrd: the segments are in 2 layers.*\n.*convert a\.seg\.nrrd FOLDER",
    ):
        io.read_labels(path)
    # Slicer saves image and segmentation side by side, under one name.
    path = tmp_path / "case.seg.nrrd"
    like = save_itk(
        tmp_path / "case.nrrd", numbers(LABELS.shape), spacing=(0.7, 1.1, 2.5), direction=OBLIQUE
    )
    io.write_label_map(path, LABELS, io.read_header(like))
    np.testing.assert_array_equal(pynrrd.read(str(path))[0], LABELS)
    np.testing.assert_array_equal(io.read_labels(path).data, LABELS)
    np.testing.assert_allclose(
        itk_affine(sitk.ReadImage(str(path))), itk_affine(sitk.ReadImage(str(like))), atol=1e-12
    )
    assert [case.images for case in found_cases(tmp_path, None)] == [(tmp_path / "case.nrrd",)]


MICRONS = ["microns", "um", "µm", "μm", "Micrometers"]
UNITS = {
    **{f'space: RAS|space units: "{name}" "{name}" "{name}"'.encode(): 1e-3 for name in MICRONS},
    'space: RAS|space units: "µm" "µm" "µm"'.encode("latin-1"): 1e-3,
    b'space dimension: 3|space units: "micron" "micron" "micron"': 1e-3,
    b'space: LPS|space units: "nm" "nm" "nm"': 1e-6,
    b'space: LPS|space units: "inches" "inches" "inches"': 25.4,
    b'space: LPS|space units: "cm" "cm" "cm"': 10.0,
    b'space: LPS|space units: "m" "m" "m"': 1e3,
    b'space: LPS|space units: "mm" "mm" "mm"': 1.0,
    b'space: LPS|space units: "" "" ""': 1.0,
}


@pytest.mark.parametrize(("lines", "mm"), UNITS.items())
def test_lengths_of_nrrd_in_other_units_are_converted_to_mm(lines, mm, tmp_path):
    """What is written in the format keeps the unit, so that programs that ignore it see one place;
    other formats get mm.
    """
    path = tmp_path / "a.nrrd"
    head = "\n".join([*NRRD, "encoding: raw", ""]).encode() + lines.replace(b"|", b"\n")
    path.write_bytes("\n".join(["", *SPACE, "", ""]).encode().join([head, VOXELS]))
    ours = io.read_volume(path)
    expected = np.diag([mm, mm, mm, 1.0]) @ itk_affine(sitk.ReadImage(str(path)))
    np.testing.assert_allclose(ours.affine, expected, rtol=1e-14)
    np.testing.assert_allclose(ours.spacing, np.linalg.norm(expected[:3, :3], axis=0), rtol=1e-14)
    assert bool(ours.header.details) == (mm != 1.0)
    labels = (DATA % 3).astype(np.uint8).T
    for name in ("b.nrrd", "b.nhdr", "b.nii.gz"):
        io.write_label_map(tmp_path / name, labels, ours.header)
        back = io.read_volume(tmp_path / name)
        np.testing.assert_allclose(back.affine, ours.affine, rtol=1e-6)
        assert back.header.on_same_grid(ours.header)
        if name != "b.nii.gz":
            itks = sitk.ReadImage(str(tmp_path / name))
            np.testing.assert_allclose(
                itk_affine(itks), itk_affine(sitk.ReadImage(str(path))), rtol=1e-14
            )
            assert pynrrd.read_header(str(tmp_path / name))["space units"] if mm != 1.0 else True


def test_spacings_without_a_world_have_units_too(tmp_path):
    path = nrrd(tmp_path, "spacings: .38 .5 2", 'units: "um" "um" "mm"')
    np.testing.assert_allclose(io.read_volume(path).spacing, (0.38e-3, 0.5e-3, 2.0))
    io.write_channels(tmp_path / "b.nrrd", np.zeros((2, 4, 5, 6)), io.read_header(path))
    np.testing.assert_allclose(io.read_volume(tmp_path / "b.nrrd").spacing, (0.38e-3, 0.5e-3, 2.0))


def test_a_vector_image_and_a_plane_have_units_too(tmp_path):
    first = ["NRRD0004", "type: short", "dimension: 4", "sizes: 2 4 5 3", "endian: little"]
    first += ["space: LPS", "kinds: vector domain domain domain", "space origin: (1,2,3)"]
    first += ["space directions: none (.38,0,0) (0,.5,0) (0,0,2)", 'space units: "um" "um" "um"']
    stack = io.read_volume(nrrd(tmp_path, first=first))
    np.testing.assert_allclose(stack.spacing, (0.38e-3, 0.5e-3, 2e-3))
    io.write_channels(tmp_path / "b.nrrd", stack.data, stack.header)
    np.testing.assert_allclose(io.read_volume(tmp_path / "b.nrrd").affine, stack.affine)
    first = ["NRRD0004", "type: short", "dimension: 2", "sizes: 10 12", "endian: little"]
    plane = io.read_volume(nrrd(tmp_path, "spacings: 3 4", 'units: "um" "um"', first=first))
    np.testing.assert_allclose(plane.spacing, (3e-3, 4e-3))
    io.write_label_map(tmp_path / "c.nrrd", np.ones((10, 12), np.uint8), plane.header)
    assert sitk.ReadImage(str(tmp_path / "c.nrrd")).GetSpacing() == (3.0, 4.0)
    np.testing.assert_allclose(io.read_volume(tmp_path / "c.nrrd").affine, plane.affine)


def test_units_that_are_not_known_are_named(tmp_path):
    lines = ("space: LPS", *SPACE, 'space units: "furlong" "furlong" "mm"')
    (note,) = map(str, io.read_header(nrrd(tmp_path, *lines)).notes)
    assert "furlong, mm, which are not known; mm is assumed" in note
    assert_as_simpleitk(nrrd(tmp_path, *lines))


def test_an_axis_without_a_unit_is_in_mm_like_the_others(tmp_path):
    lines = ("space: LPS", *SPACE)
    assert io.read_header(nrrd(tmp_path, *lines, 'space units: "" "mm" "mm"')).notes == ()
    header = io.read_header(nrrd(tmp_path, *lines, 'space units: "um" "um" ""'))
    (note,) = map(str, header.notes)
    assert "um, none, which are not known; mm is assumed" in note
    assert header.spacing == io.read_header(nrrd(tmp_path, *lines)).spacing


def test_lengths_of_metaimage_in_other_units_are_converted_to_mm(tmp_path):
    lines = ("DistanceUnits = um", "ElementSpacing = .38 .5 2", "Offset = 100 200 300")
    ours = io.read_volume(mha(tmp_path, *lines))
    itks = sitk.ReadImage(str(tmp_path / "a.mha"))
    assert itks.GetMetaData("ITK_VoxelUnits") == "um", "ITK names the unit and does not convert"
    np.testing.assert_allclose(ours.spacing, (0.38e-3, 0.5e-3, 2e-3))
    np.testing.assert_allclose(ours.affine[:3, 3], (-0.1, -0.2, 0.3))
    io.write_label_map(tmp_path / "b.mha", (DATA % 3).T, ours.header)
    np.testing.assert_array_equal(io.read_volume(tmp_path / "b.mha").affine, ours.affine)
    assert sitk.ReadImage(str(tmp_path / "b.mha")).GetSpacing() == itks.GetSpacing()


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (nrrd, ["axis mins: 0 0 0", "spacings: 1 2 3", 'units: "um" "um" "um"']),
        (nrrd, ["space: scanner-xyz", *SPACE, 'space units: "cm" "cm" "cm"']),
        (mha, ["BinaryData = False", "DistanceUnits = cm"]),
    ],
)
def test_a_rare_header_in_other_units_is_refused(make, lines, tmp_path):
    with pytest.raises(UnsupportedFormatError, match=r"lengths in [uc]m; .*in mm alone"):
        io.read_header(make(tmp_path, *lines, data=TEXT))


def test_a_segmentation_of_slicer_keeps_names_and_colors(tmp_path):
    labels = np.zeros((7, 5, 4), np.uint8)
    labels[1:4, 2:4, 1:3] = 2
    labels[5, 1, 1] = 7
    like = header_of_grid(labels.shape, np.diag([1.0, 1.5, 2.5, 1.0]))
    segments = (Segment(2, "Leber, links", (0.25, 0.5, 1.0)), Segment(7, "Gef\u00e4\u00df"))
    path = tmp_path / "a.seg.nrrd"
    write_label_map(path, labels, like, segments=segments)
    found = read_header(path).segments
    assert [(each.label, each.name) for each in found] == [
        (2, "Leber, links"),
        (7, "Gef\u00e4\u00df"),
    ]
    assert found[0].color == (0.25, 0.5, 1.0)
    image = sitk.ReadImage(str(path))
    assert image.GetMetaData("Segment0_Name") == "Leber, links"
    assert image.GetMetaData("Segment1_LabelValue") == "7"
    assert image.GetMetaData("Segment0_Extent") == "0 6 0 4 0 3"
    assert np.array_equal(sitk.GetArrayFromImage(image).T, labels)
    write_label_map(tmp_path / "a.nrrd", labels, like, segments=segments)
    assert read_header(tmp_path / "a.nrrd").segments == ()


def test_wrong_entries_of_segments_are_left_out(tmp_path):
    labels = np.ones((3, 4, 2), np.uint8)
    like = header_of_grid(labels.shape, np.diag([1.0, 1.5, 2.5, 1.0]))
    path = tmp_path / "a.seg.nrrd"
    write_label_map(path, labels, like, segments=(Segment(1, "liver"),))
    content = path.read_bytes()
    for old, new, expected in (
        (b"LabelValue:=1", b"LabelValue:=0", []),
        (b"LabelValue:=1", b"LabelValue:=one", []),
        (b"LabelValue:=1", b"LabelValue:=99999", []),
        (b"Segment0_Name:=liver", b"Segment0_Name:=", []),
        (b"Segment0_Color:=", b"Segment0_Color:=7 ", [Segment(1, "liver")]),
    ):
        path.write_bytes(content.replace(old, new))
        assert list(read_header(path).segments) == expected


NAMES = (
    *("EF 55%", "run %03d", "100%%", "LIST", "List of cases", " lead", "a\nb", "\ta", "a\rb"),
    *("a:b", "a\\b", "~a", "\x0bb", "plain", "a  b", "a#b", "LOCAL", "a=b", 'a"b', "Gefäß", "-a"),
)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_file_is_written_if_its_header_finds_the_voxels_by_their_name(tmp_path, name, suffix):
    """Else the error names the format of one file, and nothing is left."""
    labels = (np.arange(7 * 5 * 3).reshape(7, 5, 3) % 4).astype(np.uint8)
    like = header_of_grid(labels.shape, np.diag([1.0, 1.25, 2.5, 1.0]))
    path = tmp_path / f"{name}{suffix}"
    whole = {".mhd": ".mha", ".nhdr": ".nrrd"}.get(suffix)
    refused = ""
    try:
        write_label_map(path, labels, like)
    except InputError as error:
        refused = str(error)
    if refused:
        assert whole is not None
        assert f"write one file, {whole}, or" in refused
        assert not [*tmp_path.iterdir()]
        return
    assert np.array_equal(io.read_labels(path).data, labels)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T, labels)
    is_pattern = "%" in name or name.upper().startswith("LIST")
    assert whole is None or not is_pattern


def test_such_names_are_refused_before_the_work(tmp_path):
    """Of `infer`, which writes as the image is, and of `convert`; one file is written."""
    folders = write_folders(tmp_path, "a")
    for path, target in (
        (folders.logits / "a.nii.gz", folders.logits / "EF 55%.nii.gz"),
        (folders.images / "a_0000.nii.gz", folders.images / "EF 55%_0000.nii.gz"),
        (folders.images / "a_0001.nii.gz", folders.images / "EF 55%_0001.nii.gz"),
    ):
        path.rename(target)
    for suffix, whole in ((".mhd", ".mha"), (".nhdr", ".nrrd")):
        said = infer(folders, "--output-format", suffix, status=1).stderr
        assert f"EF 55%{suffix}: cannot be written in two files" in said
        assert not [*folders.output.glob("*")]
        image = folders.images / "EF 55%_0000.nii.gz"
        said = run_here("convert", image, tmp_path / f"10%{suffix}", status=1).stderr
        assert f"write one file, {whole}, or choose another name" in said
        output = tmp_path / whole.removeprefix(".")
        infer(folders._replace(output=output), "--output-format", whole, status=0)
        assert np.any(io.read_labels(output / f"EF 55%{whole}").data)
