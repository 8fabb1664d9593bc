"""The CUDA kernel of gradient descent, without a GPU: run on the CPU, thread by thread, and compiled for every target."""

import ctypes
import functools
import hashlib
import math
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error

from mixfeat.activations import Identity, PolyReLU, Power, PowerReLU, ReLU
from mixfeat.kernels import cuda
from mixfeat.kernels.cpu.build import compiler
from mixfeat.kernels.cuda.gradient_descent import Layout, Problem, fits, gradient_descent, layout

KERNEL = ROOT / "kernels" / "cuda" / "gradient_descent.cu"
UNIFORM = ([0.93, 0.67, 0.33, 0.07], [0.17, 0.33, 0.33, 0.17])  # nearly: any nodes and weights will do


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Builds the kernel for the CPU, once for each set of macros."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")

    @functools.cache
    def build(kernel, macros):
        path = folder / f"{hashlib.sha256(repr((kernel, macros)).encode()).hexdigest()[:16]}.so"
        command = [
            compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared", f"-DKERNEL={kernel}",
            f'-DKERNEL_FILE="{KERNEL.with_name(kernel)}.cu"', *(f"-D{name}={value}" for name, value in macros),
            str(Path(__file__).with_name("cuda_on_cpu.cpp")), "-o", str(path),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(path))

    return build


@pytest.fixture
def run(library, monkeypatch):
    """Makes launches run on the CPU; returns a setter of the seed that draws the threads' order."""
    seed = 0

    def launch(one):
        parameters = one.parameters()
        addresses = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
        built = library(one.kernel, tuple(one.constants.items()))
        assert built.run(addresses, one.blocks, one.threads, seed) == 0

    def reseed(value):
        nonlocal seed
        seed = value

    monkeypatch.setattr(cuda, "run", launch)
    return reseed


def reference(x, w, y, activation, nodes, weights, lr, steps, momentum, weight_decay):
    """Each network trained alone in float64 by torch.optim.SGD: weights, and losses before each update."""
    trained, losses = [], []
    for r in range(len(w)):
        input, target = x[r if len(x) > 1 else 0].double(), y[r if len(y) > 1 else 0]
        weight = w[r].double().clone().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum, weight_decay=weight_decay)
        rates = torch.as_tensor(lr, dtype=torch.float64).expand(len(w), steps)[r]
        for rate in rates.tolist():
            optimizer.param_groups[0]["lr"] = rate
            loss = objective(input, weight, target, activation, nodes, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        trained.append(weight.detach())
    return torch.stack(trained), torch.stack(losses).view(len(w), steps)


def objective(x, w, y, activation, nodes, weights):
    s = torch.einsum("npd,cmd->npcm", x, w)
    if nodes is None:
        return torch.nn.functional.cross_entropy(activation(s).sum((1, 3)), y)
    loss = torch.zeros((), dtype=torch.float64)
    n = len(y)
    for lam, weight in zip(nodes, weights, strict=True):
        g = activation(lam * s[:, None] + (1 - lam) * s[None]).sum((2, 4)).flatten(0, 1)
        both = [
            torch.nn.functional.cross_entropy(g, target.flatten())
            for target in (y[:, None].expand(n, n), y[None].expand(n, n))
        ]
        loss = loss + weight * (lam * both[0] + (1 - lam) * both[1])
    return loss


def problem(num_runs, num_samples, num_patches, patch_dim, num_classes, filters, *, shared=True, scale=0.4):
    x = torch.randn(1 if shared else num_runs, num_samples, num_patches, patch_dim)
    w = torch.randn(num_runs, num_classes, filters, patch_dim) * scale / math.sqrt(patch_dim)
    return x, w, torch.randint(num_classes, x.shape[:2])


OBJECTIVES = {
    "erm": (None, None),
    "midpoint": ([0.5], [1.0]),
    "nodes": UNIFORM,
    "odd": ([0.9, 0.5, 0.1], [0.3, 0.4, 0.3]),
}
ACTIVATIONS = [PolyReLU(8, 0.3), PolyReLU(3, 0.3, clamp=False), PowerReLU(3), Power(2), Power(5), ReLU(), Identity()]


def check(result, x, w, y, activation, nodes, weights, lr, steps, momentum=0.0, weight_decay=0.0):
    trained, losses, _ = result
    truth, true_losses = reference(x, w, y, activation, nodes, weights, lr, steps, momentum, weight_decay)
    assert error([losses], [true_losses]) < 1e-5
    assert error([trained - w], [truth - w]) < 1e-5


@pytest.mark.parametrize("objective", ["erm", "odd"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_trains_as_autograd_does(run, objective, activation):
    x, w, y = problem(2, 7, 3, 5, 3, 2)
    settings = (*OBJECTIVES[objective], 0.1, 3, 0.9, 0.01)
    check(gradient_descent(x, w, y, activation.polynomial, *settings, capability=90), x, w, y, activation, *settings)


# sizes, layout: threads that own several tasks, bands of rows, chunks of columns, groups of filters and of patches
LAYOUTS = [
    ((1, 1, 1, 1, 1), None),
    ((2, 3, 7, 4, 6), None),
    ((17, 5, 4, 11, 7), Layout(3, 64, 21, 3, 4, 2)),
    ((17, 5, 4, 11, 7), Layout(3, 32, 36, 6, 4, 5)),
    ((13, 4, 9, 3, 2), Layout(2, 64, 9, 2, 2, 3)),
    ((13, 2, 9, 2, 6), Layout(5, 96, 9, 1, 3, 1)),
    ((12, 3, 8, 5, 1), Layout(4, 128, 5, 2, 1, 2)),
]


@pytest.mark.parametrize("objective", ["midpoint", "nodes"])
@pytest.mark.parametrize(("sizes", "chosen"), LAYOUTS)
def test_every_layout(run, objective, sizes, chosen):
    activation, settings = PolyReLU(4, 0.3), (*OBJECTIVES[objective], 0.5, 2, 0.5, 0.1)
    x, w, y = problem(2, *sizes, shared=False)
    results = []
    for seed in (1, 2):
        run(seed)
        results.append(gradient_descent(x, w, y, activation.polynomial, *settings, capability=90, chosen=chosen))
    check(results[0], x, w, y, activation, *settings)
    for one, other in zip(*results, strict=True):  # whichever thread comes first
        torch.testing.assert_close(one, other, rtol=0, atol=0)
