"""`--map` gives the values of label maps new labels before anything else looks at them."""

import json

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import (
    GRID_SHAPE,
    SPACING,
    errors,
    infer,
    load_nifti,
    run_here,
    save_nifti,
    summary_of,
    write_folders,
)
from evaluation_helpers import write_study
from training_helpers import cases_in, write_cases

from crfrefine.base.label_options import parse_mapped
from crfrefine.demo.phantom import make_phantom
from crfrefine.errors import InputError
from crfrefine.train.dataset import read_labeled

OTHER = np.array([0, 255, 1, 7], np.uint8)  # in place of the labels 0 to 3
MAP = ("--map", "255=1", "--map", "1=2", "--map", "7=3")  # not a chain of 255 to 1 to 2


def network_labels(seed):
    return make_phantom(seed, GRID_SHAPE, SPACING).logits.argmax(axis=0).astype(np.uint8)


@pytest.fixture
def maps(tmp_path):
    """Label maps with the labels 1 to 3, and in other/ with the values of OTHER."""
    folders = write_folders(tmp_path, "a", "b")
    for seed, case_id in enumerate("ab"):
        labels = network_labels(seed)
        save_nifti(tmp_path / "maps" / f"{case_id}.nii.gz", labels)
        save_nifti(tmp_path / "other" / f"{case_id}.nii.gz", OTHER[labels])
    return folders._replace(logits=tmp_path / "maps")


@pytest.mark.parametrize("text", ["1", "a=1", "1=2.5", "1=-2", "1=65536", ":1=2", "x y:1=", "=1"])
def test_anything_but_two_labels_is_an_error(text):
    with pytest.raises(InputError, match="expected OLD=NEW"):
        parse_mapped(text)


def test_infer_refines_mapped_maps_as_maps_of_these_labels(maps, tmp_path):
    names = {"background": 0, "liver": 1, "spleen": 2, "duct": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": names}))
    infer(maps, status=0)
    other = maps._replace(logits=tmp_path / "other", output=tmp_path / "mapped")
    assert "not declared: 7, 255" in infer(other, status=1).stderr
    summary = summary_of(other, *MAP)
    assert summary["mapping"] == {"255": 1, "1": 2, "7": 3}
    for case, record in zip("ab", summary["cases"], strict=True):
        name = f"{case}.nii.gz"
        assert np.array_equal(load_nifti(maps.output / name), load_nifti(other.output / name))
        assert record["mapped_values"] == [1, 7, 255]


FAR = np.array([0, -1, 70000, 3], np.int32)  # in place of the labels 0 to 3
FAR_MAP = ("-1=1", "70000=2", "1=3")


def write_far(maps, root):
    for path in maps.logits.glob("*.nii.gz"):
        save_nifti(root / "far" / path.name, FAR[load_nifti(path)])


def test_values_that_are_no_labels_become_some_in_every_command(maps, tmp_path):
    """They are -1 and 70000; a new label is no value that another --map then changes."""
    write_far(maps, tmp_path)
    words = [word for text in FAR_MAP for word in ("--map", text)]
    infer(maps, status=0)
    other = maps._replace(logits=tmp_path / "far", output=tmp_path / "mapped")
    assert "expected labels from 0 to 65535, found -1 to 70000" in infer(other, status=1).stderr
    summary = summary_of(other, *words)
    assert summary["cases"][0]["mapped_values"] == [-1, 70000]
    name = "a.nii.gz"
    assert np.array_equal(load_nifti(maps.output / name), load_nifti(other.output / name))

    target = tmp_path / "a.nii.gz"
    run_here("convert", tmp_path / "far" / name, target, *words, status=0)
    np.testing.assert_array_equal(load_nifti(target), load_nifti(maps.logits / name))
    values = np.where(
        load_nifti(maps.logits / name) == 3, 66000, FAR[load_nifti(maps.logits / name)]
    )
    save_nifti(tmp_path / "further.nii.gz", values.astype(np.int32))
    refused = run_here("convert", tmp_path / "further.nii.gz", target, *words, status=1)
    assert "found 66000, which --map 66000=LABEL gives a label" in refused.stderr

    for method, source in (("", "far"), ("reference", "maps")):
        prediction, labels = ("far", "maps") if not method else ("maps", "far")
        options = [word for text in FAR_MAP for word in ("--map", f"{method}:{text}".lstrip(":"))]
        arguments = ("evaluate", tmp_path / prediction, tmp_path / labels, "-o", tmp_path / "rep")
        done = run_here(*arguments, "--no-report", *options, status=0)
        means = [line.split("\t") for line in done.stdout.splitlines() if "dice" in line]
        assert {row[4] for row in means if row[0] == "dice"} == {"1.0000"}, source


def test_training_gives_far_values_of_the_reference_labels(tmp_path):
    folder = write_cases(tmp_path, 2)
    expected = read_labeled((cases := cases_in(folder)).files[0], cases, threads=1).labels
    path = folder / "labels" / "case0.nii.gz"
    save_nifti(path, FAR[load_nifti(path)], nib.load(path).affine)
    mapped = tuple(parse_mapped(f"reference:{text}") for text in FAR_MAP[:2])
    cases = cases_in(folder, mapped=mapped)
    found = read_labeled(cases.files[0], cases, threads=1).labels
    np.testing.assert_array_equal(found, expected)


def test_several_values_may_become_one_label(maps):
    infer(maps, "--map", "3=1", "--map", "2=1", status=0)
    assert np.unique(load_nifti(maps.output / "a.nii.gz")).tolist() == [0, 1]


def test_a_value_that_no_map_has_gets_one_note(maps):
    done = infer(maps, "--map", "9=1", "--map", "3=2", status=0)
    assert done.stderr.count("--map: no label map has the value 9") == 1


def test_other_mappings_are_other_settings_for_continue(maps):
    infer(maps, status=0)
    done = infer(maps, "--map", "3=2", "--continue", status=0)
    assert "refined with other values of mapping.3; refined again" in done.stderr
    assert load_nifti(maps.output / "a.nii.gz").max() == 2


def test_names_in_a_label_map_follow_their_labels(maps, tmp_path):
    path = tmp_path / "named.nii.gz"
    names = {"background": 0, "liver": 255, "spleen": 7}
    (tmp_path / "other" / "dataset.json").write_text(json.dumps({"labels": names}))
    source = tmp_path / "other" / "a.nii.gz"
    run_here("convert", source, path, "--map", "1=0", status=0)
    image = maps.images / "a_0000.nii.gz"
    output = tmp_path / "refined.nii.gz"
    options = ("--map", "255=1", "--map", "7=2", "--save-structures", "--map", "9=7")
    done = run_here("infer", "-i", image, "-p", path, "-o", output, *options, status=0)
    assert sorted(file.name for file in (tmp_path / "refined").iterdir()) == [
        "liver.nii.gz",
        "spleen.nii.gz",
    ]
    again = run_here("infer", "-i", image, "-p", path, "-o", output, *options, "--continue")
    assert "skipped" in again.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--map", "1=2", "--map", "1=3"), "the value 1 becomes 2 by another --map"),
        (("--map", "reference:1=2"), "this command reads no label maps of reference"),
    ],
)
def test_contradictions_are_errors_before_the_run(maps, options, message):
    assert message in infer(maps, *options).stderr
    assert not maps.output.exists()


def test_logits_and_structures_have_no_values_to_map(maps, tmp_path):
    logits = maps._replace(logits=tmp_path / "logits")
    first, *others = errors(infer(logits, *MAP, status=1).stderr)
    assert "found logits" in first
    assert others == ["crfrefine: error: 1 more case failed like 'a': b"]
    for name in ("liver", "spleen"):
        mask = (network_labels(0) == 1).astype(np.uint8)
        save_nifti(tmp_path / "structures" / "a" / f"{name}.nii.gz", mask)
    structures = maps._replace(logits=tmp_path / "structures")
    found = infer(structures, "--input-type", "labels", *MAP, status=1).stderr
    assert "found one file per structure" in found


def test_evaluate_measures_mapped_maps(tmp_path):
    study = write_study(tmp_path, 2)
    run_here(*study.arguments, status=0)
    expected = (study.output / "metrics.csv").read_bytes()
    for folder, table in (("after", [0, 9, 1]), ("before", [0, 4, 4]), ("labels", [0, 4, 2])):
        for path in (tmp_path / folder).iterdir():
            image = nib.load(path)
            values = np.array(table, np.uint8)[np.asanyarray(image.dataobj)]
            nib.Nifti1Image(values, image.affine).to_filename(path)
    maps = ("--map", "9=1", "--map", "1=2", "--map", "reference:4=1", "--map", "before:4=1")
    done = run_here(*study.arguments, *maps, "--map", "reference:8=1", status=0)
    assert "--map: no reference has the value 8" in done.stderr
    lines = expected.decode().splitlines()
    found = (study.output / "metrics.csv").read_text().splitlines()
    of_prediction = [line for line in lines if line.endswith("prediction")]
    assert of_prediction == [line for line in found if line.endswith("prediction")]
    settings = study.summary()["settings"]
    assert settings["mapping"] == {"prediction": {"9": 1, "1": 2}, "before": {"4": 1}}
    assert settings["reference_mapping"] == {"4": 1, "8": 1}


def test_a_mapping_of_an_unknown_method_is_an_error(tmp_path):
    study = write_study(tmp_path, 1)
    found = run_here(*study.arguments, "--map", "net:1=2", status=1).stderr
    assert "--map net:1=2: expected reference, or the name of a --baseline, one of before" in found


def test_convert_maps_labels_and_refuses_images(maps, tmp_path):
    target = tmp_path / "converted.nrrd"
    done = run_here("convert", tmp_path / "other" / "a.nii.gz", target, *MAP, "--map", "8=1")
    assert "--map: no voxel has the value 8" in done.stderr
    back = tmp_path / "back.nii.gz"
    run_here("convert", target, back, status=0)
    assert np.array_equal(load_nifti(back), network_labels(0))
    image = maps.images / "a_0000.nii.gz"
    assert "found an image" in run_here("convert", image, back, *MAP, status=1).stderr
    logits = tmp_path / "logits" / "a.nii.gz"
    found = run_here("convert", logits, back, *MAP, "--to", "labels", status=1).stderr
    assert "found logits or probabilities" in found


def test_training_takes_mapped_maps_and_references(tmp_path):
    folder = write_cases(tmp_path, 2, network=lambda case: case.logits.argmax(axis=0).astype("u1"))
    plain = cases_in(folder)
    expected = [read_labeled(case, plain, threads=1) for case in plain.files]
    for kind, table in (("logits", [0, 3, 9, 9]), ("labels", [0, 5, 2, 3])):
        for path in (folder / kind).iterdir():
            image = nib.load(path)
            values = np.array(table, np.uint8)[np.asanyarray(image.dataobj)]
            nib.Nifti1Image(values, image.affine).to_filename(path)
    mapped = tuple(map(parse_mapped, ("3=1", "9=3", "7=1", "reference:5=1")))
    cases = cases_in(folder, mapped=mapped)
    assert "--map: no label map has the value 7" in map(str, cases.notes)
    assert cases.reading.declared == plain.reading.declared
    for files, before in zip(cases.files, expected, strict=True):
        case = read_labeled(files, cases, threads=1)
        assert np.array_equal(case.labels, before.labels)
        assert np.array_equal(case.logits[1], before.logits[1])
        assert (case.logits[2] < case.logits[0]).all()  # no value is 2 any more
