"""pairwise_mixup_loss and a training step of eight networks against what a user could write and the limit."""

import functools
import math
import subprocess
import sys

import pytest
import torch

import mixfeat as mf
from mixfeat.ops.pairwise_mixup_loss import pairwise_mixup_block

from . import baselines, harness, peers
from .limits import Work, network_work
from .shapes import FORWARD, NETWORKS, Network, cases, named
from .timing import CUDA, DEVICE, Contender, compare, medians, warm

ACTIVATION = mf.PolyReLU(8, 0.1)
#: The batch of many samples is for patch_conv, whose work does not grow with pairs.
NAMES = [name for name in NETWORKS if name != "patches"]
CASES = cases(NAMES, ("paper-10", "image"), ("forward + backward",)) + cases(FORWARD, FORWARD[:2], ("forward",))


def make_inputs(shape, runs=None):
    samples, patches, patch_dim, classes, filters = shape
    x = torch.randn(samples, patches, patch_dim, device=DEVICE)
    w = torch.randn((*([runs] if runs else []), classes, filters, patch_dim), device=DEVICE) * (
        0.1 / math.sqrt(patch_dim)
    )
    return x, w.requires_grad_(), torch.arange(samples, device=DEVICE) % classes


def on_threads(run, threads):
    """Run ``run`` on a number of the CPU's threads."""

    def limited():
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return limited


def fastest(run):
    """Choose all threads or one, whichever is faster: compiled code can be much slower on several threads."""
    if CUDA:
        return run
    one = on_threads(run, 1)
    return min((run, one), key=lambda contender: min(warm(contender) for _ in range(3)))


def affordable(shape, dtype):
    """Choose baselines beside the compiled one: eager if it is quick enough, naive if its mixes fit in memory."""
    if dtype != torch.float32:
        return []
    samples, patches, patch_dim, classes, filters = shape
    names = ["best eager"] if shape.pair_evaluations <= (5e9 if CUDA else 5e7) else []
    mixes = 4 * samples**2 * patches * (patch_dim + classes * filters)
    return names + (["naive"] if mixes <= (5e9 if CUDA else 5e8) else [])


@pytest.mark.parametrize(("name", "dtype", "direction"), CASES)
def test_operator(bench, name, dtype, direction):
    shape = NETWORKS[name]
    x, w, y = make_inputs(shape)
    x, w = x.to(dtype), w.detach().to(dtype).requires_grad_()
    backward = direction != "forward"
    rows = {"torch.compile": baselines.PairwiseRows(), "best eager": baselines.PairwiseRows(compile=False)}
    contenders: dict[str, Contender] = {
        "mixfeat": harness.directed(direction, lambda: mf.pairwise_mixup_loss(x, w, y, ACTIVATION), w),
        **{key: functools.partial(f, x, w, y, ACTIVATION, backward) for key, f in rows.items()},
        "naive": harness.directed(direction, lambda: baselines.pairwise_naive(x, w, y, ACTIVATION), w),
    }
    contenders = {key: contenders[key] for key in ("mixfeat", "torch.compile", *affordable(shape, dtype))}
    reduces = direction == "forward" and dtype == torch.float32 and name in named("paper-10")
    others, missing = peers.gather(peers.PAIRS if reduces else {})
    for key, f in {**others, **baselines.AGAINST}.items():
        contenders[key] = harness.directed(direction, functools.partial(f, x, w, y, ACTIVATION), w)
    exact = w.detach().float().requires_grad_()
    truth = harness.directed(direction, lambda: mf.pairwise_mixup_loss(x.float(), exact, y, ACTIVATION), exact)
    harness.check(contenders, truth(), dtype)
    contenders["torch.compile"] = fastest(contenders["torch.compile"])
    work = network_work(
        direction, dtype, products=shape.products, evaluations=shape.pair_evaluations,
        bytes=x.nbytes + w.nbytes * (1 + backward),
    )  # fmt: skip
    case = harness.Case("pairwise_mixup_loss", f"{name} {tuple(shape)}", direction, dtype)
    bench(case, contenders, work=work, pairwise=True, missing=missing)


@pytest.mark.parametrize("degree", [2, 3])
def test_power(bench, degree):
    """Time monomials, whose pairs the binomial theorem makes a matrix product."""
    shape, direction = NETWORKS.get("paper-10", next(iter(NETWORKS.values()))), "forward + backward"
    x, w, y = make_inputs(shape)
    formulas = {
        "mixfeat": mf.pairwise_mixup_loss,
        "binomial, compiled": baselines.compiled(baselines.pairwise_binomial),
        "binomial": baselines.pairwise_binomial,
    }
    activation = mf.Power(degree)
    contenders = {
        key: harness.directed(direction, functools.partial(f, x, w, y, activation), w) for key, f in formulas.items()
    }
    case = harness.Case("pairwise_mixup_loss", f"paper-10, z^{degree} {tuple(shape)}", direction)
    truth = harness.truth(case, "weight", input=x, weight=w, target=y, activation=activation)
    harness.check(contenders, truth, torch.float32)
    bench(case, contenders, work=Work({"evaluations": shape.pair_evaluations}))


def test_training_step(bench):
    """Train the paper's networks all at once, against one by one; compare the step to its operator and kernel."""
    shape, runs = Network(50, 12, 20, 10, 5), 128 if CUDA else 8
    x, w, y = make_inputs(shape, runs)
    polynomial, operator = ACTIVATION.polynomial, torch.ops.mixfeat.pairwise_mixup_loss.default
    lam, lam_weight, detached = torch.tensor([0.5]), torch.ones(1), w.detach()
    arguments = (x, detached, None, y, lam, lam_weight, None, polynomial, 0.0, "all", 0, "")
    s = torch.einsum("npd,rcmd->rnpcm", x, detached).contiguous()

    def ours():
        return torch.autograd.grad(mf.pairwise_mixup_loss(x, w, y, ACTIVATION).sum(), w)[0]

    def rows(f):
        return lambda: torch.stack([f(x, network, y, ACTIVATION, True) for network in detached])

    def naive():
        losses = [baselines.pairwise_naive(x, network, y, ACTIVATION) for network in w]
        return torch.autograd.grad(torch.stack(losses).sum(), w)[0]

    def batched():
        return torch.autograd.grad(baselines.batched_loss(x, w, y, ACTIVATION, 0.5), w)[0]

    gradients = {
        "mixfeat": ours,
        "torch.compile": rows(baselines.PairwiseRows(rows=25)),
        "batched, compiled": baselines.compiled(batched),
        "best eager": rows(baselines.PairwiseRows(rows=25, compile=False)),
        "naive": naive,
    }
    harness.check(gradients, ours(), torch.float32)
    gradients |= {name: fastest(gradients[name]) for name in ("torch.compile", "batched, compiled")}

    def step(gradient):
        return lambda: detached.sub_(gradient(), alpha=1e-6)

    contenders = {key: step(gradient) for key, gradient in gradients.items()}
    parts = medians(
        compare({
            "step": contenders["mixfeat"],
            "operator": lambda: operator(*arguments, False, True, False),
            "kernel": lambda: pairwise_mixup_block(s, None, y, None, [0.5], [1 / 2500], polynomial, True),
        })
    )  # fmt: skip
    figures = {f"over the time of its {part}": parts["step"] / parts[part] for part in ("operator", "kernel")}
    work = network_work(
        "training step", torch.float32, products=runs * shape.products, evaluations=runs * shape.pair_evaluations,
        bytes=x.nbytes + 2 * w.nbytes,
    )  # fmt: skip
    case = harness.Case("pairwise_mixup_loss", f"paper-10, R={runs} {tuple(shape)}", "training step")
    bench(case, contenders, work=work, pairwise=True, figures=lambda _: figures)


def train(x, y, filters, steps, lr):
    w = (torch.randn(10, filters, x.shape[-1]) * 0.05).requires_grad_()
    for _ in range(steps):
        (grad,) = torch.autograd.grad(mf.pairwise_mixup_loss(x, w, y, ACTIVATION), w)
        with torch.no_grad():
            w.sub_(grad, alpha=lr)
    return w.detach()


@pytest.mark.skipif(CUDA, reason="the CPU's kernel")
@pytest.mark.parametrize("data", ["random", "multi-view", "glyphs"])
def test_skipping(bench, data):
    """Compare the kernel with and without skipping of zero and linear blocks, on random and on trained networks.

    Random networks have nothing to skip. Glyphs are images of 16 patches, 12 of which are a blank margin.
    """
    samples = 256
    y = torch.arange(samples) % 10
    if data == "random":
        x, w = torch.randn(samples, 12, 20), torch.randn(10, 10, 20) * 0.02
    elif data == "multi-view":
        problem = mf.data.multi_view(samples, 10, 12, noise_scale=0.02, dtype=torch.float32)
        x, y = problem.input, problem.target
        w = train(x, y, 10, steps=500, lr=64.0)
    else:
        images = torch.zeros(samples, 1, 16, 16)
        images[..., 4:12, 4:12] = (torch.rand(10, 1, 8, 8) < 0.3).float()[y] + 0.1 * torch.rand(samples, 1, 8, 8)
        x = mf.data.images_to_patches(images / 4, 4)
        w = train(x, y, 10, steps=300, lr=1.0)
    s = torch.einsum("npd,cmd->npcm", x, w)[None].contiguous()
    grad = torch.empty_like(s)

    def run(skip):
        arguments = ([0.5], [1 / samples**2], ACTIVATION.polynomial, grad, None, [0.5], 0.0, 0, None, None)
        return lambda: torch.ops.mixfeat_cpu.pairwise_mixup_loss(s, None, y, None, *arguments, skip)

    assert run(True)().item() == pytest.approx(run(False)().item(), rel=1e-6)
    times = compare({"skip": run(True), "all": run(False)})
    typical = medians(times)
    figures = {"speedup by skipping": typical["all"] / typical["skip"]}
    bench.record(harness.Case("pairwise_mixup_loss", f"N=256, {data}", "skipping blocks"), times, figures=figures)


@pytest.mark.skipif(CUDA or not sys.platform.startswith("linux"), reason="the CPU's kernel; reads /proc")
def test_large(bench):
    """Take a step over 134 million pairs in a process of its own: memory grows with N, not with N^2."""
    code = (
        "import time, torch, mixfeat as mf\n"
        "x, y = torch.randn(16384, 12, 20), torch.arange(16384) % 10\n"
        "w = (torch.randn(10, 10, 20) * 0.02).requires_grad_()\n"
        "start = time.perf_counter()\n"
        "mf.pairwise_mixup_loss(x, w, y, mf.PolyReLU(8, 0.1)).backward()\n"
        "print(time.perf_counter() - start, open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, peak = map(float, process.stdout.split())
    figures = {"time, s": seconds, "memory in all, GiB": peak / 2**20}
    case = harness.Case("pairwise_mixup_loss", "N=16384 (12, 20, 10, 10)", "forward + backward")
    bench.record(case, {"mixfeat": [seconds]}, figures=figures)
