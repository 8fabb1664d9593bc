"""Hardware limits, measured in the same run as the operators: matrix products, copies, activations in registers."""

import ctypes
import functools
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from mixfeat.kernels import cpu
from mixfeat.kernels.cpu.build import SOURCE, X86, compiler

from .timing import CUDA, DEVICE, compare, medians

__all__ = [
    "FLOP", "Limit", "Work", "activation_rates", "copy_limit", "copy_rates", "matrix_rate", "network_work",
    "of_old_copies",
]  # fmt: skip

#: FLOP of PolyReLU of degree 8: an activation, and a slope that is added to the gradient
FLOP = {"forward": 8, "backward": 9}


@dataclass(frozen=True)
class Limit:
    """A lower bound of the time that some work takes: ``seconds``, at the measured rate called ``name``."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Work:
    """Amounts of work by unit ("evaluations" of the activation, "FLOP", "bytes"), and the limit that bounds it."""

    amounts: Mapping[str, float]
    limit: Limit | None = None


@functools.cache
def matrix_rate(dtype: torch.dtype) -> float:
    """Measure the multiply-adds per second of a large square matrix product."""
    n = 8192 if CUDA else 1536
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return n**3 / min(compare({"product": lambda: a @ b}, share=0.5)["product"])


def copy_rates(bytes: int) -> dict[str, float]:
    """Measure the bytes per second of copies into mapped ("old") and freshly allocated ("new") memory.

    ``bytes`` counts reads and writes.
    """
    source = torch.ones(max(bytes // 8, 1), device=DEVICE)
    target = torch.empty_like(source)
    times = compare({"old": lambda: target.copy_(source), "new": source.clone}, share=0.25)
    return {name: bytes / seconds for name, seconds in medians(times).items()}


def copy_limit(bytes: int) -> Limit:
    """Bound memory traffic by a copy that allocates its result, as the operators must."""
    return Limit("a copy", bytes / copy_rates(bytes)["new"])


def of_old_copies(bytes: int) -> Callable[[Mapping[str, float]], dict[str, float]]:
    """Return a function of medians: the share of the rate of copies into mapped memory that mixfeat reaches."""
    seconds = bytes / copy_rates(bytes)["old"]
    return lambda medians: {"of a copy into mapped memory": seconds / medians["mixfeat"]}


@functools.cache
def activation_rates() -> dict[str, float]:
    """Measure evaluations per second of PolyReLU of degree 8 in registers, "forward" and "backward"."""
    if CUDA:
        from . import activation_rate  # imports triton, which is not installed everywhere

        return activation_rate.rates()
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "activation_rate.so"))
        source = str(Path(__file__).with_name("activation_rate.cpp"))
        flags = ["-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", *X86.get(cpu.capability(), [])]
        command = [*compiler(), *flags, "-shared", "-fPIC", f"-I{SOURCE}", source, "-o", library]
        subprocess.run(command, check=True)
        functions = ctypes.CDLL(library)
    return {name: _rate_on_all_threads(functions[name]) for name in ("forward", "backward")}


def _rate_on_all_threads(function: "ctypes._NamedFuncPointer", rounds: int = 1_000_000) -> float:
    """Take the best of five runs of a function of activation_rate.cpp on every thread, in evaluations per second."""
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
    threads, best = torch.get_num_threads(), 0.0
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL
        for _ in range(5):
            begin = time.perf_counter()
            evaluations = sum(pool.map(function, [rounds] * threads))
            best = max(best, evaluations / (time.perf_counter() - begin))
    return best


def network_work(direction: str, dtype: torch.dtype, *, products: int, evaluations: int, bytes: int) -> Work:
    """Count the work of a network's operator; its limit is the part that takes longest, since parts may overlap.

    Args:
        direction: "forward", or anything else for a call that also computes the gradient to the weight.
        dtype: dtype of the matrix products.
        products: multiply-adds of the convolution forward. The gradient needs as many again.
        evaluations: evaluations of the activation, of degree 8.
        bytes: minimum number of bytes read or written.
    """
    backward = direction != "forward"
    rates = activation_rates()
    limits = [
        Limit("matrix rate", (1 + backward) * products / matrix_rate(dtype)),
        Limit("arithmetic peak", evaluations / rates["forward"] + backward * evaluations / rates["backward"]),
        copy_limit(bytes),
    ]
    flop = 2 * (1 + backward) * products + (FLOP["forward"] + backward * FLOP["backward"]) * evaluations
    amounts = {"evaluations": evaluations, "FLOP": flop, "bytes": bytes}
    return Work(amounts, max(limits, key=lambda limit: limit.seconds))
