"""`crfrefine info`: what a file is, which cases a folder holds, and what is wrong with them."""

import json
import os
from importlib import metadata

import io_helpers
import nibabel as nib
import numpy as np
import pytest
from cli_helpers import (
    AFFINE,
    GRID_SHAPE,
    NUM_LABELS,
    load_nifti,
    run_here,
    run_process,
    save_nifti,
    write_folders,
)

import crfrefine
from crfrefine.base.limits import available_threads
from crfrefine.engines import get_backend


@pytest.fixture
def root(tmp_path):
    write_folders(tmp_path, "a", "b", "c")
    return tmp_path


def fields(text):
    return {line[2:14].strip(): line[16:] for line in text.splitlines()[1:]}


def test_a_nifti_file(root):
    path = root / "images" / "a_0000.nii.gz"
    result = run_here("info", path)
    assert (result.status, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == str(path)
    shown = fields(result.stdout)
    expected = {"format": "NIfTI-1, gzip", "shape": "18×15×11", "type": "int16"}
    # The axes go to anterior, left and inferior; the codes are nibabel's for a given affine.
    expected |= {"spacing": "1×1.25×2.5 mm", "orientation": "ALI", "sform, qform": "codes 2, 0"}
    assert shown.items() >= expected.items()
    assert shown["first voxel"].startswith("(10, -20, 30)")
    assert "values" not in shown


def test_verbose_reads_the_voxels(root):
    path = root / "images" / "a_0000.nii.gz"
    values = load_nifti(path)
    assert fields(run_here("info", "-v", path).stdout)["values"].startswith(
        f"{values.min()} to {values.max()}, mean "
    )
    labels = save_nifti(root / "labels.nii.gz", np.indices(GRID_SHAPE)[0].astype(np.uint8) // 9)
    assert fields(run_here("info", "-v", labels).stdout)["voxels"] == "0: 1485, 1: 1485"
    logits = run_here("info", "-v", root / "logits" / "a.nii.gz").stdout
    assert logits.count("values, channel") == NUM_LABELS


def test_json_has_what_is_shown(root):
    broken = root / "broken.nii"
    path = root / "images" / "a_0000.nii.gz"
    broken.write_bytes(b"no volume")
    result = run_here("info", "--json", path, broken, root, root / "nowhere.nii")
    file, bad, folder, absent = json.loads(result.stdout)["paths"]
    shown = run_here("info", path, broken, path).stdout
    assert shown.count("  format") == 2
    assert (file["path"], file["properties"]) == (str(path), fields(run_here("info", path).stdout))
    assert list(folder["cases"]) == ["a", "b", "c"]
    assert folder["problems"] == []
    for found, name in ((bad, broken), (absent, root / "nowhere.nii")):
        assert f"crfrefine: error: {found['problems'][0]}" in result.stderr
        assert str(name) in found["problems"][0]
    assert (result.status, json.loads(result.stdout)["is_well"]) == (1, False)


def test_a_folder_of_images(root, tmp_path):
    lines = run_here("info", root / "images", status=0).stdout.splitlines()
    assert lines[0] == f"{root / 'images'}: 3 cases in order, 0 problems"
    assert lines[1].split(maxsplit=1) == ["a", "2 modalities, 18×15×11, 1.00×1.25×2.50 mm"]
    (tmp_path / "empty").mkdir()
    assert "no case found" in run_here("info", tmp_path / "empty", status=1).stdout


def test_numbered_files_that_may_be_cases_are_told_with_the_other_reading(root, tmp_path):
    new = tmp_path / "new"
    for number in (0, 1):
        save_nifti(new / "images" / f"img_000{number}.nii.gz", np.zeros(GRID_SHAPE, np.int16))
    for arguments in ((new / "images",), ("-i", new / "images")):
        shown = run_here("info", *arguments, status=0).stdout
        assert "img  2 modalities" in shown
        pattern = f"'{new}/images/{{case}}.nii.gz'"
        assert f"of one case, by their numbers; if each file is a case, give {pattern}" in shown
    shown = run_here("info", "-i", pattern.strip("'"), status=0).stdout
    assert "img_0001  1 modality" in shown
    save_nifti(new / "logits" / "img.nii.gz", np.zeros((*GRID_SHAPE, 2), np.float32))
    shown = run_here("info", new, status=0).stdout
    assert "img  2 modalities" in shown
    assert "by their numbers" not in shown
    assert "by their numbers" not in run_here("info", root / "images", status=0).stdout


def test_what_is_wrong_with_cases(root):
    for case_id in "abc":
        for kind in ("masks", "labels"):
            save_nifti(root / kind / f"{case_id}.nii.gz", np.ones(GRID_SHAPE, np.uint8))
    (root / "images" / "a_0001.nii.gz").unlink()
    affine = AFFINE.copy()
    affine[1, 3] += 5
    save_nifti(root / "logits" / "b.nii.gz", load_nifti(root / "logits" / "b.nii.gz"), affine)
    result = run_here("info", root, status=1)
    lines = result.stdout.splitlines()
    assert lines[0].endswith(": 1 case in order, 2 problems")
    assert lines[1].split()[0] == "c"
    assert lines[1].endswith("4 labels, mask, reference")
    wrong = [line for line in lines if line.startswith("  wrong:")]
    assert len(wrong) == 2
    assert "'a'" in wrong[0]
    assert "'b': logits and image are on different grids" in wrong[1]


def test_without_a_file_it_shows_what_is_installed(tmp_path, monkeypatch):
    """The metadata are made, as crfrefine need not be installed."""
    folder = tmp_path / "crfrefine-0.0.9.dist-info"
    folder.mkdir()
    extras = (
        ("numpy>=1.26", "here"),
        ("scipy", "here"),
        ("nowhere-at-all[x]>=2", "absent"),
        ("crfrefine[here]", "all"),
    )
    lines = [f'Requires-Dist: {name}; extra == "{extra}"\n' for name, extra in extras]
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: crfrefine\nVersion: 0.0.9\n" + "".join(lines),
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    shown = {
        line[:12].strip(): line[14:] for line in run_here("info", status=0).stdout.splitlines()
    }
    assert shown["version"].startswith(f"crfrefine {crfrefine.__version__}, Python 3.")
    assert shown["engine"].startswith(f"{get_backend('cpu').level}; compiled for baseline")
    assert shown["threads"].startswith(f"{available_threads()}: ")
    assert shown["here"] == f"numpy {np.__version__}, scipy {metadata.version('scipy')}"
    assert shown["absent"] == "nowhere-at-all is not installed: pip install 'crfrefine[absent]'"
    assert shown.keys() == {"version", "engine", "GPU", "threads", "here", "absent"}
    assert json.loads(run_here("info", "--json", status=0).stdout) == {"schema": 1, **shown}


def test_an_engine_that_does_not_run_says_why():
    done = run_process("info", env={**os.environ, "CRFREFINE_CPU_LEVEL": "sse\x1b[2"}, status=0)
    assert "expected one of baseline, avx2, avx512" in done.stdout
    assert "\x1b" not in done.stdout


def test_the_scaling_and_what_convert_takes_a_file_for(tmp_path):
    numbers = io_helpers.numbers(GRID_SHAPE, dtype=np.int16)
    scaled = io_helpers.save_nifti(tmp_path / "a.nii.gz", numbers, slope=0.5, inter=-8.0)
    shown = fields(run_here("info", "-v", scaled, status=0).stdout)
    assert shown["scaling"] == "values are stored × 0.5 - 8"
    assert shown["content"] == "image, as convert takes it"
    labels = save_nifti(tmp_path / "b.nii.gz", (numbers > 9).astype(np.int16))
    shown = fields(run_here("info", "-v", labels, status=0).stdout)
    assert shown["content"] == "label map, as convert takes it"
    assert "scaling" not in shown


LOGITS = np.random.default_rng(3).normal(0, 3, (*GRID_SHAPE, NUM_LABELS)).astype(np.float32)
LABELS = LOGITS.argmax(axis=-1).astype(np.uint8)
PROBABILITIES = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum(
    axis=-1, keepdims=True
)


@pytest.fixture
def files(tmp_path):
    return {
        "logits": save_nifti(tmp_path / "logits.nii.gz", LOGITS),
        "labels": save_nifti(tmp_path / "labels.nii.gz", LABELS),
        "image": save_nifti(tmp_path / "image.nii.gz", LABELS.astype(np.int16) * 100),
    }


def convert(*arguments):
    run_here("convert", *arguments, status=0)


def test_npz_is_channel_z_y_x_and_needs_an_image_on_the_way_back(files, tmp_path):
    convert(files["logits"], tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as archive:
        np.testing.assert_array_equal(archive["logits"], LOGITS.transpose(3, 2, 1, 0))
    alone = run_here("convert", tmp_path / "out.npz", tmp_path / "again.nii.gz", status=1)
    assert "--like" in alone.stderr
    convert(tmp_path / "out.npz", tmp_path / "again.nii.gz", "--like", files["image"])
    np.testing.assert_array_equal(load_nifti(tmp_path / "again.nii.gz"), LOGITS)
    np.testing.assert_array_equal(
        nib.load(tmp_path / "again.nii.gz").affine, nib.load(files["image"]).affine
    )


def test_softmax_argmax_and_logarithm(files, tmp_path):
    convert(files["logits"], tmp_path / "p.nii.gz", "--to", "probabilities")
    # A softmax of four float32 numbers: a few roundings of 6e-8 each.
    np.testing.assert_allclose(
        load_nifti(tmp_path / "p.nii.gz"), PROBABILITIES, rtol=2e-6, atol=1e-7
    )
    for source in (files["logits"], tmp_path / "p.nii.gz"):
        convert(source, tmp_path / "l.nii.gz", "--to", "labels")
        np.testing.assert_array_equal(load_nifti(tmp_path / "l.nii.gz"), LABELS)
        assert load_nifti(tmp_path / "l.nii.gz").dtype == np.uint8
    for source, target in (("p.nii.gz", "p.npz"), ("p.npz", "p2.npz")):
        convert(tmp_path / source, tmp_path / target)
        with np.load(tmp_path / target) as archive:
            assert list(archive) == ["probabilities"]
    convert(tmp_path / "p.nii.gz", tmp_path / "again.nii.gz", "--to", "logits")
    # Logits are known up to one constant a voxel; probabilities below 1e-7 are raised to it.
    expected = np.log(np.maximum(PROBABILITIES, 1e-7))
    np.testing.assert_allclose(load_nifti(tmp_path / "again.nii.gz"), expected, atol=2e-5)


BAD = {
    "{labels} {root}/x.nii.gz --to probabilities": "a label map cannot become probabilities",
    "{labels} {root}/x.npz": "x.npz",
    "{logits} {root}/x.png": "x.png: unknown file type",
    "{root}/nowhere.nii {root}/x.nii": "nowhere.nii: no such file",
    "{root} {root}/x.nii": "expected a file, this is a folder",
    "{logits} {logits}": "would replace an input",
    "{logits} {image} --like {image}": "would replace an input",
    "{cut} {root}/x.txt --to labels": "unknown file type",  # before it is read
    "{logits} {logits}/x.nii": "Not a directory",
    "{logits} {root}/x.nii --like {other}": "not on the grid of --like",
    "{archive} {root}/x.nii --like {other}": "not on the grid of --like",
    "{float} {root}/x.nii --as labels": "not a label map",
    "{labels} {root}/x.nii --as logits": "holds one value per voxel; logits have one per label",
    "{logits} {root}/x.npz --as image": "hold logits alone; leave --as image out",
    "{logits} {root}/x.nii --as image --to labels": "an image does not become labels",
    "{logits} {root}/x.nii --output-format .nii": "leave --output-format out",
}


def test_bad_input(files, tmp_path):
    np.savez_compressed(tmp_path / "archive.npz", logits=LOGITS.T)
    (tmp_path / "cut.nii.gz").write_bytes(files["logits"].read_bytes()[:9999])
    places = {
        "other": save_nifti(tmp_path / "other.nii.gz", LABELS[:-1]),
        "float": save_nifti(tmp_path / "float.nii.gz", LOGITS[..., 0]),
    }
    places |= {
        **files,
        "root": tmp_path,
        "archive": tmp_path / "archive.npz",
        "cut": tmp_path / "cut.nii.gz",
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments, words in BAD.items():
        result = run_here("convert", *arguments.format(**places).split())
        assert (result.status, result.stdout) == (1, "")
        assert result.stderr.startswith("crfrefine: error: ")
        assert words in result.stderr, arguments
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_description_is_a_problem_and_the_cases_are_listed_all_the_same(root):
    """`infer` stops at it; the cases are shown as far as they can be known without it."""
    described = root / "logits" / "dataset.json"
    described.write_text('{"labels": {"background": 0, "background": 1}}')
    result = run_here("info", root, status=1)
    assert f"{described}: not a dataset.json as nnU-Net writes it: " in result.stdout
    assert result.stdout.startswith(f"{root}: 3 cases in order, 1 problem")
