"""What the compilers make of the kernels that ship: registers, spills, matrix instructions. Needs no GPU.

Each :class:`Case` calls an operator on meta tensors and records what it would launch: so exactly the kernels that run
are compiled, for any target.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mixfeat.activations import Activation, Identity, PolyReLU, Power, PowerReLU, ReLU

__all__ = ["TARGETS", "Case", "CompiledKernel", "compile_case", "compile_pool", "compile_report", "recorded_launch",
           "shipped"]  # fmt: skip

#: targets by name: backend, architecture and warp size as Triton names them
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """A call of an operator, by all that decides which kernel serves it."""

    kernel: str
    direction: str
    dtype: torch.dtype
    patch_dim: int
    activation: Activation
    samples: int = 4096
    mix: bool = False
    filters: int = 10
    matmul_precision: str = "highest"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.float32:
            dtype += "-" + self.matmul_precision
        mix = "-mix" if self.mix else ""
        sizes = f"N{self.samples}-D{self.patch_dim}-M{self.filters}"
        return f"{self.kernel}-{self.direction}-{dtype}-{sizes}-{self.activation}{mix}"


@dataclass(frozen=True)
class CompiledKernel:
    """A compiled kernel. For AMD, registers are vector registers, stack and local accesses are scratch memory."""

    kernel: str
    direction: str
    dtype: str
    config: dict[str, Any]
    target: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_loads: int
    local_stores: int
    matrix_instructions: dict[str, int]
    assembly: str = field(repr=False)

    def evaluation_loops(self) -> list[tuple[int, int]]:
        """Instructions and evaluations of PolyReLU in one iteration of each innermost loop that evaluates it (NVIDIA).

        In the all-pairs loss: first the logits' loop, then in "backward" the rows' and the columns' gradient. There
        every evaluation clamps the sum of two pre-activations, in one instruction.
        """
        loops = [(len(loop), loop.count("FADD.SAT")) for loop in _innermost_loops(self.assembly)]
        return [loop for loop in loops if loop[1]]


def shipped(target: str) -> list[Case]:
    """Cases that cover every configuration that ships for a target, and every way in which a kernel is specialised."""
    half, single, default = torch.bfloat16, torch.float32, PolyReLU()
    cases = [Case("patch_conv", "mix", dtype, 50, default, mix=mix) for dtype, mix in ((half, True), (single, False))]
    # Three filters per class make the narrow tiles of forward the better ones.
    for direction, filters in (("forward", 10), ("forward", 3), ("backward_input", 10), ("backward_weight", 10)):
        case = partial(Case, "patch_conv", direction, filters=filters)
        cases += [case(half, dim, default) for dim in (32, 64, 128, 256)]
        cases += [case(half, dim, default, mix=True) for dim in (32, 64)]
        cases += [case(single, dim, default) for dim in ((32, 128) if direction == "forward" else (32, 64, 128))]
        cases += [case(single, 32, default, mix=True), case(half, 64, ReLU())]
        if TARGETS[target][0] == "cuda":  # AMD's matrix units take float32 as it is
            cases += [case(single, dim, default, matmul_precision="high") for dim in (32, 64, 128)]
            cases += [case(single, 32, default, mix=True, matmul_precision="high")]
    cases += [Case("patch_conv", "backward_input", half, 64, default, filters=filters) for filters in (1, 3)]
    case = partial(Case, "patch_conv", "forward")
    cases += [case(torch.float16, 64, default)]
    cases += [
        case(half, 64, activation) for activation in (PolyReLU(15, 0.5, False), PowerReLU(3), Power(16), Identity())
    ]
    case = partial(Case, "pairwise_mixup_loss", dtype=single, patch_dim=20)
    for samples in (50, 4096):
        cases += [case(direction, activation=default, samples=samples) for direction in ("forward", "backward")]
    cases += [case("backward", activation=activation) for activation in (PolyReLU(15, 0.5, False), Power(16), ReLU())]
    return cases


def compile_case(case: Case, target: str) -> CompiledKernel:
    """Compile one case for one target, in a process in which Triton does not interpret its kernels."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = recorded_launch(case)
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        signature[name] = _type(value)
        if isinstance(value, torch.Tensor):
            attributes[i,] = [["tt.divisibility", 16]]
        elif value is None:
            constants[name] = None
    signature |= dict.fromkeys(launch.constants, "constexpr")
    options = launch.options(TARGETS[target][0])
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(*TARGETS[target]),
        options=options,
    )
    config = launch.constants | options
    dtype = str(case.dtype).removeprefix("torch.")
    resources = _amd(compiled) if TARGETS[target][0] == "hip" else _nvidia(compiled)
    return CompiledKernel(
        case.kernel, case.direction, dtype, config, target, shared_bytes=compiled.metadata.shared, **resources
    )


def compile_pool(jobs: int | None = None) -> ProcessPoolExecutor:
    """Processes to run :func:`compile_case` in; they compile whatever TRITON_INTERPRET is here."""
    return ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), initializer=_no_interpreter)


def compile_report(targets: Iterable[str] = TARGETS, jobs: int | None = None) -> list[CompiledKernel]:
    """Compile everything that ships for each target, ``jobs`` kernels at a time (default: one per core)."""
    with compile_pool(jobs) as pool:
        futures = [pool.submit(compile_case, case, target) for target in targets for case in shipped(target)]
        return [future.result() for future in futures]


def _no_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def recorded_launch(case: Case) -> Any:
    """What a case launches: its last kernel, or the one that mixes first."""
    from mixfeat.kernels.triton import launch

    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(case.matmul_precision)
    try:
        with launch.record() as launches:
            _call_pairwise_mixup_loss(case) if case.kernel == "pairwise_mixup_loss" else _call_patch_conv(case)
    finally:
        torch.set_float32_matmul_precision(previous)
    return launches[0 if case.direction == "mix" else -1]


_PATCHES, _CLASSES = 12, 10


def _call_patch_conv(case: Case) -> None:
    from mixfeat.kernels.triton import patch_conv

    options: dict[str, Any] = {"dtype": case.dtype, "device": "meta"}
    input = torch.empty(1, case.samples, _PATCHES, case.patch_dim, **options)
    weight = torch.empty(1, _CLASSES, case.filters, case.patch_dim, **options)
    index = torch.empty(case.samples, dtype=torch.int64, device="meta") if case.mix else None
    lam = torch.empty(case.samples, device="meta") if case.mix else None
    arguments = (input, weight, index, lam, case.activation.polynomial)
    if case.direction in ("forward", "mix"):
        patch_conv.patch_conv(*arguments)
    else:
        grad = torch.empty(1, case.samples, _CLASSES, **options)
        for_input = case.direction == "backward_input"
        patch_conv.patch_conv_backward(grad, *arguments, input_grad=for_input, weight_grad=not for_input)


def _call_pairwise_mixup_loss(case: Case) -> None:
    from mixfeat.kernels.triton import pairwise_mixup_loss

    s = torch.empty(1, case.samples, _PATCHES, _CLASSES, case.filters, dtype=case.dtype, device="meta")
    target = torch.empty(case.samples, dtype=torch.int64, device="meta")
    pairwise_mixup_loss.pairwise_mixup_loss(
        s, None, target, None, [0.5], [1.0], case.activation.polynomial, case.direction == "backward"
    )


_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


def _type(value: Any) -> str:
    """Triton's name for the type of a kernel's argument."""
    if isinstance(value, torch.Tensor):
        return "*" + _DTYPES[value.dtype]
    return "constexpr" if value is None else "fp32" if isinstance(value, float) else "i32"


def _nvidia(compiled: Any) -> dict[str, Any]:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([tools / tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match, usage
    return {
        "registers": int(match[1]),
        "stack_bytes": int(match[2]),
        "local_loads": _count(r"\bLDL\b", sass),
        "local_stores": _count(r"\bSTL\b", sass),
        "matrix_instructions": {
            "HMMA": _count(r"\bHMMA\b", sass),
            "HGMMA": _count(r"\bHGMMA\b", sass),
            "UTCMMA": _count(r"\bUTC[A-Z]*MMA\b", sass),
        },
        "assembly": sass,
    }


def _amd(compiled: Any) -> dict[str, Any]:
    assembly = compiled.asm["amdgcn"]

    def metadata(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        assert match, key
        return int(match[1])

    return {
        "registers": metadata("vgpr_count"),
        "stack_bytes": metadata("private_segment_fixed_size"),
        "local_loads": _count(r"\bscratch_load", assembly),
        "local_stores": _count(r"\bscratch_store", assembly),
        "matrix_instructions": {"MFMA": _count(r"\bv_mfma", assembly)},
        "assembly": assembly,
    }


def _innermost_loops(sass: str) -> list[list[str]]:
    """The opcodes of each loop without a loop inside, as nvdisasm prints them."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcodes.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:  # backwards: its label came before
                loops.append((labels[target[0]], len(opcodes)))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [opcodes[begin:end] for begin, end in inner]


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
