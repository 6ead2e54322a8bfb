"""What other processes run in the tests of executors: of a module that they can import by its name."""

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


def square_slowly_from_the_end(number: int) -> int:
    time.sleep(0.01 * (4 - number))
    return number**2


def fail_at_two(number: int) -> int:
    if number == 2:
        raise ValueError(f"no {number}")
    return number


def fail_from_the_end(number: int) -> int:
    time.sleep(0.05 * (2 - number))
    raise ValueError(f"no {number}")
