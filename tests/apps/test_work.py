"""What is computed when: the box, then all of the case, and only for the newest state."""

import threading

import numpy as np
import pytest
from tune_helpers import open_session, options_for, whole_result, write_large

from crfrefine.apps.tune.case import CaseRefiner
from crfrefine.engines.cpu import CpuBackend

PLACE = [20, 20, 20]
STEPS = {"mean_field.tolerance": 1e-9, "mean_field.num_iterations": 4, "mean_field.label_threshold": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_large(tmp_path_factory.mktemp("large"))


def test_a_box_is_refined_on_request_and_the_whole_case_replaces_it(folders):
    with open_session(options_for(*folders, **STEPS)) as session:
        first = session.refine(1, "", {}, PLACE, is_whole=False)["result"]
        labels, box = session.shown[0], session.case.stored_box(session.shown[1])
        assert (first["is_whole"], labels.shape) == (False, tuple(axis.stop - axis.start for axis in box))
        last, case = session.refine(1, "", {}, PLACE, is_whole=True)["result"], session.case
        assert (last["is_whole"], last["num_iterations"], session.shown[1]) == (True, 4, None)
        assert last["voxels_changed"] == np.count_nonzero(session.shown[0] != case.network_labels)


def test_a_newer_state_stops_an_older_one_and_the_older_answer_has_no_result(folders, monkeypatch):
    begun, may_go, answers = threading.Event(), threading.Event(), []
    refine = CaseRefiner.refine

    def slow(refiner, parameters, box, progress):
        if box is None:
            begun.set()
            assert may_go.wait(60)
        return refine(refiner, parameters, box, progress)

    monkeypatch.setattr(CaseRefiner, "refine", slow)
    with open_session(options_for(*folders, **STEPS)) as session:
        older = threading.Thread(target=lambda: answers.append(session.refine(5, "", {}, PLACE, is_whole=True)))
        older.start()
        assert begun.wait(60)
        newer = session.refine(6, "", {"bilateral.weight": 3.0}, PLACE, is_whole=False)
        assert newer["result"] is not None, "a box does not wait for the whole case"
        shown = session.shown
        may_go.set()
        older.join(60)
        assert answers == [{"is_stale": True}]
        assert session.refine(4, "", {}, PLACE, is_whole=True) == {"is_stale": True}
        assert session.shown is shown
    assert session.refine(7, "", {}, PLACE, is_whole=True) == {"is_stale": True}, "the page has ended"


def test_only_bandwidths_build_kernels(folders, monkeypatch):
    """Of the whole case: each change of another slider takes those that are there."""
    built, build = [], CpuBackend._build

    def count(self, image, *arguments, **more):
        built.append(image.values.shape[1:])
        return build(self, image, *arguments, **more)

    monkeypatch.setattr(CpuBackend, "_build", count)
    with open_session(options_for(*folders, **STEPS)) as session:
        whole, changes = tuple(reversed(session.case.network_labels.shape)), {}
        for change, builds in (
            ({}, 1),
            ({"bilateral.weight": 3.0, "mean_field.temperature": 1.5, "mean_field.num_iterations": 3}, 1),
            ({"volume.weight": 0.5}, 1),
            ({"bilateral.theta_alpha": 2.5}, 2),
            ({"postprocess.keep_largest": "foreground"}, 2),
        ):
            changes |= change
            whole_result(session, changes)
            assert built.count(whole) == builds, change
