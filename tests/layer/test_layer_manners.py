"""What the layer says: to exporters, which it refuses in plain words, and to callers that give no spacing."""

import copy
import io
import re
import warnings

import pytest
import torch
from oracles import SPACINGS
from torch import nn

import crfrefine
from crfrefine.layer.functional import build_kernels, mean_field

GRID = (6, 5, 7)
SPACING = SPACINGS[3]
WHY = (
    "cannot take crfrefine.CrfRnn: the CRF is computed outside of PyTorch, so no graph can contain it; export the network without this "
    "layer and refine its logits afterwards, with the layer or with crfrefine.refine"
)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = nn.Conv3d(2, 3, 1)
        self.crf = crfrefine.CrfRnn(3, 2)

    def forward(self, image):
        return self.crf(self.network(image), image, SPACING)


@pytest.fixture
def given():
    torch.manual_seed(3)
    return torch.rand(1, 3, *GRID), torch.rand(1, 2, *GRID)


EXPORTERS = {
    "torch.jit.script": lambda model, given: torch.jit.script(model),
    "torch.jit.trace": lambda model, given: torch.jit.trace(model, given),
    "torch.export.export": lambda model, given: torch.export.export(model, given),
    "torch.onnx.export": lambda model, given: torch.onnx.export(model, given, io.BytesIO(), dynamo=False),
}


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of the older exporters
def test_exporters_are_refused_with_what_to_do_instead(exporter, given):
    logits, image = given
    sequence = nn.Sequential(nn.Conv3d(2, 3, 1), crfrefine.CrfRnn(3, 2))
    for model, tensors in (
        (crfrefine.CrfRnn(3, 2), (logits, image, SPACING)),
        (Segmenter().eval().requires_grad_(False), (image,)),
        (sequence, (image,)),
    ):
        with pytest.raises(crfrefine.ExportError, match=re.escape(f"{exporter} {WHY}")):
            EXPORTERS[exporter](model, tensors[:2])
        if model is not sequence:  # the attempt leaves a model that works
            assert copy.deepcopy(model)(*tensors).shape == (1, 3, *GRID)


def shout_of(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return seen


def test_a_missing_spacing_is_said_once_by_each_layer_at_the_caller_s_line(given):
    """Not by its replicas and copies, and not again after it was saved."""
    logits, image = given
    for _ in range(2):
        layer = crfrefine.CrfRnn(3, 2, spatial=True)
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():  # as DataParallel does
            setattr(replica, name, None if parameter is None else 1.0 * parameter)
        seen = [warning for one in (layer, replica, layer) for warning in shout_of(lambda one=one: one(logits, image))]
        assert [str(warning.message) for warning in seen] == [
            "no spacing was given, so the CRF takes neighboring voxels to be 1 mm apart; pass spacing=... in mm, one number per axis of "
            "the grid (spacing=1.0 if they are)"
        ]
        assert (seen[0].category, seen[0].filename) == (UserWarning, __file__)
    torch.testing.assert_close(layer(logits, image), layer(logits, image, 1.0), rtol=0.0, atol=0.0)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for twin, times in ((torch.load(stream, weights_only=False), 0), (copy.deepcopy(layer), 0)):
        assert len(shout_of(lambda twin=twin: twin(logits, image))) == times
        assert twin.to_parameters() == layer.to_parameters()
        torch.testing.assert_close(twin(logits, image, SPACING), layer(logits, image, SPACING), rtol=0.0, atol=0.0)


def test_every_function_takes_1_mm_with_a_warning_and_is_silent_where_spacing_does_not_matter(given):
    logits, image = given
    layer = crfrefine.CrfRnn(3, 2)
    arrays = logits[0].numpy(), image[0].numpy()
    for call in (
        lambda **spacing: layer.refine_normalized(logits, image, **spacing),
        lambda **spacing: crfrefine.CrfRnn(3, 2).build_kernels(image, **spacing),
        lambda **spacing: mean_field(logits, image, bilateral=[(1.0, 1.0, 0.1)], **spacing),
        lambda **spacing: build_kernels(image, bilateral=[(1.0, 0.1)], num_labels=3, **spacing),
        lambda **spacing: crfrefine.refine(*arrays, input_type="logits", **spacing),
    ):
        seen = shout_of(call)
        assert [str(warning.message).partition(",")[0] for warning in seen] == ["no spacing was given"]
        assert seen[0].filename == __file__
        assert shout_of(lambda call=call: call(spacing=1.0)) == []
    kernels = layer.build_kernels(image, SPACING)
    voxels = crfrefine.CrfParameters().replace(**{"mean_field.positions": "voxels"})
    for call in (
        lambda: crfrefine.CrfRnn(3, 2)(logits, image, kernels=kernels),
        lambda: crfrefine.CrfRnn(3, 2, parameters=voxels)(logits, image),
        lambda: mean_field(logits, image, bilateral=[]),
        lambda: crfrefine.refine(*arrays, input_type="logits", parameters=voxels),
    ):
        assert shout_of(call) == []
    in_ml = voxels.replace(**{"postprocess.min_component_ml": 0.01})
    assert len(shout_of(lambda: crfrefine.refine(*arrays, input_type="logits", parameters=in_ml))) == 1


def probabilities(dtype=torch.float32):
    """Of three labels, with padding of zeros beside them, as of a crop."""
    generator = torch.Generator().manual_seed(4)
    found = (2.0 * torch.randn(2, 3, *GRID, generator=generator, dtype=torch.float64)).softmax(1)
    found[..., -1] = 0.0
    return found.to(dtype)


def test_probabilities_are_said_once_for_each_layer_at_the_caller_s_line():
    image = torch.rand(2, 2, *GRID)
    for dtype in (torch.float64, torch.bfloat16):
        layer, given = crfrefine.CrfRnn(3, 2), probabilities(dtype)
        seen = [warning for _ in range(3) for warning in shout_of(lambda layer=layer, given=given: layer(given, image, SPACING))]
        (told,) = (warning for warning in seen if "look like probabilities" in str(warning.message))
        assert (told.category, told.filename) == (UserWarning, __file__)
        assert str(told.message).endswith("for probabilities, pass probabilities.clamp_min(1e-7).log()")


def test_the_layer_keeps_an_output_temperature_that_it_does_not_use(given):
    """Its logits are those before that temperature, so that a loss is not scaled; the file that `infer` reads has it."""
    warm = crfrefine.CrfParameters().replace(**{"mean_field.output_temperature": 2.5})
    layer, plain = crfrefine.CrfRnn(3, 2, parameters=warm), crfrefine.CrfRnn(3, 2)
    assert layer.output_temperature == layer.to_parameters().mean_field.output_temperature == 2.5
    assert torch.equal(layer(*given, SPACING), plain(*given, SPACING))
