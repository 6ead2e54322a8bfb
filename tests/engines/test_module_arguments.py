"""The compiled module refuses arguments that do not fit each other, by a ValueError, before it reads what is not there."""

import math

import numpy as np
import pytest

from crfrefine.engines import get_backend
from crfrefine.engines.compiled import load_engine
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import CapacityError
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec
from crfrefine.refinement.tiles.grid import TILE

SHAPE = (8, 9, 10)
SPACING, BILATERAL = [1.0, 1.5, 2.0], [([2.0, 2.0, 3.0], [0.1])]


def values(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def message(engine, mask=None, spacing=SPACING, bilateral=BILATERAL, num_out=3):
    settings = {"theta_gamma": [], "normalization": "none", "filter": "auto", "threads": 1, "out": values(num_out, *SHAPE)}
    image = {"image": values(1, *SHAPE), "mask": mask, "spacing": spacing, "bilateral": bilateral}
    return engine.message(values=values(3, *SHAPE), **image, **settings)


def built(engine, num_labels=2, user_axis=()):
    image = {"image": values(1, *SHAPE), "mask": None, "spacing": SPACING, "bilateral": BILATERAL, "theta_gamma": []}
    settings = {"normalization": "symmetric", "filter": "auto", "num_iterations": 2, "origin": None, "threads": 1, "progress": None}
    return engine.Kernels(num_labels=num_labels, user_axis=list(user_axis), **image, **settings)


def run(engine, shape=SHAPE, weights=(1.0, 1.0), compatibility=((0.0, 1.0), (1.0, 0.0))):
    model = MeanFieldSpec(np.array([weights]), np.array(compatibility), num_iterations=2)
    settings = {"part": None, "is_last_run": True, "progress": None, "out": values(2, *SHAPE)}
    return built(engine).run(logits=values(2, *shape), model=model, **settings)


def label_sets(engine, mask=None, active=1):
    """One active tile of two labels."""
    sets = {"active": np.array([active]), "first_entry": np.array([0, 2]), "label": np.array([0, 3], np.int32)}
    return engine.LabelSets(shape=SHAPE, tile=TILE, mask=mask, threads=1, settled=np.array([2, -1], np.int32), **sets)


WRONG = {
    "softmax, fewer channels": ("in the shape of the logits", lambda e: e.softmax(values(3, *SHAPE), 1, values(2, *SHAPE))),
    "label_map, more labels than 8 bits": ("holds all labels", lambda e: e.label_map(values(257, 2), 1, values(2, dtype=np.uint8))),
    "mask of 8 voxels": ("expected a mask", lambda e: message(e, mask=np.ones((2, 2, 2), np.bool_))),
    "spacing, NaN": ("one spacing per axis", lambda e: message(e, spacing=[1.0, math.nan, 1.0])),
    "no kernel": ("expected a kernel", lambda e: message(e, bilateral=[])),
    "out, fewer channels": ("shape of the values", lambda e: message(e, num_out=2)),
    "one label": ("2 to 65536 labels", lambda e: built(e, num_labels=1)),
    "axes twice": ("each axis of the user once", lambda e: built(e, user_axis=[0, 1, 1])),
    "logits, another grid": ("or on the box of its mask", lambda e: run(e, shape=(8, 9, 9))),
    "weights, too few": ("one weight per label", lambda e: run(e, weights=[1.0])),
    "compatibility, too few": ("one penalty per pair", lambda e: run(e, compatibility=[[0.0], [1.0]])),
    "Tiles, more than can be counted": ("a grid with voxels", lambda e: e.Tiles((2**40, 2**40, 2**40), TILE, 1)),
    "sets, a tile of no grid": ("tiles of the grid", lambda e: label_sets(e, active=2)),
    "sets, mask of 8 voxels": ("one value per voxel of the grid", lambda e: label_sets(e, mask=np.ones((2, 2, 2), np.bool_))),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused(name):
    what, call = WRONG[name]
    with pytest.raises(ValueError, match=what):
        call(load_engine())


def test_the_same_calls_with_arguments_that_fit():
    engine = load_engine()
    assert message(engine)
    assert run(engine)["num_iterations"] == 2
    label_sets(engine).decode(values(2, math.prod(TILE)), np.zeros(SHAPE, np.uint8))


def test_a_window_of_millions_of_voxels_is_refused_before_it_is_listed():
    """A list of these would take a gigabyte; a case of one byte per voxel is small."""
    spec = KernelSetSpec((KernelSpec((900.0, 1200.0), (0.1,)),), "none", "truncated", 2, 1)
    with pytest.raises(CapacityError, match=r"theta_alpha 900 x 1200 on voxels of 1 x 1\.5 visits over a million pairs"):
        get_backend("cpu").kernels(GridImage(np.zeros((1, 1100, 1000), np.float32), None, (1.0, 1.5)), spec)
