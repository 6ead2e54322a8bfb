"""How much memory a run may take: sizes as text, and limits on made-up systems; and how many cores it may use."""

from types import SimpleNamespace

import pytest

from crfrefine.base import memory, threads
from crfrefine.base.memory import MemoryLimit, format_size, memory_left, memory_limit, parse_size, require_memory
from crfrefine.base.threads import available_threads, thread_limit
from crfrefine.errors import CapacityError, InputError

GIB = 1 << 30


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


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of this process, job in pod, as in a container on a machine of 16 GiB."""
    (tmp_path / "cgroup").write_text("0::/pod/job\n", encoding="ascii")
    job = tmp_path / "sys/pod/job"
    job.mkdir(parents=True)
    monkeypatch.setattr(threads, "ROOT", tmp_path / "sys")
    monkeypatch.setattr(threads, "OWN_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=12 * GIB))
    monkeypatch.setattr(memory, "_own_use", lambda: (GIB, GIB))
    return job


def test_the_smallest_limit_counts(groups):
    """Of the machine, what is available without a reserve, with the GiB of this process; of a group, what others of it do not use."""
    machine = 12 * GIB - 16 * GIB // 20 + GIB
    assert memory_limit() == MemoryLimit(machine, "the memory available on this machine")
    assert memory_left(memory_limit()) == machine - GIB
    assert memory_limit(2 * GIB) == MemoryLimit(2 * GIB, "--max-memory")
    (groups / "memory.max").write_text(f"{9 * GIB}\n", encoding="ascii")
    (groups.parent / "memory.high").write_text(f"{8 * GIB}\n", encoding="ascii")
    assert memory_limit() == MemoryLimit(8 * GIB, "the control group (cgroup) of this process")
    (groups / "memory.stat").write_text(f"anon {4 * GIB}\nfile {GIB}\n", encoding="ascii")
    assert memory_limit().bytes == 5 * GIB
    (groups / "memory.stat").write_text(f"anon {40 * GIB}\n", encoding="ascii")
    assert memory_limit().bytes == 0


@pytest.mark.parametrize("content", ["max\n", "", "0x10", "-\n"])
def test_a_group_without_a_usable_limit_limits_nothing(groups, content):
    (groups / "memory.max").write_text(content, encoding="ascii")
    assert memory_limit().source == "the memory available on this machine"


def test_the_group_is_found_inside_of_what_is_mounted(groups):
    for path, folders in (("/pod/job", 3), ("/elsewhere", 1), ("/../../outside", 1), ("", 1)):
        threads.OWN_GROUP.write_text(f"12:cpuset:/x\n0::{path}\n", encoding="ascii")
        assert len(threads.control_groups()) == folders


def test_what_does_not_fit_is_refused_with_sizes_and_a_way_out():
    with pytest.raises(CapacityError) as caught:
        require_memory(5 * GIB, "a.nii.gz: its voxels take\n  a.nii.gz  1000 voxels", MemoryLimit(GIB, "--max-memory"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "a.nii.gz: its voxels take 5.00 GiB of memory, more than the 1.00 GiB of --max-memory"
    assert lines[1] == "  a.nii.gz  1000 voxels"
    assert "raise it" in lines[2]
    require_memory(GIB, "exactly as much: takes", MemoryLimit(GIB, "--max-memory"))


@pytest.mark.parametrize(
    ("contents", "quota"), [(("max 100000", "150000 100000"), 1.5), (("40000 10000", "max"), 4.0), (("0 100000", "1 2 3"), None)]
)
def test_the_smallest_quota_of_all_groups_above_counts(groups, contents, quota):
    for folder, content in zip((groups, groups.parent), contents, strict=True):
        (folder / "cpu.max").write_text(f"{content}\n", encoding="ascii")
    threads._quota.cache_clear()
    assert threads._quota() == quota
    threads._quota.cache_clear()


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
