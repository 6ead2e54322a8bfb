"""Patient, study and frame of reference of a DICOM file. The files of one case must agree; other modules read the files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from crfrefine.base.text import shorten
from crfrefine.errors import InputError

OPTION = "--allow-mismatched-dicom"

KEYWORDS = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")
"""The most harmful difference first."""

_NAMES = ("patients", "studies", "frames of reference")


@dataclass(frozen=True)
class DicomIdentity:
    """Patient, study and frame of reference of a file; "" where it does not name them, as after de-identification."""

    patient: str = ""  # PatientID
    study: str = ""  # StudyInstanceUID
    frame: str = ""  # FrameOfReferenceUID

    @property
    def values(self) -> tuple[str, str, str]:
        """In the order of `KEYWORDS`."""
        return self.patient, self.study, self.frame

    @property
    def details(self) -> tuple[tuple[str, str], ...]:
        """Pairs of name and value to show."""
        return tuple(
            (name, shorten(value or "not given")) for name, value in zip(("patient", "study", "frame of ref"), self.values, strict=True)
        )


class IdentifiedFile(Protocol):
    """The fields of a header that are needed here; only DICOM files have an identity."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def identity(self) -> DicomIdentity | None:
        """Whose it is."""
        ...


def identity_of(dataset: Any) -> DicomIdentity:
    """Return the identity that a data set of pydicom gives."""
    return DicomIdentity(*(str(dataset.get(keyword) or "").strip() for keyword in KEYWORDS))


def differences(one: DicomIdentity | None, other: DicomIdentity | None) -> list[str]:
    """Return the keywords whose values differ; a value that one of both lacks is no difference, nor is another format (None)."""
    if one is None or other is None:
        return []
    pairs = zip(KEYWORDS, one.values, other.values, strict=True)
    return [keyword for keyword, value, others in pairs if value and others and value != others]


def require_same_identity(headers: Iterable[IdentifiedFile | None], *, allow: bool = False, case_id: str | None = None) -> list[str]:
    """Check that the DICOM files among those of a case are of one patient, one study and one frame of reference.

    Args:
        headers: of all files that are used together; those of other formats say nothing.
        allow: accept different studies and frames of reference of one patient.
        case_id: for the error.

    Returns:
        With `allow`, a sentence about each file that differs.

    Raises:
        InputError: two files differ.
    """
    known: list[tuple[IdentifiedFile, DicomIdentity]] = []
    notes: list[str] = []
    for header in headers:
        if header is None or header.identity is None:
            continue
        # All pairs are compared: the first file may lack a field in which the second and the third differ.
        told = ""
        for earlier, identity in known:
            found = differences(identity, header.identity)
            if found and (not allow or found[0] == KEYWORDS[0]):
                raise _mismatch(earlier, header, found, case_id)
            if found and not told:
                what = " and ".join(_NAMES[KEYWORDS.index(keyword)] for keyword in found)
                told = f"{earlier.path.name} and {header.path.name} are of different {what}, which {OPTION} accepts"
        notes += [told] if told else []
        known.append((header, header.identity))
    return notes


def describe_mismatch(headers: Iterable[IdentifiedFile], *, allow: bool) -> str:
    """Return what two of the files differ in, with their paths; "" if they can be of one case, as for `require_same_identity`."""
    try:
        require_same_identity(headers, allow=allow)
    except InputError as error:
        return str(error)
    return ""


def _mismatch(one: IdentifiedFile, other: IdentifiedFile, found: list[str], case_id: str | None) -> InputError:
    width = max(len(str(header.path)) for header in (one, other))
    lines = [f"  {header.path!s:<{width}}  {_shown(header.identity, found)}" for header in (one, other)]
    where = "" if case_id is None else f"case {case_id!r}: "
    if found[0] == KEYWORDS[0]:
        way_out = (
            "Files of two patients cannot be used together. If both are of one patient, correct PatientID, or convert the segmentation to "
            "a format without patients, such as .nii.gz."
        )
    else:
        way_out = f"If the files show the same anatomy at the same place, give {OPTION}."
    what = _NAMES[KEYWORDS.index(found[0])]
    return InputError("\n".join([f"{where}DICOM files of different {what}", *lines, f"  {way_out}"]))


def _shown(identity: DicomIdentity | None, keywords: list[str]) -> str:
    assert identity is not None
    return ", ".join(
        f"{keyword} {shorten(value)!r}" for keyword, value in zip(KEYWORDS, identity.values, strict=True) if keyword in keywords
    )
