"""`make fuzz FUZZ_ARGS="--minutes 60 --seed 7"`: more inputs than the tests take."""

import pytest
from fuzzing import examine, fuzz

STRIDE = 1 << 32  # between the first inputs of two seeds: no input is given twice


def pytest_addoption(parser):
    parser.addoption("--inputs", type=int, help="number of damaged inputs for each reader")
    parser.addoption(
        "--minutes", type=float, help="of all readers together, in place of a number of inputs"
    )
    parser.addoption("--seed", type=int, default=0, help="other seeds make other inputs")
    parser.addoption(
        "--only", type=int, help="number of the only input, in this process, for a debugger"
    )


@pytest.fixture
def fuzzed(tmp_path, request):
    """Fuzz a target: some inputs must come as far as the voxels or values, and some must be
    damaged.
    """

    def run(target, count):
        inputs, minutes, seed, only = (
            request.config.getoption(f"--{name}", None)
            for name in ("inputs", "minutes", "seed", "only")
        )
        if only is not None:
            print("taken" if examine(target, tmp_path, only) else "refused")
            return
        seconds = minutes and 60 * minutes / sum(
            "fuzzed" in item.fixturenames for item in request.session.items
        )
        refused, taken = fuzz(
            target, tmp_path, (seed or 0) * STRIDE, None if minutes else inputs or count, seconds
        )
        assert taken >= (taken + refused) // 50
        assert refused >= (taken + refused) // 10

    return run
