"""Names of labels are shown wherever labels are, whether a file or a dataset.json has them."""

import json

import numpy as np
import pytest
from cli_helpers import (
    GRID_SHAPE,
    SPACING,
    infer,
    run_here,
    save_nifti,
    summary_of,
    write_folders,
)
from evaluation_helpers import logits_of, save_map, write_study

from crfrefine.demo.phantom import make_phantom
from crfrefine.io import read_header, read_labels, write_label_map
from crfrefine.io.volume import Segment

NAMES = (Segment(1, "spleen"), Segment(2, "kidney_right"))


def add_names(folder, segments=NAMES):
    """Write the label maps of a folder again, with the table of TotalSegmentator."""
    for path in folder.iterdir():
        volume = read_labels(path)
        write_label_map(path, volume.data, volume.header, segments=segments)


def titles_of(study, *options):
    run_here(*study.arguments, *options, status=0)
    return study.summary()["titles"]


@pytest.mark.parametrize("folder", ["labels", "after", "before"])
def test_evaluate_takes_names_from_any_label_map(tmp_path, folder):
    study = write_study(tmp_path, 2)
    assert titles_of(study)["1"] == "1"
    add_names(tmp_path / folder)
    done = run_here(*study.arguments, status=0)
    titles = study.summary()["titles"]
    assert (titles["1"], titles["2"]) == ("1 spleen", "2 kidney_right")
    assert "2 kidney_right" in done.stdout


def test_a_dataset_json_beside_the_reference_comes_first_and_beside_a_method_last(tmp_path):
    study = write_study(tmp_path, 2)
    names = {"background": 0, "edema": 1, "core": 2}
    (study.after / "dataset.json").write_text(json.dumps({"labels": names}))
    assert titles_of(study)["2"] == "2 core"
    add_names(study.before)
    assert titles_of(study)["2"] == "2 kidney_right"
    content = {"labels": {"background": 0, "Core": 2, "rim": 3, "spleen": 1}}
    (study.labels / "dataset.json").write_text(json.dumps(content))
    (study.after / "dataset.json").unlink()
    add_names(study.before, (Segment(1, "Spleen"), Segment(2, "core")))
    assert titles_of(study)["2"] == "2 Core"


def test_probabilities_get_the_names_of_a_dataset_json_beside_them(tmp_path):
    study = write_study(tmp_path, 2)
    for path in study.after.iterdir():
        labels = study.maps["after"][path.name.partition(".")[0]]
        save_map(path, np.moveaxis(logits_of(labels, 3), 0, -1))
    names = {"background": 0, "edema": 1, "core": 2}
    (study.after / "dataset.json").write_text(json.dumps({"labels": names}))
    assert titles_of(study)["2"] == "2 core"


def test_the_names_of_mapped_labels_follow_them(tmp_path):
    study = write_study(tmp_path, 2)
    add_names(study.after)
    titles = titles_of(study, "--map", "1=2", "--map", "2=1")
    assert (titles["1"], titles["2"]) == ("1 kidney_right", "2 spleen")


def test_the_summary_of_infer_names_the_labels_that_occur(tmp_path):
    folders = write_folders(tmp_path, "a", "b")
    names = {"background": 0, "shell": 1, "core": 2, "cyst": 3, "nowhere": 4}
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "dataset.json").write_text(json.dumps({"labels": names}))
    for seed, case_id in enumerate("ab"):
        labels = make_phantom(seed, GRID_SHAPE, SPACING).logits.argmax(axis=0).astype(np.uint8)
        save_nifti(tmp_path / "maps" / f"{case_id}.nii.gz", labels)
    path = tmp_path / "maps" / "b.nii.gz"
    volume = read_labels(path)
    write_label_map(path, volume.data, volume.header, segments=(Segment(1, "Shell"),))
    summary = summary_of(folders._replace(logits=tmp_path / "maps"))
    first, second = (case["label_names"] for case in summary["cases"])
    assert first == {"1": "shell", "2": "core", "3": "cyst"}
    assert second == {"1": "Shell"}


@pytest.fixture
def maps(tmp_path):
    """Two cases with the label maps of a network whose labels have names."""
    folders = write_folders(tmp_path, "a", "b")
    for seed, case_id in enumerate("ab"):
        labels = make_phantom(seed, GRID_SHAPE, SPACING).logits.argmax(axis=0).astype(np.uint8)
        save_nifti(tmp_path / "maps" / f"{case_id}.nii.gz", labels)
    name_labels(tmp_path / "maps", "shell", "core", "cyst")
    return folders._replace(logits=tmp_path / "maps")


def name_labels(folder, *names):
    numbers = {"background": 0, **{name: number for number, name in enumerate(names, start=1)}}
    (folder / "dataset.json").write_text(json.dumps({"labels": numbers}))


def structures_of(folders, case_id="a"):
    """The number of voxels of each structure that was saved, by its name."""
    files = sorted((folders.output / case_id).iterdir())
    return {
        path.name.partition(".")[0]: int(np.count_nonzero(read_labels(path).data)) for path in files
    }


def test_labels_have_the_names_of_the_network_and_not_of_the_data_set_it_was_run_on(maps):
    """A network of one data set is often run on another one, whose labels mean other things."""
    name_labels(maps.images, "liver", "tumor", "vein")
    content = json.loads((maps.images / "dataset.json").read_text())
    content["channel_names"] = {"0": "CT", "1": "PET"}
    (maps.images / "dataset.json").write_text(json.dumps(content))
    summary = summary_of(maps, "--save-structures")
    assert summary["cases"][0]["label_names"] == {"1": "shell", "2": "core", "3": "cyst"}
    assert sorted(structures_of(maps)) == ["core", "cyst", "shell"]

    # Where the network names none, the names are those of the images' data set.
    (maps.logits / "dataset.json").unlink()
    summary = summary_of(maps, "--save-structures")
    assert summary["cases"][0]["label_names"] == {"1": "liver", "2": "tumor", "3": "vein"}


def test_cases_whose_labels_have_other_names_now_are_refined_again(maps):
    infer(maps, "--save-structures", status=0)
    before = structures_of(maps)
    again = infer(maps, "--save-structures", "--continue", status=0)
    assert "2 skipped" in again.stderr
    # A mistake is mended: two names were exchanged.
    name_labels(maps.logits, "core", "shell", "cyst")
    again = infer(maps, "--save-structures", "--continue", status=0)
    assert "skipped" not in again.stderr
    after = structures_of(maps)
    assert (after["core"], after["shell"]) == (before["shell"], before["core"])
    assert before["core"] != before["shell"]
    # Files of the old names do not stay beside those of the new ones.
    name_labels(maps.logits, "head", "tail", "cyst")
    infer(maps, "--save-structures", "--continue", status=0)
    assert sorted(structures_of(maps)) == ["cyst", "head", "tail"]


def test_labels_of_regions_are_named_after_them(tmp_path):
    folders = write_folders(tmp_path, "a")
    scores = folders.scores("a")
    regions = np.stack([scores[1:].max(axis=0), scores[2:].max(axis=0), scores[3]]) - scores[0]
    save_nifti(folders.logits / "a.nii.gz", np.moveaxis(regions, 0, -1))
    options = [f"--regions={text}" for text in ("whole=1+2+3", "core=2+3", "enhancing=3")]
    (case,) = summary_of(folders, *options)["cases"]
    assert case["label_names"] == {"1": "rest of whole", "2": "rest of core", "3": "enhancing"}
    infer(folders, *options, "--preview", status=0)


def test_names_stay_in_refined_probabilities_and_come_back_from_them(tmp_path):
    folders = write_folders(tmp_path, "a")
    labels = make_phantom(0, GRID_SHAPE, SPACING).logits.argmax(axis=0).astype(np.uint8)
    path = save_nifti(tmp_path / "maps" / "a.nii.gz", labels)
    write_label_map(path, labels, read_header(path), segments=NAMES)
    infer(folders._replace(logits=tmp_path / "maps"), "--save-probabilities", status=0)
    probabilities = folders.output / "a_probabilities.nii.gz"
    output = tmp_path / "again"
    options = ("-p", probabilities, "-o", output, "--summary", tmp_path / "again.json")
    images = [f"--images={path}" for path in sorted(folders.images.iterdir())]
    run_here("infer", *images, *options, "--save-structures", status=0)
    (case,) = json.loads((tmp_path / "again.json").read_text())["cases"]
    assert case["label_names"] == {"1": "spleen", "2": "kidney_right"}
    names = [file.name for file in sorted((output / "a").iterdir())]
    assert names == ["Label_3.nii.gz", "kidney_right.nii.gz", "spleen.nii.gz"]
    again = run_here("infer", *images, *options, "--save-structures", "--continue", status=0)
    assert "skipped" in again.stdout
    arguments = (probabilities, path, "-o", tmp_path / "report", "--no-report")
    assert "1 spleen" in run_here("evaluate", *arguments, status=0).stdout
