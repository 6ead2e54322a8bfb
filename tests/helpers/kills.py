"""Kills a command at random moments, again and again on the same output, and checks what it leaves and what the rest makes of it."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from crfrefine.runs.store import RECORD_FOLDER

NUM_KILLS = int(os.environ.get("CRFREFINE_TEST_KILLS", "4"))
"""Of each command; `make test-faults` sets more."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# What differs between two runs of the same work, by the names of the fields.
_OF_THE_RUN = frozenset(
    ("seconds", "times", "written", "started", "command", "command_line", "resumed", "status", "notes", "fit_seconds", "read_seconds")
)


class KillServer:
    """Runs commands in copies of a process that has imported everything."""

    def __init__(self, folder, setup=""):
        self._log, self._setup = folder / "log", setup
        command = [sys.executable, str(Path(__file__).with_name("kill_server.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **_ONE_THREAD}
        )

    def run(self, arguments, seconds=None):
        """Run a command to its end, or kill it after some seconds; return status, or minus the signal, and the seconds that it took."""
        request = {"arguments": [str(argument) for argument in arguments], "seconds": seconds, "log": str(self._log), "setup": self._setup}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        status, taken = json.loads(self.process.stdout.readline())
        return status, taken

    def said(self):
        """Return what the last command printed."""
        return self._log.read_text(errors="replace").rpartition("\nmodules:")[0]


@dataclass(frozen=True)
class Work:
    """A command and its output."""

    arguments: Sequence[object]
    outputs: Sequence[Path]  # files, or folders with all that is in them
    resume: Sequence[object] = ()  # added to the arguments where there may be results of an earlier run
    early: Sequence[str] = ()  # names of files that say how the work went, such as a summary: only `after` looks into them
    before: Callable[[], object] = lambda: None  # makes the output as it is before the first run
    after: Callable[[], object] = lambda: None  # checks more, after the last run of a succession

    def clear(self):
        """Make the output as it is before the first run."""
        for path in self.outputs:
            shutil.rmtree(path, ignore_errors=True)
        self.before()

    def files(self):
        """Return the content of all files of the output, by name; of JSON and HTML, without what differs between any two runs."""
        paths = [path for output in self.outputs for path in (sorted(output.rglob("*")) if output.is_dir() else [output])]
        return {str(path): without_run(path) for path in paths if path.is_file() and not is_record(path)}


def without_run(path):
    content = path.read_bytes()
    if path.suffix == ".json" and not is_hidden(path):
        return json.dumps(_without_run(json.loads(content))).encode()
    if path.suffix == ".toml":
        return b"\n".join(line for line in content.splitlines() if not line.startswith(b"#"))
    if path.suffix == ".html":
        return re.sub(rb"<dl class=.settings.*?</dl>|<dt>(written|command line)</dt>\s*<dd>.*?</dd>", b"", content, flags=re.DOTALL)
    return content


def _without_run(value):
    if isinstance(value, dict):
        return {name: _without_run(inner) for name, inner in value.items() if name not in _OF_THE_RUN}
    return [_without_run(inner) for inner in value] if isinstance(value, list) else value


def is_record(path):
    """Whether a file is a record of a run, which says how it went."""
    return path.parent.name == RECORD_FOLDER and path.name.startswith("record")


def is_hidden(path):
    return path.name.startswith(".")


def check_kills(work, folder, *, seed, setup="", num_kills=NUM_KILLS, most_in_a_row=10):
    """Kill the command at random moments of an undisturbed run's time, several times in succession, and then let it end.

    After each kill, every file that has its name is the one of the undisturbed run. At the end all of them
    are, and nothing else but hidden files is there.
    """
    rng, kills, server = random.Random(seed), 0, KillServer(folder, setup)
    with server.process:
        for _ in range(2):  # the second time, everything is imported
            work.clear()
            status, seconds = server.run(work.arguments)
            assert status == 0, server.said()
        whole = work.files()
        assert not any(is_hidden(Path(name)) for name in whole)
        while kills < num_kills:
            work.clear()
            before = work.files()
            for run in range(rng.randint(1, most_in_a_row)):
                status, taken = server.run((*work.arguments, *work.resume), seconds=rng.uniform(0.0, seconds))
                assert status in (0, -9), server.said()
                if run == 0 and status == 0:
                    seconds = taken  # undisturbed, too: the machine is less busy than it was, and kills would come too late
                kills += status == -9
                _check_early(work.files(), whole, before, work)
            status, _ = server.run((*work.arguments, *work.resume), seconds=120)
            assert status == 0, server.said()
            found = {name: content for name, content in work.files().items() if not is_hidden(Path(name))}
            assert sorted(found) == sorted(whole)
            assert [name for name in whole if found[name] != whole[name] and Path(name).name not in work.early] == []
            work.after()


def _check_early(found, whole, before, work):
    for name, content in found.items():
        path = Path(name)
        if path.suffix == ".mhd":
            parts = (path, path.with_suffix(".zraw"))
            generations = [[files.get(str(part)) == found[str(part)] for files in (before, whole)] for part in parts]
            assert generations[0] == generations[1], f"{name}: a header beside the voxels of another file"
        if is_hidden(path) or path.name in work.early:
            continue
        assert name in whole or name in before, f"{name}: does not belong here"
        assert content in (whole.get(name), before.get(name)), f"{name}: neither the new nor the old content"
