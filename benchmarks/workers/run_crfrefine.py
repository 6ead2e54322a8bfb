"""One timed run of crfrefine, through its public function: checks, the build, the steps, marginals and label map.

Marginals of masked workloads are those of the masked voxels: the other library returns no others.
"""

import os

import numpy as np
from measure import Meter, arguments, report
from parameters import crf_parameters

import crfrefine
from crfrefine.engines import get_backend

workload, save_to, options = arguments()
if "level" in options:
    os.environ["CRFREFINE_CPU_LEVEL"] = options["level"]
# The engine and the public function are loaded on first use; the other libraries load theirs when they are imported, before the clock runs.
get_backend("cpu")
refine = crfrefine.refine

meta = workload.meta
image = workload.image.astype(np.float32) / np.float32(255.0)
del workload.image
parameters = crf_parameters(meta, filter_name=options.get("filter", "auto"))

with Meter() as meter:
    result = refine(
        workload.logits,
        image,
        spacing=meta["spacing"],
        parameters=parameters,
        mask=workload.mask,
        device="cpu",
        threads=int(options.get("threads", "1")),
    )
    meter.lap("label map")
    marginals = result.marginals if workload.mask is None else result.marginals_at(workload.mask)

report(
    meter,
    marginals.reshape(len(marginals), -1),
    save_to,
    version=crfrefine.__version__,
    filters=list(result.filters),
    engine_seconds=dict(result.timings),
)
