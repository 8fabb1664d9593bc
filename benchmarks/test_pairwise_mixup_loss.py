"""pairwise_mixup_loss, forward and forward + backward to the weight, against what a user could write and the limit.

E, the evaluations, are N(N+1)/2 * P*C*M: what symmetry leaves of N^2. ``pytest benchmarks`` prints a table.
"""

import functools
import math

import pytest
import torch

import mixfeat as mf
from benchmarks import baselines, harness
from mixfeat.ops import pairwise_mixup_block

ACTIVATION = mf.PolyReLU(8, 0.1)
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PATCHES, FEATURES, CLASSES = 12, 20, 10
SAMPLES = (256, 1024, 4096) if CUDA else (256, 1024)
SLOW = ("eager", "naive")


def make_inputs(samples, filters, runs=None):
    x = torch.randn(samples, PATCHES, FEATURES, device=DEVICE)
    shape = (CLASSES, filters, FEATURES) if runs is None else (runs, CLASSES, filters, FEATURES)
    w = torch.randn(shape, device=DEVICE) * (0.1 / math.sqrt(FEATURES))
    return x, w.requires_grad_(), torch.arange(samples, device=DEVICE) % CLASSES


def evaluations(samples, filters, runs=1):
    return runs * samples * (samples + 1) / 2 * PATCHES * CLASSES * filters


def limits(threads):
    """Evaluations a second of each direction; both together take the sum of their times. None where not measured."""
    if CUDA:
        return {"forward": None, "forward + backward": None}
    rates = harness.activation_rates(threads)
    both = 1 / (1 / rates["forward"] + 1 / rates["backward"])
    return {"forward": rates["forward"], "forward + backward": both}


@pytest.mark.parametrize("samples", SAMPLES)
def test_against_baselines(benchmark, capsys, samples):
    x, w, y = make_inputs(samples, filters=10)
    compiled = baselines.PairwiseRows(mode="max-autotune-no-cudagraphs" if CUDA else None)
    eager = baselines.PairwiseRows(compile=False)

    def ours(backward):
        w.grad = None
        with torch.set_grad_enabled(backward):
            loss = mf.pairwise_mixup_loss(x, w, y, ACTIVATION)
        if backward:
            loss.backward()
        return loss

    def naive(backward):
        w.grad = None
        with torch.set_grad_enabled(backward):
            loss = baselines.pairwise_naive(x, w, y, ACTIVATION)
        if backward:
            loss.backward()
        return loss

    most = torch.get_num_threads()

    def rows(f, threads=most):
        def run(backward):
            torch.set_num_threads(threads)
            loss = f(x, w, y, ACTIVATION, backward)
            torch.set_num_threads(most)
            return loss

        return run

    contenders = {"mixfeat": ours, "compile": rows(compiled), "compile on one thread": rows(compiled, 1)}
    if samples <= 256:  # at 1024 the naive way's activations alone would be 5 GB, several times over
        contenders |= {"eager": rows(eager), "naive": naive}
    losses = {name: float(f(False)) for name, f in contenders.items()}
    assert all(loss == pytest.approx(losses["mixfeat"], rel=1e-5) for loss in losses.values()), losses
    gradients = {}
    for name, f in contenders.items():
        f(True)
        gradients[name] = w.grad.clone()
    for gradient in gradients.values():
        assert (gradient - gradients["mixfeat"]).norm() <= 1e-3 * gradient.norm()
    limit = limits(torch.get_num_threads())
    for backward, direction in ((False, "forward"), (True, "forward + backward")):
        runs = {name: functools.partial(f, backward) for name, f in contenders.items()}
        # one by one: gigabytes of activations in between, and another number of threads, slow down who comes next
        pairs = {
            name: harness.compare(
                {"mixfeat": runs["mixfeat"], name: run}, seconds=0 if name in SLOW else 6, min_turns=5
            )
            for name, run in runs.items()
            if name != "mixfeat"
        }
        ms = pairs["compile"]["mixfeat"].p50
        ratios = {name: timing[name].p50 / timing["mixfeat"].p50 for name, timing in pairs.items()}
        # what torch.compile makes of it can be much slower on several threads than on one
        single = pairs.pop("compile on one thread")["compile on one thread"].p50 / ms
        ratios["compile"] = min(ratios["compile"], single)
        rate = evaluations(samples, 10) / ms
        row = {
            "shape": f"pairwise N={samples} {(PATCHES, FEATURES, CLASSES, 10)}",
            "direction": direction,
            "ms": ms * 1e3,
            **{f"x {name}": ratios[name] for name in pairs},
            "1e9 evaluations/s": rate / 1e9,
        }
        if limit[direction]:
            row["of arithmetic peak"] = rate / limit[direction]
        harness.record(capsys, row)
    benchmark.pedantic(lambda: ours(True), rounds=3)


@pytest.mark.skipif(CUDA, reason="threads of the CPU")
def test_threads(benchmark, capsys):
    x, w, y = make_inputs(512, filters=10)
    most = torch.get_num_threads()

    def step(threads):
        def run():
            torch.set_num_threads(threads)
            for _ in range(5):  # the first of them waits for threads to start
                mf.pairwise_mixup_loss(x, w, y, ACTIVATION).backward()

        return run

    try:
        timing = harness.compare({"one": step(1), "all": step(most)})
        benchmark.pedantic(step(most), rounds=3)
    finally:
        torch.set_num_threads(most)
    harness.record(
        capsys,
        {"shape": "pairwise N=512 threads", "threads": most, "x one thread": timing["one"].p50 / timing["all"].p50},
    )


def test_training_step(benchmark, capsys):
    """A step of eight of the paper's networks, beyond the operator with its gradients, and beyond its kernel alone."""
    x, w, y = make_inputs(50, filters=5, runs=8)
    polynomial, operator = ACTIVATION.polynomial, torch.ops.mixfeat.pairwise_mixup_loss.default
    lam, lam_weight, detached = torch.tensor([0.5]), torch.ones(1), w.detach()
    s = torch.einsum("npd,rcmd->rnpcm", x, detached).contiguous()

    def step():
        (grad,) = torch.autograd.grad(mf.pairwise_mixup_loss(x, w, y, ACTIVATION).sum(), w)
        with torch.no_grad():
            w.sub_(grad, alpha=1e-6)

    timing = harness.compare(
        {
            "step": step,
            "operator": lambda: operator(x, detached, y, lam, lam_weight, polynomial, False, True),
            "kernel": lambda: pairwise_mixup_block(s, None, y, None, [0.5], [1 / 2500], polynomial, True),
        }
    )
    benchmark.pedantic(step, rounds=5)
    ms = timing["step"].p50
    harness.record(
        capsys,
        {
            "shape": "pairwise step N=50 R=8",
            "ms": ms * 1e3,
            "of its operator": ms / timing["operator"].p50,
            "of its kernel": ms / timing["kernel"].p50,
            "1e9 evaluations/s": evaluations(50, 5, 8) / ms / 1e9,
        },
    )


def train(x, y, filters, steps, lr):
    w = (torch.randn(CLASSES, filters, x.shape[-1], device=DEVICE) * 0.05).requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(mf.pairwise_mixup_loss(x, w, y, ACTIVATION), w)
        with torch.no_grad():
            w.sub_(grad, alpha=lr)
    return w.detach()


@pytest.mark.skipif(CUDA, reason="of the CPU's kernel")
@pytest.mark.parametrize("data", ["random", "multi-view", "glyphs"])
def test_skipping(benchmark, capsys, data):
    """What it saves, or costs, to look for blocks that are zero or linear: on nothing to skip, on networks trained.

    Glyphs are images of 16 patches, of which a margin of 12 is blank: as digits on a page are.
    """
    samples = 256
    y = torch.arange(samples) % CLASSES
    if data == "random":
        x, w = torch.randn(samples, 12, 20), torch.randn(CLASSES, 10, 20) * 0.02
    elif data == "multi-view":
        problem = mf.data.multi_view(samples, CLASSES, 12, noise_scale=0.02, dtype=torch.float32)
        x, y = problem.input, problem.target
        w = train(x, y, 10, steps=500, lr=64.0)
    else:
        images = torch.zeros(samples, 1, 16, 16)
        images[..., 4:12, 4:12] = (torch.rand(CLASSES, 1, 8, 8) < 0.3).float()[y] + 0.1 * torch.rand(samples, 1, 8, 8)
        x = mf.data.images_to_patches(images / 4, 4)
        w = train(x, y, 10, steps=300, lr=1.0)
    s = torch.einsum("npd,cmd->npcm", x, w)[None].contiguous()
    grad = torch.empty_like(s)

    def run(skip):
        arguments = ([0.5], [1 / samples**2], *ACTIVATION.polynomial, grad, None)
        return lambda: torch.ops.mixfeat_cpu.pairwise_mixup_loss(s, None, y, None, *arguments, skip)

    assert run(True)().item() == pytest.approx(run(False)().item(), rel=1e-6)
    timing = harness.compare({"skip": run(True), "all": run(False)})
    benchmark.pedantic(run(True), rounds=3)
    harness.record(capsys, {"shape": f"pairwise skipping, {data}", "x without": timing["all"].p50 / timing["skip"].p50})
