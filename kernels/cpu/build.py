"""Builds the CPU library: a plain shared object with PyTorch operators in it, on PyTorch's stable ABI, by ninja.

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


class BuildError(RuntimeError):
    """The CPU library could not be built here; the message says why."""


def sources() -> list[Path]:
    """Every file that the library is made of."""
    return sorted([*SOURCE.glob("*.cpp"), *SOURCE.glob("*.h")])


def digest() -> str:
    """Of the sources and of how they are built: what a library must have been made of to be the right one."""
    key = hashlib.sha256()
    for path in [*sources(), Path(__file__)]:
        key.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
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


def _instruction_sets() -> dict[str, list[str]]:
    return X86 if platform.machine().lower() in ("x86_64", "amd64") else {"generic": []}


def build(directory: Path, torch_directory: Path) -> Path:
    """Build the library inside ``directory`` against the PyTorch installed at ``torch_directory``; returns its path.

    Raises:
        BuildError: no compiler or ninja, or the compiler failed; the message holds its output.
    """
    sets = _instruction_sets()
    common = ["-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
    binding = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(torch_directory / "include")]
    binding += ["-DMIXFEAT_X86"] if len(sets) > 1 else []
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
    objects = []
    for source in sorted(SOURCE.glob("*.cpp")):
        if source.stem.endswith("library"):  # bindings, once; all else once per instruction set
            variants = {"torch": ["-std=c++20", *binding]}
        else:
            variants = {name: ["-std=c++17", *flags, f"-DMIXFEAT_ISA={name}"] for name, flags in sets.items()}
        for name, flags in variants.items():
            objects.append(f"{source.stem}.{name}.o")
            lines += [f"build {objects[-1]}: compile {path(source)}", f"  flags = {quote([*common, *flags])}"]
    name = library_name()
    lines.append(f"build {name}: link {' '.join(objects)}")

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text("\n".join(lines) + "\n")
    result = subprocess.run([_ninja(), "-C", str(directory)], capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"building the CPU library failed:\n{result.stdout}{result.stderr}")
    return directory / name
