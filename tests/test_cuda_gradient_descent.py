"""The CUDA kernel of gradient descent: run on the CPU thread by thread, compiled for every target, and run on a GPU."""

import ctypes
import functools
import hashlib
import json
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error

from mixfeat import cli, report
from mixfeat.activations import Identity, PolyReLU, Power, PowerReLU, ReLU
from mixfeat.kernels import cuda
from mixfeat.kernels.cpu.build import compiler
from mixfeat.kernels.cuda.gradient_descent import Layout, Problem, fits, gradient_descent, layout, mirrored

UNIFORM = ([0.93, 0.67, 0.33, 0.07], [0.17, 0.33, 0.33, 0.17])  # nearly: any nodes and weights will do


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Builds the kernel for the CPU, once for each set of macros."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")

    @functools.cache
    def build(kernel, macros):
        path = folder / f"{hashlib.sha256(repr((kernel, macros)).encode()).hexdigest()[:16]}.so"
        build_on_cpu("cuda_on_cpu.cpp", kernel, macros, path)
        return ctypes.CDLL(str(path))

    return build


def build_on_cpu(source, kernel, macros, path):
    command = [
        *compiler(), "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared", f"-DKERNEL={kernel}",
        f'-DKERNEL_FILE="{ROOT / "kernels" / "cuda" / kernel}.cu"', *(f"-D{name}={value}" for name, value in macros),
        str(Path(__file__).with_name(source)), "-o", str(path), "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True)


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
ACTIVATIONS = [PolyReLU(8, 0.3), PolyReLU(3, 0.3, clamp=False), PowerReLU(3), Power(2), Power(3), ReLU(), Identity()]


def check(result, x, w, y, activation, nodes, weights, lr, steps, momentum=0.0, weight_decay=0.0):
    trained, losses, _ = result
    truth, true_losses = reference(x, w, y, activation, nodes, weights, lr, steps, momentum, weight_decay)
    assert error([losses], [true_losses]) < 1e-5
    assert error([trained - w], [truth - w]) < 1e-5


@pytest.mark.parametrize("objective", ["erm", "odd"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_trains_as_autograd_does(run, objective, activation):
    x, w, y = problem(2, 7, 3, 5, 3, 2, scale=0.25)
    settings = (*OBJECTIVES[objective], 0.1, 3, 0.9, 0.01)
    check(gradient_descent(x, w, y, activation.polynomial, *settings, capability=90), x, w, y, activation, *settings)


# sizes, layout, degree: threads with several tasks, bands of rows, chunks of columns, groups of filters and patches
LAYOUTS = [
    ((1, 1, 1, 1, 1), None, 2),
    ((2, 3, 7, 4, 6), None, 5),
    ((17, 5, 4, 11, 7), Layout(3, 64, 21, 3, 4, 2), 6),
    ((17, 5, 4, 11, 7), Layout(3, 32, 36, 6, 4, 5), 9),
    ((13, 4, 9, 3, 2), Layout(2, 64, 9, 2, 2, 3), 12),
    ((13, 2, 9, 2, 6), Layout(5, 96, 9, 1, 3, 1), 15),
    ((12, 3, 8, 5, 1), Layout(4, 128, 5, 2, 1, 2), 16),
]


@pytest.mark.parametrize("objective", ["midpoint", "nodes"])
@pytest.mark.parametrize(("sizes", "chosen", "degree"), LAYOUTS)
def test_every_layout(run, objective, sizes, chosen, degree):
    check_orders(run, OBJECTIVES[objective], sizes, chosen, degree)


@pytest.mark.parametrize("chosen", [Layout(5, 32, 0, 4, 4, 2), Layout(2, 96, 0, 9, 7, 5)])
def test_every_layout_without_pairs(run, chosen):
    check_orders(run, OBJECTIVES["erm"], (17, 5, 4, 11, 7), chosen, 4)


def check_orders(run, objective, sizes, chosen, degree):
    """Exact to float32, and the same bits whichever thread comes first: so there are no races."""
    activation, settings = PolyReLU(degree, 0.3), (*objective, 0.5, 2, 0.5, 0.1)
    x, w, y = problem(2, *sizes, shared=False)
    results = []
    for seed in (1, 2):
        run(seed)
        results.append(gradient_descent(x, w, y, activation.polynomial, *settings, capability=90, chosen=chosen))
    check(results[0], x, w, y, activation, *settings)
    assert_equal(*results)


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


SIZES = (6, 2, 5, 3, 2)
MIDPOINT = (PolyReLU(4, 0.3).polynomial, [0.5], [1.0])


def test_a_network_that_leaves_the_finite_numbers_is_alone(run):
    x, w, y = problem(4, *SIZES, shared=False)
    lr = torch.tensor([[0.5], [1e30], [0.5], [0.5]])
    trained, losses, buffer = gradient_descent(x, w, y, *MIDPOINT, lr, 4, 0.9, capability=90)
    assert losses[1, 0].isfinite()
    assert losses[1, 2:].isnan().all()
    assert trained[1].isnan().all()
    for r in (0, 2, 3):
        alone = gradient_descent(x[r : r + 1], w[r : r + 1], y[r : r + 1], *MIDPOINT, 0.5, 4, 0.9, capability=90)
        assert_equal((trained[r : r + 1], losses[r : r + 1], buffer[r : r + 1]), alone)


@pytest.mark.parametrize("nodes", [([0.5], [1.0]), (None, None)], ids=["midpoint", "erm"])
def test_what_cannot_be_trained_is_nan(run, nodes):
    x, w, y = problem(6, *SIZES, shared=False)
    y[0, 3], y[1, 5] = 3, -1
    x[2, 1, 1, 4], x[3, 0, 0, 0], w[4, 2, 1, 0] = math.inf, math.nan, -math.inf
    trained, losses, _ = gradient_descent(x, w, y, MIDPOINT[0], *nodes, 0.5, 2, capability=90)
    assert trained[:5].isnan().all()
    assert losses[:5].isnan().all()
    assert trained[5].isfinite().all()


def test_goes_on_where_it_stopped(run):
    x, w, y = problem(2, *SIZES)
    lr = torch.rand(2, 5)
    whole = gradient_descent(x, w, y, *MIDPOINT, lr, 5, 0.9, 0.01, capability=90)
    middle, first, buffer = gradient_descent(x, w, y, *MIDPOINT, lr[:, :2], 2, 0.9, 0.01, capability=90)
    end, second, buffer = gradient_descent(x, middle, y, *MIDPOINT, lr[:, 2:], 3, 0.9, 0.01, buffer, capability=90)
    assert_equal(whole, (end, torch.cat([first, second], 1), buffer))


@pytest.mark.parametrize("shape", [(), (1, 3), (2, 1), (2, 3)])
def test_learning_rates(run, shape):
    x, w, y = problem(2, *SIZES)
    settings = ([0.5], [1.0], torch.rand(shape), 3)
    check(gradient_descent(x, w, y, MIDPOINT[0], *settings, capability=90), x, w, y, PolyReLU(4, 0.3), *settings)


def test_arguments_of_any_strides_and_dtype_are_left_alone(run):
    x, w, y = problem(2, *SIZES)
    x, w = x.bfloat16(), w.bfloat16()
    plain = (x.float(), w.float(), y)
    strided = (x.transpose(1, 3).contiguous().transpose(1, 3), w.mT.contiguous().mT, y.repeat_interleave(2, 1)[:, ::2])
    before = [tensor.clone() for tensor in strided]
    buffer = torch.rand(w.shape)
    results = [gradient_descent(*a, *MIDPOINT, 0.5, 2, 0.9, 0.0, buffer, capability=90) for a in (plain, strided)]
    assert_equal(*results)
    assert_equal(before, strided)


def test_no_steps_and_no_networks(run):
    x, w, y = problem(2, *SIZES)
    trained, losses, buffer = gradient_descent(x, w, y, *MIDPOINT, 0.5, 0, 0.9, capability=90)
    assert_equal((trained, buffer), (w, torch.zeros_like(w)))
    assert losses.shape == (2, 0)
    trained, losses, buffer = gradient_descent(x, w[:0], y, *MIDPOINT, 0.5, 3, capability=90)
    assert (trained.shape, losses.shape, buffer) == (w[:0].shape, (0, 3), None)


def test_mirrored_nodes_are_one():
    merged = mirrored([0.1, 0.5, 0.9, 1.0, 0.0], [0.2, 0.3, 0.1, 0.25, 0.15])
    assert list(merged) == pytest.approx([0.5, 0.9, 1.0])
    assert list(merged.values()) == pytest.approx([0.3, 0.3, 0.4])
    assert next(iter(mirrored([0.8, 0.5 - 1e-12], [0.5, 0.5]))) == 0.5


DEFAULT = Problem(50, 12, 20, 10, 5, (0.5,), False)


def test_fits():
    assert [fits(DEFAULT, capability) for capability in (80, 90, 100)] == [None] * 3
    assert fits(DEFAULT, 120) == "a network takes 134 KiB of shared memory, and sm_120 has 99"
    assert fits(DEFAULT._replace(num_patches=8), 120) is None
    assert fits(DEFAULT._replace(num_samples=0), 90) == "there is nothing to compute"
    assert "sm_75 is not among the GPUs" in fits(DEFAULT, 75)
    many = tuple(0.5 + k / 250 for k in range(101))
    assert fits(DEFAULT._replace(num_patches=1, nodes=many), 90) == "a step takes more than 100 passes"
    with pytest.raises(ValueError, match="a network takes"):
        layout(DEFAULT, 120)


def test_layouts_fit_and_cover_all_pairs():
    for capability, limit in cuda.SHARED_KIB.items():
        for nodes in ((0.5,), (0.6, 0.9), (0.5, 0.7), None):
            sizes = torch.tensor([60, 8, 40, 12, 9]) * torch.rand(5) + 1
            one = Problem(*map(int, sizes.tolist()), nodes, True)
            if fits(one, capability):
                continue
            chosen = layout(one, capability)
            assert chosen.shared_floats(one) <= limit * 256
            assert chosen.threads % 32 == 0
            side, passes = chosen.side(one), chosen.passes(one)
            for lam in nodes or ():
                bands = [band for band in passes if band.lam == lam]
                assert [band.first_row for band in bands[1:]] + [side] == [band.last_row for band in bands]
                assert sum(band.tiles for band in bands) == (side * (side + 1) // 2 if lam == 0.5 else side * side)
                assert max(band.tiles for band in bands) <= chosen.band_tiles


@pytest.fixture
def nvrtc():
    reason = cuda.unavailable()
    if reason:
        pytest.skip(reason)


def recorded(one, activation, capability):
    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    n, p, d, c, m, nodes, momentum = one
    weights = None if nodes is None else [1 / len(nodes)] * len(nodes)
    with cuda.record() as launches:
        gradient_descent(
            meta(1, n, p, d), meta(128, c, m, d), meta(1, n, dtype=torch.int64), activation.polynomial, nodes, weights,
            0.1, 10, 0.9 * momentum, capability=capability,
        )  # fmt: skip
    return launches[0]


@pytest.mark.parametrize("objective", ["midpoint", "nodes", "erm"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiles_without_spills(nvrtc, target, objective):
    pytest.importorskip("triton")  # has the disassembler
    (case,) = (one for one in report.shipped(target) if (one.kernel, one.direction) == ("gradient_descent", objective))
    row = report.compile_case(case, target)
    if cuda.nvrtc_version() >= (13, 0):
        assert (row.stack_bytes, row.local_loads, row.local_stores) == (0, 0, 0)
    else:  # older ones keep a few indices in memory
        assert row.stack_bytes <= 24
    assert row.registers <= 65536 // row.config["THREADS"] // 8 * 8
    assert row.shared_bytes <= cuda.SHARED_KIB[int(target[3:])] << 10
    assert not re.search(r"_f64|\.F64|\bD(ADD|MUL|FMA|SETP)\b", row.assembly), "float64 instructions"
    if (target, objective) == ("sm_90", "midpoint"):
        (logits, pairs), (gradient, unordered_pairs) = row.evaluation_loops()
        assert logits / pairs <= 7.0
        assert gradient / unordered_pairs <= 8.1
        assert (row.registers, row.config["THREADS"], row.shared_bytes) == (96, 640, 190988)


def test_is_in_the_report(nvrtc, tmp_path, capsys):
    pytest.importorskip("triton")
    file = tmp_path / "report.json"
    assert cli.main(["compile-report", "--targets=sm_90", "--kernels=gradient_descent", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())["kernels"]
    assert [row["direction"] for row in rows] == ["midpoint", "nodes", "erm"]
    assert 6 < rows[0]["instructions_per_evaluation"] <= 7
    assert "and NVRTC" in capsys.readouterr().out


def test_the_report_says_why_it_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(cuda, "unavailable", lambda: "no NVRTC")
    assert not any(case.kernel == "gradient_descent" for case in report.shipped("sm_90"))
    assert cli.main(["compile-report", "--targets=sm_90", "--kernels=gradient_descent"]) == 2
    assert "gradient_descent cannot be compiled here: no NVRTC" in capsys.readouterr().err


def test_keeps_what_it_compiled(nvrtc, tmp_path, monkeypatch):
    monkeypatch.setenv("MIXFEAT_CACHE", str(tmp_path))
    launch = recorded(Problem(2, 1, 1, 2, 1, None, False), ReLU(), capability=90)
    cubin = cuda.binary(launch.kernel, launch.constants, 90)
    assert cubin[:4] == b"\x7fELF"
    (path,) = (tmp_path / "cuda").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "compile", None)
        assert cuda.binary(launch.kernel, launch.constants, 90) == cubin
        with pytest.raises(TypeError):  # another degree, another kernel
            cuda.binary(launch.kernel, launch.constants | {"DEGREE": 3}, 90)
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("where the folder would be")
    assert cuda.binary(launch.kernel, launch.constants, 90) == cubin


def test_says_why_it_cannot_compile(nvrtc):
    with pytest.raises(cuda.CompileError, match=r"gradient_descent\.cu .*failed:(.|\n)*NUM_SAMPLES"):
        cuda.compile("gradient_descent", {}, 90)
    with pytest.raises(cuda.CompileError, match=r"NVRTC \d+\.\d+ does not compile for sm_999; it knows .*90"):
        cuda.compile("gradient_descent", {}, 999)


def test_needs_cuda_bindings_only_to_compile(run_python):
    code = """
import sys
sys.modules["cuda"] = None
from mixfeat.kernels import cuda
from mixfeat.kernels.cuda.gradient_descent import gradient_descent
assert "pip install 'mixfeat[cuda]'" in cuda.unavailable(), cuda.unavailable()
try:
    cuda.binary("gradient_descent", {}, 90)
except cuda.CompileError as error:
    print(error)
"""
    assert run_python(code).startswith("cuda-bindings cannot be imported: ")


def test_launches_through_the_driver(nvrtc, run_python, tmp_path, monkeypatch):
    """cuda-bindings launches by a driver that runs the kernel on the CPU."""
    monkeypatch.setenv("MIXFEAT_CACHE", str(tmp_path))
    arguments = (*problem(2, *SIZES), *MIDPOINT, 0.5, 3, 0.9)
    with cuda.record() as launches:
        gradient_descent(*arguments, capability=90)
    build_on_cpu("cuda_driver_on_cpu.cpp", launches[0].kernel, launches[0].constants.items(), tmp_path / "libcuda.so.1")
    cuda.binary(launches[0].kernel, launches[0].constants, 90)
    torch.save(arguments, tmp_path / "arguments")
    code = f"""
import contextlib, types, torch
from mixfeat.kernels import cuda
from mixfeat.kernels.cuda.gradient_descent import gradient_descent
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0x40)
cuda.capability = lambda device: 90
arguments = torch.load({str(tmp_path / "arguments")!r}, weights_only=False)
for _ in range(2):
    torch.save(gradient_descent(*arguments), {str(tmp_path / "results")!r})
"""
    run_python(code, fresh=True, LD_LIBRARY_PATH=str(tmp_path), MIXFEAT_CACHE=str(tmp_path))
    expected = reference(*arguments[:3], PolyReLU(4, 0.3), *arguments[4:], 0.0)
    trained, losses, _ = torch.load(tmp_path / "results")
    assert error([trained], [expected[0]]) < 1e-6
    assert error([losses], [expected[1]]) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gpu_trains_as_autograd_does(nvrtc, objective, activation):
    x, w, y = problem(3, 23, 4, 7, 5, 3, shared=False, scale=0.25)
    settings = (*OBJECTIVES[objective], 0.1, 4, 0.9, 0.01)
    results = [gradient_descent(x.cuda(), w.cuda(), y.cuda(), activation.polynomial, *settings) for _ in range(2)]
    assert_equal(*results)
    check([tensor.cpu() for tensor in results[0]], x, w, y, activation, *settings)


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "chosen", "degree"), [(tuple(DEFAULT[:5]), None, 8), *LAYOUTS])
def test_gpu_every_layout(nvrtc, sizes, chosen, degree):
    activation, settings = PolyReLU(degree, 0.3), ([0.5], [1.0], 0.5, 3)
    x, w, y = problem(2, *sizes)
    one = Problem(*sizes, (0.5,), False)
    reason = None if chosen else fits(one, cuda.capability(torch.device("cuda", torch.cuda.current_device())))
    if reason:
        pytest.skip(reason)
    result = gradient_descent(x.cuda(), w.cuda(), y.cuda(), activation.polynomial, *settings, chosen=chosen)
    check((result[0].cpu(), result[1].cpu(), None), x, w, y, activation, *settings)


@pytest.mark.gpu
def test_gpu_streams_graphs_and_threads(nvrtc):
    x, w, y = (tensor.cuda() for tensor in problem(2, *SIZES))
    expected = gradient_descent(x, w, y, *MIDPOINT, 0.5, 3)[:2]
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_equal(gradient_descent(x, w, y, *MIDPOINT, 0.5, 3)[:2], expected)
    with torch.cuda.graph(graph):
        captured = gradient_descent(x, w, y, *MIDPOINT, 0.5, 3)[:2]
    graph.replay()
    assert_equal(captured, expected)
    with ThreadPoolExecutor(1) as pool:  # a thread without a CUDA context
        assert_equal(pool.submit(gradient_descent, x, w, y, *MIDPOINT, 0.5, 3).result()[:2], expected)
