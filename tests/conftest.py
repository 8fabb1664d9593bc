"""Shared by all tests: the seed of random inputs, backends to run on, errors to hold results to.

``TRITON_INTERPRET=1 pytest -m triton`` runs the operators on Triton's kernels, in its interpreter. Without it, and
without a GPU, these tests are left out. Inputs are the same in every run, unless ``MIXFEAT_TEST_SEED`` names another
seed. ``MIXFEAT_TEST_LONG=1`` draws a new one, takes many more examples and kills many more processes.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

import mixfeat as mf
from mixfeat.kernels import cpu
from mixfeat.operators import relative_error as error

__all__ = ["LONG", "ROOT", "SEED", "error", "interpreted"]

ROOT = Path(__file__).parents[1]
LONG = os.environ.get("MIXFEAT_TEST_LONG") == "1"
SEED = int(os.environ.get("MIXFEAT_TEST_SEED", torch.seed() % 2**32 if LONG else 0))

try:
    import hypothesis
except ModuleNotFoundError:
    pass  # the tests of a GPU do without
else:
    # Triton compiles kernels anew for many an example, or interprets them
    few = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    fixtures = [hypothesis.HealthCheck.function_scoped_fixture]  # they hold for all examples: backend, device, threads
    slow = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large]
    hypothesis.settings.register_profile(
        "mixfeat", max_examples=(20 if LONG else 5) if few else (10_000 if LONG else 20), deadline=None,
        derandomize=False, database=None, suppress_health_check=fixtures + slow,
    )  # fmt: skip
    hypothesis.settings.load_profile("mixfeat")

_examples = 0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = SEED


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what cannot run in this process, and have every example of a property counted."""
    for item in items:
        if item.path.name.startswith("test_triton_"):
            item.add_marker(pytest.mark.kernels)
    if "triton" not in mf.backends.available():
        left_out = [i for i in items if i.get_closest_marker("triton") and not i.get_closest_marker("kernels")]
    elif mf.backends.interpreted():  # in this process Triton's kernels cannot be compiled
        left_out = [i for i in items if i.get_closest_marker("kernels") and not i.get_closest_marker("triton")]
        if not LONG:  # properties take hours there
            left_out += [i for i in items if hasattr(getattr(i, "obj", None), "hypothesis") and i not in left_out]
    else:
        left_out = []
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
    for test in {item.obj for item in items if isinstance(item, pytest.Function) and hasattr(item.obj, "hypothesis")}:
        test.hypothesis.inner_test = _counted(test.hypothesis.inner_test)


def _counted(test):
    @functools.wraps(test)
    def counted(*args, **kwargs):
        global _examples
        result = test(*args, **kwargs)
        _examples += 1
        return result

    return counted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _examples:
        terminalreporter.write_line(f"{_examples} examples of properties passed")


def pytest_report_header() -> str:
    return f"mixfeat: MIXFEAT_TEST_SEED={SEED}, backends {', '.join(mf.backends.available())}"


def interpreted(backend: str) -> bool:
    """Whether Triton's interpreter runs the kernels: a hundred thousand times slower, they get what differs there."""
    return backend == "triton" and mf.backends.interpreted()


def compiler(backend: str) -> str:
    """What torch.compile hands its graphs to: Inductor, which takes seconds, once for all backends of a device."""
    return "aot_eager" if backend == "reference" or interpreted(backend) else "inductor"


def skip_what_others_run_on(capability: str) -> None:
    """Skip the processor's best instruction set, on which all other tests run, and those that it lacks."""
    sets = ("generic", "avx2", "avx512", "avx512_bf16")
    if sets.index(capability) >= sets.index(cpu.capability()):
        pytest.skip(f"{cpu.capability()} is what all other tests run on")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(SEED)


@pytest.fixture(params=["cpu", pytest.param("triton", marks=pytest.mark.triton), "reference"])
def backend(request):
    """Each backend in turn, in force during the test."""
    if request.param not in mf.backends.available():
        pytest.skip(f"{request.param} needs a GPU, or TRITON_INTERPRET=1")
    with mf.backend(request.param):
        yield request.param


@pytest.fixture
def device(backend: str) -> torch.device:
    """The device that the backend serves."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture
def problem(request):
    """A problem of the table of operators, its backend in force during the test: see :mod:`table`."""
    request.param.generator.manual_seed(SEED)
    with mf.backend(request.param.backend):
        yield request.param


@pytest.fixture
def one_thread():
    """Problems this small gain nothing from threads, and lose much on a machine that is busy with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_python():
    """Run code in a process of its own, from the repository's root; fails with its output. Returns its stdout.

    It forks from one with PyTorch imported, see :mod:`processes`; or is ``fresh``, an interpreter that starts anew.
    """

    def run(code: str, *, check: bool = True, fresh: bool = False, **environment: str | None) -> str:
        env = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
        for name in (k for k, v in environment.items() if v is None):
            env.pop(name, None)
        if fresh:
            result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
            ended = processes.Ended(result.returncode, result.stdout, result.stderr)
        else:
            (ended,) = processes.run(code, environment=env)
        assert not check or ended.status == 0, ended.stdout + ended.stderr
        return ended.stdout + ("" if check else ended.stderr)

    return run
