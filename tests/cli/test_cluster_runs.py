"""`infer` and `evaluate` on a real Dask cluster, as users start one: scheduler and worker are processes of their own."""

import contextlib
import json
import os
import signal
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from cli_helpers import Folders, command, files_in, run_here, run_process, save_nifti, write_folders
from cluster_helpers import daemons, wait_until
from evaluation_helpers import write_study
from training_helpers import write_cases

from crfrefine.cli.evaluation_reporting import EvaluationReporter
from crfrefine.cli.reporting import Reporter
from crfrefine.cli.training_reporting import TrainingReporter
from crfrefine.execution.cluster.connection import OPEN_TO_OTHERS

# A worker that is restarted is away for a moment, for long on a busy machine.
pytestmark = pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning")
CASES = ("a", "b", "c")
OPENING = ("case_id", "status", "output", "grid_shape", "energy", "voxels_changed", "notes", "error", "filters")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with daemons(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def ignoring_signals():
    """Let started runs receive their signals, even if the tests ignore them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def records(path: Path) -> list[dict[str, object]]:
    """The records of a summary, without times."""
    cases = json.loads(path.read_text())["cases"]
    return [{name: case[name] for name in OPENING} for case in cases]


def test_outputs_and_records_are_those_of_the_plain_run(cluster, tmp_path, monkeypatch):
    """With relative paths, a bad case, and a part of the cases; the worker runs in another folder."""
    write_folders(tmp_path, *CASES)
    (tmp_path / "logits" / "b.nii.gz").write_bytes(b"no volume")
    monkeypatch.chdir(tmp_path)
    arguments = ("infer", "-i", "images", "-p", "logits", "--threads", "1", "--save-probabilities", "-o")
    plain = run_here(*arguments, "plain", "--summary", "plain.json")
    there = run_here(*arguments, "out", "--summary", "there.json", "--dask", cluster.address)
    assert (plain.status, there.status) == (1, 1)
    assert files_in(tmp_path / "plain") == files_in(tmp_path / "out")
    for name in files_in(tmp_path / "plain"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    expected = json.loads(json.dumps(records(tmp_path / "plain.json")).replace("plain/", "out/"))
    assert records(tmp_path / "there.json") == expected
    again = run_here(
        *arguments, "out", "--summary", "there.json", "--dask", cluster.address, "--continue", "--num-parts", "2", "--part-id", "0"
    )
    assert again.status == 1  # the summary is of another part
    again = run_here(*arguments, "out", "--dask", cluster.address, "--continue", "--num-parts", "2", "--part-id", "0")
    assert again.stdout.splitlines()[1].split("\t")[:2] == ["a", "skipped"]
    assert again.status == 0


def test_evaluate_measures_the_same(cluster, tmp_path):
    study = write_study(tmp_path)
    plain = run_here(*study.arguments)
    expected = (study.output / "metrics.csv").read_bytes()
    arguments = [word for word in study.arguments if word not in ("--processes", "1")]
    there = run_here(*arguments, "--dask", cluster.address)
    assert (there.status, there.stdout) == (plain.status, plain.stdout)
    assert (study.output / "metrics.csv").read_bytes() == expected


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


def write_slow_case(folders: Folders, case_id: str, size: int) -> None:
    """A case that takes some seconds: it does not end before it is interrupted."""
    rng = np.random.default_rng(1)
    for modality in range(2):  # as in the other cases
        save_nifti(folders.images / f"{case_id}_{modality:04d}.nii.gz", rng.integers(0, 500, (size, size - 8, size - 12), dtype=np.int16))
    save_nifti(folders.logits / f"{case_id}.nii.gz", rng.normal(0, 3, (size, size - 8, size - 12, 6)).astype(np.float32))


SLOW = ("--threads", "1", "--set", "mean_field.num_iterations=1000", "--set", "mean_field.tolerance=0")


def start_slow(tmp_path: Path, *options: object) -> tuple[Folders, subprocess.Popen[str]]:
    """Start a run whose first case is quick, and whose second one goes on for minutes; return once the first is done."""
    folders = write_folders(tmp_path, "a")
    write_slow_case(folders, "b", 72)
    summary = tmp_path / "summary.jsonl"
    arguments = command("infer", *folders.arguments, *SLOW, "--summary", summary, *options)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "a.nii.gz" in files_in(folders.output) or process.poll() is not None)
    assert process.poll() is None, process.communicate()[1]
    wait_until(lambda: summary.read_text().count('"a"') > 1)
    return folders, process


def test_ctrl_c_leaves_the_cluster_clean_and_what_is_finished(cluster, tmp_path, ignoring_signals):
    folders, process = start_slow(tmp_path, "--dask", cluster.address)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "1 of 2 cases are written; run again with --continue for the rest" in err
    assert "Traceback" not in err
    wait_until(lambda: files_in(folders.output) == ["a.nii.gz"])
    from distributed import Client

    with Client(scheduler_file=cluster.address) as client:
        wait_until(lambda: not any(client.processing().values()))
    assert run_process("infer", *write_folders(tmp_path / "next", "a").arguments, "--dask", cluster.address).status == 0


def test_a_killed_scheduler_ends_the_run_with_what_is_finished(tmp_path, ignoring_signals):
    with daemons(tmp_path, DASK_DISTRIBUTED__WORKER__LIFETIME__RESTART="false") as cluster:
        environment = "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT"
        os.environ[environment] = "1s"
        try:
            folders, process = start_slow(tmp_path / "run", "--dask", cluster.address)
        finally:
            del os.environ[environment]
        cluster.scheduler.kill()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "is gone, or was restarted" in err
    assert "Traceback" not in err
    assert "a.nii.gz" in files_in(folders.output)
    assert "run again with --continue" in err


def test_a_time_limit_without_a_cluster_costs_the_case_alone(tmp_path):
    folders = write_folders(tmp_path, "a", "c")
    write_slow_case(folders, "b", 104)
    result = run_process("infer", *folders.arguments, *SLOW, "--case-timeout", "15", timeout=600)
    assert result.status == 1
    assert files_in(folders.output) == ["a.nii.gz", "c.nii.gz"]
    assert "case 'b': took longer than the 15 s of --case-timeout and was stopped" in result.stderr


def test_tls_is_taken_from_the_configuration_of_dask(tmp_path):
    script = Path(__file__).parents[2] / "examples" / "clusters" / "certificates.sh"
    made = subprocess.run([script, tmp_path / "tls"], check=False, capture_output=True)
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
    text = (Path(__file__).parents[2] / "examples" / "clusters" / "kubernetes.yaml").read_text()
    kinds = [part["kind"] for part in yaml.safe_load_all(text)]
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
    ("options", "reason"),
    [
        (("--workers", "2", "--dask", "tcp://a:1"), "leave one of them out"),
        (("--case-timeout", "0"), "a number of seconds above 0"),
        (("--case-timeout", "nan"), "a number of seconds above 0"),
        (("--workers", "0"), "--workers"),
        (("--dask", ""), "the path is empty"),
    ],
)
def test_contradictory_options_are_wrong_usage(tmp_path, options, reason):
    result = run_here("infer", "-i", tmp_path, "-p", tmp_path, "-o", tmp_path / "out", *options)
    assert result.status == 2
    assert reason in " ".join(result.stderr.split())


def test_workers_and_processes_exclude_each_other(tmp_path):
    result = run_here("evaluate", tmp_path, tmp_path, "-o", tmp_path / "out", "--workers", "2", "--processes", "2")
    assert result.status == 2
    assert "leave --processes out" in result.stderr


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


@pytest.mark.parametrize("verbosity", [0, 1, 2])
@pytest.mark.parametrize("name", ["infer", "evaluate", "train"])
def test_a_warning_about_security_is_shown_however_quiet_the_run_is(name, verbosity, capsys):
    reporters = {"infer": Reporter, "evaluate": EvaluationReporter, "train": TrainingReporter}
    reporters[name](verbosity).warning(OPEN_TO_OTHERS)
    assert capsys.readouterr().err == f"crfrefine: warning: {OPEN_TO_OTHERS}\n"


def test_workers_is_a_cluster_of_the_run(tmp_path, monkeypatch):
    """It begins and ends with the run; outputs are those of the plain run."""
    monkeypatch.setenv("CRFREFINE_UNENCRYPTED_WORKERS", "allow")  # This environment may have no `cryptography`.
    folders = write_folders(tmp_path, "a", "b")
    assert run_process("infer", *folders.arguments, "--threads", "1").status == 0
    expected = {name: (folders.output / name).read_bytes() for name in files_in(folders.output)}
    result = run_process("infer", *folders.arguments, "--threads", "1", "--workers", "1", "--case-timeout", "600", "-q", timeout=300)
    assert (result.status, "Traceback" in result.stderr) == (0, False)
    assert result.stderr == ("" if find_spec("cryptography") else f"crfrefine: warning: {OPEN_TO_OTHERS}\n")
    assert {name: (folders.output / name).read_bytes() for name in files_in(folders.output)} == expected
