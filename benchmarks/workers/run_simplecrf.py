"""One timed run of SimpleCRF. It takes 8-bit images and gives labels only.

Its axes are exchanged when the first and last extents differ, so the arrays are handed over with those extents exchanged (a reshape, not
a transpose): then `RStd` acts on the last axis and `ZStd` on the first.
"""

from importlib.metadata import version

import denseCRF3D
import numpy as np
from measure import Meter, Workload, arguments, report

workload, save_to, _ = arguments()
meta = workload.meta
exchanged_shape = workload.grid_shape[::-1]


def softmax_last(case: Workload) -> np.ndarray:
    logits = np.moveaxis(case.logits, 0, -1).astype(np.float32)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


probabilities = softmax_last(workload).reshape(*exchanged_shape, -1)
image = np.ascontiguousarray(np.moveaxis(workload.image, 0, -1)).reshape(*exchanged_shape, -1)
first, middle, last = meta["spacing"]
parameters = {
    "MaxIterations": meta["num_iterations"],
    "PosW": meta["spatial_weight"],
    "PosRStd": meta["theta_gamma"] / last,
    "PosCStd": meta["theta_gamma"] / middle,
    "PosZStd": meta["theta_gamma"] / first,
    "BilateralW": meta["bilateral_weight"],
    "BilateralRStd": meta["theta_alpha"] / last,
    "BilateralCStd": meta["theta_alpha"] / middle,
    "BilateralZStd": meta["theta_alpha"] / first,
    "ModalityNum": image.shape[-1],
    "BilateralModsStds": tuple([meta["theta_beta"] * 255.0] * image.shape[-1]),
}

with Meter() as meter:
    labels = denseCRF3D.densecrf3d(image, probabilities, parameters)

report(meter, np.asarray(labels).reshape(workload.grid_shape), save_to, version=version("SimpleCRF"))
