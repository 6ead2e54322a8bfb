"""Each input is checked by its voxels for what it was taken for: images, label maps, masks."""

import re

import numpy as np
import pytest
from cli_helpers import (
    AFFINE,
    GRID_SHAPE,
    infer,
    run_here,
    save_nifti,
    set_streaming,
    write_folders,
)

from crfrefine.cases.content import evidence_of_image, evidence_of_labels
from crfrefine.cases.roles import require_modalities
from crfrefine.errors import InputError
from crfrefine.parameters.model import CrfParameters

RANDOM = np.random.default_rng(3)
REFERENCE = np.zeros(GRID_SHAPE, np.uint8)
REFERENCE[4:12, 3:11, 2:8] = 1
REFERENCE[4:8, 3:11, 2:8] = 2
IMAGE = (REFERENCE * 100 + RANDOM.normal(0, 15, GRID_SHAPE)).astype(np.float32)
NETWORK = np.roll(REFERENCE, 1, 0)


def atlas(num_labels):
    """Labels of blocks, as of a parcellation of the brain: (x, y, z)."""
    blocks = RANDOM.integers(1, num_labels, (9, 8, 7)).astype(np.uint16)
    return blocks.repeat(8, 0).repeat(7, 1).repeat(6, 2)


# What is no image, though it lies beside one: its voxels.
LABEL_MAPS = {
    "binary": (REFERENCE > 0).astype(np.uint8),
    "float": REFERENCE.astype(np.float32),
    "255": ((REFERENCE > 0) * 255).astype(np.uint8),
    "-1 outside": REFERENCE.astype(np.int16) - 1,
    "two readers' mean": ((REFERENCE > 0) * 0.5 + (NETWORK > 0) * 0.5).astype(np.float32),
    "aparc+aseg": atlas(200) + 1000,
}


def write_tree(root, other, name="msk"):
    """Two cases with an image, a network's label map, and another file beside the image."""
    for case in ("p1", "p2"):
        save_nifti(root / "data" / case / "t1.nii.gz", IMAGE)
        save_nifti(root / "data" / case / f"{name}.nii.gz", other)
        save_nifti(root / "net" / f"{case}.nii.gz", NETWORK)
    return root / "data", root / "net"


def refine(images, network, output, *options):
    return run_here(
        "infer", "-i", images, "-p", network, "--input-type", "labels", "-o", output, *options
    )


@pytest.mark.parametrize("kind", [kind for kind in LABEL_MAPS if kind != "aparc+aseg"])
def test_a_label_map_is_no_modality_unless_it_is_listed(tmp_path, kind):
    data, network = write_tree(tmp_path, LABEL_MAPS[kind])
    result = refine(data / "{case}/{modality}.nii.gz", network, tmp_path / "out")
    assert result.status == 1
    error = "expected an image of modality msk, found a label map by its voxels"
    assert re.search(rf"p1/msk\.nii\.gz: {error}", result.stderr)
    assert "{modality:t1};" in result.stderr
    assert "1 more case failed like 'p1'" in result.stderr
    assert not list((tmp_path / "out").glob("*.nii.gz"))

    listed = refine(data / "{case}/{modality:t1,msk}.nii.gz", network, tmp_path / "listed")
    assert listed.status == 0, listed.stderr
    assert "p1: msk.nii.gz: looks like a label map (" in listed.stderr
    one = refine(data / "p1" / "msk.nii.gz", network / "p1.nii.gz", tmp_path / "one.nii.gz")
    assert one.status == 0, one.stderr
    assert "msk.nii.gz: looks like a label map (" in one.stderr


@pytest.mark.parametrize("name", ["lesion", "aseg", "annotation_1", "Contours", "GTVp", "wmh"])
def test_no_word_for_a_reference_brings_it_among_the_images(tmp_path, name):
    data, network = write_tree(tmp_path, REFERENCE, name)
    result = refine(data / "{case}/{modality}.nii.gz", network, tmp_path / "out")
    assert result.status == 1
    assert f"expected an image of modality {name}, found a label map" in result.stderr


def test_a_label_map_in_a_channel_of_an_image_is_found(tmp_path):
    folders = write_folders(tmp_path, "a")
    for path in folders.images.iterdir():
        path.unlink()
    save_nifti(folders.images / "a.nii.gz", np.stack([IMAGE, REFERENCE], -1).astype(np.float32))
    result = infer(folders, status=1)
    assert "a.nii.gz: expected an image in channel 1, found a label map" in result.stderr
    # The folder of images may be named as a modality.
    assert "-i '" + str(tmp_path / "{modality:images}/{case}.nii.gz") + "'" in result.stderr
    pattern = tmp_path / "{modality:images}/{case}.nii.gz"
    assert run_here("infer", "-i", pattern, "-p", folders.logits, "-o", folders.output).status == 0


@pytest.mark.parametrize("streams", [False, True])
def test_an_image_that_is_the_networks_output_is_refused_though_it_is_named(
    tmp_path, monkeypatch, streams
):
    folders = write_folders(tmp_path, "a")
    scores = folders.scores("a")
    image = folders.images / "a_0000.nii.gz"
    set_streaming(monkeypatch, streams)
    save_nifti(image, scores[2])
    (folders.images / "a_0001.nii.gz").unlink()
    result = run_here("infer", "-i", image, *folders.arguments[2:])
    assert result.status == 1
    assert "found the network's output: all of its voxels are equal to those of" in result.stderr

    save_nifti(image, NETWORK.astype(np.float32))
    save_nifti(folders.logits / "a.nii.gz", NETWORK)
    result = run_here("infer", "-i", image, *folders.arguments[2:])
    assert "found the network's output" in result.stderr
    assert result.status == 1
    # With other numbers for its labels, it still is.
    result = run_here("infer", "-i", image, *folders.arguments[2:], "--map", "2=1")
    assert "found the network's output" in result.stderr


def test_an_image_that_is_the_reference_is_refused_by_train_crf(tmp_path):
    data, network = write_tree(tmp_path, REFERENCE)
    for case in ("p1", "p2"):
        save_nifti(tmp_path / "labels" / f"{case}.nii.gz", REFERENCE)
    listed = data / "{case}/{modality:t1,msk}.nii.gz"
    others = ("-p", network, "-o", tmp_path / "p.toml", "-q")
    result = run_here("train-crf", "-i", listed, "-l", tmp_path / "labels", *others, status=1)
    assert "msk.nii.gz: expected an image of modality msk, found the reference" in result.stderr
    # One file cannot be both, either; not listed, it is the reference alone, as in `infer`.
    reference = data / "{case}/msk.nii.gz"
    run_here("train-crf", "-i", listed, "-l", reference, *others, status=1)


def test_images_in_place_of_labels_are_refused(tmp_path):
    folders = write_folders(tmp_path, "a")
    whole = np.rint(np.abs(IMAGE)).astype(np.uint16)
    assert len(np.unique(whole)) > 32
    save_nifti(tmp_path / "labels" / "a.nii.gz", whole)
    for option, role in (("-m", "a mask"), ("--strokes", "strokes")):
        result = infer(folders, option, tmp_path / "labels", status=1)
        assert f"a.nii.gz: expected {role}, found an image by its voxels: " in result.stderr


@pytest.mark.parametrize("kind", LABEL_MAPS)
def test_label_maps_and_images_are_told_by_their_voxels(kind):
    assert evidence_of_labels(LABEL_MAPS[kind].T) != ""
    if LABEL_MAPS[kind].min() >= 0:
        assert evidence_of_image(LABEL_MAPS[kind].T) == ""


def gray(low, high, dtype):
    """An image whose values beyond a window are cut off, with air around: (z, y, x)."""
    smooth = np.linspace(-900, 400, 30 * 24 * 20).reshape(30, 24, 20)
    noisy = smooth + RANDOM.normal(0, 12, smooth.shape)
    noisy[:, :, :6] = -2000
    return np.clip(noisy - low, 0, high - low).astype(dtype)


IMAGES = {
    "CT from 0 up, its air cut off": gray(-1000, 500, np.uint16),
    "CT in a window of the lung, the rest 255": (gray(-900, -100, np.float32) / 3.2).astype("u1"),
    "fractions": gray(-1000, 500, np.float32) / 1500,
    "a single value": np.full((4, 5, 6), 7, np.int16),
    "NaN alone": np.full((4, 5, 6), np.nan, np.float32),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_stay_images(kind):
    assert evidence_of_labels(IMAGES[kind]) == ""


def test_modalities_in_another_order_than_the_parameters_have_are_refused(tmp_path):
    text = 'modalities = ["t2", "t1"]\n[bilateral]\ntheta_beta = [0.1, 0.4]\n'
    (tmp_path / "p.toml").write_text(text)
    data, network = write_tree(tmp_path, IMAGE[::-1] + 3, "t2")
    pattern = data / "{case}/{modality}.nii.gz"
    result = refine(pattern, network, tmp_path / "out", "-c", tmp_path / "p.toml")
    assert result.status == 1
    assert "expected the modalities t2, t1, in the order of the parameters" in result.stderr
    assert "found t1, t2" in result.stderr
    assert "{modality:t2,t1}" in result.stderr
    assert CrfParameters.load(tmp_path / "p.toml").modalities == ("t2", "t1")
    require_modalities((), ("T2", "t1"), ("t2", "T1"))  # the same names
    require_modalities((), ("FLAIR", "other"), ("flair", "t1c"))  # names that one of them has
    require_modalities((), (), ("t2", "t1"))
    require_modalities((), ("CT", "CT"), ("CT", "CT"))
    with pytest.raises(InputError, match="expected the modalities t1"):
        require_modalities((), ("msk", "t1"), ("t1",))


@pytest.mark.parametrize("kind", ["logits", "probabilities", "percent"])
def test_a_networks_channels_are_no_image(tmp_path, kind):
    """They were taken as modalities beside a label map, as of the same network."""
    scores = np.eye(3, dtype=np.float32)[NETWORK] * 6 + RANDOM.normal(0, 1, (*GRID_SHAPE, 3))
    if kind != "logits":
        scores = np.exp(scores)
        scores *= (1.0 if kind == "probabilities" else 100.0) / scores.sum(-1, keepdims=True)
    save_nifti(tmp_path / "scores" / "p1.nii.gz", scores.astype(np.float32))
    save_nifti(tmp_path / "labels" / "p1.nii.gz", REFERENCE)
    failed = refine(tmp_path / "scores", tmp_path / "labels", tmp_path / "out")
    assert failed.status == 1
    assert "expected an image, found a network's output by its voxels" in failed.stderr
    images = np.stack([IMAGE, IMAGE[::-1] + 3, IMAGE + 1000], -1)
    save_nifti(tmp_path / "scores" / "p1.nii.gz", images)
    assert refine(tmp_path / "scores", tmp_path / "labels", tmp_path / "out").status == 0


def test_files_that_are_called_by_modalities_in_another_order_are_refused(tmp_path):
    text = 'modalities = ["dwi", "adc"]\n[bilateral]\ntheta_beta = [0.1, 1.0]\n'
    (tmp_path / "p.toml").write_text(text)
    data, network = write_tree(tmp_path, IMAGE[::-1] + 3, "x")
    files = []
    for name, source in (("c1_ADC", "t1"), ("DWI/c1", "x")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        files.append(tmp_path / f"{name}.nii.gz")
        files[-1].symlink_to(data / "p1" / f"{source}.nii.gz")
    given = ("-p", network / "p1.nii.gz", "-o", tmp_path / "o.nii.gz", "-c", tmp_path / "p.toml")
    failed = run_here("infer", "-i", files[0], "-i", files[1], *given, status=1)
    assert "expected the modalities dwi, adc, in the order of the parameters" in failed.stderr
    run_here("infer", "-i", files[1], "-i", files[0], *given, status=0)


def test_values_per_modality_in_the_order_of_the_alphabet_are_told(tmp_path):
    (tmp_path / "p.toml").write_text("[bilateral]\ntheta_beta = [0.1, 1.0]\n")
    data, network = write_tree(tmp_path, IMAGE[::-1] + 3, "adc")
    told = {}
    for words in ("", ":t1,adc"):
        pattern = data / f"{{case}}/{{modality{words}}}.nii.gz"
        result = refine(pattern, network, tmp_path / "out", "-c", tmp_path / "p.toml")
        assert result.status == 0
        told[words] = "in the order of the alphabet, adc, t1" in result.stderr
    assert told == {"": True, ":t1,adc": False}


def test_images_and_label_maps_with_names_of_one_kind_are_told_apart_by_a_pattern_alone(tmp_path):
    for number in (0, 1):
        save_nifti(tmp_path / "data" / f"volume-{number}.nii.gz", IMAGE)
        save_nifti(tmp_path / "data" / f"segmentation-{number}.nii.gz", REFERENCE)
    result = refine(tmp_path / "data", tmp_path / "data", tmp_path / "out")
    assert result.status == 1
    assert "images and label maps cannot be told apart by name" in result.stderr


def test_info_shows_the_role_of_each_file_with_its_evidence(tmp_path):
    data, network = write_tree(tmp_path, REFERENCE)
    result = run_here(
        "info", "-i", data / "{case}/t1.nii.gz", "-p", network, "--input-type", "labels"
    )
    assert result.status == 0, result.stdout
    rows = [line.split("  ") for line in result.stdout.splitlines() if line.startswith("    ")]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows == [
        [
            "image",
            "image",
            "18×15×11, 1.00×1.25×2.50 mm, ALI",
            "t1.nii.gz",
            "by its place and name, voxels of an image",
        ],
        [
            "network's output",
            "label map",
            "the grid of the image",
            "p1.nii.gz",
            "one value per voxel, whole numbers",
        ],
    ]
    # The voxels of the first case tell that a modality is none, for the other cases as well.
    wrong = run_here("info", "-i", data / "{case}/{modality}.nii.gz")
    assert wrong.status == 1
    assert "0 cases in order, 2 problems" in wrong.stdout
    assert "msk.nii.gz  by its place and name, voxels of a label map, 3 diff" in wrong.stdout
    assert "found a label map by its voxels" in wrong.stdout
    assert "2 modalities" not in wrong.stdout


def test_the_first_lines_say_what_each_input_is_taken_for(tmp_path):
    folders = write_folders(tmp_path, "a")
    save_nifti(tmp_path / "masks" / "a.nii.gz", np.ones(GRID_SHAPE, np.uint8))
    lines = infer(folders, "-m", tmp_path / "masks", status=0).stderr.splitlines()
    taken = "network's output: 4 channels, logits or probabilities; mask: where it is not 0"
    assert lines[1] == f"images: 2 modalities; {taken}"
    verbose = infer(folders, "-v", status=0).stderr.splitlines()
    assert verbose[1].startswith("image: image: ")
    assert verbose[3].endswith("several values per voxel; they tell which")


def test_train_crf_writes_the_names_of_the_modalities(tmp_path):
    data, network = write_tree(tmp_path, IMAGE[::-1] + 3, "t2")
    for case in ("p1", "p2"):
        save_nifti(tmp_path / "labels" / f"{case}.nii.gz", REFERENCE)
    output = tmp_path / "p.toml"
    options = ("-p", network, "-l", tmp_path / "labels", "-o", output, "--num-iterations", 1)
    run_here("train-crf", "-i", data / "{case}/{modality}.nii.gz", *options, "-q", status=0)
    assert CrfParameters.load(output).modalities == ("t1", "t2")


def test_a_label_map_on_another_grid_is_told_before_it_is_interpolated(tmp_path):
    data, network = write_tree(tmp_path, REFERENCE, "t2")
    coarse = AFFINE @ np.diag([2.0, 2.0, 2.0, 1.0])
    for case in ("p1", "p2"):
        save_nifti(data / case / "t2.nii.gz", REFERENCE[::2, ::2, ::2], coarse)
    images = data / "{case}/{modality}.nii.gz"
    result = refine(images, network, tmp_path / "out", "--resample=linear")
    assert result.status == 1
    assert "expected an image of modality t2, found a label map by its voxels" in result.stderr
