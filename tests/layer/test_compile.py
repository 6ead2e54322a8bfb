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

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        fixed = {"bilateral.theta_alpha": 2.0, "bilateral.theta_beta": 0.3, "spatial.weight": 0.6, "mean_field.filter": "truncated"}
        self.network = nn.Conv3d(2, 3, 1)
        self.crf = CrfRnn(3, 2, 3, CrfParameters().replace(**fixed))

    def forward(self, image, mask=None, spacing=SPACING):
        return 2.0 * self.crf(torch.tanh(3.0 * self.network(image)), image, spacing, mask)


def compiled(function):
    return torch.compile(function, backend="aot_eager")


def random_tensor(num_channels, seed):
    return torch.rand(2, num_channels, *GRID, generator=torch.Generator().manual_seed(seed))


def test_compiling_gives_the_same_bits():
    """Of the output and of every gradient. The layer is not part of a graph, so its options do not matter."""
    image, mask = random_tensor(2, 5), random_tensor(1, 6) > 0.2
    results = []
    plain = Segmenter()
    module = copy.deepcopy(plain)
    for model, owner in ((plain, plain), (compiled(module), module)):
        given = image.clone().requires_grad_()
        found = model(given, mask)
        (found - found.detach().roll(1)).square().sum().backward()
        results.append([found.detach(), given.grad, *(parameter.grad for parameter in owner.parameters())])
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


@pytest.mark.long
def test_errors_and_warnings_come_out_of_a_graph(monkeypatch):
    monkeypatch.setattr(loss, "_TOLD", set())
    graph = compiled(Segmenter())
    with torch.no_grad():
        graph(random_tensor(2, 5))
    broken = random_tensor(2, 5)
    broken[1, 0, 2, 3, 4] = torch.nan
    with pytest.raises(InputError, match=r"image: modality 0 of batch item 1 has 1 values that are not finite"):
        graph(broken)
    with pytest.raises(InputError, match=r"mask of batch item 0 is empty"):
        graph(random_tensor(2, 5), torch.zeros(GRID, dtype=torch.bool))
    layer = Segmenter().crf

    def step(logits, image):
        given = logits.softmax(1)
        return layer(given, image, SPACING).square().mean() + crf_loss(given, image, SPACING, theta_alpha=2.0, theta_beta=0.3)

    of_probabilities, logits = compiled(step), random_tensor(3, 1).requires_grad_()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            graph(random_tensor(2, 5), None, None)
            found = of_probabilities(logits, random_tensor(2, 5))
    told = [str(warning.message) for warning in seen]
    assert sum(text.startswith("no spacing was given") for text in told) == 1
    assert sum("look like probabilities" in text for text in told) == 2  # the layer's and the loss's
    torch.testing.assert_close(found, step(logits, random_tensor(2, 5)), rtol=0.0, atol=0.0)
