"""`infer`, `evaluate` and `train-crf` on a Dask cluster, as users start one: scheduler and worker are processes of their own."""

import contextlib
import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from cli_helpers import files_in, run_here, run_process, write_folders
from cluster_helpers import cluster_in_process, daemons
from evaluation_helpers import write_study
from training_helpers import write_cases

from crfrefine.cli.evaluation_reporting import EvaluationReporter
from crfrefine.cli.reporting import Reporter
from crfrefine.cli.training_reporting import TrainingReporter
from crfrefine.execution.cluster.connection import OPEN_TO_OTHERS

# A worker that is restarted is away for a moment, for long on a busy machine.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning")
long = pytest.mark.long
EXAMPLES = Path(__file__).parents[2] / "examples" / "clusters"
OPENING = ("case_id", "status", "output", "grid_shape", "energy", "voxels_changed", "notes", "error", "filters")

QUICK = ("--set", "mean_field.num_iterations=1", "--set", "mean_field.filter=truncated", "--threads", 1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with daemons(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def light():
    """The address of a cluster in this process."""
    with cluster_in_process(1, is_light=True) as running:
        yield running.scheduler_address


def records(path: Path) -> list[dict[str, object]]:
    """The records of a summary, without times."""
    cases = json.loads(path.read_text())["cases"]
    return [{name: case[name] for name in OPENING} for case in cases]


def test_outputs_and_records_are_those_of_the_plain_run(light, tmp_path, monkeypatch):
    """With relative paths and a bad case; the process of a case has its folder from the run."""
    write_folders(tmp_path, *"abc")
    (tmp_path / "logits" / "b.nii.gz").write_bytes(b"no volume")
    monkeypatch.chdir(tmp_path)
    arguments = ("infer", "-i", "images", "-p", "logits", *QUICK, "--save-probabilities", "-o")
    plain = run_here(*arguments, "plain", "--summary", "plain.json")
    there = run_here(*arguments, "out", "--summary", "there.json", "--dask", light)
    assert (plain.status, there.status) == (1, 1)
    assert files_in(tmp_path / "plain") == files_in(tmp_path / "out")
    for name in files_in(tmp_path / "plain"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    expected = json.loads(json.dumps(records(tmp_path / "plain.json")).replace("plain/", "out/"))
    assert records(tmp_path / "there.json") == expected


@long
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
    arguments = ("train-crf", data, "--folds", "2", "--num-iterations", "2", "--threads", "1", "-o")
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
def test_tls_is_taken_from_the_configuration_of_dask(tmp_path):
    made = subprocess.run([EXAMPLES / "certificates.sh", tmp_path / "tls"], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("no openssl")
    folders = write_folders(tmp_path, "a")
    config = {"DASK_CONFIG": str(tmp_path / "tls" / "dask.yaml")}
    with set_environment(config), daemons(tmp_path, scheduler_options=("--protocol", "tls")) as cluster:
        address = json.loads(Path(cluster.address).read_text())["address"]
        assert address.startswith("tls://")
        assert run_process("infer", *folders.arguments, "--dask", address).status == 0
        del os.environ["DASK_CONFIG"]
        refused = run_process("infer", *folders.arguments, "--dask", address)
    assert refused.status == 1
    assert "distributed.comm.tls" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_each_part_of_the_kubernetes_file_is_read_by_itself():
    """As the cluster reads it: an anchor of one document is unknown in the next."""
    kinds = [part["kind"] for part in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())]
    assert kinds == ["Service", "Deployment", "Deployment", "Job"]


@contextlib.contextmanager
def set_environment(values: dict[str, str]):
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            os.environ.pop(name, None)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("infer", ("--workers", "2", "--dask", "tcp://a:1"), "leave one of them out"),
        ("infer", ("--case-timeout", "0"), "a number of seconds above 0"),
        ("infer", ("--case-timeout", "nan"), "a number of seconds above 0"),
        ("infer", ("--workers", "0"), "--workers"),
        ("infer", ("--dask", ""), "the path is empty"),
        ("evaluate", ("--workers", "2", "--processes", "2"), "leave --processes out"),
    ],
)
def test_contradictory_options_are_wrong_usage(tmp_path, name, options, reason):
    inputs = ("-i", tmp_path, "-p", tmp_path) if name == "infer" else (tmp_path, tmp_path)
    result = run_here(name, *inputs, "-o", tmp_path / "out", *options)
    assert result.status == 2
    assert reason in " ".join(result.stderr.split())


@pytest.mark.parametrize("options", [(), ("-q",)], ids=["", "quiet"])
def test_a_cluster_that_others_could_use_is_not_started(tmp_path, monkeypatch, options):
    """Without certificates, any user of the machine could run programs as the user."""
    monkeypatch.setattr("crfrefine.execution.cluster.connection._may_encrypt", lambda: False)
    monkeypatch.setattr("distributed.LocalCluster", lambda *_, **__: pytest.fail("a cluster was started"))
    monkeypatch.delenv("CRFREFINE_UNENCRYPTED_WORKERS", raising=False)
    folders = write_folders(tmp_path, "a")
    result = run_here("infer", *folders.arguments, "--workers", "1", *options)
    assert result.status == 1
    assert "other users of this machine could run programs as you" in " ".join(result.stderr.split())
    assert "pip install cryptography" in result.stderr
    assert "CRFREFINE_UNENCRYPTED_WORKERS=allow" in result.stderr
    assert files_in(folders.output) == []


@pytest.mark.parametrize("reporter", [Reporter, EvaluationReporter, TrainingReporter])
def test_a_warning_about_security_is_shown_however_quiet_the_run_is(reporter, capsys):
    for verbosity in (0, 1):
        reporter(verbosity).warning(OPEN_TO_OTHERS)
        assert capsys.readouterr().err == f"crfrefine: warning: {OPEN_TO_OTHERS}\n"


@long
def test_workers_is_a_cluster_of_the_run(tmp_path, monkeypatch):
    """It begins and ends with the run; outputs are those of the plain run."""
    monkeypatch.setenv("CRFREFINE_UNENCRYPTED_WORKERS", "allow")  # This environment may have no `cryptography`.
    monkeypatch.setattr("crfrefine.execution.cluster.connection._may_encrypt", lambda: False)
    folders = write_folders(tmp_path, "a", "b")
    assert run_here("infer", *folders.arguments, *QUICK).status == 0
    expected = {name: (folders.output / name).read_bytes() for name in files_in(folders.output)}
    result = run_here("infer", *folders.arguments, *QUICK, "--workers", "1", "--case-timeout", "600", "-q")
    assert (result.status, result.stderr) == (0, f"crfrefine: warning: {OPEN_TO_OTHERS}\n")
    assert {name: (folders.output / name).read_bytes() for name in files_in(folders.output)} == expected
    again = run_here("infer", *folders.arguments, *QUICK, "--workers", "1", "--continue")
    assert [line.split("\t")[:2] for line in again.stdout.splitlines()[1:]] == [["a", "skipped"], ["b", "skipped"]]
