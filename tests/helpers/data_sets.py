"""Small trees of public data sets, with the names that they have as downloaded.

A line of a tree is a file of each case: what it holds, and its path with parts of the case. A name
in parentheses stands for several, as `(ct|pt)`.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from crfrefine.cases.discovery import Sources
from crfrefine.cases.finding import find_cases
from crfrefine.io import read_header
from crfrefine.io.writing import write_image, write_label_map

PAGE = Path(__file__).parents[2] / "docs/guide/patterns.md"
SHAPE = (9, 7, 5)
SPACING = (1.0, 1.25, 2.5)
LABELS = ((np.indices(SHAPE)[0] > 4) * 2 + (np.indices(SHAPE)[1] > 4)).astype(np.uint8)


@dataclass(frozen=True)
class DataSet:
    """A public data set: `images` and `labels` are its patterns, as the guide has them."""

    parts: str  # the parts of the name of each case, such as HGG/pat1
    # Files by what they hold: i image, j image of another grid, c of two
    # channels, n of no case; l label map, m another one, k on the other grid,
    # b a structure, s of two channels; x an empty file.
    tree: str
    case: str = "{0}"  # its name by the pattern
    only: str = ""  # what the paths of the images that the pattern takes have in common

    def files(self):
        """Each file, with what it holds and its case."""
        for line in self.tree.split("\n"):
            if not line.strip():
                continue
            kind, path = line.split()
            for parts in self.parts.split():
                names = parts.split("/")
                for choice in itertools.product(*_choices(path.format(*names))):
                    yield "".join(choice), kind, self.case.format(*names)

    def cases(self):
        """The images and the label map of each case."""
        found = {}
        for path, kind, case in self.files():
            images, labels = found.setdefault(case, ([], []))
            if kind in "ijc" and re.search(self.only, path):
                images.append(path)
            elif kind in "lb":
                labels.append(path)
        return found

    def write(self, root):
        """Write the files of the tree."""
        rng = np.random.default_rng(3)
        for path, kind, _ in self.files():
            write(root / path, kind, rng)
        return root


def _choices(path):
    """The texts of each part of a path: one, or those in parentheses."""
    pieces = re.split(r"\(([^)]*)\)", path)
    return [piece.split("|") if number % 2 else [piece] for number, piece in enumerate(pieces)]


def write(path, kind, rng):
    """Write an image, of two channels or of another grid, or a label map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "x":
        path.touch()
        return
    spacing = SPACING
    values = (LABELS * 200 + rng.normal(0, 30, SHAPE)).astype(np.int16)
    if kind in "lmks":
        values = LABELS
    if kind == "b":
        values = (LABELS > 1).astype(np.uint8)
    if kind in "jk":
        values = values[:7, :5]
        spacing = (1.5, 2.0, 2.5)
    if kind in "cs":
        values = np.stack([values, values[::-1]], -1)
    image = nib.Nifti1Image(values, np.diag([*spacing, 1.0]))
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(image, path)
        return
    like = path.with_name("._like.nii")
    nib.save(image, like)
    header = read_header(like)
    if kind in "lmbk":
        write_label_map(path, values, header)
    else:
        write_image(path, values.dtype, header, lambda _, planes: values.T[np.newaxis, planes])
    like.unlink()


DATA_SETS = {
    "BraTS 2015": DataSet(
        "HGG/brats_2013_pat0001_1/545 HGG/brats_tcia_pat117_0001/351 LGG/brats_2013_pat0008_1/5",
        """
        i {0}/{1}/VSD.Brain.XX.O.MR_Flair.{2}12/VSD.Brain.XX.O.MR_Flair.{2}12.mha
        i {0}/{1}/VSD.Brain.XX.O.MR_T1.{2}13/VSD.Brain.XX.O.MR_T1.{2}13.mha
        i {0}/{1}/VSD.Brain.XX.O.MR_T1c.{2}14/VSD.Brain.XX.O.MR_T1c.{2}14.mha
        i {0}/{1}/VSD.Brain.XX.O.MR_T2.{2}15/VSD.Brain.XX.O.MR_T2.{2}15.mha
        l {0}/{1}/VSD.Brain_3more.XX.O.OT.{2}17/VSD.Brain_3more.XX.O.OT.{2}17.mha
        """,
        "{1}",
    ),
    "BraTS 2017 to 2019": DataSet(
        "HGG/Brats18_2013_2_1 HGG/Brats18_CBICA_AAB_1 LGG/Brats18_2013_0_1",
        """
        i {0}/{1}/{1}_(flair|t1|t1ce|t2).nii.gz
        l {0}/{1}/{1}_seg.nii.gz
        """,
        "{1}",
    ),
    "BraTS 2020, 2021": DataSet(
        "BraTS2021_00000 BraTS2021_00002",
        """
        i {0}/{0}_(flair|t1|t1ce|t2).nii.gz
        l {0}/{0}_seg.nii.gz
        """,
    ),
    "BraTS 2023, 2024": DataSet(
        "BraTS-GLI-00000-000 BraTS-GLI-00002-000",
        """
        i {0}/{0}-(t1c|t1n|t2f|t2w).nii.gz
        l {0}/{0}-seg.nii.gz
        """,
    ),
    "KiTS": DataSet(
        "case_00000 case_00001",
        """
        i {0}/imaging.nii.gz
        l {0}/segmentation.nii.gz
        """,
    ),
    "LiTS": DataSet(
        "0 10 2",
        """
        i volume-{0}.nii
        l segmentation-{0}.nii
        """,
    ),
    "AMOS": DataSet(
        "amos_0001 amos_0004",
        """
        i imagesTr/{0}.nii.gz
        l labelsTr/{0}.nii.gz
        """,
    ),
    "FLARE": DataSet(
        "train_000 train_001",
        """
        i TrainingImg/{0}_0000.nii.gz
        l TrainingMask/{0}.nii.gz
        """,
    ),
    "Medical Segmentation Decathlon": DataSet(
        "prostate_00 prostate_01",
        """
        c imagesTr/{0}.nii.gz
        l labelsTr/{0}.nii.gz
        x imagesTr/._{0}.nii.gz
        """,
    ),
    "ACDC": DataSet(
        "patient001/01 patient001/12 patient002/01 patient002/12",
        """
        i {0}/{0}_frame{1}.nii.gz
        l {0}/{0}_frame{1}_gt.nii.gz
        c {0}/{0}_4d.nii.gz
        """,
        "{0}_frame{1}",
        "frame",
    ),
    "M&Ms": DataSet(
        "A0S9V9/frame01 A0S9V9/frame13 B1G9J3/frame01 B1G9J3/frame09",
        """
        i frames/{0}_sa_{1}.nii.gz
        l frames/{0}_sa_gt_{1}.nii.gz
        """,
        "{0}_{1}",
    ),
    "M&Ms, 4-D": DataSet(
        "A0S9V9 B1G9J3",
        """
        c {0}/{0}_sa.nii.gz
        s {0}/{0}_sa_gt.nii.gz
        """,
    ),
    "M&Ms-2": DataSet(
        "001/ED 001/ES 002/ED 002/ES",
        """
        i {0}/{0}_SA_{1}.nii.gz
        l {0}/{0}_SA_{1}_gt.nii.gz
        j {0}/{0}_LA_{1}.nii.gz
        k {0}/{0}_LA_{1}_gt.nii.gz
        c {0}/{0}_(SA|LA)_CINE.nii.gz
        """,
        "{0}_SA_{1}",
        "SA_E.[.]",
    ),
    "EMIDEC": DataSet(
        "Case_N006 Case_P001",
        """
        i {0}/Images/{0}.nii.gz
        l {0}/Contours/{0}.nii.gz
        """,
    ),
    "LASC'18": DataSet(
        "4URSJYI2QUH1T5S5PP47 08DZAWSZ5S3W2F6EYCW1",
        """
        i {0}/lgemri.nrrd
        l {0}/laendo.nrrd
        """,
    ),
    "MM-WHS": DataSet(
        "ct_train_1001 ct_train_1002 ct_train_1003",
        """
        i ct_train/{0}_image.nii.gz
        l ct_train/{0}_label.nii.gz
        """,
    ),
    "MyoPS": DataSet(
        "myops_training_101 myops_training_102 myops_training_103",
        """
        i train25/{0}_(C0|DE|T2).nii.gz
        l train25_myops_gd/{0}_gd.nii.gz
        """,
    ),
    "HECKTOR": DataSet(
        "CHUM-001 MDA-002 CHUP-010",
        """
        i imagesTr/{0}__CT.nii.gz
        j imagesTr/{0}__PT.nii.gz
        l labelsTr/{0}.nii.gz
        """,
    ),
    "autoPET": DataSet(
        "PETCT_0011f3deaf/03-23-2003-NA-GK-94826 PETCT_01140d52d8/08-13-2005-NA-GK-56839",
        """
        i {0}/{1}/(CTres|SUV|PET).nii.gz
        j {0}/{1}/CT.nii.gz
        l {0}/{1}/SEG.nii.gz
        """,
        "{1}",
        "CTres|SUV",
    ),
    "ISLES'22": DataSet(
        "sub-strokecase0001 sub-strokecase0002",
        """
        i {0}/ses-0001/dwi/{0}_ses-0001_(adc|dwi).nii.gz
        j {0}/ses-0001/anat/{0}_ses-0001_FLAIR.nii.gz
        l derivatives/{0}/ses-0001/{0}_ses-0001_msk.nii.gz
        """,
        "{0}_ses-0001",
        "dwi/",
    ),
    "ATLAS 2": DataSet(
        "R001/sub-r001s001 R001/sub-r001s002 R002/sub-r002s001",
        """
        i {0}/{1}/ses-1/anat/{1}_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz
        l {0}/{1}/ses-1/anat/{1}_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz
        """,
        "{1}_ses-1",
    ),
    "WMH": DataSet(
        "Utrecht/0 Utrecht/2 Singapore/50",
        """
        i {0}/{1}/pre/(FLAIR|T1).nii.gz
        i {0}/{1}/orig/FLAIR.nii.gz
        j {0}/{1}/orig/(T1|3DT1).nii.gz
        l {0}/{1}/wmh.nii.gz
        """,
        "{0}_{1}",
        "pre/",
    ),
    "LUMIERE": DataSet(
        "Patient-001/week-000-1 Patient-001/week-044 Patient-002/week-000-1 Patient-002/week-047",
        """
        i Imaging/{0}/{1}/(CT1|FLAIR|T1|T2).nii.gz
        l Imaging/{0}/{1}/HD-GLIO-AUTO-segmentation/native/segmentation_CT1_origspace.nii.gz
        """,
        "{0}_{1}",
    ),
    "MSLesSeg": DataSet(
        "P1/T1 P1/T2 P2/T1",
        """
        i {0}/{1}/{0}_{1}_(FLAIR|T1|T2).nii.gz
        l {0}/{1}/{0}_{1}_MASK.nii.gz
        """,
        "{0}_{1}",
    ),
    "PI-CAI": DataSet(
        "10000/1000000 10001/1000001 10005/1000005",
        """
        i images/{0}/{0}_{1}_t2w.mha
        j images/{0}/{0}_{1}_(adc|hbv).mha
        l picai_labels/csPCa_lesion_delineations/human_expert/resampled/{0}_{1}.nii.gz
        """,
        "{0}_{1}",
    ),
    "Prostate158": DataSet(
        "020 021 024",
        """
        i train/{0}/(adc|dwi|t2).nii.gz
        l train/{0}/t2_anatomy_reader1.nii.gz
        m train/{0}/adc_tumor_reader1.nii.gz
        """,
    ),
    "PROMISE12": DataSet(
        "Case00 Case01",
        """
        i {0}.mhd
        l {0}_segmentation.mhd
        """,
    ),
    "LUNA16": DataSet(
        "0/1.3.6.1.4.1.14519.105 0/1.3.6.1.4.1.14519.128 1/1.3.6.1.4.1.14519.979",
        """
        i subset{0}/{1}.mhd
        l seg-lungs-LUNA16/{1}.mhd
        """,
        "{1}",
    ),
    "SPIDER": DataSet(
        "1_t1 1_t2 1_t2_SPACE 2_t1 2_t2",
        """
        i images/{0}.mha
        l masks/{0}.mha
        """,
    ),
    "VerSe": DataSet(
        "sub-verse004 sub-verse005 sub-gl003_dir-ax",
        """
        i rawdata/{0}/{0}_ct.nii.gz
        l derivatives/{0}/{0}_seg-vert_msk.nii.gz
        """,
    ),
    "CrossMoDA": DataSet(
        "1 2 10",
        """
        i source_training/crossmoda_{0}_ceT1.nii.gz
        l source_training/crossmoda_{0}_Label.nii.gz
        n target_training/crossmoda_10{0}_hrT2.nii.gz
        """,
        "crossmoda_{0}",
    ),
    "CURVAS": DataSet(
        "UKCHLL001 UKCHLL002",
        """
        i {0}/image.nii.gz
        l {0}/annotation_1.nii.gz
        m {0}/annotation_(2|3).nii.gz
        """,
    ),
    "PANTHER": DataSet(
        "10000_0001 10003_0001",
        """
        i ImagesTr/{0}_0000.mha
        l LabelsTr/{0}.mha
        """,
    ),
    "TotalSegmentator": DataSet(
        "s0001 s0002",
        """
        i {0}/ct.nii.gz
        b {0}/segmentations/(liver|spleen).nii.gz
        """,
    ),
    "FreeSurfer subjects": DataSet(
        "bert ernie",
        """
        i {0}/mri/(T1|brain|norm|orig).mgz
        j {0}/mri/orig/001.mgz
        l {0}/mri/aseg.mgz
        m {0}/mri/(aparc+aseg|ribbon).mgz
        """,
        only="/T1",
    ),
    "IXI": DataSet(
        "IXI002-Guys-0828 IXI012-HH-1211",
        """
        i IXI-T1/{0}-T1.nii.gz
        i IXI-T2/{0}-T2.nii.gz
        """,
    ),
    "BIDS": DataSet(
        "sub-01 sub-02",
        """
        i {0}/anat/{0}_(FLAIR|T1w).nii.gz
        l derivatives/net/{0}/anat/{0}_dseg.nii.gz
        """,
    ),
    "BIDS with sessions": DataSet(
        "sub-01/ses-01 sub-01/ses-02 sub-02/ses-01",
        """
        i {0}/{1}/anat/{0}_{1}_(FLAIR|T1w).nii.gz
        l derivatives/net/{0}/{1}/anat/{0}_{1}_dseg.nii.gz
        """,
        "{0}_{1}",
    ),
    "nnU-Net": DataSet(
        "h_001 h_002",
        """
        i imagesTr/{0}_(0000|0001).nii.gz
        l labelsTr/{0}.nii.gz
        """,
    ),
    "MONAI's `SaveImage`": DataSet(
        "p0 p1",
        """
        i images/{0}.nii.gz
        l out/{0}/{0}_trans.nii.gz
        """,
    ),
    "MONAI's `SaveImage` of CASE_0000": DataSet(
        "p0 p1",
        """
        i images/{0}_0000.nii.gz
        l out/{0}_0000/{0}_0000_trans.nii.gz
        """,
    ),
}


def patterns():
    """The patterns of images and labels of each data set of the guide, "" for none."""
    table = PAGE.read_text(encoding="utf-8").partition("## Public data sets")[2]
    found = {}
    for line in table.partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.removesuffix("|").removeprefix("|").split(" | ")]
        if len(cells) == 3 and cells[0] not in ("data set", "---"):
            name = re.split(", with |, 4-D", cells[0])[0]
            found[name] = tuple(_first_pattern(cell) for cell in cells[1:])
    return found


def _first_pattern(cell):
    code = re.search(r"`([^`]*\{case[^`]*)`", cell)
    return code[1] if code else ""


def found_cases(images=(), network=(), masks=None, labels=None, **options):
    """The cases of sources, each a path or a list of paths; with labels, each case needs them."""
    sources = [images, network or ()]
    lists = [[source] if isinstance(source, Path) else source for source in sources]
    needs_all = options.pop("include_imageless", labels is not None)
    return find_cases(Sources(*lists, masks, labels, needs_all=needs_all, **options))
