"""How much memory a run may take: sizes as text, and limits on made-up systems; and how many cores it may use."""

from pathlib import PurePosixPath

import pytest

from crfrefine.base import memory, threads
from crfrefine.base.control_groups import control_groups, core_quota
from crfrefine.base.memory import (
    LARGEST,
    MemoryLimit,
    OwnUse,
    batch_limits,
    control_group_limits,
    format_size,
    machine_limit,
    memory_limit,
    own_use,
    parse_size,
    require_memory,
    resource_limits,
)
from crfrefine.base.threads import available_threads, thread_limit
from crfrefine.errors import CapacityError, InputError

GIB = 1 << 30
STATUS = "Name:\tpython\nVmSize:\t 4194304 kB\nVmRSS:\t 1048576 kB\nRssAnon:\t  524288 kB\nVmData:\t 3145728 kB\n"
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    8388608 kB\nCached:          4194304 kB\n"
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = "34 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
V1_MOUNTS += "35 31 0:32 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8 gib", 8 * GIB),
        ("8G", 8 * GIB),
        ("8GB", 8_000_000_000),
        ("512MiB", 512 << 20),
        (".5T", 1 << 39),
        ("64K", 1 << 16),
        ("17 bytes", 17),
        (" 1.5M ", 3 << 19),
        ("999999999999999999", 999_999_999_999_999_999),  # more digits than a float has
    ],
)
def test_a_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "8GiBB", "8iB", "-1", "0", "0.0000001K", "1e9", "8,5G", "nan", "\uff19", "9" * 5000, "1048576T"])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="expected one such as 8GiB"):
        parse_size(text)


def test_a_size_is_written():
    sizes = {1: "1 byte", 1000: "1000 bytes", 1 << 10: "1.00 KiB", 5e9: "4.66 GiB", 9.996 * GIB: "10.0 GiB", 99.96 * GIB: "100 GiB"}
    sizes |= {999 << 20: "999 MiB", (1 << 30) - 1: "1.00 GiB", 1 << 60: "1048576 TiB"}
    assert {size: format_size(size) for size in sizes} == sizes


def test_own_use_is_read():
    assert own_use(STATUS) == OwnUse(resident=GIB, anonymous=GIB // 2, address_space=4 * GIB, data=3 * GIB)
    assert own_use("VmRSS: 1024 kB\n") == OwnUse(1 << 20, 1 << 20, 1 << 20, 1 << 20)
    assert own_use("") == OwnUse()


def test_the_machine_allows_what_is_available_and_what_the_process_has_without_a_reserve():
    """The reserve is a GiB at most. An old kernel does not say what is available, which is what is free and cached."""
    limit = machine_limit(MEMINFO, own_use(STATUS))
    assert limit == (8 * GIB - 16 * GIB // 20 + GIB // 2, "the memory available on this machine")
    assert machine_limit("MemTotal: 1073741824 kB\nMemAvailable: 1073741824 kB\n", OwnUse())[0] == 1023 * GIB
    old = "".join(line for line in MEMINFO.splitlines(keepends=True) if "Available" not in line)
    assert machine_limit(old, OwnUse())[0] == 5 * GIB - 16 * GIB // 20


def test_resource_limits_are_less_what_is_mapped_and_not_used():
    """4 GiB are mapped and 1 GiB of them resident: of a limit of 10 GiB, 7 can become resident."""
    own = own_use(STATUS)
    limits = {"RLIMIT_AS": 10 * GIB, "RLIMIT_DATA": 4 * GIB, "RLIMIT_RSS": 2 * GIB}
    assert [size for size, _ in resource_limits(limits, own)] == [7 * GIB, 3 * GIB // 2, 2 * GIB]
    assert [source for _, source in resource_limits({"RLIMIT_AS": GIB}, OwnUse())] == ["the resource limit RLIMIT_AS (ulimit -v)"]
    assert list(resource_limits({"RLIMIT_AS": 2**64 - 1, "RLIMIT_DATA": -1}, own)) == []


def test_a_batch_system_limits_the_job():
    for environment, size in (
        ({"SLURM_MEM_PER_NODE": "8192"}, 8 * GIB),
        ({"SLURM_MEM_PER_NODE": "8G"}, 8 * GIB),
        ({"SLURM_MEM_PER_CPU": "2048M", "SLURM_CPUS_ON_NODE": "3"}, 6 * GIB),
        ({"SLURM_MEM_PER_GPU": "4096", "SLURM_GPUS_ON_NODE": "2"}, 8 * GIB),
        ({"PBS_RESC_TOTAL_MEM": "1073741824"}, GIB),
    ):
        assert list(batch_limits(environment)) == [(size, f"the batch system ({next(iter(environment))})")]
    for nothing_usable in (
        {"SLURM_MEM_PER_NODE": "0"},  # Slurm: all memory of the node
        {"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "4(x2)"},
        {"SLURM_MEM_PER_NODE": "9" * 400, "PBS_RESC_TOTAL_MEM": "-5"},
    ):
        assert list(batch_limits(nothing_usable)) == []


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")


def test_the_smallest_of_all_groups_above_limits_and_what_others_use_is_not_free(tmp_path):
    """In the parent, 6 of 16 GiB are in use: 2 are cached files and 1 is our own, so 13 are ours to use; the own group allows 14."""
    parent = tmp_path / "sys/fs/cgroup/user"
    stat = f"anon {4 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\n"
    write_group(parent, memory__max=f"{16 * GIB}\n", memory__current=f"{6 * GIB}\n", memory__stat=stat)
    write_group(parent / "job", memory__max=f"{14 * GIB}\n", memory__high="max\n", memory__current=f"{GIB}\n")
    limits = list(control_group_limits("0::/user/job\n", V2_MOUNT, OwnUse(GIB, GIB), tmp_path))
    assert [size // GIB for size, _ in limits] == [14, 13]
    assert {source for _, source in limits} == {"the control group (cgroup) of this process"}


def test_memory_high_limits_too_and_a_full_group_leaves_nothing_rather_than_less(tmp_path):
    write_group(tmp_path / "sys/fs/cgroup", memory__max=f"{GIB}", memory__current=f"{3 * GIB}")
    write_group(tmp_path / "sys/fs/cgroup/job", memory__max="max\n", memory__high=f"{3 * GIB}\n")
    assert [size for size, _ in control_group_limits("0::/job\n", V2_MOUNT, OwnUse(), tmp_path)] == [3 * GIB, 0]


def test_version_1_is_read(tmp_path):
    groups = "12:cpuset:/other\n4:memory,hugetlb:/batch/job7\n0::/\n"
    folder = tmp_path / "sys/fs/cgroup/memory/batch"
    write_group(folder, memory__limit_in_bytes="9223372036854771712\n")
    stat = f"cache 7\ntotal_inactive_file {GIB}\n"
    write_group(folder / "job7", memory__limit_in_bytes=f"{4 * GIB}\n", memory__usage_in_bytes=f"{3 * GIB}\n", memory__stat=stat)
    assert [size for size, _ in control_group_limits(groups, V1_MOUNTS, OwnUse(GIB, GIB), tmp_path)] == [3 * GIB]


@pytest.mark.parametrize(
    ("group", "mount", "folders"),
    [
        ("/", "/", ["/sys/fs/cgroup"]),
        ("/a/b", "/", ["/sys/fs/cgroup/a/b", "/sys/fs/cgroup/a", "/sys/fs/cgroup"]),
        # A container whose group is the root of what is mounted, without and with a namespace of its own.
        ("/docker/1f/sub", "/docker/1f", ["/sys/fs/cgroup/sub", "/sys/fs/cgroup"]),
        ("/elsewhere", "/docker/1f", ["/sys/fs/cgroup"]),
        ("/../../outside", "/", ["/sys/fs/cgroup"]),
        (r"/a b", "/", ["/sys/fs/cgroup/a b", "/sys/fs/cgroup"]),
    ],
)
def test_the_group_is_found_where_it_is_mounted_and_nowhere_outside(group, mount, folders):
    mounts = f"31 23 0:28 {mount} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    assert control_groups(f"0::{group}\n", mounts) == [(2, PurePosixPath(folder)) for folder in folders]
    blank = mounts.replace("/sys/fs", r"/a\040b")
    assert control_groups(f"0::{group}\n", blank) == [(2, PurePosixPath(folder.replace("/sys/fs", "/a b"))) for folder in folders]


@pytest.mark.parametrize("content", ["max\n", "", "-1\n", "0x10", "9" * 29, "18446744073709551615"])
def test_a_group_without_a_usable_limit_limits_nothing(tmp_path, content):
    write_group(tmp_path / "sys/fs/cgroup", memory__max=content, memory__current="max", memory__stat="inactive_file many\n\0\n")
    assert list(control_group_limits("0::/\n", V2_MOUNT, OwnUse(), tmp_path)) == []


def test_the_smallest_limit_counts(monkeypatch):
    monkeypatch.setattr(memory, "_system_limits", lambda: iter([(5 * GIB, "one"), (3 * GIB, "another")]))
    assert memory_limit() == MemoryLimit(3 * GIB, "another")
    assert memory_limit(2 * GIB) == MemoryLimit(2 * GIB, "--max-memory")
    assert memory_limit(4 * GIB) == MemoryLimit(3 * GIB, "another")


def test_a_system_that_says_nothing_has_no_limit(monkeypatch):
    monkeypatch.setattr(memory, "_system_limits", lambda: iter(()))
    limit = memory_limit()
    assert limit == MemoryLimit(LARGEST, "no limit known on this system")
    assert not limit.is_known
    require_memory(10**17, "x: takes", limit)


def test_what_does_not_fit_is_refused_with_sizes_and_a_way_out():
    with pytest.raises(CapacityError) as caught:
        require_memory(5 * GIB, "a.nii.gz: its voxels take\n  a.nii.gz  1000 voxels", MemoryLimit(GIB, "--max-memory"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "a.nii.gz: its voxels take 5.00 GiB of memory, more than the 1.00 GiB of --max-memory"
    assert lines[1] == "  a.nii.gz  1000 voxels"
    assert "raise it" in lines[2]
    require_memory(GIB, "exactly as much: takes", MemoryLimit(GIB, "--max-memory"))


# ---- How many cores

CPU_MOUNT = "34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def test_the_smallest_quota_of_all_groups_above_counts(tmp_path):
    write_group(tmp_path / "sys/fs/cgroup/pod", cpu__max="150000 100000\n")
    write_group(tmp_path / "sys/fs/cgroup/pod/job", cpu__max="40000 10000\n")
    assert core_quota("0::/pod/job\n", V2_MOUNT, tmp_path) == 1.5
    write_group(tmp_path / "sys/fs/cgroup/pod", cpu__max="max 100000\n")
    assert core_quota("0::/pod/job\n", V2_MOUNT, tmp_path) == 4.0


def test_the_first_version_of_groups_has_a_quota_in_two_files(tmp_path):
    folder = tmp_path / "sys/fs/cgroup/cpu,cpuacct"
    write_group(folder, cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert core_quota("4:memory:/\n1:cpu,cpuacct:/\n", CPU_MOUNT, tmp_path) == 2.5
    write_group(folder, cpu__cfs_quota_us="-1\n")
    assert core_quota("1:cpu,cpuacct:/\n", CPU_MOUNT, tmp_path) is None


@pytest.mark.parametrize("content", ["max 100000\n", "", "100000\n", "0 100000", "100000 0", "-5 7", "nonsense here", "1 2 3"])
def test_a_group_without_a_usable_quota_limits_nothing(tmp_path, content):
    write_group(tmp_path / "sys/fs/cgroup", cpu__max=content)
    assert core_quota("0::/\n", V2_MOUNT, tmp_path) is None


def test_affinity_and_quota_limit_the_threads(monkeypatch):
    """A machine with 16 cores, of which this process may use 12; a part of a core is one."""
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
