"""What is shown when: the box, then all of the case."""

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


def test_the_box_is_shown_first_and_then_the_whole_case(folders, shown):
    with open_session(options_for(*folders, **STEPS)) as session:
        result, case = whole_result(session), session.case
    assert [found.facts["is_whole"] for found, _ in shown] == [False, True]
    assert [working for _, working in shown] == ["whole", ""]
    (first, _), (last, _) = shown
    assert first.labels.shape == tuple(axis.stop - axis.start for axis in first.box)
    assert last.facts["voxels_changed"] == np.count_nonzero(last.labels != case.network_labels)
    assert (result["num_iterations"], result["box"]) == (4, None)


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
