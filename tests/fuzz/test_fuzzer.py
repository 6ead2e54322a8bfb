"""The fuzzer itself: it finds planted faults of every kind, goes on after them, and makes an input again by its number."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_engine import engine_targets
from fuzz_texts import text_targets
from fuzz_volumes import volume_targets
from fuzz_worker import Target, examine

RUN = Path(__file__).with_name("run.py")
PLANTED = {
    "raises": "KeyError: 'planted'",
    "crashes": "signal SIGSEGV",
    "ends": "the process ended with status 3",
    "hangs": "TookTooLong: not done in time",
    "waits": "Timeout",
    "grows": "it took more than 256 MiB",
    "asks-for-too-much": "MemoryError",
    "writes": "something was written to the standard streams",
    "floods": "characters: ",
    "steers": "not for a terminal",
    "hides-the-name": "does not name the file",
    "warns": "RuntimeWarning: planted",
    "integers": "ValueError: invalid literal for int",
    "finite": "AssertionError",
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, RUN, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.long
def test_planted_faults_are_found_and_the_run_goes_on() -> None:
    done = run(*(word for name in PLANTED for word in ("--target", f"planted-{name}")), "--inputs", 100)
    assert done.returncode == 1, done.stdout + done.stderr
    parts = re.split(r"^planted-(\S+) +", done.stdout, flags=re.MULTILINE)[1:]
    reports = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(reports) == list(PLANTED)
    for name, report in reports.items():
        assert report.startswith("100 inputs")
        assert PLANTED[name] in report
        assert 1 <= int(re.search(r"([0-9]+) findings", report)[1]) < 50


@pytest.mark.long
def test_a_finding_is_made_again_by_its_number_and_time_ends_a_run() -> None:
    done = run("--target", "planted-raises", "--inputs", 300, "--seed", 3)
    again = re.search(r"finding: \S+ (--target \S+ --only [0-9]+)", done.stdout)[1].split()
    assert int(again[-1]) >= 3 << 32
    done = run(*again)
    assert "KeyError: 'planted'" in done.stderr
    assert r"a, 1 bytes: b'\x07'" in done.stdout
    done = run("--target", "npy", "--target", "options", "--minutes", 0.03)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2


def test_an_input_depends_on_its_number_alone() -> None:
    for target in (*volume_targets(), *text_targets(), *engine_targets()):
        first, second = ([target.make(random.Random(seed)) for seed in range(20)] for _ in range(2))
        assert first == second, target.name
        assert len({repr(content) for content in first}) > 10, target.name


def test_an_input_is_alone_in_its_folder(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def read(path: Path, rng: random.Random) -> None:
        seen.append(sorted(found.name for found in path.parent.iterdir()))

    target = Target("folder", lambda rng: {str(number): b"" for number in range(rng.randint(1, 4))}, read)
    for seed in range(20):
        examine(target, tmp_path, seed)
    assert [*map(len, seen)] == [len(target.make(random.Random(f"folder {seed}"))) for seed in range(20)]
