"""DICOM segmentations with all that other programs write into them, by highdicom."""

import highdicom as hd
import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from crfrefine import io


def coded(value, meaning, scheme="SCT"):
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def described_segmentation(series, path, labels, *, algorithm="Drawn", number=7):
    """Write a segmentation (x, y, z) of two segments, of which the first says all that a segment can say."""
    sources = [pydicom.dcmread(one.path) for one in io.read_header(series).template.slices]
    pixels = labels.transpose(2, 1, 0).astype(np.uint8)
    identified = None
    if algorithm is not None:
        identified = hd.AlgorithmIdentificationSequence(algorithm, codes.cid7162.ArtificialIntelligence, "9.1", "a source")
    kind = "MANUAL" if algorithm is None else "AUTOMATIC"
    described = [
        hd.seg.SegmentDescription(
            one, f"name {one}", codes.SCT.Organ, codes.SCT.Kidney, kind, identified, "1.2.826.0.1.3680043.1", f"lesion {one}"
        )
        for one in (1, 2)
    ]
    found = hd.seg.Segmentation(
        sources, pixels, "BINARY", described, hd.UID(), number, hd.UID(), 1, "m", "n", "1", "0", series_description="Kidneys",
        content_label="READER_2", content_description="second reading", content_creator_name="Roe^Ann",
    )  # fmt: skip
    first = found.SegmentSequence[0]
    first.SegmentDescription = "seen in two planes"
    first.RecommendedDisplayCIELabValue = [43803, 26565, 37722]
    first.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [coded("7771000", "Left")]
    region, other = coded("818981001", "Abdomen"), coded("51185008", "Chest")
    region.AnatomicRegionModifierSequence = [coded("49370004", "Lateral")]
    first.AnatomicRegionSequence = [region, other]
    first.PrimaryAnatomicStructureSequence = [coded("64033007", "Kidney")]
    block = first.private_block(0x0063, "A READER", create=True)
    block.add_new(0x01, "LO", "private words")
    found.save_as(path)
    return path
