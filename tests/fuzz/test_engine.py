"""The C++ engine on made-up grids, features and masks, whose lattice is the plain one; and on wrong
calls, which are errors of ours.

`tests/engines/test_engine_filters.py` compares the engines' messages;
`tests/refinement/test_agreement.py` makes up cases for the sets of labels. A wrong call is a file
with what a run of the package has called, some of its arguments changed.
"""

import contextlib
import copy
import math
import os
import pickle
from dataclasses import fields, replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
from fuzzing import Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from messages import message
from oracles import one_kernel, random_case, resolve, rms, torch64
from tile_cases import make_case, refine

import crfrefine
from crfrefine.engines import cpu, get_backend
from crfrefine.engines.base import GridImage, RunContext
from crfrefine.engines.results import channel_ranges, softmax
from crfrefine.errors import CapacityError, InputError
from crfrefine.parameters.specs import MeanFieldSpec
from crfrefine.refinement.tiles.grid import TILE, TileGrid

NUM_EXAMPLES = int(os.environ.get("CRFREFINE_TEST_EXAMPLES", "0"))
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
# the engine leaves axes of one voxel out of the features
EXTENTS = {
    1: (2, 5000),
    2: (2, 70),
    3: (2, 17),
    4: (2, 7),
}


@st.composite
def cases(draw):
    """A grid, its image and mask, and bandwidths from a hundredth of a voxel or of the intensities
    to far more than all of it.
    """
    num_axes = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(*EXTENTS[num_axes])) for _ in range(num_axes))
    # A lattice of 13 to 15 features is one of 16 dimensions in the engine, and gives other messages
    # than the plain one.
    num_modalities = draw(st.sampled_from([*range(1, 13 - num_axes), 16 - num_axes]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    image = rng.normal(draw(st.sampled_from([0.0, -3.0, 1e4])), 1.0, (num_modalities, *shape))
    kind = draw(st.sampled_from(["noise", "steps", "constant"]))
    if kind == "steps":
        image = np.round(image)
    elif kind == "constant":
        image = np.full_like(image, 0.25)
    share = draw(st.sampled_from([None, 0.02, 0.6]))
    mask = None if share is None else rng.random(shape) < share
    if mask is not None:
        mask.flat[0] = mask.flat[-1] = (
            True  # or an axis would have one voxel, and the engine would leave it out
        )
    scales = st.sampled_from([0.02, 0.3, 1.7, 40.0, 1e6])
    return {
        "image": image.astype(np.float32),
        "mask": mask,
        "spacing": tuple(0.7 + 0.3 * axis for axis in range(num_axes)),
        "theta_alpha": [draw(scales) for _ in range(num_axes)],
        "theta_beta": [draw(scales) for _ in range(num_modalities)],
    }


@pytest.mark.long
@settings(
    max_examples=NUM_EXAMPLES or 40,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=SLOW,
)
@given(cases(), st.sampled_from([1, 3]))
def test_any_lattice_is_the_plain_one(case, threads):
    """Most voxels get the same message: single precision puts a few points into another simplex."""
    image = GridImage(case["image"], case["mask"], case["spacing"])
    spec = one_kernel(case["theta_alpha"], case["theta_beta"], filter="lattice")
    inside = slice(None) if case["mask"] is None else case["mask"]
    values = np.random.default_rng(0).random((2, *image.values.shape[1:]), np.float32)
    with contextlib.suppress(CapacityError):
        expected = message(torch64(), values, image, spec)
        result = message(get_backend("cpu"), values, image, spec, threads)
        assert np.median(np.abs(result - expected)[:, inside]) < 1e-3 * rms(expected[:, inside])


NUMBERS = (
    0,
    1,
    2,
    3,
    -1,
    7,
    255,
    2**31,
    -(2**63),
    2**64,
    0.0,
    0.5,
    -2.5,
    1e-300,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
)
WORDS = ("auto", "lattice", "grid", "exact", "truncated", "symmetric", "none", "")
OTHERS = (None, *WORDS, [], [[]], [[[1.0], []]], True, [1.0, -1.0, 2.0])
TYPES = ("float32", "float64", "float16", "uint8", "uint16", "int32", "int64", "bool")
PENALTIES = {
    "kind": "matrix",
    "matrix": tuple(tuple(0.1 * abs(3 * i - 2 * j) * (i != j) for j in range(4)) for i in range(4)),
}


class _Recorder:
    """Stands for the compiled module, or an object of its classes, and notes calls: the first ones
    of each function.
    """

    def __init__(self, of, noted, before):
        self.of = of
        self._noted = noted
        self.before = before

    def __getattr__(self, name):
        member = getattr(self.of, name)
        if not callable(member) or (isinstance(member, type) and issubclass(member, Exception)):
            return member

        def call(*arguments, **named):
            arguments += tuple(named.values())  # named in the order of the engine's function
            calls = [*self.before, (name, list(map(_plain, arguments)))]
            known = self._noted.setdefault(" ".join(name for name, _ in calls), [])
            if arguments and len(known) < 4:
                known.append(calls)
            found = member(
                *(value.of if isinstance(value, _Recorder) else value for value in arguments)
            )
            if "_engine_" in type(found).__module__:
                return _Recorder(found, self._noted, calls)
            return found

        return call


def _plain(value):
    """Return a copy of an argument: of an object of the engine the calls that make it, of a
    function that is told of progress None.
    """
    if isinstance(value, _Recorder):
        return {"made": value.before}
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if callable(value):
        return None
    return copy.copy(value)


@cache
def _usual_calls():
    """What small cases call: of one to three axes, with each filter and model, with label sets,
    from label maps, of a backward pass.
    """
    noted = {}
    load = cpu._import_level
    cpu.load_engine.cache_clear()  # Tests before may have loaded it.
    with (
        mock.patch.object(cpu, "_import_level", lambda level: _Recorder(load(level), noted, [])),
        mock.patch("crfrefine.refinement.preparing.MANY_LABELS", 0),  # small cases save no work
    ):
        default = crfrefine.CrfParameters().replace(
            **{"mean_field.num_iterations": 2, "bilateral.theta_alpha": 1.5}
        )
        for number, (shape, changes) in enumerate(_MODELS):
            case = make_case(
                number,
                shape,
                3 + number % 2,
                num_modalities=1 + number % 2,
                with_mask=number % 2 > 0,
            )
            for threshold in (
                0.0,
                *([1e-3] if "volume.weight" not in changes and number < 3 else []),
            ):  # above 0 labels are left out
                refine(case, default.replace(**changes), threshold, threads=1 + number % 2)
            labels = case.logits.argmax(axis=0).astype(np.uint8)
            crfrefine.refine(
                labels,
                case.image,
                spacing=case.spacing,
                parameters=default,
                input_type="labels",
                threads=1,
            )
        engine = get_backend("cpu")
        for dtype in (np.float32, np.float64):
            case = random_case(3, 1, 4, masked=dtype == np.float64, grid_shape=(9, 18, 35))
            model = resolve(
                case,
                spatial__weight=1.0,
                mean_field__filter="truncated",
                compatibility=PENALTIES,
                mean_field__num_iterations=2,
            )
            kernels = engine.kernels(
                replace(case, image=case.image.astype(dtype)).grid,
                model.kernels,
                RunContext(threads=1),
            )
            kernels.backward(
                kernels.forward(case.logits, model.mean_field),
                case.logits,
                case.logits,
                wants_image=True,
            )
            engine.message(case.logits, case.grid, model.kernels, threads=1)
        engine.plan_filters(case.grid, model.kernels, 2)
        softmax(case.logits, 2)
        channel_ranges(case.logits, 2)
        TileGrid((9, 17, 20)).engine(1).gather(
            np.zeros((9, 17, 20), np.float32),
            np.arange(2),
            np.zeros((2, math.prod(TILE)), np.float32),
        )
    cpu.load_engine.cache_clear()  # Tests after this one load it without notes.
    return tuple(calls for known in noted.values() for calls in known)


_MODELS = (
    ((17, 4), {"spatial.weight": 1.0, "mean_field.filter": "truncated"}),
    ((9, 17, 20), {"mean_field.filter": "truncated"}),
    ((4, 5, 17), {"mean_field.filter": "lattice", "volume.weight": 0.5}),
    ((9, 8, 21), {"mean_field.filter": "grid", "mean_field.normalization": "after"}),
    ((37,), {"mean_field.filter": "exact", "mean_field.normalization": "after"}),
)


def _damage(rng, arguments):
    """Change one argument, or something in it."""
    place = rng.randrange(len(arguments))
    value = arguments[place]
    if isinstance(value, list) and value and rng.random() < 0.8:
        if rng.random() < 0.6:
            _damage(rng, value)
        else:
            value[-1:] = rng.choice(([], [value[-1], copy.deepcopy(value[-1])]))
    elif isinstance(value, dict) and rng.random() < 0.8:
        _damage(rng, value["made"][-1][1])
    elif isinstance(value, MeanFieldSpec) and rng.random() < 0.9:
        name = rng.choice([field.name for field in fields(MeanFieldSpec)])
        own = [getattr(value, name)]
        _damage(rng, own)
        arguments[place] = replace(value, **{name: own[0]})
    elif isinstance(value, np.ndarray) and rng.random() < 0.9:
        arguments[place] = _damaged_array(rng, value)
    elif rng.random() < 0.8:
        arguments[place] = rng.choice(NUMBERS)
    else:
        arguments[place] = copy.deepcopy(rng.choice(OTHERS))


def _damaged_array(rng, array):
    """Another type, one value in many places, an index out of range, or another shape."""
    how = rng.random()
    shape = list(array.shape)
    if how < 0.2:
        with np.errstate(all="ignore"):
            return array.astype(rng.choice(TYPES))
    if how < 0.4:
        changed = array.copy()
        _put_a_value(rng, changed)
        return changed
    if how < 0.6 and array.size and array.dtype.kind in "iu":
        array.flat[rng.randrange(array.size)] = np.int64(
            rng.choice((-2, -1, 0, 1, 5, 100, 2**31 - 1))
        ).astype(array.dtype)
        return array
    axis = rng.randrange(len(shape) + 1)
    shape[axis : axis + rng.choice((0, 1, 1))] = rng.choice(
        ([], [0], [1], [2], [40], [size + 1 for size in shape[axis : axis + 1]])
    )
    return np.resize(array, shape)


def _put_a_value(rng, array):
    """Write one value to all places of an array, or to every second or seventh, in place."""
    values = (0, 1)
    if array.dtype.kind == "f":
        values = (0, 1, math.nan, math.inf, -math.inf, 3e38, 1e38, -1e38, 1e-42)
    with np.errstate(over="ignore"):  # of float16
        array.flat[:: rng.choice((1, 2, 7))] = rng.choice(values)


def _change_in_place(rng, arguments):
    """Change some of the arrays that the engine was given, and may have kept."""
    for value in arguments:
        if isinstance(value, list):
            _change_in_place(rng, value)
        elif isinstance(value, np.ndarray) and value.flags.writeable and rng.random() < 0.5:
            _put_a_value(rng, value)


def _make_call(rng):
    usual = _usual_calls()
    last = rng.choice(sorted({calls[-1][0] for calls in usual}))
    calls = copy.deepcopy(rng.choice([calls for calls in usual if calls[-1][0] == last]))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if arguments := rng.choice(calls)[1]:
            _damage(rng, arguments)
    return {"calls.pickle": pickle.dumps(calls)}


def _read_call(path, rng):
    def called(calls):
        found = engine
        for name, arguments in calls:
            values = list(map(given, arguments))
            found = getattr(found, name)(*values)
            if rng.random() < 0.3:
                _change_in_place(rng, values)
        return found

    def given(value):
        if isinstance(value, dict):
            return called(value["made"])
        if isinstance(value, np.ndarray) and value.ndim and rng.random() < 0.05:
            return rng.choice(
                (np.asfortranarray(value), value[..., ::-1], np.repeat(value, 2, axis=-1)[..., ::2])
            )
        if isinstance(value, list):
            return list(map(given, value))
        return value

    engine = cpu.load_engine()
    try:
        called(pickle.loads(path.read_bytes()))
    except (TypeError, engine.EngineInputError, engine.EngineCapacityError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    except engine.EngineMemoryError as error:
        raise CapacityError(f"{path}: {error}") from error


def test_some_inputs(fuzzed):
    fuzzed(Target("module", _make_call, _read_call), 100)
