"""The three stages: what is dropped on the way, what stops them, and what is finished all the same."""

import threading

import pytest

from crfrefine.base.failures import Failure
from crfrefine.runs.infer.records import CaseRecord
from crfrefine.runs.infer.run import pipeline


def run(items, read=lambda item: item, compute=lambda item: item, stop=None, write=None):
    written = []
    pipeline(
        items,
        lambda item, admit: read(item),
        compute,
        written.append if write is None else lambda item: written.append(write(item)),
        stop=stop or threading.Event(),
        waiting=lambda stage: None,
    )
    return written


def test_a_stage_that_returns_none_has_done_with_its_item():
    assert run(range(9), lambda item: item if item % 2 else None, lambda item: None if item == 5 else 10 * item) == [10, 30, 70]
    assert run([]) == []
    assert run(range(3), read=lambda item: None) == []


@pytest.mark.parametrize("is_dropped", [True, False])
def test_what_is_computed_is_written_when_it_stops_and_no_further_item_is_begun(is_dropped):
    stop, is_reading = threading.Event(), threading.Event()
    read, computed = [], []

    def read_until_stopped(item):
        read.append(item)
        if item == 2:
            is_reading.set()
            assert stop.wait(timeout=30)
        return None if item == 2 and is_dropped else item

    def compute(item):
        computed.append(item)
        if item == 1:
            assert is_reading.wait(timeout=30)
            stop.set()
        return item

    assert run(range(9), read_until_stopped, compute, stop) == [0, 1]
    assert computed == [0, 1]
    assert read == [0, 1, 2]


def test_an_interrupt_waits_for_what_is_being_written():
    is_writing, is_interrupted, is_written = (threading.Event() for _ in range(3))

    def compute(item):
        if item == 1:
            assert is_writing.wait(timeout=30)
            is_interrupted.set()
            raise KeyboardInterrupt
        return item

    def write(item):
        is_writing.set()
        assert is_interrupted.wait(timeout=30)
        is_interrupted.wait(0.05)
        is_written.set()

    with pytest.raises(KeyboardInterrupt):
        run(range(9), compute=compute, write=write)
    assert is_written.is_set()


def test_what_goes_wrong_with_the_last_item_is_raised():
    def write(item):
        if item == 2:
            raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        run(range(3), write=write)


def test_a_record_in_json_begins_with_the_case_and_ends_with_its_error():
    record = CaseRecord("a", "done", {"read": 1.0, "refine": 2.0, "refine.lattice": 1.5}, ["assumed"])
    assert record.seconds == 3.0
    names = list(record.to_dict())
    assert (names[:2], names[-5:]) == (["case_id", "status"], ["times", "notes", "error", "error_kind", "error_traceback"])
    assert record.to_dict()["error"] is None
    record.fail(Failure("a.nii: cut off", "InputError"))
    record.fail(Failure("of what followed", "InputError"))
    content = record.to_dict()
    assert (content["status"], content["error"], content["error_kind"]) == ("failed", "a.nii: cut off", "InputError")
