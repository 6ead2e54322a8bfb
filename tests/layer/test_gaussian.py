"""The Gaussian filter on tensors: gradients with respect to values and features, batches, types,
transforms.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import crfrefine  # noqa: E402
from crfrefine.errors import CapacityError, ConfigError, InputError  # noqa: E402
from crfrefine.layer.functional import gaussian_filter, mean_field  # noqa: E402


def make(num_points=60, num_features=4, num_channels=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, num_channels, num_points, generator=generator, dtype=torch.float64).to(
        dtype
    )
    return values, torch.randn(
        2, num_points, num_features, generator=generator, dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("normalization", ["none", "after", "symmetric"])
def test_gradcheck_in_float64(normalization):
    values, features = make(12, 3, dtype=torch.float64)
    values.requires_grad_()
    features.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, f: gaussian_filter(v, f, method="exact", normalization=normalization),
        (values, features),
    )


def filtered(values, features, **options):
    """The result, and the gradients of its sum of squares with respect to values and features."""
    leaves = [tensor.detach().requires_grad_() for tensor in (values, features)]
    result = gaussian_filter(*leaves, **options)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), leaves)]


@pytest.mark.parametrize("normalization", ["none", "after", "symmetric"])
@pytest.mark.parametrize(("method", "tolerance"), [("exact", 2e-5), ("lattice", 0.35)])
def test_gradients_of_the_engine_are_those_of_the_sum_over_all_pairs(
    method, tolerance, normalization
):
    double = make(300, 3, dtype=torch.float64)
    options = {"normalization": normalization}
    expected = filtered(*double, method="exact", **options)[1:]
    found = filtered(*make(300, 3), method=method, **options)[1:]
    for wanted, own in zip(expected, found, strict=True):
        assert (own.double() - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-5), ("lattice", 1e-4)])
def test_operations_of_pytorch_give_the_values_and_gradients_of_the_engine(method, tolerance):
    """float64 takes the operations that a GPU takes: the same lattice, also of features with a
    large offset.
    """
    results = []
    for dtype in (torch.float64, torch.float32):
        values, features = make(300, 4, dtype=dtype)
        results.append(filtered(values, features + 64, method=method, normalization="after"))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(
            found.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max())
        )


def test_tensors_and_arrays_give_the_same_values():
    values, features = make()
    for normalization in ("none", "after", "symmetric"):
        found = gaussian_filter(values, features, method="lattice", normalization=normalization)
        for item in range(2):
            expected = crfrefine.gaussian_filter(
                values[item].numpy(),
                features[item].numpy(),
                method="lattice",
                normalization=normalization,
            )
            np.testing.assert_allclose(found[item].numpy(), expected, rtol=2e-6)
            of_item = crfrefine.gaussian_filter(
                values[item], features[item], method="lattice", normalization=normalization
            )
            torch.testing.assert_close(of_item, found[item])


def test_grids_masks_and_types():
    shape = (4, 5, 7)
    values = torch.rand(2, 3, *shape)
    features = torch.randn(2, 4, *shape)
    mask = torch.rand(shape) > 0.3
    found = gaussian_filter(values, features, mask=mask)
    inside = gaussian_filter(values[:, :, mask], features[:, :, mask].transpose(1, 2))
    torch.testing.assert_close(found[:, :, mask], inside)
    assert not found[:, :, ~mask].any()
    assert gaussian_filter(values[:0], features[:0]).shape == (0, 3, *shape)
    half = gaussian_filter(values.half(), features.half(), normalization="after")
    assert half.dtype == torch.float16
    assert gaussian_filter(values.double(), features).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gaussian_filter(values, features).dtype == torch.float32


def test_gradients_by_a_transform_of_the_function_are_the_same():
    values, features = make()

    def loss(v, f):
        return gaussian_filter(v, f, normalization="after").square().sum()

    by_transform = torch.func.grad(loss, argnums=(0, 1))(values, features)
    _, *expected = filtered(values, features, normalization="after")
    torch.testing.assert_close(list(by_transform), expected)


def by_item(filter_):
    return torch.func.vmap(lambda v, f: filter_(v[None], f[None]))


@pytest.mark.parametrize(
    ("transform", "dtype", "message"),
    [
        (by_item, torch.float32, r"filter a batch \(B, V, N\)"),
        (by_item, torch.float64, r"filter a batch \(B, V, N\)"),
        (torch.func.jacrev, torch.float32, "vmap"),
        (torch.func.jacfwd, torch.float32, "forward mode"),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_transforms_that_the_engine_lacks_are_refused(transform, dtype, message):
    with pytest.raises(InputError, match=message):
        transform(gaussian_filter)(*make(8, dtype=dtype))


def test_features_that_change_before_the_backward_pass_are_noticed():
    values, features = make()
    features.requires_grad_()
    result = gaussian_filter(values, features, method="lattice")
    with torch.no_grad():
        features.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_values_may_change_before_the_backward_pass_unless_features_have_a_gradient():
    values, features = make()
    sent = 1.0 * values.requires_grad_()
    result = gaussian_filter(sent, features)
    sent.detach_().zero_()
    (found,) = torch.autograd.grad(result.sum(), values)
    torch.testing.assert_close(found, gaussian_filter(torch.ones_like(values), features).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_default_device_of_pytorch_does_not_matter(dtype):
    values, features = make(dtype=dtype)
    logits = 9 * torch.randn(1, 4, 5, 6, dtype=dtype)
    image = torch.rand(1, 1, 5, 6, dtype=dtype)

    def results():
        refined = mean_field(
            logits, image, bilateral=[(1.0, 2.0, 0.2)], spacing=1.0, label_threshold=0.01
        )
        return gaussian_filter(values, features, method="lattice"), refined

    expected = results()
    with torch.device("meta"):
        found = results()
    torch.testing.assert_close(found, expected)


def test_tensors_take_features_that_are_arrays():
    values, features = make()
    expected = crfrefine.gaussian_filter(values[0], features[0].double())
    backwards = features[0].double().numpy()[::-1][::-1]
    torch.testing.assert_close(
        crfrefine.gaussian_filter(values[0], backwards[::-1]),
        crfrefine.gaussian_filter(values[0], features[0].flip(0).double()),
    )
    torch.testing.assert_close(crfrefine.gaussian_filter(values[0], backwards.tolist()), expected)
    whole_numbers = (4 * features[0]).round()
    found = crfrefine.gaussian_filter(values[0], whole_numbers.long().numpy())
    torch.testing.assert_close(found, crfrefine.gaussian_filter(values[0], whole_numbers.double()))


NANS = torch.full((60,), torch.nan)
PLAIN = "values: expected a plain tensor"
of_one = crfrefine.gaussian_filter


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v, f: gaussian_filter(v[:, :, 1:], f), InputError, "do not fit each other"),
        (
            lambda v, f: gaussian_filter(v[0], f),
            InputError,
            "values: expected floating-point numbers with a batch",
        ),
        (lambda v, f: gaussian_filter(v.long(), f), InputError, "values: expected floating-point"),
        (lambda v, f: gaussian_filter(v, f * float("nan")), InputError, "finite"),
        (lambda v, f: gaussian_filter(v * float("inf"), f), InputError, "finite"),
        (lambda v, f: gaussian_filter(v, f, mask=torch.ones(3)), InputError, "mask has shape"),
        (
            lambda v, f: gaussian_filter(v, f, mask=NANS),
            InputError,
            "mask holds values that are not finite",
        ),
        (lambda v, f: gaussian_filter(v, f, mask="mask.nii"), InputError, "mask is a path"),
        (lambda v, f: gaussian_filter(v * 1e30, f), InputError, r"finite numbers up to 1e\+20"),
        (lambda v, f: gaussian_filter(v.to_sparse(), f), InputError, PLAIN),
        (lambda v, f: gaussian_filter(v.to("meta"), f.to("meta")), InputError, PLAIN),
        (lambda v, f: gaussian_filter(v, f, method="grid"), ConfigError, "method"),
        (lambda v, f: gaussian_filter(v, f * 1e4, method="lattice"), InputError, "for itself"),
        *(
            (
                lambda v, f, t=t: gaussian_filter(v.to(t), f.to(t) * 1e7),
                CapacityError,
                "a million band",
            )
            for t in (torch.float32, torch.float64)
        ),
        (
            lambda v, f: of_one(v[0, 0], f[0]),
            InputError,
            r"values \(60,\) and features \(60, 4\): expected \(V, N\)",
        ),
        (
            lambda v, f: of_one(v[0], [[1.0], [1.0, 2.0]]),
            InputError,
            "features is a list that numpy cannot take",
        ),
        (
            lambda v, f: of_one(v[0], f[0], device="torch:cuda"),
            ConfigError,
            "tensors are filtered on the device",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*make())


def test_gradients_on_a_grid_are_those_of_a_list_of_points():
    shape = (5, 6, 7)
    options = {"method": "lattice", "normalization": "after"}
    values, points = make(5 * 6 * 7, 3)
    features = points.transpose(1, 2).reshape(2, 3, *shape)
    of_grid = filtered(values.reshape(2, 2, *shape), features, **options)
    result, by_values, by_points = filtered(values, points, **options)
    of_points = result, by_values, by_points.transpose(1, 2)
    for found, expected in zip(of_grid, of_points, strict=True):
        torch.testing.assert_close(found.flatten(2), expected, rtol=1e-4, atol=1e-5)
