"""The bias of each label in the trainable layer."""

import numpy as np
import pytest
import torch
from oracles import random_case

import crfrefine
from crfrefine.errors import ConfigError, InputError
from crfrefine.layer.functional import mean_field
from crfrefine.layer.module import CrfRnn
from crfrefine.parameters.model import CrfParameters

BIAS = (0.5, -1.25, 0.75)


def layer(bias=BIAS, **options):
    parameters = CrfParameters().replace(**{"mean_field.bias": bias, "mean_field.temperature": 1.6, "mean_field.filter": "truncated"})
    return CrfRnn(3, 2, 3, parameters, **options)


def inputs():
    case = random_case(3, 2, 3, masked=True)
    return torch.tensor(case.logits)[None], torch.tensor(case.image)[None], {"spacing": case.spacing, "mask": torch.tensor(case.mask)}


def test_the_layer_computes_what_infer_does_with_its_parameters():
    """Also after a step of training, and outside the mask, where there is no bias. Lists of equal numbers are written as one number."""
    crf = layer()
    logits, image, options = inputs()
    torch.nn.functional.cross_entropy(crf(logits, image, **options), logits.argmin(1)).backward()
    assert crf.raw_bias.grad is not None
    assert crf.raw_bias.grad.abs().min() > 0
    torch.optim.SGD(crf.parameters(), lr=0.1).step()
    with torch.no_grad():
        found = crf(logits, image, **options)[0].numpy()
    written = CrfParameters.from_toml(crf.to_parameters().to_toml())
    assert isinstance(written.mean_field.bias, tuple)
    assert written.mean_field.bias != BIAS
    case = {"spacing": options["spacing"], "mask": options["mask"].numpy()}
    expected = crfrefine.refine(logits[0].numpy(), image[0].numpy(), parameters=written, input_type="logits", **case)
    np.testing.assert_allclose(found, expected.logits, atol=2e-5)
    for one in (2.0, 0.0):
        assert layer(one).to_parameters().mean_field.bias == one


def test_checkpoints_of_layers_without_a_bias_load():
    """As those of a layer whose bias is 0, also as a part of another module; nothing else may be missing."""
    old = {f"0.{name}": value for name, value in layer(0.0).state_dict().items() if name != "raw_bias"}
    whole = torch.nn.Sequential(layer())
    whole.load_state_dict(old)
    assert not whole[0].raw_bias.any()
    del old["0.log_temperature"]
    with pytest.raises(RuntimeError, match="log_temperature"):
        whole.load_state_dict(old)


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"mean_field\.bias: it has 2 values, but the case has 3 labels"):
        layer((0.5, 1.0))
    logits, image, options = inputs()
    for bias, message in (([1.0, 2.0], "bias has shape"), ([1.0, 2.0, float("nan")], "bias holds values that are not finite")):
        with pytest.raises(InputError, match=message):
            mean_field(logits, image, bilateral=[(1.0, 1.5, 0.1)], bias=bias, **options)
