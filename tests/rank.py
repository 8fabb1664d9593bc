"""What a rank of a process group does, as tests/test_distributed.py starts it."""

import datetime
import os
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mixfeat as mf
from mixfeat.benchmarks.harness import peak_on_cpu
from mixfeat.ops import sharding

POLY = mf.PolyReLU(8, 0.1)


def problem(num_samples, patches=4, features=6, classes=5, filters=3, *, runs="", dtype=torch.float32):
    """The same random problem on every rank; runs: which of "x", "w", "y" have R = 2."""
    x = torch.randn(*[2] * ("x" in runs), num_samples, patches, features, dtype=torch.float64)
    w = torch.randn(*[2] * ("w" in runs), classes, filters, features, dtype=torch.float64) * 0.1 / features**0.5
    y = torch.randint(classes, (*[2] * ("y" in runs), num_samples))
    return x.to(dtype), w.to(dtype), y


def part_of(sizes):
    begin = sum(sizes[: dist.get_rank()])
    return slice(begin, begin + sizes[dist.get_rank()])


def value_and_grads(x, w, y, **options):
    x, w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    loss = mf.pairwise_mixup_loss(x, w, y, POLY, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()


def averaged(t):
    """As DistributedDataParallel does it."""
    t = t.clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


def accuracy():
    """Loss and gradients are those of one process with all samples; twice the same bits; on all ranks the same loss."""
    ranks = dist.get_world_size()
    shards = {
        "equal": [9] * ranks, "uneven": [8 + r % 2 for r in range(ranks)], "none but one": [0] * (ranks - 1) + [7],
        "one each": [1] * ranks, "very different": [7 * r for r in range(ranks)], "none": [0] * ranks,
    }  # fmt: skip
    nodes: list[dict[str, Any]] = [
        {"lam": 0.5},
        {"lam": 0.3},
        dict(zip(("lam", "lam_weight"), mf.beta_quadrature(0.4, 4), strict=True)),
    ]
    cases = [(sizes, runs, options) for sizes in shards.values() for runs in ("", "xwy") for options in nodes]
    cases += [(shards["uneven"], runs, nodes[2]) for runs in ("x", "w", "xy")]
    for dtype, budget, piece in ((torch.float32, 1e-5, 256), (torch.float64, 1e-13, 2)):
        sharding._PIECE = piece  # 2: shards travel in pieces
        for sizes, runs, options in cases:
            x, w, y = problem(sum(sizes), runs=runs, dtype=dtype)
            truth, x_truth, w_truth = value_and_grads(x, w, y, **options)
            mine = part_of(sizes)
            arguments = x[..., mine, :, :], w, y[..., mine]
            found = value_and_grads(*arguments, **options, group="world")
            again = value_and_grads(*arguments, **options, group=dist.group.WORLD)
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            loss, x_grad, w_grad = found
            assert error(loss, truth) <= budget
            assert error(x_grad / ranks, x_truth[..., mine, :, :]) <= budget
            assert error(averaged(w_grad), w_truth) <= budget
            losses = [torch.empty_like(loss) for _ in range(ranks)]
            dist.all_gather(losses, loss)
            assert all(torch.equal(loss, other) for other in losses)
    value = mf.pairwise_mixup_loss(*arguments, POLY, **options, group="world")  # and without gradients
    assert torch.equal(value, loss)


def large():
    """Samples by the hundred, so that shards travel in pieces; strided; half precision; no gradient of the weight."""
    ranks = dist.get_world_size()
    sizes = [300 + 5 * r for r in range(ranks)]
    x, w, y = problem(sum(sizes), 2, 5, 3, 2)
    mine = part_of(sizes)
    strided = torch.stack([x, x], -1)[..., 0]
    truth = mf.pairwise_mixup_loss(x, w, y, POLY)
    for input, dtype in ((strided, torch.float32), (strided.bfloat16(), torch.bfloat16)):
        leaf = input.detach()[mine].requires_grad_()
        loss = mf.pairwise_mixup_loss(leaf, w.to(dtype), y[mine], POLY, group="world")
        (grad,) = torch.autograd.grad(loss, leaf)
        single = value_and_grads(input, w.to(dtype), y)
        assert error(loss, single[0]) <= 1e-5
        assert error(grad / ranks, single[1][mine]) <= (1e-5 if dtype == torch.float32 else 5e-3)
        assert error(loss, truth) <= (1e-5 if dtype == torch.float32 else 2e-2)


def data_parallel():
    """A few steps under DistributedDataParallel, also compiled, are those of one process with all samples."""

    class Objective(nn.Module):
        def __init__(self, model, loss):
            super().__init__()
            self.model, self.loss = model, loss

        def forward(self, input, target):
            return self.loss(self.model, input, target)

    sizes = [11, 6, 0, 9][: dist.get_world_size()]
    x, w, y = problem(sum(sizes))
    mine = part_of(sizes)

    def trained(wrap, input, target, group):
        model = mf.TwoLayerPatchCNN(5, 3, 6, POLY)
        model.weight.data.copy_(w)
        objective = wrap(Objective(model, mf.PairwiseMixupLoss(group=group)))
        optimizer = torch.optim.SGD(model.parameters(), lr=8.0, momentum=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            objective(input, target).backward()
            optimizer.step()
        return model.weight.detach()

    expected = trained(lambda module: module, x, y, None)
    assert error(expected, w) > 1e-2
    parallel = nn.parallel.DistributedDataParallel
    within, around = torch.compile(fullgraph=True, backend="aot_eager"), torch.compile(backend="aot_eager")
    for wrap in (parallel, lambda module: parallel(within(module)), lambda module: around(parallel(module))):
        assert error(trained(wrap, x[mine], y[mine], "world"), expected) <= 1e-5


def subgroups():
    """Groups that are a part of the processes: what they are told comes out, and who is not in one is told so."""
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    rank = dist.get_rank()
    mine, other = groups[rank % 2], groups[1 - rank % 2]
    x, w, y = problem(10)
    half = slice(0, 5) if mine.rank() == 0 else slice(5, 10)
    loss = mf.pairwise_mixup_loss(x[half], w, y[half], POLY, group=mine)
    assert error(loss, mf.pairwise_mixup_loss(x, w, y, POLY)) <= 1e-5
    with pytest.raises(ValueError, match="group must be one of which this process is a member"):
        mf.pairwise_mixup_loss(x, w, y, POLY, group=other)


def memory():
    """What a rank holds at once is so many times the pre-activations of its shard, of however many shards there are.

    Pre-activations, gradient, the gradient of one piece, the kernel's packed copies of both, and pieces of others.
    """
    sharding._PIECE = 64
    sizes = [256] * dist.get_world_size()
    x, w, y = problem(sum(sizes), 4, 2, 10, 8)
    mine = part_of(sizes)
    x, w = x[mine], w.requires_grad_()
    mf.pairwise_mixup_loss(x, w, y[mine], POLY, group="world").backward()
    most = peak_on_cpu(lambda: mf.pairwise_mixup_loss(x, w, y[mine], POLY, group="world").backward())
    shard = 4 * 256 * 4 * 10 * 8
    assert most < 7.5 * shard, most / shard


def refusals():
    """What is wrong on one rank is told to all, by name; afterwards the group still works."""
    rank = dist.get_rank()
    x, w, y = problem(8)

    def refused(kind, message, *arguments, **options):
        with pytest.raises(kind, match=message):
            mf.pairwise_mixup_loss(*arguments, **options, group="world")

    def odd(usual, other):
        return other if rank == 1 else usual

    differ = "must be the same on all ranks"
    lams = r"\[0.5\] on rank 0, 2, \[0.25\] on rank 1"
    refused(ValueError, f"^lam {differ} of group, got {lams}$", x, w, y, POLY, lam=odd(0.5, 0.25))
    refused(ValueError, f"activation {differ}", x, w, y, odd(POLY, mf.PolyReLU(7, 0.1)))
    refused(ValueError, f"num_patches {differ}", x[:, : odd(4, 3)], w, y, POLY)
    refused(ValueError, f"patch_dim {differ}", x[..., : odd(6, 5)], w[..., : odd(6, 5)], y, POLY)
    refused(ValueError, f"num_classes {differ}", x, w[: odd(5, 4)], y % 4, POLY)
    refused(ValueError, f"filters_per_class {differ}", x, w[:, : odd(3, 2)], y, POLY)
    refused(ValueError, f"num_runs {differ}", odd(x, x.expand(2, -1, -1, -1)), w, y, POLY)
    double = odd(torch.float32, torch.float64)
    refused(ValueError, f"dtype {differ}.*torch.float64 on rank 1", x.to(double), w.to(double), y, POLY)
    refused(ValueError, f"whether gradients are wanted {differ}", x.requires_grad_(rank == 1), w, y, POLY)
    x = x.detach()
    told = odd((ValueError, "^rank 1 refused its arguments .ValueError: input"), (ValueError, "^input must"))
    refused(*told, odd(x, x[0]), w, y, POLY)
    told = odd((ValueError, "rank 1 refused its arguments .IndexError: target"), (IndexError, "^target must lie in"))
    refused(*told, x, w, odd(y, y + 100), POLY)
    told = odd((ValueError, "rank 1 refused its arguments .TypeError"), (TypeError, "activation must be"))
    refused(*told, x, w, y, odd(POLY, torch.relu))
    with pytest.raises(ValueError, match=r"group must serve cuda, where input is, by nccl .*; got (no backend|gloo)"):
        sharding.agree(sharding.group_name("world"), 1, {"device": "cuda"}, lambda: None)
    loss = mf.pairwise_mixup_loss(x, w, y, POLY, group="world")
    assert error(loss, mf.pairwise_mixup_loss(x.repeat(3, 1, 1), w, y.repeat(3), POLY)) <= 1e-5


def death():
    """A rank dies in the middle of a step: the others end with an error, soon."""
    x, w, y = problem(30)
    mf.pairwise_mixup_loss(x, w.requires_grad_(), y, POLY, group="world").backward()
    if dist.get_rank() == 1:
        sharding._fetch = lambda *_: os._exit(0)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="lost contact to another rank of group, which died, failed, or took longer"):
        mf.pairwise_mixup_loss(x, w, y, POLY, group="world")
    assert time.monotonic() - begin < 30
    os._exit(0)  # the group cannot be taken down in order


def delay():
    """A rank that does not come: the others wait no longer than the group's timeout."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    x, w, y = problem(5)
    mf.pairwise_mixup_loss(x, w, y, POLY, group=group)
    if dist.get_rank() == 1:
        time.sleep(6)
    else:
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="took longer than the group's timeout"):
            mf.pairwise_mixup_loss(x, w, y, POLY, group=group)
        assert time.monotonic() - begin < 5
    os._exit(0)


def run(case: str, rank: int, ranks: int, rendezvous: str, seed: int) -> None:
    """Run a function of this module as one rank of so many."""
    warnings.filterwarnings("error", module="mixfeat", category=UserWarning)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    globals()[case]()
    dist.barrier()
    dist.destroy_process_group()
