"""Builds the CPU library: a plain shared object with PyTorch operators in it, on PyTorch's stable ABI.

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
from concurrent.futures import ThreadPoolExecutor
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


def max_jobs() -> int:
    """Return how many compilers run at once: ``$MAX_JOBS``, as PyTorch reads it, else one for each usable core."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if given.isdecimal() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_sets() -> list[str]:
    """Return the names of the instruction sets that the library is built for here."""
    return list(X86) if platform.machine().lower() in ("x86_64", "amd64") else ["generic"]


def kernel_flags(instruction_set: str) -> list[str]:
    """Return what the compiler needs, beside an optimisation level, for a file of ``isa/`` and one instruction set."""
    return ["-std=c++17", *_COMMON, *X86[instruction_set], f"-DMIXFEAT_ISA={instruction_set}"]


def build(directory: Path, torch_directory: Path) -> Path:
    """Build the library inside ``directory`` against the PyTorch installed at ``torch_directory``; returns its path.

    Raises:
        BuildError: sources or compiler are missing, or the compiler failed; the message holds its output.
    """
    target, cxx, sets = directory / library_name(), compiler(), instruction_sets()

    def make(output: Path, arguments: list[str]) -> str:
        result = run([*cxx, *arguments, "-o", str(output)])
        if result.returncode:
            said = f"\n{result.stdout}{result.stderr}".rstrip()
            raise BuildError(
                f"building the CPU library failed: {cxx[0]} exited with {result.returncode} on {output.name}; "
                f"it needs a compiler of C++20, which CXX can name{said}"
            )
        return str(output)

    operator_flags = ["-std=c++20", *_COMMON, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    operator_flags += ["-isystem", str(torch_directory / "include"), *(["-DMIXFEAT_X86"] if "avx2" in sets else [])]
    compilations = [
        (directory / f"{source.stem}.{name}.o", ["-O3", *kernel_flags(name), "-c", str(source)])
        for source in sorted(SOURCE.glob("isa/*.cpp"))
        for name in sets
    ]
    compilations += [
        (directory / f"{source.stem}.o", ["-O3", *operator_flags, "-c", str(source)])
        for source in sorted(SOURCE.glob("*.cpp"))
    ]
    directory.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_jobs()) as pool:  # the first failure cancels what has not begun
        objects = list(pool.map(lambda compilation: make(*compilation), compilations))
    libraries = [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    make(target, ["-shared", *objects, *libraries, *undefined])
    return target
