"""The options of `crfrefine convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from crfrefine.base.label_options import (
    Mapped,
    mapping_of,
)
from crfrefine.base.option import INPUT, OUTPUT, Option
from crfrefine.errors import InputError


def _parse_description(text: str) -> str:
    if 0 < len(text) <= 64:
        return text
    raise InputError("expected 1 to 64 characters")


@dataclass(frozen=True)
class ConversionOptions:
    """What `convert` makes of a file."""

    content: Annotated[
        str | None,
        Option(
            "--as",
            "What IN holds. Default: what its voxels look like.",
            choices=("image", "labels", "logits"),
            panel=INPUT,
        ),
    ] = None
    # "probabilities" by a softmax, "labels" by argmax
    to: Annotated[
        str | None,
        Option(
            "--to",
            "Kind of values to write. Default: the kind in IN.",
            choices=("logits", "probabilities", "labels"),
            panel=OUTPUT,
        ),
    ] = None
    like: Annotated[
        Path | None,
        Option(
            "--like",
            "Image whose geometry OUT gets, or a pattern of images; needed for .npz and DICOM.",
            "IMAGE",
            panel=INPUT,
        ),
    ] = None
    same_voxels: Annotated[
        bool,
        Option(
            "--same-voxels",
            "The voxels of IN are those of IMAGE, whatever its header says.",
            panel=INPUT,
        ),
    ] = False
    axes: Annotated[
        str | None,
        Option(
            "--axes",
            "How the axes x, y, z of an .npz or .npy run in the world of IMAGE, such as RAS or "
            "LPS; its sizes may be others.",
            "RAS",
            str.upper,
            panel=INPUT,
        ),
    ] = None
    align: Annotated[
        str | None,
        Option(
            "--align",
            "With --axes, of other sizes: first and last voxels are at those of IMAGE, or the "
            "field of view is that of IMAGE. Default: centers.",
            choices=("centers", "edges"),
            panel=INPUT,
        ),
    ] = None
    segments: Annotated[
        Path | None,
        Option(
            "--segments",
            "DICOM segmentation that was refined; OUT.dcm keeps its description of labels.",
            "SEG",
            panel=OUTPUT,
        ),
    ] = None
    # as in `InputOptions`
    mapped: tuple[Mapped, ...] = ()
    scale: float | None = None
    channel_labels: tuple[int, ...] | None = None
    suffix: Annotated[
        str | None,
        Option(
            "--output-format",
            "Of files in a folder OUT: their format, such as .nii.gz or .mha.",
            "SUFFIX",
            str.lower,
            panel=OUTPUT,
        ),
    ] = None
    series: Annotated[
        str | None,
        Option(
            "--series",
            "The series to take from a folder of DICOM that holds several.",
            "UID",
            panel=INPUT,
        ),
    ] = None
    series_number: Annotated[
        int | None,
        Option(
            "--series-number",
            "Number of the series OUT.dcm. Default: 100 times that of its images, and 1.",
            "N",
            limits=(0, (1 << 31) - 1),
            panel=OUTPUT,
        ),
    ] = None
    series_description: Annotated[
        str | None,
        Option(
            "--series-description",
            "Description of the series OUT.dcm, at most 64 characters.",
            "TEXT",
            _parse_description,
            panel=OUTPUT,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raise InputError for options that do not go together, whatever the files are."""
        if self.content == "image" and self.to is not None:
            raise InputError(f"an image does not become {self.to}; leave --as or --to out")
        if self.align is not None and self.axes is None:
            raise InputError("--align says how --axes places an array; leave it out")

    @property
    def mapping(self) -> dict[int, int]:
        """The new label of values in a label map; ConfigError if a value has two."""
        return mapping_of(self.mapped)
