"""Run a reader on many inputs in a forked process with limits of memory and time: a crash or a hang costs one input, not the run.

The rule: a reader returns a valid object or raises a CrfRefineError with a short message that a terminal can show. Anything else is a
`Finding`: another exception, a crash, an input that takes too long or too much memory, text on the standard streams.
"""

import faulthandler
import itertools
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crfrefine.base.text import for_terminal
from crfrefine.errors import CapacityError, CrfRefineError, UnexpectedError

MAX_OF_A_MESSAGE = 2000  # characters
MAX_BYTES = 1 << 28  # resident, beyond those at the start
MAX_ADDRESSES = 3 << 30  # bytes, beyond those at the start: so that the machine survives
MAX_FINDINGS = 20
_RENEWED = 50  # inputs between two settings of the hard limit, which starts a thread


@dataclass(frozen=True)
class Target:
    """A reader, and how its inputs are made."""

    name: str  # of the kind of file
    make: Callable[[random.Random], Mapping[str, bytes]]  # the content of files by their names; the first one is given to the reader
    read: Callable[[Path, random.Random], object]  # raises AssertionError for a result that is not valid
    names_file: bool = True  # whether an error must name the file
    most_seconds: float = 5.0  # of processor time per input; a usual one takes a millisecond. Six times as long, it may wait.


@dataclass(frozen=True)
class Finding:
    """An input that broke the rule: its seed, by which it can be made again, and what happened."""

    seed: int
    what: str


@dataclass
class Tally:
    """What became of the inputs: valid objects, errors of ours, findings; and how long it took."""

    taken: int = 0
    refused: int = 0
    findings: list[Finding] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def inputs(self):
        return self.taken + self.refused + len(self.findings)

    def add(self, seed, outcome):
        """Count an input that was "taken" or "refused"; anything else is what is wrong with it."""
        self.taken += outcome == "taken"
        self.refused += outcome == "refused"
        if outcome not in ("taken", "refused"):
            self.findings.append(Finding(seed, outcome))


class TookTooLong(BaseException):
    """Not an Exception: a handler of errors may not take it for one of the file."""


class NoiseError(Exception):
    """The reader wrote to the standard streams by itself."""


def fuzz(target, folder, *, first=0, inputs=None, seconds=None):
    """Give a reader the inputs of the seeds from `first` on, in an empty folder, until one of the limits or MAX_FINDINGS is reached."""
    started = time.monotonic()
    tally = Tally()
    while (inputs is None or tally.inputs < inputs) and len(tally.findings) < MAX_FINDINGS:
        if seconds is not None and time.monotonic() - started >= seconds:
            break
        files = (folder.with_name(f"{folder.name}.{kind}") for kind in ("results", "noise"))
        with next(files).open("w+b") as results, next(files).open("w+b") as noise:
            deadline = None if seconds is None else started + seconds
            left = None if inputs is None else inputs - tally.inputs
            seeds = itertools.islice(itertools.count(first + tally.inputs), left)
            most = MAX_FINDINGS - len(tally.findings)
            status = _fork(lambda: _work(target, folder, seeds, deadline, most, results, noise))  # noqa: B023
            results.seek(0)
            for outcome in map(json.loads, results):
                tally.add(first + tally.inputs, outcome)
            if status:  # At the input behind the last one that was written down.
                noise.seek(0)
                what = f"signal {signal.Signals(-status).name}" if status < 0 else f"the process ended with status {status}"
                tally.add(first + tally.inputs, f"{what}\n{noise.read().decode(errors='replace')[:3000]}")
    tally.seconds = time.monotonic() - started
    return tally


def examine(target, folder, seed):
    """Give a reader the input of one seed in this process; return whether it was taken, raise whatever breaks the rule."""
    rng = random.Random(f"{target.name} {seed}")
    files = target.make(rng)
    for earlier in folder.iterdir():  # A reader of a folder would see what another input has left there.
        if earlier.name not in files:
            earlier.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    path = folder / next(iter(files))
    try:
        target.read(path, rng)
    except UnexpectedError as error:
        raise error.__cause__ or error from None
    except CrfRefineError as error:
        _require_readable(error, path if target.names_file else None)
        return False
    return True


def _require_readable(error, path):
    message = str(error)
    assert message, type(error)
    assert len(message) < MAX_OF_A_MESSAGE, f"{len(message)} characters: {message[:300]}"
    assert for_terminal(message) == message, f"not for a terminal: {message!r:.300}"
    assert path is None or str(path.parent) in message, f"does not name the file: {message:.300}"
    # The system refused memory that the reader had not asked about.
    assert not (isinstance(error, CapacityError) and isinstance(error.__cause__, MemoryError)), f"ran out of memory: {message:.300}"


def _fork(work):
    """Run a function in a copy of this process; return its exit status, or minus the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _work(target, folder, seeds, deadline, most, results, noise):
    """Write down what became of each input, where a crash cannot take it."""
    for stream in (1, 2):
        os.dup2(noise.fileno(), stream)
    faulthandler.enable(noise)
    _set_limits()
    signal.signal(signal.SIGPROF, _late)
    largest, quiet = _resident() + MAX_BYTES, 0
    for number, seed in enumerate(seeds):
        if most == 0 or (deadline is not None and time.monotonic() >= deadline):
            break
        if number % _RENEWED == 0:
            faulthandler.dump_traceback_later(6 * target.most_seconds, exit=True, file=noise)
        try:
            signal.setitimer(signal.ITIMER_PROF, target.most_seconds)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    outcome = "taken" if examine(target, folder, seed) else "refused"
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            if (written := os.fstat(noise.fileno()).st_size) > quiet:
                quiet = written
                raise NoiseError("something was written to the standard streams")
            if (resident := _resident()) > largest:
                largest = resident + MAX_BYTES
                raise MemoryError(f"it took more than {MAX_BYTES >> 20} MiB")
        except (Exception, TookTooLong):
            outcome, most = traceback.format_exc()[-3000:], most - 1
        results.write(json.dumps(outcome).encode() + b"\n")
        results.flush()


def _set_limits():
    own = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    resource.setrlimit(resource.RLIMIT_AS, (own + MAX_ADDRESSES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 26,) * 2)


def _resident():
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _late(number, frame):
    raise TookTooLong("not done in time")
