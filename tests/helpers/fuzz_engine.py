"""Calls of the compiled module with wrong arguments, and models with odd bandwidths and voxels, as inputs of `fuzz_worker`.

A call is a file of JSON: whose functions are called one after the other, and a description of each argument.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_worker import Target

import crfrefine
from crfrefine.engines.compiled import load_engine
from crfrefine.errors import CapacityError, InputError
from crfrefine.refinement.tiles.grid import TILE, TileGrid

SHAPES = ((3,), (17, 4), (1, 9, 5), (4, 5, 17), (6, 7, 18))
GRID = TileGrid((9, 17, 20))
NUMBERS: tuple[Any, ...] = (0, 1, 2, 3, -1, 7, 255, 2**31, -(2**63), 2**64, 0.0, 0.5, -2.5, 1e-300, 1e300, math.inf, -math.inf, math.nan)
WORDS = ("auto", "lattice", "grid", "exact", "truncated", "symmetric", "none", "")
OTHERS: tuple[Any, ...] = (None, *WORDS, [], [[]], [[[1.0], []]], True, [1.0, -1.0, 2.0])
TYPES = ("float32", "float64", "float16", "uint8", "uint16", "int32", "int64", "bool")
FILLS = ("normal", "zeros", "ones", "numbers", "nan", "huge")

Call = list[tuple[str, list[Any]]]


def engine_targets() -> list[Target]:
    return [
        Target("module", _make_call, _read_call),
        Target("models", _make_model, _read_model, names_file=False, most_seconds=20.0),
    ]


def array(shape: Any, dtype: str = "float32", values: Any = "normal") -> dict[str, Any]:
    """A description of an array. values: one of FILLS, or a list."""
    return {"array": list(shape), "type": dtype, "values": values, "layout": "C"}


def _usual_calls(rng: random.Random) -> Call:
    """A call that is right: one function, or an object and one of its methods."""
    shape, labels, modalities = rng.choice(SHAPES), rng.choice((2, 3, 5)), rng.choice((1, 2))
    logits, image, out = array((labels, *shape)), array((modalities, *shape)), array((labels, *shape))
    mask = rng.choice([None, array(shape, "bool", "ones"), array(shape, "bool", "numbers")])
    axes = len(shape)
    spacing, alpha, beta = [1.0, 1.5, 2.0][:axes], [2.0] * axes, [0.5] * modalities
    bilateral, gamma = [[alpha, beta]] * rng.choice((1, 1, 2)), rng.choice([[], [1.5] * axes])
    kind, filter_name = rng.choice(("symmetric", "after", "none")), rng.choice(("auto", "exact", "truncated", "lattice", "grid"))
    threads = rng.choice((1, 2))
    functions: list[Callable[[], Call]] = [
        lambda: [("softmax", [logits, threads, out])],
        lambda: [("label_map", [logits, threads, array(shape, rng.choice(("uint8", "uint16")), "zeros")])],
        lambda: [("channel_ranges", [logits, threads])],
        lambda: [("message", [logits, image, mask, spacing, bilateral, gamma, kind, filter_name, threads, out])],
        lambda: [("plan_filters", [image, mask, spacing, bilateral, filter_name, labels, 5, threads])],
        lambda: [("_estimate_costs", [image, mask, spacing, alpha, beta, labels, 5])],
        lambda: [("_lattice_passes", [image, mask, spacing, alpha, beta, threads])],
        lambda: _calls_of_kernels(rng, [mask, spacing, bilateral, gamma, kind, filter_name, labels, 2], shape, modalities, threads),
        lambda: _calls_of_tiles(rng, threads),
        lambda: _calls_of_label_sets(rng, threads),
    ]
    return rng.choice(functions)()


def _calls_of_kernels(rng: random.Random, settings: list[Any], shape: Any, modalities: int, threads: int) -> Call:
    dtype = rng.choice(("float32", "float64"))
    labels, num_kernels = settings[6], len(settings[2]) + bool(settings[3])
    image, whole = array((modalities, *shape), dtype), array((labels, *shape), dtype)
    axes: list[int] = rng.choice([[], list(range(len(shape)))])
    origin = rng.choice([None, [[0] * len(shape), [0.0] * modalities]])
    build = ("Kernels32" if dtype == "float32" else "Kernels64", [image, *settings, axes, origin, threads, None])
    weights = [[1.0] * labels] * num_kernels
    penalties = [float(row != column) for row in range(labels) for column in range(labels)]
    bias: list[float] = rng.choice([[], [0.1] * labels])
    volume = [rng.choice((math.inf, 0.0, 0.1)), rng.random() < 0.5, None]
    model = [weights, penalties, True, 1.0, rng.choice((0.0, 0.3)), bias, volume, None, []]
    mask, num_voxels, steps = settings[0], math.prod(shape), 2
    if mask is not None and mask["values"] != "ones":
        return [build, ("run", [whole, *model, steps, 0.0, rng.random() < 0.5, None, whole])]
    record = array((steps + (volume[0] < math.inf), labels - 1, num_voxels), dtype)
    of_step = [[0.0] * labels] * steps if volume[0] < math.inf else []
    methods = [
        ("run", [whole, *model, steps, 0.01, True, None, whole]),
        ("forward", [whole, *model, whole, record]),
        ("backward", [whole, record, [1.0] * steps, of_step, whole, *model, True, whole, rng.choice([None, image])]),
    ]
    return [build, rng.choice(methods)]


def _calls_of_tiles(rng: random.Random, threads: int) -> Call:
    grid, stored = GRID.shape, rng.choice(("float32", "float16"))
    tiles = sorted(rng.sample(range(GRID.num_tiles), 3))
    numbers, entries = array((3,), "int64", tiles), array((3,), "int64", [2, 0, 1])
    per_tile, room = array((GRID.num_tiles,), "float32", "zeros"), array((3, math.prod(TILE)))
    whole, label_map = array(grid, stored), array(grid, "uint8", "numbers")
    best = rng.choice([None, array(grid)])
    filled = [array(grid), array(grid), array(grid, "uint16", "zeros"), array(grid, "bool", "ones"), best]
    methods = [
        ("survey", [whole, 0, 1, False, 0.0, 1.0, None, *filled, per_tile]),
        ("margins", [whole, True, numbers, True, 0.0, 1.0, array(grid, "bool", "numbers"), array(grid), array((3,))]),
        ("gather", [whole, numbers, array((3, math.prod(TILE)), stored)]),
        ("fill_entries", [whole, True, numbers, False, entries, room]),
        ("mark_near", [label_map, [2, 0, 5], array((8, GRID.num_tiles), "uint8", "zeros")]),
        ("fill_labels", [label_map, 0, 1, [2, 0, 5], [2.0, 0.0, -1e4], numbers, entries, room]),
    ]
    return [("Tiles", [list(grid), list(TILE), threads]), rng.choice(methods)]


def _calls_of_label_sets(rng: random.Random, threads: int) -> Call:
    grid, num_tiles, voxels, labels = GRID.shape, GRID.num_tiles, math.prod(TILE), 4
    active = sorted(rng.sample(range(num_tiles), 3))
    sets = [sorted(rng.sample(range(labels), rng.choice((2, 3)))) for _ in active]
    first = [0, *np.cumsum([len(own) for own in sets]).tolist()]
    own = [label for of_tile in sets for label in of_tile]
    settled = [-1 if tile in active else rng.randrange(-1, labels) for tile in range(num_tiles)]
    build = [
        *(list(grid), list(TILE), rng.choice([None, array(grid, "bool", "numbers")])),
        *(array((3,), "int64", active), array((4,), "int64", first), array((len(own),), "int32", own)),
        *(array((num_tiles,), "int32", settled), threads),
    ]
    values, flags, none = array((len(own), voxels)), array((len(own),), "uint8", "zeros"), array((0,), "int32", [])
    matter, rows = array((labels, num_tiles), "bool", "numbers"), array((3, TILE[0] * TILE[1]), "uint16", "zeros")
    image, bilateral = array((1, *grid)), [[[1.5, 1.5, 2.0], [0.5]]]
    kernels = {"kernels": [image, None, [1.0] * 3, bilateral, [], "symmetric", "auto", 3, 2, [], None, threads, None]}
    penalties = [float(row != column) for row in range(labels) for column in range(labels)]
    of_sets = array((len(own),), "int32", [number % 2 for number in range(len(own))])
    of_tiles = array((num_tiles,), "int32", [-1 if label < 0 else label % 2 for label in settled])
    channels = [None, 0, none, none] if rng.random() < 0.7 else [kernels, 2, of_sets, of_tiles]
    model = [image, bilateral, [], "symmetric", [[1.0] * labels], penalties, True, 1.0, 0.0, 2, 0.0]
    border, stop = rng.choice([None, matter]), [[5, 5, 6], 1e-3, flags, 0.0, rng.random() < 0.5]
    methods = [
        ("run", [*channels, *model, rows, math.prod(grid), None, values, values, border, *stop]),
        ("check", [values, matter, [3, 3, 4], 1e-3, flags]),
        ("open_voxels", [values, 1.0, -7.0, rng.random() < 0.5, rows]),
        ("decode", [values, array(grid, rng.choice(("uint8", "uint16")), "zeros")]),
    ]
    return [("LabelSets", build), rng.choice(methods)]


def _damage(rng: random.Random, arguments: list[Any]) -> None:
    """Change one argument, or something in it."""
    place = rng.randrange(len(arguments))
    value = arguments[place]
    if isinstance(value, list) and value and rng.random() < 0.8:
        how = rng.random()
        if how < 0.6:
            _damage(rng, value)
        elif how < 0.8:
            del value[rng.randrange(len(value))]
        else:
            value.append(copy.deepcopy(value[-1]))
    elif isinstance(value, dict) and "kernels" in value and rng.random() < 0.8:
        _damage(rng, value["kernels"])
    elif isinstance(value, dict) and "array" in value and rng.random() < 0.9:
        _damage_array(rng, value)
    else:
        arguments[place] = rng.choice(NUMBERS) if rng.random() < 0.8 else copy.deepcopy(rng.choice(OTHERS))


def _damage_array(rng: random.Random, value: dict[str, Any]) -> None:
    how, shape = rng.random(), value["array"]
    if how < 0.2:
        value["type"] = rng.choice(TYPES)
    elif how < 0.4:
        value["values"] = rng.choice(FILLS)
    elif how < 0.5:
        value["layout"] = rng.choice(("F", "steps", "backwards", "read-only"))
    elif how < 0.6 and isinstance(value["values"], list) and value["values"]:
        value["values"][rng.randrange(len(value["values"]))] = rng.choice((-2, -1, 0, 1, 5, 100, 2**31 - 1))
    elif how < 0.7 and shape:
        del shape[rng.randrange(len(shape))]
    elif how < 0.75:
        shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 2)))
    elif shape:
        axis = rng.randrange(len(shape))
        shape[axis] = rng.choice((0, 1, 2, shape[axis] + 1, max(shape[axis] - 1, 0), 40))


def _built(value: Any) -> Any:
    """Return the argument that is described."""
    if isinstance(value, list):
        return [_built(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "kernels" in value:
        return load_engine().Kernels32(*_built(value["kernels"]))
    rng, shape, values = np.random.default_rng(0), tuple(value["array"]), value["values"]
    size = math.prod(shape)
    if isinstance(values, list):
        numbers: Any = np.resize(np.array(values or [0], np.int64), size)
    elif values in ("normal", "numbers"):
        numbers = rng.normal(size=size) if values == "normal" else rng.integers(0, 8, size)
    else:
        numbers = np.full(size, {"zeros": 0.0, "ones": 1.0, "nan": math.nan, "huge": 3e38}[values])
    with np.errstate(all="ignore"):
        made = numbers.astype(value["type"]).reshape(shape)
    if value["layout"] == "F":
        return np.asfortranarray(made)
    if value["layout"] == "steps" and made.ndim:
        return np.repeat(made, 2, axis=-1)[..., ::2]
    if value["layout"] == "backwards" and made.ndim:
        return made[..., ::-1]
    made.flags.writeable = value["layout"] != "read-only"
    return made


def _make_call(rng: random.Random) -> Mapping[str, bytes]:
    calls = json.loads(json.dumps(_usual_calls(rng)))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        _damage(rng, rng.choice(calls)[1])
    return {"call.json": json.dumps(calls, indent=1).encode()}


def _read_call(path: Path, _: random.Random) -> None:
    engine = load_engine()
    found: Any = engine
    try:
        for name, arguments in json.loads(path.read_bytes()):
            found = getattr(found, name)(*_built(arguments))
    except (TypeError, engine.EngineInputError, engine.EngineCapacityError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    except engine.EngineMemoryError as error:
        raise CapacityError(f"{path}: {error}") from error


def _make_model(rng: random.Random) -> Mapping[str, bytes]:
    """A small case whose voxels may be 1e-4 to 1e3 mm long, and bandwidths of a billionth to a billion mm."""
    shape = [rng.choice((1, 2, 3, 7, 20)) for _ in range(rng.choice((1, 2, 3, 3, 3)))]
    if rng.random() < 0.3:
        shape[rng.randrange(len(shape))] = rng.choice((50, 300))

    def odd(*usual: float) -> float:
        return rng.choice([*usual, 10 ** rng.uniform(-9, 9), 1e9, 1e-9])

    parameters: dict[str, Any] = {"bilateral.theta_alpha": odd(1, 3, 3, 3), "bilateral.theta_beta": odd(0.05, 0.5, 0.5, 0.5)}
    if rng.random() < 0.7:
        parameters |= {"spatial.weight": 1.0, "spatial.theta_gamma": odd(1, 2)}
    parameters["mean_field.filter"] = rng.choice(("auto", "auto", "truncated", "lattice", "grid"))
    if rng.random() < 0.3:
        parameters |= {"mean_field.positions": "voxels", "mean_field.normalization": rng.choice(("after", "none", "symmetric"))}
    model = {
        "shape": shape,
        "spacing": [10 ** rng.uniform(-4, 3) for _ in shape],
        "labels": rng.choice((2, 3, 5, 20, 60)),
        "input_type": rng.choice(("labels", "logits")),
        "parameters": parameters,
    }
    return {"model.json": json.dumps(model).encode()}


def _read_model(path: Path, _: random.Random) -> None:
    model = json.loads(path.read_bytes())
    rng, shape = np.random.default_rng(0), tuple(model["shape"])
    labels = rng.integers(0, model["labels"], shape)
    given = labels if model["input_type"] == "labels" else rng.normal(size=(model["labels"], *shape)).astype(np.float32)
    options = {name: model[name] for name in ("spacing", "input_type")}
    parameters = crfrefine.CrfParameters().replace(**model["parameters"])
    result = crfrefine.refine(given, 10.0 * labels + rng.normal(size=shape), parameters=parameters, threads=1, **options)
    assert result.label_map.shape == shape
