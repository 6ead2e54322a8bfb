"""Copies beside the launches, on the strict device: through few page-locked buffers, for the next case while one computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cuda_shim
import numpy as np
import pytest
from gpu_refinement import PARAMETERS, on
from oracles import Case, random_case
from strict_device import BEING_FILLED, StrictArray, StrictDevice, StrictError, counts, strict_memory
from strict_lane import StrictLane

from crfrefine import RefinementResult, refine
from crfrefine.engines.cuda import ahead, transfers
from crfrefine.engines.cuda.backend import CudaBackend
from crfrefine.engines.cuda.cupy_device import CupyDevice, is_available
from crfrefine.engines.cuda.device import check_memory
from crfrefine.engines.cuda.held import SHARE, HeldChannels
from crfrefine.engines.cuda.intensity import HeldImage
from crfrefine.engines.cuda.transfers import NUM_BUFFERS, Ring
from crfrefine.errors import CapacityError
from crfrefine.parameters.sections import IntensityParameters

GRID = (7, 11, 9)


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictLane]:
    """With buffers that are much smaller than the arrays, and no multiple of a row."""
    if cuda_shim.compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    monkeypatch.setattr(transfers, "BUFFER_BYTES", 1000)
    with strict_memory():
        yield StrictLane()


@pytest.fixture
def device(lane: StrictLane) -> StrictDevice:
    return StrictDevice(lane=lane)


def cases(monkeypatch: pytest.MonkeyPatch, engine: CudaBackend) -> list[Case]:
    on(engine, monkeypatch)
    found = [random_case(3, num_modalities=2, num_labels=labels, grid_shape=GRID) for labels in (3, 4, 5)]
    return [Case(case.logits, (900 * case.image).astype(np.int16), None, (1.0, 1.5, 2.5)) for case in found]


def arrays_of(cases: Sequence[Case]) -> list[np.ndarray[Any, Any]]:
    return [array for case in cases for array in (case.logits, case.image)]


def of_the_host(num_bytes: float) -> np.ndarray[Any, Any]:
    """Logits of about so many bytes, in memory that the stand-in does not count as the device's."""
    return np.frombuffer(bytearray(40 * int(num_bytes // 40)), dtype=np.float32).reshape(2, 5, -1)


def refined(case: Case, **options: Any) -> RefinementResult:
    return refine(case.logits, case.image, spacing=case.spacing, parameters=PARAMETERS, device="cuda", **options)


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 12345])
def test_arrays_arrive_through_few_buffers(size: int, device: StrictDevice, lane: StrictLane) -> None:
    """Both ways; the host may change its array as soon as the call is back."""
    values = np.random.default_rng(size).integers(0, 255, size).astype(np.uint8)
    given = values.copy()
    assert device.transfers is not None
    there = device.transfers.begin_upload(given)
    given[:] = 0
    lane.precede_launches()
    assert isinstance(there, StrictArray)
    np.testing.assert_array_equal(device.transfers.download(there), values)
    assert lane.num_page_locked <= 2 * NUM_BUFFERS
    assert lane.num_copies == 2 * -(-size // 1000)


def test_an_upload_without_page_locked_memory_ends_before_its_memory_is_given_back(
    device: StrictDevice, lane: StrictLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lane would report a copy into memory that is no longer the array's; the next upload finds its buffers in order."""
    values = np.arange(12345, dtype=np.uint8)
    assert device.transfers is not None
    whole = lane.page_locked
    for most in (0, 1):
        monkeypatch.setattr(
            lane, "page_locked", lambda num_bytes, most=most: _refuse() if lane.num_page_locked >= most else whole(num_bytes)
        )
        with pytest.raises(MemoryError):
            device.transfers.begin_upload(values)
        lane.wait()
    monkeypatch.setattr(lane, "page_locked", whole)
    there = device.transfers.begin_upload(values)
    lane.precede_launches()
    np.testing.assert_array_equal(device.transfers.download(there), values)


def _refuse() -> np.ndarray[Any, Any]:
    raise MemoryError("no page-locked memory")


def test_the_next_case_is_copied_while_one_is_computed(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its steps: with the bits of cases that are copied when they are needed, and no copy twice."""
    engine = CudaBackend(device)
    given = cases(monkeypatch, engine)
    expected = [refined(case) for case in given]
    device.uploads.clear()
    found = []
    engine.copy_ahead(given[0].logits, given[0].image)
    for case, after in zip(given, [*given[1:], None], strict=True):
        begun: list[str] = []

        def progress(stage: str, step: int, num_steps: int, after: Case | None = after, begun: list[str] = begun) -> None:
            if after is not None and stage == "mean field" and not begun:
                begun.append(stage)
                engine.copy_ahead(after.logits, after.image)
                assert BEING_FILLED, "the copy is under way"

        found.append(refined(case, progress=progress))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.label_map, other.label_map)
        np.testing.assert_array_equal(one.logits, other.logits)
        assert one.changes == other.changes
    assert max(device.uploads) < min(case.image.nbytes for case in given), "logits and images did not go up again"


def test_a_case_that_is_never_computed_gives_its_memory_back(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one after an interrupt; of cases that failed between reading and computing, two at most are kept."""
    engine = CudaBackend(device)
    given = cases(monkeypatch, engine)
    before = counts()["bytes"]
    for case in given:
        engine.copy_ahead(case.logits, case.image)
    assert counts()["bytes"] - before == sum(case.logits.nbytes + case.image.nbytes for case in given[1:])
    engine.copy_ahead()
    assert counts()["bytes"] == before


def test_what_was_copied_for_older_cases_is_forgotten(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = CudaBackend(device)
    given = cases(monkeypatch, engine)
    before = counts()["bytes"]
    engine.copy_ahead(given[0].logits, given[0].image)
    engine.copy_ahead(given[1].logits, given[1].image)
    held = engine.hold(given[1].logits)
    assert counts()["bytes"] - before == given[1].logits.nbytes + given[1].image.nbytes
    np.testing.assert_array_equal(device.download(held.array), given[1].logits)


def test_an_array_at_the_same_place_with_other_values_is_not_taken_for_it(device: StrictDevice) -> None:
    """A place is compared with shape, strides and type; the engine keeps the array, so that the place is not given to another one."""
    engine = CudaBackend(device)
    values = np.arange(2.0 * 5 * 4 * 6, dtype=np.float32).reshape(2, 5, 4, 6)
    engine.copy_ahead(values, None)
    other = values.reshape(2, 4, 5, 6)
    assert engine.hold(other).shape == (2, 4, 5, 6)
    assert engine.hold(values).shape == (2, 5, 4, 6)
    assert sorted(device.uploads) == [other.nbytes]


def test_memory_that_was_taken_ahead_is_given_to_the_case_that_needs_it(lane: StrictLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that fits is not refused because of the next one."""
    given = random_case(3, num_modalities=2, num_labels=4, grid_shape=GRID)
    large = Case(given.logits, given.image, None, (1.0, 1.5, 2.5))
    with_room = StrictDevice()
    on(CudaBackend(with_room), monkeypatch)
    counts(resets=True)
    before = counts()["bytes"]
    refined(large)
    limit = 2 * (counts()["most_bytes"] - before)
    device = StrictDevice(limit=limit, lane=lane)
    engine = CudaBackend(device)
    on(engine, monkeypatch)
    monkeypatch.setattr(ahead, "SHARE", 1)
    others = [random_case(3, num_modalities=2, num_labels=30, grid_shape=GRID).logits for _ in range(2)]
    engine.copy_ahead(others[0], None)
    taken = counts()["bytes"]
    result = refined(large)
    assert result.changes.voxels_changed > 0
    assert counts()["bytes"] < taken, "it was given back"


def test_a_run_that_has_begun_keeps_its_memory(lane: StrictLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was estimated for it is not taken ahead meanwhile."""
    device = StrictDevice(limit=1_000_000, lane=lane)
    engine = CudaBackend(device)
    values = np.zeros((2, 5, 4, 6), dtype=np.float32)
    with device.ahead.run():
        device.ahead.reserve(999_000)
        engine.copy_ahead(values, None)
        assert not BEING_FILLED
    engine.copy_ahead(values, None)
    assert BEING_FILLED


def test_a_part_of_a_run_takes_nothing_of_what_is_reserved(lane: StrictLane) -> None:
    """Later estimates are those of parts: a lattice's vertices, a filter's box. After the run all of it is free, after an error too."""
    device = StrictDevice(limit=1_000_000, lane=lane)
    engine = CudaBackend(device)
    values = np.zeros((2, 5, 4, 6), dtype=np.float32)
    with device.ahead.run():
        check_memory(device, 999_000, "a case")
        with device.ahead.run():
            check_memory(device, 10, "a part of it")
        engine.copy_ahead(values, None)
        assert not BEING_FILLED
    with pytest.raises(CapacityError), device.ahead.run():
        check_memory(device, 2_000_000, "a case")
    check_memory(device, 999_000, "what is no run")
    engine.copy_ahead(values, None)
    assert BEING_FILLED


def test_runs_of_two_threads_keep_what_both_need(lane: StrictLane) -> None:
    """Such as a layer's beside a folder run; one that ends gives back what was its own."""
    device = StrictDevice(limit=1_000_000, lane=lane)
    engine = CudaBackend(device)
    values = np.zeros((2, 5, 4, 6), dtype=np.float32)
    begun, end = threading.Event(), threading.Event()

    def other() -> None:
        with device.ahead.run():
            device.ahead.reserve(500_000)
            begun.set()
            assert end.wait(60)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(other)
        assert begun.wait(60)
        with device.ahead.run():
            device.ahead.reserve(499_000)
            engine.copy_ahead(values, None)
            assert not BEING_FILLED
        end.set()
        running.result()
    engine.copy_ahead(values, None)
    assert BEING_FILLED


def test_a_run_keeps_its_whole_estimate_to_its_last_step(lane: StrictLane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that fits beside the parts that were estimated last does not begin; nor is anything reserved once the run is done."""
    device = StrictDevice(limit=20_000_000, lane=lane)
    engine = CudaBackend(device)
    case, *_ = cases(monkeypatch, engine)
    reserved: list[float] = []
    reserve = device.ahead.reserve

    def noted(num_bytes: float) -> None:
        reserved.append(num_bytes)
        reserve(num_bytes)

    monkeypatch.setattr(device.ahead, "reserve", noted)
    monkeypatch.setattr(ahead, "SHARE", 1)
    stages: list[bool] = []

    def progress(stage: str, step: int, num_steps: int) -> None:
        if stage == "mean field" and not stages:
            free = device.free_bytes()
            assert free is not None
            left = free - max(reserved)
            assert reserved[-1] < max(reserved)
            engine.copy_ahead(of_the_host(left + 400), None)
            stages.append(bool(BEING_FILLED))

    refined(case, progress=progress)
    assert stages == [False]
    engine.copy_ahead(of_the_host((device.free_bytes() or 0) - 400), None)
    assert BEING_FILLED


@pytest.mark.parametrize("normalization", ["percentile", "zscore"])
def test_where_an_image_is_normalized_does_not_depend_on_copies(
    normalization: str, lane: StrictLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the limit, the next case makes room for it; not where that would not be enough."""
    image = (900 * random_case(3, num_modalities=2, num_labels=2, grid_shape=GRID).image).astype(np.int16)
    parameters = IntensityParameters(normalization=normalization)
    limit = image.nbytes + int(2 * HeldImage(StrictDevice(), image).bytes_to_normalize(None, None)) + 200
    monkeypatch.setattr(ahead, "SHARE", 1)
    for short in (0, 400):
        device = StrictDevice(limit=limit - short, lane=lane)
        engine = CudaBackend(device)
        found = []
        for copies in (False, True):
            held = engine.hold_image(image)
            if copies:
                engine.copy_ahead(of_the_host(2520), None)
                assert BEING_FILLED
            taken = engine.normalize(held, parameters, None, None).take()
            assert isinstance(taken, np.ndarray if short else HeldChannels)
            assert bool(BEING_FILLED) == (copies and short > 0)
            found.append((taken if short else device.download(taken.array)).tobytes())
            del taken, held
            engine.copy_ahead()
        assert found[0] == found[1]


def test_whether_logits_are_held_does_not_depend_on_copies(lane: StrictLane, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_case(3, num_modalities=2, num_labels=4, grid_shape=GRID).logits
    monkeypatch.setattr(ahead, "SHARE", 1)
    for short in (0, 400):
        engine = CudaBackend(StrictDevice(limit=SHARE * logits.nbytes + 200 - short, lane=lane))
        for copies in (False, True):
            if copies:
                engine.copy_ahead(of_the_host(2520), None)
            assert isinstance(engine.hold(logits), np.ndarray if short else HeldChannels)
            engine.copy_ahead()


def test_without_room_nothing_is_copied_ahead(lane: StrictLane) -> None:
    device = StrictDevice(limit=10_000, lane=lane)
    engine = CudaBackend(device)
    engine.copy_ahead(np.zeros((2, 9, 8, 9), dtype=np.float32), None)
    assert lane.num_copies == 0


@pytest.mark.gpu
@pytest.mark.skipif(not is_available(), reason="needs a GPU and CuPy")
def test_on_a_gpu_another_thread_copies_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder run: many cases, larger than a buffer, with the bits of cases that are not copied ahead; a result that is as large."""
    engine = CudaBackend(CupyDevice())
    on(engine, monkeypatch)
    given = random_case(3, num_modalities=2, num_labels=5, grid_shape=(121, 110, 93))
    random = np.random.default_rng(4)
    cases = [Case(given.logits + np.float32(random.normal()), given.image * (2.0 + number), None, (1.0, 1.5, 2.5)) for number in range(12)]
    expected = [refined(case) for case in cases]
    with ThreadPoolExecutor(1) as reader:
        copying = reader.submit(engine.copy_ahead, cases[0].logits, cases[0].image)
        for number, (case, wanted) in enumerate(zip(cases, expected, strict=True)):
            copying.result()
            copying = reader.submit(engine.copy_ahead, *arrays_of(cases[number + 1 : number + 2]))
            found = refined(case)
            np.testing.assert_array_equal(found.label_map, wanted.label_map)
            np.testing.assert_array_equal(found.logits, wanted.logits)
        copying.result()
    engine.copy_ahead()


# Faults, planted to see the stand-in find them.


def test_a_buffer_that_is_written_too_early_is_seen(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ring, "finish", lambda self, number: None)
    assert device.transfers is not None
    values = np.random.default_rng(3).integers(0, 255, 9000).astype(np.uint8)
    there = device.transfers.begin_upload(values)
    assert there.shape == values.shape
    with pytest.raises(StrictError, match="a page-locked buffer was written before its copy was done"):
        device.transfers.lane.wait()


def test_a_buffer_that_is_read_too_early_is_seen(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its values: the copy has not come yet."""
    assert device.transfers is not None
    there = device.xp.zeros(500, dtype=np.uint8)
    monkeypatch.setattr(Ring, "finish", lambda self, number: None)
    assert not np.array_equal(device.transfers.download(there), np.zeros(500))


USES: dict[str, Callable[[StrictDevice, HeldChannels], object]] = {
    "kernel": lambda device, held: held.ranges(),
    "arithmetic": lambda device, held: held.array + 1.0,
    "function": lambda device, held: device.xp.sort(held.array),
    "download": lambda device, held: device.download(held.array),
}


@pytest.mark.parametrize("use", USES)
def test_an_array_that_is_used_too_early_is_seen(use: str, device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StrictLane, "precede_launches", lambda self: None)
    engine = CudaBackend(device)
    values = np.ones((2, 5, 4, 6), dtype=np.float32)
    engine.copy_ahead(values, None)
    held = engine.hold(values)
    assert isinstance(held, HeldChannels)
    with pytest.raises(StrictError, match="an array is used while it is being filled"):
        USES[use](device, held)


def test_memory_that_is_given_back_too_early_is_seen(device: StrictDevice) -> None:
    assert device.transfers is not None
    there = device.transfers.begin_upload(np.ones(500, dtype=np.uint8))
    del there
    with pytest.raises(StrictError, match="given back while it was being filled"):
        device.transfers.lane.wait()


def test_a_copy_that_overtakes_launches_is_seen(device: StrictDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory may have been somebody else's a moment ago, whose kernels still run; or is still being computed."""
    monkeypatch.setattr(StrictLane, "follow_launches", lambda self: None)
    assert device.transfers is not None
    with pytest.raises(StrictError, match="a copy may overtake launches"):
        device.transfers.begin_upload(np.ones(500, dtype=np.uint8))
    there = device.xp.zeros(500, dtype=np.uint8)
    with pytest.raises(StrictError, match="a copy may overtake launches"):
        device.transfers.download(there)
