"""A process per device; with real cases in `tests/cli/test_gpus.py`."""

from __future__ import annotations

from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

import pool_functions
import pytest

from crfrefine.execution import devices
from crfrefine.execution.devices import DeviceProcesses


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
    processes = DeviceProcesses(("one",))
    outcomes = dict(processes.map(attrgetter("item"), range(4), lambda item: None, is_lost=lambda result: result in (0, 2)))
    assert {item: outcome.get() for item, outcome in outcomes.items()} == {item: item for item in range(4)}
