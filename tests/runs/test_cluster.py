"""Cases as tasks of a Dask cluster: what is lost with a worker, what is left behind. The promises of all executors: test_executors.py."""

import contextlib
import functools
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import dask
import pool_functions
import pytest
from cluster_helpers import add_worker, cluster_in_process, daemons, wait_until, worker_process
from distributed import Client
from evaluation_helpers import is_running

from crfrefine.errors import BackendUnavailableError, CapacityError, InputError
from crfrefine.runs.execution import factory
from crfrefine.runs.execution.cluster import connection as cluster_connection
from crfrefine.runs.execution.cluster import run as cluster_run
from crfrefine.runs.execution.cluster.on_worker import Description
from crfrefine.runs.execution.executor import Placement

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # A worker that is restarted is away for a moment, for long on a busy machine.
    pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning"),
]
MIB = 1 << 20


def make(address, **placement):
    return factory.make_executor(1, Placement(dask=address, **placement))


def test_an_item_whose_process_dies_once_is_tried_again(address, tmp_path):
    with make(address) as executor:
        assert [outcome.get() for _, outcome in executor.map(pool_functions.die_once, [str(tmp_path / "mark")])] == [1]


def test_an_item_that_takes_its_worker_with_it_is_tried_once_more(address):
    with make(address) as executor:
        outcomes = dict(executor.map(pool_functions.kill_parent, range(4)))
    lost = outcomes.pop(1)
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {0: 0, 2: 2, 3: 3}
    assert lost.is_lost
    assert "its worker was lost 2 times, on tcp://127.0.0.1:" in lost.failure.message


def test_a_worker_that_hangs_itself_is_given_up_and_restarted(monkeypatch):
    monkeypatch.setattr(cluster_run, "HUNG_SECONDS", 1.0)
    with cluster_in_process() as cluster, make(cluster.scheduler_address, case_timeout=1.0) as executor:
        outcomes = dict(executor.map(pool_functions.freeze_parent, range(4)))
    assert {item: outcome.get() for item, outcome in outcomes.items() if item != 1} == {0: 0, 2: 2, 3: 3}
    assert "hangs" in outcomes[1].failure.message


def test_a_killed_worker_costs_nothing(address):
    with make(address) as executor:
        seen = []
        for item, outcome in executor.map(pool_functions.square, range(30)):
            seen.append(item)
            if len(seen) == 3:
                with Client(address) as client:
                    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
            assert outcome.get()[0] == item**2
    assert sorted(seen) == list(range(30))


def test_whoever_stops_early_leaves_nothing_on_the_cluster(address, tmp_path):
    mark = tmp_path / "begun"
    begun = []

    def stop_after_two(item):
        begun.append(item)
        if len(begun) == 2:
            raise KeyboardInterrupt

    with make(address) as executor, pytest.raises(KeyboardInterrupt):
        next(executor.map(pool_functions.begin_and_sleep, [str(mark)] * 9, stop_after_two))
    assert len(begun) == 2
    with Client(address) as client:
        wait_until(lambda: not any(client.processing().values()))
    processes = [int(line) for line in mark.read_text().split()] if mark.exists() else []
    assert len(processes) <= 2
    wait_until(lambda: not any(is_running(process) for process in processes))


def test_a_process_has_the_folder_and_its_share_of_the_worker(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with make(address, threads=3) as executor:
        assert pool_functions.results(executor, pool_functions.where, [0]) == [(str(tmp_path), "3", None)]


def test_a_worker_with_another_version_is_refused_at_the_start_or_when_it_comes(address, monkeypatch):
    message = r"worker tcp://127.0.0.1:\d+ has crfrefine \d.*, this command is crfrefine 9\.8\.7"
    with make(address) as executor:
        for module in (cluster_run, cluster_connection):
            monkeypatch.setattr(module, "crfrefine", SimpleNamespace(__version__="9.8.7"))
        with pytest.raises(InputError, match=message):
            list(executor.map(pool_functions.square, [1]))
    with pytest.raises(InputError, match=message):
        make(address)


def test_workers_that_would_share_a_gpu_are_refused():
    a, b = Description("host", "0", 4, 1), Description("host", "1", 4, 1)
    cluster_connection.check_devices({"x": a, "y": b, "z": Description("other", "0", 4, 1)})
    with pytest.raises(InputError, match=r"workers x and z on host see the same GPUs, CUDA_VISIBLE_DEVICES=0\n"):
        cluster_connection.check_devices({"x": a, "y": b, "z": a})
    with pytest.raises(InputError, match=r"worker x has 2 threads, which would share a GPU; start it with --nthreads 1"):
        cluster_connection.check_devices({"x": Description("host", "0", 4, 2)})
    assert (Description("host", None, 7, 2).share, Description("host", None, 1, 2).share) == (3, 1)
    with pytest.raises(InputError, match="--workers 2 with a GPU: its cases would share the GPU"):
        factory.make_executor(1, Placement(workers=2, one_per_device=True))


def test_an_item_gets_the_memory_of_its_worker_and_goes_to_one_with_enough():
    """What the smaller worker refuses is computed on the larger one, while it does the rest. In the end comes one without a limit."""
    small, large, none = (need * MIB for need in (10, 1500, 5000))
    with cluster_in_process(1, 512 * MIB) as cluster, make(cluster.scheduler_address) as executor:
        assert pool_functions.results(executor, pool_functions.fill_memory, [1000]) == [1000]
        ((_, outcome),) = executor.map(pool_functions.fill_memory, [512 * MIB])
        assert isinstance(outcome.error, CapacityError)
        assert "of the cluster's worker, and was stopped" in str(outcome.error)
        folder, _, memory = pool_functions.results(executor, pool_functions.where, [0])[0]
        assert 0 < int(memory) < 512 * MIB
        assert folder == str(Path.cwd())
        add_worker(cluster, memory_limit=4000 * MIB)
        items = list(enumerate([small, *[large] * 6, small, small, small]))
        begun = []
        ended = list(executor.map(pool_functions.need_memory, items, begun.append))
        workers = {need: {outcome.get()[0] for (_, other), outcome in ended if other == need} for need in (small, large)}
        assert len(workers[large]) == 1
        assert workers[small] - workers[large], "the smaller worker did nothing"
        assert max(begun.count(item) for item in items) == 2
        assert ended[-1][0][1] == large, "the small items waited for the large ones"
        ((_, outcome),) = executor.map(pool_functions.need_memory, [(0, none)])
        assert isinstance(outcome.error, CapacityError)
        add_worker(cluster, memory_limit=0)
        assert len(pool_functions.results(executor, pool_functions.need_memory, [(number, none) for number in range(2)])) == 2


def test_an_address_that_nobody_answers_is_said():
    with dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}), pytest.raises(InputError, match="nobody answers there"):
        make("tcp://127.0.0.1:1")
    with pytest.raises(InputError, match=r"expected tcp://HOST:PORT, tls://HOST:PORT, or an existing scheduler file"):
        make("no_such_file.json")
    with pytest.raises(InputError, match=r"Dask's configuration, distributed\.comm\.tls"):
        make("tls://127.0.0.1:1")


def test_without_distributed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    for name in [name for name in sys.modules if name.startswith("crfrefine.runs.execution.cluster")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'crfrefine\[distributed\]'"):
        make("tcp://127.0.0.1:1")


def test_a_run_waits_for_workers_the_cluster_forgets_what_it_told_and_a_scheduler_that_is_gone_ends_it():
    """Events are kept under the name of the client, and outcomes nowhere."""
    short = dask.config.set({"distributed.comm.timeouts.connect": "3s"})  # a client tries for so long to reach a scheduler that is gone
    with short, cluster_in_process(0) as cluster, make(cluster.scheduler_address) as executor:
        threading.Timer(1.0, cluster.scale, [1]).start()
        with pytest.warns(RuntimeWarning, match="has no workers: waiting for them"):
            assert pool_functions.results(executor, pool_functions.repeat, [3, 1 << 16]) == [b"xxx", b"x" * (1 << 16)]
        scheduler, client = cluster.scheduler, executor._connection.client
        assert not any("crfrefine" in topic for topic in scheduler._broker._topics)
        wait_until(lambda: not [key for key in scheduler.tasks if "crfrefine" in str(key)])
        wait_until(lambda: not any(client.run(lambda dask_worker: list(dask_worker.data)).values()))
        outcomes = executor.map(pool_functions.sleep, [0, 3600])
        assert next(outcomes)[0] == 0
        cluster.close()
        with pytest.raises(InputError, match=r"is gone, or was restarted\n  What is finished is kept; run again with --continue"):
            next(outcomes)


def test_an_item_in_progress_on_a_worker_that_leaves_begins_again_elsewhere(tmp_path):
    """As `--lifetime` does when the time is up. The first worker has an item that never ends there; the other one comes then."""

    def leave(address):
        def go(dask_worker):
            # For the thread of the item, which does not end, it waits half a minute else.
            dask_worker.close = functools.partial(dask_worker.close, timeout=1)
            dask_worker.loop.add_callback(dask_worker.close_gracefully, reason="worker-lifetime-reached")

        with Client(scheduler_file=address) as client:
            client.run(go)

    mark = tmp_path / "begun"
    tasks = [(number, str(mark)) for number in range(5)]
    begun = []
    # Workers import the functions of this test.
    path = {"PYTHONPATH": os.pathsep.join([str(Path(pool_functions.__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    with contextlib.ExitStack() as second, daemons(tmp_path, **path, **{pool_functions.LEAVES: "1"}) as cluster:

        def started(task):
            begun.append(task[0])
            if len(begun) == 1:
                wait_until(lambda: mark.exists() and mark.read_text().endswith("\n"))
                leave(cluster.address)
                second.enter_context(worker_process(Path(cluster.address), **path))

        with make(cluster.address) as executor:
            outcomes = dict(executor.map(pool_functions.sleep_until_the_worker_leaves, tasks, started))
        wait_until(lambda: cluster.worker.poll() == 0)
        second.close()
    assert {task: outcome.get()[0] for task, outcome in outcomes.items()} == {task: task[0] for task in tasks}
    assert len({outcome.get()[1] for outcome in outcomes.values()}) == 1
    assert sorted(begun) == sorted([*range(5), begun[0]])
    (stopped,) = mark.read_text().split()
    wait_until(lambda: not is_running(int(stopped)))
