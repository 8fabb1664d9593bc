"""The CUDA backend: kernels in CUDA C++, compiled by NVRTC at first use for the shape at hand.

NVRTC and the driver are reached through NVIDIA's ``cuda-bindings``, which PyTorch's CUDA wheels require, as they do
NVRTC itself. Compiling takes a second or two and needs no GPU. The result is kept in the user's cache
(:func:`mixfeat.kernels.cpu.cache_directory`), under a name made of everything that it depends on.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..cpu import cache_directory

__all__ = [
    "SHARED_KIB", "CompileError", "Launch", "binary", "capability", "compile", "nvrtc_version", "record", "run",
    "unavailable",
]  # fmt: skip

#: KiB of shared memory that a block can have, by compute capability
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


class CompileError(RuntimeError):
    """A kernel could not be compiled here; the message says why."""


class Launch(NamedTuple):
    """A launch of ``kernel``, the name of a file here and of the function in it.

    Attributes:
        constants: macros the kernel is compiled with.
        arguments: a tensor is passed as its address (None as null), an int as ``long long``, a float as ``float``,
            bytes as a structure by value. The first is a tensor, and the launch is on its device.
    """

    kernel: str
    constants: Mapping[str, int]
    blocks: int
    threads: int
    shared_bytes: int
    arguments: tuple[Tensor | int | float | bytes | None, ...]

    def parameters(self) -> list[Any]:
        """Return the arguments as ctypes' objects, whose addresses a launch is given."""
        return [_parameter(argument) for argument in self.arguments]


def _parameter(argument: Tensor | int | float | bytes | None) -> Any:
    if argument is None or isinstance(argument, Tensor):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, bytes):
        return ctypes.create_string_buffer(argument, len(argument))
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


@functools.cache
def unavailable() -> str | None:
    """Return why kernels cannot be compiled in this process, or None."""
    if torch.version.hip:
        return "it is for NVIDIA's GPUs"
    try:
        nvrtc_version()
    except ImportError as error:
        return f"cuda-bindings cannot be imported: {error} (pip install 'mixfeat[cuda]')"
    except Exception as error:  # of a type that differs between releases of cuda-bindings
        return f"NVRTC cannot be loaded: {str(error).splitlines()[0]} (pip install nvidia-cuda-nvrtc)"
    return None


def compile(
    kernel: str, constants: Mapping[str, int], capability: int, output: Literal["cubin", "ptx"] = "cubin"
) -> bytes:
    """Compile for GPUs of a compute capability such as 90. Needs no GPU.

    Raises:
        CompileError: NVRTC is missing or too old for the GPU, or refuses the kernel; the message holds its output.
    """
    reason = unavailable()
    if reason:
        raise CompileError(reason)
    from cuda.bindings import nvrtc

    architecture = f"{'sm' if output == 'cubin' else 'compute'}_{_architecture(capability)}"
    options = [f"--gpu-architecture={architecture}", "-std=c++17", *(f"-D{k}={v}" for k, v in constants.items())]
    encoded = [option.encode() for option in options]
    program = _checked(nvrtc.nvrtcCreateProgram(_source(kernel).read_bytes(), f"{kernel}.cu".encode(), 0, [], []))
    try:
        if int(nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]):
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc.nvrtcGetProgramLog(program, log))
            text = log.decode(errors="replace").strip("\0\n ")
            raise CompileError(f"compiling {kernel}.cu ({' '.join(options)}) failed:\n{text}")
        sized, got = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            if output == "cubin"
            else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        result = bytearray(_checked(sized(program)))
        _checked(got(program, result))
        return bytes(result)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def binary(kernel: str, constants: Mapping[str, int], capability: int) -> bytes:
    """Return :func:`compile`'s result, cached across processes."""
    reason = unavailable()
    if reason:
        raise CompileError(reason)
    key = hashlib.sha256(_source(kernel).read_bytes())
    key.update(repr((nvrtc_version(), _architecture(capability), sorted(constants.items()))).encode())
    path = cache_directory() / "cuda" / f"{kernel}-{key.hexdigest()[:16]}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    cubin = compile(kernel, constants, capability)
    with contextlib.suppress(OSError):  # a cache that cannot be written to costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            whole = Path(scratch, path.name)
            whole.write_bytes(cubin)
            os.replace(whole, path)
    return cubin


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Record this thread's launches instead of making them, on meta tensors, to compile them without a GPU."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def run(launch: Launch) -> None:
    """Launch on PyTorch's stream of the first argument's device, whichever device is current."""
    launches = _recorded.get()
    if launches is not None:
        launches.append(launch)
        return
    from cuda.bindings import driver

    device = cast(Tensor, launch.arguments[0]).get_device()
    with torch.cuda.device(device):
        if not int(_checked(driver.cuCtxGetCurrent())):  # a thread in which PyTorch has launched nothing yet
            context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))
            _checked(driver.cuCtxSetCurrent(context))
        function = _function(device, launch.kernel, tuple(launch.constants.items()), launch.shared_bytes)
        parameters = launch.parameters()
        addresses = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
        grid, block = (launch.blocks, 1, 1), (launch.threads, 1, 1)
        stream = torch.cuda.current_stream(device).cuda_stream
        _checked(
            driver.cuLaunchKernel(function, *grid, *block, launch.shared_bytes, stream, ctypes.addressof(addresses), 0)
        )


def capability(device: torch.device | int) -> int:
    """Compute capability of a GPU, as its name in sm_90 has it."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _function(device: int, kernel: str, constants: tuple[tuple[str, int], ...], shared_bytes: int) -> Any:
    """Return the kernel on the current device; modules live as long as the process."""
    from cuda.bindings import driver

    cubin = ctypes.create_string_buffer(binary(kernel, dict(constants), capability(device)))
    module = _checked(driver.cuModuleLoadData(ctypes.addressof(cubin)))
    function = _checked(driver.cuModuleGetFunction(module, kernel.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def _checked(result: tuple[Any, ...]) -> Any:
    """Return the value that cuda-bindings returns beside an error code; raise if there is an error."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA: {error.name}")
    return values[0] if values else None


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Return the version of NVRTC, such as (13, 0)."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if int(error):
        raise RuntimeError(error.name)
    return major, minor


@functools.cache
def _architecture(capability: int) -> int:
    """Return the newest architecture known to NVRTC whose code runs on GPUs of a capability."""
    from cuda.bindings import nvrtc

    known = _checked(nvrtc.nvrtcGetSupportedArchs())
    fitting = [one for one in known if one // 10 == capability // 10 and one <= capability]
    if not fitting:
        version = ".".join(map(str, nvrtc_version()))
        raise CompileError(
            f"NVRTC {version} does not compile for sm_{capability}; it knows {', '.join(map(str, known))}"
        )
    return max(fitting)


def _source(kernel: str) -> Path:
    return Path(__file__).with_name(f"{kernel}.cu")
