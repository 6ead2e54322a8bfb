"""A process per device."""

from operator import attrgetter

import pool_functions
import pytest

from crfrefine.errors import BackendUnavailableError
from crfrefine.runs.execution.devices import DeviceProcesses
from crfrefine.runs.execution.process import Limits


def run(processes, function, items, lost=()):
    """What became of each item, a result or the text of its error; and the items that have begun."""
    begun = []
    outcomes = dict(processes.map(function, items, begun.append, is_lost=lambda result: result in lost))
    return {item: str(outcome.error or outcome.get()) for item, outcome in outcomes.items()}, begun


def test_a_device_that_is_lost_twice_in_a_row_gets_no_more_items():
    notes = []
    found, begun = run(DeviceProcesses(("one",), note=notes.append), attrgetter("item"), range(6), lost=(0, 2, 3))
    assert begun == [0, 1, 2, 3]
    assert notes == ["one gets no more cases: it was lost on 2 cases in a row"]
    rest = "not begun, as no GPU is left (one: it was lost on 2 cases in a row); once they work, run again with --continue"
    assert found == {**{item: str(item) for item in range(4)}, 4: rest, 5: rest}


def test_the_fallback_begins_with_the_first_loss():
    notes = []
    processes = DeviceProcesses(("one",), fallback="cpu", fallback_note="on the CPU now", note=notes.append)
    found, _ = run(processes, attrgetter("device"), range(3), lost=("one",))
    assert found == {0: "one", 1: "cpu", 2: "cpu"}
    assert notes == ["one gets no more cases: it was lost", "on the CPU now"]


def test_a_device_that_cannot_be_opened_ends_the_run_at_the_start():
    with pytest.raises(BackendUnavailableError, match="--device two: the device cannot be opened: no two; use another one, or cpu"):
        run(DeviceProcesses(("one", "two")), pool_functions.refuse_two, range(4))


def test_a_killed_process_costs_its_item_and_one_that_hangs_too():
    processes = DeviceProcesses(("one",), Limits(seconds=1.0))
    found, begun = run(processes, pool_functions.die_or_hang_on_a_device, ["die", "hang", "end"])
    assert begun == ["die", "hang", "end"]
    assert "its process was ended by SIGKILL" in found["die"]
    assert "try fewer GPUs" in found["die"]
    assert "took longer than the 1 s of --case-timeout" in found["hang"]
    assert found["end"] == "end"
