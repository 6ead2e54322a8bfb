"""Kernels that are kept between calls of `refine`: the same bits, and nothing is built that is there."""

import numpy as np
import pytest

from crfrefine import CrfParameters, refine
from crfrefine.apps.demo.phantom import make_phantom
from crfrefine.engines.cpu import CpuKernels
from crfrefine.engines.keeping import KeepingBackend
from crfrefine.errors import CapacityError
from crfrefine.refining_again import RefiningAgain

SPACING = (0.9, 0.7, 1.8)
# Labels everywhere, so that the kernels are those of the whole volume.
DENSE = CrfParameters().replace(**{"mean_field.label_threshold": 0.0, "bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.1})
PHANTOM = make_phantom(5, (21, 18, 16), SPACING)
MASK = np.zeros((21, 18, 16), bool)
MASK[2:17, 3:15, 1:12] = True
MASK[5, 6, 7] = False


class Counting:
    """Counts what is built."""

    def __init__(self):
        self.builds = 0

    def __call__(self, stage, step, num_steps):
        self.builds += stage == "build"


def run(parameters, again, **more):
    counting = Counting()
    given = {"image": PHANTOM.image, "spacing": SPACING, "threads": 1, "progress": counting, **more}
    logits = given.pop("logits", PHANTOM.logits)
    return refine(logits, given.pop("image"), parameters=parameters, again=again, **given), counting.builds


@pytest.mark.parametrize(
    ("mask", "filter_name", "order"), [(None, "truncated", "C"), (MASK, "lattice", "F"), (None, "grid", "F")], ids=["1", "2", "3"]
)
def test_results_have_the_same_bits_and_only_bandwidths_build_anew(mask, filter_name, order):
    again = RefiningAgain()
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
    parameters, num_changed = start, 0
    for change, builds in changes:
        parameters = parameters.replace(**change)
        found, built = run(parameters, again, mask=mask, **arrays)
        wanted, _ = run(parameters, None, mask=mask, **arrays)
        assert built == builds, change
        np.testing.assert_array_equal(found.logits, wanted.logits)
        np.testing.assert_array_equal(found.label_map, wanted.label_map)
        assert found.energy == wanted.energy
        assert found.filters == wanted.filters
        num_changed = max(num_changed, found.changes.voxels_changed)
    assert num_changed > 30


def test_other_images_masks_and_spacings_get_kernels_of_their_own():
    again = RefiningAgain()
    run(DENSE, again)
    for more in ({"image": PHANTOM.image * [[[[2.0]]]] + PHANTOM.image**2}, {"mask": MASK}, {"mask": ~MASK}, {"spacing": (1.0, 0.7, 1.8)}):
        found, built = run(DENSE, again, **more)
        assert built == 1, list(more)
        np.testing.assert_array_equal(found.logits, run(DENSE, None, **more)[0].logits)


def test_more_steps_may_get_another_filter(monkeypatch):
    """`auto` decides by the number of steps, too: kept kernels serve only if it would take the same filter again."""
    again = RefiningAgain()
    run(DENSE, again)
    assert run(DENSE.replace(**{"mean_field.num_iterations": 6}), again)[1] == 0
    plan = KeepingBackend.plan_filters

    def plan_another(self, image, spec, *more):
        found = plan(self, image, spec, *more)
        return found if spec.num_iterations < 9 else ("lattice",) * len(found)

    monkeypatch.setattr(KeepingBackend, "plan_filters", plan_another)
    assert run(DENSE.replace(**{"mean_field.num_iterations": 9}), again)[1] == 1


@pytest.mark.parametrize(("mask", "kind"), [(None, "labels"), (MASK, "logits")], ids=["labels", "logits"])
def test_each_step_is_shown_as_a_run_of_so_many_steps_has_it(mask, kind, monkeypatch):
    def used_before(*given, empty=np.empty, **named):
        """An array of anything, as it may be: of the last label."""
        array = empty(*given, **named)
        if array.dtype.kind == "f":
            array.flat = np.arange(array.size)
        return array

    monkeypatch.setattr(np, "empty", used_before)
    shown = []
    parameters = DENSE.replace(**{"mean_field.tolerance": 1e-9, "mean_field.num_iterations": 4})
    more = {"mask": mask}
    if kind == "labels":
        labels = np.array([0, 2, 4, 7], np.uint8)[PHANTOM.logits[:4].argmax(axis=0)]
        more |= {"logits": labels, "input_type": "labels"}
    run(parameters, RefiningAgain(lambda step, steps, labels: shown.append((step, steps, labels))), **more)
    assert [(step, steps) for step, steps, _ in shown] == [(1, 4), (2, 4), (3, 4)]
    for step, _, labels in shown:
        wanted, _ = run(parameters.replace(**{"mean_field.num_iterations": step}), None, **more)
        np.testing.assert_array_equal(labels, wanted.label_map)
    assert (shown[0][2] != shown[2][2]).any()


def test_a_run_that_is_stopped_leaves_kernels_that_can_be_used():
    again = RefiningAgain()

    def stop(stage, step, num_steps):
        if (stage, step) == ("mean field", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(DENSE, again, progress=stop)
    found, built = run(DENSE, again)
    assert built == 0
    np.testing.assert_array_equal(found.logits, run(DENSE, None)[0].logits)


def test_where_kept_kernels_do_not_fit_none_are_kept(monkeypatch):
    again = RefiningAgain()
    run(DENSE, again)

    run_kernels = CpuKernels.run

    def refuse(kernels, *arguments, **more):
        if kernels.is_kept:
            raise CapacityError("not enough memory")
        return run_kernels(kernels, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr("crfrefine.engines.cpu.CpuKernels.run", refuse)
        found, _ = run(DENSE, again)
    np.testing.assert_array_equal(found.logits, run(DENSE, None)[0].logits)
    assert run(DENSE, again)[1] == 1
