"""`infer`, `evaluate` and `train-crf` on a Dask cluster, as users start one: scheduler and worker are processes of their own."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
from cli_helpers import FAST, files_in, infer, run_here, run_process, write_folders
from cluster_helpers import daemons
from evaluation_helpers import write_study
from training_helpers import write_cases

from crfrefine.runs.execution.cluster.connection import OPEN_TO_OTHERS

# A worker that is restarted is away for a moment, for long on a busy machine.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning")
long = pytest.mark.long
EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
OPENING = ("case_id", "status", "output", "grid_shape", "energy", "voxels_changed", "notes", "error", "filters")


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with daemons(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def test_outputs_and_records_are_those_of_the_plain_run(cluster, tmp_path, monkeypatch):
    write_folders(tmp_path, *"abc")
    (tmp_path / "logits" / "b.nii.gz").write_bytes(b"no volume")
    monkeypatch.chdir(tmp_path)
    arguments = ("infer", "-i", "images", "-p", "logits", *FAST, "--threads", 1, "--save-probabilities", "-o")
    plain = run_here(*arguments, "plain", "--summary", "plain.json")
    there = run_here(*arguments, "out", "--summary", "there.json", "--dask", cluster.address)
    assert (plain.status, there.status) == (1, 1)
    assert contents(tmp_path / "plain") == contents(tmp_path / "out")
    expected, found = (json.loads(Path(name).read_text().replace("plain/", "out/"))["cases"] for name in ("plain.json", "there.json"))
    assert [{name: case[name] for name in OPENING} for case in found] == [{name: case[name] for name in OPENING} for case in expected]


def test_evaluate_measures_the_same(cluster, tmp_path):
    study = write_study(tmp_path)
    plain = run_here(*study.arguments)
    expected = (study.output / "metrics.csv").read_bytes()
    arguments = [word for word in study.arguments if word not in ("--processes", "1")]
    there = run_here(*arguments, "--dask", cluster.address)
    assert (there.status, there.stdout) == (plain.status, plain.stdout)
    assert (study.output / "metrics.csv").read_bytes() == expected


@long
def test_train_crf_finds_the_same_with_its_folds_on_workers(cluster, tmp_path):
    """The written parameters are the same text but for the command and the date, which are comments."""
    data = write_cases(tmp_path / "data", 4)
    quick = ("--learn", "weights,temperature", "--set", "bilateral.theta_beta=0.1", "--threads", "1")
    arguments = ("train-crf", data, "--folds", "2", "--num-iterations", "1", *quick, "-o")
    plain = run_here(*arguments, tmp_path / "plain.toml")
    there = run_here(*arguments, tmp_path / "there.toml", "--dask", cluster.address)
    assert (plain.status, there.status) == (0, 0), there.stderr
    found = [tomllib.loads((tmp_path / name).read_text()) for name in ("plain.toml", "there.toml")]
    assert found[0] == found[1]
    assert there.stdout.replace("there.toml", "plain.toml") == plain.stdout


def test_a_time_limit_without_a_cluster_costs_the_case(tmp_path):
    folders = write_folders(tmp_path, "a")
    slow = ("--set", "mean_field.num_iterations=10000", "--set", "mean_field.tolerance=0")
    result = run_here("infer", *folders.arguments, *slow, "--case-timeout", "0.3")
    assert (result.status, files_in(folders.output)) == (1, [])
    assert "case 'a': took longer than the 0.3 s of --case-timeout and was stopped" in result.stderr


@long
def test_tls_is_taken_from_the_configuration_of_dask(tmp_path, monkeypatch):
    made = subprocess.run([EXAMPLES / "certificates.sh", tmp_path / "tls"], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("no openssl")
    folders = write_folders(tmp_path, "a")
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "tls" / "dask.yaml"))
    with daemons(tmp_path, scheduler_options=("--protocol", "tls")) as cluster:
        address = json.loads(Path(cluster.address).read_text())["address"]
        assert address.startswith("tls://")
        assert run_process("infer", *folders.arguments, *FAST, "--dask", address).status == 0


def test_contradictory_options_are_wrong_usage(tmp_path):
    for name, options, reason in (
        ("infer", ("--workers", "2", "--dask", "tcp://a:1"), "leave one of them out"),
        ("infer", ("--case-timeout", "0"), "a number of seconds above 0"),
        ("infer", ("--case-timeout", "nan"), "a number of seconds above 0"),
        ("infer", ("--workers", "0"), "--workers"),
        ("infer", ("--dask", ""), "the value is empty"),
        ("evaluate", ("--workers", "2", "--processes", "2"), "leave --processes out"),
    ):
        inputs = ("-i", tmp_path, "-p", tmp_path) if name == "infer" else (tmp_path, tmp_path)
        result = run_here(name, *inputs, "-o", tmp_path / "out", *options, status=2)
        assert reason in " ".join(result.stderr.split())


def test_a_cluster_that_others_could_use_is_not_started(tmp_path, monkeypatch):
    """Without certificates, any user of the machine could run programs as the user."""
    monkeypatch.setattr("crfrefine.runs.execution.cluster.connection._may_encrypt", lambda: False)
    monkeypatch.setattr("distributed.LocalCluster", lambda *_, **__: pytest.fail("a cluster was started"))
    monkeypatch.delenv("CRFREFINE_UNENCRYPTED_WORKERS", raising=False)
    folders = write_folders(tmp_path, "a")
    result = run_here("infer", *folders.arguments, "--workers", "1", "-q", status=1)
    for words in (
        "other users of this machine could run programs as you",
        "pip install cryptography",
        "CRFREFINE_UNENCRYPTED_WORKERS=allow",
    ):
        assert words in " ".join(result.stderr.split())
    assert files_in(folders.output) == []


@long
def test_workers_is_a_cluster_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CRFREFINE_UNENCRYPTED_WORKERS", "allow")  # This environment may have no `cryptography`.
    monkeypatch.setattr("crfrefine.runs.execution.cluster.connection._may_encrypt", lambda: False)
    folders = write_folders(tmp_path, "a", "b")
    assert infer(folders, "--threads", 1).status == 0
    expected = contents(folders.output)
    result = infer(folders, "--threads", 1, "--workers", "1", "--case-timeout", "600", "-q")
    assert (result.status, result.stderr) == (0, f"crfrefine: warning: {OPEN_TO_OTHERS}\n")
    assert contents(folders.output) == expected
