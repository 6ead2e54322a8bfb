"""Processes that are killed, that raise, and that are one more than there are items."""

import os
import signal
import subprocess
import sys

import pool_functions
import pytest
from evaluation_helpers import children

from crfrefine.execution.processes import Lost, map_in_processes


@pytest.mark.parametrize("num_processes", [1, 2, 9])
def test_every_item_has_its_result(num_processes):
    outcomes = dict(map_in_processes(pool_functions.square, range(5), num_processes))
    assert {item: result[0] for item, result in outcomes.items()} == {number: number**2 for number in range(5)}
    others = {result[1] for result in outcomes.values()}
    assert others == {os.getpid()} if num_processes == 1 else os.getpid() not in others
    assert len(others) <= num_processes


def test_no_items_no_processes():
    assert list(map_in_processes(pool_functions.square, [], 4)) == []


def test_a_killed_process_costs_its_item_alone():
    outcomes = dict(map_in_processes(pool_functions.die_at_three, range(6), 2))
    lost = outcomes.pop(3)
    assert outcomes == {number: number for number in (0, 1, 2, 4, 5)}
    assert lost == Lost(-signal.SIGKILL)
    assert "SIGKILL" in str(lost)
    assert "--processes" in str(lost)


def test_a_process_that_ends_by_itself_costs_its_item_alone():
    outcomes = dict(map_in_processes(pool_functions.leave_at_one, range(3), 2))
    assert outcomes == {0: 0, 1: Lost(7), 2: 2}
    assert "status 7" in str(outcomes[1])


def test_whoever_stops_early_leaves_no_process_behind():
    before = set(children(os.getpid()))
    outcomes = map_in_processes(pool_functions.sleep, [0, 3600], 2)
    assert next(outcomes) == (0, 0)
    assert set(children(os.getpid())) - before
    outcomes.close()
    assert set(children(os.getpid())) == before


def test_an_exception_comes_through_with_its_place():
    with pytest.raises(ValueError, match="no") as caught:
        list(map_in_processes(pool_functions.fail, range(2), 2))
    assert "in fail" in caught.value.__notes__[0]


def test_a_script_is_not_run_again_in_each_process(tmp_path):
    """Python's own pools import the main script in each process, which then starts processes of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom crfrefine.execution.processes import map_in_processes\n"
        "print(sorted(map_in_processes(math.sqrt, [1.0, 4.0, 9.0], 2)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout == "[(1.0, 1.0), (4.0, 2.0), (9.0, 3.0)]\n"
