"""The compiled module refuses arguments that do not fit each other, by a ValueError, before it
reads what is not there.
"""

import math
import os
import platform
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest

import crfrefine
from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage
from crfrefine.engines.cpu import ASKED_LEVEL, LEVELS, built_levels, load_engine
from crfrefine.errors import CapacityError
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec
from crfrefine.refinement.tiles.grid import TILE

BUILT_LEVELS = built_levels(load_engine())
BEST_LEVEL = max(
    set(LEVELS[: LEVELS.index(load_engine().cpu_level()) + 1]) & set(BUILT_LEVELS), key=LEVELS.index
)

SHAPE = (8, 9, 10)
SPACING = [1.0, 1.5, 2.0]
KERNELS = (KernelSpec("bilateral", (2.0, 2.0, 3.0), (0.1,)),)


def values(*shape, dtype=np.float32):
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def message(engine, mask=None, spacing=SPACING, kernels=KERNELS, num_out=3):
    spec = KernelSetSpec(kernels, "none", "auto", num_labels=2, num_iterations=1)
    image = {"image": values(1, *SHAPE), "mask": mask, "spacing": spacing}
    out = values(num_out, *SHAPE)
    return engine.message(values=values(3, *SHAPE), **image, spec=spec, threads=1, out=out)


def built(engine, num_labels=2, user_axis=()):
    spec = KernelSetSpec(KERNELS, "symmetric", "auto", num_labels, num_iterations=2)
    image = {"image": values(1, *SHAPE), "mask": None, "spacing": SPACING}
    settings = {"origin": None, "threads": 1, "progress": None}
    return engine.Kernels(spec=spec, user_axis=list(user_axis), **image, **settings)


def run(engine, shape=SHAPE, weights=(1.0, 1.0), compatibility=((0.0, 1.0), (1.0, 0.0))):
    model = MeanFieldSpec(np.array([weights]), np.array(compatibility), num_iterations=2)
    settings = {"part": None, "is_last_run": True, "progress": None, "out": values(2, *SHAPE)}
    return built(engine).run(logits=values(2, *shape), model=model, **settings)


def label_sets(engine, mask=None, active=1):
    """One active tile of two labels."""
    sets = {
        "active": np.array([active]),
        "first_entry": np.array([0, 2]),
        "label": np.array([0, 3], np.int32),
    }
    return engine.LabelSets(
        shape=SHAPE, tile=TILE, mask=mask, threads=1, settled=np.array([2, -1], np.int32), **sets
    )


WRONG = {
    "softmax, fewer channels": (
        "in the shape of the logits",
        lambda e: e.softmax(values(3, *SHAPE), 1, values(2, *SHAPE)),
    ),
    "label_map, more labels than 8 bits": (
        "holds all labels",
        lambda e: e.label_map(values(257, 2), 1, values(2, dtype=np.uint8)),
    ),
    "mask of 8 voxels": (
        "expected a mask",
        lambda e: message(e, mask=np.ones((2, 2, 2), np.bool_)),
    ),
    "spacing, NaN": ("one spacing per axis", lambda e: message(e, spacing=[1.0, math.nan, 1.0])),
    "bandwidths, too few": (
        "one bandwidth per axis",
        lambda e: message(e, kernels=(KernelSpec("spatial", (2.0, 2.0)),)),
    ),
    "an unknown kind": (
        "unknown kind of kernel 'box'",
        lambda e: message(e, kernels=(KernelSpec("box", (2.0, 2.0, 3.0)),)),
    ),
    "no kernel": ("expected a kernel", lambda e: message(e, kernels=())),
    "out, fewer channels": ("shape of the values", lambda e: message(e, num_out=2)),
    "one label": ("2 to 65536 labels", lambda e: built(e, num_labels=1)),
    "axes twice": ("each axis of the user once", lambda e: built(e, user_axis=[0, 1, 1])),
    "logits, another grid": ("or on the box of its mask", lambda e: run(e, shape=(8, 9, 9))),
    "weights, too few": ("one weight per label", lambda e: run(e, weights=[1.0])),
    "compatibility, too few": (
        "one penalty per pair",
        lambda e: run(e, compatibility=[[0.0], [1.0]]),
    ),
    "Tiles, more than can be counted": (
        "a grid with voxels",
        lambda e: e.Tiles((2**40, 2**40, 2**40), TILE, 1),
    ),
    "sets, a tile of no grid": ("tiles of the grid", lambda e: label_sets(e, active=2)),
    "sets, mask of 8 voxels": (
        "one value per voxel of the grid",
        lambda e: label_sets(e, mask=np.ones((2, 2, 2), np.bool_)),
    ),
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
    kernel = KernelSpec("bilateral", (900.0, 1200.0), (0.1,))
    spec = KernelSetSpec((kernel,), "none", "truncated", 2, 1)
    with pytest.raises(
        CapacityError,
        match=r"theta_alpha 900 x 1200 on voxels of 1 x 1\.5 visits over a million pairs",
    ):
        get_backend("cpu").kernels(
            GridImage(np.zeros((1, 1100, 1000), np.float32), None, (1.0, 1.5)), spec
        )


ROOT = Path(__file__).resolve().parents[2]

# What Linux says of each level beyond the one before, of x86-64-v3 and x86-64-v4.
NEEDED = {
    "avx2": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
# Short tests of each filter, forward and backward, of tiles and of shared channels.
CHOSEN = "(brute_force or threads or documented or transcribed or zeros) and not cuda and not torch"


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(),
    reason="needs x86-64 and Linux",
)
def test_the_level_is_what_the_system_says_of_the_processor():
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    supported = ["baseline", *takewhile(lambda level: NEEDED[level] <= flags, NEEDED)]
    assert load_engine().cpu_level() == supported[-1]
    if ASKED_LEVEL not in os.environ:
        assert load_engine().__name__.endswith(f"_engine_{BEST_LEVEL}")


@pytest.mark.skipif(
    BEST_LEVEL == "baseline",
    reason="needs an engine above the baseline, and a processor that runs it",
)
def test_without_the_best_engine_the_next_one_runs_and_it_cannot_be_asked_for(tmp_path):
    """In a copy of the package from which it is taken away; the message names the option that
    compiles it.
    """
    best = BEST_LEVEL
    ignored = shutil.ignore_patterns(f"_engine_{best}.*", "__pycache__")
    shutil.copytree(Path(crfrefine.__file__).parent, tmp_path / "crfrefine", ignore=ignored)
    code = (
        "from crfrefine.engines import cpu; "
        "print((engine := cpu.load_engine()).__name__, *cpu.built_levels(engine))"
    )
    plain = {name: value for name, value in os.environ.items() if name != ASKED_LEVEL} | {
        "PYTHONPATH": str(tmp_path)
    }
    done, asked = (
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=plain | more,
            capture_output=True,
            text=True,
            check=False,
        )
        for more in ({}, {ASKED_LEVEL: best})
    )
    rest = [level for level in BUILT_LEVELS if level != best]
    lower = [level for level in rest if LEVELS.index(level) < LEVELS.index(best)]
    assert done.stdout.split() == [f"crfrefine._engine_{lower[-1]}", *rest], done.stderr
    expected = (
        f"{ASKED_LEVEL} asks for {best}; this processor runs {best}, and the engine was compiled "
        f"for {' and '.join(rest)}; unset it"
    )
    assert expected in asked.stderr
    assert "--config-settings=cmake.define.CRFREFINE_LEVELS=all" in asked.stderr


@pytest.mark.parametrize("is_same", [True, False])
def test_a_source_tree_takes_the_engine_of_an_installed_package_of_its_version(tmp_path, is_same):
    """One without compiled modules comes first on the path, as where Python starts in a clone."""
    package = Path(crfrefine.__file__).parent
    for name, left_out in (("tree", "_engine_*"), ("installed", "__pycache__")):
        ignored = shutil.ignore_patterns(left_out, "__pycache__")
        shutil.copytree(package, tmp_path / name / "crfrefine", ignore=ignored)
    installed = tmp_path / "installed" / "crfrefine"
    if not is_same:
        adapter = installed / "engines" / "cpu.py"
        adapter.write_text(adapter.read_text(encoding="utf-8") + "# other\n", encoding="utf-8")
    # No other package is on the path, such as that of the tests, beside which numpy may be.
    code = (
        "import pathlib, sys, numpy; ours = sys.argv[1:]\n"
        "others = [p for p in sys.path if (pathlib.Path(p) / 'crfrefine').is_dir()]\n"
        "sys.path[:] = [p for p in sys.path if p in ours or p not in others]\n"
        "from crfrefine.engines import cpu; print(cpu.load_engine().__file__)"
    )
    places = [str(tmp_path / "tree"), str(installed.parent)]
    path = os.pathsep.join(places)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *places],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if is_same:
        assert Path(done.stdout.strip()).parent == installed, done.stderr
    else:
        assert "no installed package of this version has it" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_the_engine_of_a_lower_level_passes_its_tests(level):
    """As a process of its own, because the level is chosen when the engine is first loaded."""
    best = BEST_LEVEL
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip(
            f"the best level of this processor and its engines is {best}: its own tests, or none"
        )
    if level not in BUILT_LEVELS:
        pytest.skip(
            f"the engine was not compiled for {level}: CRFREFINE_LEVELS=all of CMakeLists.txt, as "
            "`make test-long` has it"
        )
    if os.environ.get(ASKED_LEVEL) == level:
        pytest.skip(f"{ASKED_LEVEL} has all tests run on {level}")
    options = [
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-m",
        "not long",
        "-k",
        CHOSEN,
    ]
    command = [sys.executable, *options, "tests/engines", "tests/refinement"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {ASKED_LEVEL: level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


PAGE_FAULTS = """
import resource, sys
import numpy as np
from crfrefine.engines.cpu import load_engine

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(180_000, np.float32) for _ in range(30)]
    del arrays
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] != "default":
    load_engine().keep_freed_memory(int(sys.argv[1]))
faults()
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are those of glibc")
def test_freed_memory_is_kept_below_a_size():
    """Arrays of 20 MiB in all, allocated for the third time, are in memory that is there."""
    counts = {}
    for largest in ("default", str(1 << 19), str(1 << 25)):
        command = [sys.executable, "-c", PAGE_FAULTS, largest]
        counts[largest] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert counts[str(1 << 25)] < 100
    assert min(counts["default"], counts[str(1 << 19)]) > 2_000
