"""What other processes run in the tests of processes: of a module that they can import by its name."""

import os
import signal
import time


def square(number):
    return number**2, os.getpid()


def die_at_three(number):
    return os.kill(os.getpid(), signal.SIGKILL) if number == 3 else number


def leave_at_one(number):
    return os._exit(7) if number == 1 else number


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


def return_a_lambda_at_two(number):
    return (lambda: number) if number == 2 else number


def repeat(size):
    return b"x" * size
