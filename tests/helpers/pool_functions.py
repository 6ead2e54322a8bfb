"""What other processes run in the tests of processes, which import this module by its name."""

import os
import signal
import time


def square(number):
    return number**2, os.getpid()


def sleep(seconds):
    time.sleep(seconds)
    return seconds


def go_wrong_at_two(how, number):
    """The number; at two, raise an error, leave, be killed, or return what cannot be sent."""
    match how if number == 2 else "":
        case "fail":
            raise ValueError(f"no {number}")
        case "leave":
            os._exit(7)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    return (lambda: number) if how == "lambda" and number == 2 else number


def die_once(folder, number):
    """The number; at two, die at the first try, of which a file in the folder tells."""
    if number == 2 and not (folder / "tried").exists():
        (folder / "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_from_the_end(number):
    time.sleep(0.05 * (2 - number))
    raise ValueError(f"no {number}")


def repeat(size):
    return b"x" * size
