"""Cases in flight: who runs beside whom, and that nothing differs from one case at a time."""

import json
import re
import threading
import time
from types import SimpleNamespace

import cuda_shim
import numpy as np
import pytest
from cli_helpers import (
    RECORD_FOLDER,
    errors,
    files_in,
    infer,
    load_nifti,
    save_nifti,
    statuses,
    wait_for,
    write_folders,
)
from strict_device import serve, use

from crfrefine.base.observer import Observer
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.errors import DeviceLostError, StorageError
from crfrefine.infer import case_work
from crfrefine.infer import plan as plans
from crfrefine.infer.in_flight import BeginAgainError, CasesInFlight, RunIsOverError
from crfrefine.records.records import CaseRecord

CASES = "abcdefg"
# Entries that differ between any two runs; the memory that is free on the machine is one.
OF_RUN = (
    "max_memory",
    "run",
    "seconds",
    "started",
    "written",
    "stamp",
    "output",
    "output_folder",
    "command",
    "times",
)


def write_cases(root):
    """Cases of which one cannot be read, and one has NaN, which is noted."""
    folders = write_folders(root, *CASES)
    save_nifti(folders.logits / "c.nii.gz", np.full((5, 4, 3, 2), 0.5, np.float32))
    image = folders.images / "e_0000.nii.gz"
    values = load_nifti(image).astype(np.float32)
    values[3, 4, 5] = np.nan
    save_nifti(image, values)
    return folders


@pytest.fixture
def folders(tmp_path):
    return write_cases(tmp_path)


def test_the_seconds_of_a_case_are_its_own_without_those_of_the_cases_before(tmp_path, monkeypatch):
    """The others would otherwise add 1 + 2 + … + 6 times the seconds of a refinement."""
    refine = case_work.refine_network

    def refine_slowly(*arguments, **options):
        time.sleep(0.2)
        return refine(*arguments, **options)

    monkeypatch.setattr(case_work, "refine_network", refine_slowly)
    folders = write_folders(tmp_path, *CASES)
    summary = tmp_path / "summary.json"
    infer(folders, "--jobs", 1, "--threads", 1, "--summary", summary, status=0)
    whole = json.loads(summary.read_text())
    seconds = 0.0
    for case in whole["cases"]:
        seconds += sum(case["times"][stage] for stage in ("read", "refine", "write"))
    assert seconds < 1.5 * whole["seconds"]


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """Cases that were refined one at a time."""
    folders = write_cases(tmp_path_factory.mktemp("refined"))
    infer(folders, *EVERYTHING, "--jobs", 1, status=1)
    return folders


def content(folder):
    """The bytes of all files, and the entries of the record and the summary."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and RECORD_FOLDER not in path.parts and path.suffix != ".json":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def without_times(entry):
    if isinstance(entry, dict):
        return {key: without_times(value) for key, value in entry.items() if key not in OF_RUN}
    if isinstance(entry, list):
        return [without_times(value) for value in entry]
    return entry


def entries_of(text, folder):
    """The entries of a JSON text without times, and without the name of the output folder."""
    return without_times(json.loads(text.replace(str(folder), "OUT")))


def records(folder):
    (path,) = (folder / RECORD_FOLDER).glob("*.jsonl")
    return [entries_of(line, folder) for line in path.read_text().splitlines()]


EVERYTHING = ("--save-probabilities", "--save-structures", "--preview", "-v", "--threads", "4")


@pytest.mark.parametrize(
    "options", [(), ("--fail-fast",), ("--max-memory", "600M"), ("--device", "cuda")]
)
def test_files_records_and_messages_are_those_of_one_case_at_a_time(
    folders, tmp_path, options, monkeypatch
):
    if "cuda" in options:
        if cuda_shim.compiler() is None:
            pytest.skip("no C++ compiler to compile the GPU's kernels with")
        use(cuda_shim.shim_backend(), monkeypatch)
    results = []
    for jobs in (1, 4):
        output = tmp_path / f"out{jobs}"
        summary = output / "summary.json"
        result = infer(
            folders._replace(output=output),
            *(*EVERYTHING, "--jobs", jobs, "--summary", summary, *options),
            status=1,
        )
        shown = [line for line in result.stderr.splitlines() if " s" not in line]
        shown = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in shown]
        shown = [line.replace(str(output), "OUT") for line in shown]
        entries = entries_of(summary.read_text(), output)
        results.append((content(output), records(output), shown, statuses(result), entries))
    alone, in_flight_ = results
    assert len(alone[0]) > 5
    for one, other in zip(alone, in_flight_, strict=True):
        assert one == other


def test_a_run_goes_on_where_another_one_ended(folders):
    infer(folders, "--jobs", 3, "--threads", 3, "--fail-fast", status=1)
    assert files_in(folders.output) == ["a.nii.gz", "b.nii.gz"]
    result = infer(folders, "--jobs", 3, "--threads", 3, "--continue", status=1)
    expected = [("a", "skipped"), ("b", "skipped"), ("c", "failed")]
    assert statuses(result) == expected + [(case, "done") for case in "defg"]


def test_a_full_disk_ends_the_run_and_later_cases_leave_nothing(folders, monkeypatch):
    """The disk is full at the second case, when the later ones are written but for their names."""
    written = []
    write = case_work.write_label_map
    are_others_whole = threading.Event()

    def write_label_map(path, *arguments, **options):
        if path.name == "b.nii.gz":
            are_others_whole.wait(20)
            raise StorageError(f"{path}: the disk is full")
        written.append(path.name)
        if len(written) == 3:
            are_others_whole.set()
        write(path, *arguments, **options)

    monkeypatch.setattr(case_work, "write_label_map", write_label_map)
    result = infer(folders, "--jobs", 6, "--threads", 6, status=1)
    assert statuses(result) == [("a", "done"), ("b", "failed")]
    assert len(written) >= 3
    assert files_in(folders.output) == ["a.nii.gz"]
    assert "5 cases not begun" in result.stderr
    assert len(errors(result.stderr)) == 1


def cases_in_flight(number, num_places, num_bytes=100, device="cpu", threads=4):
    """A run with so many cases in flight, which share places and memory."""
    options = SimpleNamespace(num_jobs=num_places, threads=threads, max_memory=None)
    run = CasesInFlight([None] * number, options, device)
    run.max_bytes = num_bytes
    return run, run.cases


def taking(case, num_bytes):
    """A thread that takes a place and memory, and whether the case has them."""
    has_place = threading.Event()

    def take():
        try:
            case.take_memory(num_bytes)
        except RunIsOverError:
            return
        has_place.set()

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    return thread, has_place


def test_cases_get_places_and_memory_in_their_order():
    _, (a, b, c, d) = cases_in_flight(4, num_places=3)
    second, has_second = taking(b, 60)
    assert not has_second.wait(0.05)  # The first case has not had its turn.
    first, has_first = taking(a, 30)
    wait_for(has_first.is_set)
    wait_for(has_second.is_set)

    third, has_third = taking(c, 20)
    fourth, has_fourth = taking(d, 5)
    assert not has_third.wait(0.05)
    assert not has_fourth.is_set()  # It would fit, but a case before it waits.
    a.give_back()
    wait_for(has_third.is_set)
    wait_for(lambda: not has_fourth.is_set() or has_third.is_set())
    b.end_computing()
    wait_for(has_fourth.is_set)
    for thread in (first, second, third, fourth):
        thread.join()


def test_no_more_cases_than_places_are_in_work_and_one_that_failed_early_holds_up_none():
    _, (a, b, c) = cases_in_flight(3, num_places=1)
    a.take_memory(1)
    b.give_back()  # It failed before its voxels were read.
    thread, has_place = taking(c, 1)
    assert not has_place.wait(0.05)
    a.end_computing()
    wait_for(has_place.is_set)
    thread.join()


def test_a_case_that_does_not_fit_runs_alone():
    _, (a, b) = cases_in_flight(2, num_places=2)
    a.take_memory(1000)
    thread, has_place = taking(b, 1)
    assert not has_place.wait(0.05)
    a.give_back()
    wait_for(has_place.is_set)
    thread.join()


def test_cases_that_wait_end_with_the_run():
    run, (a, b) = cases_in_flight(2, num_places=1)
    a.take_memory(1)
    thread, has_place = taking(b, 1)
    with run.changed:
        for case in (a, b):
            case.ending = RunIsOverError
        run.changed.notify_all()
    thread.join(20)
    assert not thread.is_alive()
    assert not has_place.is_set()
    with pytest.raises(RunIsOverError):
        a.enter_stage("refining")


def test_a_case_that_lacks_memory_takes_all_of_it_once_those_before_are_recorded():
    run, (a, b, c, d) = cases_in_flight(4, num_places=3)
    for case in (a, b, c):
        case.take_memory(30)
    b.take_memory(40)
    with pytest.raises(BeginAgainError):
        b.take_memory(50)
    is_alone = threading.Event()

    def begin_again():
        b.begin_again()
        b.take_memory(90)
        is_alone.set()

    thread = threading.Thread(target=begin_again, daemon=True)
    thread.start()
    fourth, has_fourth = taking(d, 1)
    a.give_back()
    c.enter_stage("refining")  # The turn of the second case has not come.
    with run.changed:
        run.turn = 1
        run.changed.notify_all()
    with pytest.raises(BeginAgainError):
        c.wait_to_name()
    assert not is_alone.wait(0.05)
    c.begin_again()
    wait_for(is_alone.is_set)
    b.take_memory(1090)
    assert not has_fourth.wait(0.05)
    third, has_third = taking(c, 30)
    assert not has_third.wait(0.05)
    b.give_back()
    wait_for(has_third.is_set)
    wait_for(has_fourth.is_set)
    for ended in (thread, third, fourth):
        ended.join(20)


def test_cases_that_gave_way_begin_again_in_their_order():
    """A later one that began first would wait with the memory that the earlier one lacks."""
    run, (a, b, c) = cases_in_flight(3, num_places=3)
    for case in (a, b, c):
        case.take_memory(30)
    with pytest.raises(BeginAgainError):
        a.take_memory(90)
    run.turn = 0
    a.begin_again()
    for case in (b, c):
        with pytest.raises(BeginAgainError):
            case.enter_stage("refining")
        case.begin_again()
    a.take_memory(30)
    third, has_third = taking(c, 60)
    second, has_second = taking(b, 60)
    assert not has_second.wait(0.05)  # The first case is alone, whatever it has taken so far.
    a.take_memory(90)
    a.give_back()
    wait_for(has_second.is_set)
    assert not has_third.wait(0.05)
    b.give_back()
    wait_for(has_third.is_set)
    c.give_back()
    assert run.num_bytes_taken == 0
    for thread in (second, third):
        thread.join(20)


def test_the_stages_of_a_case_that_begins_again_alone_are_shown():
    run, cases = cases_in_flight(2, num_places=2)
    for case, case_id in zip(cases, "ab", strict=True):
        case.task = SimpleNamespace(files=SimpleNamespace(case_id=case_id), device="cpu")
    is_shown = threading.Event()

    class Shown(Observer):
        def stage_changed(self, name, stage, step=0, num_steps=0):
            assert (name, stage) == ("b", "refining")
            is_shown.set()

    def refine(case):
        case.take_memory(30)
        if case is cases[1]:
            case.take_memory(90 if case.is_alone else 1000)
            case.enter_stage("refining")
            assert is_shown.wait(20)
        return CaseRecord(case.task.files.case_id)

    assert [record.case_id for record in run.records(refine, Shown())] == ["a", "b"]
    assert run.num_bytes_taken == 0


@pytest.mark.parametrize("lacking", [{0}, {1}, {3, 4}, {1, 3, 5, 6}, {*range(7)}])
@pytest.mark.parametrize("by_error", [False, True])
def test_cases_that_lack_memory_beside_others_are_refined_again_alone(
    refined, tmp_path, monkeypatch, lacking, by_error
):
    """Others that wait to name their files give way, and nothing differs from one at a time."""
    lacking_cases = {CASES[number] for number in lacking}
    refine = case_work.CaseWork.refine
    begun = []

    def refine_or_lack(work):
        in_flight = work.in_flight
        case_id = in_flight.task.files.case_id
        if case_id in lacking_cases and not in_flight.is_alone:
            if by_error:
                raise MemoryError
            in_flight.take_memory(1 << 60)
        begun.append(case_id)
        return refine(work)

    monkeypatch.setattr(case_work.CaseWork, "refine", refine_or_lack)
    beside = refined._replace(output=tmp_path / "beside")
    infer(beside, *EVERYTHING, "--jobs", 4, status=1)
    assert set(begun) == set(CASES) - {"c"}
    assert content(beside.output) == content(refined.output)
    assert records(beside.output)[1:] == records(refined.output)[1:]


def test_the_memory_of_a_case_does_not_depend_on_others(folders, tmp_path, monkeypatch):
    """It is what the limit leaves beside the case's own input, though others are in memory too."""
    budgets = {}
    refine_network = case_work.refine_network

    def note_budget(network, image, *, context, **options):
        budgets.setdefault(image.tobytes(), set()).add(context.num_bytes)
        return refine_network(network, image, context=context, **options)

    monkeypatch.setattr(case_work, "refine_network", note_budget)
    for jobs in (1, 2, 5):
        ballast = np.ones(jobs << 22)
        beside = folders._replace(output=tmp_path / f"out{jobs}")
        infer(beside, "--max-memory", "1G", "--threads", 5, "--jobs", jobs, status=1)
        del ballast
    assert len(budgets) == 6
    ((number,),) = {tuple(found) for found in budgets.values()}
    assert 0.9 * (1 << 30) < number < 1 << 30


@pytest.mark.parametrize(
    ("threads", "jobs", "num_cases", "expected"),
    [(8, 3, 9, 2), (8, 16, 9, 1), (16, 16, 3, 5), (1, 4, 9, 1)],
)
def test_cases_share_the_threads(folders, monkeypatch, threads, jobs, num_cases, expected):
    shares = []
    read_case = case_work.read_case

    def note_share(*arguments, threads, **options):
        shares.append(threads)
        return read_case(*arguments, threads=threads, **options)

    monkeypatch.setattr(case_work, "read_case", note_share)
    several = write_folders(folders.output.parent / "more", *"abcdefghi"[:num_cases])
    infer(several, "--threads", threads, "--jobs", jobs, status=0)
    assert shares[0] == expected


@pytest.mark.parametrize(
    ("device", "jobs", "expected"),
    [
        ("cpu", None, 6),
        ("cuda", None, 6),
        ("cuda:1", 5, 5),
        ("cuda", 1, 1),
        ("torch:cuda", None, 1),
        ("torch", 4, 1),
    ],
)
def test_a_gpu_computes_one_case_while_others_are_read_and_written(device, jobs, expected):
    run, _ = cases_in_flight(40, jobs, device=device, threads=6)
    assert run.num_jobs == expected


class LostGpu(cuda_shim.ShimDevice):
    """A GPU that stops working in its fourth use, for good."""

    num_uses = 0

    def active(self):
        self.num_uses += 1
        if self.num_uses > 3:
            raise DeviceLostError("--device cuda: the GPU stopped working in this case")
        return super().active()


@pytest.mark.parametrize("jobs", [1, 3])
def test_after_the_loss_of_a_gpu_the_other_cases_run_on_the_cpu(tmp_path, monkeypatch, jobs):
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    engine = CudaBackend(LostGpu())
    serve(monkeypatch, "auto|cuda.*", lambda _: engine)
    monkeypatch.setattr(plans, "is_available", lambda: True)
    monkeypatch.setattr(plans, "GPU_START", 0.0)
    engine.name = "cuda"
    folders = write_folders(tmp_path, *"abcdef")
    result = infer(folders, "--device", "auto", "--jobs", jobs, status=1)
    cases = [record for record in records(folders.output) if "case_id" in record]
    assert len(cases) == 6
    found = [record["device"] for record in cases if record["status"] == "done"]
    failed = [record for record in cases if record["status"] == "failed"]
    assert len(failed) == 1
    assert failed[0]["error_kind"] == "DeviceLostError"
    assert set(found) == {"cuda", "cpu"}
    assert result.stderr.count("the other cases are computed on the CPU") == 1


@pytest.mark.parametrize("text", ["0", "-1", "many", "2.5"])
def test_a_number_of_jobs_that_makes_no_sense_is_refused(folders, text):
    result = infer(folders, "--jobs", text, status=2)
    assert "--jobs" in result.stderr
    assert "expected auto, or a number of cases" in result.stderr
