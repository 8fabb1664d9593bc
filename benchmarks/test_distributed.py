"""The all-pairs loss over ranks of a process group on a CPU, each with one thread: strong and weak scaling, bytes sent.

Run as a module, this file is a rank: it joins the group, and then takes a step for every line of its standard input.
"""

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import mixfeat as mf
from mixfeat.ops import sharding

from .harness import Case
from .timing import compare, medians, warm

PATCHES, PATCH_DIM, CLASSES, FILTERS = 12, 20, 10, 10
ACTIVATION = mf.PolyReLU(8, 0.1)


def step_of(num_samples: int) -> Callable[[], object]:
    """Run forward, and backward to the weight, for this rank's share of ``num_samples`` samples."""
    torch.manual_seed(0)
    shape = (num_samples, PATCHES, PATCH_DIM)
    x, y = torch.randn(shape), torch.randint(CLASSES, (num_samples,))
    w = (torch.randn(CLASSES, FILTERS, PATCH_DIM) * (0.1 / math.sqrt(PATCH_DIM))).requires_grad_()
    group: Literal["world"] | None = None
    if dist.is_initialized():
        group, rank, ranks = "world", dist.get_rank(), dist.get_world_size()
        mine = slice(num_samples * rank // ranks, num_samples * (rank + 1) // ranks)
        x, y = x[mine], y[mine]
    return lambda: torch.autograd.grad(mf.pairwise_mixup_loss(x, w, y, ACTIVATION, group=group), w)


@contextmanager
def ranks_of(count: int, num_samples: int) -> Iterator[tuple[Callable[[], None], list[int]]]:
    """Start ``count`` ranks; yield a function that takes a step on all, and the bytes of floats that each sends."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mixfeat.benchmarks.test_distributed"]
        arguments = [str(count), str(num_samples), str(Path(folder, "rendezvous"))]
        # as the documentation advises: keep freed memory, so that the system need not zero it anew in every step
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TOP_PAD_": str(2**26)}
        processes = [
            subprocess.Popen(
                [*command, str(rank), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment,
            )
            for rank in range(count)
        ]  # fmt: skip

        def replies() -> list[str]:
            lines = [process.stdout.readline() for process in processes if process.stdout]
            if not all(lines):
                raise RuntimeError("a rank has died")
            return lines

        def step() -> None:
            for process in processes:
                assert process.stdin
                process.stdin.write("go\n")
                process.stdin.flush()
            replies()

        try:
            yield step, [int(line) for line in replies()]
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def time_groups(counts: Sequence[int], sizes: Mapping[int, int]) -> tuple[dict[int, list[float]], dict[int, list[int]]]:
    """Time a step of each group, in turn; return seconds, and bytes sent by each rank, by the number of ranks."""
    with ExitStack() as stack:
        groups = {count: stack.enter_context(ranks_of(count, sizes[count])) for count in counts}
        times = compare({count: step for count, (step, _) in groups.items()}, clock=warm)
    return times, {count: sent for count, (_, sent) in groups.items()}


def min_bytes(ranks: int, num_samples: int) -> float:
    """Count the bytes that a rank must send on average: samples for half of all pairs of ranks, and their gradients.

    For each pair of ranks at least one shard travels. Half of the other travels too if the two ranks share their pairs
    of samples, as they do across an even ring.
    """
    shards = (ranks - 1) / 2 if ranks % 2 else ranks / 2 - 1 / 4
    return 2 * shards * num_samples / ranks * PATCHES * CLASSES * FILTERS * 4 if ranks > 1 else 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="times processes on a CPU")
@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_scaling(bench, scaling):
    """Time groups of 1, 2 and 4 ranks; ranks beyond the number of cores share cores and cannot add speed."""
    counts = [1, 2, 4]
    sizes = {count: 1024 if scaling == "strong" else round(724 * math.sqrt(count)) for count in counts}
    times, sent = time_groups(counts, sizes)
    seconds = medians(times)
    figures = {"cores": os.cpu_count(), "one rank, ms": float(f"{1e3 * seconds[1]:.3g}")}
    for count in counts[1:]:
        work = sizes[count] * (sizes[count] + 1) / (sizes[1] * (sizes[1] + 1))
        figures[f"{count} ranks, speedup"] = float(f"{work * seconds[1] / seconds[count]:.3g}")
        mean = sum(sent[count]) / count
        figures[f"{count} ranks, MB sent by each"] = float(f"{mean / 1e6:.3g}")
        figures[f"{count} ranks, bytes over the least possible"] = float(f"{mean / min_bytes(count, sizes[count]):.3g}")
    case = ", ".join(f"{count}: {size}" for count, size in sizes.items())
    named = {f"ranks = {count}": turns for count, turns in times.items()}
    bench.record(Case("pairwise_mixup_loss", f"ranks: N = {case}", f"{scaling} scaling"), named, figures=figures)


def run_rank(rank: int, ranks: int, num_samples: int, rendezvous: str) -> None:
    """Join the group, print the bytes that one step sends, then take a step per line of standard input."""
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[rank % len(cores)]])
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    step, sent = step_of(num_samples), 0
    send = sharding._Transfer.send

    def counted(self, peer, *tensors):
        nonlocal sent
        sent += sum(tensor.nbytes for tensor in tensors if tensor.is_floating_point())
        send(self, peer, *tensors)

    with mock.patch.object(sharding._Transfer, "send", counted):
        step()
    print(sent, flush=True)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


if __name__ == "__main__":
    rank, ranks, num_samples, rendezvous = sys.argv[1:]
    run_rank(int(rank), int(ranks), int(num_samples), rendezvous)
