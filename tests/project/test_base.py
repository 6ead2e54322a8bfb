"""Texts, sizes and limits.

Messages steer no terminal; made-up systems tell how much memory and how many cores a run may take.
"""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crfrefine.base import limits
from crfrefine.base.limits import (
    available_threads,
    format_size,
    memory_left,
    memory_limit,
    parse_size,
)
from crfrefine.base.text import MAX_CHARACTERS, for_terminal, printable, shorten
from crfrefine.errors import InputError

GIB = 1 << 30


def test_a_size_is_read():
    sizes = {
        "8 gib": 8 * GIB,
        "8G": 8 * GIB,
        "8GB": 8_000_000_000,
        ".5T": 1 << 39,
        "17 bytes": 17,
        " 1.5M ": 3 << 19,
    }
    sizes |= {"999999999999999999": 999_999_999_999_999_999}  # more digits than a float has
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in (
        "",
        "G",
        "8GiBB",
        "-1",
        "0",
        "0.0000001K",
        "1e9",
        "8,5G",
        "nan",
        "\uff19",
        "9" * 5000,
        "1048576T",
    ):
        with pytest.raises(InputError, match="expected one such as 8GiB"):
            parse_size(text)


def test_a_size_is_written():
    sizes = {
        1: "1 byte",
        1000: "1000 bytes",
        1 << 10: "1.00 KiB",
        5e9: "4.66 GiB",
        9.996 * GIB: "10.0 GiB",
        99.96 * GIB: "100 GiB",
    }
    sizes |= {999 << 20: "999 MiB", (1 << 30) - 1: "1.00 GiB", 1 << 60: "1048576 TiB"}
    assert {size: format_size(size) for size in sizes} == sizes


@pytest.fixture
def groups(control_group, monkeypatch):
    """Control groups of this process, as in a container on a machine of 16 GiB."""
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=12 * GIB)
    )
    monkeypatch.setattr(
        "psutil.Process.memory_info", lambda self: SimpleNamespace(rss=GIB, shared=0)
    )
    return control_group


def test_the_smallest_limit_counts(groups):
    """The machine's is what is available without a reserve, and what this process has, 1 GiB."""
    machine = 12 * GIB - 16 * GIB // 20 + GIB
    assert memory_limit() == (machine, "the memory available on this machine")
    assert memory_left() == machine - GIB
    assert memory_limit(2 * GIB) == (2 * GIB, "--max-memory")
    (groups / "memory.max").write_text(f"{9 * GIB}\n", encoding="ascii")
    (groups.parent / "memory.max").write_text(f"{8 * GIB}\n", encoding="ascii")
    assert memory_limit() == (8 * GIB, "the control group (cgroup) of this process")
    for folder in (groups, groups.parent):
        (folder / "memory.max").write_text("max\n", encoding="ascii")
    assert memory_limit()[1] == "the memory available on this machine"


def test_affinity_and_quota_limit_the_threads(groups, monkeypatch):
    """Of a machine on which this process may use 12 cores; a part of a core is one."""
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert available_threads() == 12
    for quota, number in ((200_000, 2), (150_000, 2), (10_000, 1), (4_000_000, 12)):
        (groups / "cpu.max").write_text(f"{quota} 100000\n", encoding="ascii")
        assert available_threads() == number
    (groups / "cpu.max").write_text("max 100000\n", encoding="ascii")
    assert available_threads() == 12


# ---- Texts


def test_what_does_not_print_is_written_as_in_python_and_long_texts_end_in_an_ellipsis():
    for text, shown in (
        ("a name with é, 漢字 and \\", "a name with é, 漢字 and \\"),
        ("a\tb\nc\rd", r"a\tb\nc\rd"),
        ("\x1b[31mred \u202eto left", r"\x1b[31mred \u202eto left"),
        ("no text: \udcff \u2028\x85\x9b", r"no text: \udcff \u2028\x85\x9b"),
    ):
        assert printable(text) == shown
    assert shorten("x" * 80) == "x" * 80
    assert shorten("x" * 81) == "x" * 79 + "…"
    assert len(shorten("\0" * 60)) == MAX_CHARACTERS  # Escaped, it is longer.


def test_the_lines_of_a_message_stay_and_those_of_names_do_not():
    message = "case 'a': two grids\n  a.nii  3×4\n  b.nii  5×6"
    assert for_terminal(message) == message
    assert for_terminal("a\nb.nii: no such file") == r"a\nb.nii: no such file"
    assert for_terminal("a\ncrfrefine: error: forged") == r"a\ncrfrefine: error: forged"
    assert len(for_terminal("x" * 100_000)) == 5000


@settings(max_examples=40)
@given(st.text())
def test_no_text_steers_a_terminal(text):
    shown = for_terminal(text)
    assert all(line.isprintable() for line in shown.split("\n"))
    assert all(line.startswith("  ") for line in shown.split("\n")[1:])
    assert printable(text).isprintable()
    assert shorten(text).isprintable()
    assert len(shorten(text)) <= MAX_CHARACTERS
