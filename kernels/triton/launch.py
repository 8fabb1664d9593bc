"""The launch of a Triton kernel: compiler options, device, matrix precision, and what the interpreter needs."""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Launch", "interpretable", "multiprocessors", "precision", "reads_shared_operands", "record", "rounded", "run",
]  # fmt: skip


_backend: ContextVar[str] = ContextVar("backend", default="hip" if torch.version.hip else "cuda")


def precision(dtype: torch.dtype) -> str:
    """Return tl.dot's ``input_precision``, which follows PyTorch's.

    NVIDIA's matrix units form float32 products of TF32 parts, three for each; AMD's take float32 as it is.
    """
    if dtype != torch.float32 or _backend.get() == "hip":
        return "ieee"
    # torch.set_float32_matmul_precision sets this too, whereas its getter raises once this alone has been set.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "tf32x3"


def multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's device has; 2 for the interpreter, to slice work there too."""
    return _multiprocessors(tensor.get_device()) if tensor.is_cuda else 2


@functools.cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def reads_shared_operands(tensor: Tensor) -> bool:
    """Return whether the device's matrix units read operands from shared memory (sm_9x, sm_10x), not registers."""
    return not tensor.is_cuda or _major(tensor.get_device()) in (9, 10)


@functools.cache
def _major(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def _options(device: int, num_warps: int, num_stages: int, max_registers: int | None) -> dict[str, Any]:
    """Return the compiler's options for a device; -1 is a CPU."""
    launch = Launch(None, 0, (), {}, num_warps, num_stages, max_registers)
    if torch.version.hip:
        return launch.options("hip")
    major, minor = (0, 0) if device < 0 else torch.cuda.get_device_capability(device)
    return launch.options("cuda", 10 * major + minor)


class Launch(NamedTuple):
    """A launch of a kernel: number of programs, arguments, constants by name, and options for the compiler."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = 255

    def options(self, backend: str, capability: int = 0) -> dict[str, Any]:
        """Return the compiler's options for "hip", or for "cuda" with a compute capability such as 90."""
        # Triton's default for contracting a * b + c into one instruction differs by version, so it is set here.
        # NVIDIA's assembler may spill a few registers to fit one more program on a multiprocessor, unless it is told
        # how many a thread may have. On sm_12x a pipeline of loads takes so many registers that tiles would spill, on
        # AMD a deeper one more than the 64 KiB of shared memory.
        num_stages = 1 if capability // 10 == 12 else min(self.num_stages, 2) if backend == "hip" else self.num_stages
        options = {"num_warps": self.num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
        capped = backend == "cuda" and self.max_registers is not None
        return options | {"maxnreg": self.max_registers} if capped else options


_NO_GUARD: AbstractContextManager[Any] = contextlib.nullcontext()
_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def record(backend: str | None = None) -> Iterator[list[Launch]]:
    """List this thread's launches instead of making them: on meta tensors, they can be compiled without a GPU.

    ``backend`` "cuda" or "hip" asks for what they would be on NVIDIA's or AMD's GPUs.
    """
    launches: list[Launch] = []
    token, other = _recorded.set(launches), _backend.set(backend or _backend.get())
    try:
        yield launches
    finally:
        _recorded.reset(token)
        _backend.reset(other)


def run(launch: Launch) -> None:
    """Launch on the device of the first argument, whichever device is current."""
    launches = _recorded.get()
    if launches is not None:
        launches.append(launch)
        return
    device = launch.arguments[0].get_device()
    options = _options(device, *launch[4:])
    # A GPU computes with infinities and NaN in silence; numpy, which interprets kernels on a CPU, would warn.
    guard = np.errstate(all="ignore") if device < 0 else _guard(device)
    with guard:
        launch.kernel[launch.programs,](*launch.arguments, **launch.constants, **options)


def _guard(device: int) -> AbstractContextManager[Any]:
    """Make the device the current one, if it is not."""
    return _NO_GUARD if device == torch.cuda.current_device() else torch.cuda.device(device)


def interpretable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a float32 copy of bfloat16 on a CPU, where Triton's interpreter gets bfloat16 wrong."""
    return tensor.float() if tensor.is_cpu and tensor.dtype == torch.bfloat16 else tensor


@contextlib.contextmanager
def rounded(result: Tensor) -> Iterator[Tensor]:
    """Yield the tensor for a kernel to write ``result`` to: the interpreter would truncate to bfloat16, not round."""
    exact = interpretable(result)
    yield exact
    if exact is not result:
        result.copy_(exact)
