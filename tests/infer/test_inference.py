"""The folder run: order, overlap, memory and the account of each case; the command's view of it is
in test_cli_infer.py.
"""

import threading
import time
import weakref
from unittest.mock import Mock, call

import pytest
from cli_helpers import write_folders

import crfrefine.cases.case
from crfrefine.base.observer import Observer
from crfrefine.infer.inputs import find_inputs
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.run import run_inference
from crfrefine.parameters.model import CrfParameters


def options_for(folders, **changes):
    quick = CrfParameters().replace(
        **{"mean_field.num_iterations": 1, "mean_field.filter": "truncated"}
    )
    return InferenceOptions(
        (folders.images,), (folders.logits,), folders.output, **{"parameters": quick, **changes}
    )


def recorder():
    """An observer that checks that it is told one thing at a time."""
    busy = threading.Lock()
    observer = Mock(spec=Observer)

    def told(*_, **__):
        assert busy.acquire(blocking=False), "two calls at the same time"
        time.sleep(0.005)  # long enough for another thread to come in, if it may
        busy.release()

    for name in ("run_started", "stage_changed", "note", "case_ended", "run_ended"):
        getattr(observer, name).side_effect = told
    return observer


def test_observer_is_told_everything_in_order(tmp_path):
    folders = write_folders(tmp_path, "a", "b", "c")
    (folders.logits / "b.nii.gz").write_bytes(b"")
    observer = recorder()
    summary = run_inference(options_for(folders), observer)
    calls = observer.mock_calls
    records = summary.cases
    assert calls[:2] == [call.cases_found(""), call.run_started(summary)]
    assert calls[-1] == call.run_ended(summary)
    staged = [made.args[0] for made in observer.stage_changed.mock_calls]
    assert list(dict.fromkeys(filter(None, staged))) == ["a", "c"]
    assert observer.case_ended.mock_calls == list(map(call, records))
    assert "a" in {made.kwargs["case_id"] for made in observer.note.mock_calls}
    states = [(record.case_id, record.status) for record in records]
    assert states == [("a", "done"), ("b", "failed"), ("c", "done")]


def test_parameters_without_any_weight_are_told_of_once(tmp_path):
    """As a training leaves them that found no CRF better than the network: a weight for one label,
    or a volume term, is a CRF.
    """
    folders = write_folders(tmp_path, "a", "b")
    none = CrfParameters().replace(**{"bilateral.weight": 0.0, "spatial.weight": 0.0})
    for key, value in (
        ("mean_field.bias", 0.5),
        ("spatial.weight", (0.0, 1.0)),
        ("volume.weight", 0.5),
        ("bilateral.weight", (0.0, 2.0)),
    ):
        options = options_for(folders, parameters=none.replace(**{key: value}))
        notes = find_inputs(options).cases.notes
        assert sum("all weights of the parameters are 0" in str(note) for note in notes) == (
            key == "mean_field.bias"
        )


def test_a_case_is_read_once_and_at_most_one_more_is_in_memory(tmp_path, monkeypatch):
    """Reading of the second case waits for a step of the first one: a run that reads before it
    computes would wait in vain. Headers of two cases may be read side by side, in any order.
    """
    folders = write_folders(tmp_path, *"abcdef")
    arrays = []
    most_alive = 0
    started = []
    ahead = []
    headers = []
    computing = threading.Event()
    read_case = crfrefine.cases.case.read_case
    read_case_headers = crfrefine.cases.case.read_case_headers

    def counting_read_case(of, *arguments, **named):
        nonlocal most_alive
        assert of.files.case_id == "a" or computing.wait(timeout=30), (
            "nothing was computed meanwhile"
        )
        ahead.append("abcdef".index(of.files.case_id) - len(started))
        case = read_case(of, *arguments, **named)
        arrays.append((weakref.ref(case.logits.base), weakref.ref(case.image.base)))
        num_alive = 0
        for logits, image in arrays:
            num_alive += logits() is not None or image() is not None
        most_alive = max(most_alive, num_alive)
        return case

    def counting_headers(files, *arguments):
        headers.append(files.case_id)
        return read_case_headers(files, *arguments)

    class Started(Observer):
        def stage_changed(self, case_id, *_):
            if case_id and case_id not in started:
                started.append(case_id)
                computing.set()

    monkeypatch.setattr(crfrefine.infer.case_work, "read_case", counting_read_case)
    monkeypatch.setattr(crfrefine.infer.case_work, "read_case_headers", counting_headers)
    assert run_inference(options_for(folders, threads=1), Started()).count("done") == 6
    assert (most_alive <= 2, max(ahead) <= 1) == (True, True)
    assert sorted(headers) == list("abcdef")


def test_an_interrupt_ends_the_run_with_the_cases_so_far(tmp_path):
    """It comes while the second case is computed and the third one is read; no unfinished file is
    left.
    """
    folders = write_folders(tmp_path, *"abc")

    def interrupt(case_id, *_):
        if case_id == "b":
            raise KeyboardInterrupt

    observer = recorder()
    observer.stage_changed.side_effect = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_inference(options_for(folders), observer)
    name, (summary,), _ = observer.mock_calls[-1]
    assert (name, [(case.case_id, case.status) for case in summary.cases]) == (
        "run_ended",
        [("a", "done")],
    )
    assert [path.name for path in folders.output.iterdir() if path.is_file()] == ["a.nii.gz"]
