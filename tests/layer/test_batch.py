"""The items of a batch, side by side with the same bits, and the filter that "auto" chooses."""

import threading

import pytest
import torch

import crfrefine
from crfrefine import CrfParameters, CrfRnn
from crfrefine.engines.cpu import CpuKernels
from crfrefine.layer.functional import build_kernels, mean_field
from crfrefine.parameters.sections import MeanFieldParameters

GRID_SHAPE = (9, 7, 5)
SPACING = (1.0, 1.5, 2.0)
NUM_LABELS = 3
NUM_ITEMS = 3
SECONDS = 20  # after which a barrier gives up


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(NUM_ITEMS, NUM_LABELS, *GRID_SHAPE, generator=generator)
    image = torch.randn(NUM_ITEMS, 2, *GRID_SHAPE, generator=generator)
    return logits, image


def refine(logits, image, **options):
    """The refined logits, and what is learned: weights, theta_alpha, theta_beta, theta_gamma."""
    learned = [
        torch.tensor([3.0, 2.0, 1.0], requires_grad=True),
        torch.tensor(2.5, requires_grad=True),
        torch.tensor([0.5, 0.8], requires_grad=True),
        torch.tensor(1.5, requires_grad=True),
    ]
    weights, alpha, beta, gamma = learned
    refined = mean_field(
        logits,
        image,
        bilateral=[(weights, alpha, beta)],
        spatial=(1.0, gamma),
        spacing=SPACING,
        **options,
    )
    return refined, learned


def gradients(refined, tensors):
    return torch.autograd.grad((refined**2).sum(), tensors)


@pytest.mark.parametrize("label_threshold", [0.0, 0.01])
def test_a_batch_has_the_bits_of_its_items(batch, label_threshold):
    """With the threshold, a label takes no part in the first item."""
    batch[0][0, 2] -= 20.0
    logits, image = (values.requires_grad_() for values in batch)
    refined, learned = refine(logits, image, threads=4, label_threshold=label_threshold)
    by_logits, by_image, *by_learned = gradients(refined, [logits, image, *learned])
    of_items = []
    for item in range(NUM_ITEMS):
        own = [values[item : item + 1].detach().requires_grad_() for values in (logits, image)]
        alone, learned = refine(*own, threads=1, label_threshold=label_threshold)
        assert torch.equal(refined[item : item + 1], alone)
        own_logits, own_image, *own_learned = gradients(alone, [*own, *learned])
        assert torch.equal(by_logits[item : item + 1], own_logits)
        assert torch.equal(by_image[item : item + 1], own_image)
        of_items.append(own_learned)
    for place, gradient in enumerate(by_learned):
        # The order of the sum over items may differ: rounding of three float32 numbers.
        expected = sum(item[place].double() for item in of_items)
        scale = sum(item[place].double().abs() for item in of_items)
        assert bool(((gradient - expected).abs() <= 4e-7 * scale).all())


def test_items_run_side_by_side_forward_and_backward(batch, monkeypatch):
    for name in ("forward", "backward"):
        barrier = threading.Barrier(NUM_ITEMS)
        method = getattr(CpuKernels, name)

        def meet(self, *arguments, _barrier=barrier, _method=method, **options):
            _barrier.wait(SECONDS)
            return _method(self, *arguments, **options)

        monkeypatch.setattr(CpuKernels, name, meet)
    refined, learned = refine(*batch, threads=NUM_ITEMS)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(refined, learned))


@pytest.mark.parametrize(("threads", "share"), [(7, 2), (2, 1), (3, 1)])
def test_items_share_the_threads(batch, monkeypatch, threads, share):
    shares = []
    build = CpuKernels.__init__

    def note(self, image, spec, context):
        shares.append(context.threads)
        build(self, image, spec, context)

    monkeypatch.setattr(CpuKernels, "__init__", note)
    refine(*batch, threads=threads)
    assert shares == [share] * NUM_ITEMS


def test_kernels_that_serve_several_items_run_one_at_a_time(batch, monkeypatch):
    logits, image = batch
    image = image[:1].expand(NUM_ITEMS, -1, -1, -1, -1)
    (kernels,) = build_kernels(
        image[:1],
        [("bilateral", (1.0, 2.5, (0.5, 0.8))), ("spatial", (1.0, 1.5))],
        spacing=SPACING,
        mask=None,
        num_labels=NUM_LABELS,
        settings=MeanFieldParameters(),
    )
    expected, _ = refine(logits, image)
    running = threading.Lock()
    forward = CpuKernels.forward

    def alone(self, *arguments):
        assert running.acquire(blocking=False)
        try:
            return forward(self, *arguments)
        finally:
            running.release()

    monkeypatch.setattr(CpuKernels, "forward", alone)
    refined, _ = refine(logits, image, kernels=[kernels] * NUM_ITEMS)
    assert torch.equal(refined, expected)


def filter_of(image, alpha, **options):
    (kernels,) = build_kernels(
        image,
        [("bilateral", (1.0, alpha, 0.1))],
        spacing=(1.0, 1.0, 1.2),
        mask=None,
        num_labels=NUM_LABELS,
        settings=MeanFieldParameters(**options),
    )
    return kernels.filters[0].split(": ")[1].split(" ")[0]


def test_auto_takes_the_same_filter_with_gradients_and_without():
    """On 60,000 voxels, where the lattice is faster with gradients and the grid is not without.

    The marginals are those of `refine` with the layer's parameters, to rounding.
    """
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(1, 1, 34, 52, 34, generator=generator)
    image = torch.nn.functional.avg_pool3d(image, 5, 1, 2) * 5.0
    spacing = (1.0, 1.0, 1.2)
    moving = torch.tensor(4.0, requires_grad=True)
    assert filter_of(image, moving) == filter_of(image, moving.detach()) == "grid"
    assert filter_of(image.clone().requires_grad_(), moving) == "grid"

    parameters = CrfParameters().replace(
        **{
            "intensity.normalization": "none",
            "bilateral.theta_alpha": 4.0,
            "bilateral.theta_beta": 0.1,
            "bilateral.weight": 4.0,
        }
    )
    layer = CrfRnn(NUM_LABELS, 1, 3, parameters)
    logits = torch.randn(1, NUM_LABELS, *image.shape[2:], generator=generator)
    trained = layer(logits, image.clone().requires_grad_(), spacing)
    assert trained.requires_grad
    layer.eval()
    with torch.no_grad():
        evaluated = layer(logits, image, spacing)
    assert torch.equal(trained, evaluated)
    result = crfrefine.refine(
        logits[0].numpy(), image[0].numpy(), spacing=spacing, parameters=layer.to_parameters()
    )
    torch.testing.assert_close(
        torch.from_numpy(result.marginals), evaluated[0].softmax(0), rtol=0, atol=1e-5
    )


def test_auto_sums_over_all_pairs_of_few_voxels(batch):
    _, image = batch
    assert filter_of(image[:1, :1], torch.tensor(4.0, requires_grad=True)) == "exact"
