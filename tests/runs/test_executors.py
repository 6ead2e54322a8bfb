"""What all executors promise alike: one item after the other, in processes with and without limits, and on a Dask cluster.

Each item has its outcome, an error or a lost worker costs its item alone, and nothing is left behind.
"""

import contextlib
import os
import subprocess
import sys

import pool_functions
import pytest
from evaluation_helpers import children

from crfrefine.errors import InputError
from crfrefine.runs.execution.executor import Placement
from crfrefine.runs.execution.factory import Processes, make_executor
from crfrefine.runs.execution.process import Limits
from crfrefine.runs.execution.threads import Workers

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # A worker that is restarted is away for a moment, for long on a busy machine.
    pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning"),
]

SEPARATE = ["processes", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("processes with limits", "cluster"))]
KINDS = ["serial", *SEPARATE]
QUICK = ["serial", "processes", "cluster"]


@pytest.fixture
def make(request):
    def executor(kind, seconds=None):
        if kind == "cluster":
            return make_executor(1, Placement(dask=request.getfixturevalue("address"), case_timeout=seconds))
        if kind == "processes with limits":
            return make_executor(2, Placement(case_timeout=seconds or 600.0))
        return make_executor(1 if kind == "serial" else 2)

    return executor


@pytest.mark.parametrize("kind", QUICK)
def test_every_item_has_its_result(make, kind):
    begun = []
    with make(kind) as executor:
        found = []
        processes = set()
        for item, outcome in executor.map(pool_functions.square, [*range(5), 3], begun.append):
            assert item in begun
            assert outcome.failure is None
            found.append((item, outcome.get()[0]))
            processes.add(outcome.get()[1])
        assert list(executor.map(pool_functions.square, [], begun.append)) == []
        assert pool_functions.results(executor, pool_functions.square, []) == []
        assert pool_functions.results(executor, pool_functions.square_slowly_from_the_end, range(5)) == [0, 1, 4, 9, 16]
        sizes = [10, 1 << 14, 1 << 20]  # larger than a pipe or an event of the cluster takes at once
        assert [len(result) for result in pool_functions.results(executor, pool_functions.repeat, sizes)] == sizes
    assert sorted(found) == [(number, number**2) for number in (0, 1, 2, 3, 3, 4)]
    assert sorted(begun) == [0, 1, 2, 3, 3, 4]
    assert processes == {os.getpid()} if kind == "serial" else os.getpid() not in processes
    assert len(processes) <= 2


def test_a_single_item_needs_no_process():
    ((_, outcome),) = Processes(2).map(pool_functions.square, [3])
    assert outcome.get() == (9, os.getpid())


@pytest.mark.parametrize("kind", QUICK)
def test_an_error_costs_its_item_alone_and_says_where_it_was_raised(make, kind):
    with make(kind) as executor:
        outcomes = dict(executor.map(pool_functions.fail_at_two, range(4)))
        failed = outcomes.pop(2)
        assert {item: outcome.get() for item, outcome in outcomes.items()} == {0: 0, 1: 1, 3: 3}
        assert (failed.is_lost, failed.failure.kind) == (False, "ValueError")
        assert "no 2" in failed.failure.message
        assert "in fail_at_two" in failed.failure.traceback
        with pytest.raises(ValueError, match="no 2"):
            pool_functions.results(executor, pool_functions.fail_at_two, range(4))


def test_of_several_errors_the_one_of_the_first_item_is_raised():
    """Which one comes first depends on the machine; what a command says must not."""
    with Workers(3) as workers, pytest.raises(ValueError, match="no 0"):
        workers.run(lambda item, _: pool_functions.fail_from_the_end(item), range(3))


@pytest.mark.parametrize("kind", SEPARATE)
def test_what_cannot_be_sent_costs_its_item_alone(make, kind):
    with make(kind) as executor:
        outcomes = dict(executor.map(pool_functions.fail_oddly_at_one, range(4)))
    assert (outcomes[0].get(), outcomes[3].get()) == (0, 3)
    assert "TwoArgumentsError: salt and pepper" in str(outcomes[1].error)
    assert "in fail_oddly_at_one" in outcomes[1].failure.traceback
    assert "lambda" in str(outcomes[2].error)
    assert not outcomes[1].is_lost | outcomes[2].is_lost


@pytest.mark.parametrize("kind", SEPARATE)
def test_a_killed_process_costs_its_item_alone(make, kind):
    with make(kind) as executor:
        outcomes = dict(executor.map(pool_functions.die_at_three, range(6)))
    lost = outcomes.pop(3)
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {number: number for number in (0, 1, 2, 4, 5)}
    assert lost.is_lost
    assert isinstance(lost.error, InputError)
    assert "SIGKILL" in str(lost.error)
    assert ("--processes" in str(lost.error)) == (kind != "cluster")
    assert ("tried 2 times, on tcp://127.0.0.1:" in str(lost.error)) == (kind == "cluster")


def test_a_process_that_ends_by_itself_costs_its_item_alone():
    with Processes(2) as executor:
        outcomes = dict(executor.map(pool_functions.leave_at_one, range(3)))
    assert (outcomes[0].get(), outcomes[2].get()) == (0, 2)
    assert outcomes[1].is_lost
    assert "status 7" in outcomes[1].failure.message


@pytest.mark.parametrize("kind", ["processes with limits", "cluster"])
def test_an_item_that_takes_too_long_is_given_up_alone(make, kind):
    with make(kind, 1.5) as executor:
        outcomes = dict(executor.map(pool_functions.sleep, [0, 3600, 1]))
    assert (outcomes[0].get(), outcomes[1].get()) == (0, 1)
    assert isinstance(outcomes[3600].error, InputError)
    assert "took longer than the 1.5 s of --case-timeout" in str(outcomes[3600].error)
    assert not outcomes[3600].is_lost


def test_the_time_of_an_item_does_not_begin_before_its_process_is_ready():
    with Processes(1, Limits(seconds=1.0)) as executor:
        assert pool_functions.results(executor, pool_functions.LoadedSlowly(), [-1]) == [1]


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_outcome_that_stops_only_what_has_begun_is_finished(make, kind):
    begun = []
    with make(kind) as executor:
        outcomes = executor.map(pool_functions.fail_at_two, range(300), begun.append, lambda outcome: outcome.error is not None)
        ended = [item for item, _ in outcomes]
    assert 2 in ended
    assert sorted(ended) == sorted(begun)
    assert len(ended) < 30


class StopError(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_stops_early_may_go_on_with_other_items(make, kind):
    begun = []

    def started(item):
        begun.append(item)
        if len(begun) == 2:
            raise StopError

    with make(kind) as executor:
        with contextlib.closing(executor.map(pool_functions.square, range(50))) as outcomes:
            next(outcomes)
        with pytest.raises(StopError):
            list(executor.map(pool_functions.sleep, [0.02] * 50, started))
        assert pool_functions.results(executor, pool_functions.repeat, [2, 1]) == [b"xx", b"x"]
    assert len(begun) < 50


def test_whoever_stops_early_leaves_no_process_behind():
    before = set(children(os.getpid()))
    with Processes(2) as executor:
        outcomes = executor.map(pool_functions.sleep, [0, 3600])
        assert next(outcomes)[1].get() == 0
        assert set(children(os.getpid())) - before
    assert set(children(os.getpid())) == before


def test_a_script_is_not_run_again_in_each_process(tmp_path):
    """Python's own pools import the main script in each process, which then starts processes of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import math\nfrom crfrefine.runs.execution.factory import make_executor\n"
        "with make_executor(2) as executor:\n    print(sorted(outcome.get() for _, outcome in executor.map(math.sqrt, [1.0, 4.0])))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stderr, done.stdout) == ("", "[1.0, 2.0]\n")
