"""The device that `auto` stands for in a run on files."""

import pytest
from cli_helpers import write_folders
from cuda_shim import ShimDevice, compiler
from data_sets import found_cases
from strict_device import serve

import crfrefine.engines
from crfrefine.cases.reading_options import ReadingOptions
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.infer import plan as plans
from crfrefine.infer.options import InferenceOptions
from crfrefine.infer.plan import RunPlan, faster_on_cpu

PLAIN = crfrefine.CrfParameters()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU: how often its engine was loaded."""
    loaded = []

    def load(_):
        loaded.append(True)
        return CudaBackend(ShimDevice())

    if compiler() is None:
        pytest.skip("no C++ compiler to compile the GPU's kernels with")
    monkeypatch.setattr(plans, "is_available", lambda: True)
    serve(monkeypatch, "auto", load)
    return loaded


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path, "a", "b", "c")


def test_a_few_small_cases_do_not_wait_for_a_gpu_to_start(gpu, folders):
    cases = found_cases(folders.images, folders.logits)
    note = faster_on_cpu(cases, ReadingOptions(), PLAIN, 2)
    assert gpu == []
    assert "less than the start of the GPU; --device cuda takes the GPU" in str(note)


def test_more_work_than_the_start_takes_goes_to_the_gpu_whatever_the_threads_of_one_case(
    gpu, folders, monkeypatch
):
    cases = found_cases(folders.images, folders.logits)
    monkeypatch.setattr(plans, "SECONDS_PER_VALUE", 1.0)
    monkeypatch.setattr(plans, "GPU_START", 1e9)
    note = faster_on_cpu(cases[:1], ReadingOptions(), PLAIN, 1)
    of_one = note.values["seconds"]
    monkeypatch.setattr(plans, "GPU_START", 2.5 * of_one / 2)
    assert faster_on_cpu(cases, ReadingOptions(), PLAIN, 2) is None
    assert faster_on_cpu(cases, ReadingOptions(), PLAIN, 4) is not None
    options = InferenceOptions((folders.images,), (folders.logits,), folders.output, threads=2)
    assert RunPlan(options).summary.device == "cuda-shim"
    assert gpu == [True]
    # A case that cannot be read is no work.
    (folders.images / "a_0000.nii.gz").write_bytes(b"nothing")
    assert faster_on_cpu(cases, ReadingOptions(), PLAIN, 2) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"mean_field.filter": "exact"},
        {"mean_field.filter": "truncated"},
        {"mean_field.num_iterations": 60},
    ],
)
def test_models_that_take_long_go_to_the_gpu(gpu, folders, monkeypatch, changes):
    cases = found_cases(folders.images, folders.logits)
    monkeypatch.setattr(plans, "SECONDS_PER_VALUE", 1e-4)
    model = PLAIN.replace(**changes)
    assert faster_on_cpu(cases, ReadingOptions(), PLAIN, 2) is not None
    assert faster_on_cpu(cases, ReadingOptions(), model, 2) is None


def test_without_a_gpu_nothing_is_read_and_nothing_said(monkeypatch, folders):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(plans, "read_case_headers", None)
    plan = RunPlan(InferenceOptions((folders.images,), (folders.logits,), folders.output))
    assert plan.summary.device == "cpu"
    assert plan.notes == []


def test_a_run_says_why_it_takes_the_cpu(gpu, folders):
    options = InferenceOptions(
        (folders.images,),
        (folders.logits,),
        folders.output,
        parameters=crfrefine.CrfParameters(),
        device="auto",
    )
    plan = RunPlan(options)
    assert plan.summary.device == "cpu"
    assert plan.tasks[0].device == "cpu"
    assert any("--device cuda takes the GPU" in note for note in map(str, plan.notes))
    assert gpu == []
