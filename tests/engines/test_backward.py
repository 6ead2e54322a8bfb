"""The backward pass of the mean field: gradients with respect to all its inputs, on every
backend.
"""

import cuda_shim
import numpy as np
import pytest
from cuda_shim import watched_backend
from oracles import GRADIENTS, SPACINGS, gradient_of, kernel_set, torch64
from strict_device import StrictDevice

from crfrefine.engines import get_backend
from crfrefine.engines.base import GridImage, RunContext
from crfrefine.engines.cuda import moments
from crfrefine.engines.cuda import rows as sums
from crfrefine.engines.cuda.kernels import CudaBackend
from crfrefine.parameters.specs import MeanFieldSpec

SHAPES = {1: (9,), 2: (4, 6), 3: (5, 7, 6), 4: (3, 4, 3, 5)}
needs_compiler = pytest.mark.skipif(
    cuda_shim.compiler() is None, reason="no C++ compiler to compile the GPU's kernels with"
)


class Problem:
    """A random model with two bilateral kernels and a spatial one, and a random linear loss of its
    refined logits.
    """

    def __init__(
        self,
        num_dims=3,
        *,
        num_labels=3,
        num_modalities=2,
        shape=None,
        masked=True,
        dtype=np.float64,
        volume=0.0,
        **model,
    ):
        filter_name = model.get("filter_name", "exact")
        normalization = model.get("normalization", "symmetric")
        per_label = model.get("per_label", True)
        is_potts = model.get("is_potts", False)
        rng = np.random.default_rng(num_dims)
        shape = shape or SHAPES[num_dims]
        self.values = {
            "logits": 2 * rng.normal(size=(num_labels, *shape)),
            "weights": rng.uniform(0.2, 1.5, (3, num_labels))
            * (0.1 if normalization == "none" else 1.0),
            "compatibility": np.ones((num_labels, num_labels))
            if is_potts
            else rng.normal(size=(num_labels, num_labels)),
            "temperature": np.array(1.3),
            "bias": np.random.default_rng(17).normal(size=num_labels),
            "theta_position": rng.uniform(1.0, 3.0, (2, num_dims)),
            "theta_intensity": rng.uniform(0.5, 2.0, (2, num_modalities)),
            "theta_gamma": rng.uniform(0.8, 1.5, num_dims),
            "image": rng.normal(size=(num_modalities, *shape)),
        }
        if not per_label:
            self.values["weights"][:] = self.values["weights"][:, :1]
        np.fill_diagonal(self.values["compatibility"], 0.0)
        self.mask = rng.random(shape) < 0.7 if masked else None
        self.loss_by_logits = rng.normal(size=self.values["logits"].shape)
        self.spacing = SPACINGS[num_dims]
        self.dtype = dtype
        self.volume = volume
        self.settings = {
            "normalization": normalization,
            "filter": filter_name,
            "num_labels": num_labels,
            "num_iterations": 3,
        }

    def forward(self, backend, num_iterations=3, *, threads=2, **changed):
        """Kernels, the tape of a run, its logits and model; some of the values may be others."""
        values = self.values | changed
        bilateral = list(zip(values["theta_position"], values["theta_intensity"], strict=True))
        image = GridImage(values["image"].astype(self.dtype), self.mask, self.spacing)
        kernels = backend.kernels(
            image,
            kernel_set(bilateral, values["theta_gamma"], **self.settings),
            RunContext(threads=threads),
        )
        volume = float(values.get("volume_weight", self.volume))
        options = {
            "temperature": float(values["temperature"]),
            "bias": values["bias"],
            "volume_weight": volume,
        }
        run = MeanFieldSpec(values["weights"], values["compatibility"], num_iterations, **options)
        logits = values["logits"].astype(self.dtype)
        return kernels, kernels.forward(logits, run), logits, run

    def backward(self, kernels, tape, logits, run, *, wants_image=True):
        return kernels.backward(
            tape,
            logits,
            self.loss_by_logits.astype(self.dtype),
            wants_theta=True,
            wants_image=wants_image,
        )

    def gradients(self, backend, *, threads=2, **wanted):
        return self.backward(*self.forward(backend, threads=threads), **wanted)


def assert_close(found, expected, tolerance, names=GRADIENTS, *, of_theta=None):
    """Relative to the largest value of each gradient."""
    for name in names:
        value = np.asarray(gradient_of(expected, name))
        relative = tolerance
        if of_theta and name.startswith("theta"):
            relative = of_theta
        np.testing.assert_allclose(
            gradient_of(found, name),
            value,
            atol=relative * np.abs(value).max(),
            rtol=0,
            err_msg=name,
        )


@pytest.mark.parametrize(
    ("normalization", "volume"), [("symmetric", 0.0), ("after", 0.0), ("symmetric", 0.6)]
)
def test_gradients_are_the_slopes_of_the_loss(normalization, volume):
    """A central difference over 1e-5 has a truncation error of some 1e-10 of the third derivative,
    and a rounding error of 1e-9.
    """
    problem = Problem(2, normalization=normalization, volume=volume)
    if volume:
        problem.values["volume_weight"] = np.array(volume)
    backend = torch64()
    gradients = problem.gradients(backend)
    for name in problem.values:
        direction = np.random.default_rng(1).normal(size=problem.values[name].shape)
        if name == "compatibility":
            np.fill_diagonal(direction, 0.0)
        tapes = [
            problem.forward(backend, **{name: problem.values[name] + step * direction})[1]
            for step in (-1e-5, 1e-5)
        ]
        expected = ((tapes[1].logits - tapes[0].logits) * problem.loss_by_logits).sum() / 2e-5
        assert (gradient_of(gradients, name) * direction).sum() == pytest.approx(
            expected, rel=1e-5, abs=1e-6
        ), name


@pytest.mark.parametrize(
    ("settings", "with_image"),
    [
        ({"num_dims": 1, "filter_name": "lattice", "per_label": False}, False),
        ({"num_dims": 2, "normalization": "after"}, False),
        ({"num_dims": 2, "filter_name": "truncated", "masked": False, "per_label": False}, False),
        ({"normalization": "after", "filter_name": "lattice", "masked": False}, True),
        ({"per_label": False}, True),
        ({"num_dims": 4, "filter_name": "truncated"}, True),
        ({"num_labels": 4, "per_label": False, "masked": False, "is_potts": True}, True),
        ({"num_labels": 2, "per_label": False}, True),
        *(
            ({"num_labels": labels, "volume": 0.8}, True) for labels in (2, 5, 19)
        ),  # Biases are solved for to 1e-6.
        pytest.param(
            {"num_labels": 33}, True, marks=pytest.mark.long
        ),  # More pairs of labels than threads in a block of a GPU.
    ],
    ids=str,
)
def test_gradients_agree_with_plain_tensor_operations(compiled_backend, settings, with_image):
    """One row of channels of a GPU, several, and rows that are filled in part; sums over all pairs
    of voxels agree to rounding.

    Bandwidths lose digits to squares of features that all but cancel: some thousand roundings of
    6e-8. The lattice keeps its weights in 16 bits, half a 65535th off each.
    """
    single = Problem(**settings, dtype=np.float32).gradients(
        compiled_backend, wants_image=with_image
    )
    double = Problem(**settings).gradients(torch64())
    tolerance = 1e-4
    names = list(GRADIENTS)
    if not with_image:
        names.pop()
    if "volume" in settings:
        names.append("volume_weight")
        tolerance = 2e-4
    if settings.get("filter_name") == "lattice":
        tolerance = 5e-4
    assert_close(single, double, tolerance, names, of_theta=2e-3)


@pytest.mark.parametrize(("num_modalities", "scale", "density"), [(4, 8.0, 0.7), (2, 5.0, 0.35)])
def test_gradients_of_lattices_with_few_vertices(num_modalities, scale, density):
    """Columns of features are filtered together: with four modalities along chains of lists, else
    along chains of vertices.
    """
    found = []
    for backend, dtype in ((get_backend("cpu"), np.float32), (torch64(), np.float64)):
        problem = Problem(3, num_modalities=num_modalities, filter_name="lattice", dtype=dtype)
        problem.values["theta_position"] *= scale
        problem.values["theta_intensity"] *= scale
        run = problem.forward(backend)
        num_vertices = int(run[0].filters[0].split("(")[1].split()[0])
        assert num_vertices / np.count_nonzero(problem.mask) == pytest.approx(density, rel=0.15)
        found.append(problem.backward(*run, wants_image=False))
    assert_close(*found, 5e-4, GRADIENTS[:-1], of_theta=4e-3)


def test_the_grid_filter_has_gradients_close_to_the_exact_ones():
    """Splines approximate the kernel to half a percent of its peak, and its second moments to some
    percent.
    """
    exact, grid = (
        Problem(3, filter_name=name, dtype=np.float32).gradients(get_backend("cpu"))
        for name in ("exact", "grid")
    )
    assert_close(grid, exact, 0.08)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice", "grid"])
def test_runs_have_the_same_bits_on_any_number_of_threads(filter_name):
    """On a grid of several blocks where the filter allows it, forward and backward, with a volume
    term.
    """
    shape = (17, 19, 31)
    if filter_name == "exact":
        shape = SHAPES[3]
    problem = Problem(3, filter_name=filter_name, shape=shape, volume=0.9, dtype=np.float32)
    found = []
    for threads in (1, 3):
        run = problem.forward(get_backend("cpu"), threads=threads)
        gradients = problem.backward(*run)
        found.append(
            [
                run[1].logits,
                run[1].volume_biases,
                *(gradient_of(gradients, name) for name in (*GRADIENTS, "volume_weight")),
            ]
        )
    for single, several in zip(*found, strict=True):
        np.testing.assert_array_equal(single, several)


def test_a_volume_of_many_voxels_has_the_gradients_of_its_parts():
    """Few voxels take memory for more channels at a time; many, as here the copies of a block far
    from one another, do not.
    """
    rng = np.random.default_rng(3)
    # 269280 voxels, beyond the 2^18 of kFewVoxels
    shape = (30, 24, 22)
    gap = 4
    copies = 17
    image, logits, by_logits = (
        rng.normal(size=(count, *shape)).astype(np.float32) for count in (1, 3, 3)
    )

    def gradients(num_copies):
        many = np.zeros((7, *shape[:2], (shape[2] + gap) * num_copies), np.float32)
        inside = np.zeros(many.shape[1:], bool)
        for copy in range(num_copies):
            place = slice(copy * (shape[2] + gap), copy * (shape[2] + gap) + shape[2])
            many[..., place] = np.concatenate([image, logits, by_logits])
            inside[..., place] = True
        spec = kernel_set(
            [((0.9, 1.1, 1.0), (0.8,))],
            None,
            normalization="symmetric",
            filter="truncated",
            num_labels=3,
            num_iterations=2,
        )
        kernels = get_backend("cpu").kernels(
            GridImage(many[:1], inside, (1.0, 1.3, 0.9)), spec, RunContext(threads=2)
        )
        run = MeanFieldSpec(np.full((1, 3), 2.0), 1.0 - np.eye(3), 2)
        return kernels.backward(
            kernels.forward(many[1:4], run), many[1:4], many[4:], wants_image=True
        )

    found = gradients(copies)
    part = gradients(1)
    values = {}
    for name, gradients in (("found", found), ("part", part)):
        values[name] = (gradients.weights, gradients.theta[1:], gradients.theta[:1])
    for of_copies, of_part in zip(values["found"], values["part"], strict=True):
        expected = copies * np.asarray(of_part)
        np.testing.assert_allclose(of_copies, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(
        found.image[..., : part.image.shape[3]],
        part.image,
        rtol=0,
        atol=1e-5 * np.abs(part.image).max(),
    )


@needs_compiler
@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice"])
def test_every_filter_of_the_gpu_has_the_gradients_of_the_cpu(filter_name):
    """In float32, with respect to everything, under a GPU's rules; the host waits once for all
    sums, and for its arrays.
    """
    problem = Problem(3, num_labels=4, shape=(6, 11, 8), filter_name=filter_name, dtype=np.float32)
    device = StrictDevice(is_watched=True)
    run = problem.forward(CudaBackend(device))
    device.reset()
    found = problem.backward(*run)
    assert device.waits == {"a download": 3}
    assert_close(found, problem.gradients(get_backend("cpu")), 2e-5, of_theta=4e-4)


@needs_compiler
def test_cuda_blocks_and_threads_that_take_several_voxels_find_the_same(monkeypatch):
    """As on large volumes: three blocks and seven threads for all voxels.

    Sums are grouped otherwise, so they agree to rounding.
    """
    problem = Problem(3, num_labels=4, shape=(4, 7, 9), dtype=np.float32)
    expected = problem.gradients(watched_backend())
    monkeypatch.setattr(sums, "pair_blocks", lambda *_: 3)
    monkeypatch.setattr(moments, "sum_threads", lambda _: 7)
    assert_close(problem.gradients(watched_backend()), expected, 1e-6, of_theta=2e-5)
