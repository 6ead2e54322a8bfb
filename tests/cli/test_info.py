"""`crfrefine info`: what a file is, which cases a folder holds, and what is wrong with them."""

import json
import os
from importlib import metadata

import numpy as np
import pytest
from cli_helpers import AFFINE, GRID_SHAPE, NUM_LABELS, load_nifti, run_here, run_process, save_nifti, write_folders

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
    assert shown["format"] == "NIfTI-1, gzip"
    assert shown["shape"] == "18×15×11"
    assert shown["type"] == "int16"
    assert shown["spacing"] == "1×1.25×2.5 mm"
    assert shown["orientation"] == "ALI"  # x of the array goes to anterior, y to the left, z to inferior
    assert shown["first voxel"].startswith("(10, -20, 30)")
    assert shown["sform, qform"] == "codes 2, 0"  # nibabel's for an affine given by hand
    assert "values" not in shown


def test_verbose_reads_the_voxels(root):
    path = root / "images" / "a_0000.nii.gz"
    values = load_nifti(path)
    assert fields(run_here("info", "-v", path).stdout)["values"].startswith(f"{values.min()} to {values.max()}, mean ")
    labels = save_nifti(root / "labels.nii.gz", np.indices(GRID_SHAPE)[0].astype(np.uint8) // 9)
    assert fields(run_here("info", "-v", labels).stdout)["voxels"] == "0: 1485, 1: 1485"
    logits = run_here("info", "-v", root / "logits" / "a.nii.gz").stdout
    assert logits.count("values, channel") == NUM_LABELS


def test_json_has_what_is_shown(root):
    broken, path = root / "broken.nii", root / "images" / "a_0000.nii.gz"
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
    extras = (("numpy>=1.26", "here"), ("scipy", "here"), ("nowhere-at-all[x]>=2", "absent"), ("crfrefine[here]", "all"))
    lines = [f'Requires-Dist: {name}; extra == "{extra}"\n' for name, extra in extras]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: crfrefine\nVersion: 0.0.9\n" + "".join(lines), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    shown = {line[:12].strip(): line[14:] for line in run_here("info", status=0).stdout.splitlines()}
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
