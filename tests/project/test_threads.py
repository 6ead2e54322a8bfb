"""How many cores a run may use: the affinity, a quota of control groups on made-up systems, the share of a cluster's worker."""

import pytest

from crfrefine.base import threads
from crfrefine.base.control_groups import core_quota
from crfrefine.base.threads import SHARE, available_threads, thread_limit

V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def write_group(folder, **files):
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


def test_affinity_quota_and_share_limit_the_threads(monkeypatch):
    """A machine with 16 cores, of which this process may use 12; a part of a core is one. A worker's share goes before all."""
    monkeypatch.delenv(SHARE, raising=False)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 16)
    for cores, quota, number, source in (
        (16, None, 16, "the cores of this machine"),
        (12, None, 12, "affinity"),
        (12, 2.0, 2, "quota"),
        (12, 1.5, 2, "quota"),
        (12, 0.1, 1, "quota"),
        (12, 11.2, 12, "affinity"),
        (12, 40.0, 12, "affinity"),
    ):
        monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setattr(threads, "_quota", lambda quota=quota: quota)
        assert thread_limit().number == available_threads() == number
        assert source in thread_limit().source
    monkeypatch.setenv(SHARE, "3")
    assert thread_limit().number == 3
    assert SHARE in thread_limit().source
    monkeypatch.setenv(SHARE, "many")
    assert thread_limit().number == 12
