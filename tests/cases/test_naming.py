"""Names of labels and modalities: from the first `dataset.json` beside the files."""

import json

from crfrefine.cases.dataset_description import Names, read_names

DESCRIPTION = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {"background": 0, "tumor  core": 3, "whole": [1, 2, 3], "edema": [2]}}


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def test_names_are_those_of_the_first_description(tmp_path):
    for name in ("images", "logits"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "a.nii").touch()
    places = [tmp_path / "images" / "a.nii", tmp_path / "logits"]
    assert read_names(places) == Names()
    write(tmp_path / "logits", {"labels": {"left": 1}})
    assert read_names(places) == Names({1: "1 left"})
    write(tmp_path, DESCRIPTION)
    assert read_names(places) == Names({0: "0 background", 3: "3 tumor core", 2: "2 edema"}, ("T1", "FLAIR"))


def test_a_description_that_cannot_be_used_is_named_and_the_next_one_is_read(tmp_path):
    write(tmp_path / "images", "{")
    write(tmp_path / "logits", DESCRIPTION)
    found = read_names([tmp_path / "images", tmp_path / "images", tmp_path / "logits"])
    assert found.labels[3] == "3 tumor core"
    (note,) = found.notes
    assert note.startswith(f"{tmp_path / 'images' / 'dataset.json'}: not a dataset.json as nnU-Net writes it: ")
    assert note.endswith("; continuing without it")
