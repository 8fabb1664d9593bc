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
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).resolve().parent

# Oldest PyTorch whose stable ABI the library asks for: 2.10, as TORCH_TARGET_VERSION spells it.
TORCH_TARGET = "0x020a000000000000"

# Flags of each instruction set. GCC and clang agree on all of them.
_AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
X86 = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
}

_COMMON = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-include", str(SOURCE / "glibc.h")]


class BuildError(RuntimeError):
    """The CPU library cannot be had here; the message says why, and what to do.

    Paths and compilers may hold or print bytes that are no text: the message shows them escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode(errors="backslashreplace").decode())


def sources() -> list[Path]:
    """Return every file that the library is made of.

    Raises:
        BuildError: the package was installed without them.
    """
    files = sorted(path for path in SOURCE.rglob("*") if path.suffix in (".cpp", ".h"))
    if not files:
        raise BuildError(f"the C++ sources are missing from {SOURCE}; reinstall mixfeat")
    return files


def digest() -> str:
    """Return the digest of the sources and of how they are built, which tells whether a library is the right one.

    Raises:
        BuildError: the sources are missing or cannot be read.
    """
    key = hashlib.sha256()
    try:
        for path in [*sources(), SOURCE / "build.py"]:
            key.update(path.relative_to(SOURCE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    except OSError as error:
        raise BuildError(f"the C++ sources cannot be read: {error}; reinstall mixfeat") from error
    return key.hexdigest()[:16]


def library_name() -> str:
    """Return the file's name. The digest is a part of it, as installers set files' times.

    Raises:
        BuildError: the sources are missing or cannot be read.
    """
    return f"libmixfeat_cpu-{digest()}.so"


def compiler() -> list[str]:
    """Return the words of the C++ compiler's command: those of ``$CXX``, else the first of c++, g++, clang++.

    Raises:
        BuildError: there is none, or ``$CXX`` is no command.
    """
    cxx = os.environ.get("CXX", "").strip()
    try:
        words = [cxx] if shutil.which(cxx) else shlex.split(cxx)  # a path may have blanks in it
    except ValueError as error:
        raise BuildError(f"CXX is not a command: {error}, got {cxx!r}; set it as in CXX='ccache g++'") from error
    candidates = [words] if words else [["c++"], ["g++"], ["clang++"]]
    for program, *flags in candidates:
        path = shutil.which(program)
        if path:
            return [os.path.abspath(path), *flags]
    if words and os.path.exists(words[0]):
        raise BuildError(f"CXX names {words[0]!r}, which is not an executable file; set CXX to a C++ compiler")
    names = ", ".join(program for program, *_ in candidates)
    raise BuildError(f"no C++ compiler found (looked for {names}; set CXX to name one)")


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the compiler and capture what it prints, in whatever encoding.

    Raises:
        BuildError: the program cannot be run.
    """
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="backslashreplace"
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}; set CXX to a C++ compiler") from error


def max_jobs() -> int | None:
    """Return how many compilers may run at once, ``$MAX_JOBS`` as PyTorch reads it; None leaves that to ninja."""
    given = os.environ.get("MAX_JOBS", "").strip()
    return int(given) if given.isdecimal() and int(given) > 0 else None


def _ninja() -> list[str]:
    beside = Path(sys.executable).parent / "ninja"
    path = str(beside) if beside.exists() else shutil.which("ninja")
    if not path:
        raise BuildError("ninja not found: pip install ninja")
    jobs = max_jobs()
    return [path, "--quiet", *([f"-j{jobs}"] if jobs else [])]


def instruction_sets() -> list[str]:
    """Return the names of the instruction sets that the library is built for here."""
    return list(X86) if platform.machine().lower() in ("x86_64", "amd64") else ["generic"]


def kernel_sources(instruction_set: str) -> list[Path]:
    """Return the files of ``isa/`` that are compiled for an instruction set: all, or those that gain by it."""
    files = sorted(SOURCE.glob("isa/*.cpp"))
    return [f for f in files if instruction_set != "avx512_bf16" or f.stem in ("kernels", "patch_conv")]


def kernel_flags(instruction_set: str) -> list[str]:
    """Return what the compiler needs, beside an optimisation level, for a file of ``isa/`` and one instruction set."""
    return ["-std=c++17", *_COMMON, *X86[instruction_set], f"-DMIXFEAT_ISA={instruction_set}"]


def build(directory: Path, torch_directory: Path) -> Path:
    """Build the library inside ``directory`` against the PyTorch installed at ``torch_directory``; returns its path.

    Raises:
        BuildError: sources or compiler are missing, or the compiler failed; the message holds its output.
    """
    cxx, sets, name = compiler(), instruction_sets(), library_name()
    operator_flags = ["-std=c++20", *_COMMON, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    operator_flags += ["-isystem", str(torch_directory / "include"), *(["-DMIXFEAT_X86"] if "avx2" in sets else [])]
    commands = {
        f"{source.stem}.{name}.o": ["-O3", *kernel_flags(name), "-c", str(source)]
        for name in sets
        for source in kernel_sources(name)
    }
    commands |= {
        f"{source.stem}.o": ["-O3", *operator_flags, "-c", str(source)] for source in sorted(SOURCE.glob("*.cpp"))
    }
    libraries = [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    link = ["-shared", *commands, *libraries, *undefined]

    def statement(output: str, inputs: Iterable[str], arguments: list[str]) -> str:
        command = shlex.join([*cxx, *arguments, "-o", output]).replace("$", "$$")
        return f"build {output}: run {' '.join(inputs)}\n  command_line = {command}\n"

    # Only names that are chosen here stand where ninja reads paths; all others are quoted words of a command.
    rules = ["rule run\n  command = $command_line\n  description = $out\n"]
    rules += [statement(output, (), arguments) for output, arguments in commands.items()]
    rules.append(statement(name, commands, link))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_bytes(os.fsencode("".join(rules)))
    result = run([*_ninja(), "-C", str(directory)])
    if result.returncode:
        said = f"{result.stdout}{result.stderr}".rstrip()
        raise BuildError(
            f"building the CPU library failed: {cxx[0]} could not build it; "
            f"it needs a compiler of C++20, which CXX can name\n{said}"
        )
    return directory / name
