"""DICOM series made with pydicom: a folder with a file per slice."""

import copy

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid


def slices(array, affine, *, slope=1.0, intercept=0.0):
    """Slices of an array (x, y, z) of stored integers, first to last; `affine` goes to RAS+."""
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    for number in range(array.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["1.2.3.4", str(number)])
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        found = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
        found.SOPClassUID = CTImageStorage
        found.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        found.PatientName = "Doe^Jane"
        found.PatientID = "id 1"
        found.PatientBirthDate = ""
        found.PatientSex = ""
        found.StudyInstanceUID = "1.2.3"
        found.SeriesInstanceUID = "1.2.3.4"
        found.FrameOfReferenceUID = "1.2.5"
        found.StudyDate = "20200102"
        found.StudyTime = "030405"
        found.StudyID = ""
        found.AccessionNumber = ""
        found.ReferringPhysicianName = ""
        found.SeriesNumber = 3
        found.SeriesDescription = "series 1.2.3.4"
        found.Modality = "CT"
        found.Manufacturer = ""
        found.PositionReferenceIndicator = ""
        found.InstanceNumber = number + 1
        found.Columns, found.Rows = array.shape[:2]
        found.ImageOrientationPatient = [
            round(float(v), 10) for v in (*lps[:3, 0] / spacing[0], *lps[:3, 1] / spacing[1])
        ]
        found.ImagePositionPatient = [
            round(float(v), 8) for v in lps[:3, :3] @ [0, 0, number] + lps[:3, 3]
        ]
        found.PixelSpacing = [round(float(spacing[axis]), 10) for axis in (1, 0)]
        found.SliceThickness = round(float(spacing[2]), 10)
        found.SamplesPerPixel = 1
        found.PhotometricInterpretation = "MONOCHROME2"
        found.BitsAllocated = found.BitsStored = 8 * array.dtype.itemsize
        found.HighBit = found.BitsStored - 1
        found.PixelRepresentation = int(array.dtype.kind == "i")
        found.RescaleSlope = slope
        found.RescaleIntercept = intercept
        found.PixelData = np.ascontiguousarray(array[:, :, number].T).tobytes()
        yield found


def save(folder, found):
    """Write the slices of a series under names that do not tell their order."""
    folder.mkdir(parents=True, exist_ok=True)
    files = list(found)
    for number, file in zip(np.random.default_rng(3).permutation(len(files)), files, strict=True):
        pydicom.dcmwrite(folder / f"IM{number:04d}.dcm", file, enforce_file_format=True)
    return folder


_GROUPS = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept"),
}


def enhanced(found):
    """One file of several frames made of slices, in their order; positions and scalings are the
    frames' own.
    """
    found = list(found)
    file = copy.deepcopy(found[0])
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = EnhancedMRImageStorage
    groups = []
    for number, one in enumerate(found, 1):
        group = {
            name: _dataset({keyword: one[keyword].value for keyword in keywords})
            for name, keywords in _GROUPS.items()
        }
        group["PixelValueTransformationSequence"].RescaleType = "US"
        group["FrameContentSequence"] = _dataset(
            {"StackID": "1", "InStackPositionNumber": number, "DimensionIndexValues": [1, number]}
        )
        groups.append(group)
    own = ("PlanePositionSequence", "PixelValueTransformationSequence", "FrameContentSequence")
    file.PerFrameFunctionalGroupsSequence = [
        _dataset({name: [item] for name, item in group.items() if name in own}) for group in groups
    ]
    file.SharedFunctionalGroupsSequence = [
        _dataset({name: [item] for name, item in groups[0].items() if name not in own})
    ]
    for keyword in (keyword for keywords in _GROUPS.values() for keyword in keywords):
        delattr(file, keyword)
    file.NumberOfFrames = len(found)
    file.PixelData = b"".join(one.PixelData for one in found)
    return file


def _dataset(values):
    found = Dataset()
    for keyword, value in values.items():
        setattr(found, keyword, value)
    return found
