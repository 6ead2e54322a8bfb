"""Public data sets as downloaded: the pattern of the guide, and what `info` says of the folder."""

import re
from pathlib import Path

import pytest
from data_sets import DATA_SETS, found_cases, patterns

from crfrefine.cases.case_headers import read_case_headers
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.evaluate.options import EvaluationOptions
from crfrefine.evaluate.pairing import pair_cases
from crfrefine.infer.inputs import find_inputs
from crfrefine.infer.options import InferenceOptions
from crfrefine.info.folders import inspect_folder

PATTERNS = patterns()
# Their folder has no pattern that is certain by names and voxels alone.
WITHOUT_PROPOSAL = {"M&Ms", "M&Ms, 4-D"}
# The proposal takes more images of each case than the guide does.
WITH_MORE_IMAGES = {"FreeSurfer subjects", "autoPET"}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """The folder of each data set, written when it is asked for."""
    written = {}

    def folder_of(name):
        if name not in written:
            written[name] = DATA_SETS[name].write(tmp_path_factory.mktemp("tree"))
        return written[name]

    return folder_of


def images_of(root, cases):
    return {case.case_id: {str(path.relative_to(root)) for path in case.images} for case in cases}


def test_each_data_set_of_the_guide_has_a_tree():
    assert {*PATTERNS} == {*DATA_SETS} - {"M&Ms, 4-D"}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_pattern_of_the_guide_finds_the_files_of_each_case(name, trees):
    root = trees(name)
    images, labels = (root / pattern.replace("NAME", "net") for pattern in PATTERNS[name])
    expected = DATA_SETS[name].cases()
    if not PATTERNS[name][1]:
        found = images_of(root, found_cases(images, None))
        assert found == {case: {*files} for case, (files, _) in expected.items()}
        return

    # as train-crf finds them, and as infer does with the label maps for the network's output
    output = InferenceOptions((images,), (labels,), root / "out", input_type="labels")
    trained = [] if "{label}" in labels.name else found_cases(images, None, labels=labels)
    refined = find_inputs(output).cases
    for cases in filter(None, (trained, refined)):
        assert images_of(root, cases) == {case: {*files} for case, (files, _) in expected.items()}
        for case in cases:
            found = case.network or (case.labels,)
            assert {str(path.relative_to(root)) for path in found} == {*expected[case.case_id][1]}
            reading = ReadingOptions(input_type="labels", resample="linear")
            assert len(read_case_headers(case, reading).images) == len(case.images)
    evaluation = pair_cases(EvaluationOptions(labels, labels, root / "report", images=images))
    assert [pair.case_id for pair in evaluation.pairs] == sorted(expected)


def proposed(root, text):
    """The patterns of each proposal: of images, and of label maps or ""."""
    found = []
    for images, labels in re.findall(
        r"(?:look|Or) like '([^']*)'(?:, with label maps '([^']*)')?", text
    ):
        found.append((Path(images), Path(labels) if labels else None))
    return found


@pytest.mark.parametrize("name", DATA_SETS)
def test_info_is_right_about_the_folder_or_proposes_what_is(name, trees):
    root = trees(name)
    data = DATA_SETS[name]
    kinds = {path: kind for path, kind, _ in data.files()}
    expected = {case: {*images} for case, (images, _) in data.cases().items()}
    report = inspect_folder(root)
    text = "\n".join(map(str, (*report.notes, *report.problems)))
    proposals = proposed(root, text)
    assert bool(proposals) != (name in WITHOUT_PROPOSAL or bool(report.cases))
    if report.cases:
        assert not report.problems
        assert len(report.cases) == len(expected)
    for number, (images, labels) in enumerate(proposals):
        cases = found_cases(images, None, labels=labels)
        for case in cases:
            assert case.problem == ""
            taken = {str(path.relative_to(root)) for path in case.images}
            assert {kinds[path] for path in taken} <= {*"ijcn"}
            if labels:
                assert kinds[str(case.labels.relative_to(root))] in "lmbk"
        if number == 0 and name not in WITH_MORE_IMAGES:
            taken = sorted(map(sorted, images_of(root, cases).values()))
            if name == "M&Ms-2":  # in both views
                assert len(taken) == 2 * len(expected)
            else:
                assert taken == sorted(map(sorted, expected.values()))
