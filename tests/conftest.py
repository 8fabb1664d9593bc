"""Shared by all tests: fresh random inputs (the seed is in the report), backends to run on, errors to hold results to.

``TRITON_INTERPRET=1 pytest -m triton`` runs the Triton kernels in their interpreter; without it, and without a GPU,
they are compiled but not run. ``MIXFEAT_TEST_LONG=1`` draws many more examples and kills many more processes.
"""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixfeat as mf

ROOT = Path(__file__).parents[1]
SEED = int(os.environ.get("MIXFEAT_TEST_SEED", torch.seed() % 2**32))
LONG = os.environ.get("MIXFEAT_TEST_LONG") == "1"

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
        "mixfeat", max_examples=(20 if LONG else 5) if few else (1000 if LONG else 20), deadline=None,
        derandomize=False, database=None, suppress_health_check=fixtures + slow,
    )  # fmt: skip
    hypothesis.settings.load_profile("mixfeat")

_examples = 0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = SEED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have every example of a property counted."""
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


def error(results, truths):
    """Relative error in the 2-norm, over several draws; infinite where anything is not finite."""
    square = sum((a.double() - b).square().sum().item() for a, b in zip(results, truths, strict=True))
    scale = sum(b.square().sum().item() for b in truths)
    return math.sqrt(square / max(scale, 1e-300)) if math.isfinite(square) else math.inf


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
def one_thread():
    """Problems this small gain nothing from threads, and lose much on a machine that is busy with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_python():
    """Run code in a fresh interpreter, from the repository's root; fails with its output. Returns its stdout."""

    def run(code: str, *, check: bool = True, **environment: str | None) -> str:
        env = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
        for name in (k for k, v in environment.items() if v is None):
            env.pop(name, None)
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result.stdout + ("" if check else result.stderr)

    return run
