"""Nothing that was drawn is lost: strokes, notes and results of the page in their files."""

import errno
import json
import os
import shutil
import socket
import threading
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import run_here
from tune_helpers import (
    STROKE,
    UNCHANGED,
    new_session,
    options_for,
    states,
    whole_result,
    write_labeled,
)

from crfrefine.errors import CrfRefineError, InputError, StorageError
from crfrefine.io import read_volume, write_label_map
from crfrefine.tune import case, drawing, review, session
from crfrefine.tune.corrections import CORRECTED, SAVED, UNTOUCHED, Corrections
from crfrefine.tune.drawing import Drawing
from crfrefine.tune.edits import Edit
from crfrefine.tune.finding import find_cases_to_show
from crfrefine.tune.session import Session
from crfrefine.tune.worklist import Worklist


def test_a_stroke_of_a_tab_whose_case_is_no_longer_open_is_kept(worklist, options):
    worklist.open(1)
    assert worklist.edit(0, Session.draw, **STROKE)["state"] == CORRECTED
    assert worklist.describe()["open"] == 1
    assert new_session(options).drawing.values.any()
    worklist.open(0)
    assert worklist.session(0).drawing.values.any()


def test_a_stroke_that_is_sent_twice_is_drawn_once(worklist):
    for mark in ("one", "one", "two"):
        worklist.edit(0, Session.draw, **STROKE | {"mark": mark})
    for mark in ("three", "three", "four"):
        described = worklist.edit(0, Session.undo, mark=mark)
    assert described["can_undo"] is False


def test_a_full_disk_is_told_and_all_is_written_once_there_is_room(worklist, options, monkeypatch):
    def fails(path, content):
        raise StorageError(f"{path}: cannot be written: the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(drawing, "write_small_file", fails)
        patched.setattr(review, "write_small_file", fails)
        assert "the disk is full" in worklist.edit(0, Session.draw, **STROKE)["problem"]
        assert worklist.describe()["folder"]["num_lost"] == 1
        worklist.review(1, "done", "kept")
        assert worklist.describe()["folder"]["num_lost"] == 2
    assert not new_session(options).drawing.values.any()
    with monkeypatch.context() as patched:
        patched.setattr(review, "write_small_file", fails)
        assert "reviews.csv" in worklist.keep()["folder"]["problem"]
    folder = worklist.keep()["folder"]
    assert (folder["num_lost"], folder["problem"]) == (0, "")
    assert new_session(options).drawing.values.any()
    assert "b,done,kept" in (options.corrections / "reviews.csv").read_text()


def test_without_a_folder_one_is_offered_and_takes_all_strokes(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrections").mkdir()
    options = options_for(*study)
    worklist = Worklist(options, find_cases_to_show(options))
    for number in (0, 1):
        worklist.open(number)
        worklist.edit(number, Session.draw, **STROKE)
    folder = worklist.describe()["folder"]
    path = str(tmp_path / "corrections-2")
    assert folder == {"path": path, "is_used": False, "num_lost": 2, "problem": ""}
    assert worklist.keep_lost() == path
    worklist.in_case(1, Session.save_case, **UNCHANGED)
    assert states(worklist) == [CORRECTED, SAVED, UNTOUCHED]
    assert sorted(file.name for file in (tmp_path / "corrections-2" / "drawing").iterdir()) == [
        "a.json",
        "b.json",
    ]
    worklist.end()


def test_a_second_program_is_refused_until_the_first_has_ended(worklist, options):
    with pytest.raises(InputError, match=f"another crfrefine tune .*{os.getpid()}"):
        Worklist(options, find_cases_to_show(options))
    worklist.end()
    lock = options.corrections / ".crfrefine-tune.lock"
    assert not lock.exists()
    lock.write_text(json.dumps({"process": 1, "host": "another.machine"}))
    with pytest.raises(InputError, match=r"another\.machine.*\n.*remove"):
        Worklist(options, find_cases_to_show(options))
    lock.write_text(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
    Worklist(options, find_cases_to_show(options)).end()


# ---- In corners


def test_strokes_of_a_case_that_was_read_ahead_while_a_folder_was_taken_are_kept(
    study, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = options_for(*study)
    worklist = Worklist(options, find_cases_to_show(options))
    worklist.edit(0, Session.draw, **STROKE)
    is_reading = threading.Event()
    reads_on = threading.Event()

    def open_slowly(*arguments):
        is_reading.set()
        assert reads_on.wait(60)
        return case.open_case(*arguments)

    monkeypatch.setattr(session, "open_case", open_slowly)
    worklist.read_ahead(1)
    assert is_reading.wait(60)
    keeper = threading.Thread(target=worklist.keep)
    keeper.start()
    keeper.join(0.2)
    reads_on.set()
    keeper.join(60)
    worklist.open(1)
    worklist.edit(1, Session.draw, **STROKE)
    assert worklist.describe()["folder"]["num_lost"] == 0
    worklist.end()
    kept = sorted(path.name for path in (tmp_path / "corrections" / "drawing").iterdir())
    assert kept == ["a.json", "b.json"]


def test_notes_of_cases_that_a_run_does_not_have_stay(study, options, worklist):
    worklist.review(2, "to discuss", "third")
    worklist.end()
    inputs = find_cases_to_show(options)
    few = Worklist(options, inputs._replace(cases=inputs.cases[:1]))
    few.review(0, "done", "first")
    few.end()
    again = Worklist(options, inputs)
    reviews = [(entry["review"], entry["note"]) for entry in again.describe()["cases"]]
    again.end()
    assert reviews == [("done", "first"), ("to do", ""), ("to discuss", "third")]


def test_a_note_comes_back_as_long_as_one_may_be(worklist):
    worklist.review(0, "to do", "=" + 498 * "x")
    note = worklist.describe()["cases"][0]["note"]
    worklist.review(0, "done", note)
    assert worklist.describe()["cases"][0]["note"] == note
    with pytest.raises(InputError, match="at most 500 characters"):
        worklist.review(0, "done", "=" + 499 * "x")


def test_a_table_that_another_program_has_written_is_taken_or_told(worklist, options):
    """With a column of its own, and a state that the page does not know."""
    table = options.corrections / "reviews.csv"
    worklist.review(0, "done", "first")
    table.write_text(
        "case,state,note,reader\na,read twice,changed,ana\nb,to do,new,\nx,done,,ben\n"
    )
    worklist.review(1, "to discuss", None)
    assert [case["note"] for case in worklist.describe()["cases"]] == ["changed", "new", ""]
    assert worklist.describe()["cases"][0]["review"] == "read twice"
    assert table.read_text().splitlines() == [
        "case,state,note,reader",
        "a,read twice,changed,ana",
        "b,to discuss,new,",
        "c,to do,,",
        "x,done,,ben",
    ]
    table.write_bytes(b"case;state\xff")
    worklist.review(2, None, "kept")
    assert "move it away" in worklist.describe()["folder"]["problem"]
    assert table.read_bytes() == b"case;state\xff"
    table.unlink()
    assert worklist.keep()["folder"]["problem"] == ""
    assert "c,to do,kept," in table.read_text()


def test_notes_that_were_made_without_a_folder_are_written_with_the_strokes(
    study, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = options_for(*study)
    worklist = Worklist(options, find_cases_to_show(options))
    assert worklist.describe()["folder"]["num_lost"] == 0
    worklist.review(1, "done", "before")
    assert worklist.describe()["folder"]["num_lost"] == 1
    assert worklist.keep()["folder"]["num_lost"] == 0
    worklist.end()
    rows = (tmp_path / "corrections" / "reviews.csv").read_text().splitlines()
    assert rows == ["case,state,note", "a,to do,", "b,done,before", "c,to do,"]


def test_strokes_after_a_save_that_failed_are_there_again(worklist, options, monkeypatch):
    """The file of strokes was written, its result was not: nobody else has changed it."""
    opened = worklist.session(0)
    worklist.edit(0, Session.draw, **STROKE)
    refined = Corrections.of_case("a", options.corrections).refined
    refined.mkdir(parents=True)
    with pytest.raises(CrfRefineError):
        opened.save_case("", {})
    worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2, 2, 4], "value": 1})
    drawn = opened.drawing.values
    worklist.end()
    refined.rmdir()
    again = new_session(options)
    assert np.array_equal(again.drawing.values, drawn)
    assert not any("elsewhere" in note for note in again.describe()["notes"])


def test_a_case_that_was_saved_after_all_is_no_longer_told(worklist, options):
    worklist.edit(0, Session.draw, **STROKE)
    refined = Corrections.of_case("a", options.corrections).refined
    refined.mkdir(parents=True)
    worklist.save_all("", {})
    worklist.batch._saving.result(60)
    assert worklist.describe()["refused"].startswith("a: ")
    refined.rmdir()
    worklist.session(0).save_case("", {})
    assert worklist.describe()["refused"] == ""


def test_given_strokes_are_drawn_over_those_of_earlier_corrections_once(
    study, options, worklist, tmp_path
):
    worklist.edit(0, Session.draw, **STROKE)
    drawn = worklist.session(0).drawing.values
    worklist.end()
    like = read_volume(study[1] / "a.nii.gz")
    given = np.zeros(like.data.shape, np.uint8)
    given[1:3, 4, 5:8] = 2
    (tmp_path / "given").mkdir()
    write_label_map(tmp_path / "given" / "a.nii.gz", given, like.header)
    inputs = replace(options.inputs, strokes=(tmp_path / "given",))
    with_strokes = replace(options, inputs=inputs)
    for is_first in (True, False):
        opened = new_session(with_strokes)
        assert np.array_equal(opened.drawing.values, np.where(given > 0, given, drawn))
        assert any("drawn over" in note for note in opened.describe()["notes"]) == is_first
    opened.undo("")
    opened.results.is_left = True
    assert np.array_equal(new_session(with_strokes).drawing.values, drawn)


# ---- Several at once, and what is damaged


def test_two_saves_of_a_case_do_not_mix_their_files(worklist, options, monkeypatch):
    """Of a case that is opened while *Save all* writes it."""
    worklist.edit(0, Session.draw, **STROKE)
    open_session = worklist.session(0)
    other = worklist.kept.read(0)
    is_writing = threading.Event()
    writes_on = threading.Event()
    write = session.write_label_map

    def write_slowly(path, labels, *others, **named):
        if path.parent.name == "refined" and not is_writing.is_set():
            is_writing.set()
            assert writes_on.wait(60)
        write(path, labels, *others, **named)

    monkeypatch.setattr(session, "write_label_map", write_slowly)
    first = threading.Thread(target=other.save_case, args=("", {}))
    first.start()
    assert is_writing.wait(60)
    worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2, 2, 9], "value": 1})
    second = threading.Thread(target=open_session.save_case, args=("", {}))
    second.start()
    second.join(1)
    writes_on.set()
    first.join(60)
    second.join(60)
    assert states(worklist)[0] == SAVED
    refined = read_volume(Corrections.of_case("a", options.corrections).refined).data
    whole_result(open_session)
    np.testing.assert_array_equal(refined, open_session.shown.labels)


def test_a_case_is_saved_that_another_tab_has_left_meanwhile(worklist):
    worklist.edit(0, Session.draw, **STROKE)
    worklist.open(1)
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    assert states(worklist)[:2] == [SAVED, UNTOUCHED]
    assert worklist.describe()["open"] == 1


DAMAGED = {
    "nothing": b"",
    "half": b'{"grid": [15, 18, 11], "given": 0, "do',
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "a label": {"edits": [{"value": -3, "runs": [[5], [2]]}]},
    "a word": {"edits": [{"value": "liver", "runs": [[5], [2]]}]},
    "a place": {"edits": [{"value": 2, "runs": [[10**9], [2]]}]},
    "a place below": {"edits": [{"value": 2, "runs": [[-5], [2]]}]},
    "a place twice": {"edits": [{"value": 2, "runs": [[5, 5], [2, 2]]}]},
    "a number": {"done": 7},
    "another grid": {"grid": [27, 10, 11]},
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_drawing_is_told_with_its_remedy_and_stays_as_it_is(worklist, options, content):
    worklist.edit(1, Session.draw, **STROKE)
    worklist.end()
    path = Corrections.of_case("b", options.corrections).drawing
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_bytes()) | content).encode()
    path.write_bytes(content)
    again = Worklist(options, find_cases_to_show(options))
    try:
        with pytest.raises(InputError, match=r"b\.json: .*move it away"):
            again.open(1)
        assert again.describe()["open"] == 0
        again.save_all("", {})
        again.batch._saving.result(60)
        told = again.describe()["refused"]
        assert ("move it away" in told) == (states(again)[1] == CORRECTED)
    finally:
        again.end()
    assert path.read_bytes() == content


@pytest.mark.parametrize("num_damaged", [1, 3])
def test_damaged_drawings_of_the_first_cases_do_not_end_the_program(worklist, options, num_damaged):
    """Those with their undone strokes, or, of the first case of all, those that were saved."""
    files = [Corrections.of_case(name, options.corrections) for name in "abc"[:num_damaged]]
    worklist.edit(0, Session.draw, **STROKE)
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    kept = files[0].drawing.read_bytes()
    worklist.end()
    for corrections in files:
        corrections.drawing.write_bytes(b"{")
    again = Worklist(options, find_cases_to_show(options))
    try:
        described = again.describe()
        assert described["open"] == (1 if num_damaged == 1 else 0)
        assert "a: " in described["refused"]
        if num_damaged == 3:
            with pytest.raises(InputError, match="move it away"):
                again.session(0)
            files[0].drawing.write_bytes(kept)
        else:
            files[0].drawing.unlink()
            saved = files[0].strokes.read_bytes()
            files[0].strokes.write_bytes(b"no image")
            with pytest.raises(InputError, match="move it away"):
                again.open(0)
            files[0].strokes.write_bytes(saved)
            again.open(0)
        assert again.session(0).drawing.describe()["drawn"] == 2
    finally:
        again.end()


def test_a_result_of_an_image_that_was_exchanged_is_not_saved(tmp_path):
    """Between two runs, or while the case is open and before it is opened again."""
    folders, labels = write_labeled(tmp_path, "a", "b")
    options = replace(options_for(folders, labels), corrections=tmp_path / "corrections")
    first = Worklist(options, find_cases_to_show(options))
    first.edit(0, Session.draw, **STROKE)
    first.in_case(0, Session.save_case, **UNCHANGED)
    assert states(first) == [SAVED, UNTOUCHED]
    first.end()
    other = (folders.images / "b_0000.nii.gz").read_bytes()
    (folders.images / "a_0000.nii.gz").write_bytes(other)
    again = Worklist(options, find_cases_to_show(options))
    try:
        assert states(again) == [CORRECTED, UNTOUCHED]
        again.save_all("", {})
        again.batch._saving.result(60)
        assert states(again) == [SAVED, UNTOUCHED]
        (folders.images / "a_0000.nii.gz").write_bytes(other + bytes(1))
        again.open(1)
        again.open(0)
        assert states(again) == [CORRECTED, UNTOUCHED]
    finally:
        again.end()
    parameters = options.corrections / "parameters" / "a.toml"
    inputs = ("-i", folders.images, "-p", folders.logits, "-c", parameters)
    strokes = ("--strokes", options.corrections / "strokes", "--threads", 1)
    (folders.images / "a_0000.nii.gz").write_bytes(other)
    run_here("infer", *inputs, *strokes, "-o", tmp_path / "out", status=0)
    refined = read_volume(options.corrections / "refined" / "a.nii.gz").data
    np.testing.assert_array_equal(refined, read_volume(tmp_path / "out" / "a.nii.gz").data)


def test_a_folder_that_could_not_be_taken_whole_is_taken_at_the_next_try(
    study, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    options = options_for(*study)
    worklist = Worklist(options, find_cases_to_show(options))
    for number in (0, 1):
        worklist.edit(number, Session.draw, **STROKE)

    def is_full(self):
        raise InputError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Corrections, "check", is_full)
        with pytest.raises(InputError, match="full"):
            worklist.keep()
    folder = worklist.keep()["folder"]
    assert (folder["num_lost"], folder["problem"]) == (0, "")
    worklist.end()
    kept = sorted(path.name for path in (tmp_path / "corrections" / "drawing").iterdir())
    assert kept == ["a.json", "b.json"]


def test_a_folder_that_was_removed_is_made_again(worklist, options):
    worklist.edit(0, Session.draw, **STROKE)
    shutil.rmtree(options.corrections)
    assert worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2]})["problem"]
    assert worklist.keep()["folder"]["problem"] == ""
    assert new_session(options).drawing.describe()["drawn"] == 3


def test_a_lock_that_a_full_disk_does_not_take_is_told(options, monkeypatch):
    def is_full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", is_full)
        with pytest.raises(StorageError, match="the disk is full"):
            Worklist(options, find_cases_to_show(options))
    Worklist(options, find_cases_to_show(options)).end()


# ---- Files that another program writes while the page runs


def saved_strokes(worklist, path):
    """Draw and save a case; return the values of its strokes."""
    worklist.edit(0, Session.draw, **STROKE)
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    return read_volume(path).data


def change_strokes(path, voxels, value):
    """Draw in a file of strokes as another program does."""
    strokes = read_volume(path)
    values = strokes.data.astype(np.uint8)
    values[voxels] = value
    write_label_map(path, values, strokes.header)


@pytest.mark.parametrize("taken_by", ["look", "save", "open"])
def test_strokes_changed_elsewhere_and_those_drawn_since_are_both_kept(worklist, options, taken_by):
    files = Corrections.of_case("a", options.corrections)
    worklist.edit(0, Session.draw, **STROKE)
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2, 2, 9], "value": 1})
    expected = worklist.session(0).drawing.values.copy()
    elsewhere = np.s_[8:11, 2:4, 5:7]
    assert not expected[elsewhere].any()
    change_strokes(files.strokes, elsewhere, 2)
    expected[elsewhere] = 2
    if taken_by == "look":
        assert worklist.look(0, "")["drawn"] == np.count_nonzero(expected)
    elif taken_by == "open":
        worklist.open(1)
        worklist.open(0)
        assert "changed elsewhere" in worklist.session(0).describe()["notes"][-1]
    assert worklist.in_case(0, Session.save_case, **UNCHANGED)["strokes"][
        "drawn"
    ] == np.count_nonzero(expected)
    np.testing.assert_array_equal(read_volume(files.strokes).data, expected)
    assert states(worklist)[0] == SAVED
    assert worklist.edit(0, Session.undo, mark="")["drawn"] < np.count_nonzero(expected)


def save_strokes(path, values, affine):
    nib.save(nib.Nifti1Image(np.ascontiguousarray(values), affine), path)


def test_strokes_that_another_program_has_turned_are_taken_in_their_place(worklist, options):
    path = Corrections.of_case("a", options.corrections).strokes
    expected = saved_strokes(worklist, path).copy()
    expected[-1, 0, 0] = 2
    affine = nib.load(path).affine @ np.diag([-1, 1, 1, 1])
    affine[:3, 3] -= affine[:3, 0] * (len(expected) - 1)
    save_strokes(path, expected[::-1], affine)
    worklist.look(0, "")
    np.testing.assert_array_equal(worklist.session(0).drawing.values, expected)


@pytest.mark.parametrize("change", ["axes", "label"])
def test_strokes_that_infer_refuses_are_refused_and_stay(worklist, options, change):
    path = Corrections.of_case("a", options.corrections).strokes
    expected = saved_strokes(worklist, path).copy()
    affine = nib.load(path).affine
    written = np.swapaxes(expected, 0, 1)
    if change == "label":
        written = expected.copy()
        written[0, 0, 0] = 9
    save_strokes(path, written, affine)
    for act in (
        lambda: worklist.look(0, ""),
        lambda: worklist.in_case(0, Session.save_case, **UNCHANGED),
    ):
        with pytest.raises(CrfRefineError, match=r"strokes.a\.nii\.gz"):
            act()
    np.testing.assert_array_equal(worklist.session(0).drawing.values, expected)
    np.testing.assert_array_equal(read_volume(path).data, written)


def test_a_case_whose_saved_strokes_were_removed_is_to_be_saved_again(worklist, options):
    path = Corrections.of_case("a", options.corrections).strokes
    expected = saved_strokes(worklist, path).copy()
    path.unlink()
    assert states(worklist)[0] == CORRECTED
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    np.testing.assert_array_equal(read_volume(path).data, expected)


def test_strokes_that_another_program_left_unreadable_are_not_overwritten(worklist, options):
    files = Corrections.of_case("a", options.corrections)
    worklist.edit(0, Session.draw, **STROKE)
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    files.strokes.write_bytes(b"no image")
    for act in (
        lambda: worklist.look(0, ""),
        lambda: worklist.in_case(0, Session.save_case, **UNCHANGED),
    ):
        with pytest.raises(CrfRefineError, match=r"strokes.a\.nii\.gz"):
            act()
    assert files.strokes.read_bytes() == b"no image"
    files.drawing.write_bytes(b"{")
    assert (
        "changed elsewhere"
        in worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2]})["problem"]
    )
    assert files.drawing.read_bytes() == b"{"
    files.drawing.unlink()
    files.strokes.unlink()
    assert worklist.keep()["folder"]["problem"] == ""
    assert worklist.look(0, "")["drawn"] == new_session(options).drawing.describe()["drawn"] == 3


def test_a_drawing_that_another_program_has_written_is_taken(worklist, options):
    """From another machine, onto which the folder was copied."""
    file = Corrections.of_case("a", options.corrections).drawing
    worklist.edit(0, Session.draw, **STROKE)
    earlier = file.read_bytes()
    worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2, 2, 9], "value": 1})
    other = file.read_bytes()
    worklist.edit(0, Session.undo, mark="")
    file.write_bytes(other)
    assert (
        worklist.edit(0, Session.draw, **STROKE | {"path": [9, 9], "value": 2})["drawn"]
        == 2 + 8 + 1
    )
    file.write_bytes(earlier)
    assert worklist.look(0, "")["drawn"] == 2
    assert worklist.edit(0, Session.undo, mark="")["drawn"] > 2, "nothing is gone"


def test_a_result_that_another_program_has_changed_gets_another_name(worklist, options):
    refined = Corrections.of_case("a", options.corrections).refined
    worklist.edit(0, Session.draw, **STROKE)
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    worklist.in_case(0, Session.save_case, **UNCHANGED)
    assert not (options.corrections / "replaced").exists()
    change_strokes(refined, np.s_[1:3, 2:4, 5:7], 3)
    changed = refined.read_bytes()
    assert "-a.nii.gz now" in worklist.in_case(0, Session.save_case, **UNCHANGED)["saved"]
    (replaced,) = (options.corrections / "replaced").iterdir()
    assert replaced.read_bytes() == changed


def test_an_edit_that_is_sent_again_after_a_restart_is_done_once(worklist, options):
    worklist.edit(0, Session.draw, **STROKE | {"mark": "one"})
    worklist.edit(0, Session.draw, **STROKE | {"path": [2, 2], "mark": "two"})
    worklist.edit(0, Session.undo, mark="three")
    worklist.end()
    again = Worklist(options, find_cases_to_show(options))
    again.edit(0, Session.undo, mark="three")
    assert again.edit(0, Session.draw, **STROKE | {"path": [3, 3], "mark": "two"})["drawn"] == 2
    again.end()


def test_undo_and_redo_give_the_strokes_back_voxel_by_voxel(worklist, options):
    """Over each other, with labels beyond a byte, in a case that was left and read again."""
    drawing = worklist.session(0).drawing
    rng = np.random.default_rng(0)
    seen = [drawing.values]
    for number in range(12):
        voxels = np.unique(rng.integers(0, 900, 200))
        drawing.draw(Edit(voxels, int(rng.choice([0, 1, 2, 255, 300]))), str(number))
        seen.append(drawing.values)
        if number == 6:
            drawing.forget()
    for expected in seen[-2::-1]:
        drawing.undo()
        np.testing.assert_array_equal(drawing.values, expected)
        assert drawing.describe()["drawn"] == np.count_nonzero(expected)
    for expected in seen[1:]:
        drawing.redo()
        np.testing.assert_array_equal(drawing.values, expected)
    assert drawing.describe()["drawn"] == np.count_nonzero(seen[-1])
    file = Corrections.of_case("a", options.corrections).drawing
    read = Drawing.read(file, drawing.values.shape)
    np.testing.assert_array_equal(read.values, seen[-1])
    assert read.is_unsaved
