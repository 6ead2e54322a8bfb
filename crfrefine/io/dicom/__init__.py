"""Series and segmentations of DICOM, read and written by pydicom and highdicom.

Decoders need limits of time and memory on damaged files: commands import this package in a process
of its own (`crfrefine.convert.dicom`). Importing highdicom takes as long as all else of it: what
does not need highdicom does without, and `writing` is not imported here.
"""

from crfrefine.io.dicom.description import describe
from crfrefine.io.dicom.segmentation import SEGMENTATION, list_segments, read, read_segments
from crfrefine.io.dicom.series import Series

__all__ = ["SEGMENTATION", "Series", "describe", "list_segments", "read"]
__all__ += ["read_segments"]
