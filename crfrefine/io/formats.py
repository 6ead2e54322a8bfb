"""The table of formats, and the kinds of files that are not read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from crfrefine.io.streams import GZIP_MAGIC

# Types of voxels, the smallest first; of one size, the type that most programs read.
ALL_TYPES = (
    *("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float32", "float64"),
)


@dataclass(frozen=True)
class Format:
    """A file format, and the module that reads and writes it.

    The module has these functions:

    - `recognizes(start)`: whether a file with these first bytes, compressed or not, is of the
      format.
    - `read_header(path)`: the `VolumeHeader`, by a `volume.FileHeader`, which checks that the file
      can hold its voxels. It raises UnsupportedFormatError for damage and for another format, and
      RareHeaderError for what only SimpleITK reads. `headers.read_header`, which calls it, adds
      `family`, `states` and the note on a wrong name.
    - `open_voxels(header)`, only for headers whose `source` is None: a context with a
      `streams.Decoder` at the first voxel.
    - `write(voxels, threads)`, unless the format is only read: writes `VoxelsToWrite`, whole
      or not at all. If `voxels.like` came from a file of this format, its geometry stays exactly.
    """

    name: str  # for people, and in `VolumeHeader.family`
    suffixes: tuple[str, ...]  # the default for writing first
    module: str  # its name
    # For each suffix of a header, the ending of the file with voxels that is written beside it.
    voxel_endings: Mapping[str, str] = field(default_factory=dict, hash=False)
    # Names of such files that readers take for something else: a pattern or list of files, another
    # folder, a line that ends. ITK and teem differ; what one of them misreads is not written. None
    # means that headers name no files.
    misread_names: re.Pattern[str] | None = None
    is_read_only: bool = False  # it is read through SimpleITK, and not written
    # Types of the voxels of images that are written; label maps and logits always find one.
    image_types: tuple[str, ...] = ALL_TYPES
    # the format has no geometry: it holds logits and probabilities, but no images, masks or label
    # maps
    holds_scores_alone: bool = False

    def hint(self, who: str) -> str:
        """Describe a file of this format, which is not read under its name, and the remedy."""
        if self.holds_scores_alone:
            return (
                f"{who} is a file of logits or probabilities ({self.name}), which has no geometry: "
                "no image, mask or label map."
            )
        return f"{who} is {self.name} by its content: name it {' or '.join(self.suffixes)}."


class ForeignKind(NamedTuple):
    """A kind of file that is not read."""

    description: str  # with the remedy
    beginning: bytes  # an expression for the first bytes of such files
    # People keep these files beside volumes; `info` describes one only if it is named.
    is_text: bool = False

    def hint(self, who: str) -> str:
        """Describe a file of this kind, and the remedy."""
        return f"{who} is {self.description}."


ITK = "ITK"  # name of the formats that SimpleITK reads, among them rare headers of others
FORMATS = (
    Format("NIfTI", (".nii.gz", ".nii", ".hdr"), "crfrefine.io.nifti", {".hdr": ".img"}),
    Format(
        "MetaImage",
        (".mhd", ".mha"),
        "crfrefine.io.metaimage",
        {".mhd": ".zraw"},
        misread_names=re.compile(r"\s|~|(?i:list)|(?s:.*[%\\\0-\x1f\x7f])"),
    ),
    Format(
        "NRRD",
        (".nrrd", ".nhdr", ".seg.nrrd"),
        "crfrefine.io.nrrd",
        {".nhdr": ".raw.gz"},
        misread_names=re.compile(r"\s|(?i:list)|(?s:.*[%:\0-\x1f\x7f])"),
    ),
    Format(
        "FreeSurfer MGH",
        (".mgz", ".mgh.gz", ".mgh"),
        "crfrefine.io.mgh",
        image_types=("uint8", "int16", "int32", "float32"),
    ),
    Format(ITK, (".gipl.gz", ".gipl", ".vtk", ".mrc"), "crfrefine.io.itk", is_read_only=True),
    Format("NumPy array", (".npz", ".npy"), "crfrefine.io.npz", holds_scores_alone=True),
)
FORMAT_OF_NAME = {known.name: known for known in FORMATS}
FORMAT_OF_SUFFIX = {suffix: known for known in FORMATS for suffix in known.suffixes}
SCORES_SUFFIXES = FORMAT_OF_NAME["NumPy array"].suffixes
VOLUME_SUFFIXES = tuple(suffix for suffix in FORMAT_OF_SUFFIX if suffix not in SCORES_SUFFIXES)
LOGITS_SUFFIXES = VOLUME_SUFFIXES + SCORES_SUFFIXES
# Suffixes of volumes that are written.
WRITTEN_SUFFIXES = tuple(
    suffix for suffix in VOLUME_SUFFIXES if not FORMAT_OF_SUFFIX[suffix].is_read_only
)
ALL_WRITTEN_SUFFIXES = WRITTEN_SUFFIXES + SCORES_SUFFIXES
# Suffixes of label maps that 3D Slicer saves beside an image of the same name.
LABELS_SUFFIXES = (".seg.nrrd",)


_ARRAY = (
    "save its array with numpy.savez_compressed('CASE.npz', logits=array), (label, z, y, x), "
    "or its image as NIfTI"
)
DICOM = ForeignKind(
    "a DICOM file: `crfrefine convert` makes NIfTI of a segmentation, or of the folder of a series",
    rb".{128}DICM",
)
STRUCTURES_ADVICE = (
    "make a mask of each structure on its series, with\n"
    "  plastimatch convert --input RTSTRUCT.dcm --referenced-ct SERIES --output-prefix FOLDER "
    "--prefix-format nii.gz\n"
    "  or dcmrtstruct2nii convert -r RTSTRUCT.dcm -d SERIES -o FOLDER"
)
STRUCTURES = ForeignKind(
    f"a DICOM RTSTRUCT, which holds contours and no voxels: {STRUCTURES_ADVICE}",
    rb".{128}DICM.{0,200}1\.2\.840\.10008\.5\.1\.4\.1\.1\.481\.3\0",
)
# The first kind whose beginning matches counts.
FOREIGN_KINDS: tuple[ForeignKind, ...] = (
    STRUCTURES,
    DICOM,
    ForeignKind("a MINC volume: convert it with mnc2nii IN.mnc OUT.nii", rb"CDF\x01"),
    ForeignKind(f"an HDF5 file (MINC?): {_ARRAY}", rb"\x89HDF\r\n\x1a\n"),
    ForeignKind(f"a file of PyTorch or a pickle: {_ARRAY}", rb".{0,247}/data\.pkl"),
    ForeignKind(
        "a picture: it has no voxel size and no place in the world; export the volume as NIfTI",
        rb"\x89PNG\r|\xff\xd8\xff|II\*\0|MM\0\*|GIF8",
    ),
    ForeignKind(
        "an archive: unpack it",
        rb"PK\x03\x04|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|.{257}ustar",
    ),
    ForeignKind(
        "a pointer of Git LFS in place of the data: fetch them with git lfs pull",
        rb"version https://git-lfs\.github\.com/",
        is_text=True,
    ),
    ForeignKind(
        "a pointer of git-annex in place of the data: fetch them with git annex get",
        rb"[./]*(?:\.git/)?annex/objects/",
        is_text=True,
    ),
    ForeignKind(
        "a web page, as failed downloads leave: download the file again, perhaps after logging in",
        rb"(?i)(?:\xef\xbb\xbf)?\s*(?:<!--.{0,2000}?-->\s*)?<(?:!doctype html|html|head|body)",
        is_text=True,
    ),
    ForeignKind(
        "XML, such as the error message of a server, or a surface: look at it with a text editor, "
        "and download the file again",
        rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|Error|[A-Za-z]+File\b)",
        is_text=True,
    ),
    ForeignKind(
        "JSON, such as the error message of a server: look at it with a text editor, and download "
        "the file again",
        rb"(?:\xef\xbb\xbf)?\s*[{\[]\s*[\"{}\[\]]",
        is_text=True,
    ),
)
# Those of the content of a file that is compressed with gzip.
PACKED_KINDS = (
    ForeignKind("compressed twice: unpack it once (gunzip)", GZIP_MAGIC),
    *[kind for kind in FOREIGN_KINDS if kind not in (STRUCTURES, DICOM)],
)
# It has no header, or a compressed one, and is known by its name.
HALF = ForeignKind(
    "half of an Analyze or NIfTI pair: put the header, NAME.hdr, beside the voxels, NAME.img",
    b"",
)
VOXEL_ENDINGS = (".raw", ".zraw", ".raw.gz", ".img", ".img.gz")
PACKED_HALF = r"\.(hdr|img)\.gz$"
