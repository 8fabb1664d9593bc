"""The launch of a Triton kernel: compiler options, device, matrix precision, and what the interpreter needs."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Launch", "interpretable", "multiprocessors", "precision", "record", "rounded", "run"]


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
    return _properties(tensor.get_device()).multi_processor_count if tensor.is_cuda else 2


def _capability(tensor: Tensor) -> int:
    """Return the compute capability of the tensor's device, 90 for sm_90; 0 on a CPU."""
    if not tensor.is_cuda:
        return 0
    properties = _properties(tensor.get_device())
    return 10 * properties.major + properties.minor


@functools.cache
def _properties(device: int) -> Any:
    return torch.cuda.get_device_properties(device)


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
    tensor = launch.arguments[0]
    options = launch.options("hip") if torch.version.hip else launch.options("cuda", _capability(tensor))
    # A GPU computes with infinities and NaN in silence; numpy, which interprets kernels on a CPU, would warn.
    with np.errstate(all="ignore") if tensor.is_cpu else torch.cuda.device_of(tensor):
        launch.kernel[launch.programs,](*launch.arguments, **launch.constants, **options)


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
