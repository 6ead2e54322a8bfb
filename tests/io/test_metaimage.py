"""MetaImage and NRRD, against SimpleITK: what one writes the other reads."""

import tempfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from hypothesis import given, settings
from hypothesis import strategies as st
from io_helpers import OBLIQUE, affine_of, affines, grid_shapes, itk_affine, itk_array, numbers, read_or_complain, save_itk, save_nifti

from crfrefine import io
from crfrefine.errors import CrfRefineError, InputError, UnsupportedFormatError
from crfrefine.io.volume import Volume, spacing_of

SUFFIXES = [".mhd", ".mha", ".nrrd", ".nhdr"]
# Text headers keep all digits; direction times spacing and back costs two roundings of float64, at positions up to 1000 mm.
FLOAT64_MM = 1e-12


def volume(data, affine) -> Volume:
    return Volume(data, affine, spacing_of(affine, data.ndim))


@settings(deadline=None, max_examples=60)
@given(shape=grid_shapes(), affine=affines(), suffix=st.sampled_from(SUFFIXES), largest=st.sampled_from([1, 255, 256, 65535]))
def test_simpleitk_reads_the_label_maps_written(shape, affine, suffix, largest):
    if len(shape) == 2:
        affine = affine_of((0.7, 1.3, 1.0), (5.25, -6.125, 0.0))
    labels = numbers(shape, dtype=np.int64) % (largest + 1)
    labels.flat[0] = largest
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case" + suffix)
        io.write_label_map(path, labels, volume(labels, affine))
        itks = sitk.ReadImage(str(path))
        assert itks.GetPixelID() == (sitk.sitkUInt8 if largest <= 255 else sitk.sitkUInt16)
        np.testing.assert_array_equal(itk_array(itks), labels)
        np.testing.assert_allclose(itk_affine(itks), affine, atol=FLOAT64_MM)
        ours = io.read_labels(path)
        np.testing.assert_array_equal(ours.data, labels)
        np.testing.assert_allclose(ours.affine, affine, atol=FLOAT64_MM)


@settings(deadline=None, max_examples=60)
@given(
    shape=grid_shapes(),
    dtype=st.sampled_from([np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64]),
    direction=st.sampled_from([np.eye(3), np.diag([-1.0, -1.0, 1.0]), OBLIQUE]),
    suffix=st.sampled_from(SUFFIXES),
    compress=st.booleans(),
)
def test_what_simpleitk_writes_is_read(shape, dtype, direction, suffix, compress):
    data = numbers(shape, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = save_itk(Path(folder, "image" + suffix), data, direction=direction if len(shape) == 3 else None, compress=compress)
        ours, itks = io.read_volume(path), sitk.ReadImage(str(path))
        assert io.is_whole(path)
    assert ours.data.dtype == np.float32
    assert ours.header.dtype == np.dtype(dtype).name
    np.testing.assert_array_equal(ours.data, data)
    np.testing.assert_array_equal(ours.affine, itk_affine(itks))
    np.testing.assert_allclose(ours.spacing, itks.GetSpacing(), rtol=1e-14)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("direction", [np.eye(3), np.diag([-1.0, -1.0, 1.0]), OBLIQUE], ids=["straight", "flipped", "oblique"])
def test_geometry_is_kept_to_the_last_bit(suffix, direction, tmp_path):
    """As SimpleITK sees it: origin, spacing and direction before and after."""
    image = save_itk(tmp_path / f"image{suffix}", numbers((4, 5, 6)), direction=direction, spacing=(0.1, 1 / 3, 2.123456789012345))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / f"image{suffix}"
    io.write_label_map(out, np.ones((4, 5, 6), np.uint8), io.read_volume(image))
    before, after = sitk.ReadImage(str(image)), sitk.ReadImage(str(out))
    assert before.GetOrigin() == after.GetOrigin()
    assert before.GetSpacing() == after.GetSpacing()
    assert before.GetDirection() == after.GetDirection()
    names = {".mhd": {"image.mhd", "image.zraw"}, ".nhdr": {"image.nhdr", "image.raw.gz"}}
    assert {path.name for path in out.parent.iterdir()} == names.get(suffix, {f"image{suffix}"})


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5)], ids=["3d", "2d"])
def test_vector_images_are_channels(suffix, compress, shape, tmp_path):
    channels = numbers((3, *shape))
    path = save_itk(tmp_path / f"a{suffix}", channels, channels=True, compress=compress)
    logits = io.read_logits([path])
    np.testing.assert_array_equal(logits.values, channels)
    assert logits.values.strides[1] == 4, "x is the fastest axis"
    np.testing.assert_array_equal(logits.affine, itk_affine(sitk.ReadImage(str(path))))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5)], ids=["3d", "2d"])
def test_channels_written_are_read_by_simpleitk(suffix, shape, tmp_path):
    logits = numbers((3, *shape)) - 30.5
    like = io.read_volume(save_itk(tmp_path / f"image{suffix}", numbers(shape)))
    io.write_channels(tmp_path / f"logits{suffix}", logits, like)
    itks = sitk.ReadImage(str(tmp_path / f"logits{suffix}"))
    np.testing.assert_array_equal(itk_array(itks), logits)
    np.testing.assert_array_equal(itk_affine(itks), like.affine)
    np.testing.assert_array_equal(io.read_logits([tmp_path / f"logits{suffix}"]).values, logits)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_a_fourth_dimension_is_channels(suffix, tmp_path):
    image = sitk.GetImageFromArray(numbers((3, 4, 5, 6)), isVector=False)
    assert image.GetDimension() == 4
    image.SetSpacing((1.0, 2.0, 3.0, 1.0))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    volume = io.read_volume(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(volume.data, numbers((3, 4, 5, 6)).transpose(0, 3, 2, 1))
    assert volume.spacing == (1.0, 2.0, 3.0)
    io.write_label_map(tmp_path / f"labels{suffix}", np.ones((6, 5, 4), np.uint8), volume)
    np.testing.assert_array_equal(io.read_labels(tmp_path / f"labels{suffix}").affine, volume.affine)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_formats_keep_the_geometry_too(suffix, tmp_path):
    """NIfTI to LPS and back: through float32 of the NIfTI header once, then exact."""
    affine = affine_of((0.5, 1.25, 3.0), (-7.5, 11.25, 13.0), OBLIQUE)
    image = io.read_volume(save_nifti(tmp_path / "image.nii.gz", numbers((4, 5, 6)), affine))
    labels = numbers((4, 5, 6), dtype=np.uint8)
    io.write_label_map(tmp_path / f"a{suffix}", labels, image)
    there = io.read_volume(tmp_path / f"a{suffix}")
    np.testing.assert_allclose(there.affine, image.affine, atol=1e-6)
    io.write_label_map(tmp_path / "back.nii.gz", labels, there)
    back = nib.load(tmp_path / "back.nii.gz")
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    np.testing.assert_allclose(itk_affine(sitk.ReadImage(str(tmp_path / "back.nii.gz"))), affine, atol=1e-5)
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), labels)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sheared_axes_are_refused(suffix, tmp_path):
    affine = affine_of((1.0, 2.0, 3.0))
    affine[0, 1] = 0.4
    labels = np.ones((3, 4, 5), np.uint8)
    with pytest.raises(UnsupportedFormatError, match=r"cannot hold the sheared axes of the volume; write NIfTI"):
        io.write_label_map(tmp_path / f"a{suffix}", labels, volume(labels, affine))
    assert list(tmp_path.iterdir()) == []


def write_mhd(folder: Path, lines: list[str], data: bytes, name: str = "a.raw") -> Path:
    (folder / name).write_bytes(data)
    (folder / "a.mhd").write_text("\n".join([*lines, f"ElementDataFile = {name}", ""]))
    return folder / "a.mhd"


HEADER = ["NDims = 3", "DimSize = 4 5 6", "ElementType = MET_SHORT"]


@pytest.mark.parametrize("key", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_big_endian_voxels(key, tmp_path):
    data = numbers((6, 5, 4), dtype=">i2")
    path = write_mhd(tmp_path, [*HEADER, f"{key} = True"], data.tobytes())
    np.testing.assert_array_equal(io.read_volume(path).data, data.transpose())
    np.testing.assert_array_equal(itk_array(sitk.ReadImage(str(path))), data.transpose())


def test_a_header_without_transform_and_with_exponents(tmp_path):
    """As VTK and older tools write them; the lines are kept as they are."""
    lines = [
        *HEADER,
        "ElementSize = 4.000000e+000 2.500000e+000 1.000000e+000",
        "ElementSpacing = 4.000000e+000 2.500000e+000 1.000000e+000",
    ]
    path = write_mhd(tmp_path, lines, numbers((6, 5, 4), dtype="<i2").tobytes())
    ours = io.read_volume(path)
    assert ours.spacing == (4.0, 2.5, 1.0)
    assert ours.header.orientation == "LPS"
    np.testing.assert_array_equal(ours.affine, itk_affine(sitk.ReadImage(str(path))))
    io.write_label_map(tmp_path / "out.mhd", np.ones((4, 5, 6), np.uint8), ours)
    assert "ElementSpacing = 4.000000e+000 2.500000e+000 1.000000e+000" in (tmp_path / "out.mhd").read_text()


@pytest.mark.parametrize("skipped", [0, 17])
def test_bytes_before_the_voxels_are_skipped(skipped, tmp_path):
    data = numbers((6, 5, 4), dtype="<i2")
    path = write_mhd(tmp_path, [*HEADER, f"HeaderSize = {skipped}"], bytes(skipped) + data.tobytes())
    np.testing.assert_array_equal(io.read_volume(path).data, data.transpose())


def test_what_only_simpleitk_understands(tmp_path):
    """Slices in files of their own, numbers as text, bytes counted from the end."""
    data = numbers((6, 5, 4), dtype="<i2")
    for i, plane in enumerate(data):
        (tmp_path / f"slice{i}.raw").write_bytes(plane.tobytes())
    names = [f"slice{i}.raw" for i in range(6)]
    (tmp_path / "list.mhd").write_text("\n".join([*HEADER, "ElementDataFile = LIST", *names, ""]))
    (tmp_path / "text.mhd").write_text(
        "\n".join([*HEADER, "BinaryData = False", "ElementDataFile = LOCAL", " ".join(map(str, data.ravel())), ""])
    )
    (tmp_path / "end").mkdir()
    from_end = write_mhd(tmp_path / "end", [*HEADER, "HeaderSize = -1"], bytes(31) + data.tobytes())
    (tmp_path / "text.nrrd").write_text(
        "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 5 6\nencoding: ascii\n\n" + " ".join(map(str, data.ravel())) + "\n"
    )
    for path in (tmp_path / "list.mhd", tmp_path / "text.mhd", from_end, tmp_path / "text.nrrd"):
        np.testing.assert_array_equal(io.read_volume(path).data, data.transpose(), err_msg=path.name)


def test_nrrd_of_other_worlds_and_channel_axes(tmp_path):
    """Slicer writes LPS; others RAS, with the channels as the last axis."""
    data = numbers((3, 6, 5, 4))
    header = "NRRD0004\ntype: float\ndimension: 4\nspace: right-anterior-superior\nsizes: 4 5 6 3\nendian: little\nencoding: raw\n"
    header += "space directions: (1,0,0) (0,2,0) (0,0,3) none\nspace origin: (7,8,9)\nkinds: domain domain domain list\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + data.astype("<f4").tobytes())
    logits = io.read_logits([tmp_path / "a.nrrd"])
    np.testing.assert_array_equal(logits.values, data.transpose(0, 3, 2, 1))
    np.testing.assert_array_equal(logits.affine, affine_of((1, 2, 3), (7, 8, 9)))
    np.testing.assert_array_equal(logits.values, itk_array(sitk.ReadImage(str(tmp_path / "a.nrrd"))))
    like = io.read_volume(tmp_path / "a.nrrd")
    io.write_label_map(tmp_path / "labels.nrrd", np.ones((4, 5, 6), np.uint8), like)
    np.testing.assert_array_equal(io.read_labels(tmp_path / "labels.nrrd").affine, like.affine)
    assert b"space: right-anterior-superior\n" in (tmp_path / "labels.nrrd").read_bytes()


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_cut_is_noticed(suffix, compress, tmp_path, capfd):
    path = save_itk(tmp_path / f"a{suffix}", numbers((4, 5, 6)), compress=compress)
    voxels = next((file for file in tmp_path.iterdir() if file != path), path)
    content = voxels.read_bytes()
    for length in [*range(0, len(content), 23), len(content) - 1]:
        voxels.write_bytes(content[:length])
        with pytest.raises(UnsupportedFormatError, match=r"a\..*(cut off|is empty|not a MetaImage|not an NRRD|cannot read)"):
            io.read_volume(path)
        assert not io.is_whole(path)
    out, err = capfd.readouterr()
    assert (out, err) == ("", ""), "only the error itself may report anything"


@settings(deadline=None, max_examples=150)
@given(st.data(), st.sampled_from(SUFFIXES))
def test_damaged_voxels_never_go_unnoticed(data, suffix):
    """SimpleITK gives damaged compressed voxels back, or zeros, without an error. One byte of the compressed voxels is changed."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_itk(Path(folder, f"a{suffix}"), numbers((4, 5, 6), dtype=np.int16))
        voxels = next((file for file in Path(folder).iterdir() if file != path), path)
        content = bytearray(voxels.read_bytes())
        header_size = content.index(b"LOCAL\n") + 6 if suffix == ".mha" else content.index(b"\n\n") + 2 if suffix == ".nrrd" else 0
        content[data.draw(st.integers(header_size, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        voxels.write_bytes(content)
        read, complaint = read_or_complain(path)
    if read is None:
        assert str(voxels) in complaint
    else:
        np.testing.assert_array_equal(read.data, numbers((4, 5, 6)))


@settings(deadline=None, max_examples=200)
@given(st.data(), st.sampled_from(SUFFIXES))
def test_a_damaged_header_gives_an_error_of_ours_or_a_volume(data, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = save_itk(Path(folder, f"a{suffix}"), numbers((4, 5, 6), dtype=np.int16))
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        read, complaint = read_or_complain(path)
    if read is None:
        assert str(path.with_suffix("")) in complaint
    else:
        assert np.isfinite(read.data).all()
        assert min(read.spacing) > 0


@pytest.mark.parametrize("suffix", [".mhd", ".mha"])
def test_a_header_without_axes(tmp_path, suffix):
    path = save_itk(tmp_path / f"a{suffix}", numbers((4, 5, 6), dtype=np.int16))
    path.write_bytes(path.read_bytes().replace(b"NDims = 3", b"NDims = 0"))
    with pytest.raises(CrfRefineError, match=r"a\.mh"):
        io.read_volume(path)


def test_compressed_voxels_that_are_too_few(tmp_path):
    data = zlib.compress(numbers((6, 5, 2), dtype="<i2").tobytes())
    path = write_mhd(tmp_path, [*HEADER, "CompressedData = True", f"CompressedDataSize = {len(data)}"], data, "a.zraw")
    with pytest.raises(
        UnsupportedFormatError, match=r"a\.zraw: the file is cut off: its header promises 240 bytes of voxels, it holds 120"
    ):
        io.read_volume(path)


def test_a_header_that_promises_too_few_compressed_bytes(tmp_path):
    """Such files are about; SimpleITK leaves the last voxels at zero without a word."""
    data = numbers((6, 5, 4), dtype="<i2")
    compressed = zlib.compress(data.tobytes())
    lines = [*HEADER, "CompressedData = True", f"CompressedDataSize = {len(compressed) - 30}"]
    path = write_mhd(tmp_path, lines, compressed, "a.zraw")
    np.testing.assert_array_equal(io.read_volume(path).data, data.transpose())


@pytest.mark.parametrize("suffix", [".mhd", ".nhdr"])
def test_missing_voxels_are_named(suffix, tmp_path, capfd):
    path = save_itk(tmp_path / f"a{suffix}", numbers((4, 5, 6)), compress=False)
    (tmp_path / "a.raw").rename(tmp_path / "b.raw")
    with pytest.raises(InputError, match=rf"a{suffix}: its voxels are missing; expected them in .*a\.raw, put both files into one folder"):
        io.read_header(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mhd", b"", "the file is empty"),
        ("a.nrrd", b"", "the file is empty"),
        ("a.mha", b"patient,dice\n1,2\n", "not a MetaImage file, although its name says so"),
        ("a.nhdr", b"patient,dice\n1,2\n", "not an NRRD file, although its name says so: it begins with b'patient,dice'"),
        ("a.mhd", b"NDims = 3\nElementDataFile = LOCAL\n", "damaged MetaImage header: no line `DimSize = ...`"),
        ("a.nrrd", b"NRRD0004\ntype: short\n\n", "damaged NRRD header: no line `dimension: ...`"),
    ],
)
def test_what_is_no_such_file(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedFormatError, match=message):
        io.read_volume(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_that_are_not_finite_are_located(suffix, tmp_path):
    data = numbers((3, 5, 6, 7))
    data[1, 2, 3, 4] = np.nan
    path = save_itk(tmp_path / f"a{suffix}", data, channels=True)
    with pytest.raises(InputError, match=r"1 of 630 values .* \(NaN\) is at voxel \(2, 3, 4\) of channel 1"):
        io.read_logits([path])


def test_complex_voxels_are_refused(tmp_path):
    image = sitk.Image([4, 5, 6], sitk.sitkComplexFloat32)
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    with pytest.raises(UnsupportedFormatError, match=r"a\.nrrd: complex voxels"):
        io.read_volume(tmp_path / "a.nrrd")


def write_slices(folder: Path, num_slices: int, word: str = "LIST") -> Path:
    """Four slices are promised."""
    names = [f"s{number}.raw" for number in range(num_slices)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(np.full((4, 5), number, "<f4").tobytes())
    path = folder / "list.mhd"
    header = ["ObjectType = Image", "BinaryData = True", "NDims = 3", "DimSize = 5 4 4", "ElementType = MET_FLOAT"]
    path.write_text("\n".join([*header, f"ElementDataFile = {word}", *names, ""]))
    return path


@pytest.mark.parametrize("num_slices", [0, 1, 3])
def test_a_list_of_too_few_slices_is_refused(num_slices, tmp_path):
    with pytest.raises(UnsupportedFormatError, match=f"promises 4 files of voxels, it lists {num_slices}"):
        io.read_volume(write_slices(tmp_path, num_slices))


@pytest.mark.parametrize("word", ["LIST", "LIST 2"])
def test_a_list_of_all_slices_is_read(word, tmp_path):
    assert io.read_volume(write_slices(tmp_path, 4, word)).data[0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", ["4 -5 6", "4 5 0"])
def test_sizes_below_one_are_refused(size, tmp_path):
    path = tmp_path / "a.mhd"
    path.write_text(f"NDims = 3\nDimSize = {size}\nElementType = MET_SHORT\nElementDataFile = a.raw\n")
    (tmp_path / "a.raw").write_bytes(bytes(240))
    with pytest.raises(UnsupportedFormatError, match=f"DimSize = {size}; expected sizes of at least 1"):
        io.read_header(path)
