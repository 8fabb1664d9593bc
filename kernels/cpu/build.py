"""Builds the CPU library: a plain shared object with PyTorch operators in it, on PyTorch's stable ABI, by ninja.

The operators, in this folder, are compiled once. The kernels, in ``isa/``, are compiled once per instruction set.
Imports nothing of mixfeat, so that setup.py can load it by its path.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).resolve().parent

# Oldest PyTorch whose stable ABI the library asks for: 2.10, as TORCH_TARGET_VERSION spells it.
TORCH_TARGET = "0x020a000000000000"

# Flags of each instruction set. GCC and clang agree on all of them.
X86 = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}

_COMMON = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]


class BuildError(RuntimeError):
    """The CPU library could not be built here; the message says why."""


def sources() -> list[Path]:
    """Every file that the library is made of."""
    return sorted(path for path in SOURCE.rglob("*") if path.suffix in (".cpp", ".h"))


def digest() -> str:
    """Of the sources and of how they are built: what a library must have been made of to be the right one."""
    key = hashlib.sha256()
    for path in [*sources(), SOURCE / "build.py"]:
        key.update(path.relative_to(SOURCE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return key.hexdigest()[:16]


def library_name() -> str:
    """Of the file, which the digest is a part of: files' times say nothing, as installers set them."""
    return f"libmixfeat_cpu-{digest()}.so"


def compiler() -> str:
    """Path of the C++ compiler: ``$CXX``, else the first of c++, g++, clang++.

    Raises:
        BuildError: there is none.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        path = shutil.which(shlex.split(name)[0])
        if path:
            return path
    raise BuildError(f"no C++ compiler found (looked for {', '.join(names)}; set CXX to name one)")


def _ninja() -> str:
    beside = Path(sys.executable).parent / "ninja"
    path = str(beside) if beside.exists() else shutil.which("ninja")
    if not path:
        raise BuildError("ninja not found: pip install ninja")
    return path


def instruction_sets() -> list[str]:
    """Names of the instruction sets that the library is built for here."""
    return list(X86) if platform.machine().lower() in ("x86_64", "amd64") else ["generic"]


def kernel_flags(instruction_set: str) -> list[str]:
    """Return what the compiler needs, beside an optimisation level, for a file of ``isa/`` and one instruction set."""
    return ["-std=c++17", *_COMMON, *X86[instruction_set], f"-DMIXFEAT_ISA={instruction_set}"]


def build(directory: Path, torch_directory: Path) -> Path:
    """Build the library inside ``directory`` against the PyTorch installed at ``torch_directory``; returns its path.

    Raises:
        BuildError: no compiler or ninja, or the compiler failed; the message holds its output.
    """
    sets = instruction_sets()
    operator_flags = ["-std=c++20", *_COMMON, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    operator_flags += ["-isystem", str(torch_directory / "include"), *(["-DMIXFEAT_X86"] if "avx2" in sets else [])]
    libraries = [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []

    def quote(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def path(p: Path) -> str:
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = [
        f"cxx = {quote([compiler()])}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx -shared $in {quote(libraries + undefined)} -o $out",
    ]
    compilations = [(f"{source.stem}.o", source, operator_flags) for source in sorted(SOURCE.glob("*.cpp"))]
    for source in sorted(SOURCE.glob("isa/*.cpp")):
        compilations += [(f"isa/{source.stem}.{name}.o", source, kernel_flags(name)) for name in sets]
    for target, source, flags in compilations:
        lines += [f"build {target}: compile {path(source)}", f"  flags = {quote(['-O3', *flags])}"]
    name = library_name()
    lines.append(f"build {name}: link {' '.join(target for target, *_ in compilations)}")

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run([_ninja(), "-C", str(directory)], capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"building the CPU library failed:\n{result.stdout}{result.stderr}")
    return directory / name
