"""`crfrefine infer`: every option does what the interface says, on small cases written by nibabel;
and `crfrefine demo`.
"""

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import (
    AFFINE,
    FAST,
    GRID_SHAPE,
    NUM_LABELS,
    SPACING,
    command,
    files_in,
    infer,
    load_nifti,
    refined,
    run_here,
    run_process,
    save_nifti,
    statuses,
    summary_of,
    write_folders,
)
from oracles import softmax

from crfrefine.metrics.overlap import MaskPair
from crfrefine.records.records import RECORD_FOLDER


@pytest.fixture
def one(tmp_path):
    return write_folders(tmp_path, "a")


def test_the_process_writes_each_case_on_its_grid_and_results_alone_to_standard_output(folders):
    plain = run_process("infer", *folders.arguments, status=0)
    assert files_in(folders.output) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    written = nib.load(folders.output / "b.nii.gz")
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(written.affine, nib.load(folders.images / "b_0000.nii.gz").affine)
    np.testing.assert_array_equal(
        load_nifti(folders.output / "b.nii.gz"),
        refined(folders, "b", {"mean_field.filter": "auto"}),
    )
    lines = plain.stdout.splitlines()
    assert lines[0].split("\t") == ["case", "status", "steps", "changed", "seconds", "output"]
    assert [line.split("\t")[-1] for line in lines[1:]] == [
        str(folders.output / f"{case_id}.nii.gz") for case_id in "abc"
    ]
    assert [
        re.match(rf"\d\d:\d\d:\d\d \[{n}/3\] ", line) is not None
        for n, line in enumerate(plain.stderr.splitlines()[-4:-1], start=1)
    ] == [True] * 3
    assert "\x1b" not in plain.stdout + plain.stderr


def test_the_device_is_told_only_where_it_does_not_go_without_saying(one, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for options, expected in (
        ((), "1 case; 1 thread"),
        (("-v",), "1 case; device cpu (auto), 1 thread"),
        (("-v", "--device", "cpu"), "1 case; device cpu, 1 thread"),
    ):
        result = infer(one, "--threads", 1, *options, status=0)
        assert expected in result.stderr.splitlines()


def test_single_files(folders, tmp_path):
    inputs = []
    target = tmp_path / "new" / "refined.nii"
    for label, scores in enumerate(folders.scores("a")):
        inputs += ["-p", save_nifti(tmp_path / f"l{label}.nii.gz", scores)]
    for modality in (0, 1):
        inputs += ["-i", folders.images / f"a_{modality:04d}.nii.gz"]
    run_here("infer", *inputs, "-o", target, "--save-probabilities", "--preview", *FAST, status=0)
    assert files_in(target.parent) == [
        "refined.nii",
        "refined_preview.png",
        "refined_probabilities.nii.gz",
    ]
    np.testing.assert_array_equal(load_nifti(target), refined(folders, "a"))


def test_summary_has_a_record_of_each_case(folders):
    (folders.logits / "b.nii.gz").write_bytes(b"")
    path = folders.output.with_name("summary.json")
    result = infer(
        folders,
        "--summary",
        path,
        "--save-probabilities",
        "--preview",
        "--max-memory",
        "256MiB",
        "-v",
        status=1,
    )
    assert all(words in result.stderr for words in ("device cpu (auto)", "bilateral", "read "))
    summary = json.loads(path.read_text())
    expected = {
        "num_cases": 3,
        "num_done": 2,
        "num_skipped": 0,
        "num_failed": 1,
        "interrupted": False,
    }
    assert (
        summary.items()
        >= {**expected, "max_memory": 1 << 28, "max_memory_source": "--max-memory"}.items()
    )
    done, failed, _ = summary["cases"]
    assert set(done) == set(failed)
    argmax = folders.scores("a").argmax(axis=0)
    found = load_nifti(folders.output / "a.nii.gz")
    np.testing.assert_array_equal(found, refined(folders, "a"))
    expected = {
        **{
            "status": "done",
            "error": None,
            "logits": None,
            "grid_shape": list(GRID_SHAPE),
            "num_labels": NUM_LABELS,
            "num_modalities": 2,
        },
        "output": str(folders.output / "a.nii.gz"),
        "probabilities": str(folders.output / "a_probabilities.nii.gz"),
        "spacing": pytest.approx(SPACING),  # column norms of an affine that NIfTI keeps as float32
        "voxels_changed": (argmax != found).sum(),
        "voxels_before": np.bincount(argmax.ravel(), minlength=NUM_LABELS).tolist(),
        "voxels_after": np.bincount(found.ravel(), minlength=NUM_LABELS).tolist(),
    }
    assert {name: done[name] for name in expected} == expected
    assert len(done["energy"]) == done["num_iterations"]
    assert {"read", "refine", "write"} <= set(done["times"])
    assert (failed["status"], failed["output"], failed["error_kind"]) == (
        "failed",
        None,
        "UnsupportedFormatError",
    )
    assert "b.nii.gz" in failed["error"]
    values = load_nifti(done["probabilities"])
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.argmax(axis=-1), found)
    # Four float32 numbers, each rounded once or twice at 2^-24.
    np.testing.assert_allclose(values.sum(axis=-1), 1, atol=1e-6)
    assert (folders.output / "a_preview.png").read_bytes().startswith(b"\x89PNG")


def test_masks(one, tmp_path):
    mask = np.zeros(GRID_SHAPE, np.uint8)
    mask[4:12, 3:11, 2:9] = 1
    save_nifti(tmp_path / "masks" / "a.nii.gz", mask)
    nonzero = (one.image("a") != 0).any(axis=0)
    assert 0 < nonzero.sum() < nonzero.size
    options = {
        "all": (),
        "nonzero": ("-m", "nonzero"),
        "key": ("--set", "intensity.mask=nonzero"),
        "file": ("-m", tmp_path / "masks"),
    }
    in_mask = {
        name: summary_of(one, *words)["cases"][0]["num_voxels_in_mask"]
        for name, words in options.items()
    }
    assert in_mask == {
        "all": nonzero.size,
        "nonzero": nonzero.sum(),
        "key": nonzero.sum(),
        "file": mask.sum(),
    }
    argmax = one.scores("a").argmax(axis=0)
    found = load_nifti(one.output / "a.nii.gz")
    np.testing.assert_array_equal(found[mask == 0], argmax[mask == 0])
    assert (found[mask == 1] != argmax[mask == 1]).any()


def test_config_is_a_preset_or_a_file_and_set_overrides_it(one, tmp_path):
    assert (
        summary_of(one, "-c", "krahenbuhl")["parameters"]["bilateral"]
        != summary_of(one)["parameters"]["bilateral"]
    )
    file = tmp_path / "own.toml"
    file.write_text(
        "[bilateral]\ntheta_alpha = 3.0\n[mean_field]\nnum_iterations = 2\ntolerance = 0.0\nfilter "
        "= 'truncated'\n"
    )
    summary = summary_of(
        one,
        "-c",
        file,
        "--set",
        "bilateral.weight=[1, 2, 1, 1]",
        "--set",
        "mean_field.filter=exact",
    )
    assert summary["parameters"]["bilateral"][0]["theta_alpha"] == 3.0
    assert summary["parameters"]["bilateral"][0]["weight"] == [1.0, 2.0, 1.0, 1.0]
    assert summary["parameters"]["mean_field"]["filter"] == "exact", "the last of two"
    assert summary["cases"][0]["num_iterations"] == 2


def test_input_type_is_told_or_found_out(one):
    path = one.logits / "a.nii.gz"
    save_nifti(path, softmax(load_nifti(path), axis=-1).astype(np.float32))
    assert "taken as probabilities: all values lie in [0, 1] and sum to 1" in infer(one).stderr
    (found,) = summary_of(one, "--input-type", "probabilities")["cases"]
    assert found["input_type"] == "probabilities"
    (told,) = summary_of(one, "--input-type", "logits")["cases"]
    assert told["input_type"] == "logits"
    assert told["energy"] != found["energy"]


def test_same_bytes_for_any_number_of_threads_and_in_each_run(folders):
    contents = []
    for threads in (1, 2, 2):
        infer(folders, "--threads", threads, "--save-probabilities", "--save-logits", status=0)
        contents.append(
            {name: (folders.output / name).read_bytes() for name in files_in(folders.output)}
        )
    assert contents[0] == contents[1] == contents[2]
    logits = load_nifti(folders.output / "a_logits.nii.gz")
    labels = load_nifti(folders.output / "a.nii.gz")
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits.argmax(axis=-1), labels)


def test_continue_does_what_is_missing_or_broken(tmp_path):
    folders = write_folders(tmp_path, *"abcde")
    infer(folders, status=0)
    kept, cut, missing, smaller, moved = paths = [
        folders.output / f"{case_id}.nii.gz" for case_id in "abcde"
    ]
    before = [path.read_bytes() for path in paths]
    written = kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[: len(cut.read_bytes()) // 2])
    missing.unlink()
    save_nifti(smaller, np.zeros((4, 5, 6), np.uint8))
    affine = AFFINE.copy()
    affine[0, 3] += 99
    save_nifti(moved, load_nifti(moved), affine)
    assert statuses(infer(folders, "--continue")) == [
        ("a", "skipped"),
        *((case_id, "done") for case_id in "bcde"),
    ]
    assert [path.read_bytes() for path in paths] == before
    assert kept.stat().st_mtime_ns == written
    more = ("--continue", "--save-logits", "--preview")
    for status in ("done", "skipped"):
        assert statuses(infer(folders, *more)) == [(case_id, status) for case_id in "abcde"]
    picture = folders.output / "a_preview.png"
    picture.write_bytes(picture.read_bytes()[:-1])
    assert [status for _, status in statuses(infer(folders, *more))] == ["done"] + ["skipped"] * 4


def test_parts_share_no_case_and_the_first_line_says_what_the_others_have(tmp_path):
    folders = write_folders(tmp_path, *"abcdefg")
    for part_id, num_parts, status, words in (
        (
            0,
            2,
            "done",
            "part 0 of parts 0–1: 4 cases; the other parts (3 cases) are not run here;",
        ),
        (
            1,
            2,
            "done",
            "part 1 of parts 0–1: 3 cases; the other parts (4 cases) are not run here;",
        ),
        (
            1,
            4,
            "skipped",
            "part 1 of parts 0–3: 2 cases; the other parts (5 cases) are not run here;",
        ),
        (
            8,
            9,
            "",
            "part 8 of parts 0–8: 0 cases; the other parts (7 cases) are not run here;",
        ),
    ):
        result = infer(
            folders, "--continue", "--num-parts", num_parts, "--part-id", part_id, status=0
        )
        assert result.stderr.splitlines()[0].startswith(words)
        assert statuses(result) == [(case_id, status) for case_id in "abcdefg"[part_id::num_parts]]


def test_on_a_terminal_progress_is_live_and_leaves_nothing_behind(folders):
    """Standard error is a terminal, standard output a pipe: the one is for people, the other for
    programs.
    """
    pty = pytest.importorskip("pty")
    master, terminal = pty.openpty()
    shown = b""
    options = {
        "stdout": subprocess.PIPE,
        "stderr": terminal,
        "env": os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    }
    with subprocess.Popen(command("infer", *folders.arguments, *FAST), **options) as process:
        os.close(terminal)
        with contextlib.suppress(OSError):  # what reading gives when the other end is closed
            while part := os.read(master, 4096):
                shown += part
        results = process.stdout.read()
    os.close(master)
    assert process.returncode == 0
    text = shown.decode()
    assert all(words in text for words in ("0/3", "3/3", "left"))
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert b"\x1b" not in results
    assert results.count(b"\n") == 4


def test_files_of_demo_are_named_as_nnunet_names_them_and_the_table_has_their_dice(tmp_path):
    folder = tmp_path / "demo"
    result = run_process("demo", "-o", folder, status=0)
    assert files_in(folder) == ["images", "labels", "logits", "refined"]
    assert files_in(folder / "images") == ["phantom_0000.nii.gz", "phantom_0001.nii.gz"]
    assert files_in(folder / "labels") == files_in(folder / "logits") == ["phantom.nii.gz"]
    assert files_in(folder / "refined") == ["phantom.nii.gz", "phantom_preview.png"]
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows[0][:3] == ["label", "Dice before", "Dice after"]
    truth, logits, after = (
        load_nifti(folder / name / "phantom.nii.gz") for name in ("labels", "logits", "refined")
    )
    for label in (1, 2, 3):
        wanted = truth == label
        for labels, shown in zip((logits.argmax(axis=-1), after), rows[label][1:3], strict=True):
            is_label = labels == label
            dice = 2 * (is_label & wanted).sum() / (is_label.sum() + wanted.sum())
            assert shown == f"{dice:.4f}"
        assert float(rows[label][2]) > float(rows[label][1])
    assert "not evidence" in result.stdout
    run_here("demo", "-o", tmp_path / "same", status=0)
    for path in sorted(path for path in folder.rglob("*.*") if RECORD_FOLDER not in path.parts):
        assert (tmp_path / "same" / path.relative_to(folder)).read_bytes() == path.read_bytes(), (
            path
        )
    run_here("demo", "-o", tmp_path / "other", "--seed", "1", status=0)
    assert (load_nifti(tmp_path / "other" / "labels" / "phantom.nii.gz") != truth).any()


# ---- Real cases; CRFREFINE_DATA names their folder

DATA = (
    Path(os.environ.get("CRFREFINE_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    / "hippocampus"
)


@pytest.mark.long
@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real cases: set CRFREFINE_DATA")
@pytest.mark.parametrize("logits", ["logits", "logits_weak"])
def test_hippocampus_is_refined_on_its_grids_and_not_broken(tmp_path, logits):
    """Every 40th of the 120 cases."""
    summary = tmp_path / "summary.json"
    part = ("--num-parts", 40, "--part-id", 3)
    run_here(
        "infer",
        "-i",
        DATA / "images",
        "-p",
        DATA / logits,
        "-o",
        tmp_path / "out",
        *part,
        "--summary",
        summary,
        status=0,
    )
    changes = []
    for case in json.loads((tmp_path / "summary-3-of-40.json").read_text())["cases"]:
        image = nib.load(DATA / "images" / f"{case['case_id']}_0000.nii.gz")
        refined = nib.load(case["output"])
        assert refined.shape == image.shape
        np.testing.assert_array_equal(refined.affine, image.affine)
        for transform in ("sform_code", "qform_code"):
            assert refined.header[transform] == image.header[transform]
        truth = np.rint(load_nifti(DATA / "labels" / f"{case['case_id']}.nii.gz"))
        before = load_nifti(DATA / logits / f"{case['case_id']}.nii.gz").argmax(axis=-1)
        after = np.asanyarray(refined.dataobj)
        assert 0 < case["voxels_changed"] == (before != after).sum() < 0.1 * before.size
        for label in (1, 2):
            changes.append(
                np.subtract(
                    *(MaskPair(found == label, truth == label).dice() for found in (after, before))
                )
            )
    # Default parameters need not help; a sign or an axis that is wrong would cost far more than two
    # points.
    assert len(changes) == 6
    assert np.mean(changes) > -0.02
