"""What keeps kernels serves one call at a time: none waits for itself, and none meets another's."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cuda_shim
import numpy as np
import pytest
import tile_cases
from oracles import random_case, resolve

import crfrefine
from crfrefine import CrfParameters, InputError
from crfrefine.engines import get_backend
from crfrefine.engines.cpu import CpuBackend, load_engine
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

SHAPE = (9, 12, 7)
SPACING = (1.0, 1.3, 0.8)
RANDOM = np.random.default_rng(8)
IMAGE = RANDOM.normal(100.0, 20.0, SHAPE)
LOGITS = RANDOM.normal(0.0, 3.0, (3, *SHAPE)).astype(np.float32)
LABELS = LOGITS.argmax(axis=0)
needs_compiler = pytest.mark.skipif(
    cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with"
)


def at_step(wanted, function):
    """A progress callback that calls a function before one step of the mean field."""

    def progress(stage, step, num_steps):
        if stage == "mean field" and step == wanted:
            function()

    return progress


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(function).result(timeout=60)


@pytest.mark.parametrize("call", [lambda function: function(), in_a_thread])
@pytest.mark.parametrize("input_type", ["logits", "labels"])
def test_a_plan_refuses_a_second_run_and_can_be_used_afterwards(call, input_type):
    plan = crfrefine.Plan(IMAGE, spacing=SPACING, threads=1)
    network = LABELS if input_type == "labels" else LOGITS
    expected = plan.run(network, input_type=input_type)

    def run_again():
        plan.run(LOGITS, CrfParameters().replace(**{"bilateral.theta_beta": 0.5}))

    progress = at_step(1, lambda: call(run_again))
    with pytest.raises(InputError, match="this Plan is at work on another run"):
        plan.run(network, input_type=input_type, progress=progress)
    assert plan.run(network, input_type=input_type) == expected

    refused = []

    def run_or_note():
        try:
            run_again()
        except InputError as error:
            refused.append(error)

    progress = at_step(1, lambda: call(run_or_note))
    assert plan.run(network, input_type=input_type, progress=progress) == expected
    assert len(refused) == 1


def test_an_engine_that_keeps_kernels_refuses_a_second_run():
    engine = CpuBackend(keeps_kernels=True)
    options = {"spacing": SPACING, "device": engine, "threads": 1}
    other = CrfParameters().replace(**{"bilateral.theta_beta": 0.5})

    def run_again():
        crfrefine.refine(LOGITS, IMAGE, parameters=other, **options)

    with pytest.raises(InputError, match="keeps its kernels, and is at work"):
        crfrefine.refine(LOGITS, IMAGE, progress=at_step(1, run_again), **options)


@pytest.mark.parametrize("name", ["cpu", pytest.param("shim", marks=needs_compiler)])
def test_kernels_refuse_the_callback_of_their_own_run_and_others_wait(name):
    case = random_case(3, 1, 3, grid_shape=SHAPE)
    model = resolve(case, mean_field__num_iterations=3)
    engine = get_backend("cpu") if name == "cpu" else cuda_shim.shim_backend()
    kernels = engine.kernels(case.grid, model.kernels)
    expected = kernels.run(case.logits, model.mean_field).logits

    def run_again():
        kernels.run(case.logits, model.mean_field)

    with pytest.raises(InputError, match="at work: a progress callback must not use the kernels"):
        kernels.run(case.logits, model.mean_field, progress=at_step(1, run_again))
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(kernels.run, case.logits, model.mean_field) for _ in range(6)]
        for run in runs:
            np.testing.assert_array_equal(run.result(timeout=60).logits, expected)


def test_a_last_run_leaves_an_error_for_those_that_waited():
    """They wait for a first run, and then for the last one, which clears the kernels."""
    case = random_case(3, 1, 3, grid_shape=SHAPE)
    model = resolve(case, mean_field__num_iterations=3)
    kernels = get_backend("cpu").kernels(case.grid, model.kernels)
    expected = kernels.run(case.logits, model.mean_field).logits
    problems = []
    with ThreadPoolExecutor(8) as pool:
        runs = []

        def begin_others():
            for number in range(8):
                is_last = number == 1
                runs.append(
                    pool.submit(kernels.run, case.logits, model.mean_field, is_last=is_last)
                )
            time.sleep(0.3)

        kernels.run(case.logits, model.mean_field, progress=at_step(1, begin_others))
        for run in runs:
            error = run.exception(timeout=60)
            if error is None:
                np.testing.assert_array_equal(run.result().logits, expected)
            else:
                problems.append(str(error))
    assert all("have had their last run" in problem for problem in problems)
    with pytest.raises(InputError, match="have had their last run"):
        kernels.run(case.logits, model.mean_field)


@needs_compiler
@pytest.mark.parametrize("regions", [None, {"whole": [1, 2], "core": [2], "edema": [3]}])
def test_a_gpu_refuses_a_case_within_a_case(regions):
    """Regions too are one case at a time: each may need all of the memory."""
    engine = cuda_shim.shim_backend()
    options = {"spacing": SPACING, "device": engine, "input_type": "logits"}

    def refine_another():
        crfrefine.refine(LOGITS, IMAGE, **options)

    with pytest.raises(InputError, match="at work on a case that waits for its progress callback"):
        crfrefine.refine(
            LOGITS, IMAGE, regions=regions, progress=at_step(0, refine_another), **options
        )


def test_a_run_on_tiles_leaves_nothing_of_itself_in_kernels(monkeypatch):
    """Filters of the whole volume are told which voxels send, and which receive."""
    built = []
    make = CpuBackend.kernels

    def keep(*arguments):
        built.append((make(*arguments), arguments))
        return built[-1][0]

    monkeypatch.setattr(CpuBackend, "kernels", keep)
    case = tile_cases.make_case(3, (26, 33, 40), 5)
    parameters = CrfParameters().replace(**{"mean_field.filter": "lattice"})
    tile_cases.refine(case, parameters, 1e-3, threads=1)
    ((kernels, arguments),) = built

    spec = parameters.resolve(5, 1, 3).mean_field
    found = kernels.run(case.logits, spec).logits
    anew = make(*arguments).run(case.logits, spec).logits
    np.testing.assert_array_equal(found, anew)

    # Kernels that are spent are no kernels of tiles either.
    kernels.run(case.logits, spec, is_last=True)
    monkeypatch.setattr(CpuBackend, "kernels", lambda *_: kernels)
    with pytest.raises(load_engine().EngineInputError, match="have had their last run"):
        tile_cases.refine(case, parameters, 1e-3, threads=1)


def test_python_goes_on_while_filters_are_planned():
    """The main thread counts on while another one plans filters for 1.5 million voxels."""
    image = RANDOM.normal(100.0, 20.0, (1, 96, 128, 120)).astype(np.float32)
    kernel = KernelSpec("bilateral", (8.0, 8.0, 8.0), (20.0,))
    spec = KernelSetSpec((kernel,), "symmetric", "auto", num_labels=2, num_iterations=5)
    engine = load_engine()
    counted = 0

    def count_while_planned():
        before = counted
        for _ in range(100):  # One plan takes milliseconds, in which a busy machine may do else.
            engine.plan_filters(image, None, list(SPACING), spec, 1)
            if counted > before:
                break
        return counted - before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60.0)  # Python passes its lock on only where code gives it up.
    try:
        with ThreadPoolExecutor(1) as pool:
            planned = pool.submit(count_while_planned)
            while not planned.done():
                counted += 1
                time.sleep(0.0002)
    finally:
        sys.setswitchinterval(interval)
    assert planned.result() > 0
