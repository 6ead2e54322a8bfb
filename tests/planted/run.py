"""Plants faults, one at a time, in a copy of the sources, and tells which of them the tests catch.

    python tests/planted/run.py [--room io] [--only NAME] [--tests named|all] [--short] [--record FILE]

The faults are in the .toml files beside this script: a text that occurs once in a file, and what a tired developer would make of it. The
copy, with the compiled engine beside it, is made from the files that git knows, and the working tree is never changed. For a fault in
kernels/cpu only the changed objects are compiled again, for the best instruction set that this processor has; kernels of the GPU are
compiled by the tests themselves.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Tests, or Python after them, that say nothing for so long hang, as a fault may make them.
LONGEST_SILENCE = 300.0
TESTS_HELP = "those named with the fault, or all: each file that fails is noted"
# A fault's text is gone from the copy.
NOT_ASKED = "project/test_planted.py"
_FAILED = re.compile(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", re.MULTILINE)
_BEGUN = re.compile(r"^tests/(\S+?::\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in `file` (relative to the repository), becomes `new`; `tests`, relative to tests/, notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def room(self) -> str:
        """A folder of crfrefine/, `package` for its own modules, `cpu` or `cuda`."""
        first, second, *rest = Path(self.file).parts
        return (second if rest else "package") if first == "crfrefine" else ("cuda" if second == "cuda" else "cpu")


@dataclass
class Outcome:
    """What the tests said. `first`: the first test that failed or hung; `files`: of all that failed, which are one unless all are asked."""

    fault: str
    room: str
    caught: bool
    first: str | None
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0


def read_faults() -> list[Fault]:
    """All faults, in the order of the files and in them.

    Raises:
        ValueError: two have one name.
    """
    tables = [table for path in sorted(Path(__file__).parent.glob("*.toml")) for table in tomllib.loads(path.read_text("utf-8"))["fault"]]
    faults = [Fault(**{**table, "tests": tuple(table["tests"])}) for table in tables]
    if len({fault.name for fault in faults}) < len(faults):
        raise ValueError("two faults have one name")
    return faults


def problem_of(fault: Fault, root: Path = ROOT) -> str | None:
    """What keeps a fault from being planted, such as a text that is no longer there."""
    path = root / fault.file
    count = path.read_text("utf-8").count(fault.old) if path.is_file() else 0
    if count != 1 or fault.old == fault.new:
        return f"{fault.name}: its text occurs {count} times in {fault.file}; expected once, and another text in its place"
    missing = [name for name in fault.tests if not (root / "tests" / name).is_file()]
    return f"{fault.name}: there is no tests/{missing[0]}" if missing or not fault.tests else None


def _engines() -> list[Path]:
    """The compiled engines in the source tree or, if it has none, those of the installed package."""
    installed = [Path(str(file.locate())) for file in importlib.metadata.files("crfrefine") or () if file.name.startswith("_engine_")]
    return list((ROOT / "crfrefine").glob("_engine_*")) or installed


class Copy:
    """The repository in a folder of its own, the compiled engine and its build folder beside it; kept between runs."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.build = folder / "tree", folder / "build"
        self._bytecode = folder / "bytecode"
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("w")  # Of two at a time, each would take the other's fault away.
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        names = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True).stdout
        known = [Path(os.fsdecode(name)) for name in names.split(b"\0") if name]
        sources = {name: ROOT / name for name in known if (ROOT / name).is_file()}
        self._bring(sources | {Path("crfrefine", engine.name): engine for engine in _engines()})

    def _bring(self, sources: Mapping[Path, Path]) -> None:
        """What is the same keeps its time, so that nothing is compiled anew for it."""
        for name, source in sources.items():
            target = self.tree / name
            if not target.is_file() or target.read_bytes() != source.read_bytes():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        for path in [path for folder in ("crfrefine", "kernels", "tests") for path in (self.tree / folder).rglob("*") if path.is_file()]:
            if path.relative_to(self.tree) not in sources:
                path.unlink()

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """Plant a fault for a while."""
        path = self.tree / fault.file
        text = path.read_text("utf-8")
        engines = {built: built.read_bytes() for built in (self.tree / "crfrefine").glob("_engine_*")} if fault.room == "cpu" else {}
        self._write(path, text.replace(fault.old, fault.new))
        try:
            if fault.room == "cpu":
                self.compile()
            yield
        finally:
            self._write(path, text)
            for built, content in engines.items():
                built.write_bytes(content)

    def _write(self, path: Path, text: str) -> None:
        """Without what Python has compiled of it, which it would take for the same after a change within a second."""
        path.write_text(text, encoding="utf-8")
        for old in (self._bytecode / path.parent.relative_to("/")).glob(f"{path.stem}.*.pyc"):
            old.unlink()

    def compile(self) -> None:
        """Compile the engine of the best level that the copy has, and put it in its place.

        Raises:
            CalledProcessError: it cannot be compiled.
        """
        found = self._python("-c", "from crfrefine.engines.compiled import best_level; print(best_level())")
        target = f"_engine_{found.stdout.strip()}"
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        if not (self.build / "build.ninja").exists():
            options = [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release", "-G", "Ninja"]
            subprocess.run(["cmake", "-S", self.tree, "-B", self.build, *options], **quiet)
        subprocess.run(["cmake", "--build", self.build, "--target", target], **quiet)
        (built,) = self.build.glob(f"{target}.*so")
        (old,) = (self.tree / "crfrefine").glob(f"{target}.*")
        shutil.copy(built, old)

    def run(self, tests: Sequence[str], *, every: bool = False, short: bool = False) -> list[str]:
        """The failed tests of files or folders of tests/, only the first one unless `every`; one that hangs or ends Python is the last."""
        options = ["-v", "--tb=no", "--no-header", "-rfE", "-p", "no:cacheprovider", "--ignore", f"tests/{NOT_ASKED}"]
        options += [*([] if every else ["-x"]), *(["-m", "not long"] if short else [])]
        done = self._python("-m", "pytest", *options, *(f"tests/{name}" for name in tests))
        if done.returncode in (0, 5):  # 5: none was chosen
            return []
        return _FAILED.findall(done.stdout) or _BEGUN.findall(done.stdout)[-1:] or [tests[0]]

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the copy, until it ends or has been silent for too long. What it has started ends with it."""
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "PYTHONPYCACHEPREFIX": str(self._bytecode)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        with tempfile.TemporaryFile() as said:
            options = {"stdout": said, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = subprocess.Popen([sys.executable, *arguments], cwd=self.tree, env=environment, **options)
            try:
                size, since = 0, time.monotonic()
                while process.poll() is None and time.monotonic() - since < LONGEST_SILENCE:
                    time.sleep(0.05)
                    if os.fstat(said.fileno()).st_size > size:
                        size, since = os.fstat(said.fileno()).st_size, time.monotonic()
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                status = process.wait()
            said.seek(0)
            return subprocess.CompletedProcess(arguments, status, said.read().decode("utf-8", "replace"))


def ask(copy: Copy, fault: Fault, *, every: bool, short: bool, healthy: dict[str, bool]) -> Outcome:
    """Plant a fault and run tests. What fails without the fault, too, has not caught it."""
    started = time.monotonic()
    outcome = Outcome(fault.name, fault.room, False, None)
    with copy.planted(fault):
        failed = copy.run(["."] if every else fault.tests, every=every, short=short)
    for test in failed:
        function = test.partition("[")[0]
        if function not in healthy:
            healthy[function] = not copy.run([function])
    if found := [test for test in failed if healthy[test.partition("[")[0]]]:
        outcome.caught, outcome.first = True, found[0]
        outcome.files = sorted({test.partition("::")[0] for test in found})
    outcome.seconds = round(time.monotonic() - started, 1)
    return outcome


def summary_of(outcomes: Sequence[Outcome]) -> str:
    """A table: caught per room, and which were not."""
    lines = [f"{'room':<12} {'faults':>6} {'caught':>6}  not caught"]
    for room in dict.fromkeys(outcome.room for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.room == room]
        missed = "; ".join(outcome.fault for outcome in own if not outcome.caught)
        lines.append(f"{room:<12} {len(own):>6} {sum(outcome.caught for outcome in own):>6}  {missed}".rstrip())
    lines.append(f"{'all':<12} {len(outcomes):>6} {sum(outcome.caught for outcome in outcomes):>6}")
    return "\n".join(lines)


def table_of(outcomes: Sequence[Outcome]) -> str:
    """Room, fault, and the files of `Outcome`, or "none", between tabs."""
    return "".join(f"{outcome.room}\t{outcome.fault}\t{', '.join(outcome.files) or 'none'}\n" for outcome in outcomes)


def main() -> int:
    """Ask about the chosen faults; 1 if one of them was not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", action="append", help="faults of this room alone, such as io, cpu or cuda; repeatable")
    parser.add_argument("--only", action="append", metavar="NAME", help="this fault alone; repeatable")
    parser.add_argument("--tests", choices=("named", "all"), default="named", help=TESTS_HELP)
    parser.add_argument("--short", action="store_true", help="those of `make test` alone, without the long ones")
    parser.add_argument("--record", type=Path, metavar="FILE", help="a line of JSON for each fault is added; those in it are not repeated")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write all results of the record as lines with tabs, too")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "planted", help="for the copy and what is compiled")
    given = parser.parse_args()
    faults = [fault for fault in read_faults() if fault.room in (given.room or [fault.room]) and fault.name in (given.only or [fault.name])]
    problems = [problem for fault in faults if (problem := problem_of(fault))]
    if problems or not faults:
        print("\n".join(problems) or "no such fault", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    if given.record is not None and given.record.exists():
        outcomes = [Outcome(**json.loads(line)) for line in given.record.read_text("utf-8").splitlines()]
    asked, healthy = {outcome.fault for outcome in outcomes}, {}
    copy = Copy(given.folder.resolve())
    for fault in faults:
        if fault.name in asked:
            continue
        outcome = ask(copy, fault, every=given.tests == "all", short=given.short, healthy=healthy)
        outcomes.append(outcome)
        print(f"{outcome.room}: {outcome.fault}: {outcome.first or 'NOT CAUGHT'} ({outcome.seconds} s)", flush=True)
        if given.record is not None:
            with given.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(outcome), ensure_ascii=False) + "\n")
    print(summary_of(outcomes))
    if given.table is not None:
        given.table.write_text(table_of(outcomes), encoding="utf-8")
    return 0 if all(outcome.caught for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
