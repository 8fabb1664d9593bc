"""Gradients of every operator: where they are wanted, how often, in which mode of differentiation."""

import itertools

import pytest
import torch
from table import over
from torch.autograd import forward_ad


@over("main")
def test_gradients_are_only_computed_where_needed(problem):
    operator, draw = problem.operator, problem.draw()
    every = problem.results(draw.arguments, draw.upstream)
    for count in range(1, len(operator.differentiated)):
        for wanted in itertools.combinations(operator.differentiated, count):
            found = operator.results(operator.function, draw.arguments, draw.upstream, wanted)
            assert list(found) == ["value", *(f"{name} grad" for name in wanted)]
            torch.testing.assert_close(found, {name: every[name] for name in found})
    assert not operator.function(**draw.arguments).requires_grad
    with torch.no_grad():
        leaves = {name: draw.arguments[name].requires_grad_() for name in operator.differentiated}
        value = operator.function(**draw.arguments | leaves)
    assert not value.requires_grad
    torch.testing.assert_close(value, every["value"])


@over("main")
def test_a_graph_that_is_kept_is_differentiated_again(problem):
    """To the same bits, in memory of its own, and in proportion to the upstream gradient."""
    operator, draw = problem.operator, problem.draw()
    leaves = [draw.arguments[name].requires_grad_() for name in operator.differentiated]
    value = operator.function(**draw.arguments)
    first = torch.autograd.grad(value, leaves, draw.upstream, retain_graph=True)
    kept = [grad.clone() for grad in first]
    again = torch.autograd.grad(value, leaves, draw.upstream, retain_graph=True)
    last = torch.autograd.grad(value, leaves, 2 * draw.upstream)
    for a, b, c, d in zip(first, kept, again, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        torch.testing.assert_close(d, 2 * b)


@over("main", ["float64"], ["cpu", "reference"])
def test_gradcheck(problem):
    operator, arguments = problem.operator, problem.draw().arguments
    for count in range(1, 1 + len(operator.differentiated)):
        for wanted in itertools.combinations(operator.differentiated, count):
            leaves = [arguments[name].detach().requires_grad_() for name in wanted]

            def call(*leaves, wanted=wanted):
                return operator.function(**arguments | dict(zip(wanted, leaves, strict=True)))

            assert torch.autograd.gradcheck(call, leaves)


@over("main")
def test_differentiating_twice_raises(problem):
    operator, draw = problem.operator, problem.draw()
    leaves = [draw.arguments[name].requires_grad_() for name in operator.differentiated]
    value = operator.function(**draw.arguments)
    for function in (torch.square,) if operator.linear else (torch.square, torch.clone):
        grads = torch.autograd.grad(function(value).sum(), leaves, create_graph=True)
        for grad in grads:
            with pytest.raises(RuntimeError, match=r"cannot be differentiated twice|once_differentiable"):
                (value.sum() + grad.square().sum()).backward(retain_graph=True)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant", "requires_grad"])
@over("main", backends=["cpu"])
def test_forward_mode_is_refused(problem, requires_grad):
    """Rather than taken for a derivative of zero."""
    operator, arguments = problem.operator, problem.draw().arguments
    refused = pytest.raises(NotImplementedError, match=f"{operator} has no forward-mode derivative")
    for name in operator.differentiated:
        x = arguments[name].requires_grad_(requires_grad)

        def call(x, name=name):
            return operator.function(**arguments | {name: x})

        with refused:
            torch.func.jvp(call, (x,), (torch.ones_like(x),))
        with refused:
            torch.func.jacfwd(call)(x)
        expected = call(x.detach())
        with forward_ad.dual_level():
            assert torch.equal(call(x).detach(), expected)  # of no tangent
            with refused:
                call(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@over("main", backends=["cpu"])
def test_function_transforms(problem):
    """vmap is a loop; torch.func.grad is refused."""
    operator, arguments = problem.operator, problem.draw().arguments
    for name in operator.differentiated:

        def call(x, name=name):
            return operator.function(**arguments | {name: x})

        several = torch.stack([arguments[name], 2 * arguments[name]])
        torch.testing.assert_close(torch.func.vmap(call)(several), torch.stack([call(x) for x in several]))
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.grad(lambda x: call(x).sum())(arguments[name])
