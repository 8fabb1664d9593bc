"""Choice of the backend, and the CPU library's ways to be there or not."""

import os
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
import torch
from conftest import ROOT

import mixfeat as mf
from mixfeat.kernels import cpu
from mixfeat.kernels.cpu.build import compiler

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
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("name", ["cuda", "", None])
def test_refuses_unknown_backend(name):
    with pytest.raises(ValueError, match="backend must be one of triton, cpu, reference, got"), mf.backend(name):
        pass


def test_backward_is_served_as_forward_was(monkeypatch):
    """Also after the block."""
    x, w = torch.randn(3, 2, 4, requires_grad=True), torch.randn(2, 1, 4)
    index, lam = torch.tensor([1, 2, 0]), torch.tensor(0.5)
    calls = []
    for name in ("patch_conv_backward", "mixup_backward"):
        formula = getattr(mf.reference, name)
        monkeypatch.setattr(mf.reference, name, lambda *a, f=formula, n=name, **k: calls.append(n) or f(*a, **k))
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
    assert "MIXFEAT_BACKEND must be one of triton, cpu, reference, got 'gpu'" in refused


def test_import_is_light(run_python):
    """Neither kernels nor what only experiments need; all that on demand."""
    heavy = ("triton", "torch._dynamo", "matplotlib", "sqlite3", "mixfeat.experiments")
    heavy += ("mixfeat.kernels.cpu", "mixfeat.kernels.triton")
    new = run_python(
        "import sys, torch; before = set(sys.modules); import mixfeat; print(*(set(sys.modules) - before))"
    ).split()
    assert "mixfeat.functional" in new
    assert not [name for name in new if name.startswith(heavy)]


def test_describes_itself():
    facts = mf.backends.describe()
    assert facts["backends"]["cpu"] == facts["backends"]["reference"] == "available"
    assert facts["CPU library"].startswith("libmixfeat_cpu-")  # no folder: these facts are published with results
    assert facts["CPU library's instruction set"] in ("avx512", "avx2", "generic")
    assert facts["C++ compiler"]


# In the tests below the library beside the sources is hidden, as after an installation under build isolation.
HIDE = "from mixfeat.kernels import cpu; cpu._built_ahead = lambda: None\n"


@pytest.fixture
def quick_compiler(tmp_path_factory):
    """A compiler that leaves out what takes it most of the time."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler())} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


def test_builds_at_first_use_once(tmp_path, quick_compiler):
    """Four processes at once: all get the library, one builds it, nothing else stays behind."""
    code = HIDE + "from mixfeat.kernels.cpu import build\n"
    code += "real = build.build\ndef logged(*a):\n    print('building'); return real(*a)\nbuild.build = logged\n" + CALL
    env = {**os.environ, "MIXFEAT_CACHE": str(tmp_path), "CXX": quick_compiler}
    run = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in run]
    assert [process.returncode for process in run] == [0] * 4
    assert sum("building" in output for output in outputs) == 1
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted([cpu.library_name(), "lock"])


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (looked for no-such-compiler; set CXX to name one)"),
        ({"CXX": "false"}, "building the CPU library failed"),
        ({"MIXFEAT_CACHE": "/dev/null/cache"}, "the CPU library could not be built in /dev/null/cache"),
    ],
    ids=["no compiler", "broken compiler", "no cache"],
)
def test_falls_back_with_one_warning(tmp_path, run_python, environment, reason):
    output = run_python(HIDE + CALL + "\n" + CALL, check=False, **{"MIXFEAT_CACHE": str(tmp_path), **environment})
    assert output.count("tensor(") == 2
    assert output.count("mixfeat falls back to plain PyTorch on cpu tensors") == 1
    assert reason in output


def test_works_without_triton(run_python):
    output = run_python(
        "import sys; sys.modules['triton'] = None\n" + CALL + "\nprint(mf.backends.describe()['backends']['triton'])"
    )
    assert "tensor(" in output
    assert "triton cannot be imported" in output


def test_wheel_holds_all_it_needs(tmp_path, quick_compiler):
    """Library and sources, kernels under mixfeat.kernels, the type marker; built in a copy, to leave the tree alone."""
    for name in ("benchmarks", "kernels", "mixfeat"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        tmp_path,
        tmp_path,
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CXX": quick_compiler})
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "none-any" not in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mixfeat").rglob("*.py")}
    mapped = [p for folder in ("benchmarks", "kernels") for p in (ROOT / folder).rglob("*")]
    sources = {f"mixfeat/{p.relative_to(ROOT).as_posix()}" for p in mapped if p.suffix in (".py", ".cpp", ".h")}
    assert modules | sources <= names
    assert {"mixfeat/py.typed", f"mixfeat/kernels/cpu/{cpu.library_name()}"} <= names
    # installed by pip, which sets files' times as it likes, and without a compiler
    installed = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, wheel]
    subprocess.run(command, check=True)
    code = "import mixfeat as mf; print(mf.__file__, mf.backends.available())"
    environment = os.environ | {"PYTHONPATH": str(installed), "CXX": "no-such-compiler"}
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", env=environment, capture_output=True, text=True
    ).stdout
    assert str(installed) in output
    assert "'cpu'" in output
