"""What is wrong with files and options of `evaluate`: one message each, the other cases go on,
nothing is dropped unsaid.
"""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from cli_helpers import files_in, run_here
from evaluation_helpers import SHAPE, affine, read_metrics, save_map, save_npz, write_study
from io_helpers import save_nifti
from training_helpers import write_cases

from crfrefine.evaluate import measuring
from crfrefine.parameters.model import CrfParameters

NII = "{case}.nii.gz"
ANOTHER = "not on the grid of the reference"


def put(folder, change, name=NII, grid=(1, 1, 1)):
    """Write what becomes of a map, with each axis of its affine times a number."""

    def spoil(study, case):
        path = study.root / folder / name.format(case=case)
        values = change(study.maps[folder][case])
        if "nii" in name:
            save_nifti(path, values, affine() @ np.diag([*grid, 1.0]))
        else:
            save_map(path, values)

    return spoil


def with_nan(values):
    values = values.astype(np.float32)
    values[2, 3, 1] = np.nan
    return values


def cut_off(study, case):
    path = study.before / f"{case}.nii.gz"
    path.write_bytes(path.read_bytes()[:200])


def two_references(study, case):
    for end in ("seg", "label"):
        save_map(study.labels / f"{case}_{end}.mha", study.maps["labels"][case])


def not_fetched(study, case):
    (study.labels / f"{case}.nii.gz").unlink()
    (study.labels / f"{case}.nii.gz").symlink_to(study.root / "nowhere")


def images(study, case):
    for folder, first in (("labels", 1), ("after", 5000), ("before", 5000)):
        save_map(
            study.root / folder / f"{case}.nii.gz",
            np.arange(first, first + np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE),
        )


CHANNELS = np.random.default_rng(0).random((*SHAPE, 3), np.float32)
SOFT = np.linspace(0, 1.5, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
BAD = [
    (
        put("after", np.copy, grid=(-1, 1, 1)),
        "prediction",
        [ANOTHER, "13×11×7, 0.80×1.25×3.00 mm", "labels/case1.nii.gz", "after/case1"],
    ),
    (put("after", lambda values: values[1:]), "prediction", [ANOTHER, "13×11×7", "12×11×7"]),
    (put("labels", np.copy, grid=(1, 1, 1.01)), None, [ANOTHER, "3.00 mm", "3.03 mm"]),
    (
        put("after", lambda _: np.full((*SHAPE, 3), 0.9, np.float32)),
        "prediction",
        ["all labels have the same value at 1001 of"],
    ),
    (put("after", lambda _: SOFT), "prediction", ["not a label map", "may be a probability map"]),
    (
        put("labels", lambda values: values.astype(np.int16) - 1),
        None,
        ["expected labels from 0", "found -1"],
    ),
    (put("after", with_nan), "prediction", ["1 of 1001", "voxel (2, 3, 1)"]),
    (cut_off, "before", ["before/case8.nii.gz"]),
    (
        put("after", np.copy, "{case}.mha"),
        "prediction",
        ["expected one label map, found case9.mha, case9.nii.gz"],
    ),
    (two_references, None, ["expected one label map, found case10_label.mha, case10_seg.mha"]),
    (
        put("labels", lambda _: CHANNELS),
        None,
        ["expected a label map with one value per voxel, this file has 3"],
    ),
    (put("after", lambda _: CHANNELS), "prediction", ["do not sum to 1", "region-based training"]),
    (
        put("labels", lambda _: np.full(SHAPE, 60000, np.uint16)),
        None,
        ["every voxel has the label 60000, to be ignored"],
    ),
    (
        images,
        None,
        ["expected a label map, found 1001 different whole numbers up to", "as those of an image"],
    ),
    (not_fetched, None, ["case15.nii.gz: is a link to a file that is not there"]),
]
"""What spoils a case, from case1 on; the method that it fails (None: all), and what the message
says.
"""


def test_a_bad_case_is_reported_and_the_others_are_measured(tmp_path):
    study = write_study(tmp_path, len(BAD) + 2)
    whole = ["case0", f"case{len(BAD) + 1}"]
    expected = {*itertools.product(whole, ("prediction", "before"))}
    for number, (spoil, method, _) in enumerate(BAD, 1):
        spoil(study, f"case{number}")
        if method == "prediction":
            expected.add((f"case{number}", "before"))
        if method == "before":
            expected.add((f"case{number}", "prediction"))
    result = run_here(*study.arguments, "-v", "--ignore-label", 60000, status=1)
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith(f"({len(BAD)} of {len(BAD) + 2} cases)")
    summary = study.summary()
    for number, (_, method, fragments) in enumerate(BAD, 1):
        case = f"case{number}"
        failures = [failure for failure in summary["failures"] if failure["case"] == case]
        if method is not None:
            (failure,) = failures
            assert failure["method"] == method
        for fragment in fragments:
            assert fragment in failures[0]["error"], failures
        assert f"crfrefine: error: case 'case{number}': " in result.stderr
    assert {(case, name) for case, _, _, name in read_metrics(study.output)} == expected
    assert (summary["num_cases"], summary["num_failed"]) == (len(BAD) + 2, len(BAD))
    assert study.statuses().count("measured") == 2
    assert summary["verdict"]["comparison"]["num_pairs"] == 2
    assert "cases are left out" in result.stdout


def test_scores_beside_that_cannot_be_used_are_a_note_and_named_ones_a_failure(tmp_path):
    """nnU-Net's regions have sigmoid channels: its label maps can be measured, its probabilities
    are no distribution over labels.
    """
    study = write_study(tmp_path, 2)
    for case in ("case0", "case1"):
        save_npz(
            study.after / f"{case}.npz",
            np.random.default_rng(0).random((3, *SHAPE), np.float32),
            "probabilities",
        )
    result = run_here(*study.arguments, status=0)
    assert result.stderr.count("prediction: no calibration: ") == 1  # of the first case, for all
    assert "ece" not in {metric for _, _, metric, _ in read_metrics(study.output)}
    asked = run_here(*study.arguments, "--probabilities", f"prediction={study.after}", status=1)
    assert "do not sum to 1" in asked.stderr
    assert ("case0", "1", "dice", "prediction") in read_metrics(study.output)


def test_overlap_stays_where_a_calibration_fails_while_it_is_computed(tmp_path, monkeypatch):
    study = write_study(tmp_path, 2)
    for case in ("case0", "case1"):
        probabilities = np.random.default_rng(0).dirichlet((1, 1, 1), SHAPE).astype(np.float32)
        save_npz(study.after / f"{case}.npz", np.moveaxis(probabilities, -1, 0), "probabilities")

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(measuring, "measure_calibration", fail)
    result = run_here(*study.arguments, status=1)
    assert "prediction" in result.stderr
    assert ("case0", "1", "dice", "prediction") in read_metrics(study.output)


def test_when_no_case_can_be_compared_there_is_no_verdict(tmp_path):
    study = write_study(tmp_path, 1)
    for folder in (study.labels, study.after, study.before):
        save_map(folder / "case0.nii.gz", np.zeros(SHAPE, np.uint8))
    expected = "no verdict: no case has a region that could be measured for prediction and before\n"
    assert run_here(*study.arguments, status=0).stdout == expected
    assert read_metrics(study.output) == {}
    (study.before / "case0.nii.gz").write_bytes(b"not an image")
    save_map(study.labels / "case0.nii.gz", study.maps["labels"]["case0"])
    result = run_here(*study.arguments, status=1)
    assert (
        result.stdout.splitlines()[-1]
        == "no verdict: no case has a region that could be measured for before"
    )
    (study.after / "case0.nii.gz").write_bytes(b"not an image")
    run_here(*study.arguments, status=1)
    assert read_metrics(study.output) == {}
    assert len(study.summary()["failures"]) == 2


def test_fail_fast_stops_at_the_first_bad_case(tmp_path):
    study = write_study(tmp_path)
    cut_off(study, "case1")
    result = run_here(*study.arguments, "--fail-fast", status=1)
    assert "stopped at case 'case1' (--fail-fast)" in result.stderr
    assert files_in(study.output) == []


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-b", "before={before}"], "two methods have this name"),
        (["--name", "before"], "two methods have this name"),
        (["--name", "reference"], "use this name for the reference, LABELS"),
        (
            ["-b", "Reference={before}", "--map", "reference:1=2"],
            "--baseline Reference: results and --map use this name for the reference",
        ),
        (["-r", "regions.json"], "region 'regions.json': expected NAME=LABEL+LABEL+..."),
        (["-r", "all=1+2"], "'all': is the name of a label, or of all labels together"),
        (["-r", "2=1+3"], "'2': is the name of a label, or of all"),
        (["-r", "a=1", "-r", "a=2"], "appears twice, with different labels"),
        (["-r", "a=1+9", "--ignore-label", "9"], "label 9 marks voxels that are ignored"),
        (["--tolerance", "-1"], "--tolerance: expected a number of mm, at least 0, got -1"),
        (["--tolerance", "nan"], "--tolerance"),
        (
            ["--ceiling", "before"],
            "--ceiling before: expected the name of a --baseline after the first",
        ),
        (["-i", "{root}/none"], "no such file or folder"),
        (["-o", "{after}"], "is an input of this run"),
        (["-o", "{after}/case0.nii.gz"], "is a file; name a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_be_followed(one, options, message):
    result = run_here(
        *one.arguments,
        *(text.format(before=one.before, after=one.after, root=one.root) for text in options),
        status=1,
    )
    assert message in result.stderr
    assert result.stderr.startswith("crfrefine: error: ")
    assert "metrics.csv" not in files_in(one.output) + files_in(one.after)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"labels": {"background": 0, "core": 1, "ignore": 2,}}', "line 1 column"),
        ('{"labels": {"ignore": 1}, "labels": {"ignore": 2}}', "the key 'labels' appears twice"),
    ],
    ids=["comma at the end", "key twice"],
)
@pytest.mark.parametrize("place", ["labels", "."], ids=["beside", "above"])
def test_a_damaged_description_of_the_references_ends_the_run(tmp_path, text, reason, place):
    """Without it, the label to ignore would count as foreground."""
    study = write_study(tmp_path, 1)
    described = study.root / place / "dataset.json"
    described.write_text(text)
    result = run_here(*study.arguments, status=1)
    assert result.stderr.startswith(f"crfrefine: error: {described}: not a dataset.json")
    assert reason in result.stderr
    assert not study.output.exists()


def test_a_region_that_cannot_be_called_so_does_not_bring_back_the_ignored_label(tmp_path):
    study = write_study(tmp_path, 1)
    described = {"labels": {"background": 0, "core": 1, "mean": [1, 3], "ignore": 2}}
    (study.labels / "dataset.json").write_text(json.dumps(described))
    result = run_here(*study.arguments, status=0)
    assert (
        "dataset.json: region 'mean': expected a name of 1 to 200 characters that is not"
        in result.stderr
    )
    assert result.stderr.count("continuing without its regions") == 1
    assert {label for _, label, _, _ in read_metrics(study.output)} == {"1", "3"}
    assert study.summary()["settings"]["ignore_label"] == 2


NUM_CASES = 9
NAMES = tuple(f"case{number}" for number in range(NUM_CASES))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("study"), NUM_CASES)


def refined(study, output, trained_on, *options):
    """Refine all cases with parameters, as if these had been learned on some of the cases; return
    what the run says.
    """
    file = output.with_suffix(".toml")
    wide = CrfParameters().replace(**{"bilateral.theta_alpha": 8.0})
    dataclasses.replace(wide, trained_on=trained_on).save(file)
    return run_here(
        "infer",
        "-i",
        study / "images",
        "-p",
        study / "logits",
        "-o",
        output,
        "-c",
        file,
        *options,
        status=0,
    )


def evaluated(study, predictions, *options):
    """Evaluate; return the summary and what the run says."""
    output = predictions.with_name("evaluation")
    result = run_here(
        "evaluate",
        predictions,
        study / "labels",
        "--processes",
        1,
        "-o",
        output,
        *options,
        status=0,
    )
    return json.loads((output / "summary.json").read_text()), result


def test_the_verdict_is_over_the_cases_that_were_not_used_for_learning(study, tmp_path):
    """The file names two of the nine cases, and another."""
    told = refined(study, tmp_path / "refined", ("case1", "elsewhere", "case4"))
    assert "2 of 9 cases are among those that the parameters were learned on" in told.stderr
    options = ("-b", f"network={study / 'logits'}", "-b", f"plain={tmp_path / 'plain'}")
    refined(study, tmp_path / "plain", (), "--set", "bilateral.weight=1")
    whole, result = evaluated(study, tmp_path / "plain", *options[:2])
    assert (whole["cases_learned_on"], whole["verdict"]["comparison"]["num_pairs"]) == (
        {},
        NUM_CASES,
    )
    assert "learn" not in result.stdout
    summary, result = evaluated(study, tmp_path / "refined", *options)
    assert summary["cases_learned_on"] == {"prediction": ["case1", "case4"]}
    judged = summary["verdict"]
    assert judged["comparison"]["num_pairs"] == 7
    assert [rival["comparison"]["num_pairs"] for rival in judged["rivals"]] == [7]
    for decline in judged["harm"]["significant"] + judged["harm"]["in_most_cases"]:
        assert decline["comparison"]["num_pairs"] <= 7
    lines = (tmp_path / "evaluation" / "metrics.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines} == {"case", *NAMES}
    start = (
        "2 of 9 cases used to learn the parameters of the refinement: "
        "no evidence for new cases. Without these: "
    )
    assert judged["sentence"].startswith(start)
    assert "of 7 cases better" in judged["sentence"]
    assert result.stdout.splitlines()[-1] == f"verdict: {judged['sentence']}"
    dice = next(
        row
        for row in summary["summary"]
        if (row["metric"], row["region"], row["method"]) == ("dice", "mean", "prediction")
    )
    assert dice["num_values"] == 7
    assert dice["comparison"] == judged["comparison"]
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert start in page
    assert '<td class="number">7</td><td class="number">0</td></tr>' in page, (
        "7 cases, and none left out"
    )
    assert '<td class="number">9</td>' not in page


def test_there_is_no_verdict_if_all_cases_were_used_for_learning(study, tmp_path):
    """The label maps are links into the folder of `infer`, and one file is evaluated by itself."""
    refined(study, tmp_path / "refined", NAMES)
    links = tmp_path / "links"
    links.mkdir()
    for path in (tmp_path / "refined").glob("*.nii.gz"):
        (links / path.name).symlink_to(path)
    summary, result = evaluated(study, links, "-b", f"network={study / 'logits'}", "--name", "crf")
    assert summary["verdict"]["outcome"] == "not tested"
    assert summary["verdict"]["sentence"] == (
        "Not tested: 9 of 9 cases used to learn the parameters of crf: "
        "no evidence for new cases; the verdict of train-crf is on cases held out."
    )
    assert summary["power_note"] is None
    assert [row["num_values"] for row in summary["summary"] if row["metric"] == "volume_ml"] == [
        9
    ] * 8
    assert result.stdout.splitlines()[-1].startswith("verdict: Not tested: 9 of 9 cases")
    output = tmp_path / "single"
    files = (tmp_path / "refined" / "case3.nii.gz", study / "labels" / "case3.nii.gz")
    result = run_here("evaluate", *files, "--no-report", "-o", output, status=0)
    assert (
        "1 of 1 case used to learn the parameters of the refinement: no evidence for new cases"
        in result.stderr
    )
    assert json.loads((output / "summary.json").read_text())["cases_learned_on"] == {
        "prediction": ["case3"]
    }


@pytest.mark.parametrize("output", ["maps/{case}.nii.gz", "x/{case}/seg.mha"])
def test_cases_used_for_learning_are_known_in_the_folders_of_a_manifest(study, tmp_path, output):
    manifest = tmp_path / "cases.csv"
    lines = ["case,images,logits,output"]
    for name in NAMES[:3]:
        (logits,) = (study / "logits").glob(f"{name}.*")
        images = ";".join(map(str, sorted((study / "images").glob(f"{name}_*"))))
        lines.append(f"{name},{images},{logits},{output.format(case=name)}")
    manifest.write_text("\n".join(lines))
    parameters = tmp_path / "parameters.toml"
    dataclasses.replace(CrfParameters(), trained_on=("case1", "case4")).save(parameters)
    folder = tmp_path / "refined"
    given = ("--manifest", manifest, "-c", parameters)
    run_here("infer", *given, "-o", folder, status=0)
    files = (folder / output, study / "labels")
    options = ("--no-report", "--processes", 1, "-o", tmp_path / "evaluation")
    run_here("evaluate", *files, *options, status=0)
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["cases_learned_on"] == {"prediction": ["case1"]}


def test_the_newest_record_of_a_label_map_counts_and_a_damaged_record_is_noted(study, tmp_path):
    folder = tmp_path / "refined"
    refined(study, folder, NAMES)
    refined(study, folder, ("case2",), "--continue")
    summary, _ = evaluated(study, folder, "--no-report")
    assert summary["cases_learned_on"] == {"prediction": ["case2"]}
    assert summary["notes"][-1]["text"] == (
        "1 of 9 cases used to learn the parameters of the refinement: no evidence for new cases; "
        "means and charts leave them out, if there are others"
    )
    assert {row["num_values"] for row in summary["summary"] if row["metric"] == "volume_ml"} == {8}
    (record,) = (folder / ".crfrefine").iterdir()
    for damaged, learned_on in (
        ("no JSON\n" + record.read_text(), {"prediction": ["case2"]}),
        ("no JSON\n", {}),
    ):
        record.write_text(damaged)
        summary, result = evaluated(study, folder, "--no-report")
        assert summary["cases_learned_on"] == learned_on
        assert f"{record}: " in result.stderr
        assert "its parameters may have been learned on more cases than are known" in result.stderr
