"""A worker whose time is up leaves a real Dask cluster in the middle of an item: `dask worker --lifetime`, as in a job with a walltime."""

import contextlib
import functools
import os
from pathlib import Path

import pool_functions
import pytest
from cluster_helpers import daemons, wait_until, worker_process
from distributed import Client
from evaluation_helpers import is_running

from crfrefine.execution import factory
from crfrefine.execution.placement import Placement

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # The second worker comes when the first one has left.
    pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning"),
]

NUM_ITEMS = 5


def leave(address: str) -> None:
    """What `--lifetime` does when the time is up, at a moment that does not depend on how busy the machine is."""

    def go(dask_worker) -> None:
        # For the thread of the item, which does not end, it waits half a minute else.
        dask_worker.close = functools.partial(dask_worker.close, timeout=1)
        dask_worker.loop.add_callback(dask_worker.close_gracefully, reason="worker-lifetime-reached")

    with Client(scheduler_file=address) as client:
        client.run(go)


def test_an_item_in_progress_begins_again_elsewhere_and_nothing_is_lost(tmp_path: Path) -> None:
    """The first worker takes an item that never ends there, and leaves; the other one comes then and does everything."""
    mark = tmp_path / "begun"
    tasks = [(number, str(mark)) for number in range(NUM_ITEMS)]
    begun: list[int] = []
    # Workers import the functions of this test.
    path = {"PYTHONPATH": os.pathsep.join([str(Path(pool_functions.__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    with contextlib.ExitStack() as second, daemons(tmp_path, **path, **{pool_functions.LEAVES: "1"}) as cluster:

        def started(task: tuple[int, str]) -> None:
            begun.append(task[0])
            if len(begun) == 1:
                wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
                leave(cluster.address)
                second.enter_context(worker_process(Path(cluster.address), **path))

        with factory.make_executor("processes", 1, Placement(dask=cluster.address)) as executor:
            outcomes = dict(executor.map(pool_functions.sleep_until_the_worker_leaves, tasks, started))
        wait_until(lambda: cluster.worker.poll() == 0)
        second.close()
    assert {task: outcome.get()[0] for task, outcome in outcomes.items()} == {task: task[0] for task in tasks}
    assert len({outcome.get()[1] for outcome in outcomes.values()}) == 1
    assert sorted(begun) == sorted([*range(NUM_ITEMS), begun[0]])
    (stopped,) = mark.read_text().split()
    wait_until(lambda: not is_running(int(stopped)))
