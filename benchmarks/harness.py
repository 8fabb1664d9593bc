"""Fair timing on a noisy machine: contenders in turn, medians, ratios; and limits measured in the same run."""

import ctypes
import json
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mixfeat.kernels import cpu
from mixfeat.kernels.cpu.build import SOURCE, X86, compiler

import mixfeat as mf

Contender = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: quantiles over its turns."""

    p20: float
    p50: float
    p80: float


def compare(contenders: dict[str, Contender], *, seconds: float = 8.0, min_turns: int = 7) -> dict[str, Timing]:
    """Time contenders in turn, A B C A B C ..., for about ``seconds`` after two turns of warm-up (none if 0)."""
    for _ in range(2 if seconds else 0):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < min_turns:
        for name, run in contenders.items():
            times[name].append(once(run))
    return {name: quantiles(values) for name, values in times.items()}


def once(run: Contender) -> float:
    """Seconds of one call, to the end of what it put on the device."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def quantiles(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(*values * 3)
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(cuts[1], statistics.median(values), cuts[7])


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiply-adds a second of a large square matrix product: the limit of everything that is one."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return n**3 / compare({"product": lambda: a @ b}, seconds=1)["product"].p20


def copy_rates(bytes: int, device: torch.device) -> dict[str, float]:
    """Bytes a second, read and written, of copies that move ``bytes`` in all, into old memory and into new."""
    source = torch.ones(bytes // 8, device=device)
    target = torch.empty_like(source)
    timing = compare({"old": lambda: target.copy_(source), "new": source.clone}, seconds=2)
    return {name: bytes / time.p50 for name, time in timing.items()}


def activation_rates(threads: int, rounds: int = 1_000_000) -> dict[str, float]:
    """Evaluations a second of PolyReLU of degree 8 with everything in registers, "forward" and "backward", on a CPU."""
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", *X86.get(cpu.capability(), [])]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "activation_rate.so")
        source = Path(__file__).with_name("activation_rate.cpp")
        command = [
            *shlex.split(compiler()),
            *flags,
            "-shared",
            "-fPIC",
            f"-I{SOURCE}",
            source,
            "-o",
            library,
        ]
        subprocess.run(command, check=True)
        functions = ctypes.CDLL(str(library))
    rates = {}
    for name in ("forward", "backward"):
        function = getattr(functions, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
        with ThreadPoolExecutor(threads) as pool:  # calls of ctypes run at the same time
            best = 0.0
            for _ in range(5):
                begin = time.perf_counter()
                evaluations = sum(pool.map(function, [rounds] * threads))
                best = max(best, evaluations / (time.perf_counter() - begin))
        rates[name] = best
    return rates


def record(capsys: Any, row: dict[str, Any]) -> None:
    """Print a row of results, and append it to the JSON lines of ``MIXFEAT_BENCH_OUT``."""
    cuda = torch.cuda.is_available()
    row = {
        **row,
        "version": mf.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    with capsys.disabled():
        print("\n" + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if "MIXFEAT_BENCH_OUT" in os.environ:
        with open(os.environ["MIXFEAT_BENCH_OUT"], "a") as file:
            file.write(json.dumps(row) + "\n")
