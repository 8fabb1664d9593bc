"""pairwise_mixup_loss, forward and forward + backward to the weight, against what a user could write and the limit.

E, the evaluations, are N(N+1)/2 * P*C*M: what symmetry leaves of N^2.
"""

import functools
import math
import subprocess
import sys
from dataclasses import astuple

import pytest
import torch

import mixfeat as mf
from mixfeat.ops import pairwise_mixup_block

from . import baselines, harness
from .harness import CUDA, DEVICE, Limit
from .results import Timing

ACTIVATION = mf.PolyReLU(8, 0.1)
PATCHES, FEATURES, CLASSES = 12, 20, 10
SAMPLES = (256, 1024, 4096) if CUDA else (256, 1024)
SLOW = ("eager", "mixing the inputs")


def make_inputs(samples, filters, runs=None):
    x = torch.randn(samples, PATCHES, FEATURES, device=DEVICE)
    shape = (CLASSES, filters, FEATURES) if runs is None else (runs, CLASSES, filters, FEATURES)
    w = torch.randn(shape, device=DEVICE) * (0.1 / math.sqrt(FEATURES))
    return x, w.requires_grad_(), torch.arange(samples, device=DEVICE) % CLASSES


def evaluations(samples, filters, runs=1):
    return runs * samples * (samples + 1) / 2 * PATCHES * CLASSES * filters


def limit(rates, samples, filters, direction):
    """The time of all evaluations at the rates of a loop in registers; None where those are not measured."""
    if not rates:
        return None
    count = evaluations(samples, filters)
    seconds = count / rates["forward"] + (count / rates["backward"] if direction != "forward" else 0)
    return Limit("arithmetic peak", seconds)


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

    one = "torch.compile on one thread"  # what it makes of this can be much slower on several
    functions = {"mixfeat": ours, "torch.compile": rows(compiled), one: rows(compiled, 1)}
    if samples <= 256:  # at 1024 the inputs' mixes alone would take 5 GB, several times over
        functions |= {"eager": rows(eager), "mixing the inputs": naive}
    losses = {name: float(f(False)) for name, f in functions.items()}
    assert all(loss == pytest.approx(losses["mixfeat"], rel=1e-5) for loss in losses.values()), losses
    gradients = {}
    for name, f in functions.items():
        f(True)
        gradients[name] = w.grad.clone()
    for gradient in gradients.values():
        assert (gradient - gradients["mixfeat"]).norm() <= 1e-3 * gradient.norm()
    rates = None if CUDA else harness.activation_rates(torch.get_num_threads())
    for backward, direction in ((False, "forward"), (True, "forward + backward")):
        runs = {name: functools.partial(f, backward) for name, f in functions.items()}
        # one by one: gigabytes of activations in between, and another number of threads, slow down who comes next
        pairs = {
            name: harness.compare(
                {"mixfeat": runs["mixfeat"], name: run}, share=0 if name in SLOW else 0.75, min_turns=5
            )
            for name, run in runs.items()
            if name != "mixfeat"
        }
        own = pairs["torch.compile"]["mixfeat"]
        # times as they would be if mixfeat had taken the same in every pair
        timings = {"mixfeat": own}
        for name, pair in pairs.items():
            scale = own.p50 / pair["mixfeat"].p50
            timings[name] = Timing(*(scale * seconds for seconds in astuple(pair[name])))
        single = timings.pop(one)
        if single.p50 < timings["torch.compile"].p50:
            timings["torch.compile"] = single
        measured = {name: run for name, run in runs.items() if name in timings}
        harness.record(
            capsys, "pairwise_mixup_loss", f"N={samples} {(PATCHES, FEATURES, CLASSES, 10)}", direction,
            timings=timings, memory=harness.peak_bytes(measured), work={"evaluations": evaluations(samples, 10)},
            limit=limit(rates, samples, 10, direction),
        )  # fmt: skip
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
    figures = {"threads": most, "times as fast as one": timing["one"].p50 / timing["all"].p50}
    harness.record(capsys, "pairwise_mixup_loss", "N=512", "threads", figures=figures)


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
            "operator": lambda: operator(x, detached, y, lam, lam_weight, polynomial, "", False, True),
            "kernel": lambda: pairwise_mixup_block(s, None, y, None, [0.5], [1 / 2500], polynomial, True),
        }
    )
    benchmark.pedantic(step, rounds=5)
    seconds = timing["step"].p50
    figures = {
        "ms": seconds * 1e3,
        "of its operator": seconds / timing["operator"].p50,
        "of its kernel": seconds / timing["kernel"].p50,
        "1e9 evaluations/s": evaluations(50, 5, 8) / seconds / 1e9,
    }
    harness.record(capsys, "pairwise_mixup_loss", "N=50 M=5 R=8", "training step", figures=figures)


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
    figures = {"times as fast as without": timing["all"].p50 / timing["skip"].p50}
    harness.record(capsys, "pairwise_mixup_loss", f"N=256, {data}", "skipping blocks", figures=figures)


@pytest.mark.skipif(CUDA or not sys.platform.startswith("linux"), reason="of the CPU; reads /proc")
def test_large(benchmark, capsys):
    """Memory grows with N, not with N^2: a step over 134 million pairs, in a process of its own."""
    code = (
        "import time, torch, mixfeat as mf\n"
        "x, y = torch.randn(16384, 12, 20), torch.arange(16384) % 10\n"
        "w = (torch.randn(10, 10, 20) * 0.02).requires_grad_()\n"
        "start = time.perf_counter()\n"
        "mf.pairwise_mixup_loss(x, w, y, mf.PolyReLU(8, 0.1)).backward()\n"
        "print(time.perf_counter() - start, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )

    def run():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    seconds, peak = map(float, benchmark.pedantic(run, rounds=1).split())
    figures = {"seconds": seconds, "GiB in all": peak / 2**20}
    harness.record(capsys, "pairwise_mixup_loss", "N=16384 (12, 20, 10, 10)", "forward + backward", figures=figures)
