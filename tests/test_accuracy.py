"""Values and gradients of every operator, held to the definition in float64 within the budget of the dtype."""

import pytest
import torch
from conftest import SEED, interpreted, skip_what_others_run_on
from table import LAYOUTS, over, problems

import mixfeat as mf
from mixfeat.operators import DTYPES, OPERATORS, deterministic, same_bits


def few(problem):
    """One draw in Triton's interpreter, else as many as it takes to compare errors."""
    return [problem.draw()] if interpreted(problem.backend) else problem.draws()


@over("quick full wide", DTYPES, interpreted="interpreted")
def test_accuracy(problem):
    problem.hold(problem.draws())


@over("variants", DTYPES)
def test_accuracy_of_options(problem):
    problem.hold(few(problem))


@over("degrees", interpreted="")
def test_accuracy_of_degrees(problem):
    problem.hold(few(problem))


@over("large", ("float32", "float64"), ["cpu"])
def test_accuracy_of_large_shapes(problem):
    problem.hold([problem.draw()])


@over("empty")
def test_empty_dimensions(problem):
    """Sums over nothing are 0, and the mean of nothing is not a number."""
    problem.hold(few(problem))
    problem.hold([problem.draw(LAYOUTS["gaps"])])


@pytest.mark.parametrize("layout", LAYOUTS)
@over("main")
def test_layouts(problem, layout):
    """Arguments in any layout give the results of contiguous ones, for upstream gradients in any layout too."""
    if interpreted(problem.backend) and layout not in ("gaps", "transposed", "one sample"):
        pytest.skip("long in the interpreter; tests of the kernels have more")
    draw = problem.draw(LAYOUTS[layout])
    contiguous = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in draw.arguments.items()}
    others = (torch.clone, lambda upstream: upstream.new_ones(()).expand_as(upstream))
    for lay_out in (LAYOUTS[layout], *([] if interpreted(problem.backend) else others)):
        upstream = lay_out(draw.upstream)
        found = problem.results(draw.arguments, upstream)
        expected = problem.results(contiguous, upstream.contiguous())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@over("main interpreted quick wide", interpreted="main interpreted")
def test_poisoned_scratch(problem):
    """Nothing is read that was not written: all new memory starts as NaN."""
    with deterministic():
        assert torch.utils.deterministic.fill_uninitialized_memory
        problem.hold(few(problem))


@over("main variants", interpreted="main")
def test_nothing_is_mutated(problem):
    draw = problem.draw()
    tensors = {"upstream": draw.upstream} | {k: v for k, v in draw.arguments.items() if isinstance(v, torch.Tensor)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    problem.results(draw.arguments, draw.upstream)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.gpu
@over("full", backends=["triton"])
def test_repeats_on_cuda_under_deterministic_algorithms(problem):
    draw = problem.draw()
    with deterministic():
        assert same_bits(*(problem.results(draw.arguments, draw.upstream) for _ in range(2)))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.triton
def test_triton_refuses_float64(operator):
    entry = OPERATORS[operator]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = entry.arguments(entry.main[0], torch.float64, device, torch.Generator())
    with (
        mf.backend("triton"),
        pytest.raises(ValueError, match=r"'triton' does not serve torch\.float64; use 'cpu' or 'reference'"),
    ):
        entry.function(**arguments)


def check_instruction_set(operators=OPERATORS):
    """Hold operators on the CPU, in any dtype."""
    for problem in (
        *problems("quick", DTYPES, ["cpu"], operators=operators, seed=SEED),
        *problems("wide", ("float32", "float64"), ["cpu"], operators=operators, seed=SEED),
        *problems("variants degrees", backends=["cpu"], operators=operators, seed=SEED),
    ):
        try:
            problem.hold(problem.draws())
        except AssertionError as error:
            raise AssertionError(str(problem)) from error


@pytest.mark.parametrize("capability", ["generic", "avx2"])
def test_accuracy_of_each_instruction_set(capability, run_python):
    """In a process of its own, as the choice is made once."""
    skip_what_others_run_on(capability)
    run_python(
        "import sys; sys.path.insert(0, 'tests'); from mixfeat.kernels import cpu\n"
        f"assert cpu.capability() == '{capability}', cpu.capability()\n"
        "import test_accuracy, test_mixup, test_pairwise_mixup_loss\n"
        "for module in (test_accuracy, test_mixup, test_pairwise_mixup_loss): module.check_instruction_set()\n",
        MIXFEAT_CPU_CAPABILITY=capability,
    )


def test_accuracy_of_products_in_float32(run_python):
    """AVX-512 where the processor multiplies bfloat16: the one operator that differs."""
    skip_what_others_run_on("avx512")
    run_python(
        "import sys; sys.path.insert(0, 'tests'); from mixfeat.kernels import cpu\n"
        "assert cpu.capability() == 'avx512', cpu.capability()\n"
        "import test_accuracy; test_accuracy.check_instruction_set(['patch_conv'])\n",
        MIXFEAT_CPU_CAPABILITY="avx512",
    )
