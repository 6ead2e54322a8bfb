"""Items in separate processes: each has its outcome, an error or a lost process costs its item
alone, and nothing is left behind.
"""

import contextlib
import functools
import os
import re
import subprocess
import sys

import pool_functions
import pytest
from evaluation_helpers import children

from crfrefine.evaluate.processes import map_in_processes
from crfrefine.train.workers import Workers

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_item_has_its_result(num_processes):
    """Also of a single item, which needs no process, and results that are larger than a pipe takes
    at once.
    """
    found = list(map_in_processes(pool_functions.square, [*range(5), 3], num_processes))
    assert sorted((item, square) for item, (square, _) in found) == [
        (0, 0),
        (1, 1),
        (2, 4),
        (3, 9),
        (3, 9),
        (4, 16),
    ]
    processes = {process for _, (_, process) in found}
    if num_processes == 1:
        assert processes == {os.getpid()}
    else:
        assert os.getpid() not in processes
    assert len(processes) <= 2
    assert list(map_in_processes(pool_functions.square, [3], num_processes)) == [
        (3, (9, os.getpid()))
    ]
    assert list(map_in_processes(pool_functions.square, [], num_processes)) == []
    sizes = [10, 1 << 14, 1 << 20]
    for size, result in map_in_processes(pool_functions.repeat, sizes, num_processes):
        assert len(result) == size


def test_of_several_errors_the_one_of_the_first_item_is_raised():
    """Which one comes first depends on the machine; what a command says must not."""
    with Workers(3) as workers, pytest.raises(ValueError, match="no 0"):
        workers.run(lambda item, _: pool_functions.fail_from_the_end(item), range(3))


@pytest.mark.parametrize(
    ("how", "num_processes", "message"),
    [
        ("fail", 1, "unexpected ValueError"),
        ("fail", 2, "unexpected ValueError"),
        ("lambda", 2, "its result cannot be sent: .*lambda"),
        ("die", 2, r"its process ended with status -9 \(.*try fewer --processes"),
        ("leave", 2, "its process ended with status 7"),
    ],
)
def test_what_goes_wrong_costs_its_item_alone(how, num_processes, message):
    """An error says where it was raised; a process is lost, or its result cannot be sent."""
    work = functools.partial(pool_functions.go_wrong_at_two, how)
    outcomes = dict(map_in_processes(work, range(6), num_processes))
    failure = outcomes.pop(2)
    assert outcomes == {0: 0, 1: 1, 3: 3, 4: 4, 5: 5}
    assert re.match(message, failure.message)
    if how == "fail":
        assert "no 2" in failure.traceback
        assert "in go_wrong_at_two" in failure.traceback


def test_an_item_whose_process_died_is_tried_again(tmp_path):
    """As memory may have run out beside the others; with its outcome it is there once."""
    work = functools.partial(pool_functions.die_once, tmp_path)
    outcomes = list(map_in_processes(work, range(6), 2))
    assert sorted(outcomes) == [(number, number) for number in range(6)]


def test_whoever_stops_early_leaves_no_process_behind():
    before = set(children(os.getpid()))
    with contextlib.closing(map_in_processes(pool_functions.sleep, [0, 3600], 2)) as outcomes:
        assert next(outcomes) == (0, 0)
        assert set(children(os.getpid())) - before
    assert set(children(os.getpid())) == before


def test_a_script_is_not_run_again_in_each_process(tmp_path):
    """Python's own pools import the main script in each process, which then starts processes of its
    own.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom crfrefine.evaluate.processes import map_in_processes\n"
        "print(sorted(result for _, result in map_in_processes(math.sqrt, [1.0, 4.0], 2)))\n"
    )
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stderr, done.stdout) == ("", "[1.0, 2.0]\n")
