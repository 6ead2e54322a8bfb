"""A single filtering by any engine; of these the package itself needs only the C++ engine's."""

from dataclasses import replace

import numpy as np

from crfrefine.engines.base import RunContext
from crfrefine.engines.cuda.rows import from_rows, to_rows


def message(backend, values, image, spec, threads=None):
    """Filter (V, *grid) values once with the only kernel of a set; results outside are 0."""
    if backend.name == "cpu":
        return backend.message(values, image, spec, threads=threads)
    # The filter `auto` chooses by the numbers of labels and iterations.
    spec = replace(spec, num_labels=len(values) + 1, num_iterations=1)
    kernels = backend.kernels(image, spec, RunContext(threads))
    of_engine = _by_torch if backend.name.startswith("torch") else _on_gpu
    return of_engine(kernels, values)


def _by_torch(kernels, values):
    out = np.zeros(values.shape, np.float32)
    sent = kernels.tensor(values)[:, kernels.inside]
    out[:, kernels.inside.cpu().numpy()] = kernels.built[0](sent.T).T.detach().cpu().numpy()
    return out


def _on_gpu(kernels, values):
    device = kernels._device
    xp = device.xp
    voxels = kernels._voxels
    with kernels._stream.working(values):
        channels = device.upload(values)
        sent = xp.empty((len(values), voxels.num_voxels), dtype=np.float32)
        voxels.gather(channels, sent)
        rows = to_rows(xp, sent)
        filtered = xp.empty_like(rows)
        kernel = kernels._kernels[0]
        kernel.apply(rows, kernel.sent_scale, filtered, received=kernel.scale)
        from_rows(filtered, sent)
        out = xp.zeros_like(channels)
        voxels.scatter(sent, out)
        return device.download(out)
