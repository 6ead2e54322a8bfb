"""Forks the processes of DICOM from one that has imported what they need: each request has a
process, with its limits, that need not import highdicom first.
"""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

from crfrefine.convert import dicom

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["crfrefine.io.dicom.writing", "crfrefine.convert.dicom"])


def _serve(arguments, folder, output):
    """Answer a request as `python -c` with these arguments would; it is the end of the process."""
    os.chdir(folder)
    os.dup2(os.open(output, os.O_WRONLY), 1)
    sys.argv = ["-c", *arguments]
    sys.stdout = os.fdopen(1, "w")
    dicom.serve()


def run(command, **_):
    """Stand for `subprocess.run` of a command that serves a request."""
    with tempfile.NamedTemporaryFile() as output:
        process = _FORKS.Process(target=_serve, args=(command[4:], Path.cwd(), output.name))
        process.start()
        process.join()
        return CompletedProcess(command, process.exitcode, Path(output.name).read_bytes())
