"""The all-pairs loss over ranks of a process group on a CPU, each with one thread: strong and weak scaling, bytes sent.

Run as a module, this file is a rank: it forms its group, and then takes a step for every line that it reads.
"""

import math
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mixfeat as mf
from mixfeat.ops import sharding

PATCHES, FEATURES, CLASSES, FILTERS = 12, 20, 10, 10
ACTIVATION = mf.PolyReLU(8, 0.1)


def step_of(num_samples):
    """Forward and backward to the weight, of this rank's share of so many samples."""
    torch.manual_seed(0)
    shape = (num_samples, PATCHES, FEATURES)
    x, y = torch.randn(shape), torch.randint(CLASSES, (num_samples,))
    w = (torch.randn(CLASSES, FILTERS, FEATURES) * (0.1 / math.sqrt(FEATURES))).requires_grad_()
    group = None
    if dist.is_initialized():
        group, rank, ranks = "world", dist.get_rank(), dist.get_world_size()
        mine = slice(num_samples * rank // ranks, num_samples * (rank + 1) // ranks)
        x, y = x[mine], y[mine]
    return lambda: torch.autograd.grad(mf.pairwise_mixup_loss(x, w, y, ACTIVATION, group=group), w)


@contextmanager
def ranks_of(count, num_samples):
    """A step of ``count`` processes, as something to be called, and the bytes of floats that each sends for it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mixfeat.benchmarks.test_distributed"]
        arguments = [str(count), str(num_samples), str(Path(folder, "rendezvous"))]
        # as the documentation advises: freed memory is kept, not handed back and cleared anew in every step
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TOP_PAD_": str(2**26)}
        processes = [
            subprocess.Popen(
                [*command, str(rank), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env=environment,
            )
            for rank in range(count)
        ]  # fmt: skip

        def answers():
            lines = [process.stdout.readline() for process in processes]
            if not all(lines):
                raise RuntimeError("a rank has died")
            return lines

        def step():
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            answers()

        try:
            yield step, [int(line) for line in answers()]
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def figures_of(counts, sizes):
    """Seconds, and bytes sent by each rank, of groups that take turns."""
    from . import harness

    with ExitStack() as stack:
        groups = {count: stack.enter_context(ranks_of(count, sizes[count])) for count in counts}
        times = harness.compare({str(count): step for count, (step, _) in groups.items()}, clock=harness.warm)
    return {count: times[str(count)].p50 for count in counts}, {count: sent for count, (_, sent) in groups.items()}


def least_bytes(ranks, num_samples):
    """That a rank must send on average: half of all pairs of ranks' samples, and as many gradients.

    Of two shards one travels at least, and half of the other where their ranks share the pairs (half of an even ring).
    """
    shards = (ranks - 1) / 2 if ranks % 2 else ranks / 2 - 1 / 4
    return 2 * shards * num_samples / ranks * PATCHES * CLASSES * FILTERS * 4 if ranks > 1 else 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="of processes on a CPU, not a GPU")
@pytest.mark.parametrize("scaling", ["strong", "weak"])
def test_scaling(benchmark, capsys, scaling):
    """With more ranks than cores they share the cores: then the most that can be reached is the number of cores."""
    from . import harness

    counts = [1, 2, 4]
    sizes = {count: 1024 if scaling == "strong" else round(724 * math.sqrt(count)) for count in counts}
    seconds, sent = benchmark.pedantic(figures_of, (counts, sizes), rounds=1)
    figures = {"cores": os.cpu_count(), "ms of one rank": float(f"{1e3 * seconds[1]:.3g}")}
    for count in counts[1:]:
        work = sizes[count] * (sizes[count] + 1) / (sizes[1] * (sizes[1] + 1))
        figures[f"{count} ranks: work in the same time"] = float(f"{work * seconds[1] / seconds[count]:.3g}")
        mean = sum(sent[count]) / count
        figures[f"{count} ranks: MB sent by each, on average"] = float(f"{mean / 1e6:.3g}")
        figures[f"{count} ranks: of the least"] = float(f"{mean / least_bytes(count, sizes[count]):.3g}")
    case = ", ".join(f"{count}: {size}" for count, size in sizes.items())
    harness.record(capsys, "pairwise_mixup_loss", f"ranks: N = {case}", f"{scaling} scaling", figures=figures)


def run_rank(rank, ranks, num_samples, rendezvous):
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

    sharding._Transfer.send = counted
    step()
    sharding._Transfer.send = send
    print(sent, flush=True)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


if __name__ == "__main__":
    rank, ranks, num_samples, rendezvous = sys.argv[1:]
    run_rank(int(rank), int(ranks), int(num_samples), rendezvous)
