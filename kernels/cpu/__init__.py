"""The CPU backend: a shared library of torch operators (``torch.ops.mixfeat_cpu``), loaded or built at first use.

``pip install --no-build-isolation .`` builds it ahead. Where it was not, the first use builds it into the user's cache
(``MIXFEAT_CACHE``, else ``XDG_CACHE_HOME``/mixfeat, else ``~/.cache/mixfeat``), in a folder named after
PyTorch and the compiler; of several processes that start at once, one builds and the others wait.
"""

import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import build
from .build import BuildError, compiler, library_name

__all__ = ["BuildError", "cache_directory", "capability", "compiler_version", "library_path", "load"]

_TORCH = Path(torch.__file__).parent


def cache_directory() -> Path:
    """Folder under which libraries built at first use are kept."""
    if "MIXFEAT_CACHE" in os.environ:
        return Path(os.environ["MIXFEAT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixfeat"


def compiler_version() -> str:
    """First line of what the C++ compiler says of itself.

    Raises:
        BuildError: there is no compiler.
    """
    run = subprocess.run([compiler(), "--version"], capture_output=True, text=True)
    return run.stdout.partition("\n")[0].strip()


def _built_ahead() -> Path | None:
    """The library beside this file, if it was made of the sources there."""
    path = Path(__file__).with_name(library_name())
    return path if path.exists() else None


def _built_at_first_use() -> Path:
    key = hashlib.sha256()
    for part in (torch.__version__, sys.platform, compiler(), compiler_version()):
        key.update(part.encode() + b"\0")
    folder = cache_directory() / f"cpu-{key.hexdigest()[:16]}"
    path = folder / library_name()
    if path.exists():
        return path
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system if this process dies
            if not path.exists():
                print(f"mixfeat: building the CPU kernels, once, in {folder}", file=sys.stderr)
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    os.replace(build.build(Path(scratch), _TORCH), path)  # whole or not at all
    except (ImportError, OSError) as error:
        raise BuildError(f"the CPU library could not be built in {folder}: {error}") from error
    return path


@functools.cache
def library_path() -> Path:
    """Where the library is, building it if need be.

    Raises:
        BuildError: it is not there and cannot be built.
    """
    return _built_ahead() or _built_at_first_use()


@functools.cache
def load() -> None:
    """Make ``torch.ops.mixfeat_cpu`` available; does nothing the second time.

    Raises:
        BuildError: the library is not there and cannot be built, or cannot be loaded.
    """
    try:
        torch.ops.load_library(str(library_path()))
    except OSError as error:
        raise BuildError(f"the CPU library could not be loaded: {error}") from error


def capability() -> str:
    """Instruction set in use: ``"avx512"``, ``"avx2"`` or ``"generic"``.

    The processor's best, unless the environment variable ``MIXFEAT_CPU_CAPABILITY`` names a lesser one.
    """
    load()
    return torch.ops.mixfeat_cpu.capability()
