"""What the layer says to exporters, which it refuses in plain words, and to callers that leave
values out; `torch.compile` of it.
"""

import copy
import io
import re
import warnings

import pytest
import torch
from oracles import SPACINGS
from torch import nn
from torch.utils.data import default_collate

from crfrefine import CrfParameters, CrfRnn
from crfrefine.errors import ExportError, InputError

GRID = (6, 5, 7)
SPACING = SPACINGS[3]
pytestmark = pytest.mark.usefixtures("one_torch_thread")

WHY = (
    "cannot take the CRF .* no graph can contain it; export the network without it, and refine the "
    "network's logits afterwards"
)


class Segmenter(nn.Module):
    """A network of one convolution before the layer, and some arithmetic after it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.network = nn.Conv3d(2, 3, 1)
        self.crf = CrfRnn(3, 2)

    def forward(self, image, mask=None, spacing=SPACING):
        return 2.0 * self.crf(torch.tanh(3.0 * self.network(image)), image, spacing, mask)


@pytest.fixture
def given():
    torch.manual_seed(3)
    return torch.rand(1, 3, *GRID), torch.rand(1, 2, *GRID)


EXPORTERS = {
    "torch.jit.script": lambda model, given: torch.jit.script(model),
    "torch.jit.trace": lambda model, given: torch.jit.trace(model, given),
    "torch.export.export": lambda model, given: torch.export.export(model, given),
    "torch.onnx.export": lambda model, given: torch.onnx.export(
        model, given, io.BytesIO(), dynamo=False
    ),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of the older exporters
def test_exporters_are_refused_with_what_to_do_instead(exporter, given):
    """The attempt leaves a model that works."""
    logits, image = given
    network = Segmenter().eval().requires_grad_(False)
    for model, tensors in ((CrfRnn(3, 2), (logits, image, SPACING)), (network, (image,))):
        with pytest.raises(ExportError, match=f"{re.escape(exporter)} {WHY}"):
            EXPORTERS[exporter](model, tensors[:2])
        assert copy.deepcopy(model)(*tensors).shape == (1, 3, *GRID)
    with pytest.raises(ExportError, match=f"{re.escape(exporter)} {WHY}"):
        EXPORTERS[exporter](nn.Sequential(nn.Conv3d(2, 3, 1), CrfRnn(3, 2)), (image,))


def shout_of(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return seen


def test_a_missing_spacing_is_said_once_by_each_layer_at_the_caller_s_line(given):
    """Not by its replicas and copies, and not again after it was saved."""
    logits, image = given
    for _ in range(2):
        layer = CrfRnn(3, 2, spatial=True)
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():  # as DataParallel does
            setattr(replica, name, None if parameter is None else 1.0 * parameter)
        seen = [
            warning
            for one in (layer, replica, layer)
            for warning in shout_of(lambda one=one: one(logits, image))
        ]
        message = "no spacing was given, so the CRF takes neighboring voxels to be 1 mm apart"
        assert [str(warning.message).partition(";")[0] for warning in seen] == [message]
        assert (seen[0].category, seen[0].filename) == (UserWarning, __file__)
    torch.testing.assert_close(layer(logits, image), layer(logits, image, 1.0), rtol=0.0, atol=0.0)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin in (torch.load(stream, weights_only=False), copy.deepcopy(layer)):
        assert not shout_of(lambda twin=twin: twin(logits, image))
        assert twin.to_parameters() == layer.to_parameters()
        torch.testing.assert_close(
            twin(logits, image, SPACING), layer(logits, image, SPACING), rtol=0.0, atol=0.0
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_probabilities_are_said_once_for_each_layer_at_the_caller_s_line(dtype):
    """Of three labels, with padding of zeros beside them, as of a crop."""
    probabilities = (
        2.0
        * torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    ).softmax(1)
    probabilities[..., -1] = 0.0
    layer = CrfRnn(3, 2)
    given = probabilities.to(dtype)
    image = torch.rand(2, 2, *GRID)
    seen = [warning for _ in range(3) for warning in shout_of(lambda: layer(given, image, SPACING))]
    (told,) = (warning for warning in seen if "look like probabilities" in str(warning.message))
    assert (told.category, told.filename) == (UserWarning, __file__)
    assert str(told.message).endswith("for probabilities, pass probabilities.clamp_min(1e-7).log()")


def test_the_layer_keeps_an_output_temperature_that_it_does_not_use(given):
    """Its logits are those before that temperature, so that a loss is not scaled; the file that
    `infer` reads has it.
    """
    warm = CrfParameters().replace(**{"mean_field.output_temperature": 2.5})
    layer = CrfRnn(3, 2, parameters=warm)
    plain = CrfRnn(3, 2)
    assert layer.output_temperature == layer.to_parameters().mean_field.output_temperature == 2.5
    assert torch.equal(layer(*given, SPACING), plain(*given, SPACING))


def test_the_default_device_of_pytorch_does_not_matter(given):
    """The layer is made on it, and works where its parameters and tensors are."""
    layer = CrfRnn(3, 2)
    expected = layer(*given, SPACING)
    with torch.device("meta"):
        made = CrfRnn(3, 2)
        assert torch.equal(layer(*given, SPACING), expected)
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}
    made.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(made(*given, SPACING), expected)


# The compiler's own code reads `.grad` of tensors that are not leaves.
@pytest.mark.filterwarnings("default")
def test_compiling_gives_the_same_bits(given):
    """Of the output and of every gradient.

    The layer is not part of a graph, so its options do not matter.
    """
    image = given[1]
    mask = given[0][:, :1] > 0.2
    results = []
    owner = Segmenter()
    torch._dynamo.reset()
    for model in (owner, torch.compile(owner, backend="aot_eager")):
        leaves = [image.clone().requires_grad_(), *owner.parameters()]
        found = model(leaves[0], mask)
        loss = (found - found.detach().roll(1)).square().sum()
        results.append([found.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("filter_name", ["grid", "lattice", "truncated"])
def test_a_call_follows_its_tensors_and_kernels_are_of_what_they_were_built_of(filter_name, given):
    """Whatever changes in place, by PyTorch, by a view or by the array that shares the memory."""
    changes = {
        "intensity.normalization": "none",
        "bilateral.theta_beta": 0.3,
        "mean_field.filter": filter_name,
    }
    logits, image = given[0], given[1][:, :1].contiguous()
    layer = CrfRnn(3, 1, 3, CrfParameters().replace(**changes))
    spacing = torch.tensor(SPACING)
    mask = torch.ones(GRID, dtype=torch.bool)
    mask[:2] = False
    arguments = (logits, image, spacing, mask)
    layer(*arguments)
    kernels = layer.build_kernels(image, spacing, mask)
    expected = layer(logits, image, kernels=kernels)

    image.numpy()[..., ::2] *= 40
    image[:, :, 1:3].neg_()
    mask.logical_not_()
    spacing.numpy()[:] *= 2
    assert torch.equal(layer(logits, image, kernels=kernels), expected)
    logits.numpy()[:, 1] -= 3
    fresh = [argument.clone() for argument in arguments]
    assert torch.equal(layer(*arguments), layer(*fresh))
    assert not torch.allclose(layer(*arguments), expected, atol=0.1)


def test_transforms_of_torch_func_are_refused_in_plain_words(given):
    layer = CrfRnn(3, 2)
    logits, image = given
    for number in range(2):

        def total(value, number=number):
            pair = [logits, image]
            pair[number] = value
            return layer(*pair, SPACING).sum()

        name = ("logits", "image")[number]
        for transform in (torch.func.grad, torch.func.vmap):
            value = (logits, image)[number]
            if transform is torch.func.vmap:
                value = value[None]
            with pytest.raises(
                InputError, match=f"{name}: the layer does not work with torch.func"
            ):
                transform(total)(value)


def test_the_spacings_of_a_batch_are_a_row_per_item(given):
    """A DataLoader collates three items' spacings to a tensor per axis. Taken for one per item,
    each item would have another's.
    """
    layer = CrfRnn(3, 2)
    logits, image = (torch.cat([values] * 3) for values in given)
    spacings = [(1.0, 2.0, 6.0), (2.0, 1.0, 1.5), (1.0, 1.0, 3.0)]
    collated = default_collate(spacings)
    with pytest.raises(InputError, match=r"spacing: .*torch\.stack\(spacing, 1\)"):
        layer(logits, image, collated)
    found = layer(logits, image, torch.stack(collated, 1))
    for item, spacing in zip(found, spacings, strict=True):
        assert torch.equal(item, layer(*given, spacing)[0])


def test_tensors_that_are_negative_by_a_bit_alone_are_read_as_they_are(given):
    layer = CrfRnn(3, 2)
    expected = layer(*given, SPACING)
    negative = [torch.complex(values, -values).conj().imag for values in given]
    assert all(values.is_neg() for values in negative)
    assert torch.equal(layer(*negative, SPACING), expected)
