"""Gray values: which intensities are black and white, what counts as CT, and which modality shows a structure best."""

import numpy as np
import pytest

from crfrefine.pages.pictures.windows import BONE, LUNG, SOFT_TISSUE, Window, choose_modality, choose_window

GRID_SHAPE = (30, 24, 10)
STEPS = (1.0, 1.5, 4.0)
NOTHING = np.zeros(GRID_SHAPE, bool)


@pytest.fixture
def structure():
    inside = np.zeros(GRID_SHAPE, bool)
    inside[8:18, 9:17, 3:7] = True
    return inside


def noise(mean, spread, seed=0):
    return np.random.default_rng(seed).normal(mean, spread, GRID_SHAPE).astype(np.float32)


def test_the_window_holds_nearly_all_numbers_that_are_no_background():
    for background in (0, -3.25):  # as of a normalized image
        values = np.concatenate([np.full(5000, background), np.arange(1, 1001), [np.nan, np.inf, -np.inf]]).astype(np.float32)
        window = choose_window(values, np.zeros(values.shape, bool))
        assert (window.low, window.high) == pytest.approx((5.995, 995.005), abs=0.001)  # by hand: 0.5 % of 999 steps from either end
    assert choose_window(np.full(9, np.nan, np.float32), np.ones(9, bool)) == Window(0.0, 1.0)
    assert choose_window(np.full(9, 5, np.float32), np.ones(9, bool)) == Window(4.5, 5.5)


def test_a_small_bright_structure_is_not_white_throughout():
    image = noise(100, 5)
    inside = np.zeros(GRID_SHAPE, bool)
    inside[3:6, 4:6, 2:4] = True  # 12 voxels of 7200: less than what the percentiles leave out
    image[inside] = np.linspace(500, 600, 12)
    assert choose_window(image, NOTHING).high < 200
    assert choose_window(image, inside).high == pytest.approx(598, abs=0.1)  # 98 % of the way from 500 to 600


@pytest.mark.parametrize(("tissue", "expected"), [(60, SOFT_TISSUE), (-700, LUNG), (450, BONE)])
def test_ct_has_the_usual_window_of_the_structure(structure, tissue, expected):
    image = np.where(structure, tissue, -1000).astype(np.float32)
    assert choose_window(image, structure) == expected
    assert choose_window(image, NOTHING) == SOFT_TISSUE
    image = np.array([-200, -160, 40, 240, 3000, np.nan, np.inf, -np.inf], np.float32)
    assert SOFT_TISSUE.gray(image).tolist() == [0, 0, 128, 255, 255, 0, 255, 0]
    assert str(SOFT_TISSUE) == "−160 to 240"


def test_the_modality_with_the_highest_contrast_at_the_border_is_chosen(structure):
    """Neither brighter numbers nor contrast elsewhere count."""
    faint, clear = noise(1000, 20, 1), noise(5, 0.1, 2)
    faint[structure] += 30
    clear[structure] += 0.4
    elsewhere = noise(0.5, 0.01, 3)
    elsewhere[25:] = 40
    modalities = [faint, elsewhere, clear]
    windows = [choose_window(channel, structure) for channel in modalities]
    assert choose_modality(modalities, windows, structure, STEPS) == 2
    assert choose_modality(modalities[:2], windows[:2], structure, STEPS) == 0
    assert choose_modality(modalities, windows, NOTHING, STEPS) == 0
    assert choose_modality([channel * np.nan for channel in modalities], windows, structure, STEPS) == 0


def test_what_is_no_tissue_gives_no_contrast(structure):
    """A structure at the edge of a skull-stripped brain: the zeros beside it stand out in every modality.

    Voxels may lie so close to each other that the border's width would not fit into memory: it is no wider than the grid.
    """
    strong, weak = noise(100, 5, 4), noise(100, 5, 5)
    strong[structure] += 20
    weak[structure] += 400
    windows = [choose_window(channel, structure) for channel in (strong, weak)]
    assert choose_modality([strong, weak], windows, structure, (1e-12, 1e-12, 4.0)) == 1
    weak[~structure] = 0
    windows = [choose_window(channel, structure) for channel in (strong, weak)]
    assert choose_modality([strong, weak], windows, structure, STEPS) == 0
