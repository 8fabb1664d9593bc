"""Memory that is not to be had: PyTorch's error, and a process that goes on as if nothing had been asked."""

import sys

import pytest
import torch
from conftest import SEED
from table import problems

from mixfeat.operators import OPERATORS, same_bits

SETUP = "import sys; sys.path.insert(0, 'tests'); import test_faults\n"


class Small:
    """Calls that need little memory, a way through the code each, and what they gave when there was enough."""

    def __init__(self, backend):
        self.draws = [(problem, problem.draw()) for problem in problems("main", backends=[backend], seed=SEED)]
        self.before = [problem.results(draw.arguments, draw.upstream) for problem, draw in self.draws]

    def check(self, operators):
        for (problem, draw), before in zip(self.draws, self.before, strict=True):
            if problem.operator in operators:
                assert same_bits(problem.results(draw.arguments, draw.upstream), before), str(problem)


def check_cpu():
    """Less and less of the memory that a call needs is missing, so that every allocation in it fails once."""
    import resource

    small = Small("cpu")
    for problem in problems("large", backends=["cpu"], seed=SEED):
        draw, room, errors, done = problem.draw(), 2**16, 0, False
        while not done:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + int(room), resource.RLIM_INFINITY))
            try:
                problem.results(draw.arguments, draw.upstream)
                done = True
            except (RuntimeError, MemoryError):
                errors += 1
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            small.check([problem.operator])
            room *= 1.3
        small.check(OPERATORS.values())
        assert errors > 3, (str(problem), errors)
        print(problem)


def check_gpu():
    """All the memory that a process may have is taken."""
    small = Small("triton")
    total = torch.cuda.get_device_properties(0).total_memory
    for problem, draw in small.draws:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)
        taken = []
        for size in (2**22, 2**20, 2**16, 2**9):
            try:
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                pass
        with pytest.raises(torch.OutOfMemoryError):
            problem.results(draw.arguments, draw.upstream)
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
        small.check(OPERATORS.values())
        print(problem)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space")
def test_no_memory(run_python):
    environment = {"OMP_NUM_THREADS": "2", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = run_python(SETUP + "test_faults.check_cpu()", fresh=True, **environment)
    assert output.count("\n") == sum(len(operator.large) for operator in OPERATORS.values())


@pytest.mark.gpu
def test_no_memory_on_a_gpu(run_python):
    output = run_python(SETUP + "test_faults.check_gpu()")
    assert output.count("\n") == sum(len(operator.main) for operator in OPERATORS.values())
