"""What the layer says: to exporters, which it refuses in plain words, and to callers that give no spacing."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles import SPACINGS

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402

import crfrefine  # noqa: E402

GRID = (6, 5, 7)
SPACING = SPACINGS[3]
WHY = (
    "cannot take crfrefine.CrfRnn: the CRF is computed outside of PyTorch, so no graph can contain it; export the network without this "
    "layer and refine its logits afterwards, with the layer or with crfrefine.refine"
)


pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv3d(2, 3, 1)
        self.crf = crfrefine.CrfRnn(3, 2)

    def forward(self, image: Tensor) -> Tensor:
        refined: Tensor = self.crf(self.network(image), image, SPACING)
        return refined


def models() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    torch.manual_seed(3)
    logits, image = (torch.rand(1, channels, *GRID) for channels in (3, 2))
    return {
        "alone": (crfrefine.CrfRnn(3, 2), (logits, image)),
        "in a module": (Segmenter(), (image,)),
        "in a sequence": (nn.Sequential(nn.Conv3d(2, 3, 1), crfrefine.CrfRnn(3, 2)), (image,)),
        "frozen": (Segmenter().eval().requires_grad_(False), (image,)),
    }


EXPORTERS: dict[str, Callable[..., object]] = {
    "torch.jit.script": lambda model, given: torch.jit.script(model),
    "torch.jit.trace": lambda model, given: torch.jit.trace(model, given),
    "torch.export.export": lambda model, given: torch.export.export(model, given),
    "torch.onnx.export": lambda model, given: torch.onnx.export(model, given, io.BytesIO(), dynamo=False),
}


@pytest.mark.parametrize("which", models())
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's, of the older exporters
def test_exporters_are_refused_with_what_to_do_instead(exporter: str, which: str) -> None:
    model, given = models()[which]
    with pytest.raises(crfrefine.ExportError, match=re.escape(f"{exporter} {WHY}")):
        EXPORTERS[exporter](model, given)
    # The attempt leaves a model that works.
    if which != "in a sequence":
        assert copy.deepcopy(model)(*given, *((SPACING,) if which == "alone" else ())).shape == (1, 3, *GRID)


@pytest.mark.parametrize("which", ["alone", "in a module", "in a sequence"])
def test_strict_export_quotes_the_sentence(which: str) -> None:
    """PyTorch puts its own words around what is raised in the code that it analyzes."""
    model, given = models()[which]
    with pytest.raises(RuntimeError, match=re.escape(f"torch.export.export {WHY}")):
        torch.export.export(model, given, strict=True)


def test_exporters_of_today_make_no_difference_to_the_advice() -> None:
    """The newer exporter to ONNX goes by way of torch.export, and quotes the sentence."""
    pytest.importorskip("onnxscript", reason="the newer exporter to ONNX needs onnxscript")
    model, given = models()["in a module"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=re.escape(f"torch.onnx.export {WHY}")):
            torch.onnx.export(model, given, io.BytesIO(), dynamo=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_advice_works(tmp_path: Path) -> None:
    """Export the network alone, refine what it returns."""
    model, (image,) = models()["in a module"]
    exported = torch.jit.trace(model.network, (image,))
    torch.testing.assert_close(model.crf(exported(image), image, SPACING), model(image), rtol=0.0, atol=1e-6)
    torch.save(model.crf.state_dict(), tmp_path / "crf.pt")
    crfrefine.CrfRnn(3, 2).load_state_dict(torch.load(tmp_path / "crf.pt"))


def shout_of(call: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return seen


def test_a_missing_spacing_is_said_once_at_the_caller_s_line() -> None:
    layer, (logits, image) = models()["alone"]
    seen = [warning for _ in range(3) for warning in shout_of(lambda: layer(logits, image))]
    assert [str(warning.message) for warning in seen] == [
        "no spacing was given, so the CRF takes neighboring voxels to be 1 mm apart; pass spacing=... in mm, one number per axis of the "
        "grid (spacing=1.0 if they are)"
    ]
    assert seen[0].category is UserWarning
    assert seen[0].filename == __file__
    torch.testing.assert_close(layer(logits, image), layer(logits, image, 1.0), rtol=0.0, atol=0.0)


def test_each_layer_says_it_and_its_replicas_do_not() -> None:
    _, (logits, image) = models()["alone"]
    for layer in (crfrefine.CrfRnn(3, 2, spatial=True), crfrefine.CrfRnn(3, 2, spatial=True)):
        replicas = [layer._replicate_for_data_parallel() for _ in range(3)]
        for replica in replicas:
            for name, parameter in layer.named_parameters():
                setattr(replica, name, 1.0 * parameter)
        assert sum(len(shout_of(lambda replica=replica: replica(logits, image))) for replica in replicas) == 1
    assert len(shout_of(lambda: crfrefine.CrfRnn(3, 2).build_kernels(image))) == 1


def test_every_function_with_an_optional_spacing_says_that_it_takes_1_mm() -> None:
    layer, (logits, image) = models()["alone"]
    mean_field, build_kernels = crfrefine.layer.functional.mean_field, crfrefine.layer.functional.build_kernels
    for call in (
        lambda **spacing: layer.refine_normalized(logits, image, **spacing),
        lambda **spacing: crfrefine.CrfRnn(3, 2).build_normalized(image, **spacing),
        lambda **spacing: mean_field(logits, image, bilateral=[(1.0, 1.0, 0.1)], **spacing),
        lambda **spacing: mean_field(logits, image, bilateral=[], spatial=(1.0, 1.0), **spacing),
        lambda **spacing: build_kernels(image, bilateral=[(1.0, 0.1)], num_labels=3, **spacing),
        lambda **spacing: crfrefine.refine(logits[0].numpy(), image[0].numpy(), input_type="logits", **spacing),
    ):
        seen = shout_of(call)
        assert [str(warning.message).partition(",")[0] for warning in seen] == ["no spacing was given"]
        assert seen[0].filename == __file__
        assert shout_of(lambda call=call: call(spacing=1.0)) == []


def test_nothing_is_said_where_spacing_does_not_matter() -> None:
    layer, (logits, image) = models()["alone"]
    kernels = layer.build_kernels(image, SPACING)
    voxels = crfrefine.CrfParameters().replace(**{"mean_field.positions": "voxels"})
    arrays = logits[0].numpy(), image[0].numpy()
    mean_field = crfrefine.layer.functional.mean_field
    in_voxels = crfrefine.CrfRnn(3, 2, parameters=crfrefine.CrfParameters().replace(**{"mean_field.positions": "voxels"}))
    for call in (
        lambda: layer(logits, image, SPACING),
        lambda: layer(logits, image, kernels=kernels),
        lambda: in_voxels(logits, image),
        lambda: in_voxels.build_kernels(image),
        lambda: layer.refine_normalized(logits, image, kernels=kernels),
        lambda: mean_field(logits, image, bilateral=[]),
        lambda: mean_field(logits, image, bilateral=[(1.0, 1.0, 0.1)], positions="voxels"),
        lambda: crfrefine.refine(*arrays, input_type="logits", parameters=voxels),
    ):
        assert shout_of(call) == []
    in_ml = voxels.replace(**{"postprocess.min_component_ml": 0.01})
    assert len(shout_of(lambda: crfrefine.refine(*arrays, input_type="logits", parameters=in_ml))) == 1


def probabilities(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of three labels, with padding of zeros beside them, as of a crop."""
    generator = torch.Generator().manual_seed(4)
    found = (2.0 * torch.randn(2, 3, *GRID, generator=generator, dtype=torch.float64)).softmax(1)
    found[..., -1] = 0.0
    return found.to(dtype)


def told_of_probabilities(call: Callable[[], object]) -> list[warnings.WarningMessage]:
    return [warning for warning in shout_of(call) if "look like probabilities" in str(warning.message)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_are_said_once_for_each_layer_at_the_caller_s_line(dtype: torch.dtype) -> None:
    given, image = probabilities(dtype), torch.rand(2, 2, *GRID)
    for _ in range(2):
        layer = crfrefine.CrfRnn(3, 2)
        seen = [warning for _ in range(3) for warning in told_of_probabilities(lambda layer=layer: layer(given, image, SPACING))]
        assert len(seen) == 1
        assert (seen[0].category, seen[0].filename) == (UserWarning, __file__)
        assert str(seen[0].message).endswith("for probabilities, pass probabilities.clamp_min(1e-7).log()")


def test_the_advice_on_probabilities_works() -> None:
    """The logarithm of probabilities and the logits that they came from give the same marginals; 1e-5: some roundings of float32."""
    logits = 2.0 * torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(4))
    image, layer = torch.rand(2, 2, *GRID), crfrefine.CrfRnn(3, 2)
    found = [layer(values, image, SPACING).softmax(1) for values in (logits.softmax(1).clamp_min(1e-7).log(), logits)]
    torch.testing.assert_close(*found, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    "logits",
    [torch.rand(2, 3, *GRID), 3.0 * probabilities() - 1.0, probabilities()[:, :2], torch.full((2, 3, *GRID), -torch.inf)],
    ids=["in [0, 1]", "sums of 1 outside", "sums below 1", "padding alone"],
)
def test_other_logits_are_no_probabilities(logits: Tensor) -> None:
    assert not crfrefine.layer.inputs.look_like_probabilities(logits)


def test_few_voxels_tell_probabilities() -> None:
    """However large the grid; a GPU, which would have to be waited for, is asked once."""
    told: set[str] = set()
    large = probabilities()[:1, :, :1, :1, :1].expand(1, 3, 4000, 3000, 2000)
    assert told_of_probabilities(lambda: crfrefine.layer.inputs.warn_of_probabilities(large, told, warnings.warn))
    elsewhere = torch.empty(1, 3, *GRID, device="meta")
    told.clear()
    with pytest.MonkeyPatch.context() as patch:
        asked: list[Tensor] = []
        patch.setattr(crfrefine.layer.inputs, "look_like_probabilities", lambda logits: bool(asked.append(logits)))
        for _ in range(3):
            crfrefine.layer.inputs.warn_of_probabilities(elsewhere, told, warnings.warn)
    assert len(asked) == 1


def test_a_layer_that_has_warned_is_saved_and_copied_as_before() -> None:
    layer, (logits, image) = models()["alone"]
    assert len(shout_of(lambda: layer(logits, image))) == 1
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    older = copy.deepcopy(layer)
    del older.__dict__["_told"]  # as saved by a version without warnings
    for twin in (loaded, copy.copy(layer), copy.deepcopy(layer)):
        assert shout_of(lambda twin=twin: twin(logits, image)) == []
        assert twin.state_dict().keys() == layer.state_dict().keys()
    assert len(shout_of(lambda: older(logits, image))) == 1


class Tagged(torch.Tensor):
    """A tensor that carries what it was read from, as MONAI's MetaTensor does."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, Tagged):
            result.affine = next((value.affine for value in args if isinstance(value, Tagged) and hasattr(value, "affine")), None)
        return result


def test_subclasses_of_tensors_are_taken() -> None:
    layer, (logits, image) = models()["alone"]
    tagged = [tensor.clone().as_subclass(Tagged) for tensor in (logits, image)]
    for tensor in tagged:
        tensor.affine = torch.diag(torch.tensor([*SPACING, 1.0]))
    logits.requires_grad_()
    tagged[0].requires_grad_()
    expected, found = layer(logits, image, SPACING), layer(*tagged, SPACING)
    torch.testing.assert_close(torch.Tensor(found), expected, rtol=0.0, atol=0.0)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(torch.Tensor(tagged[0].grad), logits.grad, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_layer_keeps_an_output_temperature_that_it_does_not_use(tmp_path: Path, temperature: float) -> None:
    """Its logits are those before that temperature, so that a loss is not scaled; the file that `infer` reads has it."""
    torch.manual_seed(5)
    logits, image = (torch.rand(1, channels, *GRID) for channels in (3, 2))
    usual = crfrefine.CrfParameters().replace(**{"mean_field.filter": "exact"})
    warm = usual.replace(**{"mean_field.output_temperature": temperature})
    layer, plain = crfrefine.CrfRnn(3, 2, parameters=warm), crfrefine.CrfRnn(3, 2, parameters=usual)
    assert layer.output_temperature == temperature
    assert torch.equal(layer(logits, image, SPACING), plain(logits, image, SPACING))
    layer.to_parameters().save(tmp_path / "params.toml")
    assert crfrefine.CrfParameters.load(tmp_path / "params.toml").mean_field.output_temperature == temperature
