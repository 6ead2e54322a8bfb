"""What the process of a GPU does: it reads the case that it will probably get next while it works on another one."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from cli_helpers import write_folders

from crfrefine.engines.cuda import current_gpu
from crfrefine.errors import CapacityError, DeviceLostError
from crfrefine.execution.devices import Placed
from crfrefine.failures import describe_failure
from crfrefine.infer import device_work
from crfrefine.infer.device_work import DeviceWork, is_device_lost
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.plan import plan_run
from crfrefine.infer.records import CaseRecord
from crfrefine.parameters.model import CrfParameters


def test_the_next_case_is_read_while_one_is_refined(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is refined once the next one is read; one that went to another process in the end is dropped."""
    monkeypatch.setattr(current_gpu, "_is_own_process", False)
    folders = write_folders(tmp_path, "a", "b", "c", "d")
    quick = CrfParameters().replace(**{"mean_field.num_iterations": 1, "mean_field.filter": "truncated"})
    plan = plan_run(InferenceOptions((folders.images,), (folders.logits,), folders.output, parameters=quick, device="cpu"))
    a, b, c, d = plan.tasks
    is_read = {task.case_id: threading.Event() for task in plan.tasks}
    notes: list[str] = []
    inner_load, inner_refine = device_work.load, device_work.refine_case

    def load(settings: Any, task: Any, record: Any) -> Any:
        found = inner_load(settings, task, record)
        notes.append(f"read {task.case_id}")
        is_read[task.case_id].set()
        return found

    def refine(settings: Any, case: Any, record: Any) -> Any:
        after = {"a": "b", "b": "c"}.get(record.case_id)
        assert after is None or is_read[after].wait(60)
        notes.append(f"refine {record.case_id}")
        return inner_refine(settings, case, record)

    monkeypatch.setattr(device_work, "load", load)
    monkeypatch.setattr(device_work, "refine_case", refine)
    work = DeviceWork(plan.settings)
    for task, ahead in ((a, b), (b, c), (d, None)):
        record = work(Placed("cpu", task, ahead))
        assert record is not None
        assert (record.status, record.device) == ("done", "cpu")
    assert notes == ["read a", "read b", "refine a", "read c", "refine b", "read d", "refine d"]


def test_a_lost_device_is_told_from_other_failures() -> None:
    for error, expected in ((DeviceLostError("gone"), True), (CapacityError("full"), False)):
        record = CaseRecord("a")
        record.fail(describe_failure(error))
        assert is_device_lost(record) == expected
    assert not is_device_lost(CaseRecord("a"))
    assert not is_device_lost(None)
