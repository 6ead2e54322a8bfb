"""Runs commands in copies of a process that has imported everything, and kills them with -9 at the given moments.

A program of its own: the process that forks must have one thread. It reads requests from standard input and answers on standard output,
one JSON value per line.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import sys
import time
from pathlib import Path


def work(arguments, log, setup):
    """Be the command. The names of the modules it has imported go to the end of the log."""
    for stream, name, mode in ((0, os.devnull, "rb"), (1, log, "wb"), (2, log, "ab")):
        with open(name, mode) as file:  # noqa: PTH123
            os.dup2(file.fileno(), stream)
    sys.argv[1:] = arguments
    exec(setup, {})  # of the tests themselves
    from crfrefine.cli.main import main

    status = 1
    try:
        main()
        status = 0
    except SystemExit as leave:
        status = leave.code
    finally:
        print("\nmodules:", *sys.modules, flush=True)
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def answer(request):
    """Run a command; kill it after some seconds, if it has not ended by then."""
    started = time.perf_counter()
    child = os.fork()
    if not child:
        work(request["arguments"], request["log"], request["setup"])
    end = os.pidfd_open(child)
    if not select.select([end], [], [], request["seconds"])[0]:
        os.kill(child, signal.SIGKILL)
    os.close(end)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - started


# Whatever a command has imported is there for the next ones.
for line in sys.stdin:
    request = json.loads(line)
    found = answer(request)
    if request["seconds"] is None:
        *_, modules = Path(request["log"]).read_text(errors="replace").rpartition("\nmodules:")
        for name in modules.split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    print(json.dumps(found), flush=True)
