"""What surrounds a call of an operator: autocast, default dtype and device, views that PyTorch resolves when read."""

import pytest
import torch
from conftest import interpreted
from table import over

from mixfeat.operators import same_bits


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@over("main")
def test_autocast(problem, half):
    """What is cast to half precision gives the results of half precision, and gradients in the arguments' dtypes."""
    if interpreted(problem.backend) and half == torch.float16:
        pytest.skip("long in the interpreter")
    operator, draw = problem.operator, problem.draw()
    names = operator.differentiated
    rounded = {name: draw.arguments[name].to(half) for name in names}

    def under_autocast(**arguments):
        with torch.autocast(problem.device, half):
            return operator.function(**arguments)

    expected = problem.results(draw.arguments | rounded if operator.autocasts else draw.arguments, draw.upstream)
    found = operator.results(under_autocast, draw.arguments, draw.upstream)
    assert found["value"].dtype == expected["value"].dtype
    assert torch.equal(found["value"], expected["value"])
    for name in names:
        grad = found[f"{name} grad"]
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected[f"{name} grad"].float())
    if operator.autocasts:  # dtypes may differ
        assert torch.equal(under_autocast(**draw.arguments | {names[0]: rounded[names[0]]}), expected["value"])
    in_half = draw.arguments | rounded
    assert torch.equal(under_autocast(**in_half), operator.function(**in_half))


@over("main", ["float64"], ["cpu", "reference"])
def test_autocast_leaves_float64_alone(problem):
    draw = problem.draw()
    expected = problem.results(draw.arguments, draw.upstream)
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(problem.results(draw.arguments, draw.upstream), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@over("main variants", interpreted="main")
def test_default_dtype(problem, dtype):
    """It has no say in operators whose arguments have one."""
    if interpreted(problem.backend) and dtype == torch.float16:
        pytest.skip("long in the interpreter")
    draw = problem.draw()
    expected = problem.results(draw.arguments, draw.upstream)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = problem.results(draw.arguments, draw.upstream)
    finally:
        torch.set_default_dtype(before)
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in expected.items()}
    torch.testing.assert_close(found, expected)


@over("main variants", interpreted="main")
def test_default_device(problem):
    """It has no say in operators whose arguments are on one."""
    draw = problem.draw()
    expected = problem.results(draw.arguments, draw.upstream)
    with torch.device("meta"):
        found = problem.results(draw.arguments, draw.upstream)
    torch.testing.assert_close(found, expected)


def negated(tensor):
    """The same numbers as a view that PyTorch negates when it is read."""
    return torch._neg_view(-tensor)


def imaginary_part(tensor):
    """The same, with gaps: users get it as the imaginary part of a conjugate."""
    return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag


@pytest.mark.parametrize("view", [negated, imaginary_part], ids=["negated", "imaginary part"])
@over("main")
def test_lazy_views(problem, view):
    """Each argument, the upstream gradient, and all at once."""
    if interpreted(problem.backend) and view == imaginary_part:
        pytest.skip("long in the interpreter")
    draw = problem.draw()
    expected = problem.results(draw.arguments, draw.upstream)
    tensors = {k: v for k, v in draw.arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    views = {name: view(tensor) for name, tensor in tensors.items()}
    assert all(tensor.is_neg() for tensor in views.values())
    wrong = []
    for name, changed in {**{name: {name: v} for name, v in views.items()}, "upstream": {}, "all": views}.items():
        upstream = view(draw.upstream) if name in ("upstream", "all") else draw.upstream
        found = problem.results(draw.arguments | changed, upstream)
        wrong += [f"{key} of {name}" for key in found if not torch.allclose(found[key], expected[key], 1e-4, 1e-6)]
    assert not wrong
