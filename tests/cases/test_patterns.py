"""Patterns in place of folders, by names alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import save_nifti
from data_sets import found_cases

from crfrefine.cases.dataset_description import read_descriptions
from crfrefine.cases.listing import find_matches
from crfrefine.cases.patterns import Match, fill
from crfrefine.cases.reading_options import declared_labels
from crfrefine.errors import InputError
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.structures import has_structures, pair_structures
from crfrefine.io.formats import VOLUME_SUFFIXES


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def make_brats(root, mark, label=""):
    for case in ("B_1", "B_2"):
        words = ("flair", "t1", "t1ce", *filter(None, [label]))
        make(root, *(f"{case}/{case}{mark}{word}.nii.gz" for word in words))


def test_a_segmentation_beside_the_images_is_no_modality_unless_it_is_named(tmp_path):
    make_brats(tmp_path, "-", "seg")
    cases = found_cases(tmp_path / "{case}/{case}-{modality}.nii.gz", None)
    assert [len(case.images) for case in cases] == [3, 3]
    assert "not taken for images: 2 files beside them, such as B_1-seg.nii.gz" in str(
        cases.notes[0]
    )
    (first, _) = found_cases(tmp_path / "{case}/{case}-{modality:t1,seg}.nii.gz", None)
    assert [path.name for path in first.images] == ["B_1-t1.nii.gz", "B_1-seg.nii.gz"]


def test_modalities_are_in_the_order_of_dataset_json_else_of_the_alphabet(tmp_path):
    make_brats(tmp_path, "_")
    pattern = tmp_path / "{case}/{case}_{modality}.nii.gz"
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": ["T1", "T1CE", "FLAIR"]}))
    names = [path.name for path in found_cases(pattern, None)[0].images]
    assert names == ["B_1_t1.nii.gz", "B_1_t1ce.nii.gz", "B_1_flair.nii.gz"]
    (tmp_path / "B_1/B_1_lesion.nii.gz").touch()
    (tmp_path / "B_2/B_2_t1.nii.gz").unlink()
    assert "found t1, t1ce, flair, lesion in " in found_cases(pattern, None)[0].problem
    problem = found_cases(pattern, None)[1].named_problem
    assert problem.startswith(
        "case 'B_2': expected the modalities t1, t1ce, flair, as dataset.json names; "
        "found t1ce, flair in "
    )


@pytest.mark.parametrize(
    ("order", "names"),
    [
        (":t1ce,flair,t1", ["t1ce", "flair", "t1"]),
        (":t*,flair", ["t1", "t1ce", "flair"]),
        (":t1ce,t1", ["t1ce", "t1"]),
        (":t*", ["t1", "t1ce"]),
        ("", ["flair", "t1", "t1ce"]),
    ],
)
def test_the_list_of_modalities_is_their_order(tmp_path, order, names):
    make_brats(tmp_path, "_", "seg")
    pattern = f"{{case}}/{{case}}_{{modality{order}}}.nii.gz"
    for case in found_cases(tmp_path / pattern, None):
        assert case.problem == ""
        assert case.modalities == tuple(names)
        assert [path.name for path in case.images] == [
            f"{case.case_id}_{name}.nii.gz" for name in names
        ]


def test_the_list_is_the_order_of_numbers_and_before_that_of_dataset_json(tmp_path):
    make(tmp_path, *(f"i/{case}_{number:04d}.nii" for case in "ab" for number in range(3)))
    (tmp_path / "i/dataset.json").write_text(json.dumps({"channel_names": {"0": "x", "1": "y"}}))
    cases = found_cases(tmp_path / "i/{case}_{modality:0002,0000}.nii", None)
    assert [[path.name for path in case.images] for case in cases] == [
        [f"{case}_0002.nii", f"{case}_0000.nii"] for case in "ab"
    ]
    assert [case.problem for case in cases] == ["", ""]


WEEKS = ("P1/w1", "P1/w2", "P2/w1")


@pytest.mark.parametrize(
    ("files", "pattern", "names"),
    [
        (["{0}/{1}/t1.nii"], "{case}/{case}/t1.nii", "P1_w1 P1_w2 P2_w1"),
        (["{0}/{1}/t1.nii"], "{case}/w{case}/t1", "P1_1 P1_2 P2_1"),
        (["{0}/{1}/x/{0}_{1}_t1.nii"], "{case}/{case}/x/{case}_t1.nii", "P1_w1 P1_w2 P2_w1"),
        (["{0}/{1}/x/{0}_t1.nii"], "{case}/{case}/x/{case}_t1.nii", "P1_w1 P1_w2 P2_w1"),
        (["{0}/{1}/{0}_{1}.nii"], "{case}/w{case}/{case}_w{case}.nii", "P1_1 P1_2 P2_1"),
        (["{0}_a_{1}.nii"], "{case}_a_{case:w*}.nii", "P1_w1 P1_w2 P2_w1"),
        (["{0}/{1}/{0}/t1.nii"], "{case}/{case:*}/{case}/t1.nii", "P1_w1 P1_w2 P2_w1"),
        (["a/{0}/{1}/t1.nii"], "{case}/{case}/{case}/t1.nii", "a_P1_w1 a_P1_w2 a_P2_w1"),
        # The same text, where a file has it, as ever.
        (["{0}/{0}_{1}.nii", "{0}/old_{1}.nii"], "{case}/{case}_w1.nii", "P1 P2"),
    ],
)
def test_a_case_may_be_named_by_several_parts_of_its_path(files, pattern, names, tmp_path):
    for week in WEEKS:
        make(tmp_path, *(file.format(*week.split("/")) for file in files))
    cases = found_cases(tmp_path / pattern, None)
    assert [case.case_id for case in cases] == names.split()
    assert [case.problem for case in cases] == [""] * len(cases)


def test_names_of_a_folder_are_not_joined(tmp_path):
    """`{case}/{case}*` is one of the names that need no pattern."""
    make(tmp_path, "i/a_b.nii", "p/a/b.nii")
    (case,) = found_cases(tmp_path / "i", tmp_path / "p")
    assert "no logits in" in case.problem


def test_folders_of_the_same_name_are_the_case_unless_globs_say_otherwise(tmp_path):
    """Patients and weeks may both be called 1; the first line says what was left out."""
    make(tmp_path, *(f"{patient}/{week}/t1.nii" for patient in (1, 2) for week in (1, 2)))
    cases = found_cases(tmp_path / "{case}/{case}/t1.nii", None)
    assert [case.case_id for case in cases] == ["1", "2"]
    joined = tmp_path / "{case}/{case:*}/t1.nii"
    told = f"; 2 more files such as {tmp_path}/1/2/t1.nii would fit if both name the case: "
    assert cases.found.endswith(f"{told}'{joined}'")
    cases = found_cases(joined, None)
    assert [case.case_id for case in cases] == ["1_1", "1_2", "2_1", "2_2"]
    assert cases.found.endswith(f"such as {tmp_path}/1/1/t1.nii, of the case 1_1")


@pytest.mark.parametrize(
    ("file", "pattern", "proposed"),
    [
        ("{0}/{1}/t1.nii", "*/{case}/t1.nii", "{case}/{case}/t1.nii"),
        ("{0}/{1}/t1.nii", "{case}/*/t1.nii", "{case}/{case}/t1.nii"),
        ("{0}/{1}/t1.nii", "{P1,P2}/{case}/{modality}.nii", "{case:P1,P2}/{case}/{modality}.nii"),
        ("{0}/{1}/{0}_{1}.nii", "{case}/*/{case}_*.nii", "{case}/{case}/{case}_*.nii"),
        ("{0}/{1}/{1}.nii", "{case}/w*/w*.nii", "{case}/w{case}/w*.nii"),
    ],
)
def test_two_folders_of_one_name_are_told_apart_by_the_pattern_of_the_error(
    file, pattern, proposed, tmp_path
):
    weeks = [week.split("/") for week in WEEKS]
    make(tmp_path, *(file.format(*week) for week in weeks))
    problems = [case.problem for case in found_cases(tmp_path / pattern, None)]
    (problem,) = filter(None, problems)
    assert f"Two folders have one name: '{tmp_path / proposed}' names a case by both" in problem
    cases = found_cases(tmp_path / proposed, None)
    assert len({case.case_id for case in cases}) == 3
    assert not any(case.problem for case in cases)
    # as a network's output, too
    make(tmp_path, *(f"i/{week[number]}.nii" for number in range(2) for week in weeks))
    outputs = found_cases(tmp_path / "i", tmp_path / pattern.replace("{modality}", "t1"))
    assert any("Two folders have one name: '" in case.problem for case in outputs)


def test_names_with_the_number_of_the_first_modality_meet_by_the_pattern_of_the_error(tmp_path):
    make(tmp_path, "i/a_0000.nii", "i/b_0000.nii", "p/a_0000/a_0000_trans.nii", "r/a.nii")
    pattern = tmp_path / "p/{case}/{case}_trans.nii"
    right = tmp_path / "p/{case}_0000/{case}_0000_trans.nii"
    images = tmp_path / "i/{case}_0000.nii"
    first, second = found_cases(images, pattern, input_type="labels")
    assert f"'{right}' names the cases without _0000" in first.problem
    assert "names the cases without" not in second.problem
    first, _ = found_cases(images, right, labels=tmp_path / "r", input_type="labels")
    assert first.problem == ""
    # By this pattern of the output, the images keep their number, too.
    for labels in ("r", "r/{case}.nii"):
        found = found_cases(tmp_path / "i", pattern, labels=tmp_path / labels, input_type="labels")
        first = next(case for case in found if case.images)
        assert "there is a, as the case is called by folders of the other files" in first.problem


def test_the_folder_of_save_image_is_found_by_names_with_and_without_a_number(tmp_path):
    make(tmp_path, "i/a_0000.nii", "i/b_0000.nii", "r/a.nii", "r/b.nii")
    make(tmp_path, *(f"p/{case}_0000/{case}_0000_trans.nii" for case in "ab"))
    for input_type in ("labels", "auto"):
        cases = found_cases(
            tmp_path / "i", tmp_path / "p", labels=tmp_path / "r", input_type=input_type
        )
        assert [case.case_id for case in cases] == ["a", "b"]
        assert [case.network[0].name for case in cases] == ["a_0000_trans.nii", "b_0000_trans.nii"]
        assert (cases[0].labels, cases.notes) == (tmp_path / "r/a.nii", [])


@pytest.mark.parametrize(
    ("images", "logits", "message"),
    [
        (
            "x-{case}.nii",
            None,
            "apart from what other options name\n  There are v-1.nii, ",
        ),
        ("deep/{case}/{case}.nii", None, ", v-1.nii, v-2.nii in {root}."),
        ("v-*.nii", None, "a pattern says with {{case}} which part of a path is the name"),
        ("v-{name}.nii", None, "it may have {{case}}, {{modality}} and *, not {{name}}"),
        ("v{case}{modality}.nii", None, "nothing says where {{case}} ends"),
        ("v{case}*.nii", None, "nothing says where {{case}} ends"),
        ("v-{case:[z-a]}.nii", None, "not a pattern: bad character range"),
        (
            "v-{case}.nii",
            "out-{modality}.npz",
            "it may have {{case}}, {{label}} and *, not {{modality}}",
        ),
    ],
)
def test_a_pattern_that_cannot_be_used_says_what_is_there(images, logits, message, tmp_path):
    make(tmp_path, "v-1.nii", "v-2.nii", "out-1.npz")
    with pytest.raises(InputError) as raised:
        found_cases(tmp_path / images, None if logits is None else tmp_path / logits)
    assert message.format(root=tmp_path) in str(raised.value)


def test_two_files_or_none_for_a_case_are_its_problem(tmp_path):
    root = make(
        tmp_path, "a/v.nii", "b/v.nii", "c/v.nii", "out/a_1.nii", "out/a_2.nii", "out/b_1.nii"
    )
    a, b, c = found_cases(root / "{case}/v.nii", root / "out/{case}_*.nii")
    expected = "case 'a': expected one file of logits, found a_1.nii, a_2.nii in "
    assert a.named_problem == f"{expected}{root}/out/{{case}}_*.nii"
    assert [path.name for path in b.network] == ["b_1.nii"]
    assert "case 'c': no logits in " in c.named_problem
    assert f" in {root}/out." in c.problem
    double = found_cases(make(tmp_path, "x/a/1.nii", "x/a/2.nii") / "x/{case}/*.nii", None)
    assert "found 1.nii, 2.nii" in double[0].problem


def test_parts_of_a_path_are_matched_as_they_are_written(tmp_path):
    root = make(
        tmp_path, "a.b_1/a.b_1_x.nii.gz", "a+b/c_x.nii.gz", ".d/.d_x.nii.gz", "e/e_x.seg.nrrd"
    )
    for pattern, expected in {
        "{case}/{case}_x.nii.gz": ["a.b_1"],
        "{case}/*_x": ["a+b", "a.b_1", "e"],
        "*/{case}_{x,y}.*": ["c", "a.b_1", "e"],
        "{case}/*_x.nrrd": [],
        "{case:a*,e}/{case}_x": ["a.b_1", "e"],
        "{case:?[!.]?}/*": ["a+b"],
    }.items():
        cases = [match.case for match in find_matches(root / pattern, VOLUME_SUFFIXES)]
        assert cases == expected, pattern


def test_a_folder_may_have_a_name_like_a_pattern(tmp_path):
    root = make(tmp_path / "study {1} *" / "{case}", "i/a.nii", "l/a.nii", "m/a/a_trans.npz")
    for images in ("i", "i/{case}.nii"):
        (case,) = found_cases(root / images, root / "m", labels=root / "l")
        assert (case.problem, case.case_id) == ("", "a")
        assert case.network[0].name == "a_trans.npz"


def test_files_per_label_are_ordered_by_number_or_by_dataset_json(tmp_path):
    root = make(
        tmp_path, "v/a.nii", *(f"n/a/p{n}.nii" for n in range(11)), "w/a-fat.nii", "w/a-air.nii"
    )
    (case,) = found_cases(root / "v/{case}.nii", root / "n/{case}/p{label}.nii")
    assert [path.name for path in case.network] == [f"p{n}.nii" for n in range(11)]
    (case,) = found_cases(root / "v/{case}.nii", root / "w/{case}-{label}.nii")
    assert "{label} is a number, or a name in dataset.json" in case.problem
    (root / "w/dataset.json").write_text(json.dumps({"labels": {"fat": 0, "air": 1}}))
    (case,) = found_cases(root / "v/{case}.nii", root / "w/{case}-{label}.nii")
    assert [path.name for path in case.network] == ["a-fat.nii", "a-air.nii"]


def test_structures_have_the_names_of_their_labels_in_each_case(tmp_path):
    """A folder per case with one label map in it is no structure."""
    names = [f"{case}/{case}_{name}.nii" for case in ("p0", "p1") for name in ("liver", "lung")]
    root = make(tmp_path, "v/p0.nii", "v/p1.nii", *(f"s/{name}" for name in names))
    for place in ("s", "s/{case}/{case}_{label}.nii"):
        for case in found_cases(root / "v", root / place, input_type="labels"):
            assert case.structures == ("liver", "lung")
    make(tmp_path, "m/p0/p0_trans.nii", "m/p1/p1_trans.nii")
    for input_type in ("auto", "labels"):
        for case in found_cases(root / "v", root / "m", input_type=input_type):
            assert (case.structures, case.network[0].name) == ((), f"{case.case_id}_trans.nii")


def test_a_single_structure_of_a_case_beside_others_is_no_reason_for_doubt(tmp_path):
    """A file alone with the name of its case may be its label map, and is then left out."""
    names = ("a/a_lung.nii", "b/b_lung.nii", "b/b_liver.nii", "c/segmentations/lung.nii", "c/c.nii")
    root = make(tmp_path, *(f"r/{name}" for name in names), "i/c.nii", "i/b.nii")
    options = EvaluationOptions(root / "r", root / "r", root / "out")
    assert has_structures(options, [])
    _, references, _ = pair_structures(options)
    found_ = {name: case.structures for name, case in references.items()}
    assert found_ == {"b": ("liver", "lung"), "c": ("lung",)}
    for case in found_cases(root / "i", root / "r", input_type="labels"):
        assert case.structures == found_[case.case_id]
    # Label maps with names count, whatever lies in folders beside them.
    for name in ("a/a_lung.nii", "d.nii"):
        save_nifti(root / "r" / name, np.ones((3, 4, 5), np.uint8))
    (root / "r/dataset.json").write_text(json.dumps({"labels": {"lung": 1}}))
    _, references, _ = pair_structures(options)
    assert [*references] == ["a", "d"]


def test_names_of_structures_are_split_where_the_cases_are_known(tmp_path):
    """The longest case would be c1_left. `evaluate` knows the cases of a folder, or asks."""
    make(tmp_path, *(f"i/{case}_0000.nii" for case in ("c1", "c2", "c2_b")))
    for case in ("c1", "c2", "c2_b"):
        make(tmp_path, f"u/{case}_left_lung.nii", f"u/{case}_heart.nii")
        make(tmp_path, f"v/{case}/left_lung.nii", f"v/{case}/heart.nii")
    pattern = tmp_path / "u" / "{case}_{label}.nii"
    cases = found_cases(tmp_path / "i", pattern, input_type="labels")
    expected = [(case, ("heart", "left_lung")) for case in ("c1", "c2", "c2_b")]
    assert [(case.case_id, case.structures) for case in cases] == expected
    assert not cases.notes

    out = tmp_path / "out"
    _, references, methods = pair_structures(EvaluationOptions(pattern, tmp_path / "v", out))
    for found_ in (references, *methods.values()):
        assert [(name, found_[name].structures) for name in sorted(found_)] == expected
    with pytest.raises(InputError, match=r"in several ways at '_'.*\{label:.*heart,left_lung"):
        pair_structures(EvaluationOptions(pattern, pattern, out))
    named = tmp_path / "u" / "{case}_{label:left_lung,heart}.nii"
    _, references, _ = pair_structures(EvaluationOptions(named, named, out))
    assert sorted(references) == ["c1", "c2", "c2_b"]


def test_names_of_structures_with_the_separator_are_clear_in_the_folder_of_a_case(tmp_path):
    for case in ("c1", "c2"):
        make(tmp_path, f"{case}/{case}_left_lung.nii", f"{case}/{case}_heart.nii")
    pattern = tmp_path / "{case}/{case}_{label}.nii"
    _, references, _ = pair_structures(EvaluationOptions(pattern, pattern, tmp_path / "out"))
    expected = [("c1", ("heart", "left_lung")), ("c2", ("heart", "left_lung"))]
    assert [(name, references[name].structures) for name in sorted(references)] == expected


def test_modalities_with_the_separator_in_their_names_are_to_be_named(tmp_path):
    make(tmp_path, *(f"{case}_{name}.nii" for case in "ab" for name in ("t1", "t1_ce", "flair")))
    cases = found_cases(tmp_path / "{case}_{modality}.nii", None)
    problems = [case.problem for case in cases if case.problem]
    assert problems
    assert all("as with {modality:flair,t1,t1_ce}." in problem for problem in problems)
    cases = found_cases(tmp_path / "{case}_{modality:flair,t1,t1_ce}.nii", None)
    assert [case.problem for case in cases] == ["", ""]


@pytest.mark.parametrize("case", ["a{b}", "a*b", "{label}", "plain"])
def test_the_path_of_an_output_has_the_name_of_any_case(tmp_path, case):
    match = Match(tmp_path / f"{case}.nii.gz", case)
    assert fill(Path("o/{case}/x_{case}.nrrd"), match) == Path(f"o/{case}/x_{case}.nrrd")
    with pytest.raises(InputError, match="label} has no counterpart in"):
        fill(Path("o/{case}_{label}.nrrd"), match)
    with pytest.raises(InputError, match=r"and no \*"):
        fill(Path("o/{case}*.nrrd"), match)


def test_an_ending_says_more_of_the_case_than_a_plain_name(tmp_path):
    """Also of cases that have no image; and names in which a label map's word is not the last."""
    names = ("l/b_ProbMapClass0.npy", "l/b_ProbMapClass1.npy", "l/c_logits.npz", "l/d.nii")
    root = make(tmp_path, "i/p_0001.nii", "i/p_0001_seg_v2.nii", "i/p_0002_seg_v2.nii", *names)
    cases = found_cases(root / "i", root / "l", include_imageless=True)
    assert [case.case_id for case in cases if not case.images] == ["b", "c", "d"]


def test_the_image_beside_a_single_structure_is_none(tmp_path):
    """Of a case in TotalSegmentator's layout, with as many structures as images."""
    root = make(
        tmp_path, *(f"s{n}/{name}.nii" for n in (1, 2) for name in ("ct", "segmentations/a"))
    )
    for case in found_cases(root, root, input_type="labels"):
        assert (case.problem, case.structures) == ("", ("a",))


def test_structures_of_one_case_are_found_in_its_folder(tmp_path):
    """As TotalSegmentator's data sets have them, or beside the image, which is none of them."""
    root = make(
        tmp_path, "a/ct.nii", "a/segmentations/lung.nii", "b/ct.nii", "b/lung.nii", "c/ct.nii"
    )
    for place in ("a", "b"):
        cases = found_cases(root / place / "ct.nii", root / place, input_type="labels")
        assert (cases[0].problem, cases[0].structures, cases.notes) == ("", ("lung",), [])
    (case,) = found_cases(root / "c/ct.nii", root / "c", input_type="labels")
    problem = f"case 'ct': no label map in {root / 'c'}, where ct.nii is its image; expected ct.nii"
    assert case.named_problem.startswith(problem)


def test_structures_have_the_numbers_of_a_description_or_of_their_names(tmp_path):
    root = make(tmp_path, "v/a.nii", "s/a/lung.nii", "s/a/liver.nii", "n/a-2.nii", "n/a-10.nii")
    cases = found_cases(root / "v", root / "s", input_type="labels")
    assert declared_labels(cases, (), None).structures == {"liver": 1, "lung": 2}
    content = {"labels": {"background": 0, "lung": 3, "liver": 7, "spleen": 1}}
    (root / "s/dataset.json").write_text(json.dumps(content))
    descriptions = list(read_descriptions([root / "s/{case}/{label}.nii"]))
    declared = declared_labels(cases, descriptions, None)
    assert (declared.structures, declared.numbers) == ({"lung": 3, "liver": 7}, (0, 3, 7))
    cases = found_cases(root / "v", root / "n/{case}-{label}.nii", input_type="labels")
    assert declared_labels(cases, (), None).structures == {"2": 2, "10": 10}


def test_optional_references_beside_the_images_are_no_modalities(tmp_path):
    make(tmp_path, "a/a_t1.nii", "a/a_gold.nii", "b/b_t1.nii")
    images = tmp_path / "{case}/{case}_{modality}.nii"
    labels = tmp_path / "{case}/{case}_gold.nii"
    first, second = found_cases(images, labels=labels, include_imageless=False)
    assert [path.name for path in first.images] == ["a_t1.nii"]
    assert (first.labels, first.problem) == (tmp_path / "a/a_gold.nii", "")
    assert (second.labels, second.problem) == (None, "")
