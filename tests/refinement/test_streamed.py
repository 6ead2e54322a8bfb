"""Cases whose channels are streamed from the file: as in memory, whatever the file, and the same
errors.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import (
    GRID_SHAPE,
    Folders,
    files_in,
    load_nifti,
    run_here,
    save_nifti,
    set_streaming,
    write_folders,
)
from oracles import softmax
from tile_cases import TileCase, make_case, refine

from crfrefine.arrays.network import StreamedNetwork
from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.io.reading import Piece
from crfrefine.parameters.model import CrfParameters
from crfrefine.refinement.refining import refine_network
from crfrefine.refinement.tiles.planning import plan_stream

MODEL = (
    "--set",
    "mean_field.filter=truncated",
    "--set",
    "bilateral.theta_alpha=1.5",
    "--device",
    "cpu",
)
NUM_LABELS = 4
THRESHOLD = 1e-4


def logits_of(folders):
    """(L, x, y, z) logits of the case, sharp enough that most labels are left out somewhere."""
    return np.moveaxis(2 * load_nifti(folders.logits / "a.nii.gz").astype(np.float32), -1, 0)


def replace(folders, name):
    (folders.logits / "a.nii.gz").unlink()
    return folders.logits / name


def npz(kind, dtype):
    def write(folders):
        channels = logits_of(folders)
        channels = softmax(channels) if kind == "probabilities" else channels
        np.savez_compressed(
            replace(folders, "a.npz"), **{kind: channels.transpose(0, 3, 2, 1).astype(dtype)}
        )

    return write


def nifti(folders):
    save_nifti(folders.logits / "a.nii.gz", np.moveaxis(logits_of(folders), 0, -1))


def with_mask(folders):
    nifti(folders)
    mask = np.zeros(GRID_SHAPE, np.uint8)
    mask[3:15, 2:, 1:9] = 1
    save_nifti(folders.output.parent / "masks" / "a.nii.gz", mask)


FORMATS = [
    pytest.param(npz("probabilities", np.float16), id="npz float16 probabilities"),
    pytest.param(npz("logits", np.float16), id="npz float16 logits"),
    pytest.param(nifti, id="NIfTI with four axes"),
    pytest.param(with_mask, id="mask"),
]


def run(folders, monkeypatch, *options, streams):
    """Run infer; streaming, or with all channels in memory. Says how many cases were streamed in
    `seen`.
    """
    seen = []

    def count(*arguments):
        seen.append("streamed")
        return plan_stream(*arguments)

    monkeypatch.setattr("crfrefine.refinement.preparing.plan_stream", count)
    set_streaming(monkeypatch, streams)
    masks = folders.output.parent / "masks"
    options = (*options, "-m", masks) if masks.is_dir() else options
    result = run_here("infer", *folders.arguments, *MODEL, *options)
    assert bool(seen) == streams or result.status != 0
    return result


@pytest.mark.parametrize("write", FORMATS)
def test_streamed_cases_are_as_in_memory(write, tmp_path, monkeypatch):
    folders = write_folders(tmp_path, "a")
    write(folders)
    outputs = []
    for name, streams in (("memory", False), ("streamed", True)):
        own = Folders(folders.images, folders.logits, tmp_path / name)
        options = ("--save-probabilities", "--save-logits", "--summary", tmp_path / f"{name}.json")
        # A label that was left out below the threshold would have had up to its power.
        options += ("--set", "mean_field.output_temperature=0.5")
        result = run(own, monkeypatch, *options, streams=streams)
        assert result.status == 0, result.stderr
        outputs.append(
            [
                load_nifti(own.output / f"a{suffix}.nii.gz")
                for suffix in ("", "_probabilities", "_logits")
            ]
        )
    (labels, probabilities, _), (streamed_labels, streamed, logits) = outputs
    np.testing.assert_array_equal(streamed_labels, labels)
    assert streamed.shape == probabilities.shape
    # The mask's outside: 0 and 1 instead of the network's probabilities.
    if write is with_mask:
        inside = load_nifti(tmp_path / "masks" / "a.nii.gz") != 0
    else:
        inside = np.ones(labels.shape, np.bool_)
    # The files hold what the labels that took part share: up to a few thresholds less than with all
    # labels.
    np.testing.assert_allclose(
        streamed[inside], probabilities[inside], atol=3 * NUM_LABELS * THRESHOLD
    )
    np.testing.assert_allclose(streamed.sum(axis=-1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(logits.argmax(axis=-1), streamed_labels)
    memory, stream = (
        json.loads((tmp_path / f"{name}.json").read_text())["cases"][0]
        for name in ("memory", "streamed")
    )
    assert memory["voxels_changed"] == stream["voxels_changed"]


def with_nan(folders):
    channels = logits_of(folders)
    channels[0, 4, 5, 6] = np.nan
    np.savez(replace(folders, "a.npz"), logits=channels.transpose(0, 3, 2, 1))


def cut_off(folders):
    npz("logits", np.float32)(folders)
    path = folders.logits / "a.npz"
    path.write_bytes(path.read_bytes()[:-5000])


# a value for each plane, equal in all labels
RANDOM = np.random.default_rng(0).uniform(-9, 9, (3, 1, 1)).astype(np.float32)


@pytest.mark.parametrize(
    "padding", [-1.0, -5.0, 7.0, 0.3, RANDOM], ids=["-1", "-5", "7", "0.3", "random"]
)
@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1, "probabilities: all values lie in"),
        (0, "logits: it has values outside"),
        (100, "sum to 100 at"),
    ],
)
def test_padding_of_any_value_does_not_decide_what_values_are(
    padding, factor, words, tmp_path, monkeypatch
):
    folders = write_folders(tmp_path, "a")
    channels = factor * softmax(logits_of(folders)) if factor else logits_of(folders)
    channels[:, :3] = padding  # Where the network did not look, all labels have one value.
    save_nifti(folders.logits / "a.nii.gz", np.moveaxis(channels, 0, -1).astype(np.float32))
    found = []
    for name, streams in (("memory", False), ("streamed", True)):
        own = Folders(folders.images, folders.logits, tmp_path / name)
        result = run(own, monkeypatch, streams=streams)
        assert words in result.stderr
        assert result.status == (factor == 100)
        if factor != 100:
            assert f"{3 * 15 * 11} of {18 * 15 * 11} voxels" in result.stderr
            found.append(load_nifti(own.output / "a.nii.gz"))
    if found:
        np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "f4"])
def test_one_hot_files_are_label_maps(dtype, streams, tmp_path, monkeypatch):
    """The same arrays as of the label map; label 2 does not occur, so labels are not channels."""
    folders = write_folders(tmp_path, "a")
    labels = logits_of(folders).argmax(axis=0).astype(np.uint8)
    labels[labels == 2] = 3
    set_streaming(monkeypatch, streams)
    written = []
    for name, values in (("map", labels), ("one_hot", np.eye(NUM_LABELS, dtype=dtype)[labels])):
        save_nifti(folders.logits / "a.nii.gz", values)
        own = Folders(folders.images, folders.logits, tmp_path / name)
        result = run_here("infer", *own.arguments, *MODEL, "--save-probabilities", status=0)
        assert "a.nii.gz is taken as a label map: " in result.stderr
        written.append(
            (load_nifti(own.output / "a.nii.gz"), load_nifti(own.output / "a_probabilities.nii.gz"))
        )
    for one, other in zip(*written, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (written[0][0] != labels).any()
    by_word = run_here("infer", *own.arguments, *MODEL, "--input-type", "probabilities", status=0)
    assert "is taken as probabilities: requested" in by_word.stderr


def test_logits_of_an_image_of_two_axes_are_not_streamed(tmp_path, monkeypatch):
    """Files of nibabel have a third axis of one voxel there."""
    folders = write_folders(tmp_path, "a")
    for path in sorted(folders.images.iterdir()):
        save_nifti(path, load_nifti(path)[:, :, 4])
    save_nifti(folders.logits / "a.nii.gz", np.moveaxis(logits_of(folders)[..., 4:5], 0, -1))
    run(folders, monkeypatch, streams=False)
    in_memory = load_nifti(folders.output / "a.nii.gz")
    set_streaming(monkeypatch)
    run_here("infer", *folders.arguments, *MODEL, status=0)
    np.testing.assert_array_equal(load_nifti(folders.output / "a.nii.gz"), in_memory)


@pytest.mark.parametrize("spoil", [with_nan, cut_off])
def test_bad_files_fail_as_in_memory(spoil, tmp_path, monkeypatch):
    folders = write_folders(tmp_path, "a")
    spoil(folders)
    for streams in (False, True):
        result = run(folders, monkeypatch, "--save-probabilities", streams=streams)
        assert result.status == 1, result.stdout
        assert result.stderr.count("a.npz") == 1
        assert "Traceback" not in result.stderr
        assert [name for name in files_in(folders.output) if not name.endswith(".json")] == []


class Pieces:
    """Channels of a case, as pieces of some planes."""

    def __init__(self, case, num_planes):
        self.case = case
        self.num_planes = num_planes
        self.num_readings = 0

    def __call__(self):
        self.num_readings += 1
        for label, channel in enumerate(self.case.logits):
            for start in range(0, len(channel), self.num_planes):
                planes = slice(start, min(start + self.num_planes, len(channel)))
                yield Piece(slice(label, label + 1), planes, channel[None, planes].copy())

    def refined(self, parameters, num_bytes=None):
        """Refine the case, whose last axis is the slowest one to the user."""
        shape = self.case.logits.shape
        case = self.case
        network = StreamedNetwork(self, shape[0], shape[1:], "logits", None, Path("a.npz"))
        mask = None if case.mask is None else case.mask.T
        image = case.image.reshape(shape[1:]).T
        context = RunContext(threads=1, num_bytes=num_bytes)
        return refine_network(
            network,
            image,
            spacing=case.spacing[::-1],
            parameters=parameters,
            mask=mask,
            context=context,
            backend=get_backend("cpu"),
        )


@pytest.mark.parametrize("num_planes", [3, 50])
def test_tiles_are_read_again_where_domains_grow(num_planes, monkeypatch):
    """Label 1 spreads along the last axis, far beyond the tiles that were kept of it."""
    probabilities = np.full((2, 9, 8, 120), 0.009)
    probabilities[1, :, :, :20] = 1 - 1e-6
    probabilities[0] = 1 - probabilities[1]
    case = TileCase(
        np.log(probabilities).astype(np.float32),
        np.zeros((9, 8, 120), np.float32),
        (1.0, 1.0, 1.0),
        None,
        "logits",
    )
    changes = {
        "bilateral.weight": (1.0, 16.0),
        "bilateral.theta_alpha": 1.6,
        "mean_field.filter": "truncated",
    }
    changes |= {
        "mean_field.num_iterations": 40,
        "mean_field.tolerance": 0.0,
        "mean_field.normalization": "after",
    }
    parameters = CrfParameters().replace(**changes, **{"mean_field.label_threshold": 0.01})
    expected = refine(case, parameters, 0.0).label_map
    monkeypatch.setattr("crfrefine.refinement.tiles.streaming.SHARE_OF_CANDIDATES", 1 << 28)
    for num_bytes, least in ((1 << 40, 2), (None, 1)):  # One to survey, one to keep tiles; or both.
        read = Pieces(case, num_planes)
        np.testing.assert_array_equal(read.refined(parameters, num_bytes).label_map.T, expected)
        assert read.num_readings > least


@pytest.mark.parametrize("num_planes", [5, 50])
def test_channels_are_read_once_where_their_tiles_fit(num_planes, monkeypatch):
    """To the bit, as when they are read twice, because there is no room, or when tiles are looked
    through in between.
    """
    case = make_case(3, (19, 26, 75), 6, margin=30.0, with_mask=True)
    parameters = CrfParameters().replace(
        **{"mean_field.filter": "truncated", "mean_field.num_iterations": 3}
    )
    once, looked, twice = (Pieces(case, num_planes) for _ in range(3))
    results = [once.refined(parameters)]
    monkeypatch.setattr("crfrefine.refinement.tiles.streaming.FIRST_LOOK", 1 << 12)
    results.append(looked.refined(parameters))
    monkeypatch.setattr("crfrefine.refinement.tiles.streaming.SHARE_OF_CANDIDATES", 1 << 28)
    results.append(twice.refined(parameters, num_bytes=1 << 40))
    assert [read.num_readings for read in (once, looked, twice)] == [1, 1, 2]
    for result in results[1:]:
        np.testing.assert_array_equal(result.label_map, results[0].label_map)
        assert result.report == results[0].report
        for label in range(6):
            np.testing.assert_array_equal(
                *(one.channels.channel(label, slice(0, 75), 1.0) for one in (result, results[0]))
            )


@pytest.mark.parametrize("num_rows", [3, 40])
def test_a_grid_of_two_axes_comes_in_rows(num_rows):
    """To the bit as in memory; large files come in pieces of some rows."""
    case = make_case(5, (40, 75), 3, margin=30.0)
    parameters = CrfParameters().replace(**{"mean_field.filter": "truncated"})
    expected = refine(case, parameters, parameters.mean_field.label_threshold)
    found = Pieces(case, num_rows).refined(parameters)
    np.testing.assert_array_equal(found.label_map.T, expected.label_map)
    np.testing.assert_array_equal(found.network_label_map.T, expected.network_label_map)
    assert found.energy == expected.energy


@pytest.mark.parametrize(
    "bias",
    [(0.375, -32.5, 0.0, 31.75, -0.5, 1.5), (0.0, 0.0, 300.0, 0.0, 0.0, 0.0)],
    ids=["some", "all settled"],
)
def test_channels_with_a_bias_are_streams_of_shifted_logits(bias):
    """To the bit; outside the mask the labels stay the network's."""
    case = make_case(3, (19, 26, 75), 6, margin=30.0, with_mask=True)
    parameters = CrfParameters().replace(
        **{
            "mean_field.filter": "truncated",
            "mean_field.temperature": 1.5,
            "bilateral.theta_beta": 0.3,
        }
    )
    logits = np.where(
        case.mask, case.logits + np.array(bias, np.float32)[:, None, None, None], case.logits
    )
    found = Pieces(case, 5).refined(parameters.replace(**{"mean_field.bias": bias}))
    expected = Pieces(dataclasses.replace(case, logits=logits), 5).refined(parameters)
    np.testing.assert_array_equal(found.network_label_map.T, case.logits.argmax(axis=0))
    assert (found.network_label_map != expected.network_label_map).T[case.mask].mean() > 0.1
    np.testing.assert_array_equal(found.label_map, expected.label_map)
    for label in range(6):
        for output_temperature in (1.0, None):
            one, other = (
                result.channels.channel(label, slice(3, 17), output_temperature)
                for result in (found, expected)
            )
            np.testing.assert_array_equal(one, other)
    assert found.report == expected.report


PEAK = """
import atexit, pathlib, sys
from crfrefine.cli.main import app

def show_peak():
    status = pathlib.Path("/proc/self/status").read_text()
    print(status.partition("VmHWM:")[2].split()[0])

atexit.register(show_peak)
app(sys.argv[1:])
"""


@pytest.mark.long
def test_slabs_hold_the_limit_of_memory(tmp_path):
    """The system counts the peak of a process: four modalities, 48 labels that all meet others."""
    shape = (110, 90, 200)
    x, y, z = np.indices(shape)
    labels = ((1 + x // 20 + 6 * (y // 24) + 24 * (z // 100)) * (y > 11)).astype(np.uint8)
    for modality in range(4):
        noise = np.random.default_rng(modality).normal(0.0, 20.0, shape)
        save_nifti(
            tmp_path / "images" / f"a_{modality:04d}.nii.gz", (10 * labels + noise).astype(np.int16)
        )
    save_nifti(tmp_path / "maps" / "a.nii.gz", labels)
    for limit in (170, 190):
        files = (
            "-i",
            tmp_path / "images",
            "-p",
            tmp_path / "maps",
            "-o",
            tmp_path / "out",
            "--max-memory",
            f"{limit}M",
        )
        options = (
            "-v",
            "--threads",
            "1",
            "--set",
            "bilateral.theta_alpha=1.5",
            "--set",
            "mean_field.num_iterations=3",
        )
        done = subprocess.run(
            [sys.executable, "-c", PEAK, "infer", *files, *options],
            capture_output=True,
            text=True,
            check=True,
        )
        assert " slabs" in done.stderr
        assert int(done.stdout.split()[-1]) < limit << 10
