"""Layouts of public data sets.

Of each: the patterns of its images and of its labels, and the files of its cases.
"""


def brats(mark, label):
    cases = {}
    for case in ("B_1", "B_2"):
        images = [f"{case}/{case}{mark}{modality}.nii.gz" for modality in ("flair", "t1", "t1ce")]
        cases[case] = (images, f"{case}/{case}{mark}{label}.nii.gz")
    return cases


TOTAL = {
    f"s000{n}": ([f"s000{n}/ct.nii.gz"], f"s000{n}/segmentations/liver.nii.gz") for n in (1, 2)
}
LAYOUTS = {
    "BraTS 2021": (
        "{case}/{case}_{modality}.nii.gz",
        "{case}/{case}_seg.nii.gz",
        brats("_", "seg"),
    ),
    "BraTS 2023": (
        "{case}/{case}-{modality}.nii.gz",
        "{case}/{case}-seg.nii.gz",
        brats("-", "seg"),
    ),
    "KiTS": (
        "{case}/imaging.nii.gz",
        "{case}/segmentation.nii.gz",
        {
            f"case_0000{n}": ([f"case_0000{n}/imaging.nii.gz"], f"case_0000{n}/segmentation.nii.gz")
            for n in (0, 1)
        },
    ),
    "LiTS": (
        "volume-{case}.nii",
        "segmentation-{case}.nii",
        {str(n): ([f"volume-{n}.nii"], f"segmentation-{n}.nii") for n in (0, 10)},
    ),
    "ACDC": (
        "*/{case:*_frame??}.nii.gz",
        "*/{case}_gt.nii.gz",
        {
            "p1_frame01": (["p1/p1_frame01.nii.gz"], "p1/p1_frame01_gt.nii.gz"),
            "p1_frame12": (["p1/p1_frame12.nii.gz"], "p1/p1_frame12_gt.nii.gz"),
            "p2_frame01": (["p2/p2_frame01.nii.gz"], "p2/p2_frame01_gt.nii.gz"),
        },
    ),
    "MSD": (
        "imagesTr/{case}.nii.gz",
        "labelsTr/{case}.nii.gz",
        {f"la_00{n}": ([f"imagesTr/la_00{n}.nii.gz"], f"labelsTr/la_00{n}.nii.gz") for n in (3, 4)},
    ),
    "AMOS": (
        "imagesTr/amos_{case}.nii.gz",
        "labelsTr/amos_{case}.nii.gz",
        {"0001": (["imagesTr/amos_0001.nii.gz"], "labelsTr/amos_0001.nii.gz")},
    ),
    "PROMISE12": (
        "{case}.mhd",
        "{case}_segmentation.mhd",
        {f"Case0{n}": ([f"Case0{n}.mhd"], f"Case0{n}_segmentation.mhd") for n in (0, 1)},
    ),
    "BIDS": (
        "{case}/anat/{case}_T1w.nii.gz",
        "derivatives/net/{case}/anat/{case}_dseg.nii.gz",
        {
            f"sub-0{n}": (
                [f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz"],
                f"derivatives/net/sub-0{n}/anat/sub-0{n}_dseg.nii.gz",
            )
            for n in (1, 2)
        },
    ),
    "TotalSegmentator": ("{case}/ct.nii.gz", "{case}/segmentations/liver.nii.gz", TOTAL),
    "MONAI": (
        "images/{case}.nii.gz",
        "out/{case}/{case}_trans.nii.gz",
        {f"p{n}": ([f"images/p{n}.nii.gz"], f"out/p{n}/p{n}_trans.nii.gz") for n in (0, 1)},
    ),
    "nnU-Net": (
        "imagesTr/{case}_{modality}.nii.gz",
        "labelsTr/{case}.nii.gz",
        {
            f"h_{n}": (
                [f"imagesTr/h_{n}_0000.nii.gz", f"imagesTr/h_{n}_0001.nii.gz"],
                f"labelsTr/h_{n}.nii.gz",
            )
            for n in (1, 2)
        },
    ),
}
# Files beside them that are of no case.
BESIDE = {
    "ACDC": ["p1/p1_4d.nii.gz", "p2/p2_4d.nii.gz"],
    "MSD": ["imagesTr/._x.nii.gz"],
}
