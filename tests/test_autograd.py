"""Gradients of every operator: where they are wanted, how often, in which mode of differentiation."""

import itertools

import torch
from table import over

from mixfeat.operators import OPERATORS


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


@over("main", operators=[name for name, operator in OPERATORS.items() if operator.differentiated])
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
