"""What is shown when: the box, then steps of the whole case, which are called preliminary, then all of it."""

import numpy as np
import pytest
from tune_helpers import open_session, options_for, whole_result, write_large

from crfrefine.apps.tune import work
from crfrefine.engines.cpu import CpuBackend

STEPS = {"mean_field.tolerance": 1e-9, "mean_field.num_iterations": 4, "mean_field.label_threshold": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_large(tmp_path_factory.mktemp("large"))


@pytest.fixture
def shown(monkeypatch):
    published = []
    publish = work.News.publish

    def record(news, result, working):
        published.append((result, working))
        publish(news, result, working)

    monkeypatch.setattr(work.News, "publish", record)
    return published


def test_steps_are_shown_with_the_box_until_all_of_it_is_there(folders, shown, monkeypatch):
    monkeypatch.setattr(work, "STEP_SECONDS", 0.0)
    with open_session(options_for(*folders, **STEPS)) as session:
        result, case = whole_result(session), session.case
    assert result["step"] is None
    steps = [(True, 1), (True, 2), (True, 3)]
    assert [(found.facts["is_whole"], found.facts["step"]) for found, _ in shown] == [(False, None), *steps, (True, None)]
    assert [working for _, working in shown] == ["whole"] * 4 + [""]
    box = shown[0][0].box
    final = shown[-1][0].labels
    for found, _ in shown[1:-1]:
        assert found.facts["num_steps"] == 4
        assert found.facts["box"] == shown[0][0].facts["box"], "the frame stays"
        assert "energy" not in found.facts
        assert "converged" not in found.facts
        np.testing.assert_array_equal(found.labels[box], shown[0][0].labels)
        assert found.facts["voxels_changed"] == np.count_nonzero(found.labels != case.network_labels)
    differing = [np.count_nonzero(found.labels != final) for found, _ in shown[1:-1]]
    assert differing[0] > differing[-1]
    shown.clear()
    monkeypatch.setattr(work, "STEP_SECONDS", 60.0)
    with open_session(options_for(*folders, **STEPS)) as session:
        whole_result(session)
    assert [found.facts["step"] for found, _ in shown] == [None, None], "quick cases show no steps"


def test_only_bandwidths_build_kernels(folders, monkeypatch):
    """Of the whole case: each change of another slider takes those that are there."""
    built, build = [], CpuBackend.kernels

    def count(self, image, *arguments, **more):
        built.append(image.values.shape[1:])
        return build(self, image, *arguments, **more)

    monkeypatch.setattr(CpuBackend, "kernels", count)
    with open_session(options_for(*folders, **STEPS)) as session:
        whole = tuple(reversed(session.case.grid))
        for change, builds in (
            ({}, 1),
            ({"bilateral.weight": 3.0, "mean_field.temperature": 1.5, "mean_field.num_iterations": 3}, 1),
            ({"volume.weight": 0.5, "volume.keep": "largest"}, 1),
            ({"bilateral.theta_alpha": 2.5}, 2),
            ({"postprocess.keep_largest": "foreground"}, 2),
        ):
            session.change(change)
            whole_result(session)
            assert built.count(whole) == builds, change
