"""`infer --dask` on a real cluster: a scheduler and two workers, each a process of its own."""

import json
import logging
import os
import signal
import subprocess
from pathlib import Path

import pytest
from cli_helpers import FAST, command, files_in, run_here, wait_for, write_folders

from crfrefine.errors import InputError
from crfrefine.infer.cluster import refine_on_worker

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SAME = (
    "case_id",
    "status",
    "output",
    "grid_shape",
    "energy",
    "voxels_changed",
    "notes",
    "error",
    "filters",
)
SLOW = ("--set", "mean_field.num_iterations=1000", "--set", "mean_field.tolerance=0")


def contents(folder):
    """The files but for hidden ones: a killed worker may leave some, which the next run removes."""
    return {
        name: (folder / name).read_bytes() for name in files_in(folder) if not name.startswith(".")
    }


@pytest.fixture(scope="module")
def scheduler_file(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster") / "scheduler.json"


@pytest.fixture(scope="module")
def local(scheduler_file):
    """The scheduler writes its file as it starts: later, Dask's own statistics may not fit JSON."""
    from distributed import LocalCluster

    options = {
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
        "scheduler_kwargs": {"scheduler_file": str(scheduler_file)},
    }
    with LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster:
        yield cluster


def test_outputs_and_records_are_those_of_the_plain_run(local, tmp_path, monkeypatch):
    """Bit for bit, a bad case among them. The workers run in another folder than the command."""
    write_folders(tmp_path, *"abc")
    (tmp_path / "logits" / "b.nii.gz").write_bytes(b"no volume")
    monkeypatch.chdir(tmp_path)
    arguments = (
        "infer",
        "-i",
        "images",
        "-p",
        "logits",
        *FAST,
        "--threads",
        1,
        "--save-probabilities",
        "-o",
    )
    run_here(*arguments, tmp_path / "plain", "--summary", "plain.json", status=1)
    run_here(
        *arguments, "there", "--summary", "there.json", "--dask", local.scheduler_address, status=1
    )
    assert len(contents(tmp_path / "plain")) == 4
    assert contents(tmp_path / "plain") == contents(tmp_path / "there")
    texts = (
        Path("plain.json").read_text().replace(f"{tmp_path}/plain/", f"{tmp_path}/there/"),
        Path("there.json").read_text(),
    )
    expected, found = (
        [{name: case[name] for name in SAME} for case in json.loads(text)["cases"]]
        for text in texts
    )
    found[1]["error"] = found[1]["error"].replace(f"{tmp_path}/", "")
    assert found == expected
    again = run_here(*arguments, "there", "--dask", local.scheduler_address, "--continue")
    assert again.stderr.count("exists, skipped") == 2


def test_fail_fast_begins_no_further_case(local, tmp_path):
    folders = write_folders(tmp_path, *"abcdefgh")
    for name in "abcdefgh":
        (folders.logits / f"{name}.nii.gz").write_bytes(b"no volume")
    result = run_here(
        "infer",
        *folders.arguments,
        *FAST,
        "--fail-fast",
        "--dask",
        local.scheduler_address,
        status=1,
    )
    assert result.stdout.count("failed") == 1
    assert "7 not started" in result.stderr


def test_the_cases_of_a_killed_worker_are_done_by_another_one(local, scheduler_file, tmp_path):
    """By the cluster's scheduler file. The outputs have the bytes of a run without Dask."""
    folders = write_folders(tmp_path, *"abcdefgh")
    plain = tmp_path / "plain"
    there = tmp_path / "there"
    arguments = ("infer", "-i", folders.images, "-p", folders.logits, *SLOW, "--threads", 1, "-o")
    run_here(*arguments, plain, status=0)
    from distributed import Client

    with Client(local.scheduler_address) as client:
        worker = next(iter(client.run(os.getpid).values()))
    words = command(*arguments, there, "--dask", scheduler_file)
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as run:
        wait_for(lambda: list(there.glob("*.nii.gz")), run)
        os.kill(worker, signal.SIGKILL)
        _, messages = run.communicate(timeout=60)
    assert run.returncode == 0, messages
    assert contents(plain) == contents(there)


def test_an_address_that_nobody_answers_is_one_line_of_error(tmp_path):
    import dask

    folders = write_folders(tmp_path, "a")
    for address in ("tcp://127.0.0.1:1", "no_such_file.json", "tls://127.0.0.1:1"):
        with dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}):
            result = run_here("infer", *folders.arguments, *FAST, "--dask", address, status=1)
        assert (
            f"--dask {address}: expected tcp://HOST:PORT, tls://HOST:PORT, or an existing "
            "scheduler file" in result.stderr
        )
        assert files_in(folders.output) == []


def test_a_worker_with_another_version_does_no_case():
    with pytest.raises(
        InputError,
        match=(
            r"a worker has crfrefine .*, this command is crfrefine 9\.8\.7; "
            "install the same version"
        ),
    ):
        refine_on_worker("9.8.7", None)
