"""A process per device; with real cases in `tests/cli/test_gpus.py`."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

import pool_functions
import pytest
from evaluation_helpers import children

from crfrefine.errors import BackendUnavailableError
from crfrefine.execution import devices
from crfrefine.execution.devices import DeviceProcesses
from crfrefine.execution.process import Limits


def run(processes: DeviceProcesses, function: Any, items: Any, lost: Any = ()) -> tuple[dict[Any, Any], list[Any]]:
    """What became of each item, a result or the text of its error; and the items that have begun."""
    begun: list[Any] = []
    outcomes = dict(processes.map(function, items, begun.append, is_lost=lambda result: result in lost))
    return {item: str(outcome.error or outcome.get()) for item, outcome in outcomes.items()}, begun


def test_an_item_that_ends_with_the_one_that_stops_has_its_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both devices are heard at the same moment; no other item begins."""

    def all_of_them(connections: list[Connection], timeout: float | None = None) -> list[Connection]:
        for connection in connections:
            assert connection.poll(60)
        return connections

    monkeypatch.setattr(devices, "wait", all_of_them)
    begun: list[int] = []
    processes = DeviceProcesses(("one", "two"))
    options: dict[str, Any] = {"is_lost": lambda result: False, "stops": lambda outcome: outcome.error is not None}
    outcomes = dict(processes.map(pool_functions.fail_at_zero_on_a_device, range(9), begun.append, **options))
    assert sorted(outcomes) == sorted(begun) == [0, 2], "1 is what the first device reads ahead"
    assert str(outcomes[0].error) == "no 0"
    assert outcomes[2].get() == 2


def test_losses_that_are_not_in_a_row_do_not_cost_the_device() -> None:
    found, begun = run(DeviceProcesses(("one",)), attrgetter("item"), range(4), lost=(0, 2))
    assert found == {item: str(item) for item in range(4)}
    assert begun == [0, 1, 2, 3]


def test_a_device_that_is_lost_twice_in_a_row_gets_no_more_items() -> None:
    """Without another one the rest fails, and says how to go on."""
    notes: list[str] = []
    found, begun = run(DeviceProcesses(("one",), note=notes.append), attrgetter("item"), range(4), lost=(1, 2))
    assert begun == [0, 1, 2]
    assert notes == ["one gets no more cases: it was lost on 2 cases in a row"]
    rest = "not begun, as no GPU is left (one: it was lost on 2 cases in a row); once they work, run again with --continue"
    assert found == {0: "0", 1: "1", 2: "2", 3: rest}


def test_the_fallback_begins_with_the_first_loss() -> None:
    notes: list[str] = []
    processes = DeviceProcesses(("one",), fallback="cpu", fallback_note="on the CPU now", note=notes.append)
    found, _ = run(processes, attrgetter("device"), range(3), lost=("one",))
    assert found == {0: "one", 1: "cpu", 2: "cpu"}
    assert notes == ["one gets no more cases: it was lost", "on the CPU now"]


def test_a_device_that_cannot_be_opened_ends_the_run_at_the_start() -> None:
    with pytest.raises(BackendUnavailableError, match="--device two: the device cannot be opened: no two; use another one, or cpu"):
        run(DeviceProcesses(("one", "two")), pool_functions.refuse_two, range(4))


def test_whoever_stops_early_leaves_no_process_behind() -> None:
    before = set(children(os.getpid()))
    outcomes = DeviceProcesses(("one", "two")).map(
        pool_functions.die_or_hang_on_a_device, ["end", "hang"], lambda item: None, is_lost=lambda result: False
    )
    assert next(outcomes)[0] == "end"
    assert set(children(os.getpid())) - before
    outcomes.close()
    assert set(children(os.getpid())) == before


def test_a_killed_process_costs_its_item_and_one_that_hangs_too() -> None:
    """The device is opened again, for the other items."""
    processes = DeviceProcesses(("one",), Limits(seconds=1.0))
    found, begun = run(processes, pool_functions.die_or_hang_on_a_device, ["die", "hang", "end"])
    assert begun == ["die", "hang", "end"]
    assert "its process was ended by SIGKILL" in found["die"]
    assert "try fewer GPUs" in found["die"]
    assert "took longer than the 1 s of --case-timeout" in found["hang"]
    assert found["end"] == "end"
