"""Random cases and brute-force answers for the tests, straight from the formulas and without any of
the package's arithmetic.

Grids are never cubic and spacings never equal, so that an exchanged axis shows.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import BSpline
from scipy.spatial.distance import cdist

from crfrefine.engines.base import GridImage
from crfrefine.parameters.model import CrfParameters
from crfrefine.parameters.specs import KernelSetSpec, KernelSpec

GRIDS = {1: (37,), 2: (9, 14), 3: (5, 8, 7), 4: (3, 5, 4, 6)}
GRADIENTS = (
    "logits",
    "weights",
    "compatibility",
    "temperature",
    "bias",
    "theta_position",
    "theta_intensity",
    "theta_gamma",
    "image",
)
SPACINGS = {1: (0.8,), 2: (1.3, 0.7), 3: (1.0, 0.6, 1.7), 4: (0.9, 1.4, 0.6, 1.1)}


@dataclass(frozen=True)
class Case:
    """Input of a refinement."""

    logits: NDArray[np.float32]
    image: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    spacing: tuple[float, ...]

    @property
    def inside(self):
        """The mask, or all voxels."""
        return np.ones(self.logits.shape[1:], dtype=bool) if self.mask is None else self.mask

    @property
    def grid(self):
        """What engines get besides the logits."""
        return GridImage(self.image, self.mask, self.spacing)


def random_case(num_dims=3, num_modalities=2, num_labels=3, *, masked=False, grid_shape=None):
    """Two smooth regions with noise, logits that mostly follow them; the same for the same
    arguments.
    """
    rng = np.random.default_rng([num_dims, num_modalities, num_labels, masked])
    shape = tuple(grid_shape or GRIDS[num_dims])
    region = ndimage.gaussian_filter(rng.normal(size=shape), 1.5) > 0.0
    image = 0.3 + 0.3 * region + rng.normal(scale=0.08, size=(num_modalities, *shape))
    logits = rng.normal(size=(num_labels, *shape))
    logits[0] += 1.5 * ~region
    logits[-1] += 1.5 * region
    mask = rng.random(shape) < 0.7 if masked else None
    return Case(logits.astype(np.float32), image.astype(np.float32), mask, SPACINGS[num_dims])


def brute_force_kernel(image, inside, spacing, theta_position, theta_intensity, *, radius=np.inf):
    """K over the masked voxels in C order; pairs farther apart than `radius` in units of
    theta_position are 0.
    """
    places = np.argwhere(inside) * (np.asarray(spacing) / np.asarray(theta_position))
    exponent = distance = cdist(places, places, "sqeuclidean")
    if theta_intensity is not None:
        values = np.asarray(image, dtype=np.float64)[:, inside].T / np.asarray(theta_intensity)
        exponent = distance + cdist(values, values, "sqeuclidean")
    kernel = np.exp(-0.5 * exponent)
    return (
        kernel if radius == np.inf else np.where(distance <= radius**2 * (1.0 + 1e-9), kernel, 0.0)
    )


def grid_kernel(case, theta_alpha, theta_beta):
    """The matrix S G S^T of docs/reference/math.md: cells one bandwidth wide, from the corner of
    the mask and the lowest intensity.
    """
    index = np.argwhere(case.inside)
    features = [
        (column - column.min()) * step / theta_alpha
        for column, step in zip(index.T, case.spacing, strict=True)
    ]
    for channel in case.image.astype(np.float64):
        features.append((channel[case.inside] - channel[case.inside].min()) / theta_beta)
    kernel = np.ones((len(index), len(index)))
    cubic = BSpline.basis_element(np.arange(-2.0, 3.0))
    for feature in features:
        points = np.arange(-3, int(feature.max()) + 5)
        places = feature[:, None] - points
        spline = np.where(np.abs(places) < 2.0, cubic(places), 0.0)
        taps = 1.67591 * np.eye(len(points)) + 0.41632 * (
            np.eye(len(points), k=1) + np.eye(len(points), k=-1)
        )
        kernel *= spline @ taps @ spline.T
    return kernel


def normalize_kernel(kernel, normalization):
    """The kernel matrix with its normalization."""
    row_sum = kernel.sum(axis=1)
    if normalization == "symmetric":
        return kernel / np.sqrt(row_sum[:, None] * row_sum[None, :])
    return kernel / row_sum[:, None] if normalization == "after" else kernel


def softmax(logits, axis=0):
    """Softmax over an axis, in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    shifted = np.exp(shifted - shifted.max(axis=axis, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=axis, keepdims=True))


def kernels_of(case, model):
    """Normalized kernel matrix and weights of each term."""
    kernels = model.kernels
    spacing = case.spacing if kernels.positions == "mm" else (1.0,) * len(case.spacing)
    terms = []
    for term, weight in zip(kernels.kernels, model.mean_field.weights, strict=True):
        radius = 3.0 if kernels.filter == "truncated" and term.theta_intensity else np.inf
        kernel = brute_force_kernel(
            case.image,
            case.inside,
            spacing,
            term.theta_position,
            term.theta_intensity or None,
            radius=radius,
        )
        terms.append((normalize_kernel(kernel, kernels.normalization), weight.astype(np.float64)))
    return terms


def scores_of(case, run):
    """Calibrated logits of the masked voxels."""
    bias = 0.0 if run.bias is None else run.bias[:, None].astype(np.float64)
    return (case.logits[:, case.inside].astype(np.float64) + bias) / run.temperature


def brute_force_mean_field(case, model, *, correct=lambda x: x, more_energy=lambda marginals: 0.0):
    """Marginals (L, N) over the masked voxels after exactly `num_iterations` steps, and the energy
    that each step started from.

    A further term corrects the logits of each step, and adds its own energy.
    """
    run = model.mean_field
    scores = scores_of(case, run)
    terms = kernels_of(case, model)
    penalty = run.compatibility.astype(np.float64)
    x = scores
    energies = []
    for _ in range(run.num_iterations):
        marginals = softmax(x)
        pairwise = sum(
            penalty.T @ (weight[:, None] * (marginals @ kernel.T)) for kernel, weight in terms
        )
        entropy = np.sum(marginals * np.log(np.maximum(marginals, 1e-300)))
        energies.append(
            float(entropy - np.sum(marginals * scores) + 0.5 * np.sum(marginals * pairwise))
            + more_energy(marginals)
        )
        x = correct(scores - pairwise)
    return softmax(x), energies


def main_bodies(case, run):
    """The voxels of the largest component of each foreground label where it is at least 0.3
    probable, (*grid).
    """
    found = np.zeros(case.inside.shape, dtype=bool)
    for own in softmax(scores_of(case, run))[1:]:
        probability = np.zeros(found.shape)
        probability[case.inside] = own
        numbered, count = ndimage.label(probability > 0.3, np.ones((3,) * found.ndim))
        found |= (numbered == 1 + np.bincount(numbered.ravel())[1:].argmax()) if count else False
    return found


def resolve(case, **changes):
    """The default parameters with an exact filter, always all the steps, and `changes`, for a case;
    dots in keys are written as `__`.
    """
    fixed = {
        "mean_field.filter": "exact",
        "mean_field.tolerance": 0.0,
        "bilateral.theta_beta": 0.15,
    }
    fixed |= {key.replace("__", "."): value for key, value in changes.items()}
    return (
        CrfParameters()
        .replace(**fixed)
        .resolve(case.logits.shape[0], case.image.shape[0], len(case.spacing))
    )


def one_kernel(theta_alpha, theta_beta, **settings):
    """What `message` takes: one kernel, the spatial one where `theta_beta` is None; exact and not
    normalized unless told else.
    """
    return kernel_set(
        [(theta_alpha, theta_beta)],
        None,
        **{"normalization": "none", "filter": "exact", **settings},
    )


def kernel_set(bilateral, theta_gamma, *, num_labels=2, num_iterations=1, **settings):
    """What `Backend.kernels` takes, from theta_alpha and theta_beta of each appearance kernel."""
    kernels = [
        KernelSpec("spatial", tuple(alpha))
        if beta is None
        else KernelSpec("bilateral", tuple(alpha), tuple(beta))
        for alpha, beta in bilateral
    ]
    kernels += [] if theta_gamma is None else [KernelSpec("spatial", tuple(theta_gamma))]
    return KernelSetSpec(
        tuple(kernels), settings["normalization"], settings["filter"], num_labels, num_iterations
    )


def gradient_of(gradients, name):
    """A gradient by its name, of two appearance kernels and a spatial one."""
    if not name.startswith("theta_"):
        return getattr(gradients, name)
    num_axes = gradients.logits.ndim - 1
    of_bilateral = np.reshape(gradients.theta[:-num_axes], (2, -1))
    parts = {
        "theta_position": of_bilateral[:, -num_axes:],
        "theta_intensity": of_bilateral[:, :-num_axes],
        "theta_gamma": gradients.theta[-num_axes:],
    }
    return parts[name]


def rms(difference):
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def torch64():
    """The model in plain tensor operations, in float64 whatever the image has."""
    from crfrefine.engines.torch.engine import TorchBackend

    class Torch64(TorchBackend):
        def kernels(self, image, spec, *context):
            return super().kernels(
                replace(image, values=np.asarray(image.values, np.float64)), spec, *context
            )

    return Torch64()
