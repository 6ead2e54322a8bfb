"""Geometries and files for the tests of reading and writing. The files are made by nibabel and
SimpleITK, never by the code under test.
"""

import gzip
import math
import tracemalloc

import nibabel as nib
import numpy as np
import SimpleITK as sitk  # noqa: N813 - its customary name
from hypothesis import strategies as st

LPS_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def peak_memory(work):
    """Run something; return the most bytes that Python and NumPy held meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def rotation(axis, angle):
    """Rotate about one of the coordinate axes."""
    first, second = [i for i in range(3) if i != axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second] = -math.sin(angle)
    matrix[second, first] = math.sin(angle)
    return matrix


def affine_of(spacing=(1.0, 1.0, 1.0), origin=(0.0, 0.0, 0.0), direction=None):
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if direction is None else direction) * np.array(spacing)
    affine[:3, 3] = origin
    return affine


OBLIQUE = rotation(2, 0.3) @ rotation(0, -0.2) @ np.diag([-1.0, 1.0, 1.0])


@st.composite
def affines(draw):
    """Unequal spacings, any flips and permutations of the axes, an oblique turn of up to half a
    radian about each.
    """
    spacing = [draw(st.floats(0.1, 9.0)) for _ in range(3)]
    origin = [draw(st.floats(-500.0, 500.0)) for _ in range(3)]
    order = draw(st.permutations(range(3)))
    flips = np.diag([draw(st.sampled_from([-1.0, 1.0])) for _ in range(3)])
    turn = np.linalg.multi_dot([rotation(axis, draw(st.floats(-0.5, 0.5))) for axis in range(3)])
    return affine_of(spacing, origin, turn @ np.eye(3)[:, order] @ flips)


def grid_shapes():
    return (
        st.lists(st.integers(1, 7), min_size=2, max_size=3)
        .map(tuple)
        .filter(lambda shape: math.prod(shape) > 1)
    )


def save_nifti(path, data, affine=None, *, slope=None, inter=0.0, units="mm"):
    """Write with nibabel; with `slope` the data are the stored integers."""
    affine = affine_of((1.0, 1.5, 2.25), (3.0, -4.0, 5.0)) if affine is None else affine
    image = nib.Nifti1Image(np.asarray(data), affine)
    image.header.set_xyzt_units(units)
    if slope is None:
        nib.save(image, path)
        return path
    # nibabel scales on saving; the bytes are put together here, so that what is stored is known.
    image.header.set_slope_inter(slope, inter)
    image.header["vox_offset"] = 352
    image.header["magic"] = b"n+1"
    payload = image.header.binaryblock + bytes(4) + np.asarray(data).tobytes(order="F")
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)
    return path


def save_itk(
    path, data, *, channels=False, spacing=None, origin=None, direction=None, compress=True
):
    """Write with SimpleITK; `data` is (x, y[, z]), or (channels, x, y[, z])."""
    array = np.asarray(data)
    array = (
        np.moveaxis(array, 0, -1).transpose(*range(array.ndim - 2, -1, -1), array.ndim - 1)
        if channels
        else array.transpose()
    )
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=channels)
    num_axes = image.GetDimension()
    image.SetSpacing([float(v) for v in (spacing or (0.7, 1.1, 2.3)[:num_axes])])
    image.SetOrigin([float(v) for v in (origin or (10.123456789, -20.25, 1 / 3)[:num_axes])])
    if direction is not None:
        image.SetDirection([float(v) for v in np.asarray(direction).ravel()])
    sitk.WriteImage(image, str(path), compress)
    return path


def save_seg(path, labels, affine, axes=(0, 1, 2), mirrored=()):
    """Write labels as 3D Slicer does, only the box around them; the axes of the file may be
    exchanged, and then mirrored.
    """
    inside = np.argwhere(labels)
    first = inside.min(axis=0)
    box = tuple(slice(*ends) for ends in zip(first, inside.max(axis=0) + 1, strict=True))
    values = labels[box].transpose(axes)
    place = np.eye(4)
    place[:3, :3] = np.eye(3)[:, axes]
    place[:3, 3] = first
    for axis in mirrored:
        place[:3, 3] += place[:3, axis] * (values.shape[axis] - 1)
        place[:3, axis] *= -1
    values = np.flip(values, mirrored)
    lps = LPS_RAS @ affine @ place
    vectors = ["(" + ",".join(f"{value:.15g}" for value in column) + ")" for column in lps.T[:, :3]]
    text = nrrd_text(
        "Segment0_ID:=Segment_1",
        "Segment0_LabelValue:=1",
        f"Segment0_Extent:=0 {values.shape[0] - 1} 0 {values.shape[1] - 1} 0 {values.shape[2] - 1}",
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset:=" + " ".join(map(str, first)),
        type="unsigned char",
        sizes=" ".join(map(str, values.shape)),
        space="left-posterior-superior",
        encoding="gzip",
        **{
            "space directions": " ".join(vectors[:3]),
            "space origin": vectors[3],
            "kinds": "domain domain domain",
        },
    )
    path.write_bytes(text + gzip.compress(values.astype(np.uint8).tobytes(order="F")))
    return path


def meta_text(**changes):
    """The header of a MetaImage of 2 x 3 x 4 shorts.

    ElementDataFile comes last; a field that is changed to "-" is left out.
    """
    fields = {
        "NDims": "3",
        "DimSize": "2 3 4",
        "ElementType": "MET_SHORT",
        "ElementDataFile": "LOCAL",
        **changes,
    }
    fields["ElementDataFile"] = fields.pop("ElementDataFile")
    return "".join(f"{key} = {value}\n" for key, value in fields.items() if value != "-").encode(
        "utf-8", "surrogateescape"
    )


def nrrd_text(*lines, **changes):
    """The header of an NRRD of 2 x 3 x 4 shorts; a field that is changed to "-" is left out."""
    fields = {
        "type": "short",
        "dimension": "3",
        "sizes": "2 3 4",
        "endian": "little",
        "encoding": "raw",
        **changes,
    }
    found = (f"{key}: {value}" for key, value in fields.items() if value != "-")
    return "\n".join(["NRRD0004", *found, *lines, "", ""]).encode("utf-8", "surrogateescape")


def itk_affine(image):
    """What SimpleITK says about an image, as voxel to world RAS+."""
    num_axes = min(image.GetDimension(), 3)
    direction = np.array(image.GetDirection()).reshape(image.GetDimension(), -1)[
        :num_axes, :num_axes
    ]
    affine = np.eye(4)
    affine[:num_axes, :num_axes] = direction * np.array(image.GetSpacing()[:num_axes])
    affine[:num_axes, 3] = image.GetOrigin()[:num_axes]
    return LPS_RAS @ affine


def itk_array(image):
    """Voxels as SimpleITK has them, as (x, y[, z]) or (channels, x, y[, z])."""
    array = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        array = np.moveaxis(array, -1, 0)
        return array.transpose(0, *range(array.ndim - 1, 0, -1))
    return array.transpose()


def numbers(shape, seed=0, dtype=np.float32):
    """Different values at all voxels, so that a wrong axis order cannot go unnoticed."""
    return np.random.default_rng(seed).permutation(math.prod(shape)).reshape(shape).astype(dtype)


def world_of(shape, affine):
    """World coordinates of all voxels, (*grid, 3)."""
    indices = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return indices @ affine[:3, : len(shape)].T + affine[:3, 3]


def as_itk(values, affine):
    """An image of an array (x, y[, z]) with an affine in RAS+."""
    num_axes = values.ndim
    lps = LPS_RAS @ affine
    image = sitk.GetImageFromArray(np.ascontiguousarray(values.transpose()))
    spacing = np.linalg.norm(lps[:num_axes, :num_axes], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:num_axes, 3].tolist())
    image.SetDirection((lps[:num_axes, :num_axes] / spacing).ravel().tolist())
    return image


def itk_resampled(source, source_affine, shape, affine, interpolator=sitk.sitkLinear):
    """Values (x, y[, z]) on another grid, as its resampler finds them; 0 outside."""
    like = as_itk(np.zeros(shape, np.float32), affine)
    identity = sitk.Transform(len(shape), sitk.sitkIdentity)
    return itk_array(
        sitk.Resample(as_itk(source, source_affine), like, identity, interpolator, 0.0)
    )
