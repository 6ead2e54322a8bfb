"""Files on exchanged or mirrored axes are read on the image's grid; results have the same bytes."""

import itertools
import re

import nibabel as nib
import numpy as np
import pytest
from cli_helpers import FAST, run_here
from io_helpers import OBLIQUE, affine_of, numbers, save_itk, save_nifti, world_of
from training_helpers import cases_in

from crfrefine import io
from crfrefine.base.axes import Axes
from crfrefine.base.geometry import reorientation
from crfrefine.cases.case import load_case
from crfrefine.cases.case_files import CaseFiles
from crfrefine.io.reading import read_pieces

SHAPE = (7, 6, 4)
AFFINE = affine_of((1.0, 1.5, 2.5), (3.0, -4.0, 5.0), OBLIQUE)
ORDERS = [
    (axes, signs)
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
ORNT = np.array([[2, -1], [0, 1], [1, -1]])  # exchanges and mirrors axes


def turned(image, orientation=ORNT):
    """A volume of nibabel with its axes exchanged and mirrored by nibabel; the channels stay."""
    return image.as_reoriented(np.asarray(orientation, float))


def scores(shape=SHAPE, num_labels=3, seed=5):
    return np.random.default_rng(seed).normal(0, 3, (*shape, num_labels)).astype(np.float32)


@pytest.mark.parametrize("shape", [SHAPE, (5, 5, 5), (5, 1, 3), (1, 6, 1)])
def test_every_order_of_axes_is_found_as_the_world_coordinates_tell(shape):
    places = world_of(shape, AFFINE)
    for axes, signs in ORDERS:
        other = turned(
            nib.Nifti1Image(np.zeros(shape, np.uint8), AFFINE), list(zip(axes, signs, strict=True))
        )
        found = reorientation(shape, AFFINE, other.shape, other.affine)
        stored = world_of(other.shape, other.affine)
        on_grid = np.stack([found.apply(stored[..., axis]) for axis in range(3)], axis=-1)
        placed = world_of(shape, found.affine(other.affine, other.shape))
        np.testing.assert_allclose(placed, places, atol=1e-4)
        in_file = found.reversed.apply(stored[..., 0].T)
        np.testing.assert_array_equal(in_file, on_grid[..., 0].T)
        np.testing.assert_array_equal(found.undo(on_grid[..., 0]), stored[..., 0])
        places_in_file = found.find(np.indices(shape), shape)
        np.testing.assert_array_equal(stored[places_in_file], on_grid)
        np.testing.assert_allclose(on_grid, places, atol=1e-4)
        for axis, extent in enumerate(other.shape):
            moved = other.affine.copy()
            wider = other.affine.copy()
            moved[:3, 3] += moved[:3, axis] / 2
            wider[:3, axis] *= 1.1
            assert reorientation(shape, AFFINE, other.shape, moved) is None
            assert extent == 1 or reorientation(shape, AFFINE, other.shape, wider) is None
        assert (
            reorientation(shape, AFFINE, (*other.shape[:2], other.shape[2] + 1), other.affine)
            is None
        )
    same = reorientation(shape, AFFINE, shape, AFFINE)
    assert same == Axes((0, 1, 2))


@pytest.mark.parametrize(
    "orientation", [ORNT, [[0, -1], [1, 1], [2, 1]], [[1, 1], [0, 1], [2, -1]]]
)
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_channels_are_read_on_the_grid_of_the_image(name, orientation, tmp_path):
    image = nib.Nifti1Image(scores(), AFFINE)
    grid = io.read_header(save_nifti(tmp_path / "grid.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE))
    other = turned(image, orientation)
    if name.endswith(".nii.gz"):
        nib.save(other, tmp_path / name)
    else:  # the channels of a voxel are together
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ other.affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        values = np.moveaxis(np.asarray(other.dataobj), -1, 0)
        save_itk(
            tmp_path / name,
            values,
            channels=True,
            spacing=[*spacing],
            origin=[*lps[:3, 3]],
            direction=lps[:3, :3] / spacing,
        )
    header = io.placed_on(io.read_header(tmp_path / name), grid)
    assert header.grid_shape == SHAPE
    assert str(header.turning).startswith(f"{name}: voxel axes turned from ")
    values = io.read_channels(header)
    np.testing.assert_array_equal(values.transpose(3, 2, 1, 0), scores())
    pieces = np.full_like(values, np.nan)
    for piece in read_pieces(header, most_bytes=200):
        pieces[piece.channels, piece.planes] = piece.values
    np.testing.assert_array_equal(pieces, values)
    np.testing.assert_array_equal(
        io.read_logits([tmp_path / name], grid=grid), np.moveaxis(scores(), -1, 0)
    )


def study(folder, turn):
    """Two cases of two modalities; on request, nibabel turns all files but the first modality."""
    places = {name: folder / name for name in ("images", "logits", "masks", "labels", "maps")}
    for place in places.values():
        place.mkdir(parents=True)
    for number, name in enumerate(("a", "b")):
        rng = np.random.default_rng(number)
        reference = np.zeros((14, 12, 9), np.uint8)
        reference[3:9, 4:9, 2:6] = 1
        reference[6:11, 4:7, 3:8] = 2
        logits = 2.0 * (reference[..., None] == np.arange(3)) + rng.normal(
            0, 1.5, (*reference.shape, 3)
        )
        save_nifti(
            places["images"] / f"{name}_0000.nii.gz",
            (100 * reference + rng.normal(0, 20, reference.shape)).astype("i2"),
            AFFINE,
        )
        files = {
            places["images"] / f"{name}_0001.nii.gz": (
                50 * reference + rng.normal(0, 9, reference.shape)
            ).astype("f4"),
            places["logits"] / f"{name}.nii.gz": logits.astype("f4"),
            places["masks"] / f"{name}.nii.gz": (rng.random(reference.shape) < 0.9).astype("u1"),
            places["labels"] / f"{name}.nii.gz": reference,
            places["maps"] / f"{name}.nii.gz": logits.argmax(-1).astype("u1"),
        }
        for path, values in files.items():
            image = nib.Nifti1Image(values, AFFINE)
            nib.save(turned(image) if turn else image, path)
    return folder


def test_commands_write_the_bytes_of_files_reoriented_by_nibabel(tmp_path):
    plain = study(tmp_path / "plain", turn=False)
    other = study(tmp_path / "turned", turn=True)
    for folder in (plain, other):
        common = ("-i", folder / "images", "--masks", folder / "masks", *FAST)
        done = run_here(
            "infer",
            *common,
            "-p",
            folder / "logits",
            "-o",
            folder / "out",
            "--save-logits",
            status=0,
        )
        run_here("infer", *common, "-p", folder / "maps", "-o", folder / "of_maps", status=0)
        again = run_here(
            "infer",
            *common,
            "-p",
            folder / "logits",
            "-o",
            folder / "out",
            "--save-logits",
            "--continue",
            status=0,
        )
        assert "2 skipped" in again.stderr
        told = (
            done.stderr,
            run_here("info", folder, status=0).stdout,
            str(cases_in(folder).notes),
        )
        assert ["turned" in text for text in told] == [folder is other] * 3
        run_here(
            "convert",
            folder / "maps/a.nii.gz",
            folder / "a.mha",
            "--like",
            folder / "images/a_0000.nii.gz",
            status=0,
        )
        run_here(
            "convert",
            folder / "logits/a.nii.gz",
            folder / "a.npz",
            "--like",
            folder / "images/a_0000.nii.gz",
            status=0,
        )
        run_here(
            "convert",
            folder / "logits/a.nii.gz",
            folder / "a_map.nii.gz",
            "--to",
            "labels",
            "--like",
            plain / "images/a_0000.nii.gz",
        )
    for name in (
        "out/a.nii.gz",
        "out/b.nii.gz",
        "out/a_logits.nii.gz",
        "of_maps/a.nii.gz",
        "a.mha",
        "a_map.nii.gz",
        "a.npz",
    ):
        assert (plain / name).read_bytes() == (other / name).read_bytes(), name


def test_references_and_methods_on_turned_axes_are_measured_as_on_one_grid(tmp_path):
    plain = study(tmp_path / "plain", turn=False)
    other = study(tmp_path / "turned", turn=True)
    for kind in ("maps", "logits"):
        tables = []
        for number, (labels, methods) in enumerate(
            [(plain, plain), (plain, other), (other, plain)]
        ):
            out = tmp_path / f"{number}{kind}"
            folders = (methods / kind, labels / "labels", "-o", out)
            run_here("evaluate", *folders, "--processes", 1, status=0)
            tables.append(re.split("[,\\n]", (out / "metrics.csv").read_text()))
        assert tables[0] == tables[1]
        # Sums of surface distances depend on the order of the axes by rounding.
        for cell, turned_cell in zip(tables[0], tables[2], strict=True):
            assert cell == turned_cell or float(cell) == pytest.approx(float(turned_cell), rel=1e-5)


def test_files_of_one_label_each_may_have_different_axes(tmp_path):
    grid = save_nifti(tmp_path / "a_0000.nii.gz", numbers(SHAPE), AFFINE)
    paths = []
    for label in range(3):
        image = nib.Nifti1Image(scores()[..., label], AFFINE)
        if label > 0:
            image = turned(image, np.array([[label, 1], [0, -1], [3 - label, 1]]))
        paths.append(tmp_path / f"label{label}.nii.gz")
        nib.save(image, paths[-1])
    np.testing.assert_array_equal(
        load_case(CaseFiles("a", (grid,), tuple(paths))).logits, np.moveaxis(scores(), -1, 0)
    )
