"""Fair timing on a noisy machine: contenders in turn, medians, ratios; and limits measured in the same run."""

import ctypes
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mixfeat.kernels import cpu
from mixfeat.kernels.cpu.build import SOURCE, X86, compiler
from torch.profiler import ProfilerActivity, profile

from .results import Timing, describe

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
#: seconds for which contenders are timed together, unless a benchmark needs more or less
SECONDS = float(os.environ.get("MIXFEAT_BENCH_SECONDS", "8"))

Contender = Callable[[], object]


def compare(contenders: Mapping[str, Contender], *, share: float = 1.0, min_turns: int = 7) -> dict[str, Timing]:
    """Time contenders in turn, A B C B C A ..., for about ``share`` of SECONDS after two turns of warm-up (none if 0).

    On a GPU the second-level cache is cleared before each.
    """
    for _ in range(2 if share else 0):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, start = list(contenders), time.perf_counter()
    while time.perf_counter() - start < share * SECONDS or len(next(iter(times.values()))) < min_turns:
        for name in order:
            times[name].append(once(contenders[name]))
        order = order[1:] + order[:1]  # so that none always runs after the same other
    return {name: quantiles(values) for name, values in times.items()}


def once(run: Contender) -> float:
    """Seconds of one call, to the end of what it put on the device."""
    if not CUDA:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    torch.empty(64 << 20, device=DEVICE).zero_()  # 256 MB: more than any cache
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


def peak_bytes(contenders: Mapping[str, Contender]) -> dict[str, int]:
    """The most memory that each has allocated at once, beyond what was there before."""
    peaks = {}
    for name, run in contenders.items():
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            peaks[name] = torch.cuda.max_memory_allocated() - before
            continue
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            run()
        held = most = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()  # negative where memory is let go
                most = max(most, held)
        peaks[name] = most
    return peaks


def matrix_rate(dtype: torch.dtype) -> float:
    """Multiply-adds a second of a large square matrix product: the limit of everything that is one."""
    n = 8192 if CUDA else 1536
    a, b = (torch.randn(n, n, dtype=dtype, device=DEVICE) for _ in range(2))
    return n**3 / compare({"product": lambda: a @ b}, share=0.125)["product"].p20


def copy_rates(bytes: int) -> dict[str, float]:
    """Bytes a second, read and written, of copies that move ``bytes`` in all, into old memory and into new."""
    source = torch.ones(bytes // 8, device=DEVICE)
    target = torch.empty_like(source)
    timing = compare({"old": lambda: target.copy_(source), "new": source.clone}, share=0.25)
    return {name: bytes / time.p50 for name, time in timing.items()}


def activation_rates(threads: int, rounds: int = 1_000_000) -> dict[str, float]:
    """Evaluations a second of PolyReLU of degree 8 with everything in registers, "forward" and "backward", on a CPU."""
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", *X86.get(cpu.capability(), [])]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "activation_rate.so")
        source = Path(__file__).with_name("activation_rate.cpp")
        command = [*shlex.split(compiler()), *flags, "-shared", "-fPIC", f"-I{SOURCE}", source, "-o", library]
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


@dataclass(frozen=True)
class Limit:
    """What bounds the work from below: so many seconds at the rate that ``name`` says, measured in this run."""

    name: str
    seconds: float


def record(
    capsys: Any,
    suite: str,
    case: str,
    direction: str,
    *,
    dtype: torch.dtype = torch.float32,
    timings: Mapping[str, Timing] | None = None,
    work: Mapping[str, float] | None = None,
    limit: Limit | None = None,
    memory: Mapping[str, int] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Print a row of results, and append it to the JSON lines of ``MIXFEAT_BENCH_OUT``.

    Args:
        suite, case, direction: what was timed: the operator, the problem's name and shape, forward or more.
        timings: of ``"mixfeat"``, and of each baseline.
        work: what there was to do, by unit: evaluations, multiply-adds, bytes.
        limit: the time that this work needs at least.
        memory: peak bytes of each contender.
        figures: whatever else was found, by name.
    """
    row = {
        "suite": suite,
        "case": case,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "timings": {name: asdict(timing) for name, timing in (timings or {}).items()},
        "work": dict(work or {}),
        "limit": asdict(limit) if limit else None,
        "peak_bytes": dict(memory or {}),
        "figures": dict(figures or {}),
    }
    with capsys.disabled():
        print("\n" + describe(row))
    if "MIXFEAT_BENCH_OUT" in os.environ:
        with open(os.environ["MIXFEAT_BENCH_OUT"], "a") as file:
            file.write(json.dumps(row) + "\n")
