"""What other processes run in the tests of executors: of a module that they can import by its name."""

import contextlib
import os
import signal
import time
from pathlib import Path

from crfrefine.errors import CapacityError


def results(executor, function, items):
    """What an executor makes of items, in their order; the first error that comes is raised."""
    with contextlib.closing(executor.map(Numbered(function), list(enumerate(items)))) as outcomes:
        found = {number: outcome.get() for (number, _), outcome in outcomes}
    return [found[number] for number in range(len(items))]


class Numbered:
    def __init__(self, function):
        self.function = function

    def __call__(self, numbered):
        return self.function(numbered[1])


def square(number):
    return number**2, os.getpid()


def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave_at_one(number):
    if number == 1:
        os._exit(7)
    return number


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def square_slowly_from_the_end(number):
    time.sleep(0.01 * (4 - number))
    return number**2


def _load_slowly():
    time.sleep(1.3)
    return abs


class LoadedSlowly:
    """A function whose libraries take longer to load than 1 s."""

    def __reduce__(self):
        return _load_slowly, ()


def fail_at_two(number):
    if number == 2:
        raise ValueError(f"no {number}")
    return number


def fail_from_the_end(number):
    time.sleep(0.05 * (2 - number))
    raise ValueError(f"no {number}")


def die_once(path):
    """The first time, the process dies."""
    marker = Path(path)
    if marker.exists():
        return 1
    marker.touch()
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def begin_and_sleep(path):
    """Leave a line when it begins."""
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(3600)
    return 0


LEAVES = "TEST_WORKER_LEAVES"
"""Variable of the environment of a worker that leaves the cluster while its item is in progress."""


def sleep_until_the_worker_leaves(task):
    """Leave a line in a file where the worker is going to leave, and never end there."""
    number, path = task
    if LEAVES in os.environ:
        begin_and_sleep(path)
    return number, os.getppid()


def signal_worker(number):
    """Send a signal to the Dask worker that this process works for, and to nobody else."""
    parent = os.getppid()
    assert b"multiprocessing" in Path(f"/proc/{parent}/cmdline").read_bytes()
    os.kill(parent, number)


def kill_parent(number):
    if number == 1:
        signal_worker(signal.SIGKILL)
        time.sleep(3600)
    return number


def freeze_parent(number):
    if number == 1:
        signal_worker(signal.SIGSTOP)
        time.sleep(3600)
    return number


def fill_memory(size):
    held = bytearray(size)
    held[::4096] = b"1" * len(held[::4096])
    time.sleep(3600 if size > 1 << 28 else 0)
    return len(held)


class TwoArgumentsError(Exception):
    """Cannot be made again from its text alone, as unpickling tries."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def fail_oddly_at_one(number):
    """The error, and a result, that cannot be sent."""
    if number == 1:
        raise TwoArgumentsError("salt", "pepper")
    return (lambda: number) if number == 2 else number


def repeat(size):
    return b"x" * size


def need_memory(need):
    """Return the worker's process; refuse, as cases do, if the worker has too little memory. The other number makes items differ."""
    if int(os.environ.get("CRFREFINE_WORKER_MEMORY", 1 << 60)) < need[1]:
        raise CapacityError(f"needs {need[1]} bytes")
    time.sleep(0.5)
    return os.getppid(), need[1]


def where(item):
    names = ("CRFREFINE_WORKER_THREADS", "CRFREFINE_WORKER_MEMORY")
    return (str(Path.cwd()), *(os.environ.get(name) for name in names))


def refuse_two(placed):
    if placed.device == "two":
        raise ValueError("no two")
    return placed.item


def die_or_hang_on_a_device(placed):
    if placed.item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if placed.item == "hang":
        time.sleep(3600)
    return placed.item
