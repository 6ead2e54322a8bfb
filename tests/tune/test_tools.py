"""Tools of the page of `tune`: what they find, drawn as a stroke that `infer --strokes` takes."""

import io
from dataclasses import replace

import numpy as np
import pytest
from cli_helpers import run_here
from PIL import Image
from scipy import ndimage
from tune_helpers import options_for, write_islands

from crfrefine.errors import InputError
from crfrefine.io import read_volume
from crfrefine.pictures.planes import PLANES
from crfrefine.tune import tools as tools_module
from crfrefine.tune.finding import find_cases_to_show
from crfrefine.tune.tools import fill_alike
from crfrefine.tune.worklist import Worklist


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_islands(tmp_path_factory.mktemp("tools"))


class Opened:
    """The open case, what it holds upright, and what tools draw there."""

    def __init__(self, folder, corrections):
        options = options_for(folder)
        inputs = replace(options.inputs, input_type="labels")
        self.folder = folder
        self.corrections = corrections
        options = replace(options, inputs=inputs, corrections=corrections)
        self.worklist = Worklist(options, find_cases_to_show(options))
        self.session = self.worklist.session(0)
        case = self.session.case
        self.upright = case.upright
        self.labels = case.upright.apply(case.network_labels)
        self.image = case.upright.apply(case.image[0])
        self.spacing = case.upright_spacing

    def seed(self, voxel):
        """The voxel of the upright grid that a voxel of the array is; the flat one is slice 6."""
        grid = self.session.case.network_labels.shape
        is_seed = np.zeros(grid, bool)
        is_seed[tuple(voxel[: len(grid)])] = True
        return np.argwhere(self.upright.apply(is_seed))[0].tolist()

    def draw(self, shape, place, value, plane=0, **within):
        """Draw what a tool finds; return the voxels that have the value then, upright."""
        limits = {"modality": 0, **within} if "low" in within else within
        self.session.draw(
            plane, place, place[:2], value, shape=shape, radius=0, within=limits, mark=""
        )
        return self.upright.apply(self.session.drawing.values == value)

    def check_files(self):
        """The page's result is that of `infer --strokes`, and one step back nothing is drawn."""
        session = self.session
        drawn = session.drawing.values.copy()
        session.save_case("", {})
        inputs = ("-i", self.folder.images, "-p", self.folder.logits, "--input-type", "labels")
        parameters = ("-c", self.corrections / "parameters" / "a.toml", "--threads", 1)
        strokes = ("--strokes", self.corrections / "strokes")
        out = self.corrections / "out"
        run_here("infer", *inputs, *parameters, *strokes, "-o", out, status=0)
        infers = read_volume(out / "a.nii.gz").data
        np.testing.assert_array_equal(infers, session.shown.labels)
        np.testing.assert_array_equal(
            infers, read_volume(self.corrections / "refined" / "a.nii.gz").data
        )
        is_drawn = drawn > 0
        np.testing.assert_array_equal(infers[is_drawn], np.where(drawn == 255, 0, drawn)[is_drawn])
        session.undo("")
        assert not session.drawing.values.any()
        session.redo("")
        np.testing.assert_array_equal(session.drawing.values, drawn)


@pytest.fixture(params=["space", "flat"])
def opened(request, folders, tmp_path):
    opened = Opened(folders[request.param], tmp_path / "kept")
    yield opened
    opened.worklist.end()


def connected(mask, seed):
    """The voxels of a mask that are connected to a seed over faces."""
    numbers, _ = ndimage.label(mask)
    return numbers == numbers[tuple(seed)]


@pytest.mark.parametrize("shape", ["fill", "flood"])
def test_a_fill_takes_what_is_connected_to_the_seed_in_a_range(opened, shape):
    seed = opened.seed((9, 12, 6))
    is_bright = (opened.image >= 50) & (opened.image <= 1000)
    if opened.labels.ndim == 3 and shape == "fill":
        is_bright &= np.indices(opened.labels.shape)[2] == seed[2]
    filled = opened.draw(shape, seed, 2, low=50, high=1000)
    np.testing.assert_array_equal(filled, connected(is_bright, seed))
    assert np.count_nonzero(filled) > 40
    opened.check_files()


def test_a_fill_goes_around_labels_that_are_protected(opened):
    seed = opened.seed((14, 18, 6))
    is_open = (opened.labels != 1) & (opened.image >= 30) & (opened.image <= 80)
    if opened.labels.ndim == 3:
        is_open &= np.indices(opened.labels.shape)[2] == seed[2]
    filled = opened.draw("fill", seed, 255, low=30, high=80, over=[0, 2])
    np.testing.assert_array_equal(filled, connected(is_open, seed))
    with pytest.raises(InputError, match="protected"):
        opened.draw("fill", opened.seed((17, 22, 6)), 2, low=30, high=80, over=[0, 2])
    opened.check_files()


@pytest.mark.parametrize(("shape", "seed"), [("island", (17, 22, 6)), ("others", (9, 12, 6))])
def test_an_island_is_removed_or_all_others_are(opened, shape, seed):
    island = opened.seed((17, 22, 6))
    numbers, count = ndimage.label(opened.labels == 1, np.ones((3,) * opened.labels.ndim))
    assert count == 2
    with pytest.raises(InputError, match="nothing is drawn"):
        opened.draw(shape, opened.seed(seed), 255, over=[2])
    removed = opened.draw(shape, opened.seed(seed), 255)
    np.testing.assert_array_equal(removed, numbers == numbers[tuple(island)])
    opened.check_files()


def test_slices_between_two_drawn_ones_are_filled(folders, tmp_path):
    """In a plane of voxels that are not squares; what is drawn there already stays."""
    opened = Opened(folders["space"], tmp_path / "kept")
    session = opened.session
    # In the second plane the slices lie along the second axis; a circle of 4 mm, and one of 8 mm.
    for slice_number, radius in ((3, 4.0), (9, 8.0)):
        place = [12, slice_number, 8]
        session.draw(1, place, [12, 8], 2, shape="disk", radius=radius, within={}, mark="")
    session.draw(1, [12, 6, 8], [12, 8], 1, shape="disk", radius=0, within={}, mark="")
    filled = opened.draw("between", [12, 6, 8], 2, plane=1)
    widths = []
    for number in range(2, 11):
        widths.append(np.count_nonzero(filled[:, number].any(axis=1)) * opened.spacing[0])
    assert widths[0] == widths[-1] == 0
    assert widths[1] < widths[4] < widths[7]
    assert widths == [*sorted(widths[:-1]), 0]
    assert not filled[12, 6, 8], "drawn with another label"
    session.undo("")
    assert np.count_nonzero(session.drawing.values == 2) == np.count_nonzero(filled[:, [3, 9]])
    with pytest.raises(InputError, match="parallel to this plane"):
        opened.draw("between", [12, 6, 8], 1, plane=1)
    opened.worklist.end()


def test_a_flat_image_has_no_slices_to_fill_between(folders, tmp_path):
    opened = Opened(folders["flat"], tmp_path / "kept")
    with pytest.raises(InputError, match="no slices"):
        opened.draw("between", [5, 5], 1)
    opened.worklist.end()


def test_the_next_island_is_the_next_smaller_one_and_then_the_largest(opened):
    tools = opened.session.tools
    large = tools.find(1, opened.seed((0, 0, 0)))
    small = tools.find(0, large["place"])
    assert (large["rank"], small["rank"], small["islands"]) == (1, 2, 2)
    assert small["place"] == opened.seed((17, 22, 6))
    assert small["voxels"] < large["voxels"]
    assert tools.find(1, small["place"]) == large
    with pytest.raises(InputError, match="choose a label"):
        tools.find(0, opened.seed((0, 0, 0)))
    with pytest.raises(InputError, match="nothing is found"):
        tools.find(-1, large["place"])
    opened.draw("island", small["place"], 255)
    change = opened.session.tools.find(-1, large["place"])
    assert change == {"place": small["place"], "rank": 1, "islands": 1, "voxels": small["voxels"]}


def test_a_projection_shows_each_island(opened):
    tools = opened.session.tools
    for plane in (0, 1, 2) if opened.labels.ndim == 3 else (0,):
        across, up, through = PLANES[plane][1:]
        picture = np.asarray(Image.open(io.BytesIO(tools.projection(plane, 1))))
        assert picture.shape == (opened.labels.shape[up], opened.labels.shape[across], 3)
        shown = picture[::-1].swapaxes(0, 1)
        is_seen = (
            (opened.labels == 1).any(axis=through)
            if opened.labels.ndim == 3
            else (opened.labels == 1)
        )
        assert (shown[is_seen] > 0).any(axis=-1).all()
        island = opened.seed((17, 22, 6))
        is_gray = np.ptp(shown.astype(int), axis=-1) == 0
        assert not is_gray[island[across], island[up]], "another island has a color"
        assert is_gray[tuple(np.array(opened.seed((9, 12, 6)))[[across, up]])]


def test_a_fill_of_too_many_voxels_is_refused(opened, monkeypatch):
    monkeypatch.setattr(tools_module, "MAX_FOUND", 40)
    with pytest.raises(InputError, match="more than 40 make each answer slow"):
        opened.draw("flood", opened.seed((9, 12, 6)), 2, low=50, high=1000)


def test_a_fill_in_a_plane_stays_there():
    grid = (40, 90, 80)
    box, is_filled = fill_alike((1, 2, 3), (0, 1), grid, lambda box: np.ones(grid, bool)[box])
    assert box == (slice(0, 40), slice(0, 90), slice(3, 4))
    assert is_filled.all()
