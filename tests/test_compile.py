"""Every operator under torch.compile, and what the operators it calls promise to PyTorch."""

import pytest
import torch
from conftest import SEED, compiler
from table import over, problems
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import mixfeat as mf
from mixfeat.operators import OPERATORS, Case


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@over("main", backends=["cpu", "triton"])
def test_compile(problem, dynamic):
    """In one graph, forward and backward; one that is dynamic at two numbers of samples."""
    operator = problem.operator
    torch._dynamo.reset()
    compiled = torch.compile(operator.function, fullgraph=True, dynamic=dynamic, backend=compiler(problem.backend))
    for samples in (6, 9) if dynamic else (6,):
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


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.triton), "reference"])
def test_opcheck(backend, operator):
    """Each operator that forward and backward passes call: schema, fake, autograd, tracing.

    Once for all calls that differ in numbers only.
    """
    if backend not in mf.backends.available():
        pytest.skip(f"{backend} needs a GPU, or TRITON_INTERPRET=1")
    if backend == "triton" and OPERATORS[operator].composed and mf.backends.interpreted():
        pytest.skip("other operators serve it there, which have the test")
    calls = {}
    for problem in problems("main variants", backends=[backend], operators=[operator], interpreted="main", seed=SEED):
        draw = problem.draw()
        leaves = {name: draw.arguments[name].requires_grad_() for name in problem.operator.differentiated}
        with mf.backend(backend):
            with Recorder() as forward:
                value = problem.operator.function(**draw.arguments | leaves)
            with Recorder() as backward:
                if leaves:
                    value.backward(draw.upstream.to(value.dtype))
        assert forward.calls
        for recorded, derived in ((forward.calls, (False, True)), (backward.calls, (False,))):
            for function, *arguments in recorded:
                kinds = torch.utils._pytree.tree_map(_kind, arguments)
                calls.setdefault(f"{function} {kinds}", (function, arguments, derived))
    for function, arguments, derived in calls.values():
        for requires_grad in derived:
            with mf.backend(backend):
                opcheck(function, *_detached(arguments, requires_grad))


def _kind(value):
    """All of an argument but its numbers."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim(), value.is_contiguous(), value.requires_grad
    return type(value) if isinstance(value, float) else value


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
