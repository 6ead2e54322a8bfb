"""The state of the page: parameters, newest results, planes, saving."""

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from unittest.mock import ANY
from urllib.parse import urlsplit

import numpy as np
import pytest
from cli_helpers import GRID_SHAPE, NUM_LABELS, run_here, save_nifti
from tune_helpers import (
    missing_server,
    open_page,
    open_session,
    options_for,
    whole_result,
    write_large,
)

from crfrefine.errors import ConfigError, InputError
from crfrefine.io import read_volume
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune.case import CaseRefiner
from crfrefine.tune.corrections import Corrections
from crfrefine.tune.slices import pack_plane

PLACE = [4, 5, 6]
VIEW = {"plane": 0, "place": PLACE, "modality": 0, "is_known": False}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return write_large(tmp_path_factory.mktemp("large"))


@pytest.fixture
def session(labeled_folders, tmp_path):
    cases, labels = labeled_folders
    with open_session(options_for(cases, labels, output=tmp_path / "saved.toml")) as session:
        yield session


def test_what_is_saved_was_shown_and_infer_gives_the_same_labels(
    session, labeled_folders, tmp_path
):
    changes = {
        "bilateral.theta_alpha": 3.25,
        "bilateral.weight": 6.5,
        "mean_field.num_iterations": 7,
    }
    shown = session.refine(1, "", changes, PLACE, is_whole=True)
    assert shown["toml"] == (tmp_path / "saved.toml").read_text(), "kept when they change"
    (tmp_path / "saved.toml").unlink()
    session.refine(2, "case", {}, PLACE, is_whole=True)
    assert not (tmp_path / "saved.toml").exists(), "they have not changed"
    assert session.save("case", {})["toml"] == (tmp_path / "saved.toml").read_text()
    parameters = CrfParameters.load(tmp_path / "saved.toml")
    assert (
        parameters.bilateral[0].theta_alpha,
        parameters.bilateral[0].weight,
        parameters.mean_field.num_iterations,
    ) == (3.25, 6.5, 7)
    inputs = (
        "-i",
        labeled_folders[0].images,
        "-p",
        labeled_folders[0].logits,
        "-c",
        tmp_path / "saved.toml",
    )
    run_here("infer", *inputs, "-o", tmp_path / "out", "--threads", 1, status=0)
    written = read_volume(tmp_path / "out" / "first.nii.gz").data
    np.testing.assert_array_equal(session.shown[0], written)
    assert [row["after"] for row in shown["result"]["labels"]] == [
        np.count_nonzero(written == label) for label in range(1, NUM_LABELS)
    ]


def test_a_state_that_is_not_allowed_changes_nothing_and_the_next_one_goes_on(session):
    labels = whole_result(session) and session.shown[0]
    for preset, changes, place, text in (
        (
            "",
            {"bilateral.theta_alpha": -1.0},
            PLACE,
            r"bilateral\.theta_alpha: must be greater than 0, got -1",
        ),
        ("../default", {}, PLACE, "no such preset"),
        ("", {}, [0, 0, 99], "outside of the grid"),
        ("", {}, [0, 0], "outside of the grid"),
        ("", {"bilateral.weight": [1.0, 2.0]}, PLACE, r"bilateral\.weight"),
    ):
        with pytest.raises((ConfigError, InputError), match=text):
            session.refine(1000, preset, changes, place, is_whole=True)
        assert session.shown[0] is labels
    assert session.describe()["grid"] == [GRID_SHAPE[1], GRID_SHAPE[0], GRID_SHAPE[2]]
    for changes in (
        {"plane": 3},
        {"place": [0, 0, GRID_SHAPE[2]]},
        {"place": [0]},
        {"modality": 2},
    ):
        with pytest.raises(InputError, match="no such"):
            session.plane(**VIEW | changes)
    assert session.refine(1001, "", {}, PLACE, is_whole=True)["result"]["num_iterations"] > 0
    changed = session.refine(2001, "default", {"bilateral.weight": 3.0}, PLACE, is_whole=True)
    assert CrfParameters.from_toml(changed["toml"]) == CrfParameters.load("default").replace(
        **{"bilateral.weight": 3.0}
    )


def unpack(content):
    """The header of a plane, and its arrays by name, as the page reads them."""
    line, _, rest = content.partition(b"\n")
    header = json.loads(line)
    shape = (header["rows"], header["columns"])
    size = header["rows"] * header["columns"]
    assert (len(line) + 1) % 8 == 0, "arrays of a browser are aligned"
    layers = {}
    start = 0
    for name, kind in header["layers"]:
        assert start % int(kind[1]) == 0, "arrays of a browser are aligned"
        layers[name] = np.frombuffer(rest, f"<{kind}", size, start).reshape(shape)
        start += layers[name].nbytes
    assert len(rest) == start
    return header, layers


def test_planes_are_upright_with_the_frame_of_a_box(large):
    with open_session(options_for(*large)) as session:
        case = session.case
    assert case.upright.mirrored
    box = (slice(5, 30), slice(10, 40), slice(20, 50))
    place = (25, 11, 33)  # Each plane meets the box.
    refined = case.network_labels.copy()
    refined[case.stored_box(box)] = 2
    label_maps = {"former": None, "reference": case.labels, "refined": refined.astype(np.uint16)}
    for number, through in ((0, 2), (1, 1), (2, 0)):
        content = pack_plane(case, number, place, label_maps | {"image": case.image[0]}, box)
        header, layers = unpack(content)

        def shown(array, through=through):
            return case.upright.apply(array).take(place[through], axis=through).T[::-1]

        assert header["layers"] == [["image", "f4"], ["refined", "u2"], ["reference", "u1"]]
        np.testing.assert_array_equal(layers["image"], shown(case.image[0]))
        np.testing.assert_array_equal(layers["refined"], shown(refined))
        np.testing.assert_array_equal(layers["reference"], shown(case.labels))
        top, bottom, left, right = header["frame"]
        differs = layers["refined"] != shown(case.network_labels)
        assert differs.any()
        differs[top:bottom, left:right] = False
        assert not differs.any()
    header, _ = unpack(pack_plane(case, 0, (25, 11, 60 - 1), label_maps, box))
    assert header["frame"] is None
    marked = np.zeros(case.network_labels.shape, bool)
    marked[case.stored_box([slice(at, at + 1) for at in place])] = True
    assert np.argwhere(case.upright.apply(marked)).tolist() == [list(place)]


def test_windows_begin_with_the_chosen_one_and_ct_has_its_usual_ones(session):
    windows = session.describe()["windows"][0]
    assert [window["name"] for window in windows] == ["automatic", "all values"]
    image = session.case.image[0]
    assert (windows[1]["low"], windows[1]["high"]) == (image.min(), image.max())
    image[...] = np.linspace(-1000, 1500, image.size).reshape(image.shape)
    names = [window["name"] for window in session.describe()["windows"][0]]
    assert names[1] == "all values"
    assert {"soft tissue", "lung", "bone", "brain", "liver"} == {*names} - {"all values"}


# ---- Strokes

STROKE = {
    "plane": 1,
    "place": PLACE,
    "path": [5, 2, 6, 2, 6, 3],
    "shape": "disk",
    "value": 3,
    "radius": 0.0,
    "within": {},
    "mark": "",
}


def strokes_with(drawn, *, can_undo=True, can_redo=False):
    state = {"drawn": drawn, "can_undo": can_undo, "can_redo": can_redo, "problem": ""}
    return {**state, "step": ANY}


def state_of(session, changes=()):
    """The state of the first case in its files."""
    corrections = Corrections.of_case("first", session._options.corrections)
    parameters = session._chosen.resolve(session.case.case_id, "", dict(changes))
    return corrections.state(parameters, session.stamp)


def test_strokes_are_undone_to_the_first_one_and_drawn_again(session):
    """A new stroke takes what was undone out of reach, and without any stroke a case is
    untouched.
    """
    values = [session.drawing.values]
    for value in (3, 1, 255):
        session.draw(**STROKE | {"value": value})
        values.append(session.drawing.values)
        assert session.drawing.is_unsaved
    for number in (2, 1, 0):
        session.undo("")
        np.testing.assert_array_equal(session.drawing.values, values[number])
    assert session.undo("") == strokes_with(0, can_undo=False, can_redo=True)
    assert not session.drawing.is_unsaved
    for number in (1, 2):
        session.redo("")
        np.testing.assert_array_equal(session.drawing.values, values[number])
    assert session.draw(**STROKE | {"value": 2}) == strokes_with(3)
    assert session.redo("") == strokes_with(3), "nothing is left to redo"


def test_the_labels_before_the_last_stroke_are_kept_to_compare(session):
    whole_result(session)
    before = session.shown[0]
    session.draw(**STROKE)
    whole_result(session)
    after = session.shown[0]
    assert (after != before).any()
    _, layers = unpack(session.plane(1, PLACE, 0, is_known=False))
    turned = session.case.plane(before, 1, PLACE).T[::-1]
    np.testing.assert_array_equal(layers["former"], turned)
    np.testing.assert_array_equal(layers["refined"], session.case.plane(after, 1, PLACE).T[::-1])
    session.draw(**STROKE | {"value": 1})
    _, layers = unpack(session.plane(1, PLACE, 0, is_known=True))
    np.testing.assert_array_equal(layers["former"], session.case.plane(after, 1, PLACE).T[::-1])


def test_a_result_that_is_known_is_not_computed_again(session, monkeypatch):
    first = whole_result(session)
    labels = session.shown[0]
    monkeypatch.setattr(CaseRefiner, "refine", None)
    assert whole_result(session) == first
    assert session.shown[0] is labels
    with pytest.raises(TypeError):
        whole_result(session, {"bilateral.weight": 3.0})


def test_blocks_are_looked_for_once_in_the_whole_map(labeled_folders, monkeypatch):
    folders, labels = labeled_folders
    with open_session(options_for(folders._replace(logits=labels))) as session:
        monkeypatch.setattr("crfrefine.refinement.opening.find_network_spacing", None)
        assert whole_result(session)["is_whole"]


@pytest.mark.parametrize("input_type", ["auto", "labels"])
def test_strokes_are_kept_in_a_folder_and_infer_gives_the_labels_that_were_shown(
    labeled_folders, tmp_path, input_type
):
    cases, labels = labeled_folders
    network = (cases.logits, labels)[input_type == "labels"]
    folder = tmp_path / "corrections"
    options = options_for(cases)
    options = replace(
        options,
        inputs=replace(options.inputs, logits=(network,), input_type=input_type),
        corrections=folder,
    )
    with open_session(options) as session:
        before = whole_result(session) and session.shown[0]
        assert session.draw(**STROKE) == strokes_with(3)
        background = STROKE | {"path": [7, 3, 7, 3], "value": 255}
        assert session.draw(**background) == strokes_with(4)
        assert session.draw(**STROKE | {"value": 0}) == strokes_with(1)
        assert session.undo("") == strokes_with(4, can_redo=True)
        whole_result(session)
        shown = session.shown[0]
        drawn = session.drawing.values
        assert (shown != before).any()
        assert sorted(drawn[drawn > 0]) == [3, 3, 3, 255]
        np.testing.assert_array_equal(
            session.case.plane(shown, 1, PLACE)[[5, 6, 6, 7], [2, 2, 3, 3]], [3, 3, 3, 0]
        )
        assert state_of(session) == "corrected"
        session.save_case("", {})
        assert state_of(session) == "saved"
        assert state_of(session, {"bilateral.weight": 3.0}) == "outdated"
    np.testing.assert_array_equal(read_volume(folder / "refined" / "first.nii.gz").data, shown)
    inputs = (
        "-i",
        cases.images,
        "-p",
        network,
        "--input-type",
        input_type,
        "-c",
        folder / "parameters" / "first.toml",
        "--strokes",
        folder / "strokes",
    )
    run_here("infer", *inputs, "-o", tmp_path / "out", "--threads", 1, status=0)
    np.testing.assert_array_equal(read_volume(tmp_path / "out" / "first.nii.gz").data, shown)
    with open_session(options) as session:
        np.testing.assert_array_equal(session.drawing.values, drawn)
        assert state_of(session) == "saved"
        assert session.redo("") == strokes_with(1), "what was undone is kept, too"
        for _ in range(3):
            session.undo("")
        assert session.undo("") == strokes_with(0, can_undo=False, can_redo=True)
        assert state_of(session) == "corrected"


def test_strokes_that_make_no_sense_change_nothing(session):
    for changes in (
        {"plane": 3},
        {"place": [0, 0, 99]},
        {"path": []},
        {"path": [5, 2, 6]},
        {"path": [5, 10**9]},
        {"shape": "cube"},
        {"radius": -1.0},
        {"within": {"modality": 0, "low": 1e9, "high": 2e9}},
        {"value": NUM_LABELS},
    ):
        with pytest.raises(InputError, match=r"no such|expected|nothing is drawn"):
            session.draw(**STROKE | changes)
    assert not session.drawing.values.any()
    with pytest.raises(ConfigError, match="--corrections FOLDER"):
        session.save_case("", {})


# ---- What is computed when: the box, then all of the case, and only for the newest state

CENTER = [20, 20, 20]
STEPS = {
    "mean_field.tolerance": 1e-9,
    "mean_field.num_iterations": 4,
    "mean_field.label_threshold": 0.0,
}


def test_a_large_case_is_refined_around_strokes_and_as_a_whole_when_it_is_saved(
    large, tmp_path, monkeypatch
):
    monkeypatch.setattr("crfrefine.tune.results.LARGE", 0)
    monkeypatch.setattr("crfrefine.tune.results.MAX_SECONDS", 0.0)
    options = replace(options_for(*large), corrections=tmp_path / "kept")
    with open_session(options) as session:
        network = session.case.network_labels
        assert session.describe()["is_large"]
        session.refine_ahead(lambda *progress: None)
        assert session.shown.labels is network, "nothing is computed ahead"
        boxes = []
        drawn = []
        for counter, place in enumerate(([8, 10, 30], [45, 60, 30])):
            stroke = {"plane": 0, "place": place, "path": place[:2], "value": 1}
            session.draw(**STROKE | stroke)
            answer = session.refine(counter, "", {}, place, is_whole=False)
            assert not answer["result"]["is_whole"]
            boxes.append(session.case.stored_box(session.shown.box))
            drawn.append(session.case.upright.apply(session.shown.labels)[tuple(place)])
        assert drawn == [1, 1], "an answer stays when the next one comes"
        outside = session.shown.labels != network
        assert outside.any()
        for box in boxes:
            outside[box] = False
        assert not outside.any()
        saved = session.save_case("", {})
        assert saved["result"]["is_whole"]
        assert session.results.is_large
        monkeypatch.setattr("crfrefine.tune.results.MAX_SECONDS", 1e9)
        assert not session.results.is_large, "by its seconds, once they are measured"
        shown = session.shown.labels
    inputs = ("-i", large[0].images, "-p", large[0].logits, "--threads", 1)
    parameters = ("-c", tmp_path / "kept" / "parameters" / "large.toml")
    strokes = ("--strokes", tmp_path / "kept" / "strokes")
    run_here("infer", *inputs, *parameters, *strokes, "-o", tmp_path / "out", status=0)
    written = read_volume(tmp_path / "out" / "large.nii.gz").data
    np.testing.assert_array_equal(shown, written)
    refined = read_volume(tmp_path / "kept" / "refined" / "large.nii.gz").data
    np.testing.assert_array_equal(refined, written)


def test_a_box_that_is_mostly_drawn_leaves_its_answer_to_the_whole_case(large, tmp_path):
    """Half of a case may not be drawn, but a structure may be filled."""
    with open_session(options_for(*large)) as session:
        place = session.case.first_place()
        outline = {"plane": 0, "shape": "outline", "value": 255, "radius": 0.0, "within": {}}
        size = session.case.upright_grid
        path = [0, 0, size[0] - 1, 0, size[0] - 1, size[1] - 1, 0, size[1] - 1]
        for through in range(size[2] // 3):
            session.draw(**outline, place=[*place[:2], through], path=path, mark="")
        session.refine(1, "", {}, place, is_whole=False)
        assert session.refine(1000, "", {}, place, is_whole=True)["result"]["is_whole"]


def test_a_save_does_not_show_parameters_that_the_page_has_left(large, tmp_path, monkeypatch):
    options = replace(options_for(*large), corrections=tmp_path / "kept")
    with open_session(options) as session:
        refine = session.results._refiner.refine

        def meanwhile(*arguments):
            changes = {"bilateral.weight": 9.0}
            session.refine(1, "", changes, session.case.first_place(), is_whole=False)
            return refine(*arguments)

        monkeypatch.setattr(session.results._refiner, "refine", meanwhile)
        assert session.save_case("", {})["result"] is None
        assert session.shown.box is not None


def test_a_newer_state_stops_an_older_one_and_the_older_answer_has_no_result(large, monkeypatch):
    begun = threading.Event()
    may_go = threading.Event()
    answers = []
    refine = CaseRefiner.refine

    def slow(refiner, parameters, progress, strokes):
        begun.set()
        assert may_go.wait(60)
        return refine(refiner, parameters, progress, strokes)

    monkeypatch.setattr(CaseRefiner, "refine", slow)
    with open_session(options_for(*large, **STEPS)) as session:
        older = threading.Thread(
            target=lambda: answers.append(session.refine(0, "", {}, CENTER, is_whole=True))
        )
        older.start()
        assert begun.wait(60)
        newer = session.refine(0, "", {"bilateral.weight": 3.0}, CENTER, is_whole=False)
        assert newer["result"] is not None, "a box does not wait for the whole case"
        shown = session.shown
        may_go.set()
        older.join(60)
        assert answers == [{"is_stale": True}]
        assert session.refine(0, "", {}, CENTER, is_whole=True) == {"is_stale": True}
        assert session.shown is shown
    assert session.refine(newer["counter"], "", {}, CENTER, is_whole=True) == {"is_stale": True}, (
        "the page has ended"
    )


needs_server = pytest.mark.skipif(
    bool(missing_server()), reason=missing_server() or "there is a server"
)


def arguments(labeled_folders):
    return (
        "-i",
        labeled_folders[0].images,
        "-p",
        labeled_folders[0].logits,
        "-l",
        labeled_folders[1],
    )


def test_without_the_extra_the_error_names_it(monkeypatch, labeled_folders):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "crfrefine.tune.server", raising=False)
    done = run_here("tune", *arguments(labeled_folders), status=1)
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "crfrefine: error: the page of tune needs starlette and uvicorn: pip install "
        "'crfrefine[tune]' ("
    )


@needs_server
def test_bad_inputs_are_told_in_a_line_and_no_page_opens(labeled_folders, tmp_path):
    images = ("-i", labeled_folders[0].images)
    logits = ("-p", labeled_folders[0].logits)
    labels = ("-l", labeled_folders[1])
    other = save_nifti(tmp_path / "first_0000.nii.gz", np.zeros((4, 5, 6)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for given, text in (
            ((*images, "--case", "third"), "--case third: no such case; there are first, second"),
            ((*images, "-c", "nowhere"), "nowhere: no such file or preset"),
            ((*images, "-l", "nowhere"), "nowhere"),
            ((*images, *labels, "-o", "/proc/params.toml"), "cannot be written: "),
            ((*images, "--device", "cuda:77"), "--device cuda:77"),
            ((*images, "--max-memory", "9KiB"), "Crop the volume, or raise it"),
            ((*images, "--no-browser", "--port", taken.getsockname()[1]), "any free port is taken"),
            (("-i", other, "-p", labeled_folders[0].logits / "first.nii.gz"), "different grids"),
        ):
            done = run_here("tune", *given, *(() if "-p" in given else logits))
            assert (done.status, done.stdout) == (1, "")
            assert text in done.stderr, given


STATE = {"counter": 1, "preset": "", "changes": {}, "place": [0, 0, 0], "is_whole": True}
SENSELESS = (
    *(
        b"",
        b"[]",
        b"{}",
        b"[" * 9999,
        {**STATE, "more": 1},
        {**STATE, "counter": "1"},
        {**STATE, "changes": 3},
    ),
    *(
        {**STATE, "changes": {"a": 1}},
        {**STATE, "place": "x"},
        {**STATE, "place": [0, 0, "x"]},
        {**STATE, "preset": []},
    ),
)


@needs_server
def test_only_the_right_address_gets_answers_and_they_forbid_what_the_page_does_not_need(
    labeled_folders,
):
    with open_page(*arguments(labeled_folders)) as page:
        assert page.ask("cases")[0] == 200
        for token in ("", "x", page.address.split("/")[3][:-1]):
            status, content, _ = page.ask("cases", token=token)
            assert status == 403
            assert b"first" not in content
        for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
            assert page.ask("cases", host=host)[0] == 400
        assert page.ask("cases", host="localhost:8000")[0] == 200, "as through a tunnel"
        for name in ("", "tune.js", "cases", "nowhere", "case/0/describe", "case/0/plane/0?9"):
            _, _, headers = page.ask(name)
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
        for origin, status in (
            ("https://evil.example", 403),
            ("http://127.0.0.1:1", 403),
            ("null", 403),
            (page.address.rpartition("/")[0].rpartition("/")[0], 200),
        ):
            assert page.ask("cases", origin=origin)[0] == status
        status, content, _ = page.ask("case/0/draw", b" " * (17 << 20))
        assert (status, b"at most" in content) == (400, True)
        for number in ("1", "7"):
            status, content, _ = page.ask(f"case/{number}/refine", STATE)
            assert (status, b"another case is open" in content) == (400, True)
        for sent in ({"number": 2}, {"number": -1}, {"number": "1"}):
            assert page.ask("open", sent)[0] == 400
        for sent in SENSELESS:
            status, content, _ = page.ask("case/0/refine", sent)
            assert (status, bool(json.loads(content)["error"])) == (400, True), sent
        page.json("case/0/refine", STATE)
        page.process.send_signal(signal.SIGINT)
        assert page.process.wait(30) == 130
        told = page.process.stderr.read().splitlines()
        assert told[-1] == "crfrefine: interrupted"
        assert told[0].startswith("images: 2 modalities; network's output: ")
        assert told[0].endswith("; reference: label map")
        assert all(line.startswith("crfrefine: ") for line in told[1:])


@needs_server
def test_the_browser_gets_an_address_that_leads_to_the_page_once(labeled_folders, tmp_path):
    """Other users may read the command line of the browser."""
    seen = tmp_path / "seen"
    program = tmp_path / "browser"
    program.write_text(f'#!/bin/sh\necho "$1" > {seen}.part && mv {seen}.part {seen}\n')
    program.chmod(0o755)
    environment = {**os.environ, "BROWSER": f"{program} %s", "DISPLAY": ":99"}
    environment.pop("SSH_CONNECTION", None)
    with open_page(*arguments(labeled_folders), "--browser", env=environment) as page:
        token = page.address.split("/")[3]
        while not seen.exists():
            time.sleep(0.05)
        ticket = seen.read_text().strip().split("/")[3]
        assert ticket != token
        status, _, headers = page.ask("", token=ticket)
        assert (status, headers["location"]) == (303, f"/{token}/")
        assert page.ask("", token=ticket)[0] == 403


@needs_server
def test_the_page_ends_at_once_and_silently_in_a_step_that_takes_long(large):
    slow = ("--set", "mean_field.filter=exact")
    inputs = ("-i", large[0].images, "-p", large[0].logits)
    with open_page(*inputs, *slow) as page:
        state = {**STATE, "place": CENTER}
        waiting = threading.Thread(target=_ask_silently, args=(page, "case/0/refine", state))
        waiting.start()
        time.sleep(1)
        assert waiting.is_alive(), "the step takes long"
        page.json("end", {})
        assert page.process.wait(15) == 0
        waiting.join(15)
        told = page.process.stderr.read().splitlines()
        assert all(line.startswith("crfrefine: ") for line in told[1:]), told


def _ask_silently(page, name, sent):
    with suppress(OSError, http.client.HTTPException):
        page.ask(name, sent)


@needs_server
def test_a_request_without_a_host_is_refused_silently(labeled_folders):
    with open_page(*arguments(labeled_folders)) as page:
        parts = urlsplit(page.address)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            request = f"GET {parts.path}cases HTTP/1.0\r\nOrigin: http://evil.example\r\n\r\n"
            connection.sendall(request.encode())
            answer = connection.makefile("rb").readline()
        assert b" 40" in answer
        page.json("end", {})
        assert page.process.wait(30) == 0
        assert "Traceback" not in page.process.stderr.read()
