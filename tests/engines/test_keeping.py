"""A `Plan` keeps kernels between runs: the same bits, and nothing is built that is there."""

import numpy as np
import pytest

from crfrefine import CrfParameters, Plan, refine
from crfrefine.engines.cpu import CpuKernels
from crfrefine.errors import CapacityError
from crfrefine.runs.demo.phantom import make_phantom

SPACING = (0.9, 0.7, 1.8)
# Labels everywhere, so that the kernels are those of the whole volume.
DENSE = CrfParameters().replace(**{"mean_field.label_threshold": 0.0, "bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1})
PHANTOM = make_phantom(5, (21, 18, 16), SPACING)
MASK = np.zeros((21, 18, 16), bool)
MASK[2:17, 3:15, 1:12] = True
MASK[5, 6, 7] = False


def plan_of(image=PHANTOM.image, mask=None, spacing=SPACING):
    return Plan(image, spacing=spacing, mask=mask, threads=1)


def run(parameters, plan, logits=PHANTOM.logits, progress=None):
    """The result, and how often something was built."""
    stages = []
    result = plan.run(logits, parameters, progress=progress or (lambda stage, *_: stages.append(stage)))
    return result, stages.count("build")


def refine_once(parameters, image=PHANTOM.image, logits=PHANTOM.logits, mask=None, spacing=SPACING):
    return refine(logits, image, parameters=parameters, mask=mask, spacing=spacing, threads=1)


@pytest.mark.parametrize(
    ("mask", "filter_name", "order"), [(None, "truncated", "C"), (MASK, "lattice", "F"), (None, "grid", "F")], ids=["1", "2", "3"]
)
def test_results_have_the_same_bits_and_only_bandwidths_build_anew(mask, filter_name, order):
    start = DENSE.replace(**{"mean_field.filter": filter_name})
    arrays = {"logits": np.asarray(PHANTOM.logits, order=order), "image": np.asarray(PHANTOM.image, order=order)}
    changes = [
        ({}, 1),
        ({"bilateral.weight": 3.0}, 0),
        ({"mean_field.temperature": 0.5, "mean_field.num_iterations": 8}, 0),
        ({"volume.weight": 0.75}, 0),
        ({"bilateral.theta_beta": 0.2}, 1),
        ({"spatial.weight": 1.0}, 1),
        ({"postprocess.keep_largest": "foreground"}, 0),
    ]
    parameters, num_changed, plan = start, 0, plan_of(arrays["image"], mask)
    for change, builds in changes:
        parameters = parameters.replace(**change)
        found, built = run(parameters, plan, arrays["logits"])
        wanted = refine_once(parameters, mask=mask, **arrays)
        assert built == builds, change
        np.testing.assert_array_equal(found.logits, wanted.logits)
        np.testing.assert_array_equal(found.label_map, wanted.label_map)
        assert found.energy == wanted.energy
        assert found.filters == wanted.filters
        num_changed = max(num_changed, found.changes.voxels_changed)
    assert num_changed > 30


def test_a_run_that_is_stopped_leaves_kernels_that_can_be_used():
    plan = plan_of()

    def stop(stage, step, num_steps):
        if (stage, step) == ("mean field", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(DENSE, plan, progress=stop)
    found, built = run(DENSE, plan)
    assert built == 0
    np.testing.assert_array_equal(found.logits, refine_once(DENSE).logits)


def test_where_kept_kernels_do_not_fit_none_are_kept(monkeypatch):
    plan = plan_of()
    run(DENSE, plan)

    run_kernels, refused = CpuKernels.run, []

    def refuse(kernels, *arguments, **more):
        if not refused:  # The kept kernels come first.
            refused.append(kernels)
            raise CapacityError("not enough memory")
        return run_kernels(kernels, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("crfrefine.engines.cpu.CpuKernels.run", refuse)
        found, _ = run(DENSE, plan)
    np.testing.assert_array_equal(found.logits, refine_once(DENSE).logits)
    assert run(DENSE, plan)[1] == 1
