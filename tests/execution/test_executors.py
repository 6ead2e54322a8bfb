"""Whoever runs the cases: each item has its outcome, an error or a lost worker costs its item alone, and nothing is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pool_functions
import pytest
from evaluation_helpers import children, is_running

from crfrefine.execution.executor import Executor, Serial
from crfrefine.execution.factory import make_executor
from crfrefine.execution.process import Limits
from crfrefine.execution.processes import Processes
from crfrefine.execution.threads import Threads

KINDS = ["threads", "processes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [1, 2, 9])
def test_every_item_has_its_result(kind, num_workers):
    with make_executor(kind, num_workers) as executor:
        outcomes = dict(executor.map(pool_functions.square, range(5)))
        assert executor.results(pool_functions.square_slowly_from_the_end, range(5)) == [number**2 for number in range(5)]
    found = {item: outcome.get() for item, outcome in outcomes.items()}
    assert {item: value[0] for item, value in found.items()} == {number: number**2 for number in range(5)}
    others = {value[1] for value in found.values()}
    is_here = kind == "threads" or num_workers == 1
    assert others == {os.getpid()} if is_here else os.getpid() not in others
    assert len(others) <= num_workers


@pytest.mark.parametrize("kind", KINDS)
def test_no_items_no_outcomes(kind):
    with make_executor(kind, 4) as executor:
        assert list(executor.map(pool_functions.square, [])) == []
        assert executor.results(pool_functions.square, []) == []


def test_one_worker_is_the_caller():
    assert isinstance(make_executor("threads", 1), Serial)
    assert isinstance(make_executor("processes", 1), Serial)
    with pytest.raises(ValueError, match="'dusk'"):
        make_executor("dusk", 2)


@pytest.mark.parametrize("executor", [Serial(), Threads(2), Processes(2)], ids=lambda executor: type(executor).__name__)
def test_an_error_costs_its_item_alone(executor: Executor):
    with executor:
        outcomes = dict(executor.map(pool_functions.fail_at_two, range(4)))
        failed = outcomes.pop(2)
        assert {item: outcome.get() for item, outcome in outcomes.items()} == {0: 0, 1: 1, 3: 3}
        assert not failed.is_lost
        assert failed.failure is not None
        assert failed.failure.kind == "ValueError"
        assert "in fail_at_two" in failed.failure.traceback
        with pytest.raises(ValueError, match="no 2"):
            executor.results(pool_functions.fail_at_two, range(4))


def test_of_several_errors_the_one_of_the_first_item_is_raised():
    """Which one comes first depends on the machine; what a command says must not."""
    with Threads(3) as executor, pytest.raises(ValueError, match="no 0"):
        executor.results(pool_functions.fail_from_the_end, range(3))


def test_a_killed_process_costs_its_item_alone():
    with Processes(2) as executor:
        outcomes = dict(executor.map(pool_functions.die_at_three, range(6)))
    lost = outcomes.pop(3)
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {number: number for number in (0, 1, 2, 4, 5)}
    assert lost.is_lost
    assert lost.failure.kind == "InputError"
    assert signal.SIGKILL.name in lost.failure.message
    assert "--processes" in lost.failure.message


def test_the_time_of_an_item_does_not_begin_before_its_process_is_ready():
    with Processes(1, Limits(seconds=3.0)) as executor:
        assert executor.results(pool_functions.LoadedSlowly(), [-1]) == [1]


def test_a_process_that_ends_by_itself_costs_its_item_alone():
    with Processes(2) as executor:
        outcomes = dict(executor.map(pool_functions.leave_at_one, range(3)))
    assert (outcomes[0].get(), outcomes[2].get()) == (0, 2)
    assert outcomes[1].is_lost
    assert "status 7" in outcomes[1].failure.message


@pytest.mark.parametrize("way", ["iterator", "block"])
def test_whoever_stops_early_leaves_no_process_behind(way):
    before = set(children(os.getpid()))
    with Processes(2) as executor:
        outcomes = executor.map(pool_functions.sleep, [0, 3600])
        assert next(outcomes)[1].get() == 0
        assert set(children(os.getpid())) - before
        if way == "iterator":
            outcomes.close()
            assert set(children(os.getpid())) == before
    assert set(children(os.getpid())) == before


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
import pool_functions
from crfrefine.execution.processes import Processes
list(Processes(2).map(pool_functions.sleep, [3600, 3600]))
"""


def test_a_killed_parent_leaves_no_process_behind():
    """In the middle of an item of an hour, too."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(Path(pool_functions.__file__).parent)])
    deadline = time.monotonic() + 60
    while len(workers := children(parent.pid)) < 2 or not all(is_asleep(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_asleep(process: int) -> bool:
    """Whether a worker has begun its item: then it has a second thread, which waits for the end of the pipe."""
    return "Threads:\t2" in Path(f"/proc/{process}/status").read_text()


def test_whoever_stops_early_drops_the_items_that_have_not_begun():
    begun: list[int] = []
    release = threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        assert number == 0 or release.wait(timeout=30)
        return number

    with Threads(2) as executor:
        outcomes = executor.map(work, range(9))
        assert next(outcomes)[0] == 0
        outcomes.close()
        release.set()
        assert executor.results(abs, [-1, -2, -3]) == [1, 2, 3]  # which comes after all that is left
    assert set(begun) <= {0, 1, 2}


def test_a_script_is_not_run_again_in_each_process(tmp_path):
    """Python's own pools import the main script in each process, which then starts processes of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom crfrefine.execution.factory import make_executor\n"
        "with make_executor('processes', 2) as executor:\n    print(executor.results(math.sqrt, [1.0, 4.0, 9.0]))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout == "[1.0, 2.0, 3.0]\n"
