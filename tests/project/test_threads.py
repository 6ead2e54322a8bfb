"""How many cores a run may use: the affinity, a quota of control groups on made-up systems, the share of a cluster's worker."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crfrefine import threads
from crfrefine.control_groups import core_quota
from crfrefine.threads import SHARE, available_threads, thread_limit

V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def write_group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


def test_the_smallest_quota_of_all_groups_above_counts(tmp_path):
    write_group(tmp_path / "sys/fs/cgroup/pod", cpu__max="150000 100000\n")
    write_group(tmp_path / "sys/fs/cgroup/pod/job", cpu__max="40000 10000\n")
    assert core_quota("0::/pod/job\n", V2_MOUNT, tmp_path) == 1.5
    write_group(tmp_path / "sys/fs/cgroup/pod", cpu__max="max 100000\n")
    assert core_quota("0::/pod/job\n", V2_MOUNT, tmp_path) == 4.0


def test_the_first_version_of_groups_has_a_quota_in_two_files(tmp_path):
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    write_group(folder, cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert core_quota("4:memory:/\n1:cpu,cpuacct:/\n", V1_MOUNT, tmp_path) == 2.5
    write_group(folder, cpu__cfs_quota_us="-1\n")
    assert core_quota("1:cpu,cpuacct:/\n", V1_MOUNT, tmp_path) is None


@pytest.mark.parametrize("content", ["max 100000\n", "", "100000\n", "0 100000", "100000 0", "-5 7", "nonsense here", "1 2 3"])
def test_a_group_without_a_usable_quota_limits_nothing(tmp_path, content):
    write_group(tmp_path / "sys/fs/cgroup", cpu__max=content)
    assert core_quota("0::/\n", V2_MOUNT, tmp_path) is None


@given(st.text(max_size=80), st.text(max_size=80))
def test_odd_texts_limit_nothing_and_raise_nothing(groups, mounts):
    assert core_quota(groups, mounts + V2_MOUNT, Path("/nonexistent")) is None


@pytest.fixture
def machine(monkeypatch):
    """A machine with 16 cores, of which this process may use 12."""
    monkeypatch.delenv(SHARE, raising=False)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setattr(threads, "_quota", lambda: None)
    return monkeypatch


def test_the_affinity_counts(machine):
    assert thread_limit().number == available_threads() == 12
    assert "affinity" in thread_limit().source
    machine.setattr(threads.os, "sched_getaffinity", lambda _: set(range(16)))
    assert thread_limit() == threads.ThreadLimit(16, "the cores of this machine")


@pytest.mark.parametrize(("quota", "number"), [(2.0, 2), (1.5, 2), (0.1, 1), (11.2, 12), (40.0, 12)])
def test_a_quota_counts_where_it_is_smaller_and_a_part_of_a_core_is_one(machine, quota, number):
    machine.setattr(threads, "_quota", lambda: quota)
    assert available_threads() == number
    assert ("quota" in thread_limit().source) == (number < 12)


def test_a_workers_share_goes_before_all(machine):
    machine.setattr(threads, "_quota", lambda: 2.0)
    machine.setenv(SHARE, "3")
    assert thread_limit().number == 3
    assert SHARE in thread_limit().source
    machine.setenv(SHARE, "many")
    assert thread_limit().number == 2
