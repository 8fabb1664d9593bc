"""Fair timing on a noisy machine: contenders take turns, and the time of every turn is kept."""

import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = [
    "CUDA", "DEVICE", "SECONDS", "Clock", "Contender", "Measurement", "cold", "compare", "compare_pairwise", "launched",
    "measure", "medians", "warm",
]  # fmt: skip

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
#: Seconds for which contenders are timed together; a benchmark may ask for a share of it, or for more. The suite takes
#: them from ``--benchmark-max-time``.
SECONDS = 1.0

Contender = Callable[[], Any]
Clock = Callable[[Contender], float]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Measurement:
    """Times of contenders in every mode.

    Attributes:
        times: seconds of each turn in the mode that the tables show: warm caches on a CPU, cold caches on a GPU.
        graph: whether ``times`` are of replayed CUDA graphs, which needs every contender to be capturable.
        also: medians in the other modes, by mode and contender.
    """

    times: dict[str, list[float]]
    graph: bool
    also: dict[str, dict[str, float]]


def measure(contenders: Mapping[str, Contender], *, share: float = 1.0, pairwise: bool = False) -> Measurement:
    """Time contenders in the mode of the tables, and in each other mode for a quarter as long.

    The other modes leave out baselines that take more than an eighth of the time.

    Args:
        contenders: functions to call; the first is mixfeat's.
        share: multiplies SECONDS.
        pairwise: use :func:`compare_pairwise`, not :func:`compare`.
    """
    comparison = compare_pairwise if pairwise else compare
    replays = captured(contenders) if CUDA else None
    runs = contenders if replays is None else replays
    times = comparison(runs, share=share)
    typical = medians(times)
    modes: dict[str, tuple[Mapping[str, Contender], Clock]]
    if CUDA:
        modes = {"warm cache": (runs, warm), "plain launches": (contenders, launched)}
    else:
        modes = {"cold cache": (runs, cold)}
    first, *others = contenders
    quick = [first, *(name for name in others if 8 * typical[name] < share * SECONDS)]
    also: dict[str, dict[str, float]] = {}
    for mode, (runs_of_mode, clock) in modes.items():
        found = comparison({name: runs_of_mode[name] for name in quick}, share=share / 4, min_turns=3, clock=clock)
        also[mode] = medians(found)
    return Measurement(times, replays is not None, also)


def medians(times: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    """Take the median of each contender's turns."""
    return {name: median(turns) for name, turns in times.items()}


def compare(
    contenders: Mapping[Name, Contender], *, share: float = 1.0, min_turns: int = 7, clock: Clock | None = None
) -> dict[Name, list[float]]:
    """Time contenders in turn, A B C B C A ..., for about ``share * SECONDS`` after two warm-up turns.

    If one turn takes longer than that, it is the only warm-up, and three turns are timed. ``clock`` defaults to
    :func:`cold` on a GPU and :func:`warm` on a CPU, as in the tables.
    """
    clock = clock or (cold if CUDA else warm)
    begin = time.perf_counter()
    for run in contenders.values():
        clock(run)
    slow = time.perf_counter() - begin > share * SECONDS
    if not slow:
        for run in contenders.values():
            clock(run)
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    order, start, turns = list(contenders), time.perf_counter(), 0
    while turns < (3 if slow else min_turns) or time.perf_counter() - start < share * SECONDS:
        for name in order:
            times[name].append(clock(contenders[name]))
        order = order[1:] + order[:1]  # so that no contender always follows the same other one
        turns += 1
    return times


def compare_pairwise(
    contenders: Mapping[Name, Contender], *, share: float = 1.0, min_turns: int = 7, clock: Clock | None = None
) -> dict[Name, list[float]]:
    """Time the first contender with each of the others alone; see :func:`compare` for the arguments.

    Use it for contenders that slow down the one that follows, by gigabytes of activations or by changing the number of
    threads. Times are scaled to a common time of the first contender.
    """
    first, *others = contenders
    if not others:
        return compare(contenders, share=share, min_turns=min_turns, clock=clock)
    pairs = {
        name: compare({first: contenders[first], name: contenders[name]}, share=share, min_turns=min_turns, clock=clock)
        for name in others
    }
    own = pairs[others[0]][first]
    scales = {name: median(own) / median(pair[first]) for name, pair in pairs.items()}
    return {first: own} | {name: [scales[name] * turn for turn in pair[name]] for name, pair in pairs.items()}


def warm(run: Contender) -> float:
    """Time one call right after an untimed one, in seconds, including its work on the device.

    On a CPU the untimed call leaves its data in the caches and its threads awake. A call of more than 0.1 s gains
    nothing from that and is made only once.
    """
    if not CUDA:
        first = _seconds(run)
        return first if first > 0.1 else _seconds(run)
    _evict_caches()  # keeps the device busy while the host runs ahead, so that launch latency is not timed
    run()
    return _seconds_on_device(run)


def cold(run: Contender) -> float:
    """Time one call, in seconds, after evicting everything from the caches."""
    _evict_caches()
    return _seconds_on_device(run) if CUDA else _seconds(run)


def launched(run: Contender, calls: int = 20) -> float:
    """Time one call of a sequence of ``calls``, in seconds: the slower of host and device."""
    return _seconds_on_device(lambda: [run() for _ in range(calls)]) / calls


def _seconds(run: Contender) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _seconds_on_device(run: Contender) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _evict_caches() -> None:
    buffer = _larger_than_caches()
    if CUDA:
        buffer.zero_()
    else:
        buffer.sum()


@functools.cache
def _larger_than_caches() -> Tensor:
    """Allocate 256 MB on a GPU, or twice the size of the CPU's largest cache."""
    if CUDA:
        return torch.empty(64 << 20, device=DEVICE)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(file.read_text().strip().removesuffix("K")) << 10 for file in files]
    return torch.ones(2 * max(sizes, default=32 << 20) // 4)


def captured(contenders: Mapping[str, Contender]) -> dict[str, Contender] | None:
    """Capture each contender in a CUDA graph, and return the replays; None if one of them synchronises.

    No graph can capture a synchronisation, and a failed capture can leave PyTorch's allocator unusable. So each
    contender runs first in PyTorch's debug mode, which raises an error for it.
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
        side = torch.cuda.Stream()  # PyTorch asks for a warm-up on a side stream before a capture
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
