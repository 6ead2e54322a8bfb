"""Inputs that are not what the user takes them for, one cause that fails many cases, cases that lack a file: told once."""

import numpy as np
from cli_helpers import GRID_SHAPE, errors, infer, load_nifti, run_here, save_nifti
from evaluation_helpers import read_metrics, write_study

CASES = ("c0", "c1", "c2")
EXCHANGED = "-i and -p seem to be exchanged"


def test_one_cause_is_told_once_and_the_other_cases_named(folders):
    """By the message without names and numbers; another cause is told apart."""
    for case_id in ("c0", "c1", "c2"):
        path = folders.logits / f"{case_id}.nii.gz"
        if case_id == "c0":
            path.write_bytes(b"")
        else:
            save_nifti(path, load_nifti(path)[: -1 - int(case_id[1])])
    result = infer(folders, "-q", status=1)
    other, first, second = errors(result.stderr)
    assert "case 'c0': " in other
    assert first == "crfrefine: error: case 'c1': logits and image are on different grids"
    assert second == "crfrefine: error: 1 more case failed like 'c1' (c2): logits and image are on different grids"
    assert result.stderr.count("--resample") == 1
    assert len(errors(infer(folders, "-v").stderr)) == 3, "verbose tells each"


def test_exchanged_inputs_are_named(folders, tmp_path):
    """Numbered images; archives, which are no images at all; files of one name."""
    save_nifti(tmp_path / "c0.nii.gz", (load_nifti(folders.images / "c0_0000.nii.gz") * 0.37).astype(np.float32))
    np.savez(tmp_path / "c0.npz", logits=load_nifti(folders.logits / "c0.nii.gz").transpose())
    for images, logits in (
        (folders.logits, folders.images),
        (tmp_path / "c0.npz", folders.images / "c0_0000.nii.gz"),
        (folders.logits / "c0.nii.gz", tmp_path / "c0.nii.gz"),
    ):
        output = folders.output if images.is_dir() else tmp_path / "out.nii.gz"
        result = run_here("infer", "-i", images, "-p", logits, "-o", output, status=1)
        assert EXCHANGED in result.stderr


def test_the_layout_of_totalsegmentators_data_sets_is_found(tmp_path):
    data = tmp_path / "data"
    for seed, case_id in enumerate(("s0001", "s0002")):
        save_nifti(data / case_id / "ct.nii.gz", np.random.default_rng(seed).normal(0, 90, GRID_SHAPE).astype(np.int16))
        for number, name in enumerate(("aorta", "liver", "spleen")):
            mask = np.zeros(GRID_SHAPE, np.uint8)
            mask[4 * number : 4 * number + 3, 3:11, 2:9] = 1
            save_nifti(data / case_id / "segmentations" / f"{name}.nii.gz", mask)
    (data / "meta.csv").write_text("image_id;age\n")
    without = run_here("infer", "-i", data, "-p", data, "-o", tmp_path / "out")
    assert len(errors(without.stderr)) == 1
    assert "--input-type labels" in without.stderr
    result = run_here("infer", "-i", data, "-p", data, "-o", tmp_path / "out", "--input-type", "labels", "--set", "bilateral.weight=0")
    assert result.status == 0, result.stderr
    assert "such as s0001/ct.nii.gz" in result.stderr
    assert load_nifti(tmp_path / "out" / "s0002.nii.gz").max() == 3
    judged = run_here("evaluate", tmp_path / "out", data, "-o", tmp_path / "report", "--processes", 1, "--no-report", "-i", data, status=0)
    assert "liver" in judged.stdout
    shown = run_here("info", data).stdout
    assert "s0001  3 structures" in shown
    assert f"-p {data} and -i {data} and --input-type labels" in shown


def test_many_files_after_one_option_are_told_to_be_a_folder(folders):
    """As the shell makes of `-i images/*.nii.gz`; or as files of several cases with the option each."""
    first, second, third = (folders.images / f"{case}_0000.nii.gz" for case in CASES)
    result = run_here("infer", "-i", first, second, third, "-p", folders.logits, "-o", folders.output, status=2)
    assert "An option takes one path: give the folder of many cases, or repeat the option for the files of one case." in result.stderr
    result = run_here("infer", "-i", first, "-i", second, "-p", folders.logits, "-o", folders.output, status=1)
    assert errors(result.stderr) == [f"crfrefine: error: {first}: files of 2 cases, c0, c1; give the folder of the images"]


def test_evaluate_is_over_the_cases_that_every_method_has(tmp_path):
    """Of six cases, case 1 lacks its prediction, case 2 its baseline, case 3 its reference."""
    study = write_study(tmp_path, 6)
    for path in (study.after / "case1.nii.gz", study.before / "case2.nii.gz", study.labels / "case3.nii.gz"):
        path.unlink()
    reasons = {
        "case1": f"no prediction in {study.after}",
        "case2": f"no prediction in {study.before}",
        "case3": f"no label map in {study.labels}",
    }
    result = run_here(*study.arguments, "--strict", status=1)
    assert "crfrefine: error: 3 of 6 cases are incomplete, which --strict refuses:\n" in result.stderr
    assert not study.output.exists()
    (study.after / "case4.nii.gz").write_bytes(b"not an image")
    result = run_here(*(argument for argument in study.arguments if argument != "--no-report"), status=1)
    assert result.stderr.splitlines()[-1] == "failed: case4 (1 of 3 cases)"
    said = "3 of 6 cases are left out: " + "; ".join(f"{reason} (1): {case}" for case, reason in reasons.items())
    assert f"note: {said}\n" in result.stderr
    assert f"<li>{said}" in (study.output / "report.html").read_text()
    assert {case for case, _, _, name in read_metrics(study.output) if name == "prediction"} == {"case0", "case5"}
    summary = study.summary()
    assert summary["left_out"] == [{"case": case, "reasons": [reason]} for case, reason in reasons.items()]
    assert (summary["num_cases"], summary["num_failed"], summary["num_left_out"]) == (3, 1, 3)
    assert [failure["case"] for failure in summary["failures"]] == ["case4"]
    comparison = summary["verdict"]["comparison"]
    assert (comparison["num_pairs"], comparison["num_only_baseline"], comparison["num_only_method"]) == (2, 0, 0)
