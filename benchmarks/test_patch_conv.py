"""patch_conv, forward + backward to the weight, against what a user could write; and the cost of a call itself."""

import math
import statistics
import time

import pytest
import torch

import mixfeat as mf
from mixfeat import reference

from . import baselines, harness
from .harness import CUDA, DEVICE, Limit

ACTIVATION = mf.PolyReLU(8, 0.1)
SHAPES = {
    "patches": (8192 if CUDA else 1024, 16, 64, 10, 16),
    "paper": (256, 12, 20, 10, 10),
    "image": (256, 196, 768, 10, 16),
}
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_training_step(benchmark, capsys, name, dtype):
    samples, patches, features, classes, filters = shape = SHAPES[name]
    x = torch.randn(samples, patches, features, device=DEVICE, dtype=dtype)
    w = torch.randn(classes, filters, features, device=DEVICE, dtype=dtype) * (0.1 / math.sqrt(features))
    w.requires_grad_()
    grad = torch.randn(samples, classes, device=DEVICE, dtype=dtype)

    def step(f):
        return lambda: torch.autograd.grad(f(x, w, ACTIVATION), w, grad)

    functions = {
        "mixfeat": mf.patch_conv,
        "torch.compile": baselines.compiled("max-autotune-no-cudagraphs" if CUDA else None),
        "best eager": baselines.eager,
        "the authors' way": baselines.naive,
    }
    truth = reference.patch_conv(x[:64].double(), w.double(), ACTIVATION)
    for f in functions.values():  # nothing is timed that is wrong
        error = (f(x, w, ACTIVATION)[:64].double() - truth).norm() / truth.norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.1)
    contenders = {key: step(f) for key, f in functions.items()}
    timings = harness.compare(contenders)
    benchmark.pedantic(contenders["mixfeat"], rounds=5)
    products = 2 * samples * patches * features * classes * filters  # forward and weight gradient; slopes are kept
    harness.record(
        capsys, "patch_conv", f"{name} {shape}", "forward + backward", dtype=dtype,
        timings=timings, memory=harness.peak_bytes(contenders), work={"multiply-adds": products},
        limit=Limit("matrix rate", products / harness.matrix_rate(dtype)),
    )  # fmt: skip


@pytest.mark.skipif(CUDA, reason="launches there are asynchronous")
def test_host_overhead(benchmark, capsys):
    """One call with autograd on tiny tensors, beyond the C++ work it ends in."""
    x, w = torch.randn(2, 3, 4), torch.randn(2, 2, 4, requires_grad=True)
    detached = w.detach()
    with mf.backend("cpu"):  # has it loaded
        mf.patch_conv(x, w, ACTIVATION)
    native = torch.ops.mixfeat_cpu.patch_conv.default

    def loop(run, calls=50):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls * 1e6

    contenders = {
        "call": lambda: mf.patch_conv(x, w, ACTIVATION),
        "native": lambda: native(x, detached, None, None, *ACTIVATION.polynomial, 2),
    }
    turns = [{key: loop(run) for key, run in contenders.items()} for _ in range(400)]
    overhead = statistics.median(turn["call"] - turn["native"] for turn in turns)
    benchmark.pedantic(contenders["call"], rounds=50, iterations=50)
    native_time = statistics.median(turn["native"] for turn in turns)
    figures = {"us of C++": native_time, "us of Python and autograd": overhead}
    harness.record(capsys, "patch_conv", "tiny", "one call, forward", figures=figures)
