"""Unsupported kinds of files: how to recognize them by content or name, and which program converts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"GIF8")
_COMPRESSED = (b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c")


@dataclass(frozen=True)
class ForeignKind:
    """A kind of file that is not supported.

    Attributes:
        name: with its article, as in "it is a DICOM file".
        way_out: how to convert it.
        suffixes: suffixes of such files.
        recognizes: returns whether a file with this beginning is of this kind.
    """

    name: str
    way_out: str
    suffixes: tuple[str, ...]
    recognizes: Callable[[bytes], bool]


# The first kind that recognizes a file wins.
FOREIGN_KINDS = (
    ForeignKind(
        "a DICOM file",
        "give the folder that holds the slices of its series and nothing else, or convert the series to NIfTI with dcm2niix",
        (".dicom", ".ima"),
        lambda start: start[128:132] == b"DICM",
    ),
    ForeignKind(
        "half of an Analyze or NIfTI pair",
        "put the header, NAME.hdr, beside the voxels, NAME.img; a compressed header has to be unpacked",
        (".img", ".hdr.gz", ".img.gz"),
        lambda start: False,
    ),
    ForeignKind(
        "a MINC volume of version 1", "convert it with mincconvert -2 IN.mnc OUT.mnc", (), lambda start: start.startswith(b"CDF\1")
    ),
    ForeignKind(
        "an HDF5 file",
        "save its array with numpy.savez_compressed('CASE.npz', logits=array), (label, z, y, x), or its image as NIfTI",
        (".h5", ".hdf5"),
        lambda start: start.startswith(b"\x89HDF\r\n\x1a\n"),
    ),
    ForeignKind(
        "a NumPy array (.npy)",
        "save it with its name, numpy.savez_compressed('CASE.npz', logits=array), (label, z, y, x)",
        (".npy",),
        lambda start: start.startswith(b"\x93NUMPY"),
    ),
    ForeignKind(
        "a file of PyTorch or a pickle",
        "load it where it comes from and save its array with numpy.savez_compressed('CASE.npz', logits=array), (label, z, y, x)",
        (".pt", ".pth", ".pkl", ".pickle"),
        lambda start: start.startswith(b"PK\3\4") and b"/data.pkl" in start[:256],
    ),
    ForeignKind(
        "a picture",
        "it has no voxel size and no place in the world; export the volume as NIfTI",
        (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".bmp"),
        lambda start: start.startswith(_PICTURES),
    ),
    ForeignKind("an archive (zip)", "unpack it", (".zip",), lambda start: start.startswith(b"PK\3\4")),
    ForeignKind(
        "compressed in another way than with gzip",
        "decompress it",
        (".bz2", ".xz", ".zst", ".7z"),
        lambda start: start.startswith(_COMPRESSED),
    ),
)
