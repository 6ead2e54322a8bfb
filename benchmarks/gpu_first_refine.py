"""Times the first run of a fresh process on a small case of a workload's kind: `python benchmarks/gpu_first_refine.py Lm`.

How long it takes depends on what the caches of compiled kernels hold (CUPY_CACHE_DIR).
"""

from __future__ import annotations

import json
import sys
import time

STARTED = time.perf_counter()

from gpu_cases import SMALL, SPECS, parameters_of, run, small  # noqa: E402

from crfrefine.engines import get_backend  # noqa: E402


def main() -> None:
    """Run twice, print the seconds of each part."""
    spec, arrays = small(SPECS[sys.argv[1]], SMALL.get(sys.argv[1], SMALL["Lm"]))
    prepared = time.perf_counter()
    gpu = get_backend("cuda")
    loaded = time.perf_counter()
    parameters = parameters_of(spec, num_iterations=5)
    run(gpu, spec, arrays, parameters)
    first = time.perf_counter()
    run(gpu, spec, arrays, parameters)
    second = time.perf_counter()
    seconds = {"prepare": prepared - STARTED, "load": loaded - prepared, "first": first - loaded, "second": second - first}
    print(json.dumps({**seconds, "compile": (first - loaded) - (second - first)}))


if __name__ == "__main__":
    main()
