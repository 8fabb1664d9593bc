"""The CPU library: what is compiled into it, how it is built, installed, and done without."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

from mixfeat.kernels import cpu
from mixfeat.kernels.cpu.build import SOURCE, compiler, instruction_sets, kernel_flags

CALL = (
    "import torch, mixfeat as mf; print(mf.patch_conv(torch.ones(2, 3, 4), torch.ones(2, 2, 4), mf.PolyReLU()).sum())"
)


def shared_symbols(instruction_set, folder, sources):
    """Compile kernels; return the weak symbols outside the instruction set's namespace: inline functions, templates.

    The linker keeps one copy of each, from any object. At -O0 the compiler emits them all; optimisation hides them.
    """

    def compiled(source):
        target = folder / f"{source.stem}.{instruction_set}.o"
        flags = [*kernel_flags(instruction_set), "-O0", f"-I{SOURCE / 'isa'}"]
        subprocess.run([*shlex.split(compiler()), *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    listing = subprocess.run(["nm", "--demangle", *objects], capture_output=True, text=True, check=True).stdout
    lines = [line.split(maxsplit=2) for line in listing.splitlines() if line[:1].isalnum() and " " in line]
    names = [name for _, kind, name in lines if kind in "WVu"]  # weak, weak data, unique
    return [name for name in names if f"mixfeat::{instruction_set}::" not in name.partition("(")[0]]


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
@pytest.mark.parametrize("instruction_set", instruction_sets())
def test_kernels_share_no_code(tmp_path, instruction_set):
    """A processor without AVX-512 must not run the AVX-512 copy of, for instance, std::min."""
    sources = sorted(SOURCE.glob("isa/*.cpp"))
    assert sources
    assert shared_symbols(instruction_set, tmp_path, sources) == []


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_shared_code_is_found(tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text(
        """
        #include <algorithm>
        #include "simd.h"
        inline int64_t inline_function(int64_t x) { return x; }
        int64_t planted(int64_t a, int64_t b) { return std::min(a, inline_function(mixfeat::max(a, b))); }
        """
    )
    found = shared_symbols("generic", tmp_path, [source])
    names = {name.partition("(")[0].partition("<")[0].split()[-1] for name in found}
    assert names == {"inline_function", "std::min"}


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
