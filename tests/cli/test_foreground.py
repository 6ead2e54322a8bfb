"""A network's output without its background: the same results as with the background in a file."""

import json

import numpy as np
import pytest
from cli_helpers import (
    AFFINE,
    FAST,
    GRID_SHAPE,
    SPACING,
    Folders,
    errors,
    load_nifti,
    run_here,
    save_nifti,
    set_streaming,
)
from evaluation_helpers import read_metrics
from training_helpers import cases_in
from tune_helpers import new_session

import crfrefine
from crfrefine.demo.phantom import make_phantom
from crfrefine.infer.options import InferenceOptions
from crfrefine.info.folders import inspect_folder
from crfrefine.refinement.tiles import streaming
from crfrefine.train.dataset import read_labeled
from crfrefine.tune.options import TuneOptions

PHANTOM = make_phantom(4, GRID_SHAPE, SPACING)
LOG_ODDS = (PHANTOM.logits[1:].max(axis=0) - PHANTOM.logits[0]).astype(np.float32)
EXPONENTIALS = np.exp(PHANTOM.logits - PHANTOM.logits.max(axis=0))
SOFTMAX = (EXPONENTIALS / EXPONENTIALS.sum(axis=0)).astype(np.float32)


def sigmoid(values):
    return (1 / (1 + np.exp(-values))).astype(np.float32)


ALONE = sigmoid(LOG_ODDS)
PAIR = np.stack([1 - ALONE, ALONE])


def save(path, channels):
    """Write (channels, x, y, z), or (x, y, z), in the format of the name."""
    if path.name.endswith(".gz"):
        last = np.moveaxis(channels, 0, -1) if channels.ndim == 4 else channels
        return save_nifti(path, last)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = channels.transpose(*range(channels.ndim - 3), *range(-1, -4, -1))
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        name = "logits" if path.name.startswith("logits") else "probabilities"
        np.savez(path, **{name: array})
    return path


@pytest.fixture
def image(tmp_path):
    return save_nifti(tmp_path / "image.nii.gz", PHANTOM.image[0].astype(np.int16))


def outputs(image, logits, *options, status=0):
    """Run infer on one case; return its refined labels and probabilities, and what it said."""
    paths = logits if isinstance(logits, list) else [logits]
    output = image.with_name("out.nii.gz")
    files = []
    for path in paths:
        files += ["-p", path]
    saved = ("--save-probabilities", "-v")
    result = run_here(
        "infer", "-i", image, *files, "-o", output, *saved, *FAST, *options, status=status
    )
    if status:
        return result.stderr
    labels = load_nifti(output)
    return labels, load_nifti(image.with_name("out_probabilities.nii.gz")), result.stderr


def assert_same(found, expected):
    """The same input, voxel by voxel, gives the same bits."""
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert 0 < np.count_nonzero(expected[0]) < expected[0].size


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("p.nii.gz", ALONE),
        ("p.nii.gz", ALONE[np.newaxis]),
        ("p.npz", ALONE[np.newaxis]),
        ("p.npy", ALONE[np.newaxis]),
        ("p.npy", ALONE),
        ("p.npy", np.asfortranarray(ALONE)),
    ],
    ids=["(x, y, z)", "(x, y, z, 1)", "npz", "npy", "npy (z, y, x)", "npy in Fortran order"],
)
def test_one_foreground_channel_is_refined_as_two_channels(name, channels, image, tmp_path):
    expected = outputs(image, save(tmp_path / "two.nii.gz", PAIR))
    found = outputs(image, save(tmp_path / name, channels))
    assert_same(found, expected)
    assert f"{name}: one channel, taken as the probability of label 1" in found[2]
    of_whole_kind = outputs(image, tmp_path / name, "--input-type", "probabilities")
    assert_same(of_whole_kind, expected)


def test_one_channel_of_log_odds_is_refined_as_logits_of_two_labels(image, tmp_path):
    two = save(tmp_path / "two.nii.gz", np.stack([np.zeros_like(LOG_ODDS), LOG_ODDS]))
    expected = outputs(image, two)
    one = save(tmp_path / "one.nii.gz", LOG_ODDS)
    found = outputs(image, one, "--input-type", "logits")
    assert_same(found, expected)
    assert "one channel, taken as the log-odds of label 1" in found[2]
    assert_same(outputs(image, save(tmp_path / "logits.npz", LOG_ODDS[np.newaxis])), expected)
    assert "--input-type logits" in errors(outputs(image, one, status=1))[0]
    said = outputs(image, one, "--input-type", "probabilities", status=1)
    assert "expected probabilities of label 1 between 0 and 1" in said
    assert "--input-type logits" in said
    probable = save(tmp_path / "p.nii.gz", ALONE)
    said = outputs(image, probable, "--input-type", "logits", status=1)
    assert "--input-type probabilities" in said
    counted = save(tmp_path / "labels.nii.gz", PHANTOM.labels.astype(np.float32))
    said = outputs(image, counted, "--input-type", "logits", status=1)
    assert "none of them negative" in said
    assert "--input-type labels" in said


def test_whole_numbers_and_declared_regions_stay_what_they_were(image, tmp_path):
    mask = save(tmp_path / "mask.nii.gz", (ALONE > 0.5).astype(np.float32))
    assert "is taken as a label map" in outputs(image, mask)[2]
    one = save(tmp_path / "p.nii.gz", ALONE)
    said = outputs(image, one, "--regions", "organ=1")[2]
    assert "sigmoid probabilities of 1 region (organ; --regions)" in said
    assert "taken as the probability" not in said


@pytest.mark.parametrize("labels", [{"background": 0, "a": 1, "b": 2}, {"background": 0, "a": 1}])
def test_one_channel_needs_a_declaration_of_one_label(labels, image, tmp_path):
    one = save(tmp_path / "logits" / "p.nii.gz", ALONE)
    (tmp_path / "logits" / "dataset.json").write_text(json.dumps({"labels": labels}))
    if len(labels) == 2:
        assert outputs(image, one)[0].any()
        return
    said = outputs(image, one, status=1)
    assert "1 channel, without one for the background, expected 3" in said
    assert "dataset.json" in said


FOREGROUND = SOFTMAX[1:]
EXPLICIT = np.concatenate([(1 - FOREGROUND.sum(axis=0))[np.newaxis], FOREGROUND])


@pytest.mark.parametrize("as_files", [True, False])
def test_a_background_is_added_as_it_would_be_in_a_file(as_files, image, tmp_path):
    # Sums of three channels run in the same order in the command and here.
    expected = outputs(image, save(tmp_path / "all.nii.gz", EXPLICIT))
    paths = [save(tmp_path / "p.nii.gz", FOREGROUND)]
    if as_files:
        paths = [save(tmp_path / f"p{k}.nii.gz", FOREGROUND[k]) for k in range(3)]
    said = outputs(image, paths, status=1)
    assert "the background seems to be missing" in errors(said)[0]
    assert "--add-background" in said
    found = outputs(image, paths, "--add-background")
    assert_same(found, expected)
    assert "3 channels, taken as the probabilities of labels 1 to 3" in found[2]


def test_sums_above_one_are_divided_or_refused(image, tmp_path):
    channels = FOREGROUND.copy()
    channels[:, 2, 3, 4] = (0.5, 0.3, 0.206)
    channels[:, 5, 6, 7] = (0.9, 0.1, 0.004)
    found = outputs(image, save(tmp_path / "p.nii.gz", channels), "--add-background")
    assert "sum to more than 1, up to 1.006, are divided by their sum" in found[2]
    assert "2 voxels" in found[2]
    explicit = EXPLICIT.copy()
    for place in ((2, 3, 4), (5, 6, 7)):
        at = (slice(None), *place)
        sums = channels[at].sum(dtype=np.float32)
        explicit[at] = [0, *(channels[at] / sums)]
    assert_same(found, outputs(image, save(tmp_path / "all.nii.gz", explicit)))
    channels[:, 5, 6, 7] = (0.9, 0.1, 0.02)
    said = outputs(image, save(tmp_path / "p.nii.gz", channels), "--add-background", status=1)
    assert "sum to 1.02 at voxel (5, 6, 7), expected at most 1.01" in said


def test_a_background_is_not_added_to_what_has_one_or_is_no_probability(image, tmp_path):
    whole = save(tmp_path / "all.nii.gz", EXPLICIT)
    said = outputs(image, whole, "--add-background", status=1)
    assert "sum to 1 at each voxel already" in said
    logits = save(tmp_path / "logits.nii.gz", PHANTOM.logits)
    said = outputs(image, logits, "--add-background", status=1)
    assert "--add-background needs probabilities between 0 and 1" in said
    some = save(tmp_path / "p.nii.gz", FOREGROUND)
    for options in (("--input-type", "logits"), ("--input-type", "labels"), ("--regions", "a=1")):
        said = outputs(image, some, "--add-background", *options, status=1)
        assert "--add-background" in errors(said)[0]


def test_binary_files_of_all_labels_but_the_background_are_a_label_map(image, tmp_path):
    masks = [(PHANTOM.labels == label).astype(np.uint8) for label in (1, 2, 3)]
    paths = [save(tmp_path / f"m{k}.nii.gz", mask) for k, mask in enumerate(masks)]
    found = outputs(image, paths, "--add-background")
    assert "is taken as a label map" in found[2]
    expected = outputs(image, save(tmp_path / "labels.nii.gz", PHANTOM.labels))
    np.testing.assert_array_equal(found[0], expected[0])


def folders_of(root, **channels):
    """Write a folder of images and one of logits, with the files of one case."""
    save_nifti(root / "images" / "c_0000.nii.gz", PHANTOM.image[0].astype(np.int16))
    for name, values in channels.items():
        save(root / "logits" / f"{name}.nii.gz", values)
    return Folders(root / "images", root / "logits", root / "out")


def test_files_per_label_from_one_on_lack_the_background(tmp_path):
    named = {f"c_ProbMapClass{label}": SOFTMAX[label] for label in (1, 2, 3)}
    folders = folders_of(tmp_path / "some", **named)
    said = run_here("infer", *folders.arguments, *FAST, status=1).stderr
    assert "the background seems to be missing" in said
    assert "--add-background" in said
    run_here("infer", *folders.arguments, *FAST, "--add-background", status=0)
    whole = folders_of(tmp_path / "all", c=EXPLICIT)
    run_here("infer", *whole.arguments, *FAST, status=0)
    np.testing.assert_array_equal(
        load_nifti(folders.output / "c.nii.gz"), load_nifti(whole.output / "c.nii.gz")
    )


STREAMED = {
    "one": (ALONE, PAIR, ()),
    "log-odds": (
        LOG_ODDS,
        np.stack([np.zeros_like(LOG_ODDS), LOG_ODDS]),
        ("--input-type", "logits"),
    ),
    "several": (FOREGROUND, EXPLICIT, ("--add-background",)),
}


@pytest.mark.parametrize("resample", [(), ("--resample", "cubic")])
@pytest.mark.parametrize("name", STREAMED)
def test_streamed_channels_without_a_background_are_as_with_one(
    name, resample, image, tmp_path, monkeypatch
):
    """On the image's grid, and coarser ones interpolated onto it."""
    channels, explicit, options = STREAMED[name]
    affine = AFFINE
    if resample:
        affine = AFFINE @ np.diag([1.5, 1.5, 1.0, 1.0])
        channels = channels[..., :12, :10, :]
        explicit = explicit[:, :12, :10]
    last = np.moveaxis(channels, 0, -1) if channels.ndim == 4 else channels
    without = save_nifti(tmp_path / "some.nii.gz", last, affine)
    whole = save_nifti(tmp_path / "all.nii.gz", np.moveaxis(explicit, 0, -1), affine)
    model = ("--set", "mean_field.filter=truncated", "--device", "cpu", *resample)
    dense = outputs(image, without, *model, *options)
    assert_same(dense, outputs(image, whole, *model))
    seen = []
    survey = streaming.survey_stream

    def count(*arguments, **more):
        seen.append("streamed")
        return survey(*arguments, **more)

    monkeypatch.setattr("crfrefine.refinement.tiles.streaming.survey_stream", count)
    monkeypatch.setattr("crfrefine.refinement.tiles.coarse.survey_stream", count)
    set_streaming(monkeypatch)
    found = outputs(image, without, *model, *options)
    assert_same(found, outputs(image, whole, *model))
    np.testing.assert_array_equal(found[0], dense[0])
    assert len(seen) == 2


def test_streamed_channels_are_checked_as_in_memory(image, tmp_path, monkeypatch):
    set_streaming(monkeypatch)
    model = ("--set", "mean_field.filter=truncated", "--device", "cpu")
    above = FOREGROUND.copy()
    above[:, 5, 6, 7] = (0.9, 0.1, 0.02)
    for channels, options, message in (
        (FOREGROUND, (), "the background seems to be missing"),
        (above, ("--add-background",), "sum to 1.02 at voxel (5, 6, 7)"),
        (EXPLICIT, ("--add-background",), "sum to 1 at each voxel already"),
        (ALONE, ("--input-type", "logits"), "--input-type probabilities"),
        (LOG_ODDS, ("--input-type", "probabilities"), "expected probabilities of label 1"),
    ):
        path = save(tmp_path / "p.nii.gz", channels)
        assert message in outputs(image, path, *model, *options, status=1)
    above[:, 5, 6, 7] = (0.9, 0.1, 0.004)
    path = save(tmp_path / "p.nii.gz", above)
    found = outputs(image, path, *model, "--add-background")
    assert "sum to more than 1, up to 1.004" in found[2]
    monkeypatch.undo()
    dense = outputs(image, path, *model, "--add-background")
    np.testing.assert_array_equal(found[0], dense[0])
    # Tiles with and without a label sum in another order.
    np.testing.assert_allclose(found[1], dense[1], atol=1e-5)


def test_probabilities_with_overshoot_stream_as_in_memory(image, tmp_path, monkeypatch):
    values = SOFTMAX.copy()
    values[0] += 0.05 * np.sign(values[0] - 0.5)
    values[3] = 1 - values[:3].sum(axis=0)
    path = save(tmp_path / "p.nii.gz", values)
    model = ("--set", "mean_field.filter=truncated", "--device", "cpu")
    dense = outputs(image, path, *model)
    assert "is taken as probabilities: they sum to 1 at each voxel" in dense[2]
    clipped = np.clip(values, 0, 1)
    clipped /= clipped.sum(axis=0)
    expected = outputs(image, save(tmp_path / "clipped.nii.gz", clipped), *model)
    np.testing.assert_array_equal(dense[0], expected[0])
    # The logarithm of a sum is added to all labels: rounding of logits up to 16.
    np.testing.assert_allclose(dense[1], expected[1], atol=1e-5)
    set_streaming(monkeypatch)
    streamed = outputs(image, path, *model)
    assert "is taken as probabilities: they sum to 1 at each voxel" in streamed[2]
    np.testing.assert_array_equal(streamed[0], dense[0])
    np.testing.assert_allclose(streamed[1], dense[1], atol=1e-5)


def test_a_manifest_and_the_description_of_a_folder_take_one_channel(tmp_path):
    folders = folders_of(tmp_path, c=ALONE)
    run_here("infer", *folders.arguments, *FAST, status=0)
    table = tmp_path / "cases.csv"
    table.write_text("case,images,logits\nc,images/c_0000.nii.gz,logits/c.nii.gz\n")
    output = tmp_path / "listed"
    run_here("infer", "--manifest", table, "-o", output, *FAST, status=0)
    np.testing.assert_array_equal(
        load_nifti(output / "c.nii.gz"), load_nifti(folders.output / "c.nii.gz")
    )
    report = inspect_folder(tmp_path)
    assert report.problems == []
    assert "one channel for label 1" in report.cases["c"]


def test_training_and_tuning_read_the_same_two_labels(tmp_path):
    for name, channels, options in (
        ("one", ALONE, {}),
        ("some", FOREGROUND, {"add_background": True}),
    ):
        root = tmp_path / name
        folders = folders_of(root, c=channels, d=channels)
        save_nifti(root / "images" / "d_0000.nii.gz", PHANTOM.image[0].astype(np.int16))
        truth = PHANTOM.labels if options else (PHANTOM.labels > 0).astype(np.uint8)
        for case in "cd":
            save_nifti(root / "labels" / f"{case}.nii.gz", truth)
        cases = cases_in(root, **options)
        explicit = EXPLICIT if options else PAIR
        assert cases.sizes == (len(explicit), 1, 3)
        inputs = InferenceOptions((folders.images,), (folders.logits,), tmp_path, **options)
        session = new_session(TuneOptions(inputs))
        for case in (read_labeled(cases.files[0], cases, threads=1), session.case):
            np.testing.assert_array_equal(case.logits, np.log(np.maximum(explicit, 1e-7)))


def test_probabilities_of_one_channel_are_evaluated_as_those_of_two(tmp_path):
    labels = tmp_path / "labels"
    maps = tmp_path / "maps"
    truth = (PHANTOM.labels > 0).astype(np.uint8)
    for folder, values in ((labels, truth), (maps, (ALONE > 0.5).astype(np.uint8))):
        save_nifti(folder / "c.nii.gz", values)
    metrics = {}
    for name, channels in (("one", ALONE), ("two", PAIR)):
        folder = save(tmp_path / name / "c.nii.gz", channels).parent
        output = tmp_path / f"report_{name}"
        given = ("--probabilities", f"prediction={folder}")
        run_here("evaluate", maps, labels, *given, "-o", output, "--no-report", status=0)
        metrics[name] = read_metrics(output)
        run_here("evaluate", folder, labels, "-o", output, "--no-report", status=0)
        metrics[f"{name} alone"] = read_metrics(output)
    assert any(metric == "ece" for _, _, metric, _ in metrics["one"])
    declared = {"labels": {"background": 0, "a": 1, "b": 2}}
    (tmp_path / "one" / "dataset.json").write_text(json.dumps(declared))
    said = run_here("evaluate", tmp_path / "one", labels, "-o", output, status=1).stderr
    assert "1 channel, without one for the background, expected 3" in said
    assert metrics["one"] == metrics["two"]
    assert metrics["one alone"] == metrics["two alone"]


def test_evaluation_adds_a_background_and_clips_overshoot(tmp_path):
    labels = save_nifti(tmp_path / "labels" / "c.nii.gz", PHANTOM.labels).parent
    overshot = SOFTMAX.copy()
    overshot[0] += 0.05 * np.sign(overshot[0] - 0.5)
    overshot[3] = 1 - overshot[:3].sum(axis=0)
    clipped = np.clip(overshot, 0, 1)
    clipped /= clipped.sum(axis=0)
    metrics = {}
    for name, channels, options in (
        ("all", EXPLICIT, ()),
        ("some", FOREGROUND, ("--add-background",)),
        ("overshot", overshot, ()),
        ("clipped", clipped, ()),
    ):
        folder = save(tmp_path / name / "c.nii.gz", channels).parent
        output = tmp_path / f"report_{name}"
        run_here("evaluate", folder, labels, "-o", output, "--no-report", *options, status=0)
        metrics[name] = read_metrics(output)
    assert metrics["some"] == metrics["all"]
    assert metrics["overshot"].keys() == metrics["clipped"].keys()
    for key, value in metrics["overshot"].items():
        # Figures of a report, of probabilities that differ by rounding.
        assert value == pytest.approx(metrics["clipped"][key], abs=1e-5, nan_ok=True), key


@pytest.mark.parametrize("order", ["C", "F"])
def test_refine_takes_one_channel_on_the_callers_word(order):
    image = PHANTOM.image[:1]
    options = {"spacing": SPACING, "parameters": "default"}
    for one, two, kind in (
        (ALONE, PAIR, "probabilities"),
        (LOG_ODDS, np.stack([np.zeros_like(LOG_ODDS), LOG_ODDS]), "logits"),
    ):
        given = np.asarray(one[np.newaxis], order=order)
        pair = np.asarray(two, order=order)
        found = crfrefine.refine(given, image, input_type=kind, **options)
        expected = crfrefine.refine(pair, image, input_type=kind, **options)
        np.testing.assert_array_equal(found.label_map, expected.label_map)
        np.testing.assert_array_equal(found.logits, expected.logits)
        assert any("one channel, taken as the" in note for note in map(str, found.notes))
        message = r'logits have 1 label(?s:.*)input_type="probabilities"(?s:.*)"logits"'
        with pytest.raises(crfrefine.errors.InputError, match=message):
            crfrefine.refine(given, image, **options)
    with pytest.raises(crfrefine.errors.InputError, match="expected probabilities of label 1"):
        crfrefine.refine(LOG_ODDS[np.newaxis], image, input_type="probabilities", **options)
    with pytest.raises(crfrefine.errors.InputError, match="expected log-odds of label 1"):
        crfrefine.refine(ALONE[np.newaxis], image, input_type="logits", **options)
