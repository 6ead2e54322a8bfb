"""Headers of NIfTI-1 files in which nothing needs a repair or a rule of its own, read without nibabel.

Nearly all files have one. To import nibabel takes a quarter of the processor time of a small case, in which a header of 348 bytes is all
that is asked of it. Whatever is out of the ordinary is left to nibabel: NIfTI-2, pairs, big-endian files, damaged or odd fields.
Fields as in nifti1.h, https://nifti.nimh.nih.gov/nifti-1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 348
LARGEST_SIDE = 32767
"""Most voxels along an axis."""

_FIRST_VOXEL = 352  # Behind the header and four bytes that say whether extensions follow.
_MAGIC = b"n+1"
_OFFSETS = {
    "sizeof_hdr": ("<i4", 0),
    "dim": ("<8i2", 40),
    "intent_p1": ("<f4", 56),
    "intent_p2": ("<f4", 60),
    "intent_p3": ("<f4", 64),
    "intent_code": ("<i2", 68),
    "datatype": ("<i2", 70),
    "bitpix": ("<i2", 72),
    "pixdim": ("<8f4", 76),
    "vox_offset": ("<f4", 108),
    "scl_slope": ("<f4", 112),
    "scl_inter": ("<f4", 116),
    "xyzt_units": ("u1", 123),
    "cal_max": ("<f4", 124),
    "cal_min": ("<f4", 128),
    "descrip": ("S80", 148),
    "aux_file": ("S24", 228),
    "qform_code": ("<i2", 252),
    "sform_code": ("<i2", 254),
    "quatern": ("<3f4", 256),
    "qoffset": ("<3f4", 268),
    "srow": ("<(3,4)f4", 280),
    "intent_name": ("S16", 328),
    "magic": ("S4", 344),
}
_FIELDS = np.dtype(
    {
        "names": list(_OFFSETS),
        "formats": [format_ for format_, _ in _OFFSETS.values()],
        "offsets": [offset for _, offset in _OFFSETS.values()],
        "itemsize": SIZE,
    }
)
_TYPES = {2: "u1", 4: "<i2", 8: "<i4", 16: "<f4", 64: "<f8", 256: "i1", 512: "<u2", 768: "<u4", 1024: "<i8", 1280: "<u8"}
_CODES = {np.dtype(name): code for code, name in _TYPES.items()}
_TRANSFORM_CODES = range(6)


class PlainHeader:
    """The header of a single NIfTI-1 file, little-endian, with those of nibabel's methods and fields that readers and writers here use."""

    is_single = True
    endianness = "<"
    single_magic, single_vox_offset = _MAGIC, _FIRST_VOXEL
    pair_magic = b"ni1"

    def __init__(self, block: bytes) -> None:
        self._fields = np.frombuffer(bytearray(block[:SIZE]), _FIELDS).reshape(())

    def __reduce__(self) -> tuple[type[PlainHeader], tuple[bytes]]:
        return PlainHeader, (self.binaryblock,)  # numpy would leave out what lies between the fields.

    def __contains__(self, name: str) -> bool:
        return name in _OFFSETS

    def __getitem__(self, name: str) -> Any:
        return self._fields[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._fields[name] = value

    @property
    def binaryblock(self) -> bytes:
        """The header as bytes."""
        return bytes(self._fields.tobytes())

    def copy(self) -> PlainHeader:
        """Return another header of the same bytes."""
        return PlainHeader(self.binaryblock)

    def get_data_shape(self) -> tuple[int, ...]:
        """Return the voxels along each axis."""
        dim = self["dim"].tolist()
        return tuple(dim[1 : dim[0] + 1])

    def set_data_shape(self, shape: tuple[int, ...]) -> None:
        """Set the voxels along each axis, at most LARGEST_SIDE; further axes have one, of size 1."""
        self["dim"][:] = 1
        self["dim"][: len(shape) + 1] = (len(shape), *shape)
        self["pixdim"][len(shape) + 1 :] = 1.0

    def get_data_dtype(self) -> np.dtype[Any]:
        """Return the type of the voxels as stored."""
        return np.dtype(_TYPES[int(self["datatype"])])

    def set_data_dtype(self, dtype: np.dtype[Any]) -> None:
        """Set the type of the voxels."""
        dtype = np.dtype(dtype)
        self["datatype"], self["bitpix"] = _CODES[dtype.newbyteorder("<")], dtype.itemsize * 8

    def get_slope_inter(self) -> tuple[float | None, float | None]:
        """Return what a stored value is multiplied by, and what is added then; None: stored values are the values."""
        slope = float(self["scl_slope"])
        return (slope, float(self["scl_inter"])) if slope else (None, None)

    def get_sform(self, *, coded: bool = True) -> tuple[NDArray[np.float64] | None, int]:
        """Return the affine of the sform and its code; no affine where the code is 0."""
        code = int(self["sform_code"])
        return (np.vstack([self["srow"].astype(np.float64), [0.0, 0.0, 0.0, 1.0]]) if code else None), code

    def get_qform(self, *, coded: bool = True) -> tuple[NDArray[np.float64] | None, int]:
        """Return the affine of the qform and its code; no affine where the code is 0."""
        code = int(self["qform_code"])
        return (_rigid(self["quatern"], self["pixdim"], self["qoffset"]) if code else None), code

    def get_best_affine(self) -> NDArray[np.float64]:
        """Return the affine of the sform, or else of the qform."""
        affine = self.get_sform()[0]
        affine = self.get_qform()[0] if affine is None else affine
        assert affine is not None, "a header without both is left to nibabel"
        return affine


def read_plain(block: bytes) -> PlainHeader | None:
    """Return the header in the first bytes of a file; None: it is to be read with nibabel."""
    if len(block) < SIZE or block[:4] != SIZE.to_bytes(4, "little"):
        return None
    header = PlainHeader(block)
    num_axes, *sides = header["dim"].tolist()
    type_name = _TYPES.get(int(header["datatype"]))
    codes = int(header["qform_code"]), int(header["sform_code"])
    is_plain = (
        header["magic"] == _MAGIC
        and 1 <= num_axes <= len(sides)
        and min(sides[:num_axes]) > 0
        and tuple(sides[:3]) != (27307, 1, 6)  # FreeSurfer's way to write a surface of 163,842 vertices.
        and type_name is not None
        and header["bitpix"] == 8 * np.dtype(type_name).itemsize
        and (header["pixdim"][1:4] > 0).all()
        and abs(header["pixdim"][0]) == 1
        and _FIRST_VOXEL <= header["vox_offset"] < np.inf
        and np.isfinite([header["scl_slope"], header["scl_inter"]]).all()
        and all(code in _TRANSFORM_CODES for code in codes)
        and any(codes)
        and (codes[0] == 0 or _rest(header["quatern"]) >= 0)
    )
    return header if is_plain else None


def _rest(quaternion: NDArray[np.float32]) -> np.longdouble:
    """Return the square of the first component of a unit quaternion with these three others; rounding errors of its text are taken away."""
    parts = quaternion.astype(np.longdouble)
    rest = 1.0 - parts @ parts
    return np.longdouble(0 if abs(rest) < 3 * np.finfo(np.float32).eps else rest)


def _rigid(quaternion: NDArray[np.float32], pixdim: NDArray[np.float32], offset: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the affine of a rotation, given as a quaternion, and of the size of a voxel; pixdim[0] is the sign of the third axis."""
    a, (b, c, d) = np.sqrt(_rest(quaternion)), quaternion.astype(np.longdouble)
    two_b, two_c, two_d = (2.0 / (a * a + b * b + c * c + d * d)) * np.array([b, c, d])
    rotation = np.array(
        [
            [1.0 - (c * two_c + d * two_d), b * two_c - a * two_d, b * two_d + a * two_c],
            [b * two_c + a * two_d, 1.0 - (b * two_b + d * two_d), c * two_d - a * two_b],
            [b * two_d - a * two_c, c * two_d + a * two_b, 1.0 - (b * two_b + c * two_c)],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * (pixdim[1:4] * [1.0, 1.0, pixdim[0]])
    affine[:3, 3] = offset
    return affine
