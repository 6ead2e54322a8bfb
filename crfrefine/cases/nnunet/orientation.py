"""The one reader of nnU-Net whose probabilities are not on the image's voxel axes."""

from __future__ import annotations

from dataclasses import replace

from crfrefine.cases.case_files import CaseFiles
from crfrefine.errors import CrfRefineError
from crfrefine.io import read_header

_REORIENTING = "NibabelIOWithReorient"


def check_orientation(case: CaseFiles, reader: str | None) -> CaseFiles:
    """Return the case, with a `problem` if its probabilities have other voxel axes than its image.

    The reader turns images to RAS+; label maps are turned back when they are written, probabilities are not.
    """
    if reader != _REORIENTING or case.problem or not case.images:
        return case
    try:
        orientation = read_header(case.images[0]).orientation
    except CrfRefineError:
        return case  # reading the case reports it
    if orientation == "RAS":
        return case
    return replace(
        case,
        problem=(
            f"case {case.case_id!r}: {case.logits[0]} has voxel axes toward RAS, but {case.images[0]} toward {orientation}: the plans use "
            f"{_REORIENTING}, which turns images and does not turn probabilities back\n"
            "  Give images turned to RAS with -i, such as those of nibabel.as_closest_canonical."
        ),
    )
