"""Adam, beside that of PyTorch."""

import pytest

torch = pytest.importorskip("torch")

from crfrefine.train.adam import Adam  # noqa: E402


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_steps_are_those_of_pytorch_bit_for_bit(betas):
    generator = torch.Generator().manual_seed(3)
    starts = [torch.randn(3, generator=generator), torch.randn((), generator=generator)]
    own, expected = ([start.clone().requires_grad_() for start in starts] for _ in range(2))
    adam = Adam([own[:1], own[1:]], betas)
    reference = torch.optim.Adam([{"params": [value]} for value in expected], betas=betas)
    for number in range(30):
        lengths = [0.1 / (number + 1), 0.02]
        for value, other in zip(own, expected, strict=True):
            other.grad = torch.randn(value.shape, generator=generator) * 10.0 ** (number % 5 - 3)
            value.grad = other.grad.clone()
        for group, length in zip(reference.param_groups, lengths, strict=True):
            group["lr"] = length
        adam.step(lengths)
        reference.step()
        for value, other in zip(own, expected, strict=True):
            assert torch.equal(value, other)


def test_a_parameter_without_a_gradient_stays():
    value = torch.tensor([1.0, -2.0], requires_grad=True)
    Adam([[value]]).step([0.5])
    assert value.tolist() == [1.0, -2.0]
