"""The BIDS App: derivatives of a network in, derivatives out, by the names and files that BIDS asks for."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bids_helpers import describe, write_bids
from cli_helpers import FAST, SPACING, load_nifti, run_here, save_nifti, statuses

import crfrefine
from crfrefine.cli.entries import bids_arguments

LATTICE = crfrefine.CrfParameters().replace(**{"mean_field.filter": "lattice"})
VALIDATOR = shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent)) or shutil.which("bids-validator-deno")


def run_bids(*arguments, status=None):
    fast = ("--threads", "1", *FAST) if "participant" in arguments else ()
    return run_here(*bids_arguments([str(argument) for argument in (*arguments, *fast)]), status=status)


def refine_as(derivatives, dataset, place, name, *suffixes):
    image = np.stack([load_nifti(dataset / place / f"{name}_{suffix}.nii.gz") for suffix in suffixes])
    scores = np.moveaxis(load_nifti(derivatives / place / f"{name}_probseg.nii.gz"), -1, 0)
    return crfrefine.refine(scores, image, spacing=SPACING, parameters=LATTICE, input_type="probabilities").label_map


def test_participants_are_refined_into_derivatives(tmp_path):
    dataset, derivatives, _ = write_bids(tmp_path, "sub-01_acq-x_run-1", "sub-02_ses-a", "sub-02_ses-b")
    output = tmp_path / "out put"
    run_bids(dataset, output, "participant", status=0)
    cases = {"sub-01_acq-x_run-1": "sub-01/anat", "sub-02_ses-a": "sub-02/ses-a/anat", "sub-02_ses-b": "sub-02/ses-b/anat"}
    wanted = {f"{place}/{name}_desc-crf_dseg{suffix}" for name, place in cases.items() for suffix in (".nii.gz", ".json")}
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert found == wanted | {"dataset_description.json", "README", ".bidsignore"}
    for name, place in cases.items():
        labels = load_nifti(output / place / f"{name}_desc-crf_dseg.nii.gz")
        np.testing.assert_array_equal(labels, refine_as(derivatives, dataset, place, name, "T1w"))
    description = json.loads((output / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"] == [{"Name": "crfrefine", "Version": crfrefine.__version__}]
    assert (output / description["DatasetLinks"]["network"].replace("%20", " ")).samefile(derivatives)
    sidecar = json.loads((output / "sub-02/ses-a/anat/sub-02_ses-a_desc-crf_dseg.json").read_text())
    assert sidecar["Sources"] == [
        "bids:raw:sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz",
        "bids:network:sub-02/ses-a/anat/sub-02_ses-a_probseg.nii.gz",
    ]

    schema = pytest.importorskip("bidsschematools.schema", reason="bidsschematools is not installed").load_schema()
    rules = importlib.import_module("bidsschematools.rules")
    allowed = [re.compile(rule["regex"]) for rule in rules.regexify_filename_rules(schema.rules.files.deriv.imaging, schema, level=1)]
    assert all(any(rule.fullmatch(name) for rule in allowed) for name in wanted), "names are those of the public schema"
    assert not any(rule.fullmatch("sub-01/anat/sub-01_crf_dseg.nii.gz") for rule in allowed)


@pytest.mark.long
@pytest.mark.skipif(VALIDATOR is None, reason="bids-validator-deno is not installed")
def test_the_output_is_a_valid_dataset(tmp_path):
    dataset, _, manual = write_bids(tmp_path, "sub-01_acq-x_run-1", "sub-02_ses-a")
    output = tmp_path / "out"
    assert run_bids(dataset, output, "participant").status == 0
    assert run_bids(dataset, output, "group", "--labels", manual).status == 0
    done = subprocess.run([VALIDATOR, str(output), "--json"], capture_output=True, text=True, timeout=300, check=False)
    issues = json.loads(done.stdout)["issues"]["issues"]
    assert [issue for issue in issues if issue["severity"] == "error"] == []
    assert (done.returncode, {issue["code"] for issue in issues} - {"TOO_FEW_AUTHORS"}) == (0, set())


def test_the_group_is_evaluated_against_a_reference(tmp_path):
    """`--labels manual`, `--derivatives network`: their names under derivatives/, as the guide has it, or paths."""
    dataset, derivatives, manual = write_bids(tmp_path, "sub-01", "sub-02_ses-a")
    shutil.copytree(derivatives, dataset / "derivatives" / "other")
    output, chosen = dataset / "derivatives" / "crf", ("--derivatives", "network")
    assert run_bids(dataset, output, "participant", *chosen).status == 0
    reference = manual / "sub-01" / "anat" / "sub-01_desc-manual_dseg.nii.gz"
    reference.rename(tmp_path / "kept.nii.gz")
    incomplete = run_bids(dataset, output, "group", "--labels", manual, *chosen, status=1)
    assert "sub-01: no reference segmentation; expected one of each" in incomplete.stderr
    shutil.move(tmp_path / "kept.nii.gz", reference)
    shutil.move(manual, dataset / "derivatives" / "manual")
    done = run_bids(dataset, output, "group", "--labels", "manual", *chosen, status=0)
    assert "verdict: " in done.stdout
    rows = (output / "group" / "metrics.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == {"sub-01", "sub-02_ses-a"}
    absent = run_bids(dataset, output, "group", "--labels", "expert", *chosen, status=1)
    assert f"expert: no such folder, nor {dataset / 'derivatives' / 'expert'}" in absent.stderr
    assert "has crf, manual, network, other" in absent.stderr


def test_some_participants_and_sessions_of_which_one_has_no_derivatives(tmp_path):
    dataset, derivatives, _ = write_bids(tmp_path, "sub-01", "sub-02_ses-a", "sub-02_ses-b", "sub-03")
    one = run_bids(dataset, tmp_path / "one", "participant", "--participant-label", "02", "--session-label", "b")
    assert statuses(one) == [("sub-02_ses-b", "done")]
    none = run_bids(dataset, tmp_path / "no", "participant", "--participant-label", "09", status=1)
    assert "no sub-09; there are sub-01, sub-02, sub-03" in none.stderr
    assert not (tmp_path / "no").exists()
    shutil.rmtree(derivatives / "sub-03")
    chosen = (dataset, tmp_path / "out", "participant", "--participant_label", "01", "sub-03")
    for options, status in (((), "done"), (("--continue",), "skipped")):
        done = run_bids(*chosen, *options)
        assert (done.status, statuses(done)) == (1, [("sub-01", status)])
        assert f"sub-03: no segmentation: expected {derivatives}/sub-03/[ses-*/]anat/sub-03_*_probseg.nii.gz" in done.stderr
    assert (tmp_path / "out" / "sub-01" / "anat" / "sub-01_desc-crf_dseg.nii.gz").is_file()


def test_modalities_are_chosen_and_never_guessed(tmp_path):
    dataset, derivatives, _ = write_bids(tmp_path, "sub-01", modalities=("T1w", "FLAIR"))
    unsure = run_bids(dataset, tmp_path / "out", "participant", status=1)
    assert "sub-01: several modalities: FLAIR, T1w; choose with --modality" in unsure.stderr
    assert not (tmp_path / "out").exists()
    run_bids(dataset, tmp_path / "out", "participant", "--modality", "T1w", "--modality", "FLAIR", status=0)
    found = load_nifti(tmp_path / "out" / "sub-01" / "anat" / "sub-01_desc-crf_dseg.nii.gz")
    np.testing.assert_array_equal(found, refine_as(derivatives, dataset, "sub-01/anat", "sub-01", "T1w", "FLAIR"))


def test_one_file_per_label_and_another_space(tmp_path):
    """The raw image is in another space; the one beside the segmentation is on its grid."""
    dataset, derivatives, _ = write_bids(tmp_path, "sub-01")
    folder, output = derivatives / "sub-01" / "anat", tmp_path / "out"
    wanted = refine_as(derivatives, dataset, "sub-01/anat", "sub-01", "T1w")
    channels = load_nifti(folder / "sub-01_probseg.nii.gz")
    (folder / "sub-01_probseg.nii.gz").unlink()
    for number, label in enumerate(("BG", "A", "B", "C")):
        save_nifti(folder / f"sub-01_space-MNI_label-{label}_probseg.nii.gz", channels[..., number])
    options = [word for label in ("BG", "A", "B", "C") for word in ("--label", label)]
    lacking = run_bids(dataset, output, "participant", *options, status=1)
    assert "no image for sub-01_space-MNI_label-A_probseg.nii.gz" in lacking.stderr
    assert "expected sub-01_space-MNI_*.nii.gz" in lacking.stderr
    shutil.copy(dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz", folder / "sub-01_space-MNI_desc-preproc_T1w.nii.gz")
    whole_or_none = run_bids(dataset, output, "participant", status=1)
    assert "expected one with all labels, or --label for each label" in whole_or_none.stderr
    run_bids(dataset, output, "participant", *options, status=0)
    np.testing.assert_array_equal(load_nifti(output / "sub-01" / "anat" / "sub-01_space-MNI_desc-crf_dseg.nii.gz"), wanted)


def test_label_maps_are_refined_if_declared(tmp_path):
    dataset, derivatives, _ = write_bids(tmp_path, "sub-01")
    folder = derivatives / "sub-01" / "anat"
    labels = load_nifti(folder / "sub-01_probseg.nii.gz").argmax(-1).astype(np.uint8)
    (folder / "sub-01_probseg.nii.gz").unlink()
    save_nifti(folder / "sub-01_desc-net_dseg.nii.gz", labels)
    without = run_bids(dataset, tmp_path / "out", "participant", status=1)
    assert "for label maps (*_dseg), give --input-type labels" in without.stderr
    run_bids(dataset, tmp_path / "out", "participant", "--input-type", "labels", status=0)
    image = load_nifti(dataset / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    wanted = crfrefine.refine(labels, image, spacing=SPACING, parameters=LATTICE, input_type="labels").label_map
    np.testing.assert_array_equal(load_nifti(tmp_path / "out" / "sub-01" / "anat" / "sub-01_desc-crf_dseg.nii.gz"), wanted)


def test_datasets_that_cannot_be_used(tmp_path):
    dataset, derivatives, _ = write_bids(tmp_path, "sub-01")
    describe(tmp_path / "theirs", derivative=True)
    shutil.copytree(derivatives, dataset / "derivatives" / "other")
    chosen = ("--derivatives", derivatives)
    for source, output, options, text in (
        (tmp_path, "out", (), f"{tmp_path}: not a BIDS dataset: expected {tmp_path / 'dataset_description.json'}"),
        (dataset, "out", (), "segmentations in network, other; choose with --derivatives"),
        (dataset, derivatives, chosen, "is an input of this run"),
        (dataset, "theirs", chosen, "has a dataset_description.json that crfrefine has not written"),
    ):
        done = run_bids(source, tmp_path / output, "participant", *options, status=1)
        assert text in done.stderr
    shutil.rmtree(dataset / "derivatives")
    none = run_bids(dataset, tmp_path / "out", "participant", status=1)
    assert f"no segmentations of a network: expected {dataset / 'derivatives'}/NAME/sub-*/[ses-*/]anat/*_probseg.nii.gz" in none.stderr
    assert not (tmp_path / "out").exists()


def test_usage():
    assert bids_arguments(["D", "O", "participant", "--participant_label", "01", "02", "-q"]) == [
        *("bids", "D", "O", "participant", "--participant-label", "01", "--participant-label", "02", "-q")
    ]
    assert bids_arguments(["--version"]) == ["--version"]
    assert run_bids("d", "o", "group").status == 2
    assert run_bids("d", "o", "participant", "--labels", "l").status == 2
