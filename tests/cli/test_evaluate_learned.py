"""`evaluate` on cases that the parameters were learned on: they are no evidence, and the verdict is over the others."""

import dataclasses
import json

import pytest
from cli_helpers import run_here
from training_helpers import write_cases

from crfrefine.parameters.model import CrfParameters

NUM_CASES = 9
NAMES = tuple(f"case{number}" for number in range(NUM_CASES))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_cases(tmp_path_factory.mktemp("study"), NUM_CASES)


def refined(study, output, trained_on, *options):
    """Refine all cases with parameters, as if these had been learned on some of the cases; return what the run says."""
    file = output.with_suffix(".toml")
    wide = CrfParameters().replace(**{"bilateral.theta_alpha": 8.0})
    dataclasses.replace(wide, trained_on=trained_on).save(file)
    return run_here("infer", "-i", study / "images", "-p", study / "logits", "-o", output, "-c", file, *options, status=0)


def evaluated(study, predictions, *options):
    """Evaluate; return the summary and what the run says."""
    output = predictions.with_name("evaluation")
    result = run_here("evaluate", predictions, study / "labels", "--processes", 1, "-o", output, *options, status=0)
    return json.loads((output / "summary.json").read_text()), result


def test_the_verdict_is_over_the_cases_that_were_not_used_for_learning(study, tmp_path):
    """The file names two of the nine cases, and another."""
    told = refined(study, tmp_path / "refined", ("case1", "elsewhere", "case4"))
    assert "2 of 9 cases are among those that the parameters were learned on" in told.stderr
    options = ("-b", f"network={study / 'logits'}", "-b", f"plain={tmp_path / 'plain'}")
    refined(study, tmp_path / "plain", (), "--set", "bilateral.weight=1")
    whole, result = evaluated(study, tmp_path / "plain", *options[:2])
    assert (whole["cases_learned_on"], whole["verdict"]["comparison"]["num_pairs"]) == ({}, NUM_CASES)
    assert "learn" not in result.stdout
    summary, result = evaluated(study, tmp_path / "refined", *options)
    assert summary["cases_learned_on"] == {"prediction": ["case1", "case4"]}
    judged = summary["verdict"]
    assert judged["comparison"]["num_pairs"] == 7
    assert [rival["comparison"]["num_pairs"] for rival in judged["rivals"]] == [7]
    assert all(decline["comparison"]["num_pairs"] <= 7 for decline in judged["harm"]["significant"] + judged["harm"]["in_most_cases"])
    assert {line.split(",")[0] for line in (tmp_path / "evaluation" / "metrics.csv").read_text().splitlines()} == {"case", *NAMES}
    start = "2 of 9 cases were used to learn the parameters of the refinement and are no evidence for new cases. Without them: "
    assert judged["sentence"].startswith(start)
    assert "of 7 cases better" in judged["sentence"]
    assert result.stdout.splitlines()[-1] == f"verdict: {judged['sentence']}"
    dice = next(row for row in summary["summary"] if (row["metric"], row["region"], row["method"]) == ("dice", "mean", "prediction"))
    assert dice["num_values"] == 7
    assert dice["comparison"] == judged["comparison"]
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert start in page
    assert '<td class="number">7</td><td class="number">0</td></tr>' in page, "7 cases, and none left out"
    assert '<td class="number">9</td>' not in page


def test_there_is_no_verdict_if_all_cases_were_used_for_learning(study, tmp_path):
    """The label maps are links into the folder of `infer`, and one file is evaluated by itself."""
    refined(study, tmp_path / "refined", NAMES)
    links = tmp_path / "links"
    links.mkdir()
    for name in NAMES:
        (links / f"{name}.nii.gz").symlink_to(tmp_path / "refined" / f"{name}.nii.gz")
    summary, result = evaluated(study, links, "-b", f"network={study / 'logits'}", "--name", "crf")
    assert summary["verdict"]["outcome"] == "not tested"
    assert summary["verdict"]["sentence"] == (
        "Not tested: all 9 cases were used to learn the parameters of crf and are no evidence for new cases; the verdict of train-crf "
        "is on cases held out."
    )
    assert summary["power_note"] is None
    assert [row["num_values"] for row in summary["summary"] if row["metric"] == "volume_ml"] == [9] * 8
    assert result.stdout.splitlines()[-1].startswith("verdict: Not tested: all 9 cases")
    output = tmp_path / "single"
    files = tmp_path / "refined" / "case3.nii.gz", study / "labels" / "case3.nii.gz"
    result = run_here("evaluate", *files, "--no-report", "-o", output, status=0)
    assert "the only case was used to learn the parameters of the refinement and is no evidence for new cases" in result.stderr
    assert json.loads((output / "summary.json").read_text())["cases_learned_on"] == {"prediction": ["case3"]}


def test_the_newest_record_of_a_label_map_counts_and_a_damaged_record_is_noted(study, tmp_path):
    folder = tmp_path / "refined"
    refined(study, folder, NAMES)
    refined(study, folder, ("case2",), "--continue")
    summary, _ = evaluated(study, folder, "--no-report")
    assert summary["cases_learned_on"] == {"prediction": ["case2"]}
    start = "1 of 9 cases was used to learn the parameters of the refinement and is no evidence for new cases; means "
    assert summary["notes"][-1] == f"{start}and charts are over the other 8, metrics.csv has all"
    assert {row["num_values"] for row in summary["summary"] if row["metric"] == "volume_ml"} == {8}
    (record,) = (folder / ".crfrefine").iterdir()
    for damaged, learned_on in (("no JSON\n" + record.read_text(), {"prediction": ["case2"]}), ("no JSON\n", {})):
        record.write_text(damaged)
        summary, result = evaluated(study, folder, "--no-report")
        assert summary["cases_learned_on"] == learned_on
        assert f"{record}: " in result.stderr
        assert "its parameters may have been learned on more cases than are known" in result.stderr
