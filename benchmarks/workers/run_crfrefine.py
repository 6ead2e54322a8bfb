"""One timed run of crfrefine, through its public function.

Checks, the build, the steps, marginals and label map.

Marginals of masked workloads are those of the masked voxels: the other library returns no others.
"""

import os

import numpy as np
from measure import Meter, arguments, model_entries, report

import crfrefine

workload, save_to, options = arguments()
if "level" in options:
    os.environ["CRFREFINE_CPU_LEVEL"] = options["level"]
# A call on a few voxels before the clock runs: Python imports here what the other libraries load
# when they are imported.
few = np.linspace(-2, 2, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
crfrefine.refine(few, few[:1], spacing=(1.0, 2.0, 3.0), device="cpu")

meta = workload.meta
image = workload.image.astype(np.float32) / np.float32(255.0)
del workload.image
parameters = crfrefine.CrfParameters().replace(**model_entries(meta, options.get("filter", "auto")))

with Meter() as meter:
    result = crfrefine.refine(
        workload.logits,
        image,
        spacing=meta["spacing"],
        parameters=parameters,
        mask=workload.mask,
        device="cpu",
        threads=1,
    )
    marginals = result.marginals if workload.mask is None else result.marginals_at(workload.mask)

report(
    meter,
    marginals.reshape(len(marginals), -1),
    save_to,
    version=crfrefine.__version__,
    filters=list(result.filters),
)
