"""The backends that serve tensors: ``"triton"`` (CUDA, ROCm), ``"cpu"`` (native C++), ``"reference"`` (plain PyTorch).

``"cuda"`` is CUDA C++ and serves whole training runs (``gradient_descent``); Triton serves the other operators on the
same tensors.

The best available backend serves by default. ``with mixfeat.backend("reference"):`` or the environment variable
``MIXFEAT_BACKEND`` chooses another. The ``with`` block overrides the environment, for the thread that enters it and for
the backward passes of its calls.
"""

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

from mixfeat.kernels.polynomial import Polynomial

__all__ = ["NAMES", "available", "backend", "describe", "serves_cuda", "serving", "serving_network"]

NAMES = ("cuda", "triton", "cpu", "reference")

_chosen: ContextVar[str | None] = ContextVar("mixfeat_backend", default=None)
_environment = os.environ.get("MIXFEAT_BACKEND")


@functools.cache
def _why_not(name: str) -> str | None:
    """Return why a backend is unavailable in this process, or None."""
    if name == "cpu":
        from mixfeat.kernels import cpu

        try:
            cpu.load()
        except (cpu.BuildError, ValueError) as error:
            return str(error)
    if name == "cuda":
        from mixfeat.kernels import cuda

        return cuda.unavailable() or (None if torch.cuda.is_available() else "no GPU was found")
    if name == "triton":
        try:
            import triton
        except ImportError as error:
            return f"triton cannot be imported: {error}"
        if not torch.cuda.is_available() and not interpreted():
            return f"triton {triton.__version__} found no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU)"
    return None


@functools.cache
def interpreted() -> bool:
    """Return whether Triton's interpreter runs its kernels, by ``TRITON_INTERPRET`` at their first use."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def available() -> tuple[str, ...]:
    """Return the names of the backends that can run in this process, after building the CPU library if needed."""
    return tuple(name for name in NAMES if _why_not(name) is None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every operator called inside the ``with`` block, in this thread, by the named backend.

    Raises:
        ValueError: an unknown backend, or one that is unavailable here; the message says why.
    """
    token = _chosen.set(_checked(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str | None:
    """Return the backend chosen by the ``with`` block around this call, so that its backward pass can restore it."""
    return _chosen.get()


def as_chosen(name: str | None) -> AbstractContextManager[None]:
    """Restore a forward call's choice for its backward pass, which may run later, in another thread."""
    return nullcontext() if name is None else backend(name)


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, got {name!r}")
    reason = _why_not(name)
    if reason:
        raise ValueError(f"{source} {name!r} is not available here: {reason}")
    return name


@functools.cache
def _from_environment() -> str | None:
    return _checked(_environment, "MIXFEAT_BACKEND") if _environment else None


def _stacklevel() -> int:
    """Return the ``stacklevel`` at which our caller's warning names the user's line, outside mixfeat and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mixfeat", "torch"):
        frame, level = frame.f_back, level + 1
    return level


@functools.cache
def _default(device_type: str) -> str:
    name = {"cpu": "cpu", "cuda": "triton"}.get(device_type, "reference")
    reason = _why_not(name)
    if reason:
        if name == "cpu":
            from mixfeat.kernels import cpu

            cpu.check_capability()  # refuse a typo instead of falling back
        warnings.warn(
            f"mixfeat falls back to plain PyTorch on {device_type} tensors: {reason}",
            RuntimeWarning,
            stacklevel=_stacklevel(),
        )
        return "reference"
    return name


def serving(device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """Return the name of the backend that serves tensors of this device type and dtype in this thread.

    Raises:
        ValueError: the backend chosen by ``with`` or by the environment does not serve them.
    """
    name = _chosen.get() or _from_environment()
    if name == "cuda":
        name = "triton"
    if name is None:
        name = _default(device_type)
        return "reference" if name == "triton" and dtype == torch.float64 else name
    serves = {"triton": device_type == "cuda" or interpreted(), "cpu": device_type == "cpu", "reference": True}
    if not serves[name]:
        raise ValueError(f"backend {name!r} does not serve {device_type} tensors")
    if name == "triton" and dtype == torch.float64:
        raise ValueError("backend 'triton' does not serve torch.float64; use 'cpu' or 'reference'")
    return name


def serving_network(device_type: str, dtype: torch.dtype, polynomial: Polynomial) -> str:
    """Return the name of the backend that serves a network: Triton kernels have no negative slope."""
    name = serving(device_type, dtype)
    return "reference" if name == "triton" and polynomial.negative_slope else name


def serves_cuda() -> bool:
    """Return whether CUDA C++ kernels serve the operators that have them, on CUDA tensors in this thread."""
    return (_chosen.get() or _from_environment()) in (None, "cuda") and _why_not("cuda") is None


def describe() -> dict[str, Any]:
    """Return the state of each backend, the CPU library's build and instruction set, and the compiler's version."""
    from mixfeat.kernels import cpu

    facts: dict[str, Any] = {"backends": {name: _why_not(name) or "available" for name in NAMES}}
    if facts["backends"]["cpu"] == "available":
        facts["CPU library"] = cpu.library_path().name
        facts["CPU library's instruction set"] = cpu.capability()
    try:
        facts["C++ compiler"] = cpu.compiler_version()
    except cpu.BuildError as error:
        facts["C++ compiler"] = str(error)
    return facts
