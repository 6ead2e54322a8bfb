"""Gives a reader many damaged inputs in a forked process with limits of memory and time.

The rule: a reader returns a valid object or raises a CrfRefineError with a short message that a
terminal can show. Another exception, a crash, an input that takes too long or too much memory, or
text on the standard streams is a fault, named with the number of its input.
"""

import faulthandler
import itertools
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crfrefine.base.text import for_terminal
from crfrefine.errors import CapacityError, CrfRefineError, UnexpectedError

MAX_CHARACTERS = 2000  # of a message
MAX_BYTES = 1 << 28  # resident, beyond those at the start
MAX_ADDRESSES = 3 << 30  # bytes, beyond those at the start: so that the machine survives


class Target(NamedTuple):
    """A reader, and how its inputs are made."""

    name: str  # of the kind of file
    # the content of files by their names; the first one is given to the reader
    make: Callable[[random.Random], Mapping[str, bytes]]
    # raises AssertionError for a result that is not valid
    read: Callable[[Path, random.Random], object]
    names_file: bool = True  # whether an error must name the file
    max_seconds: float = 5.0  # of processor time per input; a usual one takes a millisecond


def examine(target, folder, number):
    """Give a reader an input in this process; return whether it was taken, raise whatever breaks
    the rule.
    """
    rng = random.Random(f"{target.name} {number}")
    files = target.make(rng)
    for (
        earlier
    ) in folder.iterdir():  # A reader of a folder would see what another input has left there.
        if earlier.name not in files:
            earlier.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        target.read(folder / next(iter(files)), rng)
    except UnexpectedError as error:
        raise error.__cause__ or error from None
    except CrfRefineError as error:
        refusal = error
    else:
        return True
    message = str(refusal)
    assert 0 < len(message) < MAX_CHARACTERS, f"{len(message)} characters: {message[:300]}"
    assert for_terminal(message) == message, f"not for a terminal: {message!r:.300}"
    assert not target.names_file or str(folder) in message, (
        f"does not name the file: {message:.300}"
    )
    # The system refused memory that the reader had not asked about.
    assert not (
        isinstance(refusal, CapacityError) and isinstance(refusal.__cause__, MemoryError)
    ), f"ran out of memory: {message:.300}"
    return False


def fuzz(target, folder, first, count=None, seconds=None):
    """Give a reader the inputs from number `first` on; return how many it has refused, and how many
    it has taken.
    """
    target.make(random.Random(0))  # Samples are made once, here, without limits.
    counts = np.frombuffer(mmap.mmap(-1, 16), np.int64)
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if not child:
            _work(
                target,
                folder,
                itertools.islice(itertools.count(first), count),
                seconds,
                counts,
                log,
            )
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        said = log.read().decode(errors="replace")[-4000:]
    number = first + counts.sum()
    assert not status, (
        f"{target.name}, input {number}, status {status}; `pytest tests/fuzz --only {number} -k "
        f"NAME` repeats it\n{said}"
    )
    return counts.tolist()


def _work(target, folder, numbers, seconds, counts, log):
    """Count what became of each input, where a crash cannot take it."""
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    faulthandler.enable(log)
    own = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmSize")
    )
    resource.setrlimit(resource.RLIMIT_AS, (own + MAX_ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26,) * 2)
    signal.signal(signal.SIGPROF, _late)
    end = time.monotonic() + (seconds or 1e9)
    largest = _resident() + MAX_BYTES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for place, number in enumerate(numbers):
                if time.monotonic() >= end:
                    break
                if (
                    place % 50 == 0
                ):  # Waiting takes no processor time; setting this limit starts a thread.
                    faulthandler.dump_traceback_later(
                        60 + 6 * target.max_seconds, exit=True, file=log
                    )
                signal.setitimer(signal.ITIMER_PROF, target.max_seconds)
                is_taken = examine(target, folder, number)
                assert not os.fstat(log.fileno()).st_size, (
                    "something was written to the standard streams"
                )
                assert _resident() < largest, f"it took more than {MAX_BYTES >> 20} MiB"
                counts[int(is_taken)] += 1
        os._exit(0)
    except BaseException:
        log.write(traceback.format_exc().encode())
        log.flush()
    finally:
        os._exit(1)


class TookTooLong(BaseException):
    """Not an Exception: a handler of errors may not take it for one of the file."""


def _resident():
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _late(number, frame):
    raise TookTooLong("not done in time")
