"""Items are taken in their order, however many are read at once; how many that is depends on who waits, and on memory."""

import threading

import pytest

from crfrefine.runs.execution.read_ahead import ReadAhead

PATIENCE = 30.0


class Reading:
    """What is being read: each item is finished when the test says so, and is its number times ten."""

    def __init__(self, num_items, **options):
        self.begun = [threading.Event() for _ in range(num_items)]
        self.admitted = [threading.Event() for _ in range(num_items)]
        self.may_end = [threading.Event() for _ in range(num_items)]
        self.read_ones = []
        self.stop = threading.Event()
        self.sizes = options.pop("sizes", [0] * num_items)
        self.ahead = ReadAhead(range(num_items), self.read, self.stop, **options)
        self.ahead.start()

    def read(self, item, admit):
        self.begun[item].set()
        admit(self.sizes[item])
        self.admitted[item].set()
        assert self.may_end[item].wait(PATIENCE)
        self.read_ones.append(item)
        return 10 * item

    def end(self, *items):
        for item in items:
            self.may_end[item].set()

    def take(self, before=lambda: None):
        return self.ahead.take(before)

    def take_elsewhere(self):
        """Take the next item in another thread, and return that once somebody reads the item after it, too."""
        taking = threading.Thread(target=self.take)
        taking.start()
        assert self.begun[2].wait(PATIENCE)
        return taking


@pytest.fixture
def begin():
    """Make a `Reading`, none of whose threads is left waiting where a test fails."""
    made = []
    yield lambda *arguments, **options: made.append(Reading(*arguments, **options)) or made[-1]
    for reading in made:
        reading.ahead.close(waits=False)
        reading.end(*range(len(reading.may_end)))


def test_whoever_waits_gets_another_reader_and_the_order_stays(begin):
    reading = begin(5, most_readers=2, most_bytes=100)
    reading.end(0)
    assert reading.take() == 0
    taken = []
    taking = threading.Thread(target=lambda: taken.extend(reading.take() for _ in range(4)))
    taking.start()
    assert reading.begun[2].wait(PATIENCE), "the second reader begins when the first is waited for"
    assert not reading.begun[3].is_set(), "no third one"
    reading.end(2)
    assert reading.begun[1].is_set()
    assert not taken, "the item that was read first is not the next one"
    reading.end(1, 3, 4)
    taking.join(PATIENCE)
    assert taken == [10, 20, 30, 40]


def test_an_item_that_is_too_large_waits_until_it_is_the_next(begin):
    """Of 30 and 80 bytes only one fits into 100 at a time; 20 more fit beside the first, but the other begins before."""
    reading = begin(4, most_readers=3, most_bytes=100, sizes=[10, 30, 80, 200])
    reading.end(0)
    assert reading.take() == 0
    taking = reading.take_elsewhere()
    assert not reading.admitted[2].wait(0.05)
    reading.end(1, 2, 3)
    taking.join(PATIENCE)
    assert reading.admitted[2].wait(PATIENCE)
    assert [reading.take(), reading.take(), reading.take()] == [20, 30, None], "the last is larger than all of the room"


def test_an_item_whose_size_is_not_known_yet_keeps_those_after_it_waiting():
    """Otherwise both would be in memory once it is known, and it is the next, which never waits."""
    knows, admitted = threading.Event(), threading.Event()

    def read(item, admit):
        if item == 1:
            assert knows.wait(PATIENCE)
        admit(60)
        if item == 2:
            admitted.set()
        return item

    ahead = ReadAhead(range(3), read, threading.Event(), most_readers=2, most_bytes=100)
    ahead.start()
    assert ahead.take(lambda: None) == 0
    taking = threading.Thread(target=lambda: ahead.take(lambda: None))
    taking.start()
    assert not admitted.wait(0.05)
    knows.set()
    taking.join(PATIENCE)
    assert admitted.wait(PATIENCE)
    assert ahead.take(lambda: None) == 2


@pytest.mark.parametrize("waits", [False, True])
def test_closing_begins_nothing_and_waits_for_whoever_still_reads_if_asked(begin, waits):
    """It may have to record a damaged file. Whoever waits for room reads nothing any more."""
    reading = begin(4, most_readers=3, most_bytes=50, sizes=[0, 40, 40, 0])
    reading.end(0)
    assert reading.take() == 0
    taking = reading.take_elsewhere()
    assert reading.admitted[1].wait(PATIENCE)
    ending = threading.Timer(0.05, lambda: reading.end(1, 2, 3))
    ending.start()
    reading.ahead.close(waits=waits)
    assert reading.may_end[1].is_set() == waits
    ending.join()
    taking.join(PATIENCE)
    assert not reading.admitted[2].is_set()
    assert not reading.begun[3].is_set()


def test_an_error_is_raised_when_its_item_is_the_next():
    def read(item, admit):
        return 1 // (1 - item)

    ahead = ReadAhead(range(3), read, threading.Event())
    ahead.start()
    assert ahead.take(lambda: None) == 1
    with pytest.raises(ZeroDivisionError):
        ahead.take(lambda: None)
    assert ahead.take(lambda: None) == -1
