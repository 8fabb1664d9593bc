"""The CPU backend: a shared library of torch operators (``torch.ops.mixfeat_cpu``), loaded or built at first use.

``pip install`` builds it ahead in an environment that has PyTorch. Elsewhere the first use builds it into the user's
cache (``MIXFEAT_CACHE``, else ``XDG_CACHE_HOME``/mixfeat, else ``~/.cache/mixfeat``), in a folder named after PyTorch
and the compiler's command; of several processes that start at once, one builds and the others wait.
"""

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch

from . import build
from .build import BuildError, compiler, library_name

__all__ = [
    "BuildError", "cache_directory", "capability", "check_capability", "compiler_version", "library_path", "load",
]  # fmt: skip

_TORCH = Path(torch.__file__).parent


def cache_directory() -> Path:
    """Return the folder under which libraries built at first use are kept.

    Raises:
        BuildError: the environment names none, and this user has no home folder.
    """
    given = os.environ.get("MIXFEAT_CACHE")
    try:
        if given:
            return Path(given).expanduser().absolute()
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))  # counts only if absolute, by its specification
        return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "mixfeat"
    except (RuntimeError, OSError) as error:
        reason = str(error).rstrip(".")
        raise BuildError(f"no folder to build the CPU library in: {reason}; set MIXFEAT_CACHE to a folder") from error


def compiler_version() -> str:
    """Return the first line of the C++ compiler's version.

    Raises:
        BuildError: there is no compiler, or it cannot be run.
    """
    command = compiler()
    return build.run([*command, "--version"]).stdout.partition("\n")[0].strip() or f"{command[0]}, of unknown version"


def _built_ahead() -> Path | None:
    """Return the library beside this file if it was built from the sources there, or if there are no sources."""
    folder = Path(__file__).parent
    try:
        path = folder / library_name()
        return path if path.exists() else None
    except BuildError:
        libraries = list(folder.glob("libmixfeat_cpu-*.so"))
        if len(libraries) != 1:
            raise
        return libraries[0]


def _built_at_first_use() -> Path:
    key = hashlib.sha256()
    for part in (torch.__version__, sys.platform, *compiler(), compiler_version()):
        key.update(os.fsencode(part) + b"\0")
    folder = cache_directory() / f"cpu-{key.hexdigest()[:16]}"
    path = folder / library_name()
    try:
        import fcntl

        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system if this process dies
            if not path.exists():
                with contextlib.suppress(AttributeError, OSError, ValueError):  # nobody may be listening
                    sys.stderr.write(f"mixfeat: building the CPU kernels, once, in {folder}\n")
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    os.replace(build.build(Path(scratch), _TORCH), path)  # whole or not at all
    except (ImportError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BuildError(
            f"the CPU library could not be built in {folder}: {reason}; set MIXFEAT_CACHE to another folder"
        ) from error
    return path


@functools.cache
def library_path() -> Path:
    """Return the path of the library, building it if need be.

    Raises:
        BuildError: the library is missing and cannot be built.
    """
    return _built_ahead() or _built_at_first_use()


def check_capability() -> None:
    """Raise ValueError if ``MIXFEAT_CPU_CAPABILITY`` does not name an instruction set."""
    given = os.environ.get("MIXFEAT_CPU_CAPABILITY")
    if given and given not in build.X86:
        raise ValueError(f"MIXFEAT_CPU_CAPABILITY must be one of {', '.join(build.X86)}, got {given!r}")


@functools.cache
def load() -> None:
    """Make ``torch.ops.mixfeat_cpu`` available; does nothing the second time.

    Raises:
        BuildError: the library is missing and cannot be built, or cannot be loaded.
        ValueError: ``MIXFEAT_CPU_CAPABILITY`` does not name an instruction set.
    """
    check_capability()
    try:
        torch.ops.load_library(str(library_path()))
    except OSError as error:
        raise BuildError(f"the CPU library could not be loaded: {error}") from error


def capability() -> str:
    """Return the instruction set in use: ``"avx512_bf16"``, ``"avx512"``, ``"avx2"`` or ``"generic"``.

    It is the processor's best, unless the environment variable ``MIXFEAT_CPU_CAPABILITY`` names a lesser one.
    """
    load()
    return torch.ops.mixfeat_cpu.capability()
