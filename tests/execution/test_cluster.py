"""Cases as tasks of a real Dask cluster: what is lost with a worker, and what is left behind."""

import os
import signal
import sys
import threading
from pathlib import Path

import pool_functions
import pytest
from cluster_helpers import add_worker, cluster_in_process, wait_until
from evaluation_helpers import is_running

import crfrefine
from crfrefine.errors import BackendUnavailableError, CapacityError, InputError
from crfrefine.execution import factory
from crfrefine.execution.cluster import run as cluster_run
from crfrefine.execution.placement import Placement

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # A worker that is restarted is away for a moment, for long on a busy machine.
    pytest.mark.filterwarnings("ignore:.* has no workers:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def address():
    with cluster_in_process() as cluster:
        yield cluster.scheduler_address


def make(address: str, **placement: object):
    return factory.make_executor("processes", 1, Placement(dask=address, **placement))


def test_every_item_has_its_result_from_another_process(address):
    begun: list[int] = []
    with make(address) as executor:
        outcomes = dict(executor.map(pool_functions.square, range(25), begun.append))
        assert executor.results(pool_functions.square_slowly_from_the_end, range(5)) == [number**2 for number in range(5)]
        assert list(executor.map(pool_functions.square, [])) == []
        processes = {outcome.get()[1] for outcome in outcomes.values()}
        assert os.getpid() not in processes
        assert 1 <= len(processes) <= 2
    assert {item: outcome.get()[0] for item, outcome in outcomes.items()} == {number: number**2 for number in range(25)}
    assert sorted(begun) == list(range(25))
    wait_until(lambda: not any(is_running(process) for process in processes))


def test_an_error_costs_its_item_alone(address):
    with make(address) as executor:
        outcomes = dict(executor.map(pool_functions.fail_at_two, range(4)))
    failed = outcomes.pop(2)
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {0: 0, 1: 1, 3: 3}
    assert failed.failure.kind == "ValueError"
    assert "in fail_at_two" in failed.failure.traceback


def test_an_item_whose_process_dies_once_is_tried_again_and_one_that_dies_twice_is_given_up(address, tmp_path):
    with make(address) as executor:
        assert [outcome.get() for _, outcome in executor.map(pool_functions.die_once, [str(tmp_path / "mark")])] == [1]
        outcomes = dict(executor.map(pool_functions.die_at_three, range(6)))
    lost = outcomes.pop(3)
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {number: number for number in (0, 1, 2, 4, 5)}
    assert lost.is_lost
    assert "SIGKILL" in lost.failure.message
    assert "tried 2 times, on tcp://127.0.0.1:" in lost.failure.message


def test_an_item_that_takes_its_worker_with_it_is_tried_once_more(address, tmp_path):
    with make(address) as executor:
        assert [outcome.get() for _, outcome in executor.map(pool_functions.kill_parent_once, [str(tmp_path / "mark")])] == [1]
        outcomes = dict(executor.map(pool_functions.kill_parent, range(4)))
    lost = outcomes.pop(1)
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {0: 0, 2: 2, 3: 3}
    assert lost.is_lost
    assert "its worker was lost 2 times, on tcp://127.0.0.1:" in lost.failure.message


def test_an_item_that_hangs_is_given_up(address):
    with make(address, case_timeout=1.0) as executor:
        outcomes = dict(executor.map(pool_functions.sleep, [0, 3600]))
    assert outcomes[0].get() == 0
    assert "took longer than the 1 s of --case-timeout" in outcomes[3600].failure.message


def test_a_worker_that_hangs_itself_is_given_up_and_restarted(address, monkeypatch):
    monkeypatch.setattr(cluster_run, "HUNG_SECONDS", 1.0)
    with make(address, case_timeout=1.0) as executor:
        outcomes = dict(executor.map(pool_functions.freeze_parent, range(4)))
    assert {item: outcome.get() for item, outcome in outcomes.items() if item != 1} == {0: 0, 2: 2, 3: 3}
    assert "hangs" in outcomes[1].failure.message


def test_whoever_stops_early_leaves_nothing_on_the_cluster(address, tmp_path):
    mark = tmp_path / "begun"
    with make(address) as executor:
        outcomes = executor.map(pool_functions.begin_and_sleep, [str(mark)] * 9, stop_after_two := StopAfter(2))
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
        assert stop_after_two.count == 2
    client = crfrefine_client(address)
    try:
        wait_until(lambda: not any(client.processing().values()))
    finally:
        client.close()
    processes = [int(line) for line in mark.read_text().split()] if mark.exists() else []
    assert len(processes) <= 2
    wait_until(lambda: not any(is_running(process) for process in processes))


class StopAfter:
    """Interrupts the run when so many items have begun, as Ctrl-C does."""

    def __init__(self, most: int) -> None:
        self.count, self._most = 0, most

    def __call__(self, item: object) -> None:
        self.count += 1
        if self.count == self._most:
            raise KeyboardInterrupt


def crfrefine_client(address: str):
    from distributed import Client

    return Client(address)


def test_a_process_has_the_folder_and_its_share_of_the_worker(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with make(address, threads=3) as executor:
        assert executor.results(pool_functions.where, [0]) == [(str(tmp_path), "3", None)]


def test_a_worker_with_another_version_is_refused_with_both_versions(address, monkeypatch):
    monkeypatch.setattr(crfrefine, "__version__", "9.8.7")
    with pytest.raises(InputError, match=r"worker tcp://127.0.0.1:\d+ has crfrefine \d.*, this command is crfrefine 9\.8\.7"):
        make(address)


def test_a_worker_that_comes_later_with_another_version_ends_the_run(address, monkeypatch):
    with make(address) as executor:
        monkeypatch.setattr(crfrefine, "__version__", "9.8.7")
        with pytest.raises(InputError, match=r"this command is crfrefine 9\.8\.7"):
            list(executor.map(pool_functions.square, [1]))


def test_an_item_gets_no_more_memory_than_its_worker_has():
    small = 1 << 29
    with cluster_in_process(1, small) as cluster, make(cluster.scheduler_address) as executor:
        assert executor.results(pool_functions.fill_memory, [1000]) == [1000]
        ((_, outcome),) = executor.map(pool_functions.fill_memory, [small])
        assert isinstance(outcome.error, CapacityError)
        assert "of the cluster's worker, and was stopped" in str(outcome.error)
        folder, _, memory = executor.results(pool_functions.where, [0])[0]
        assert 0 < int(memory) < small
        assert folder == str(Path.cwd())


def test_an_address_that_nobody_answers_is_said(monkeypatch):
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "0.5s"}), pytest.raises(InputError, match="nobody answers there"):
        make("tcp://127.0.0.1:1")
    with pytest.raises(InputError, match=r"expected tcp://HOST:PORT, tls://HOST:PORT, or an existing scheduler file"):
        make("no_such_file.json")
    with pytest.raises(InputError, match=r"Dask's configuration, distributed\.comm\.tls"):
        make("tls://127.0.0.1:1")


def test_without_distributed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    for name in [name for name in sys.modules if name.startswith("crfrefine.execution.cluster")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'crfrefine\[distributed\]'"):
        make("tcp://127.0.0.1:1")


def test_a_killed_worker_costs_nothing(address):
    with make(address) as executor:
        seen: list[int] = []
        for item, outcome in executor.map(pool_functions.square, range(30)):
            seen.append(item)
            if len(seen) == 3:
                client = crfrefine_client(address)
                victim = next(iter(client.run(os.getpid).values()))
                client.close()
                os.kill(victim, signal.SIGKILL)
            assert outcome.get()[0] == item**2
    assert sorted(seen) == list(range(30))


MIB = 1 << 20


def test_an_item_goes_to_a_worker_with_enough_memory_and_keeps_no_other_waiting():
    """Two workers of different limits: what the smaller one refuses is computed on the larger one, while the smaller one does the rest."""
    small, large, none = (need * MIB for need in (10, 1500, 5000))
    with cluster_in_process(1, 1000 * MIB) as cluster:
        add_worker(cluster, memory_limit=4000 * MIB)
        with make(cluster.scheduler_address) as executor:
            items = list(enumerate([small, *[large] * 9, small, small, small]))
            begun: list[tuple[int, int]] = []
            ended = list(executor.map(pool_functions.need_memory, items, begun.append))
            workers = {need: {outcome.get()[0] for (_, other), outcome in ended if other == need} for need in (small, large)}
            assert len(workers[large]) == 1
            assert workers[small] - workers[large], "the smaller worker did nothing"
            assert max(begun.count(item) for item in items) == 2
            assert ended[-1][0][1] == large, "the small items waited for the large ones"
            ((_, outcome),) = executor.map(pool_functions.need_memory, [(0, none)])
            assert isinstance(outcome.error, CapacityError)


def test_a_worker_without_a_limit_has_the_most_memory():
    with cluster_in_process(1, 1000 * MIB) as cluster:
        add_worker(cluster, memory_limit=0)
        with make(cluster.scheduler_address) as executor:
            assert len(executor.results(pool_functions.need_memory, [(number, 1 << 40) for number in range(4)])) == 4


def test_a_run_waits_for_workers_and_says_so():
    with cluster_in_process(0) as cluster, make(cluster.scheduler_address) as executor:
        threading.Timer(2.0, cluster.scale, [1]).start()
        with pytest.warns(RuntimeWarning, match="has no workers: waiting for them"):
            assert executor.results(pool_functions.repeat, [3]) == [b"xxx"]


def test_workers_that_would_share_a_gpu_are_refused_at_the_start_or_when_they_come():
    with cluster_in_process(1, CUDA_VISIBLE_DEVICES="0") as cluster:
        with make(cluster.scheduler_address, one_per_device=True) as executor:
            assert [outcome.get()[0] for _, outcome in executor.map(pool_functions.square, [2, 3])] == [4, 9]
            add_worker(cluster, env={"CUDA_VISIBLE_DEVICES": "1"})
            assert len(executor.results(pool_functions.sleep, [1] * 4)) == 4
            add_worker(cluster, env={"CUDA_VISIBLE_DEVICES": "0"})
            with pytest.raises(InputError, match=r"see the same GPUs, CUDA_VISIBLE_DEVICES=0"):
                executor.results(pool_functions.sleep, [1] * 8)
        with pytest.raises(InputError, match=r"see the same GPUs, CUDA_VISIBLE_DEVICES=0"):
            make(cluster.scheduler_address, one_per_device=True)
    with cluster_in_process(1, CUDA_VISIBLE_DEVICES="0") as cluster:
        add_worker(cluster, nthreads=2, env={"CUDA_VISIBLE_DEVICES": "1"})
        with pytest.raises(InputError, match=r"has 2 threads, which would share a GPU; start it with --nthreads 1"):
            make(cluster.scheduler_address, one_per_device=True)


def test_scheduler_and_worker_forget_what_a_run_told(address):
    """Events are kept under the name of the client, and outcomes nowhere."""
    with make(address) as executor:
        executor.results(pool_functions.repeat, [1 << 10, 1 << 16])
        client = executor._connection.client
        topics = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler._broker._topics))
        assert not any("crfrefine" in topic for topic in topics)
        wait_until(
            lambda: not client.run_on_scheduler(lambda dask_scheduler: [key for key in dask_scheduler.tasks if "crfrefine" in str(key)])
        )
        wait_until(lambda: not any(client.run(lambda dask_worker: list(dask_worker.data)).values()))
