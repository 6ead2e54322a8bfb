"""What other processes run in the tests of the pool: of a module that they can import by its name."""

import os
import signal
import time


def square(number: int) -> tuple[int, int]:
    return number**2, os.getpid()


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave_at_one(number: int) -> int:
    if number == 1:
        os._exit(7)
    return number


def sleep(seconds: int) -> int:
    time.sleep(seconds)
    return seconds


def fail(number: int) -> int:
    raise ValueError(f"no {number}")
