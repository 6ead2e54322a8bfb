"""NIfTI, against nibabel and SimpleITK: what one writes the other reads; and label maps written as
MetaImage and NRRD.
"""

import gzip
import shlex
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from hypothesis import given, settings
from hypothesis import strategies as st
from io_helpers import (
    OBLIQUE,
    affine_of,
    affines,
    grid_shapes,
    itk_affine,
    itk_array,
    numbers,
    peak_memory,
    save_itk,
    save_nifti,
)

from crfrefine import io
from crfrefine.errors import CapacityError, CrfRefineError, GridMismatchError, InputError
from crfrefine.io.volume import header_of_grid

# sform and affines are float32 in the file: positions up to 500 mm keep this many millimeters.
FLOAT32_MM = 1e-4
# ITK goes through the quaternion of the qform, which costs a few more roundings of float32.
QUATERNION_MM = 1e-3
# Text headers keep all digits; direction times spacing and back costs two roundings of float64, at
# positions up to 1000 mm.
FLOAT64_MM = 1e-12


@settings(deadline=None, max_examples=60)
@given(
    shape=grid_shapes(),
    affine=affines(),
    suffix=st.sampled_from([".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr"]),
    largest=st.sampled_from([1, 255, 256, 65535]),
)
def test_nibabel_and_simpleitk_read_the_label_maps_written(shape, affine, suffix, largest):
    if len(shape) == 2:  # A plane in space is no 2-D image to ITK; it stays in the plane z = const.
        affine = affine_of((0.7, 1.3, 1.0), (5.25, -6.125, 0.0))
    labels = numbers(shape, dtype=np.int64) % (largest + 1)
    labels.flat[0] = largest
    is_nifti = suffix.startswith(".nii")
    itk_tolerance = FLOAT64_MM
    our_tolerance = FLOAT64_MM
    if is_nifti:
        itk_tolerance = QUATERNION_MM
        our_tolerance = FLOAT32_MM
    itk_type = sitk.sitkUInt8 if largest <= 255 else sitk.sitkUInt16
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case" + suffix)
        io.write_label_map(path, labels, header_of_grid(labels.shape, affine))
        itks = sitk.ReadImage(str(path))
        ours = io.read_labels(path)
        assert itks.GetPixelID() == itk_type
        np.testing.assert_array_equal(itk_array(itks), labels)
        np.testing.assert_allclose(itk_affine(itks), affine, atol=itk_tolerance)
        np.testing.assert_array_equal(ours.data, labels)
        np.testing.assert_allclose(ours.affine, affine, atol=our_tolerance)
        if is_nifti:
            nibabels = nib.load(path)
            np.testing.assert_array_equal(np.asanyarray(nibabels.dataobj), labels)
            np.testing.assert_array_equal(ours.affine, nibabels.affine)
            assert (nibabels.header["sform_code"], nibabels.header["qform_code"]) == (1, 1)
            assert nibabels.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image], ids=["nifti1", "nifti2"])
def test_both_transforms_are_kept_bit_for_bit_and_nothing_of_the_intensities(kind, tmp_path):
    """The sform (code 4, oblique) and the qform (code 2, straight) differ. A copied slope would
    make 1 come back as 3.5.
    """
    path = tmp_path / "image.nii.gz"
    out = tmp_path / "labels.nii"
    image = kind(numbers((4, 5, 6), dtype=np.int16), None)
    image.set_sform(affine_of((1.1, 0.9, 3.0), (-7.0, 11.0, 13.0), OBLIQUE), code=4)
    image.set_qform(affine_of((1.1, 0.9, 3.0), (1.0, 2.0, 3.0)), code=2)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 1000
    image.header.set_slope_inter(0.5, 3.0)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100))
    nib.save(image, path)
    voxels = list(np.ndindex(4, 5, 6))
    places = [
        nib.affines.apply_affine(form, voxels) for form in (image.get_sform(), image.get_qform())
    ]
    distance = np.linalg.norm(places[0] - places[1], axis=1).max()
    read = io.read_volume(path)
    np.testing.assert_array_equal(read.data, nib.load(path).get_fdata(dtype=np.float32))
    assert tuple(map(str, read.header.notes)) == (
        f"sform and qform differ by up to {distance:.2f} mm; the sform is used, and both are kept "
        "in output files",
    )
    io.write_label_map(out, np.ones((4, 5, 6), np.uint8), read.header)
    before = nib.load(path).header
    after = nib.load(out).header
    np.testing.assert_array_equal(read.affine, before.get_sform())
    names = ["sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "sizeof_hdr"]
    for name in [
        *names,
        "quatern_b",
        "quatern_c",
        "quatern_d",
        "qoffset_x",
        "qoffset_y",
        "qoffset_z",
    ]:
        assert before[name].tobytes() == after[name].tobytes(), name
    assert before["pixdim"][:4].tobytes() == after["pixdim"][:4].tobytes()
    size = int(after["sizeof_hdr"])
    written = type(before)(out.read_bytes()[:size])
    assert (
        written["scl_slope"],
        written["scl_inter"],
        written["cal_max"],
        written["intent_code"],
    ) == (1, 0, 0, 0)
    assert written.get_data_dtype() == np.uint8
    assert len(out.read_bytes()) == size + 4 + 120


@pytest.mark.parametrize("order", ["<", ">"])
def test_every_real_type_in_either_byte_order(order, tmp_path):
    for dtype in (
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
    ):
        data = numbers((4, 3, 5), dtype=dtype)
        header = nib.Nifti1Header(endianness=order)
        header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
        nib.save(
            nib.Nifti1Image(data, affine_of((1, 2, 3)), header, dtype=header.get_data_dtype()),
            tmp_path / "a.nii",
        )
        ours = io.read_volume(tmp_path / "a.nii")
        np.testing.assert_array_equal(ours.data, data)
        assert ours.header.dtype == np.dtype(dtype).name
    io.write_channels(
        tmp_path / "channels.nii.gz", np.stack([ours.data, ours.data + 1]), ours.header
    )
    written = nib.load(tmp_path / "channels.nii.gz")
    np.testing.assert_array_equal(written.get_fdata()[..., 1], data + 1.0)
    np.testing.assert_array_equal(written.affine, affine_of((1, 2, 3)))


@pytest.mark.parametrize(
    ("stored", "slope", "inter"),
    [
        (np.int16, 1 / 32, 0.0),
        (np.int16, 0.0100394, -3.6244),
        (np.uint8, 0.5, 1.0),
        (np.int32, 0.25, 100.0),
        (np.uint16, 1.0, -1024.0),
    ],
)
def test_scaling_is_applied_as_nibabel_does(stored, slope, inter, tmp_path):
    """To one rounding of float32; the powers of two are exact."""
    path = save_nifti(
        tmp_path / "image.nii.gz", numbers((7, 5, 6), dtype=stored), slope=slope, inter=inter
    )
    expected = np.asarray(nib.load(path).get_fdata(), np.float64)
    assert expected.max() != numbers((7, 5, 6)).max()
    np.testing.assert_allclose(io.read_volume(path).data, expected, rtol=2e-7, atol=2e-7)
    if inter == 0.0:
        np.testing.assert_array_equal(io.read_volume(path).data, expected)
    if stored == np.int32:  # A large intercept cancels no digits.
        large = save_nifti(
            tmp_path / "large.nii",
            numbers((7, 5, 6), dtype=np.int32) + (1 << 26),
            slope=1.0,
            inter=-float(1 << 26),
        )
        np.testing.assert_array_equal(io.read_volume(large).data, numbers((7, 5, 6)))


def test_vector_images_of_itk_and_4d_files_are_the_same_channels(tmp_path):
    """ITK stores (x, y, z, 1, channel), others (x, y, z, channel)."""
    channels = numbers((3, 4, 5, 6))
    vector = save_itk(tmp_path / "vector.nii.gz", channels, channels=True)
    assert nib.load(vector).shape == (4, 5, 6, 1, 3)
    for path in (vector, save_nifti(tmp_path / "plain.nii.gz", np.moveaxis(channels, 0, -1))):
        assert io.read_header(path).num_channels == 3
        read = io.read_logits([path])
        np.testing.assert_array_equal(read, channels)
        assert read.strides == (480, 4, 16, 80), (
            "x is the fastest axis: no copy is made on the way to the engine"
        )
    plane = io.read_logits([save_itk(tmp_path / "plane.nii.gz", channels[..., 0], channels=True)])
    np.testing.assert_array_equal(plane, channels[..., :1])
    labels = save_nifti(
        tmp_path / "labels.nii", numbers((4, 5, 6), dtype=np.uint8)[..., None, None] % 3
    )
    assert io.read_labels(labels).data.shape == (4, 5, 6)


def test_bytes_do_not_depend_on_time_threads_or_memory_order(tmp_path):
    """2 MB: several blocks of compression."""
    labels = np.asarray(numbers((110, 100, 90), dtype=np.uint16) % 999, order="F")
    path = tmp_path / "a.nii.gz"
    written = set()
    for values, threads in ((labels, 1), (labels, 3), (np.ascontiguousarray(labels), 1)):
        io.write_label_map(
            path, values, header_of_grid(labels.shape, affine_of((1, 2, 3))), threads=threads
        )
        written.add(path.read_bytes())
    assert len(written) == 1
    assert written.pop()[4:8] == bytes(4), "the time in the gzip header"
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), labels)


def test_labels_that_a_label_map_cannot_hold_are_not_written(tmp_path):
    labels = np.full((2, 3, 4), 65536, np.int32)
    for values, error, message in (
        (labels, CapacityError, "label 65536 does not fit"),
        (labels - 65538, InputError, "no negative labels, this one has -2"),
        (labels.astype(np.float32), InputError, "holds integers, not float32"),
        (
            labels.transpose(0, 2, 1) * 0,
            GridMismatchError,
            r"shape \(2, 4, 3\) on the grid \(2, 3, 4\)",
        ),
    ):
        with pytest.raises(error, match=message):
            io.write_label_map(
                tmp_path / "a.nii.gz", values, header_of_grid(labels.shape, np.eye(4))
            )
    assert list(tmp_path.iterdir()) == []


def test_files_of_several_gzip_members_and_padding(tmp_path):
    """Parallel compressors write members; some tools pad with zeros."""
    whole = gzip.decompress(save_nifti(tmp_path / "a.nii.gz", numbers((9, 8, 7))).read_bytes())
    pieces = [whole[:100], whole[100:1000], whole[1000:]]
    (tmp_path / "b.nii.gz").write_bytes(
        b"".join(gzip.compress(piece) for piece in pieces) + bytes(1000)
    )
    np.testing.assert_array_equal(io.read_volume(tmp_path / "b.nii.gz").data, numbers((9, 8, 7)))


@pytest.mark.parametrize(
    ("units", "mm"), [("mm", 1.0), ("micron", 0.001), ("meter", 1000.0), ("unknown", 1.0)]
)
def test_geometry_is_in_millimeters_whatever_the_units(units, mm, tmp_path):
    path = save_nifti(
        tmp_path / "a.nii.gz", numbers((3, 4, 5)), affine_of((1, 2, 3), (10, 20, 30)), units=units
    )
    ours = io.read_volume(path)
    np.testing.assert_allclose(ours.spacing, (mm, 2 * mm, 3 * mm))
    np.testing.assert_allclose(ours.affine[:3, 3], (10 * mm, 20 * mm, 30 * mm))
    after = written_like(ours, tmp_path)
    assert after.header.get_xyzt_units()[0] == units
    np.testing.assert_array_equal(after.affine, nib.load(path).affine)


def written_like(like, folder):
    io.write_label_map(folder / "labels.nii.gz", np.ones(like.data.shape, np.uint8), like.header)
    return nib.load(folder / "labels.nii.gz")


def test_a_header_without_codes_is_kept_without_codes(tmp_path):
    image = nib.Nifti1Image(numbers((3, 4, 5)), None)
    image.header.set_zooms((1.0, 2.0, 3.0))
    nib.save(image, tmp_path / "a.nii.gz")
    ours = io.read_volume(tmp_path / "a.nii.gz")
    assert ours.spacing == (1.0, 2.0, 3.0)
    assert tuple(map(str, ours.header.notes)) == (
        "no orientation in the header (sform and qform codes are 0)",
    )
    after = written_like(ours, tmp_path).header
    assert (after["sform_code"], after["qform_code"], *after.get_zooms()) == (0, 0, 1.0, 2.0, 3.0)


def test_sheared_axes_survive_in_the_sform_and_are_refused_elsewhere(tmp_path):
    affine = affine_of((1.0, 2.0, 3.0), (5, 6, 7), OBLIQUE)
    affine[:3, 1] += 0.2 * affine[:3, 0]
    labels = numbers((3, 4, 5), dtype=np.uint8)
    io.write_label_map(tmp_path / "a.nii.gz", labels, header_of_grid(labels.shape, affine))
    after = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(after.affine, affine, atol=FLOAT32_MM)
    assert after.header["qform_code"] == 0, "a quaternion would silently straighten it"
    np.testing.assert_array_equal(io.read_volume(tmp_path / "a.nii.gz").affine, after.affine)
    with pytest.raises(CrfRefineError, match="cannot hold the sheared axes of the volume; write"):
        io.write_label_map(tmp_path / "a.mhd", labels, header_of_grid(labels.shape, affine))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.nii.gz"]


def patched(path, offset, layout, *values, dtype=np.float32):
    """A file with other bytes in its header, as nibabel would not write them."""
    content = bytearray(save_nifti(path, numbers((4, 5, 6), dtype=dtype)).read_bytes())
    struct.pack_into(layout, content, offset, *values)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("offset", "value"),
    [(108, 0.0), (112, 0.0), (112, np.nan)],
    ids=["voxels from byte 0, after the header", "slope 0", "slope NaN"],
)
def test_fields_that_say_nothing(offset, value, tmp_path):
    path = patched(tmp_path / "a.nii", offset, "<f", value, dtype=np.int16)
    np.testing.assert_array_equal(io.read_volume(path).data, numbers((4, 5, 6)))


COLORS = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
CHANNELS = np.zeros((3, 4, 5, 2, 3), np.float32)
NOTHING = [1] + [0.0] * 12
LARGE = [30000] * 3


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: patched(p, 108, "<f", np.nan), "damaged NIfTI header: .*vox.offset"),
        (lambda p: patched(p, 108, "<f", -16.0), "damaged NIfTI header: .*vox.offset"),
        (lambda p: patched(p, 112, "<f", -np.inf), "damaged NIfTI header: scl_slope -inf"),
        (lambda p: patched(p, 42, "<3h", *LARGE), "cut off: its header promises 108000000000352"),
        (lambda p: patched(p, 254, "<h24x12f", *NOTHING), "geometry in the header is not usable"),
        (lambda p: save_nifti(p, COLORS), "expected integers or floats(?s:.*)Split colors"),
        (lambda p: save_nifti(p, COLORS["R"].astype("c8")), "of type complex64 are not supported"),
        (lambda p: save_nifti(p, CHANNELS), r"shape \(3, 4, 5, 2, 3\) cannot be split into grid"),
    ],
)
def test_headers_that_cannot_be(write, message, tmp_path):
    """An error before any voxel is read or given memory."""
    path = write(tmp_path / "a.nii")
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for one in (path, packed):
        with pytest.raises(CrfRefineError, match=rf"{one.name}: .*{message}"):
            io.read_header(one)


def test_values_near_the_largest_float32_are_finite_and_scalings_beyond_it_are_not(tmp_path):
    """The sum of the former overflows, which is how infinity is looked for first."""
    path = tmp_path / "a.nii.gz"
    large = np.full((30, 40, 50), 3e38, np.float32)
    data = np.zeros((5, 6, 7), np.int16)
    np.testing.assert_array_equal(io.read_volume(save_nifti(path, large)).data, large)
    data[2, 3, 4] = 30_000
    assert io.read_volume(save_nifti(path, data, slope=1e34)).data.max() == pytest.approx(3e38)
    with pytest.raises(
        InputError,
        match=r"1 of 210 values are NaN or infinite; "
        r"the first one \(infinite\) is at voxel \(2, 3, 4\)",
    ):
        io.read_volume(save_nifti(path, data, slope=1e35))


def test_one_file_a_label(tmp_path):
    channels = numbers((3, 4, 5, 6))
    paths = [
        save_nifti(tmp_path / f"label{i}.nii.gz", channel) for i, channel in enumerate(channels)
    ]
    logits = io.read_logits(paths)
    np.testing.assert_array_equal(logits, channels)
    moved = save_nifti(
        tmp_path / "moved.nii.gz", channels[0], affine_of((1.0, 1.5, 2.25), (3.0, -4.0, 6.0))
    )
    two = save_nifti(tmp_path / "two.nii.gz", np.zeros((4, 5, 6, 2), np.float32))
    for wrong, error, message in (
        (
            (moved,),
            GridMismatchError,
            r"(?s)moved\.nii\.gz: the logits of two labels are on different grids\n.*label0.*moved",
        ),
        ((), InputError, r"label0\.nii\.gz: logits of one label only"),
        (
            (two,),
            InputError,
            r"two\.nii\.gz: expected one label, as in each of the 2 files, this one has 2",
        ),
    ):
        with pytest.raises(error, match=message):
            io.read_logits([paths[0], *wrong])


TABLE = (
    '<CaretExtension><LabelTable><Label Key="3" Red="1" Green="0.5" Blue="0">'
    "liver &amp; gut</Label></LabelTable></CaretExtension>"
)
NESTED = (
    '<!ENTITY a0 "'
    + "ab\n" * 1000
    + '">'
    + "".join(f'<!ENTITY a{i} "' + 10 * f"&a{i - 1};" + '">' for i in range(1, 7))
)
ATTRIBUTES = " ".join(f'a{i}=""' for i in range(80_000))
NAMELESS = {
    "nested entities": (
        f'<?xml version="1.0"?><!DOCTYPE r [{NESTED}]>'
        '<CaretExtension><Label Key="3"><b/>&a4;</Label>'
    ).encode(),
    "UTF-16": TABLE.encode("utf-16"),
    "a million nested elements": b"<CaretExtension>" + b"<a>" * 300_000,
    "too long": b"<CaretExtension>" + b"<Label/>" * 200_000 + TABLE.encode(),
    "many attributes": f"<CaretExtension><Label {ATTRIBUTES}/>".encode(),
    "a key that is no number": TABLE.replace('"3"', '"\x1b[2J"').encode(),
    "a label beyond all": TABLE.replace('"3"', '"65536"').encode(),
    "cut off": TABLE[:-40].encode(),
    "another extension": TABLE.replace("Caret", "Other").encode(),
}
NAMED = {
    "plain": TABLE.encode(),
    "with a mark of UTF-8": TABLE.encode("utf-8-sig"),
    "with a comment": f"<!-- names -->{TABLE}".encode(),
    "as character data": TABLE.replace("liver &amp; gut", "<![CDATA[liver & gut]]>").encode(),
}


@pytest.mark.parametrize("table", [*NAMELESS.values(), *NAMED.values()], ids=[*NAMELESS, *NAMED])
def test_a_table_of_names_changes_no_voxel_and_takes_little_memory(table, tmp_path):
    labels = np.zeros((5, 7, 6), np.uint8)
    labels[1:4, 2:5, 1:5] = 3
    image = nib.Nifti1Image(labels, np.diag([1.0, 1.5, 2.25, 1.0]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(0, table))
    nib.save(image, tmp_path / "a.nii.gz")
    read = []
    assert peak_memory(lambda: read.append(io.read_volume(tmp_path / "a.nii.gz"))) < 16 << 20
    np.testing.assert_array_equal(read[0].data, labels)
    segments = [(segment.label, segment.name, segment.color) for segment in read[0].header.segments]
    expected = []
    if table in NAMED.values():
        expected = [(3, "liver & gut", (1.0, 0.5, 0.0))]
    assert segments == expected


@pytest.mark.parametrize("sform", [np.zeros((4, 4)), np.diag([1.0, 1.0, 0.0, 1.0])])
def test_a_sform_that_is_not_usable_beside_a_good_qform(sform, tmp_path):
    """The error has the command that takes the qform, which works as it is printed."""
    image = nib.Nifti1Image(numbers((3, 4, 5)), None)
    qform = affine_of((1.0, 2.0, 3.0), (10.0, 20.0, 30.0))
    image.set_qform(qform, 1)
    image.set_sform(sform, 1)
    path = tmp_path / "a b.nii.gz"
    nib.save(image, path)
    with pytest.raises(InputError, match="The affine is its sform") as error:
        io.read_header(path)
    lines = str(error.value).splitlines()
    assert lines[-2] == f"    fslorient -copyqform2sform '{path}'"
    command = shlex.split(lines[-1].replace("NEW.nii.gz", str(tmp_path / "new.nii.gz")))
    subprocess.run([sys.executable, *command[1:]], check=True)
    np.testing.assert_allclose(io.read_header(tmp_path / "new.nii.gz").affine, qform, atol=1e-5)
    image.set_qform(None, 0)
    nib.save(image, path)
    with pytest.raises(InputError, match=r"not usable: (?!.*sform)"):
        io.read_header(path)
