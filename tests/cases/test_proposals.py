"""Proposals of patterns for a folder: what they take, and when there is none."""

import re
from pathlib import Path

import pytest
from cli_helpers import run_here
from data_sets import DataSet, found_cases

from crfrefine.cases.proposals import find_proposals, propose
from crfrefine.cases.tree import Tree
from crfrefine.info.folders import inspect_folder

# The parts of the names of cases, the files, and the patterns of images and of label maps.
TREES = {
    "a label map by another word": (
        "c1 c2",
        "i {0}/(t1|t2).nii.gz\nl {0}/lesion.nii.gz",
        ("{case}/{modality:t1,t2}.nii.gz", "{case}/lesion.nii.gz"),
    ),
    "side by side": (
        "1 2 10",
        "i subject-{0}-T1.nii\ni subject-{0}-T2.nii\nl subject-{0}-truth2.nii",
        ("{case}-{modality:T1,T2}.nii", "{case}-truth2.nii"),
    ),
    "a brain mask beside them": (
        "pat0001_1 pat0002_1",
        "i {0}/(Flair|T1|T1c)_sub.nii.gz\nl {0}/OTMultiClass.nii.gz\nm {0}/brainmask.nii.gz",
        ("{case}/{modality}_sub.nii.gz", "{case}/OTMultiClass.nii.gz"),
    ),
    "the image's name without an ending": (
        "c1 c2",
        "i {0}/{0}.nii.gz\nl {0}/{0}_tumor.nii.gz",
        ("{case}/{case}.nii.gz", "{case}/{case}_tumor.nii.gz"),
    ),
    "the label map of one modality": (
        "CHGJ007 CHUM010",
        "i hecktor_nii/{0}_(ct|pt).nii.gz\nl hecktor_nii/{0}_ct_gtvt.nii.gz",
        ("hecktor_nii/{case}_{modality:ct,pt}.nii.gz", "hecktor_nii/{case}_ct_gtvt.nii.gz"),
    ),
    "numbers after words": (
        "0001 0002 0003",
        "i img/img{0}.nii.gz\nl label/label{0}.nii.gz",
        ("img/img{case}.nii.gz", "label/label{case}.nii.gz"),
    ),
    "names after words, in groups": (
        "P001 P002",
        "i volumes/train/vol_{0}.nii.gz\nl delineations/train/del_{0}.nii.gz",
        ("volumes/train/vol_{case}.nii.gz", "delineations/train/del_{case}.nii.gz"),
    ),
    "dots within names": (
        "sub_01 sub_02",
        "i {0}.ct.nii.gz\nl {0}.liver-mask.nii.gz",
        ("{case}.ct.nii.gz", "{case}.liver-mask.nii.gz"),
    ),
    "groups of cases": (
        "ct/1001 ct/1002 mr/1001",
        "i {0}_train/{0}_{1}_image.nii.gz\nl {0}_train/{0}_{1}_label.nii.gz",
        ("*/{case}_image.nii.gz", "*/{case}_label.nii.gz"),
    ),
    "folders of the same name": (
        "Utrecht/0 Utrecht/1 Singapore/0",
        "i {0}/{1}/pre/(FLAIR|T1).nii.gz\nl {0}/{1}/wmh.nii.gz",
        ("{case}/{case}/pre/{modality}.nii.gz", "{case}/{case}/wmh.nii.gz"),
    ),
    "one case": (
        "c1",
        "i {0}/(t1|t2).nii.gz\nl {0}/seg.nii.gz",
        ("{case}/{modality}.nii.gz", "{case}/seg.nii.gz"),
    ),
    "images alone": (
        "p1 p2",
        "i {0}/flair.nii.gz\ni {0}/t1.nii.gz",
        ("{case}/{modality}.nii.gz", ""),
    ),
    "a case within other words": (
        "2 31",
        "i {0}/T2SPIR.nii.gz\nl {0}/T2SPIR_{0}_gt.nii.gz",
        ("{case}/T2SPIR.nii.gz", "{case}/T2SPIR_{case}_gt.nii.gz"),
    ),
    "the first modality on another grid": (
        "10000/1 10001/2",
        "j {0}/{0}_{1}_adc.mha\ni {0}/{0}_{1}_t2w.mha\nl lab/{0}_{1}.nii.gz",
        ("*/{case}_{modality:t2w,adc}.mha", "lab/{case}.nii.gz"),
    ),
}


@pytest.mark.parametrize("name", TREES)
def test_a_proposal_takes_images_with_their_label_maps(name, tmp_path):
    parts, files, expected = TREES[name]
    DataSet(parts, files).write(tmp_path)
    first, *others = find_proposals(Tree(tmp_path))
    assert (first.images, first.labels) == expected
    assert others == []


def test_a_case_that_lacks_a_modality_is_not_in_silence(tmp_path):
    """Only what each case has is proposed; the counts say what is left out."""
    DataSet("c1 c2 c3", "i {0}/(flair|t1).nii.gz\nl {0}/seg.nii.gz").write(tmp_path)
    (tmp_path / "c2/flair.nii.gz").unlink()
    text = propose(tmp_path)
    assert f"'{tmp_path}/{{case}}/t1.nii.gz', with label maps" in text
    assert "(3 cases, 3 label maps; left out are 2 of 8 files, as c1/flair.nii.gz)" in text


@pytest.mark.parametrize(
    ("files", "parts", "words"),
    [
        (
            "l {0}/a.nii.gz\nx {0}/b.txt",
            "c1 c2",
            "There are 2 volumes, most of them 1 deep: 2 folders (c1, c2), 1 name of files (a). "
            'No pattern was found that fits; see "Folders and patterns"',
        ),
        ("c {0}/{0}_sa.nii.gz\ns {0}/{0}_sa_gt.nii.gz", "c1 c2", "convert FILE FOLDER --split"),
        ("x {0}/t1.nii.gz\nx {0}/seg.nii.gz", "c1 c2", "No pattern was found that fits"),
    ],
    ids=["label maps", "times", "files that cannot be read"],
)
def test_without_a_proposal_the_shape_of_the_folder_is_told(files, parts, words, tmp_path):
    DataSet(parts, files).write(tmp_path)
    assert find_proposals(Tree(tmp_path)) == []
    assert words in propose(tmp_path)


def test_outputs_of_different_cases_are_not_the_labels_of_one(tmp_path):
    for cases, name in (("a b", "{0}_liver"), ("c d", "{0}_spleen")):
        DataSet(cases, f"l {name}.nii.gz").write(tmp_path)
    proposed = propose(tmp_path, holds_images=False)
    assert f"'{tmp_path}/{{case}}.nii.gz' (4 cases)" in proposed
    assert "{label}" not in proposed


def test_what_is_an_image_in_one_case_and_a_label_map_in_another_is_not_proposed(tmp_path):
    DataSet("c1 c2", "i {0}/a.nii.gz\nl {0}/b.nii.gz").write(tmp_path)
    (tmp_path / "c2/a.nii.gz").rename(tmp_path / "c2/x.nii.gz")
    (tmp_path / "c2/b.nii.gz").rename(tmp_path / "c2/a.nii.gz")
    (tmp_path / "c2/x.nii.gz").rename(tmp_path / "c2/b.nii.gz")
    assert find_proposals(Tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("files", "is_problem"),
    [
        ("i {0}_t1.nii.gz\nl {0}_msk.nii.gz", True),
        ("i {0}.nii.gz\nl {0}_msk.nii.gz", True),
        ("i {0}.nii.gz\nl {0}_R1.nii.gz\nl {0}_R2.nii.gz", True),
        ("i {0}__CT.nii.gz\nj {0}__PT.nii.gz", False),
        ("i {0}.nii.gz\nl {0}_seg.nii.gz", None),
        ("i {0}.nii.gz", None),
    ],
)
def test_info_says_that_files_side_by_side_are_of_fewer_cases(files, is_problem, tmp_path):
    data = DataSet("CHUM-001 CHUM-002 MDA-010", files)
    data.write(tmp_path)
    report = inspect_folder(tmp_path)
    told = report.problems if is_problem else report.notes
    found = re.findall("Its files look like '([^']*)'", "".join(map(str, told)))
    assert len(found) == (is_problem is not None)
    assert bool(report.problems) == bool(is_problem)
    for pattern in found:
        cases = found_cases(Path(pattern), None)
        assert [case.case_id for case in cases] == data.parts.split()
        taken = [path.name for case in cases for path in case.images]
        assert not any("msk" in name for name in taken)


def test_info_says_which_files_are_label_maps_where_no_pattern_takes_all(tmp_path):
    files = "i {0}_t1-reg.nii.gz\ni {0}-flair_reg.nii.gz\nl {0}_lesions.nii.gz"
    DataSet("case-1 case-2", files).write(tmp_path)
    (problem,) = inspect_folder(tmp_path).problems
    told = "not each file is an image: case-1_lesions.nii.gz is a label map by its voxels"
    assert told in problem.message
    assert f"'{tmp_path}/{{case}}_t1-reg.nii.gz', with label maps" in problem.message


def test_the_output_for_images_that_are_modalities_is_not_found_as_cases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DataSet("a1 a2", "i img/{0}_CT.nii.gz\ni img/{0}_PT.nii.gz\nl out/{0}.nii.gz").write(tmp_path)
    infer = ("infer", "-p", "out", "-o", "r", "--input-type", "labels", "-q", "-i")
    failed = run_here(*infer, "img", status=1).stderr
    (pattern,) = re.findall("As to img:\n *Its files look like '([^']*)'", failed)
    assert pattern == "img/{case}_{modality}.nii.gz"
    run_here(*infer, pattern, status=0)
