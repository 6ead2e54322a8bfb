"""The cases of the page: which one is open, which is read ahead, and what is saved of each."""

import json
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import run_here
from tune_helpers import (
    STROKE,
    UNCHANGED,
    Page,
    missing_server,
    new_session,
    open_page,
    options_for,
    states,
    whole_result,
    write_labeled,
)

from crfrefine.errors import CrfRefineError, InputError
from crfrefine.io import read_volume, write_label_map
from crfrefine.parameters.model import CrfParameters
from crfrefine.tune import session as session_module
from crfrefine.tune.batch import Batch
from crfrefine.tune.case import CaseRefiner
from crfrefine.tune.chosen import ChosenParameters
from crfrefine.tune.corrections import (
    CORRECTED,
    OUTDATED,
    SAVED,
    UNTOUCHED,
    Corrections,
    read_address,
    write_address,
)
from crfrefine.tune.finding import find_cases_to_show
from crfrefine.tune.kept import KeptCases
from crfrefine.tune.opened import OpenCase
from crfrefine.tune.session import Session
from crfrefine.tune.worklist import Worklist


def wait_for_count(worklist):
    worklist.batch._counting.result(60)
    return [entry["changed"] for entry in worklist.describe()["cases"]]


def test_cases_have_a_state_and_reopened_ones_their_strokes(worklist, options):
    assert states(worklist) == [UNTOUCHED] * 3
    session = worklist.session(0)
    session.draw(**STROKE)
    assert states(worklist) == [CORRECTED, UNTOUCHED, UNTOUCHED]
    session.save_case("", {})
    drawn = session.drawing.values
    whole_result(session)
    assert worklist.open(2)["open"] == 2
    assert states(worklist) == [SAVED, UNTOUCHED, UNTOUCHED]
    worklist.session(2).draw(**STROKE)
    assert states(worklist)[2] == CORRECTED
    worklist.open(0)  # What was not saved of the other case is kept.
    assert states(worklist) == [SAVED, UNTOUCHED, CORRECTED]
    reopened = worklist.session(0)
    assert reopened is not session
    np.testing.assert_array_equal(reopened.drawing.values, drawn)
    whole_result(reopened)
    refined = read_volume(Corrections.of_case("a", options.corrections).refined).data
    np.testing.assert_array_equal(reopened.shown[0], refined)
    with pytest.raises(InputError, match="another case is open now, a"):
        worklist.session(2)


def test_a_restart_begins_with_the_first_case_that_is_not_done(worklist, options):
    worklist.session(0).draw(**STROKE)
    worklist.session(0).save_case("", {})
    worklist.review(1, "done", "")
    worklist.end()
    for changes, number in (({}, 2), ({"first": "b"}, 1)):
        again = Worklist(replace(options, **changes), find_cases_to_show(options))
        assert again.describe()["open"] == number
        again.end()
    image = next(path for path in options.inputs.images[0].iterdir() if path.name.startswith("c_"))
    content = image.read_bytes()
    image.write_bytes(content[:100])  # It is passed by, so that the page starts.
    again = Worklist(options, find_cases_to_show(options))
    assert again.describe()["open"] == 0
    again.end()
    image.write_bytes(content)


def test_a_result_older_than_the_strokes_is_not_saved(options, worklist):
    """As after a kill between the two files."""
    session = worklist.session(0)
    session.draw(**STROKE)
    session.save_case("", {})
    files = Corrections.of_case("a", options.corrections)
    parameters = options.inputs.parameters
    assert files.state(parameters, session.stamp) == SAVED
    os.utime(files.refined, ns=(0, files.strokes.stat().st_mtime_ns - 1))
    assert files.state(parameters, session.stamp) == CORRECTED
    files.refined.unlink()
    assert files.state(parameters, session.stamp) == CORRECTED


def test_what_was_saved_with_other_parameters_is_told_and_saved_again(worklist, options):
    for number in (0, 1):
        worklist.open(number)
        worklist.session(number).draw(**STROKE)
        worklist.session(number).save_case("", {})
    changes = {"bilateral.weight": 3.0}
    worklist.choose(2, "", changes)
    worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2]})
    worklist.edit(2, Session.draw, **STROKE)
    assert states(worklist) == [CORRECTED, OUTDATED, CORRECTED]
    worklist.save_all("case", {})
    worklist.batch._saving.result(60)
    assert states(worklist) == [OUTDATED, OUTDATED, SAVED], "each with its own parameters"
    worklist.end()
    again = Worklist(options, find_cases_to_show(options))
    try:
        assert states(again) == [OUTDATED, OUTDATED, SAVED], "the folder has those of the page"
        again.save_anew("page", {})
        again.batch._saving.result(60)
        assert states(again) == [SAVED, SAVED, SAVED]
    finally:
        again.end()
    files = Corrections.of_case("a", options.corrections)
    assert "weight = 3.0" in files.parameters.read_text()


def test_parameters_are_those_of_the_folder_until_the_page_is_opened_with_others(worklist, options):
    """A saved case has its own; a damaged file is told, and stays as it is."""
    worklist.edit(0, Session.draw, **STROKE)
    worklist.in_case(0, Session.save_case, preset="", changes={"bilateral.weight": 2.0})
    worklist.choose(1, "case", {"bilateral.weight": 3.0})
    chosen = [worklist.kept.chosen.of_case(name).bilateral[0].weight for name in "abc"]
    assert chosen == [2.0, 3.0, 3.0]
    assert states(worklist)[0] == OUTDATED, "the page has others"
    worklist.choose(0, "case", {"bilateral.weight": 4.0})
    worklist.choose(1, "case", {"bilateral.weight": 2.0})
    assert states(worklist)[0] == OUTDATED, "others were chosen for it"
    worklist.choose(1, "case", {"bilateral.weight": 4.0})
    assert "weight = 4.0" in worklist.look(0, "")["toml"], "another tab learns it"
    worklist.end()
    again = Worklist(options, find_cases_to_show(options))
    chosen = [again.kept.chosen.of_case(name).bilateral[0].weight for name in "abc"]
    assert chosen == [4.0] * 3
    again.end()
    given = options.inputs.parameters.replace(**{"bilateral.weight": 5.0})
    others = replace(options, inputs=replace(options.inputs, parameters=given))
    again = Worklist(others, find_cases_to_show(others))
    chosen = [again.kept.chosen.of_case(name).bilateral[0].weight for name in "abc"]
    assert chosen == [4.0, 5.0, 5.0]
    again.end()
    file = options.corrections / "page.json"
    file.write_text("{")
    again = Worklist(options, find_cases_to_show(options))
    assert "move it away" in again.describe()["folder"]["problem"]
    again.choose(1, "case", {"bilateral.weight": 6.0})
    assert file.read_text() == "{"
    file.unlink()
    assert again.keep()["folder"]["problem"] == ""
    again.end()
    assert "weight = 6.0" in json.loads(file.read_text())["page"]


def test_strokes_changed_elsewhere_are_taken_and_those_drawn_here_come_back_by_undo(
    worklist, options
):
    session = worklist.session(0)
    session.draw(**STROKE)
    session.save_case("", {})
    session.draw(**STROKE | {"path": [0, 0], "value": 1})
    drawn = session.drawing.values
    worklist.end()
    files = Corrections.of_case("a", options.corrections)
    strokes = read_volume(files.strokes)
    edited = strokes.data.astype(np.uint8)
    edited[7, 8, 9] = 2
    write_label_map(files.strokes, edited, strokes.header)
    reopened = new_session(options)
    np.testing.assert_array_equal(reopened.drawing.values, edited)
    assert "changed elsewhere" in reopened.describe()["notes"][-1]
    while reopened.drawing.values[7, 8, 9]:
        reopened.undo("")
    reopened.undo("")
    np.testing.assert_array_equal(reopened.drawing.values, drawn)


def test_the_case_read_ahead_opens_with_its_result_and_is_read_once(worklist, monkeypatch):
    worklist.read_ahead(1)
    reading = worklist.opened._reading
    session = reading.result(60)
    worklist.opened._refining.result(60)
    assert session.number == 1
    worklist.read_ahead(1)
    assert worklist.opened._reading is reading
    expected = session.shown[0]
    assert session.shown.parameters is not None
    monkeypatch.setattr(CaseRefiner, "refine", None)
    worklist.open(1)
    assert worklist.session(1) is session
    assert whole_result(session)["is_whole"]
    assert session.shown[0] is expected


def test_the_result_of_a_case_that_is_no_longer_the_next_one_is_not_computed(worklist):
    worklist.session(0)._num_computing = 1  # The page waits, and so does what gives way to it.
    worklist.read_ahead(1)
    dropped = worklist.opened._reading.result(60)
    refining = worklist.opened._refining
    worklist.read_ahead(2)
    refining.result(60)
    assert dropped.shown.parameters is None


def test_a_case_is_not_read_ahead_where_memory_is_for_one(options):
    worklist = Worklist(options, find_cases_to_show(options))
    limited = replace(options.inputs, max_memory=1)
    worklist.kept.options = replace(options, inputs=limited)
    try:
        worklist.read_ahead(1)
        assert worklist.opened._reading.result(60) is None
    finally:
        worklist.end()


def test_a_case_that_cannot_be_read_leaves_the_open_one_open(tmp_path):
    folders, labels = write_labeled(tmp_path, "a", "b")
    damaged = folders.images / "b_0000.nii.gz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    options = options_for(folders, labels)
    worklist = Worklist(options, find_cases_to_show(options))
    try:
        session = worklist.session(0)
        worklist.read_ahead(1)
        for number, text in ((1, "b_0000"), (2, "no such case"), (-1, "no such case")):
            with pytest.raises(CrfRefineError, match=text):
                worklist.open(number)
            assert worklist.session(0) is session
        assert whole_result(session)["is_whole"]
        worklist.count_changes("", {})
        changed = wait_for_count(worklist)
        assert changed[0] > 0
        assert changed[1] is None
    finally:
        worklist.end()


def test_a_case_opens_while_the_result_of_the_one_that_is_left_is_computed(worklist):
    """The page of "a" waits for its whole result, and no request waits for that one."""
    left = worklist.session(0)
    left._num_computing = 1
    worklist.read_ahead(1)
    opener = threading.Thread(target=worklist.open, args=(1,), daemon=True)
    opener.start()
    opener.join(60)
    opened = worklist.session(1)
    assert left.refine(5, "", {}, (0, 0, 0), is_whole=True) == {"is_stale": True}
    # The result of "b" that was begun ahead is computed to its end, or anew.
    assert whole_result(opened)["is_whole"]


@pytest.fixture
def slow(monkeypatch):
    """Reading of the case "b" sets the first event, and waits for the second one."""
    begun = threading.Event()
    may_end = threading.Event()
    open_case = session_module.open_case

    def opened(files, *settings):
        if files.case_id == "b":
            begun.set()
            assert may_end.wait(60)
        return open_case(files, *settings)

    monkeypatch.setattr(session_module, "open_case", opened)
    yield begun, may_end
    may_end.set()


def test_no_request_waits_while_a_case_is_read(worklist, slow):
    begun, may_end = slow
    opener = threading.Thread(target=worklist.open, args=(1,))
    opener.start()
    assert begun.wait(60)
    assert worklist.describe()["open"] == 0
    assert worklist.review(0, "done", "")["open"] == 0
    assert worklist.keep()["open"] == 0
    # A case that is asked for later is open first, and stays open.
    assert worklist.open(2)["open"] == 2
    may_end.set()
    opener.join(60)
    assert worklist.describe()["open"] == 2
    assert whole_result(worklist.session(2))["is_whole"]


def test_a_case_that_was_read_while_a_folder_was_chosen_is_saved_in_it(
    options, tmp_path, slow, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    begun, may_end = slow
    without_folder = replace(options, corrections=None)
    worklist = Worklist(without_folder, find_cases_to_show(without_folder))
    try:
        opener = threading.Thread(target=worklist.open, args=(1,))
        opener.start()
        assert begun.wait(60)
        folder = tmp_path / "corrections"
        assert worklist.keep()["folder"]["path"] == str(folder)
        may_end.set()
        opener.join(60)
        worklist.edit(1, Session.draw, **STROKE)
        worklist.in_case(1, Session.save_case, **UNCHANGED)
        assert Corrections.of_case("b", folder).refined.exists()
    finally:
        worklist.end()


def test_changes_are_counted_as_infer_counts_them(worklist, study, options, tmp_path):
    changes = {"bilateral.weight": 6.0}
    worklist.choose(0, "", changes)
    worklist.count_changes("page", {})
    counted = wait_for_count(worklist)
    (tmp_path / "p.toml").write_text(options.inputs.parameters.replace(**changes).to_toml())
    inputs = ("-i", study[0].images, "-p", study[0].logits, "-c", tmp_path / "p.toml")
    summary = tmp_path / "summary.json"
    run_here("infer", *inputs, "-o", tmp_path / "out", "--summary", summary, status=0)
    cases = json.loads(summary.read_text())["cases"]
    assert counted == [case["voxels_changed"] for case in cases]
    assert len(set(counted)) > 1


def test_counting_gives_way_to_a_stroke_and_ends_with_the_page(worklist, monkeypatch):
    begun = threading.Event()
    give_way = worklist.batch._give_way

    def giving_way(*progress):
        begun.set()
        give_way(*progress)

    monkeypatch.setattr(worklist.batch, "_give_way", giving_way)
    worklist.session(0)._num_computing = 1  # as while a request waits for its result
    worklist.count_changes("", {})
    assert begun.wait(60)
    assert not worklist.describe()["cases"][0]["is_counted"]
    worklist.end()
    worklist.batch._counting.result(60)
    assert not worklist.describe()["cases"][0]["is_counted"]


@pytest.mark.skipif(bool(missing_server()), reason=missing_server() or "there is a server")
def test_requests_in_parallel_leave_a_whole_state(study, tmp_path):
    """Strokes of several tabs at once are all drawn, and a case saved meanwhile is whole."""
    arguments = ("-i", study[0].images, "-p", study[0].logits)
    with open_page(*arguments, "--corrections", tmp_path) as page:
        first_voxels = range(0, 15 * 11, 11)

        def draw(voxel):
            page.json("case/0/draw", {**STROKE, "path": [voxel % 15, voxel // 15]})
            page.json("case/0/save-case", {"preset": "", "changes": {}})

        threads = [threading.Thread(target=draw, args=(voxel,)) for voxel in first_voxels]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert page.json("case/0/undo", {"mark": ""})["drawn"] == len(first_voxels) - 1
    strokes = read_volume(tmp_path / "strokes" / "a.nii.gz").data
    assert 0 < np.count_nonzero(strokes) <= len(first_voxels)
    inputs = ("-c", "default", "--strokes", tmp_path / "strokes", "-o", tmp_path / "out")
    run_here("infer", *arguments, *inputs, "--threads", 1, status=0)
    refined = read_volume(tmp_path / "refined" / "a.nii.gz").data
    np.testing.assert_array_equal(refined, read_volume(tmp_path / "out" / "a.nii.gz").data)


@pytest.mark.skipif(bool(missing_server()), reason=missing_server() or "there is a server")
def test_a_kill_while_saving_leaves_whole_files(study, tmp_path):
    arguments = ("-i", study[0].images, "-p", study[0].logits)
    for delay in (0.0, 0.01, 0.03):
        with open_page(*arguments, "--corrections", tmp_path) as page:
            page.json("case/0/draw", STROKE)
            saving = threading.Thread(target=_save, args=(page,))
            saving.start()
            threading.Event().wait(delay)
            page.process.kill()
            saving.join(60)
        for path in tmp_path.rglob("*.nii.gz"):
            assert read_volume(path).data.any()
        with open_page(*arguments, "--corrections", tmp_path) as page:
            assert page.json("cases")["cases"][0]["state"] in ("corrected", "saved")


def _save(page: Page):
    try:
        page.json("case/0/save-case", {"preset": "", "changes": {}})
    except (OSError, AssertionError):  # The program is killed meanwhile.
        return


def test_each_part_of_the_work_runs_without_the_others(options):
    """Cases that are kept, one that is open, and what is done with all of them."""
    inputs = find_cases_to_show(options)
    kept = KeptCases(options, inputs)
    kept.review(2, None, "later")
    kept.read(1).draw(**STROKE)
    assert [kept.describe(number)["state"] for number in range(3)] == [
        UNTOUCHED,
        CORRECTED,
        UNTOUCHED,
    ]
    kept.release()

    def read(number):
        chosen = ChosenParameters(options.inputs.parameters, None)
        return session_module.Session(options, inputs, number, None, chosen)

    opened = OpenCase(read(0), read, read)
    opened.read_ahead(2)
    opened.open(2)
    assert opened.session(2).number == opened.number == 2
    opened.end()

    saved = []
    batch = Batch(inputs, options.inputs, lambda *progress: None)
    batch.save_all(saved.append)
    batch.count_changes(options.inputs.parameters)
    batch._saving.result(60)
    batch._counting.result(60)
    assert saved == [0, 1, 2]
    assert all(batch.describe(number, options.inputs.parameters)["changed"] for number in range(3))
    batch.end()


@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000])
def test_parameters_reach_the_output_though_their_file_in_the_folder_is_damaged(
    options, tmp_path, content
):
    output = tmp_path / "params.toml"
    (tmp_path / "page.json").write_bytes(content)
    chosen = ChosenParameters(options.inputs.parameters, output)
    chosen.keep_in(tmp_path)
    chosen.choose("a", "page", {"bilateral.weight": 3.25})
    assert CrfParameters.load(output) == chosen.of_page
    assert "move it away" in chosen.problem
    assert (tmp_path / "page.json").read_bytes() == content


def test_an_address_that_no_page_has_had_is_not_taken(tmp_path):
    path = tmp_path / ".crfrefine-tune.address"
    write_address(tmp_path, 8123, "a" * 32)
    assert read_address(tmp_path) == (8123, "a" * 32)
    for content in ('[8123, "../../../../aaaaaaaaaaaaaaaaaaaa"]', "[8123, 5]", "[" * 100_000):
        path.write_text(content)
        assert read_address(tmp_path) is None
