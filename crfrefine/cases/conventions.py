"""The names that the files of a case may have: a table of patterns.

For other names, users give a pattern instead of the folder. A further name goes into a line of
its `Kind`. The word at the end of a name such as `{case}_seg` goes into one of the lists of words:
`OTHER_WORDS` is made of all of them, and `OTHERS` of those of labels and scores, so that no other
kind takes such a file for its own.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from crfrefine.io.formats import LOGITS_SUFFIXES, SCORES_SUFFIXES, VOLUME_SUFFIXES

# nnU-Net's names of images, one file per modality
NUMBERED = "{case}_{modality:[0-9][0-9][0-9][0-9]}"
VALIDATED = "fold_{label}/validation/{case}"  # in the folder of its trained network
IMAGE = "{case}"

LABEL_WORDS = ("segmentation", "seg", "dseg", "label", "labels", "gt")
MASK_WORDS = ("mask", "brainmask")
SCORE_WORDS = ("logits", "probabilities", "probseg", "softmax")
# Words in names of files that are no images.
OTHER_WORDS = (*LABEL_WORDS, *MASK_WORDS, *SCORE_WORDS, "lab", "roi", "truth", "segmentations")
# Names of images in folders that structures cannot have; a label map is beside them.
IMAGE_WORDS = ("ct", "mri", "image", "imaging", "img", "volume", "t1", "t2", "flair")
_LABELED = f"{{case}}_{{{','.join(LABEL_WORDS)}}}"
SCORED = f"{{case}}_{{{','.join(SCORE_WORDS)}}}"
_NUMBER = "[0-9],[0-9][0-9],[0-9][0-9][0-9],[0-9][0-9][0-9][0-9]"
_PER_LABEL = f"{{case}}_{{ProbMapClass,ProbMapClass_,label,label_,class,class_}}{{label:{_NUMBER}}}"
# Names that count for whole folders: the only file, as MONAI's SaveImage writes it; and several,
# and all begin with the case.
ALONE = "{case}/{case}*"
ALONE_NUMBERED = "{case}_0000/{case}_0000*"  # of images with nnU-Net's number
OF_CASE = "{case}/{case}_{label}"


class Kind(NamedTuple):
    """A kind of files of a case, and their names in a folder."""

    what: str  # for messages: "no logits in study/logits"
    # The best names first: of a case, the first line that has a file of it counts. Two files of
    # this line are an error, unless they are strokes, or of different modalities or labels. If a
    # file has different cases by two names, that of a name with `_` counts.
    names: tuple[tuple[str, ...], ...]
    suffixes: tuple[str, ...] = VOLUME_SUFFIXES
    one_file: str = ""  # the files of a case, for messages; "" means "one file of" and `what`
    parts: tuple[str, ...] = ("case",)  # of a pattern instead of the folder
    expected: str = "CASE.nii.gz or the like"  # of a case without a file
    field: str = "network"  # of `CaseFiles`
    is_optional: bool = False  # whether a case may lack it
    strays: str = ""  # a note's word for files of no case; "" means no note


# Any name, which may end in nnU-Net's number of a modality; else as in TotalSegmentator's data.
IMAGES = Kind(
    "image",
    ((IMAGE,), ("{case}/{ct,mri}",)),
    one_file="one image, or one file per numbered modality",
    parts=("case", "modality"),
    expected=f"CASE or CASE_0000 with one of {', '.join(VOLUME_SUFFIXES)}",
)
LOGITS = Kind(
    "logits",
    ((SCORED, "{case}.npz", "{case}.npy"), ("{case}",), (_PER_LABEL,), (ALONE, ALONE_NUMBERED)),
    LOGITS_SUFFIXES,
    parts=("case", "label"),
    expected=(
        "CASE.nii.gz, CASE.npz or the like; label maps and structures need --input-type labels"
    ),
    strays="logits",
)
# as `nnUNetv2_predict --save_probabilities` writes them
ARCHIVES = Kind(
    "CASE.npz",
    (("{case}",),),
    SCORES_SUFFIXES,
    "one file of probabilities",
    expected="the output of nnUNetv2_predict ... --save_probabilities",
    strays="probabilities",
)
LABELS = Kind(  # a reference
    "labels",
    ((_LABELED, "{case}.seg.nrrd"), ("{case}",), (ALONE, ALONE_NUMBERED)),
    one_file="one label map",
    field="labels",
)
# Structures in the folder of one case, the best names first.
STRUCTURES = ("segmentations/{label}", "{label}")
# A network's label map, or one binary file per structure: in a folder as in TotalSegmentator's
# data sets, or in that of the case.
LABEL_MAP = Kind(
    "label map",
    (
        *LABELS.names[:-1],
        ("{case}/segmentations/{label}",),
        (ALONE, ALONE_NUMBERED),
        (OF_CASE,),
        ("{case}/{label}",),
    ),
    one_file="one label map",
    parts=("case", "label"),
    expected="CASE.nii.gz or the like, or a folder CASE with one file per structure",
    strays="label maps",
)
OPTIONAL_LABELS = LABELS._replace(is_optional=True)
MASK = Kind(
    "mask",
    ((f"{{case}}_{{{','.join(MASK_WORDS)}}}",), ("{case}.seg.nrrd",), ("{case}",)),
    field="mask",
)
STROKES = Kind(
    "strokes",
    (("{case}", "{case}_{strokes,scribbles}"),),
    field="strokes",
    is_optional=True,
)
# A case may have several files of probabilities with the same content, from `infer` and nnU-Net.
# Those of `infer` belong to its label map; an .npz of the same name may be its input.
CALIBRATION = Kind(
    "probabilities",
    (
        ("{case}_probabilities",),
        ("{case}.npz", "{case}.npy"),
        ("{case}_probseg",),
        ("{case}_softmax",),
        ("{case}_logits",),
    ),
    LOGITS_SUFFIXES,
    is_optional=True,
)
# A method's label maps or probabilities, to tell its cases.
PREDICTION = Kind("prediction", (LABELS.names[0], *LOGITS.names), LOGITS_SUFFIXES)
# Names of files that belong to a case, though they are of another kind.
OTHERS = (NUMBERED, SCORED, _PER_LABEL, _LABELED)


def without_word(name: str, words: Collection[str]) -> str:
    """Return a name without `_` and one of some words at its end, such as `_seg`."""
    start, _, word = name.rpartition("_")
    return start if start and word in words else name


# The folders of a data set by the kind of their files; the first that is there counts.
DATASET_FOLDERS = {
    "images": ("images", "imagesTr", "imagesTs"),
    "labels": ("labels", "labelsTr", "labelsTs"),
    "logits": ("logits",),
    "masks": ("masks",),
}
# Folders and files of nnU-Net's data sets, each with the environment variable of the folder of all
# data sets; the first that is there counts.
OF_NNUNET = {
    "images": (("nnUNet_raw", "imagesTr"),),
    "labels": (("nnUNet_raw", "labelsTr"), ("nnUNet_preprocessed", "gt_segmentations")),
    "splits": (("nnUNet_preprocessed", "splits_final.json"),),
}


def find_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of a data set by the kind of their files."""
    places: dict[str, Path] = {}
    for kind, names in DATASET_FOLDERS.items():
        for name in names:
            if (folder / name).is_dir():
                places.setdefault(kind, folder / name)
    if "images" in places and labels_beside(places["images"]).is_dir():
        places["labels"] = labels_beside(places["images"])
    return places


def labels_beside(images: Path) -> Path:
    """Return the folder of the labels of images: of imagesTs, it is labelsTs."""
    return images.with_name(images.name.replace("images", "labels"))
