"""One timed run of pydensecrf2: lattices built, then the steps.

It takes unaries and features as arrays over the voxels. The unaries are its form of the input; the
features count as memory, which it cannot do without, but making them does not count as time.
"""

from importlib.metadata import version

import numpy as np
from measure import Meter, arguments, report
from pydensecrf import densecrf

workload, save_to, _ = arguments()
meta = workload.meta
num_axes = len(workload.grid_shape)
num_modalities = workload.image.shape[0]
num_voxels = workload.image[0].size if workload.mask is None else int(workload.mask.sum())
unary = workload.masked_rows(workload.logits, np.float32, scale=-1.0)
bilateral = np.empty((num_axes + num_modalities, num_voxels), np.float32)
spatial = np.empty((num_axes, num_voxels), np.float32)
for axis, step in enumerate(meta["spacing"]):
    index = np.arange(workload.grid_shape[axis], dtype=np.float32).reshape(
        [-1 if a == axis else 1 for a in range(num_axes)]
    )
    position = workload.masked_rows(
        np.broadcast_to(index * step, (1, *workload.grid_shape)), np.float32
    )[0]
    bilateral[axis] = position / meta["theta_alpha"]
    spatial[axis] = position / meta["theta_gamma"]
bilateral[num_axes:] = workload.masked_rows(
    workload.image, np.float32, scale=1.0 / (255.0 * meta["theta_beta"])
)
del position

with Meter() as meter:
    crf = densecrf.DenseCRF(num_voxels, unary.shape[0])
    crf.setUnaryEnergy(unary)
    crf.addPairwiseEnergy(
        bilateral, compat=meta["bilateral_weight"], normalization=densecrf.NORMALIZE_SYMMETRIC
    )
    if meta["spatial_weight"] != 0.0:
        crf.addPairwiseEnergy(
            spatial, compat=meta["spatial_weight"], normalization=densecrf.NORMALIZE_SYMMETRIC
        )
    marginals = np.asarray(crf.inference(meta["num_iterations"]))
meter.peak_mib += (
    bilateral.nbytes + (spatial.nbytes if meta["spatial_weight"] != 0.0 else 0)
) / 2**20

report(meter, marginals, save_to, version=version("pydensecrf2"))
