"""Every kernel of the GPU engine on small cases, for the tests and `compute-sanitizer` on a GPU."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from messages import message

from crfrefine import CrfParameters
from crfrefine.engines.base import GridImage
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.engines.cuda.sources import KernelSource, kernels_dir
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec, MeanFieldSpec

Launched = tuple[str, str, tuple[tuple[str, int], ...]]
"""Source, kernel, and its constants."""

FILTERS = ("exact", "truncated", "lattice")
# the last axis is longer than a warp, no extent is a multiple of anything
SHAPE = (9, 6, 37)
SPACING = (1.0, 0.8, 1.5)
COMMON = {
    "bilateral.theta_beta": 0.4,
    "spatial.weight": 0.5,
    "spatial.theta_gamma": 1.2,
    "mean_field.num_iterations": 5,
}


def source_names():
    """The name of every source file of the GPU engine."""
    return sorted(path.stem for path in (kernels_dir() / "cuda").glob("*.cu"))


class Watched:
    """A device that remembers what was launched on it; see `CupyDevice`."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.launched: set[Launched] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def launch(self, source, kernel, constants, num_items, /, **arguments) -> None:
        if num_items:
            self.launched.add((source, kernel, tuple(sorted(constants.items()))))
        self._device.launch(source, kernel, constants, num_items, **arguments)


def not_run(launched: set[Launched]) -> list[str]:
    """The kernels that are missing there, as "source.kernel"."""
    found = {f"{source}.{kernel}" for source, kernel, _ in launched}
    every = set()
    for source in source_names():
        every |= {f"{source}.{kernel}" for kernel in KernelSource(source, {}).kernels}
    return sorted(every - found)


def run_each(device: Any) -> set[Launched]:
    """Run each kernel with few constants, on few voxels; what was launched."""
    watched = Watched(device)
    rng = np.random.default_rng(5)
    engine = CudaBackend(watched)
    mask = rng.random(SHAPE) < 0.1
    logits = _normal(rng, 4)
    image = rng.random((2, *SHAPE)).astype(np.float32)
    for filter_name in FILTERS:
        _run_backward(engine, logits, image, mask, filter_name)
    wide = _kernels(
        engine, image, None, [KernelSpec("bilateral", (300.0,) * 3, (300.0,) * 2)], "lattice", 4
    )
    wide.run(logits, MeanFieldSpec(_weights(4), 1.0 - np.eye(4), 5))
    _run_short_axes(engine)
    _run_points(engine)
    _run_volumes(engine, image, mask, (4,))
    return watched.launched


def run_all(device: Any) -> set[Launched]:
    """Run every filter forward and backward, with narrow and wide keys, short and long lists."""
    watched = Watched(device)
    rng = np.random.default_rng(5)
    engine = CudaBackend(watched)
    mask = rng.random(SHAPE) < 0.7
    logits = _normal(rng, 5)
    image = rng.random((4, *SHAPE)).astype(np.float32)
    # A long bandwidth has all voxels on a few vertices, which blocks share; a tiny
    # one has keys of more than 64 bits.
    _run_mean_field(engine, logits, image, mask, "exact", 1.7, 0.4)
    _run_mean_field(engine, logits, image, mask, "truncated", 1.2, 0.4)
    _run_mean_field(engine, logits, image, mask, "lattice", 1.7, 0.4)
    _run_mean_field(engine, logits, image, mask, "lattice", 300.0, 300.0)
    _run_mean_field(engine, logits, image, mask, "lattice", 0.02, 0.001)
    _run_short_axes(engine)
    _run_points(engine)
    _run_many_labels(engine, image, mask)
    _run_volumes(engine, image, mask, (5, 11))
    for filter_name in FILTERS:
        _run_backward(engine, logits, image, mask, filter_name)
    _run_label_counts(engine, image, mask)
    device.synchronize()
    return watched.launched


def _normal(rng, num_labels):
    return rng.normal(size=(num_labels, *SHAPE)).astype(np.float32)


def _weights(num_labels):
    """Of one kernel: no label follows from the others."""
    return 0.5 + 0.1 * np.arange(num_labels)[None] / num_labels


def _kernels(engine, image, mask, terms, filter_name, num_labels):
    numbers = {"num_labels": num_labels, "num_iterations": 2}
    spec = KernelSetSpec(tuple(terms), "symmetric", filter_name, **numbers)
    return engine.kernels(GridImage(image, mask, SPACING), spec)


def _message(engine, values, image, mask, kernel, filter_name, normalization):
    spec = KernelSetSpec((kernel,), normalization, filter_name, num_labels=5, num_iterations=1)
    message(engine, values, GridImage(image, mask, (*SPACING, 0.8)[: image.ndim - 1]), spec)


def _run_mean_field(engine, logits, image, mask, filter_name, theta_alpha, theta_beta):
    """Steps in a mask, steps until nothing changes without one, and a message."""
    bandwidths = {"bilateral.theta_alpha": theta_alpha, "bilateral.theta_beta": theta_beta}
    parameters = CrfParameters().replace(**COMMON | bandwidths | {"mean_field.filter": filter_name})
    engine.mean_field(logits, GridImage(image, mask, SPACING), parameters.resolve(5, 4, 3))
    until_equal = parameters.replace(**{"mean_field.tolerance": 1e-6})
    engine.mean_field(logits, GridImage(image, None, SPACING), until_equal.resolve(5, 4, 3))
    kernel = KernelSpec("bilateral", (theta_alpha,) * 3, (theta_beta,) * 4)
    _message(engine, logits, image, mask, kernel, filter_name, "none")


def _run_label_counts(engine, image, mask):
    """Rows of one, two and eight channels, forward and backward."""
    rng = np.random.default_rng(11)
    for num_labels in (2, 3, 9):
        logits = _normal(rng, num_labels)
        for filter_name in FILTERS:
            modalities = image if filter_name == "lattice" else image[:1]
            _run_backward(engine, logits, modalities, mask, filter_name)
    # One channel: of two labels with one weight, the last one is implied.
    kernels = _kernels(
        engine, image[:1], mask, [KernelSpec("bilateral", (1.2,) * 3, (0.4,))], "lattice", 2
    )
    kernels.run(_normal(rng, 2), MeanFieldSpec(np.full((1, 2), 0.5), 1.0 - np.eye(2), 1))


def _run_short_axes(engine):
    """Spatial kernels where an early axis has its neighbors nearby, or is alone."""
    rng = np.random.default_rng(7)
    for shape in ((57,), (9, 20), (5, 6, 7)):
        for inside in (None, rng.random(shape) < 0.7):
            values = rng.random((4, *shape), dtype=np.float32)
            image = np.zeros((0, *shape), np.float32)
            kernel = KernelSpec("spatial", (1.2,) * len(shape))
            _message(engine, values, image, inside, kernel, "auto", "symmetric")


def _run_points(engine):
    """Points with the features of three to six blurs, filtered both ways, and their gradients."""
    rng = np.random.default_rng(12)
    for num_features in (2, 3, 4):
        points = rng.normal(size=(num_features, 300)).astype(np.float32)
        for method, num_channels in (("lattice", 1), ("lattice", 9), ("exact", 3)):
            left, right = rng.normal(size=(2, num_channels, 300)).astype(np.float32)
            kernel = engine.points(points, method)
            kernel.apply(left)
            kernel.apply(left, transposed=True)
            kernel.feature_gradient(left, right)


def _run_many_labels(engine, image, mask):
    """More than registers hold: the last one implied or not, with a matrix or without."""
    rng = np.random.default_rng(8)
    logits = _normal(rng, 35)
    terms = (
        KernelSpec("bilateral", (1.2,) * 3, (0.4,) * len(image)),
        KernelSpec("spatial", (1.1,) * 3),
    )
    kernels = _kernels(engine, image, mask, terms, "lattice", 35)
    for weights in (np.full((2, 35), 0.5), rng.random((2, 35))):
        for penalty in (np.ones((35, 35)), rng.random((35, 35))):
            model = MeanFieldSpec(weights, penalty * (1.0 - np.eye(35)), 2, tolerance=1e-6)
            kernels.run(logits, model)


def _run_volumes(engine, image, mask, label_counts):
    """The volume term, with few labels and with more than are summed together."""
    rng = np.random.default_rng(9)
    terms = [KernelSpec("bilateral", (1.2,) * 3, (0.4,) * len(image))]
    for number in label_counts:
        logits = _normal(rng, number)
        kernels = _kernels(engine, image, mask, terms, "exact", number)
        volume = {"tolerance": 1e-6, "volume_weight": 0.8}
        model = MeanFieldSpec(_weights(number), 1.0 - np.eye(number), 2, **volume)
        kernels.run(logits, model)
        kernels.backward(kernels.forward(logits, model), logits, np.ones_like(logits))


def _run_backward(engine, logits, image, mask, filter_name):
    num_labels = len(logits)
    terms = (
        KernelSpec("bilateral", (1.2, 1.7, 1.4), (0.4,) * len(image)),
        KernelSpec("spatial", (1.1, 1.2, 1.3)),
    )
    kernels = _kernels(engine, image, mask, terms, filter_name, num_labels)
    weights = np.full((2, num_labels), 0.5)
    weights[0, 1] = 0.8
    tape = kernels.forward(logits, MeanFieldSpec(weights, 1.0 - np.eye(num_labels), 2))
    kernels.backward(tape, logits, np.ones_like(logits), wants_theta=True, wants_image=True)


def main() -> None:
    """Run on the first GPU, each array in its own memory, so that an access beyond it is seen."""
    from crfrefine.engines.cuda.cupy_device import CupyDevice

    device = CupyDevice()
    device.xp.cuda.set_allocator(None)
    if missing := not_run(run_all(device)):
        raise SystemExit(f"these kernels have not run: {', '.join(missing)}")
    sys.stdout.write("every kernel has run\n")


if __name__ == "__main__":
    main()
