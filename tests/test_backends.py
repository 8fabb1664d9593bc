"""Choice of the backend, and what it says of itself."""

import threading

import pytest
import torch
from conftest import error

import mixfeat as mf

CALL = (
    "import torch, mixfeat as mf; print(mf.patch_conv(torch.ones(2, 3, 4), torch.ones(2, 2, 4), mf.PolyReLU()).sum())"
)


def test_best_available_serves():
    assert mf.backends.available()[-2:] == ("cpu", "reference")
    assert mf.backends.serving("cpu") == "cpu"
    assert mf.backends.serving("mps") == "reference"


def test_choice_is_for_the_block_and_the_thread():
    with mf.backend("reference"):
        assert mf.backends.serving("cpu") == "reference"
        with mf.backend("cpu"):
            assert mf.backends.serving("cpu") == "cpu"
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(mf.backends.serving("cpu")))
        thread.start()
        thread.join()
        assert mf.backends.serving("cpu") == "reference"
    assert elsewhere == ["cpu"]
    assert mf.backends.serving("cpu") == "cpu"


def test_choice_changes_what_runs():
    x, w = torch.randn(9, 3, 4), torch.randn(2, 2, 4, requires_grad=True)
    seen = []
    for name in ("cpu", "reference"):
        with mf.backend(name), torch.profiler.profile() as profile:
            logits = mf.patch_conv(x, w, mf.PolyReLU())
        logits.sum().backward()  # by the default backend, whoever ran forward
        seen.append((logits.detach(), w.grad))
        w.grad = None
        assert any(event.name == "mixfeat_cpu::patch_conv" for event in profile.events()) == (name == "cpu")
    assert error(*seen) <= 1e-5


@pytest.mark.parametrize("name", ["cudnn", "", None])
def test_refuses_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference, got"), mf.backend(name):
        pass


def test_backward_is_served_as_forward_was(monkeypatch):
    """Also after the block."""
    x, w = torch.randn(3, 2, 4, requires_grad=True), torch.randn(2, 1, 4)
    index, lam = torch.tensor([1, 2, 0]), torch.tensor(0.5)
    calls = []
    for name in ("patch_conv_backward", "mixup_backward"):
        formula = getattr(mf.ops.fallback, name)
        monkeypatch.setattr(mf.ops.fallback, name, lambda *a, f=formula, n=name, **k: calls.append(n) or f(*a, **k))
    losses = {}
    for backend in ("reference", "cpu"):
        with mf.backend(backend):
            losses[backend] = mf.patch_conv(x, w, mf.ReLU()).sum() + mf.mixup(x, index, lam).sum()
    losses["cpu"].backward()
    assert not calls
    losses["reference"].backward()
    assert sorted(calls) == ["mixup_backward", "patch_conv_backward"]


@pytest.mark.skipif("triton" in mf.backends.available(), reason="a GPU is here")
def test_refuses_backend_that_is_not_here():
    with pytest.raises(ValueError, match="backend 'triton' is not available here: triton"), mf.backend("triton"):
        pass


def test_refuses_tensors_that_the_chosen_backend_does_not_serve():
    with mf.backend("cpu"), pytest.raises(ValueError, match="backend 'cpu' does not serve meta tensors"):
        mf.backends.serving("meta")


def test_environment(run_python):
    assert "reference" in run_python(
        "import mixfeat as mf; print(mf.backends.serving('cpu'))", MIXFEAT_BACKEND="reference"
    )
    refused = run_python(CALL, check=False, MIXFEAT_BACKEND="gpu")
    assert "MIXFEAT_BACKEND must be one of cuda, triton, cpu, reference, got 'gpu'" in refused


def test_import_is_light(run_python):
    """Neither kernels nor what only experiments need; all that on demand."""
    heavy = ("triton", "torch._dynamo", "matplotlib", "sqlite3", "mixfeat.experiments")
    heavy += ("mixfeat.kernels.cpu", "mixfeat.kernels.triton")
    new = run_python(
        "import sys, torch; before = set(sys.modules); import mixfeat; print(*(set(sys.modules) - before))",
        fresh=True,
    ).split()
    assert "mixfeat.functional" in new
    assert not [name for name in new if name.startswith(heavy)]


def test_describes_itself():
    facts = mf.backends.describe()
    assert facts["backends"]["cpu"] == facts["backends"]["reference"] == "available"
    assert facts["CPU library"].startswith("libmixfeat_cpu-")  # no folder: these facts are published with results
    assert facts["CPU library's instruction set"] in ("avx512_bf16", "avx512", "avx2", "generic")
    assert facts["C++ compiler"]


def test_works_without_triton(run_python):
    output = run_python(
        "import sys; sys.modules['triton'] = None\n" + CALL + "\nprint(mf.backends.describe()['backends']['triton'])"
    )
    assert "tensor(" in output
    assert "triton cannot be imported" in output
