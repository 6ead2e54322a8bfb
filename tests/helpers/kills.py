"""Kills a command at random moments, again and again on the same output, and checks what it leaves
and what the rest makes of it.

The commands run in copies of a process that has imported everything, which is this file as a
program: the process that forks must have one thread. It reads requests from standard input and
answers on standard output, one JSON value per line.
"""

import contextlib
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

NUM_KILLS = int(os.environ.get("CRFREFINE_TEST_KILLS", "4"))
"""Of each command; `make test-faults` sets more."""

# What differs between two runs of the same work, by the names of the fields.
_OF_THE_RUN = frozenset(
    (
        "seconds",
        "times",
        "written",
        "stamp",
        "started",
        "command",
        "command_line",
        "resumed",
        "status",
        "notes",
        "fit_seconds",
        "read_seconds",
    )
)


# ---- The process that runs commands


def _be_command(request):
    """Run the command. The names of the modules it has imported go to the end of the log."""
    for stream, name, mode in (
        (0, os.devnull, "rb"),
        (1, request["log"], "wb"),
        (2, request["log"], "ab"),
    ):
        with open(name, mode) as file:  # noqa: PTH123
            os.dup2(file.fileno(), stream)
    sys.argv[1:] = request["arguments"]
    exec(request["setup"], {})  # of the tests themselves
    from crfrefine.cli.main import main

    status = 1
    try:
        main()
        status = 0
    except SystemExit as leave:
        status = leave.code or 0
    finally:
        print("\nmodules:", *sys.modules, flush=True)
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _serve():
    for line in sys.stdin:
        request = json.loads(line)
        started = time.perf_counter()
        child = os.fork()
        if not child:
            _be_command(request)
        end = os.pidfd_open(child)
        if not select.select([end], [], [], request["seconds"])[0]:
            os.kill(child, signal.SIGKILL)
        os.close(end)
        answer = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - started
        if (
            request["seconds"] is None
        ):  # Whatever a command has imported is there for the next ones.
            for name in (
                Path(request["log"]).read_text(errors="replace").rpartition("\nmodules:")[2].split()
            ):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        print(json.dumps(answer), flush=True)


# ---- The tests


class Work(NamedTuple):
    """A command and its output."""

    arguments: Sequence[object]
    output: Path  # a folder
    # added to the arguments where there may be results of an earlier run
    resume: Sequence[object] = ()
    # names of files that say how the work went, such as a summary: only `after` looks into them
    early: Sequence[str] = ()
    old: Sequence[str] = ()  # names of files that are there before the first run
    after: Callable[[], object] = lambda: None  # checks more, after the last run of a succession

    def clear(self):
        """Make the output as it is before the first run."""
        shutil.rmtree(self.output, ignore_errors=True)
        for name in self.old:
            self.output.mkdir(exist_ok=True)
            (self.output / name).write_bytes(b"old")

    def files(self):
        """Return the content of all files of the output but records of runs, without what differs
        between any two runs.
        """
        paths = (
            path
            for path in sorted(self.output.rglob("*"))
            if path.is_file() and path.parent.name != ".crfrefine"
        )
        return {path: _without_run(path) for path in paths}


def _without_run(path):
    content = path.read_bytes()
    if path.suffix == ".json" and not path.name.startswith("."):
        return json.loads(
            content,
            object_hook=lambda fields: {
                name: fields[name] for name in fields if name not in _OF_THE_RUN
            },
        )
    if path.suffix == ".toml":
        return b"\n".join(line for line in content.splitlines() if not line.startswith(b"#"))
    if path.suffix == ".html":
        return re.sub(
            rb"<dl class=.settings.*?</dl>|<dt>(written|command line)</dt>\s*<dd>.*?</dd>",
            b"",
            content,
            flags=re.DOTALL,
        )
    return content


def check_kills(work, folder, *, seed, setup="", num_kills=NUM_KILLS, most_in_a_row=10):
    """Kill the command at random moments of an undisturbed run's time, several times in succession,
    and then let it end.

    After each kill, every file that has its name is the one of the undisturbed run. At the end all
    of them are, and nothing else but hidden files is there.
    """
    rng = random.Random(seed)
    kills = 0
    log = folder / "log"
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    options = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "text": True,
        "env": os.environ | one_thread,
    }
    server = subprocess.Popen([sys.executable, __file__], **options)

    def run(*options, seconds=None, expected=(0,)):
        request = {
            "arguments": [*map(str, (*work.arguments, *options))],
            "seconds": seconds,
            "log": str(log),
            "setup": setup,
        }
        print(json.dumps(request), file=server.stdin, flush=True)
        status, taken = json.loads(server.stdout.readline())
        assert status in expected, log.read_text(errors="replace").rpartition("\nmodules:")[0]
        return status, taken

    with server:
        for _ in range(2):  # the second time, everything is imported
            work.clear()
            _, seconds = run()
        undisturbed = work.files()
        assert not any(path.name.startswith(".") for path in undisturbed)
        while kills < num_kills:
            work.clear()
            before = work.files()
            for number in range(rng.randint(1, most_in_a_row)):
                status, taken = run(
                    *work.resume, seconds=rng.uniform(0.0, seconds), expected=(0, -9)
                )
                if number == 0 and status == 0:
                    # undisturbed, too: the machine is less busy than it was, and kills would come
                    # too late
                    seconds = taken
                kills += status == -9
                _check_early(work.files(), undisturbed, before, work)
            run(*work.resume, seconds=120)
            found = {
                path: content
                for path, content in work.files().items()
                if not path.name.startswith(".")
            }
            assert sorted(found) == sorted(undisturbed)
            assert [
                path
                for path in undisturbed
                if found[path] != undisturbed[path] and path.name not in work.early
            ] == []
            work.after()


def _check_early(found, undisturbed, before, work):
    for path, content in found.items():
        if path.suffix == ".mhd":
            parts = (path, path.with_suffix(".zraw"))
            header, voxels = (
                [files.get(part) == found[part] for files in (before, undisturbed)]
                for part in parts
            )
            assert header == voxels, f"{path}: a header beside the voxels of another file"
        if not path.name.startswith(".") and path.name not in work.early:
            assert path in undisturbed or path in before, f"{path}: does not belong here"
            assert content in (undisturbed.get(path), before.get(path)), (
                f"{path}: neither the new nor the old content"
            )


if __name__ == "__main__":
    _serve()
