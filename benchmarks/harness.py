"""Fair timing on a noisy machine: contenders in turn, medians, ratios; and limits measured in the same run."""

import ctypes
import functools
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mixfeat.kernels import cpu
from mixfeat.kernels.cpu.build import SOURCE, X86, compiler

from .results import Timing, describe, rates

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
#: seconds for which contenders are timed together, unless a benchmark needs more or less
SECONDS = float(os.environ.get("MIXFEAT_BENCH_SECONDS", "2"))
#: of PolyReLU of degree 8: an activation, and a slope that is added to the gradient
FLOP = {"forward": 8, "backward": 9}
#: the relative error from which on a result is wrong and not merely rounded
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}

Contender = Callable[[], Any]
Clock = Callable[[Contender], float]


@dataclass(frozen=True)
class Measurement:
    """What contenders took.

    Attributes:
        timings: in the mode of the tables: on a CPU with warm caches, on a GPU with cold ones.
        graph: whether CUDA graphs were replayed for that: every contender could be captured.
        also: medians in the other modes, by mode and contender.
    """

    timings: dict[str, Timing]
    graph: bool
    also: dict[str, dict[str, float]]


def measure(contenders: Mapping[str, Contender], *, share: float = 1.0, apart: bool = False) -> Measurement:
    """Time contenders in the mode of the tables as :func:`compare` does, in the others for a quarter as long.

    With ``apart`` each baseline meets the first contender alone (:func:`compare_apart`). Those that are slow are left
    out of the other modes, but for the first.
    """
    race = compare_apart if apart else compare
    replays = captured(contenders) if CUDA else None
    runs = contenders if replays is None else replays
    timings = race(runs, share=share)
    modes: dict[str, tuple[Mapping[str, Contender], Clock]]
    modes = (
        {"warm cache": (runs, warm), "plain launches": (contenders, launched)} if CUDA else {"cold cache": (runs, cold)}
    )
    also: dict[str, dict[str, float]] = {}
    for mode, (all_of_them, clock) in modes.items():
        first, *others = all_of_them
        quick = [first, *(name for name in others if 8 * timings[name].p50 < share * SECONDS)]
        found = race({name: all_of_them[name] for name in quick}, share=share / 4, min_turns=3, clock=clock)
        also[mode] = {name: timing.p50 for name, timing in found.items()}
    return Measurement(timings, replays is not None, also)


def compare(
    contenders: Mapping[str, Contender], *, share: float = 1.0, min_turns: int = 7, clock: Clock | None = None
) -> dict[str, Timing]:
    """Time contenders in turn, A B C B C A ..., for about ``share`` of SECONDS after two turns of warm-up.

    Where one turn takes longer than that, it is the only one of warm-up, and three more are timed. ``clock`` is by
    default that of the tables: :func:`cold` on a GPU, :func:`warm` on a CPU.
    """
    clock = clock or (cold if CUDA else warm)
    begin = time.perf_counter()
    for run in contenders.values():
        clock(run)
    slow = time.perf_counter() - begin > share * SECONDS
    for run in contenders.values() if not slow else ():
        clock(run)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, start, turns = list(contenders), time.perf_counter(), 0
    while turns < (3 if slow else min_turns) or time.perf_counter() - start < share * SECONDS:
        for name in order:
            times[name].append(clock(contenders[name]))
        order = order[1:] + order[:1]  # so that none always runs after the same other
        turns += 1
    return {name: quantiles(values) for name, values in times.items()}


def compare_apart(contenders: Mapping[str, Contender], **settings: Any) -> dict[str, Timing]:
    """As :func:`compare`, but the first contender with each of the others alone.

    For those that slow down who comes next: by gigabytes of activations, by another number of threads. Times are scaled
    to what they would be if the first had taken the same in every pair.
    """
    first, *others = contenders
    if not others:
        return compare(contenders, **settings)
    pairs = {name: compare({key: contenders[key] for key in (first, name)}, **settings) for name in others}
    own = pairs[others[0]][first]
    scales = {name: own.p50 / pair[first].p50 for name, pair in pairs.items()}
    return {first: own} | {
        name: Timing(*(scales[name] * seconds for seconds in astuple(pair[name]))) for name, pair in pairs.items()
    }


def warm(run: Contender) -> float:
    """Seconds of one call, to the end of what it put on the device, right after another that is not timed.

    On a CPU that leaves its data in the caches and its threads awake; a call of 0.1 s needs no other before it.
    """
    if not CUDA:
        first = _seconds(run)
        return first if first > 0.1 else _seconds(run)
    _walk()  # the device is busy while the host runs ahead, so that no launch is waited for
    run()
    return _between_events(run)


def cold(run: Contender) -> float:
    """Seconds of one call that finds nothing of its own in a cache: a larger buffer has been walked through."""
    _walk()
    return _between_events(run) if CUDA else _seconds(run)


def launched(run: Contender, calls: int = 20) -> float:
    """Seconds of a call among others like it, one after the other: what the slower of host and device takes."""
    return _between_events(lambda: [run() for _ in range(calls)]) / calls


def _seconds(run: Contender) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _between_events(run: Contender) -> float:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def _walk() -> None:
    _buffer().zero_() if CUDA else _buffer().sum()


@functools.cache
def _buffer() -> Tensor:
    """256 MB on a GPU, on a CPU twice as much as its largest cache holds."""
    if CUDA:
        return torch.empty(64 << 20, device=DEVICE)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(file.read_text().strip().removesuffix("K")) << 10 for file in files]
    return torch.ones(2 * max(sizes, default=32 << 20) // 4)


def captured(contenders: Mapping[str, Contender]) -> dict[str, Contender] | None:
    """Each contender as the replay of a CUDA graph; None if one of them waits for the device, which no graph can.

    That is found out first: a capture that fails can leave PyTorch's allocator unusable.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in contenders.values():
            run()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    replays: dict[str, Contender] = {}
    for name, run in contenders.items():
        side = torch.cuda.Stream()  # on which a graph's capture wants to be prepared
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replays[name] = graph.replay
    return replays


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


def directed(direction: str, call: Callable[[], Tensor], wrt: Tensor, grad: Tensor | None = None) -> Contender:
    """``call`` without gradients, or, if ``direction`` is more than forward, followed by the gradient to ``wrt``."""
    if direction == "forward":
        return torch.no_grad()(call)
    return lambda: torch.autograd.grad(call(), wrt, grad)[0]


def check(contenders: Mapping[str, Contender], truth: Tensor, dtype: torch.dtype) -> None:
    """Fail where a contender's result is wrong: nothing is timed that is."""
    for name, run in contenders.items():
        error = ((run().double() - truth.double()).norm() / truth.double().norm()).item()
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.2g}"


@functools.cache
def matrix_rate(dtype: torch.dtype) -> float:
    """Multiply-adds a second of a large square matrix product: the limit of everything that is one."""
    n = 8192 if CUDA else 1536
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return n**3 / compare({"product": lambda: a @ b}, share=0.5)["product"].p20


def copy_rates(bytes: int) -> dict[str, float]:
    """Bytes a second, read and written, of copies that move ``bytes`` in all, into old memory and into new."""
    source = torch.ones(max(bytes // 8, 1), device=DEVICE)
    target = torch.empty_like(source)
    timing = compare({"old": lambda: target.copy_(source), "new": source.clone}, share=0.25)
    return {name: bytes / time.p50 for name, time in timing.items()}


@functools.cache
def activation_rates() -> dict[str, float]:
    """Evaluations a second of PolyReLU of degree 8 with everything in registers, "forward" and "backward"."""
    if CUDA:
        from . import activation_rate

        return activation_rate.rates()
    threads, rounds = torch.get_num_threads(), 1_000_000
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", *X86.get(cpu.capability(), [])]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "activation_rate.so")
        source = Path(__file__).with_name("activation_rate.cpp")
        command = [*shlex.split(compiler()), *flags, "-shared", "-fPIC", f"-I{SOURCE}", source, "-o", library]
        subprocess.run(command, check=True)
        functions = ctypes.CDLL(str(library))
    best = {}
    for name in ("forward", "backward"):
        function = getattr(functions, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
        with ThreadPoolExecutor(threads) as pool:  # calls of ctypes run at the same time
            best[name] = 0.0
            for _ in range(5):
                begin = time.perf_counter()
                evaluations = sum(pool.map(function, [rounds] * threads))
                best[name] = max(best[name], evaluations / (time.perf_counter() - begin))
    return best


@dataclass(frozen=True)
class Limit:
    """What bounds the work from below: so many seconds at the rate that ``name`` says, measured in this run."""

    name: str
    seconds: float


def copy_limit(bytes: int) -> Limit:
    """Of work that is memory traffic: a copy that allocates its result, as the operators must."""
    return Limit("a copy", bytes / copy_rates(bytes)["new"])


def network_work(
    direction: str, dtype: torch.dtype, *, products: int, evaluations: int, bytes: int
) -> tuple[dict[str, float], Limit]:
    """The work of a network's operator, and its limit: the part that takes longest, as they may overlap.

    Args:
        direction, dtype: as of the row. What is more than forward also has the gradient to the weight.
        products: multiply-adds of the convolution forward. The gradient has as many again.
        evaluations: of the activation, whose degree is 8.
        bytes: what must be read or written at least.
    """
    more = direction != "forward"
    peak = activation_rates()
    limits = [
        Limit("matrix rate", (1 + more) * products / matrix_rate(dtype)),
        Limit("arithmetic peak", evaluations / peak["forward"] + more * evaluations / peak["backward"]),
        copy_limit(bytes),
    ]
    flop = 2 * (1 + more) * products + (FLOP["forward"] + more * FLOP["backward"]) * evaluations
    return {"evaluations": evaluations, "FLOP": flop, "bytes": bytes}, max(limits, key=lambda limit: limit.seconds)


def record(
    capsys: Any,
    suite: str,
    case: str,
    direction: str,
    *,
    dtype: torch.dtype = torch.float32,
    measured: Measurement | None = None,
    work: Mapping[str, float] | None = None,
    limit: Limit | None = None,
    memory: Mapping[str, int] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Print a row of results, and append it to the JSON lines of ``MIXFEAT_BENCH_OUT``.

    Args:
        suite, case, direction: what was timed: the operator, the problem's name and shape, forward or more.
        measured: of ``"mixfeat"``, and of each baseline.
        work: what there was to do, by unit: evaluations of the activation, FLOP, bytes.
        limit: the time that this work needs at least.
        memory: peak bytes of each contender.
        figures: whatever else was found, by name.
    """
    row: dict[str, Any] = {
        "suite": suite,
        "case": case,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "cache": ("cold" if CUDA else "warm") if measured else None,
        "graph": measured.graph if measured else None,
        "timings": {name: asdict(timing) for name, timing in measured.timings.items()} if measured else {},
        "also": measured.also if measured else {},
        "work": dict(work or {}),
        "limit": asdict(limit) if limit else None,
        "peak_bytes": dict(memory or {}),
        "figures": dict(figures or {}),
    }
    row["rates"] = rates(row)
    with capsys.disabled():
        print("\n" + describe(row))
    if "MIXFEAT_BENCH_OUT" in os.environ:
        with open(os.environ["MIXFEAT_BENCH_OUT"], "a") as file:
            file.write(json.dumps(row) + "\n")
