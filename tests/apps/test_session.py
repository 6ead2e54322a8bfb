"""The state of the page: parameters, newest results, planes, saving."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import GRID_SHAPE, NUM_LABELS, run_here
from tune_helpers import open_session, options_for, whole_result, write_large

from crfrefine.apps.tune.planes import UNKNOWN, plane_bytes, stored_place, upright_box
from crfrefine.apps.tune.work import NewestOnly
from crfrefine.errors import ConfigError, InputError
from crfrefine.io import read_volume
from crfrefine.parameters.model import CrfParameters


@pytest.fixture
def session(folders, tmp_path):
    cases, labels = folders
    with open_session(options_for(cases, labels, output=tmp_path / "saved.toml")) as session:
        yield session


def test_what_is_saved_was_shown_and_infer_gives_the_same_labels(session, folders, tmp_path):
    shown = session.change({"bilateral.theta_alpha": 3.25, "bilateral.weight": 6.5, "mean_field.num_iterations": 7})
    result = whole_result(session)
    assert not (tmp_path / "saved.toml").exists(), "only on request"
    session.save()
    assert (tmp_path / "saved.toml").read_text() == shown["toml"]
    parameters = CrfParameters.load(tmp_path / "saved.toml")
    assert (parameters.bilateral[0].theta_alpha, parameters.bilateral[0].weight, parameters.mean_field.num_iterations) == (3.25, 6.5, 7)
    inputs = ("-i", folders[0].images, "-p", folders[0].logits, "-c", tmp_path / "saved.toml")
    run_here("infer", *inputs, "-o", tmp_path / "out", "--threads", 1, status=0)
    written = read_volume(tmp_path / "out" / "first.nii.gz").data
    np.testing.assert_array_equal(session._news.shown.labels, written)
    assert [row["after"] for row in result["labels"]] == [np.count_nonzero(written == label) for label in range(1, NUM_LABELS)]


def test_a_change_that_is_not_allowed_changes_nothing(session):
    before = session.describe()
    with pytest.raises(ConfigError, match=r"bilateral\.theta_alpha: must be greater than 0, got -1"):
        session.change({"bilateral.theta_alpha": -1.0})
    with pytest.raises(ConfigError, match="no such preset"):
        session.take_preset("../default")
    with pytest.raises(InputError, match="outside of the grid"):
        session.change({}, place=[0, 0, 99])
    assert session.describe()["grid"] == [GRID_SHAPE[1], GRID_SHAPE[0], GRID_SHAPE[2]]
    for number, index, modality in ((3, 0, 0), (0, GRID_SHAPE[2], 0), (0, 0, 2)):
        with pytest.raises(InputError, match="no such plane"):
            session.plane(number, index, modality)
    assert session.describe() == before


def test_an_error_of_the_computation_is_told_and_the_next_change_goes_on(session):
    session.change({"bilateral.weight": [1.0, 2.0]})
    version, error = 0, None
    while error is None:
        news = session.news(version, 60.0)
        version, error = news["version"], news["error"]
    assert "bilateral.weight" in error["text"]
    session.take_preset("")
    assert whole_result(session)["num_iterations"] > 0


def test_a_preset_can_be_taken_and_the_newest_change_is_saved_whoever_made_it(session, tmp_path):
    session.take_preset("default")
    assert CrfParameters.from_toml(session.describe()["toml"]) == CrfParameters.load("default")
    first = session.change({"bilateral.weight": 3.0})
    newest = session.change({"mean_field.num_iterations": 7})
    assert newest["number"] == first["number"] + 1
    saved = session.save()
    assert saved["toml"] == newest["toml"] == (tmp_path / "saved.toml").read_text()
    assert all(text in newest["toml"] for text in ("weight = 3.0", "num_iterations = 7"))
    assert whole_result(session)["number"] == newest["number"]


def test_without_an_output_nothing_is_saved_and_references_of_some_cases_are_enough(folders, tmp_path):
    (tmp_path / "second.nii.gz").write_bytes((folders[1] / "second.nii.gz").read_bytes())
    with open_session(options_for(folders[0], tmp_path)) as session:
        with pytest.raises(ConfigError, match=r"-o FILE\.toml"):
            session.save()
        assert session.case.labels is None
        assert all(row["dice_after"] is None for row in whole_result(session)["labels"]), "there is no reference"
    with open_session(replace(options_for(folders[0], tmp_path), first="second")) as session:
        assert session.describe()["has_reference"]
        assert session.describe()["case"] == "second"


def test_controls_have_plain_names_and_units_and_lists_one_per_entry(folders):
    for changes, units in (
        ({}, ["mm", "normalized", "mm"]),
        ({"mean_field.positions": "voxels", "intensity.normalization": "none"}, ["voxels", "", "voxels"]),
    ):
        with open_session(options_for(folders[0], **changes, **{"bilateral.theta_beta": [0.1, 0.2]})) as session:
            described = session.describe()["controls"]
        controls = {control["key"]: control for control in described}
        bandwidths = [controls[key] for key in ("bilateral.theta_alpha", "bilateral.theta_beta", "spatial.theta_gamma")]
        titles = [control["title"].split(" (")[0] for control in bandwidths]
        assert titles == ["neighborhood", "intensity difference", "smoothness neighborhood"]
        assert [control["unit"] for control in bandwidths] == units
        lists = [(one["place"], one["value"]) for one in described if one["key"] == "bilateral.theta_beta"]
        assert lists == [(0, [0.1, 0.2]), (1, [0.1, 0.2])]
        for control in described:
            if "low" in control:
                value = control["value"][control["place"]] if control["place"] is not None else control["value"]
                assert control["low"] <= value <= control["high"]


def test_planes_are_upright_and_refined_labels_stay_in_their_box(tmp_path):
    folders, labels = write_large(tmp_path)
    with open_session(options_for(folders, labels)) as session:
        case = session.case
    assert case.pose.flips != (False, False, False)
    box = (slice(10, 40), slice(5, 30), slice(20, 50))
    refined = np.full([30, 25, 30], 2, np.uint8)
    place = (25, 11, 33)  # of the upright grid, so that each plane meets the box
    assert all(axis.start <= at < axis.stop for axis, at in zip(upright_box(case, box), place, strict=True))
    spread = np.full(case.grid, UNKNOWN)
    spread[box] = refined
    for number, through in ((0, 2), (1, 1), (2, 0)):
        content = plane_bytes(case, refined, box, number, place[through], 0)
        columns, rows = (size for axis, size in enumerate(case.upright_grid) if axis != through)
        assert len(content) == 7 * rows * columns
        layers = np.frombuffer(content[: 6 * rows * columns], "<u2").reshape(3, rows, columns)
        for layer, array in zip(layers, (case.network_labels, spread, case.labels), strict=True):
            np.testing.assert_array_equal(layer, case.pose.turn(array).take(place[through], axis=through).T[::-1])
    marked = np.zeros(case.grid, bool)
    marked[stored_place(case, place)] = True
    assert np.argwhere(case.pose.turn(marked)).tolist() == [list(place)]


def test_of_waiting_jobs_only_the_newest_runs():
    may_go, ran, runner = threading.Event(), [], NewestOnly("test")
    started, ended = threading.Event(), threading.Event()

    def first():
        started.set()
        may_go.wait(30)
        ran.append("first")

    runner.submit(first)
    started.wait(30)
    for number in range(5):
        runner.submit(lambda number=number: (ran.append(number), ended.set()))
    may_go.set()
    ended.wait(30)
    runner.end()
    assert ran == ["first", 4]
