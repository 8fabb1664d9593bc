"""Every operator under torch.compile, and what the operators it calls promise to PyTorch."""

import pytest
import torch
from table import over, problems
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from mixfeat.operators import Case


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@over("main", backends=["cpu", "triton"])
def test_compile(problem, dynamic):
    """In one graph, at two numbers of samples, forward and backward."""
    operator = problem.operator
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True, dynamic=dynamic)
    for samples in (6, 9):
        case = Case((samples, *problem.case.sizes[1:]), problem.case.dims, problem.case.options)
        draw = next(operator.draws(case, problem.dtype, problem.device, problem.generator))
        found = operator.results(compiled, draw.arguments, draw.upstream)
        expected = problem.results(draw.arguments, draw.upstream)
        torch.testing.assert_close(found, expected)
        assert found["value"].stride() == expected["value"].stride()


class Recorder(TorchDispatchMode):
    """Records the operators of mixfeat that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mixfeat":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@over("main variants", interpreted="main")
def test_opcheck(problem):
    """Each operator that a forward and a backward pass call: schema, fake, autograd, tracing."""
    operator, draw = problem.operator, problem.draw()
    leaves = {name: draw.arguments[name].requires_grad_() for name in operator.differentiated}
    with Recorder() as forward:
        value = operator.function(**draw.arguments | leaves)
    with Recorder() as backward:
        value.backward(draw.upstream.to(value.dtype))
    assert forward.calls
    for calls, derived in ((forward.calls, (False, True)), (backward.calls, (False,))):
        for function, args, kwargs in calls:
            for requires_grad in derived:
                opcheck(function, *_detached((args, kwargs), requires_grad))


def _detached(arguments, requires_grad):
    """The same arguments as leaves, those that had a gradient with or without one."""
    return torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().clone().requires_grad_(requires_grad and t.requires_grad), arguments
    )


def test_problems_are_named():
    """Names are unique and readable: what pytest shows of a test."""
    names = [str(problem) for problem in problems("quick full wide variants main", ["float32", "bfloat16"])]
    assert len(names) == len(set(names))
    assert "pairwise_mixup_loss-cpu-N33xP5xD20xC10xM4-nodes=1-PolyReLU(degree=4, rho=0.1, clamp=True)-bfloat16" in names
