"""The CPU library: what is compiled into it, how it is built, installed, and done without."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
from conftest import ROOT

import mixfeat as mf
from mixfeat.kernels import cpu
from mixfeat.kernels.cpu import build
from mixfeat.kernels.cpu.build import (
    SOURCE,
    BuildError,
    compiler,
    instruction_sets,
    kernel_flags,
    kernel_sources,
)

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
        subprocess.run([*compiler(), *flags, "-c", source, "-o", target], check=True)
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
    sources = kernel_sources(instruction_set)
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


# In the tests below the library beside the sources is hidden, as where the package was installed without it.
HIDE = "from mixfeat.kernels import cpu; cpu._built_ahead = lambda: None\n"
SERVED = HIDE + "import mixfeat as mf; print('served by', mf.backends.serving('cpu'))"


def script(path, text):
    """Write a shell script that can be run."""
    path.write_bytes(b"#!/bin/sh\n" + (text if isinstance(text, bytes) else text.encode()) + b"\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stand_in(tmp_path_factory):
    """A compiler that logs its arguments, compiles nothing and links by copying the library of these tests."""
    folder = tmp_path_factory.mktemp("compiler")
    text = f"""
        echo "begin $*" >> {folder}/log
        for output; do :; done
        case " $* " in
          *" --version "*) echo a stand-in ;;
          *" -shared "*) cp {cpu.library_path()} "$output" ;;
          *) : > "$output" ;;
        esac
        echo end >> {folder}/log"""
    return Path(script(folder / "c++", text))


def compilations(stand_in):
    return [line for line in (stand_in.parent / "log").read_text().splitlines() if " -c " in line]


def test_builds_at_first_use_once(tmp_path, stand_in):
    """Four processes at once: all get the library, one builds it, nothing else stays behind."""
    text = f'case " $* " in *" -shared "*) sleep 2 ;; esac\nexec {stand_in} "$@"'
    slow = script(stand_in.with_name("slow-c++"), text)
    code = HIDE + "from mixfeat.kernels.cpu import build\n"
    code += "real = build.build\ndef logged(*a):\n    print('building'); return real(*a)\nbuild.build = logged\n" + CALL
    env = {**os.environ, "MIXFEAT_CACHE": str(tmp_path), "CXX": slow}
    ended = processes.run(*["import warnings; warnings.simplefilter('error')\n" + code] * 4, environment=env)
    assert [process.status for process in ended] == [0] * 4
    assert sum("building" in process.stdout for process in ended) == 1
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == sorted([cpu.library_name(), "lock"])


@pytest.mark.parametrize(
    ("cxx", "words"),
    [
        ("{cxx}", ["{cxx}"]),
        ("{cxx} -DA -I 'b c'", ["{cxx}", "-DA", "-I", "b c"]),
        ("{env} {cxx} -DA", ["{env}", "{cxx}", "-DA"]),
        ("'{blank}' -DA", ["{blank}", "-DA"]),
        ("{blank}", ["{blank}"]),
        ("", ["{cxx}"]),
        (" \t", ["{cxx}"]),
        ("c++ -DA", ["{cxx}", "-DA"]),
        ("./c++", ["{cxx}"]),
    ],
)
def test_compiler_is_a_command(monkeypatch, stand_in, cxx, words):
    """As make understands it; and a path with blanks, unquoted, is itself."""
    names = {"cxx": str(stand_in), "env": shutil.which("env"), "blank": str(stand_in.with_name("c++ 13"))}
    shutil.copy(stand_in, names["blank"])
    monkeypatch.setenv("CXX", cxx.format_map(names))
    monkeypatch.setenv("PATH", str(stand_in.parent))
    monkeypatch.chdir(stand_in.parent)
    assert compiler() == [word.format_map(names) for word in words]


def test_flags_reach_every_compilation(tmp_path, run_python, stand_in):
    wrapper = script(tmp_path / "ccache", 'case "$1" in -*) exit 1 ;; esac\nexec "$@"')
    environment = {"CXX": f"{wrapper} '{stand_in}' -DMY_FLAG", "MIXFEAT_CACHE": str(tmp_path / "cache")}
    assert "served by cpu" in run_python(SERVED, **environment)
    assert len(compilations(stand_in)) > len(instruction_sets())
    assert all(line.startswith("begin -DMY_FLAG ") for line in compilations(stand_in))
    other = environment["CXX"] + " -DANOTHER"  # is not served by what the first command built
    assert "served by cpu" in run_python(SERVED, **environment | {"CXX": other})
    assert any("-DANOTHER" in line for line in compilations(stand_in))


@pytest.mark.parametrize(("value", "jobs"), [("1", 1), ("7", 7), (" 3 ", 3)])
def test_max_jobs(monkeypatch, value, jobs):
    monkeypatch.setenv("MAX_JOBS", value)
    assert build.max_jobs() == jobs


@pytest.mark.parametrize("value", [None, "", "0", "-1", "many", "1.5"])
def test_max_jobs_is_left_to_ninja(monkeypatch, value):
    monkeypatch.setenv("MAX_JOBS", value) if value is not None else monkeypatch.delenv("MAX_JOBS", raising=False)
    assert build.max_jobs() is None


def test_max_jobs_bounds_the_compilers(monkeypatch, tmp_path, stand_in):
    monkeypatch.setenv("CXX", str(stand_in))
    monkeypatch.setenv("MAX_JOBS", "1")
    build.build(tmp_path, tmp_path)
    log = [line.split()[0] for line in (stand_in.parent / "log").read_text().splitlines()]
    assert log == ["begin", "end"] * (len(log) // 2)


def test_cache_path_of_any_bytes(tmp_path, run_python, stand_in):
    name = os.fsdecode(bytes(set(range(1, 256)) - set(b"/")))
    assert "served by cpu" in run_python(SERVED, CXX=str(stand_in), MIXFEAT_CACHE=str(tmp_path / name))
    assert len(list((tmp_path / name).glob("*/libmixfeat_cpu-*.so"))) == 1


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for given, xdg, folder in [
        ("~", None, "home"),
        ("~/kernels", None, "home/kernels"),
        ("kernels", None, "kernels"),
        ("", "", "home/.cache/mixfeat"),
        (None, None, "home/.cache/mixfeat"),
        (None, str(tmp_path / "xdg"), "xdg/mixfeat"),
        (None, "relative", "home/.cache/mixfeat"),  # which the specification of XDG_CACHE_HOME has ignored
    ]:
        for name, value in [("MIXFEAT_CACHE", given), ("XDG_CACHE_HOME", xdg)]:
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert cpu.cache_directory() == tmp_path / folder


@pytest.mark.parametrize("given", [None, "", "~", "~no-such-user/cache"])
def test_without_a_home_folder(monkeypatch, given):
    def unknown(user):
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "MIXFEAT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv("MIXFEAT_CACHE", given)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(BuildError, match=r"no folder to build the CPU library in: .*; set MIXFEAT_CACHE to a folder"):
        cpu.cache_directory()


@pytest.mark.parametrize(
    ("cxx", "reason"),
    [
        ('g++ "', "CXX is not a command: No closing quotation, got 'g++ \"'; set it as in CXX='ccache g++'"),
        ("''", "no C++ compiler found (looked for ; set CXX to name one)"),
        ("{tmp}/data -O2", "CXX names '{tmp}/data', which is not an executable file; set CXX to a C++ compiler"),
        ("{tmp}", "CXX names '{tmp}', which is not an executable file; set CXX to a C++ compiler"),
        ("{tmp}/garbage", "{tmp}/garbage cannot be run: Exec format error; set CXX to a C++ compiler"),
    ],
)
def test_unusable_compiler(monkeypatch, tmp_path, cxx, reason):
    (tmp_path / "data").touch()
    (tmp_path / "garbage").write_bytes(b"\x7fELF")
    (tmp_path / "garbage").chmod(0o755)
    monkeypatch.setenv("CXX", cxx.replace("{tmp}", str(tmp_path)))
    assert mf.backends.describe()["C++ compiler"] == reason.replace("{tmp}", str(tmp_path))
    with pytest.raises(BuildError):
        cpu._built_at_first_use()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler found (looked for no-such-compiler; set CXX to name one)"),
        ({"CXX": "false"}, "false could not build it"),
        ({"CXX": "{tmp}/latin"}, "\nerreur \\xe9trange\n"),
        ({"MIXFEAT_CACHE": "/dev/null/cache"}, "the CPU library could not be built in /dev/null/cache"),
        ({"MIXFEAT_CACHE": "x" * 5000}, "File name too long; set MIXFEAT_CACHE to another folder"),
        ({"MIXFEAT_CACHE": "~no-such-user"}, "set MIXFEAT_CACHE to a folder"),
    ],
    ids=["no compiler", "broken compiler", "not UTF-8", "no cache", "long name", "no user"],
)
def test_falls_back_with_one_warning(tmp_path, run_python, environment, reason):
    script(tmp_path / "latin", b"echo 'erreur \xe9trange' >&2; exit 1")
    environment = {name: value.replace("{tmp}", str(tmp_path)) for name, value in environment.items()}
    output = run_python(
        HIDE + CALL + "\n" + CALL, check=False, **{"MIXFEAT_CACHE": str(tmp_path / "cache"), **environment}
    )
    assert output.count("tensor(") == 2
    assert output.count("mixfeat falls back to plain PyTorch on cpu tensors") == 1
    assert reason in output


def test_without_sources(monkeypatch, tmp_path):
    """A package that was stripped of them: the library beside them serves, whatever it was made of; or none."""
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    for kept in ("nothing", "sources, without build.py"):
        with pytest.raises(BuildError, match=r"the C\+\+ sources .*; reinstall mixfeat"):
            cpu._built_ahead()
        library = tmp_path / "libmixfeat_cpu-0123456789abcdef.so"
        library.touch()
        assert cpu._built_ahead() == library, kept
        library.unlink()
        (tmp_path / "library.cpp").touch()


def test_warning_points_at_the_users_line(tmp_path, run_python):
    statements = [
        "mf.patch_conv(torch.ones(2, 3, 4), torch.ones(2, 2, 4), mf.ReLU())",
        "mf.TwoLayerPatchCNN(2, 2, 4, mf.ReLU())(torch.ones(2, 3, 4))",
        "torch.nn.Sequential(mf.TwoLayerPatchCNN(2, 2, 4, mf.ReLU()))(torch.ones(2, 3, 4, requires_grad=True))",
        "mf.Mixup()(torch.ones(2, 3), torch.tensor([0, 1]))",
        "mf.soft_target_cross_entropy(torch.ones(2, 3), torch.ones(2, 3))",
    ]
    code = ["import warnings, torch, mixfeat as mf", "with warnings.catch_warnings(record=True) as caught:"]
    code += ["    warnings.simplefilter('always')"]
    for statement in statements:
        code += ["    mf.backends._default.cache_clear()", f"    {statement}"]
    code += ["print(*(f'{w.filename}:{w.lineno}' for w in caught))"]
    output = run_python(HIDE + "\n".join(code), CXX="no-such-compiler", MIXFEAT_CACHE=str(tmp_path))
    lines = [code.index(f"    {statement}") + 2 for statement in statements]  # HIDE is a line, and lines count from 1
    assert output.split() == [f"<string>:{line}" for line in lines]


@pytest.mark.parametrize("built", [True, False])
def test_capability_typo_is_refused(tmp_path, run_python, built):
    code = "import mixfeat as mf; print(mf.backends.available(), mf.backends.describe()['backends']['cpu'])\n" + CALL
    environment = {} if built else {"CXX": "no-such-compiler", "MIXFEAT_CACHE": str(tmp_path)}
    output = run_python(("" if built else HIDE) + code, check=False, MIXFEAT_CPU_CAPABILITY="avx-512", **environment)
    error = "MIXFEAT_CPU_CAPABILITY must be one of generic, avx2, avx512, avx512_bf16, got 'avx-512'"
    assert f"('reference',) {error}" in output
    assert f"ValueError: {error}" in output.splitlines()[-1]
    assert "tensor(" not in output


def test_capability(run_python):
    code = "from mixfeat.kernels import cpu; print(cpu.capability())"
    assert run_python(code, MIXFEAT_CPU_CAPABILITY="generic") == "generic\n"
    best = run_python(code, MIXFEAT_CPU_CAPABILITY=None)
    assert run_python(code, MIXFEAT_CPU_CAPABILITY="") == best
    assert run_python(code, MIXFEAT_CPU_CAPABILITY="avx512_bf16") == best  # a lesser one where the processor lacks it


@pytest.mark.skipif(not shutil.which("objdump") or sys.platform != "linux", reason="needs objdump, on Linux")
def test_library_loads_on_old_systems():
    """No symbol is newer than manylinux_2_28 has them, on whatever system this is built."""
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
    listing = subprocess.run(["objdump", "-T", cpu.library_path()], capture_output=True, text=True, check=True).stdout
    versions = re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)\)?\s+(\S+)", listing)
    assert len(versions) > 10
    assert [v for v in versions if tuple(map(int, v[1].split("."))) > newest[v[0]]] == []


FOLDERS = (".ci", ".github", "benchmarks", "docs", "examples", "kernels", "mixfeat", "tests")
FILES = (
    ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "Makefile", "README.md",
    "constraints.txt", "pyproject.toml", "setup.py",
)  # fmt: skip


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, to leave the tree alone."""
    folder = tmp_path / "checkout"
    for name in FOLDERS:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def pip_wheel(checkout, **environment):
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    command += [checkout.parent / "wheels", checkout]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return result, list((checkout.parent / "wheels").glob("*.whl"))


def libraries(wheel):
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_wheel_holds_all_it_needs(tmp_path, checkout, stand_in):
    """Library and sources, kernels under mixfeat.kernels, the type marker."""
    result, wheels = pip_wheel(checkout, CXX=str(stand_in))
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = wheels
    assert "-py3-none-" in wheel.name
    assert "none-any" not in wheel.name
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mixfeat").rglob("*.py")}
    mapped = [p for folder in ("benchmarks", "kernels") for p in (ROOT / folder).rglob("*")]
    sources = {f"mixfeat/{p.relative_to(ROOT).as_posix()}" for p in mapped if p.suffix in (".py", ".cpp", ".h")}
    assert modules | sources <= names
    assert "mixfeat/py.typed" in names
    assert libraries(wheel) == [f"mixfeat/kernels/cpu/{cpu.library_name()}"]
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


def test_no_wheel_without_the_library(checkout):
    """pip would keep it, and install that one when a compiler is there: a failure ends the build, and pip shows why."""
    result, wheels = pip_wheel(checkout, CXX="false")
    assert result.returncode != 0
    assert not wheels
    assert "building the CPU library failed: " in result.stdout + result.stderr
    assert "set MIXFEAT_SKIP_CPU_BUILD=1 to install without the CPU library" in result.stdout + result.stderr


def test_wheel_without_the_library_where_asked(checkout):
    """It is pure, and says so in its name; a library that lies in the checkout stays out."""
    (checkout / "kernels/cpu/libmixfeat_cpu-0123456789abcdef.so").touch()
    result, wheels = pip_wheel(checkout, CXX="false", MIXFEAT_SKIP_CPU_BUILD="1")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = wheels
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []


@pytest.mark.parametrize("here", [True, False])
def test_wheel_under_build_isolation(tmp_path, checkout, stand_in, here):
    """The build cannot import PyTorch: it finds that of the environment, or makes a pure wheel where there is none."""
    code = "import sys, sysconfig; sys.modules['torch'] = None\n"
    code += "" if here else "sysconfig.get_path = lambda name: '/nowhere'\n"
    code += "from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-c", code, tmp_path]
    environment = os.environ | {"CXX": str(stand_in)}
    result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert len(libraries(wheel)) == here
    assert wheel.name.endswith("-py3-none-any.whl") == (not here)


def test_source_archive_is_the_checkout(tmp_path, checkout):
    """Tests can be run in it: all that they read and import is there."""
    for link in ("kernels", "benchmarks"):  # laid for checkers of types; the copy has folders in their place
        shutil.rmtree(checkout / "mixfeat" / link, ignore_errors=True)
    files = [path for path in checkout.rglob("*") if path.is_file()]
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=checkout, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {path.relative_to(checkout).as_posix() for path in files}
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "kernels/cpu/glibc.h"} <= wanted
    assert wanted - held == set()
