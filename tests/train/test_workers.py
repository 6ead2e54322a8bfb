"""Who runs beside whom in a training, and with how many threads: pretended threads on two cores."""

import threading
import time
from concurrent.futures import CancelledError

import pytest
from training_helpers import Shares

from crfrefine.train.progress import ALL_CASES, Progress
from crfrefine.train.workers import Workers

SECONDS = 20  # after which a barrier gives up: everything here takes milliseconds


def meet(num_items):
    """Return an item's work that ends only when so many items run at the same time."""
    barrier = threading.Barrier(num_items)

    def work(item, threads):
        barrier.wait(SECONDS)
        return item, threads

    return work


@pytest.mark.parametrize(("threads", "num_items", "share"), [(8, 3, 2), (8, 8, 1), (3, 2, 1)])
def test_items_run_side_by_side_and_share_the_threads(threads, num_items, share):
    with Workers(threads) as workers:
        results = workers.run(meet(num_items), range(num_items))
    assert results == [(item, share) for item in range(num_items)]


def test_a_single_item_gets_all_threads():
    with Workers(5) as workers:
        assert workers.run(meet(1), ["item"]) == [("item", 5)]


def test_more_items_than_threads_get_one_thread_each_and_keep_their_order():
    def work(item, threads):
        time.sleep(0.002 * (7 - item))
        return item, threads

    with Workers(3) as workers:
        results = workers.run(work, range(7))
    assert [item for item, _ in results] == list(range(7))
    # The last two items begin when fewer than three are left.
    assert [threads for _, threads in results[:5]] == [1] * 5


def test_the_items_of_two_parts_run_side_by_side():
    with Workers(6) as workers:
        work = meet(4)
        results = workers.run_parts(lambda part: workers.run(work, [part, part]), "ab")
    assert [[item for item, _ in part] for part in results] == [["a", "a"], ["b", "b"]]
    for part in results:
        for _, threads in part:
            # Three each as long as the other part has not begun.
            assert threads in (1, 3)


def test_parts_of_parts_run_side_by_side():
    barrier = threading.Barrier(4)

    def leaf(name):
        barrier.wait(SECONDS)
        return name

    with Workers(4) as workers:

        def branch(name):
            return workers.run_parts(leaf, [name + "1", name + "2"])

        assert workers.run_parts(branch, "ab") == [["a1", "a2"], ["b1", "b2"]]


def test_no_more_items_run_at_a_time_than_memory_allows():
    running = []
    largest = []

    def work(item, threads):
        running.append(item)
        largest.append(len(running))
        time.sleep(0.01)
        running.remove(item)
        return threads

    with Workers(8) as workers:
        workers.limit(2)
        shares = workers.run(work, range(6))
    assert max(largest) == 2
    assert shares[0] == 4  # The threads are those of two items.


@pytest.mark.parametrize("threads", [1, 4])
def test_with_one_by_one_each_item_gets_all_threads_alone(threads):
    running = threading.Lock()

    def work(item, threads):
        assert running.acquire(blocking=False)
        time.sleep(0.002)
        running.release()
        return threads

    with Workers(threads, one_by_one=True) as workers:
        assert workers.run_on_device(work, range(3)) == [threads] * 3


def test_items_that_need_all_memory_run_alone_also_if_parts_run_side_by_side():
    running = threading.Lock()

    def work(item, threads):
        assert running.acquire(blocking=False)
        time.sleep(0.005)
        running.release()

    with Workers(3) as workers:
        workers.run_parts(lambda part: workers.run(work, part, one_by_one=True), ["ab", "cd"])


def test_the_error_of_a_part_ends_the_others_before_their_next_item():
    begun = threading.Event()
    items = []

    def work(item, threads):
        items.append(item)
        begun.set()

    def part(name):
        if name == "bad":
            begun.wait(SECONDS)
            raise ValueError("this part")
        while True:
            workers.run(work, [name])
            time.sleep(0.001)

    with Workers(2) as workers:
        with pytest.raises(ValueError, match="this part"):
            workers.run_parts(part, ["good", "bad"])
        num_items = len(items)
        with pytest.raises(CancelledError):
            workers.run(work, ["late"])
    assert len(items) == num_items


def test_the_error_of_an_item_is_that_of_its_part():
    def work(item, threads):
        if item == "b":
            raise ValueError(f"no {item}")
        time.sleep(0.01)

    with Workers(3) as workers, pytest.raises(ValueError, match="no b"):
        workers.run_parts(lambda part: workers.run(work, part), ["aa", "ab", "aa"])


@pytest.mark.parametrize("num_side_by_side", [1, 2])
@pytest.mark.parametrize("steps_of_folds", [(64, 56, 60, 104, 72), (36, 41, 40, 36, 44)])
def test_the_time_that_is_left_is_about_right(steps_of_folds, num_side_by_side):
    """From the first tenth on it is at most half as long again, or two thirds, of the truth.

    The seconds are those of a training on 80 hippocampi with one core, in which starts ended early
    as here, or earlier. Folds side by side share the cores.
    """
    observer = Shares()
    seconds = 0.0
    progress = Progress(observer, len(steps_of_folds), 40, 80, clock=lambda: seconds)
    moments = []

    def work(duration, tell, *told):
        nonlocal seconds
        seconds += duration
        tell(*told)
        moments.append(seconds)

    progress.stage_started("reading")
    seconds = 5.5
    progress.stage_started("trying 16 starts")
    for _ in range(16):
        work(0.63, progress.start_tried, 1 / 16)
    left = dict(enumerate(steps_of_folds))
    while left:
        for fold in list(left)[:num_side_by_side]:
            progress.stage_started(f"fold {fold}")
            work(1.05, progress.stepped, f"fold {fold}", "start", "state")
            left[fold] -= 1
            if not left[fold]:
                work(1.3, progress.fold_trained, f"fold {fold}")
                del left[fold]
    for _ in range(80):
        work(0.35, progress.case_measured)
    for fold in range(len(steps_of_folds)):
        progress.training_ended(f"fold {fold}", "done")
    seconds += 6.0
    for _ in range(12):
        work(1.4, progress.stepped, ALL_CASES, "mean", "state")
    progress.training_ended(ALL_CASES, "done")

    assert observer.shares[-1] == pytest.approx(1.0)
    for moment, share in zip(moments, observer.shares, strict=False):
        if 0.1 * seconds < moment < 0.9 * seconds:
            shown = moment * (1.0 - share) / share
            assert shown / (seconds - moment) == pytest.approx(1.0, abs=0.5), moment
            assert (seconds - moment) / shown == pytest.approx(1.0, abs=0.5), moment
