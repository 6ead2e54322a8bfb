"""`torch.compile` of networks that end in the layer or the loss: the same bits as without."""

import copy
import warnings

import pytest
from oracles import SPACINGS

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from crfrefine import CrfParameters, CrfRnn, crf_loss  # noqa: E402
from crfrefine.errors import InputError  # noqa: E402
from crfrefine.layer import loss  # noqa: E402

GRID = (6, 5, 7)
SPACING = SPACINGS[3]

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "nothing_compiled_before"),
    # The compiler's own code reads `.grad` of tensors that are not leaves, and warns of it and of what it will change.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def nothing_compiled_before():
    torch._dynamo.reset()


class Segmenter(nn.Module):
    """A network of one convolution before the layer, and some arithmetic after it."""

    def __init__(self, changes, **options):
        super().__init__()
        torch.manual_seed(3)
        fixed = {"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.3, "spatial.weight": 0.6, "mean_field.filter": "truncated"}
        self.network = nn.Conv3d(2, 3, 1)
        self.crf = CrfRnn(3, 2, 3, CrfParameters().replace(**(fixed | changes)), **options)

    def forward(self, image, mask=None, spacing=SPACING):
        return 2.0 * self.crf(torch.tanh(3.0 * self.network(image)), image, spacing, mask)


def compiled(function):
    return torch.compile(function, backend="aot_eager")


def random_logits():
    return torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(1))


def random_images(dtype=torch.float32):
    return torch.rand(2, 2, *GRID, generator=torch.Generator().manual_seed(5), dtype=dtype)


def masks(*shape):
    return torch.rand(*shape, *GRID, generator=torch.Generator().manual_seed(6)) > 0.2


def results(model, module, image, *arguments):
    """What a model says, and every gradient of a loss on it."""
    given = image.detach().clone().requires_grad_(image.requires_grad)
    found = model(given, *arguments)
    (found - found.detach().roll(1)).square().sum().backward()
    grads = [given, *module.parameters()]
    return [found.detach(), *(tensor.grad for tensor in grads if tensor.grad is not None)]


# Changes of the parameters, options of the layer, and what it is given.
CASES = {
    "plain, a mask each": ({}, {}, lambda: (random_images(), masks(2, 1))),
    "lattice in float64, spacings each": (
        {"mean_field.filter": "lattice"},
        {},
        lambda: (random_images(torch.float64), masks(), torch.tensor([SPACING, SPACING[::-1]])),
    ),
    "volume, potts, bias, gradient of the image": (
        {"volume.weight": 0.4, "mean_field.bias": [0.3, -0.2, 0.0], "mean_field.temperature": 1.7, "intensity.normalization": "zscore"},
        {"compatibility": "potts", "per_label_weights": True, "learn": ["weights", "volume"]},
        lambda: (random_images().requires_grad_(), masks(2), 1.25),
    ),
}


@pytest.mark.parametrize("which", [next(iter(CASES)), *(pytest.param(which, marks=pytest.mark.long) for which in list(CASES)[1:])])
def test_compiling_gives_the_same_bits(which):
    changes, options, given = CASES[which]
    image, *rest = given()
    plain = Segmenter(changes, **options).to(image.dtype)
    module = copy.deepcopy(plain)
    expected = results(plain, plain, image, *rest)
    found = results(compiled(module), module, image, *rest)
    assert len(found) == len(expected) > 2
    assert expected[0].dtype == image.dtype
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@pytest.mark.long
def test_errors_and_warnings_come_out_of_a_graph(monkeypatch):
    monkeypatch.setattr(loss, "_TOLD", set())
    graph = compiled(Segmenter({}))
    with torch.no_grad():
        graph(random_images())
    broken = random_images()
    broken[1, 0, 2, 3, 4] = torch.nan
    with pytest.raises(InputError, match=r"image: modality 0 of batch item 1 has 1 values that are not finite"):
        graph(broken)
    with pytest.raises(InputError, match=r"mask of batch item 0 is empty"):
        graph(random_images(), torch.zeros(GRID, dtype=torch.bool))
    layer = Segmenter({}).crf

    def step(logits, image):
        given = logits.softmax(1)
        return layer(given, image, SPACING).square().mean() + crf_loss(given, image, SPACING, theta_alpha=2.0, theta_beta=0.3)

    of_probabilities, logits = compiled(step), random_logits().requires_grad_()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            graph(random_images(), None, None)
            found = of_probabilities(logits, random_images())
    told = [str(warning.message) for warning in seen]
    assert sum(text.startswith("no spacing was given") for text in told) == 1
    assert sum("look like probabilities" in text for text in told) == 2  # the layer's and the loss's
    torch.testing.assert_close(found, step(logits, random_images()), rtol=0.0, atol=0.0)
