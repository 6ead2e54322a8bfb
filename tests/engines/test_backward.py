"""The backward pass of the mean field: gradients with respect to all its inputs, on every backend."""

import numpy as np
import pytest
from oracles import kernel_set

from crfrefine.engines import get_backend
from crfrefine.engines.base import RunContext
from crfrefine.engines.grid_image import GridImage
from crfrefine.errors import InputError
from crfrefine.parameters.specs import MeanFieldSpec

SPACING = {1: (1.3,), 2: (1.0, 0.7), 3: (1.0, 1.5, 2.0), 4: (1.0, 2.0, 1.5, 1.0)}
SHAPES = {1: (9,), 2: (4, 6), 3: (5, 7, 6), 4: (3, 4, 3, 5)}
NAMES = ("logits", "weights", "compatibility", "temperature", "bias", "theta_position", "theta_intensity", "theta_gamma", "image")


class Problem:
    """A random model with two bilateral kernels and a spatial one, and a random linear loss of its refined logits."""

    def __init__(
        self,
        num_dims=3,
        *,
        num_modalities=2,
        normalization="symmetric",
        filter_name="exact",
        masked=True,
        per_label=True,
        damping=0.0,
        dtype=np.float64,
    ):
        rng = np.random.default_rng(num_dims)
        shape, self.num_labels = SHAPES[num_dims], 3
        self.values = {
            "logits": 2 * rng.normal(size=(self.num_labels, *shape)),
            "weights": rng.uniform(0.2, 1.5, (3, self.num_labels)) * (0.1 if normalization == "none" else 1.0),
            "compatibility": rng.normal(size=(self.num_labels, self.num_labels)),
            "temperature": np.array(1.3),
            "bias": np.random.default_rng(17).normal(size=self.num_labels),
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
        self.spacing = SPACING[num_dims]
        self.normalization, self.filter, self.damping, self.dtype = normalization, filter_name, damping, dtype

    def kernels(self, backend, values, *, threads=2):
        return backend.kernels(
            GridImage(values["image"].astype(self.dtype), self.mask, self.spacing),
            kernel_set(
                list(zip(values["theta_position"], values["theta_intensity"], strict=True)),
                values["theta_gamma"],
                normalization=self.normalization,
                filter=self.filter,
                num_labels=self.num_labels,
                num_iterations=3,
            ),
            RunContext(threads=threads),
        )

    def run(self, values, num_iterations=3):
        return MeanFieldSpec(
            values["weights"],
            values["compatibility"],
            num_iterations,
            temperature=float(values["temperature"]),
            damping=self.damping,
            bias=values["bias"],
        )

    def loss(self, backend, values):
        kernels = self.kernels(backend, values)
        tape = kernels.forward(values["logits"].astype(self.dtype), self.run(values))
        return float((tape.logits * self.loss_by_logits).sum())

    def gradients(self, backend, *, threads=2, **wanted):
        kernels = self.kernels(backend, self.values, threads=threads)
        logits = self.values["logits"].astype(self.dtype)
        tape = kernels.forward(logits, self.run(self.values))
        wanted = wanted or {"wants_theta": True, "wants_image": True}
        return kernels.backward(tape, logits, self.loss_by_logits.astype(self.dtype), self.run(self.values), **wanted)


def assert_close(found, expected, tolerance, names=NAMES, *, of_theta=None):
    """Relative to the largest value of each gradient."""
    for name in names:
        value = np.asarray(getattr(expected, name))
        own = of_theta if of_theta and name.startswith("theta") else tolerance
        np.testing.assert_allclose(getattr(found, name), value, atol=own * np.abs(value).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize(("normalization", "damping"), [("symmetric", 0.0), ("after", 0.3), ("none", 0.3)])
def test_gradients_are_the_slopes_of_the_loss(backend, normalization, damping):
    """Along a random direction, the derivative is the central difference of the loss.

    In float64 a difference over 1e-5 has a truncation error of about 1e-10 of the third derivative and a rounding error of 1e-11 of the
    loss (below 100): 1e-6 leaves room for both.
    """
    problem = Problem(2, normalization=normalization, damping=damping)
    gradients = problem.gradients(backend)
    for name in NAMES:
        direction = np.random.default_rng(1).normal(size=problem.values[name].shape)
        if name == "compatibility":
            np.fill_diagonal(direction, 0.0)
        ends = [problem.loss(backend, {**problem.values, name: problem.values[name] + step * direction}) for step in (-1e-5, 1e-5)]
        slope = float((getattr(gradients, name) * direction).sum())
        assert slope == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("num_dims", "normalization", "filter_name", "masked", "per_label", "damping"),
    [
        (1, "symmetric", "lattice", True, False, 0.3),
        (2, "after", "exact", True, True, 0.3),
        (2, "symmetric", "truncated", True, False, 0.0),
        (3, "after", "lattice", False, True, 0.0),
        (3, "symmetric", "exact", False, False, 0.3),
        (3, "none", "truncated", True, True, 0.3),
        (4, "none", "lattice", True, True, 0.3),
        (4, "symmetric", "truncated", False, True, 0.0),
    ],
)
def test_float64_gradients_agree_with_dense_matrices(compiled_backend, num_dims, normalization, filter_name, masked, per_label, damping):
    """Sums over pairs agree to rounding; the lattice keeps its weights in 16 bits, half a 65535th off each."""
    problem = Problem(num_dims, normalization=normalization, filter_name=filter_name, masked=masked, per_label=per_label, damping=damping)
    tolerance = 5e-4 if filter_name == "lattice" else 1e-10
    assert_close(problem.gradients(compiled_backend), problem.gradients(get_backend("reference")), tolerance)


@pytest.mark.parametrize(
    ("num_dims", "filter_name", "with_image"),
    [(1, "lattice", False), (2, "truncated", False), (3, "exact", True), (3, "lattice", True), (4, "truncated", True)],
)
def test_float32_gradients_agree_with_float64(compiled_backend, num_dims, filter_name, with_image):
    """Bandwidths lose digits to the squares of features, up to 30 here, that all but cancel: some thousand roundings of 6e-8."""
    wanted = {"wants_theta": True, "wants_image": with_image}
    single = Problem(num_dims, filter_name=filter_name, dtype=np.float32).gradients(compiled_backend, **wanted)
    double = Problem(num_dims, filter_name=filter_name).gradients(compiled_backend)
    assert_close(single, double, 1e-4, NAMES if with_image else NAMES[:-1], of_theta=2e-3)


@pytest.mark.parametrize(("num_modalities", "scale", "density"), [(4, 8.0, 0.7), (2, 5.0, 0.35)])
def test_float32_gradients_of_lattices_with_few_vertices_agree_with_float64(num_modalities, scale, density):
    """With fewer vertices than voxels, and no gradient of the image, columns of features are filtered together: in float32 with four
    modalities along chains of lists, else, as in float64, along chains of vertices.
    """
    found = []
    for dtype in (np.float32, np.float64):
        problem = Problem(3, num_modalities=num_modalities, filter_name="lattice", dtype=dtype)
        problem.values["theta_position"] *= scale
        problem.values["theta_intensity"] *= scale
        kernels = problem.kernels(get_backend("cpu"), problem.values)
        num_vertices = int(kernels.filters[0].split("(")[1].split()[0])
        assert num_vertices / np.count_nonzero(problem.mask) == pytest.approx(density, rel=0.15)
        found.append(problem.gradients(get_backend("cpu"), wants_theta=True, wants_image=False))
    assert_close(*found, 1e-4, NAMES[:-1], of_theta=2e-3)


def test_the_grid_filter_has_gradients_close_to_the_exact_ones():
    """Splines approximate the kernel to half a percent of its peak, and its second moments to some percent."""
    exact, grid = (Problem(3, filter_name=name, dtype=np.float32).gradients(get_backend("cpu")) for name in ("exact", "grid"))
    assert_close(grid, exact, 0.08)


@pytest.mark.parametrize("filter_name", ["exact", "truncated", "lattice", "grid"])
def test_gradients_are_the_same_bits_on_any_number_of_threads(filter_name):
    one, three = (Problem(3, filter_name=filter_name, dtype=np.float32).gradients(get_backend("cpu"), threads=n) for n in (1, 3))
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(three, name), err_msg=name)


def test_logits_outside_the_mask_pass_their_gradient_on(backend):
    problem = Problem(3)
    gradients = problem.gradients(backend)
    outside = ~problem.mask
    np.testing.assert_allclose(gradients.logits[:, outside], problem.loss_by_logits[:, outside] / 1.3, rtol=1e-12)
    assert not gradients.image[:, outside].any()


def test_the_grid_filter_refuses_float64():
    with pytest.raises(InputError, match="single precision"):
        Problem(2, filter_name="grid").gradients(get_backend("cpu"))


def test_a_forbidden_label_leaves_step_control_in_force():
    """One logit of minus infinity is in no energy: steps are halved as they are for a very low one."""
    problem = Problem(3)
    problem.values["compatibility"] = np.array([[0.0, -3.0, 1.0], [2.0, 0.0, -2.0], [-1.0, 3.0, 0.0]])
    problem.values["weights"][:] = 20.0
    steps = []
    for lowest in (-np.inf, -200.0):
        logits = problem.values["logits"].copy()
        logits[2, 0] = lowest
        kernels = problem.kernels(get_backend("cpu"), problem.values)
        steps.append(kernels.forward(logits, problem.run(problem.values, 8)).steps)
    assert steps[0] == steps[1]
    assert min(steps[0]) < 1.0


def test_a_volume_of_many_voxels_has_the_gradients_of_its_parts():
    """Few voxels take memory for more channels at a time; many, as here the copies of a block far from one another, do not."""
    rng = np.random.default_rng(3)
    shape, gap, copies = (30, 24, 22), 4, 17  # 269280 voxels, beyond the 2^18 of kFewVoxels
    image, logits, by_logits = (rng.normal(size=(count, *shape)).astype(np.float32) for count in (1, 3, 3))

    def gradients(num_copies):
        many = np.zeros((7, *shape[:2], (shape[2] + gap) * num_copies), np.float32)
        inside = np.zeros(many.shape[1:], bool)
        for copy in range(num_copies):
            place = slice(copy * (shape[2] + gap), copy * (shape[2] + gap) + shape[2])
            many[..., place] = np.concatenate([image, logits, by_logits])
            inside[..., place] = True
        spec = kernel_set([((0.9, 1.1, 1.0), (0.8,))], None, normalization="symmetric", filter="truncated", num_labels=3, num_iterations=2)
        kernels = get_backend("cpu").kernels(GridImage(many[:1], inside, (1.0, 1.3, 0.9)), spec, RunContext(threads=2))
        run = MeanFieldSpec(np.full((1, 3), 2.0), 1.0 - np.eye(3), 2)
        return kernels.backward(kernels.forward(many[1:4], run), many[1:4], many[4:], run, wants_image=True)

    found, part = gradients(copies), gradients(1)
    for name in ("weights", "theta_position", "theta_intensity"):
        expected = copies * np.asarray(getattr(part, name))
        np.testing.assert_allclose(getattr(found, name), expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=name)
    np.testing.assert_allclose(found.image[..., : part.image.shape[3]], part.image, rtol=0, atol=1e-5 * np.abs(part.image).max())
