"""What all executors promise alike: serial, in threads, in processes with and without limits, and on a Dask cluster."""

import contextlib
from collections.abc import Callable, Iterator

import pool_functions
import pytest
from cluster_helpers import cluster_in_process

from crfrefine.errors import InputError
from crfrefine.execution.executor import Executor, Serial
from crfrefine.execution.factory import make_executor
from crfrefine.execution.placement import Placement
from crfrefine.execution.processes import Processes
from crfrefine.execution.threads import Threads

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # A worker that is restarted is away for a moment, for long on a busy machine.
    pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning"),
]

Make = Callable[..., Executor]
SEPARATE = ("processes with limits", "cluster")


@pytest.fixture(scope="module")
def makers() -> Iterator[dict[str, Make]]:
    """What makes an executor of each kind; those of `SEPARATE` take a time limit."""
    with cluster_in_process() as cluster:
        address = cluster.scheduler_address
        yield {
            "serial": Serial,
            "threads": lambda: Threads(2),
            "processes": lambda: Processes(2),
            "processes with limits": lambda seconds=600.0: make_executor("processes", 2, Placement(case_timeout=seconds)),
            "cluster": lambda seconds=None: make_executor("processes", 1, Placement(dask=address, case_timeout=seconds)),
        }


KINDS = ("serial", "threads", "processes", *SEPARATE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_item_has_one_outcome_and_has_begun_once_before(makers, kind):
    begun: list[int] = []
    with makers[kind]() as executor:
        ended: list[int] = []
        for item, outcome in executor.map(pool_functions.square, range(7), begun.append):
            assert item in begun
            assert outcome.get()[0] == item**2
            assert outcome.failure is None
            ended.append(item)
        assert list(executor.map(pool_functions.square, [], begun.append)) == []
    assert sorted(ended) == sorted(begun) == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_items_are_different_items(makers, kind):
    with makers[kind]() as executor:
        assert [outcome.get()[0] for _, outcome in executor.map(pool_functions.square, [3, 3, 3])] == [9, 9, 9]


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_in_the_order_of_the_items(makers, kind):
    with makers[kind]() as executor:
        assert executor.results(pool_functions.square_slowly_from_the_end, range(5)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_costs_its_item_alone_and_says_where_it_was_raised(makers, kind):
    with makers[kind]() as executor:
        outcomes = dict(executor.map(pool_functions.fail_at_two, range(4)))
        failed = outcomes.pop(2)
        assert {item: outcome.get() for item, outcome in outcomes.items()} == {0: 0, 1: 1, 3: 3}
        assert (failed.is_lost, failed.failure.kind) == (False, "ValueError")
        assert "no 2" in failed.failure.message
        assert "in fail_at_two" in failed.failure.traceback
        with pytest.raises(ValueError, match="no 2"):
            executor.results(pool_functions.fail_at_two, range(4))


@pytest.mark.parametrize("kind", ["processes", *SEPARATE])
def test_what_cannot_be_sent_costs_its_item_alone(makers, kind):
    with makers[kind]() as executor:
        outcomes = dict(executor.map(pool_functions.fail_oddly_at_one, range(4)))
    assert (outcomes[0].get(), outcomes[3].get()) == (0, 3)
    for item, text in ((1, "TwoArgumentsError: salt and pepper"), (2, "lambda")):
        assert not outcomes[item].is_lost
        assert text in str(outcomes[item].error)
    assert "in fail_oddly_at_one" in outcomes[1].failure.traceback


@pytest.mark.parametrize("kind", KINDS)
def test_results_may_be_large(makers, kind):
    """Larger than a pipe or an event of the cluster takes at once."""
    with makers[kind]() as executor:
        sizes = [10, 1 << 14, 1 << 20]
        assert [len(result) for result in executor.results(pool_functions.repeat, sizes)] == sizes


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_outcome_that_stops_only_what_has_begun_is_finished(makers, kind):
    """Each item that has begun has an outcome, those too that end beside the one that stops."""
    begun: list[int] = []
    with makers[kind]() as executor:
        outcomes = executor.map(pool_functions.fail_at_two, range(300), begun.append, lambda outcome: outcome.error is not None)
        ended = [item for item, _ in outcomes]
    assert 2 in ended
    assert sorted(ended) == sorted(begun)
    assert len(ended) < 30


class StopError(Exception):
    """Somebody who is told of an item wants no more."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["the iterator is closed", "whoever is told of items raises"])
def test_whoever_stops_early_may_go_on_with_other_items(makers, kind, way):
    begun: list[int] = []

    def started(item: int) -> None:
        begun.append(item)
        if way == "whoever is told of items raises" and len(begun) == 2:
            raise StopError

    with makers[kind]() as executor:
        outcomes = executor.map(pool_functions.square, range(50), started)
        with contextlib.closing(outcomes):
            assert next(outcomes)[1].get()[0] is not None if way == "the iterator is closed" else True
            if way == "whoever is told of items raises":
                with pytest.raises(StopError):
                    list(outcomes)
        assert executor.results(pool_functions.repeat, [2, 1]) == [b"xx", b"x"]
    assert len(begun) < 50


@pytest.mark.parametrize("kind", SEPARATE)
def test_an_item_that_takes_too_long_is_given_up_alone(makers, kind):
    with makers[kind](1.5) as executor:
        outcomes = dict(executor.map(pool_functions.sleep, [0, 3600, 1]))
    assert (outcomes[0].get(), outcomes[1].get()) == (0, 1)
    assert isinstance(outcomes[3600].error, InputError)
    assert "took longer than the 1.5 s of --case-timeout" in str(outcomes[3600].error)
    assert not outcomes[3600].is_lost


@pytest.mark.parametrize("kind", ["processes", *SEPARATE])
def test_a_killed_process_costs_its_item_alone(makers, kind):
    with makers[kind]() as executor:
        outcomes = dict(executor.map(pool_functions.die_at_three, range(6)))
    lost = outcomes.pop(3)
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {number: number for number in (0, 1, 2, 4, 5)}
    assert lost.is_lost
    assert isinstance(lost.error, InputError)
    assert "SIGKILL" in str(lost.error)
