"""What other processes run in the tests of processes: of a module that they can import by its name."""

import os
import signal
import time


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


def fail_at_two(number):
    if number == 2:
        raise ValueError(f"no {number}")
    return number


def fail_from_the_end(number):
    time.sleep(0.05 * (2 - number))
    raise ValueError(f"no {number}")


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
