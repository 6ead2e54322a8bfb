"""The items of a batch, side by side with the same bits, and what "auto" chooses for training."""

import threading

import pytest
import torch

from crfrefine.engines.cpu import CpuKernels
from crfrefine.layer.functional import build_kernels, mean_field

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

    def note(self, engine, image, spec, context):
        shares.append(context.threads)
        build(self, engine, image, spec, context)

    monkeypatch.setattr(CpuKernels, "__init__", note)
    refine(*batch, threads=threads)
    assert shares == [share] * NUM_ITEMS


def test_kernels_that_serve_several_items_run_one_at_a_time(batch, monkeypatch):
    logits, image = batch
    image = image[:1].expand(NUM_ITEMS, -1, -1, -1, -1)
    (kernels,) = build_kernels(
        image[:1],
        bilateral=[(2.5, (0.5, 0.8))],
        theta_gamma=1.5,
        spacing=SPACING,
        num_labels=NUM_LABELS,
        filter="lattice",  # "auto" would choose with the gradients in view.
    )
    expected, _ = refine(logits, image, filter="lattice")
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
        bilateral=[(alpha, 0.1)],
        spacing=(1.0, 1.0, 1.2),
        num_labels=NUM_LABELS,
        **options,
    )
    return kernels.filters[0].split(": ")[1].split(" ")[0]


def test_auto_counts_the_backward_pass_where_bandwidths_or_the_image_move():
    """On 60,000 voxels the grid takes as long as the lattice forward, and twice as long with the
    gradients.
    """
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(1, 1, 34, 52, 34, generator=generator)
    image = torch.nn.functional.avg_pool3d(image, 5, 1, 2) * 5.0
    fixed = torch.tensor(4.0)
    moving = torch.tensor(4.0, requires_grad=True)
    assert filter_of(image, fixed) == "grid"
    assert filter_of(image, moving) == "lattice"
    assert filter_of(image.clone().requires_grad_(), fixed) == "lattice"
    with torch.no_grad():
        assert filter_of(image, moving) == "grid"


def test_auto_sums_over_all_pairs_of_few_voxels_also_where_bandwidths_move(batch):
    _, image = batch
    assert filter_of(image[:1, :1], torch.tensor(4.0, requires_grad=True)) == "exact"
