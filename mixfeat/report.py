"""Compiler statistics of the kernels that ship: registers, spills, matrix instructions. No GPU is needed.

Each :class:`Case` calls an operator on meta tensors and records the launches it would make, so exactly the kernels that
run are compiled, for any target.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from mixfeat.activations import Activation, Identity, PolyReLU, Power, PowerReLU, ReLU

__all__ = [
    "KERNELS", "TARGETS", "BinaryCrossEntropyCase", "Case", "CompiledKernel", "CrossEntropyCase", "CutmixCase",
    "GradientDescentCase", "MixupCase", "PairwiseCase", "PatchConvCase", "compile_case", "compile_launch",
    "compile_pool", "compile_report", "recorded_launch", "shipped",
]  # fmt: skip

#: targets by name: backend, architecture and warp size as Triton names them
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """A call of an operator, with everything that selects its kernel; each operator has a subclass."""

    kernel: ClassVar[str]
    direction: str
    dtype: torch.dtype
    matmul_precision: str = field(default="highest", kw_only=True)

    def __str__(self) -> str:
        precision = "-" + self.matmul_precision if self.dtype == torch.float32 else ""
        return f"{self.kernel}-{self.direction}-{_name(self.dtype)}{precision}-{self.sizes()}"

    def sizes(self) -> str:
        """Return a short text that distinguishes this case from others."""
        raise NotImplementedError

    def call(self) -> None:
        """Call the operator on meta tensors."""
        raise NotImplementedError

    def place(self) -> int:
        """Return the index of the case's kernel among its launches."""
        return -1

    def launch(self, launches: list[Any]) -> Any:
        """Return the launch of the case's kernel."""
        return launches[self.place()]

    def record(self, backend: str) -> AbstractContextManager[list[Any]]:
        """Record the launches that follow, as on GPUs of this backend, instead of making them."""
        from mixfeat.kernels.triton import launch

        return launch.record(backend)


_PATCHES, _CLASSES = 12, 10


@dataclass(frozen=True)
class PatchConvCase(Case):
    """A call of patch_conv.

    Directions are "forward", "backward_input" and "backward_weight"; "kept_input" and "kept_weight", which read slopes
    that forward saved; "mix", the kernel that mixes first; and "sum", which adds up partial sums.
    """

    kernel = "patch_conv"
    patch_dim: int
    activation: Activation
    mix: bool = False
    filters: int = 10
    samples: int = 4096  # with few samples a tile has several patches of each

    def sizes(self) -> str:
        mix = "-mix" if self.mix else ""
        return f"N{self.samples}-D{self.patch_dim}-M{self.filters}-{self.activation}{mix}"

    def launch(self, launches: list[Any]) -> Any:
        name = f"patch_conv_{self.direction}_kernel"
        return next(launch for launch in launches if launch.kernel.__name__ == name)

    def call(self) -> None:
        from mixfeat.kernels.triton import configs, patch_conv

        samples = self.samples
        input = _meta(1, samples, _PATCHES, self.patch_dim, dtype=self.dtype)
        weight = _meta(1, _CLASSES, self.filters, self.patch_dim, dtype=self.dtype)
        index = _meta(samples, dtype=torch.int64) if self.mix else None
        lam = _meta(samples) if self.mix else None
        arguments = (input, weight, index, lam, self.activation.polynomial)
        keeps = configs.keeps_slopes(self.dtype, _CLASSES * self.filters, self.patch_dim)
        slope = _meta(1, samples, _PATCHES, _CLASSES * self.filters, dtype=self.dtype) if keeps else None
        if self.direction in ("forward", "mix"):
            patch_conv.patch_conv(*arguments, slope=slope)
        else:
            grad = _meta(1, samples, _CLASSES, dtype=self.dtype)
            for_input = self.direction.endswith("input")
            slope = slope if self.direction.startswith("kept") else None
            patch_conv.patch_conv_backward(
                grad, *arguments, input_grad=for_input, weight_grad=not for_input, slope=slope
            )


@dataclass(frozen=True)
class PairwiseCase(Case):
    """A call of pairwise_mixup_loss; directions are its kernels: "pack", "logits", "softmax", "gradient", "readout"."""

    kernel = "pairwise_mixup_loss"
    activation: Activation
    samples: int = 4096
    deterministic: bool = False
    readout: bool = False

    def sizes(self) -> str:
        options = "".join(f"-{name}" for name in ("deterministic", "readout") if getattr(self, name))
        return f"N{self.samples}-{self.activation}{options}"

    def launch(self, launches: list[Any]) -> Any:
        name = f"pairwise_mixup_loss_{self.direction}_kernel"
        return [one for one in launches if one.kernel.__name__ == name][-1]

    def call(self) -> None:
        from mixfeat.kernels.triton import launch, pairwise_mixup_loss

        s = _meta(1, self.samples, _PATCHES, _CLASSES, 10, dtype=self.dtype)
        target = _meta(self.samples, dtype=torch.int64)
        readout = _meta(1, _CLASSES, 10) if self.readout else None
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.deterministic)
        try:
            with mock.patch.object(launch, "multiprocessors", return_value=132):
                pairwise_mixup_loss.pairwise_mixup_loss(
                    s, None, target, None, [0.5], [1.0], self.activation.polynomial, True,
                    readout=readout, need_readout=self.readout,
                )  # fmt: skip
        finally:
            torch.use_deterministic_algorithms(before)


@dataclass(frozen=True)
class MixupCase(Case):
    """Direction "forward" or "backward", of samples of ``width`` elements; ``source`` is the input's dtype."""

    kernel = "mixup"
    width: int
    source: torch.dtype

    def sizes(self) -> str:
        return f"K{self.width}-{_name(self.source)}"

    def call(self) -> None:
        from mixfeat.kernels.triton import mixup

        launch = mixup.mixup if self.direction == "forward" else mixup.mixup_backward
        index, lam = _meta(256, dtype=torch.int64), _meta()
        launch(_meta(256, self.width, dtype=self.source), index, lam, _meta(256, self.width, dtype=self.dtype))


@dataclass(frozen=True)
class CrossEntropyCase(Case):
    """A call of a cross-entropy.

    Directions are the targets, "classes" or "dense"; "count" and "mean", for a mean; "scale", which scales the
    gradient; "written", which rewrites the gradient that forward left; and "backward", from loss and logsumexp.
    """

    kernel = "cross_entropy"
    classes: int
    label_smoothing: float = 0.0
    need_grad: bool = True
    lse_square_scale: float = 0.0

    def sizes(self) -> str:
        square = f"-{self.lse_square_scale}" if self.lse_square_scale else ""
        return f"C{self.classes}-{self.label_smoothing}{square}{'' if self.need_grad else '-loss'}"

    def call(self) -> None:
        from mixfeat.kernels.triton import cross_entropy

        samples = 1024
        input, row = _meta(samples, self.classes, dtype=self.dtype), _meta(samples)
        grad = input if self.need_grad else None
        target = _meta(samples, dtype=torch.int64)
        counts, losses = _meta(2, dtype=torch.int32), _meta(2, samples)
        classes = partial(
            cross_entropy.cross_entropy, input, target, target, row, self.label_smoothing, self.lse_square_scale, -100,
            1.0,
        )  # fmt: skip
        if self.direction == "scale":
            cross_entropy.scale_(input, row)
        elif self.direction == "dense":
            dense = _meta(samples, self.classes)
            cross_entropy.soft_target_cross_entropy(input, dense, 1.0, self.label_smoothing, row, grad)
        elif self.direction == "count":
            cross_entropy.count(target, target, -100)
        elif self.direction == "mean":
            cross_entropy.mean(losses, target, target, -100, 1.0, _meta(), counts)
        elif self.direction == "written":
            classes(None, None, grad, row, None, counts, 2)
        elif self.direction == "backward":
            classes(None, None, grad, row, row, counts)
        else:
            classes(losses, row if self.lse_square_scale else None, grad)


@dataclass(frozen=True)
class CutmixCase(Case):
    """A call of cutmix, direction "forward" or "backward", on square images with three channels."""

    kernel = "cutmix"
    side: int
    channels_last: bool = False

    def sizes(self) -> str:
        return f"{self.side}x{self.side}{'-channels_last' if self.channels_last else ''}"

    def call(self) -> None:
        from mixfeat.kernels.triton import cutmix

        launch = cutmix.cutmix if self.direction == "forward" else cutmix.cutmix_backward
        index, box = _meta(256, dtype=torch.int64), _meta(4, dtype=torch.int64)
        images, result = (_meta(256, 3 * self.side**2, dtype=self.dtype) for _ in range(2))
        launch(images, index, box, self.side, self.side, 3 if self.channels_last else 1, result)


@dataclass(frozen=True)
class BinaryCrossEntropyCase(Case):
    """A call of mixup_binary_cross_entropy, "forward"; ``options`` adds class weights and a threshold."""

    kernel = "binary_cross_entropy"
    classes: int
    options: bool = False
    reduce: bool = True

    def sizes(self) -> str:
        return f"C{self.classes}{'-options' if self.options else ''}{'' if self.reduce else '-none'}"

    def call(self) -> None:
        from mixfeat.kernels.triton.binary_cross_entropy import binary_cross_entropy

        samples = 1024
        input, target = _meta(samples, self.classes, dtype=self.dtype), _meta(samples, dtype=torch.int64)
        weight, threshold = (_meta(self.classes), 0.2) if self.options else (None, None)
        loss = _meta(samples) if self.reduce else _meta(samples, self.classes)
        binary_cross_entropy(input, target, target, _meta(samples), weight, 0.1, threshold, 1.0, loss, input)


@dataclass(frozen=True)
class GradientDescentCase(Case):
    """A call of gradient_descent, direction "midpoint", "nodes" or "erm", by the objective.

    The CUDA C++ kernel is compiled for one problem on GPUs of one compute capability.
    """

    kernel = "gradient_descent"
    capability: int
    num_samples: int = 50
    num_patches: int = 12

    def sizes(self) -> str:
        return f"N{self.num_samples}-P{self.num_patches}"

    def record(self, backend: str) -> AbstractContextManager[list[Any]]:
        from mixfeat.kernels import cuda

        return cuda.record()

    def call(self) -> None:
        from mixfeat.kernels.cuda.gradient_descent import gradient_descent

        nodes = {"midpoint": [0.5], "nodes": [0.5, 0.67, 0.93], "erm": None}[self.direction]
        input = _meta(1, self.num_samples, self.num_patches, 20)
        weight, target = _meta(128, _CLASSES, 5, 20), _meta(1, self.num_samples, dtype=torch.int64)
        shares = nodes and [1 / len(nodes)] * len(nodes)
        momentum = 0.0 if self.direction == "midpoint" else 0.9
        gradient_descent(
            input, weight, target, PolyReLU().polynomial, nodes, shares, 0.1, 10, momentum,
            capability=self.capability,
        )  # fmt: skip


@dataclass(frozen=True)
class CompiledKernel:
    """A compiled kernel.

    For AMD, registers are vector registers; stack and local accesses are scratch memory. ``vector_accesses`` counts the
    16-byte loads and stores of global memory.
    """

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
    vector_accesses: dict[str, int]
    assembly: str = field(repr=False)

    def evaluation_loops(self) -> list[tuple[int, int]]:
        """Count instructions and evaluations of PolyReLU in each innermost loop that evaluates it (NVIDIA).

        Gradient descent has two such loops, for the logits and the gradient. Every evaluation clamps the sum of two
        pre-activations in one instruction: an addition, or in the gradient of the all-pairs loss a multiply-add.
        """
        return [(len(loop), loop.count("FADD.SAT") or loop.count("FFMA.SAT")) for loop in self._evaluation_loops()]

    def _evaluation_loops(self) -> list[list[str]]:
        loops = _innermost_loops(self.assembly)
        return [loop for loop in loops if "FADD.SAT" in loop] or [loop for loop in loops if "FFMA.SAT" in loop]

    def occupancy(self) -> float | None:
        """Return the share of a multiprocessor's 64 or 48 warps that registers and shared memory allow (NVIDIA)."""
        shared = _SHARED_BYTES.get(self.target)
        if shared is None:
            return None
        warps, most = self.config["num_warps"], _WARPS.get(self.target, 64)
        # Each of the 4 schedulers has 16384 registers, and allocates them to warps in units of 256: 8 a thread.
        warps_per_scheduler = 16384 // (32 * (self.registers + 7 & ~7))
        programs = [most // warps, 4 * warps_per_scheduler // warps]
        if self.shared_bytes:
            programs.append(shared // (self.shared_bytes + 1024))  # CUDA reserves 1 KiB per program
        return min(programs) * warps / most

    def row(self) -> dict[str, Any]:
        """Return everything but the assembly, for a table or JSON.

        The row includes the main loop, the first that evaluates the activation for pairs: its instructions and the
        share of them that is arithmetic. One instruction issues per cycle, so this share bounds the fraction of peak.
        """
        row = {name: value for name, value in asdict(self).items() if name != "assembly"}
        row |= dict.fromkeys(_LOOP_COLUMNS)
        row["occupancy"] = self.occupancy()
        pairs = self.kernel in ("pairwise_mixup_loss", "gradient_descent") and self.direction != "erm"
        loops = self._evaluation_loops() if pairs else []
        if loops:
            (length, evaluations), *_ = self.evaluation_loops()
            arithmetic = sum(opcode.split(".")[0] in ("FADD", "FMUL", "FFMA", "FMNMX") for opcode in loops[0])
            numbers = length, evaluations, length / evaluations, arithmetic / length
            row |= dict(zip(_LOOP_COLUMNS, numbers, strict=True))
        return row


_LOOP_COLUMNS = ("loop_instructions", "evaluations_per_iteration", "instructions_per_evaluation", "fraction_of_peak")
# shared memory and warps of a multiprocessor; 64 warps unless named
_SHARED_BYTES = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "sm_120": 100 << 10}
_WARPS = {"sm_120": 48}


#: the files of kernels/triton and kernels/cuda that hold kernels
KERNELS = tuple(
    case.kernel
    for case in (
        PatchConvCase, PairwiseCase, MixupCase, CutmixCase, CrossEntropyCase, BinaryCrossEntropyCase,
        GradientDescentCase,
    )
)  # fmt: skip


def shipped(target: str) -> list[Case]:
    """List cases that cover every configuration that ships for a target, and every specialisation of a kernel.

    Without NVRTC the CUDA C++ kernels are left out.
    """
    from mixfeat.kernels import cuda

    half, single, default = torch.bfloat16, torch.float32, PolyReLU()
    cases: list[Case] = [
        PatchConvCase("mix", dtype, 50, default, mix=mix) for dtype, mix in ((half, True), (single, False))
    ]
    cases += [PatchConvCase("sum", half, 64, default)]
    for direction in ("kept_input", "kept_weight"):
        cases += [PatchConvCase(direction, dtype, 256, default) for dtype in (half, single)]
        if TARGETS[target][0] == "cuda":
            cases += [PatchConvCase(direction, single, 256, default, matmul_precision="high")]
    # With three filters per class forward takes its narrow tiles.
    for direction, filters in (("forward", 10), ("forward", 3), ("backward_input", 10), ("backward_weight", 10)):
        case = partial(PatchConvCase, direction, filters=filters)
        cases += [case(half, dim, default) for dim in (32, 64, 128, 256)]
        cases += [case(half, dim, default, mix=True) for dim in (32, 64)]
        cases += [case(single, dim, default) for dim in (32, 64, 128)]
        cases += [case(single, 32, default, mix=True), case(half, 64, ReLU())]
        cases += [case(half, 64, default, samples=samples) for samples in (1, 9)]
        if TARGETS[target][0] == "cuda":  # AMD's matrix units take float32 directly
            cases += [case(single, dim, default, matmul_precision="high") for dim in (32, 64, 128)]
            cases += [case(single, 32, default, mix=True, matmul_precision="high")]
    cases += [PatchConvCase("backward_input", half, 64, default, filters=filters) for filters in (1, 3)]
    case = partial(PatchConvCase, "forward")
    cases += [case(torch.float16, 64, default)]
    cases += [
        case(half, 64, activation) for activation in (PolyReLU(15, 0.5, False), PowerReLU(3), Power(16), Identity())
    ]
    for samples in (50, 1024, 4096):
        directions = ("pack", "logits", "softmax", "gradient")
        cases += [PairwiseCase(direction, single, default, samples) for direction in directions]
    cases += [PairwiseCase(direction, half, default) for direction in ("pack", "gradient")]
    cases += [PairwiseCase("gradient", single, default, deterministic=True)]
    cases += [PairwiseCase(direction, single, default, readout=True) for direction in ("logits", "gradient", "readout")]
    cases += [
        PairwiseCase(direction, single, activation)
        for direction in ("logits", "gradient")
        for activation in (PolyReLU(15, 0.5, False), Power(16), ReLU())
    ]
    # aligned rows, unaligned rows, and rows shorter than a tile
    for dtype in (single, half):
        cases += [MixupCase("forward", dtype, width, dtype) for width in (150528, 147, 10)]
        cases += [MixupCase("backward", dtype, width, dtype) for width in (150528, 10)]
        cases += [MixupCase("forward", dtype, 150528, torch.uint8)]
        labels = partial(CrossEntropyCase, "classes", dtype)
        cases += [labels(classes, 0.1) for classes in (10, 127, 1000, 1001, 50257, 50304)]
        cases += [*(labels(classes) for classes in (1000, 50304)), labels(50304, 0.1, need_grad=False)]
        cases += [CrossEntropyCase("dense", dtype, classes, 0.1) for classes in (10, 1000, 1001, 50257, 50304)]
        cases += [CrossEntropyCase("scale", dtype, classes) for classes in (1001, 50304)]
        cases += [
            CrossEntropyCase(direction, dtype, classes, 0.1, lse_square_scale=1e-4)
            for direction in ("classes", "backward")
            for classes in (10, 1000, 50257)
        ]
        cases += [CrossEntropyCase("written", dtype, classes) for classes in (10, 1000, 50304)]
        cases += [CutmixCase("forward", dtype, side) for side in (224, 9)]
        cases += [CutmixCase("backward", dtype, 224)]
        cases += [BinaryCrossEntropyCase("forward", dtype, classes) for classes in (10, 1000)]
    cases += [CutmixCase("forward", torch.uint8, 224, channels_last=True)]
    cases += [BinaryCrossEntropyCase("forward", half, 1001, options=True)]
    cases += [BinaryCrossEntropyCase("forward", single, 1000, reduce=False)]
    cases += [CrossEntropyCase(direction, single, 1000) for direction in ("count", "mean")]
    backend, capability, _ = TARGETS[target]
    if backend == "cuda" and cuda.unavailable() is None:
        patches = 5 if target == "sm_120" else 12  # limited by shared memory
        descent = partial(GradientDescentCase, dtype=single, capability=int(capability))
        cases += [descent("midpoint", num_patches=patches)]
        cases += [descent(objective, num_patches=min(patches, 8)) for objective in ("nodes", "erm")]
    return cases


def compile_case(case: Case, target: str) -> CompiledKernel:
    """Compile one case for one target, in a process where Triton does not interpret its kernels."""
    launch = recorded_launch(case, TARGETS[target][0])
    return compile_launch(launch, target, case.kernel, case.direction, _name(case.dtype))


def compile_launch(launch: Any, target: str, kernel: str, direction: str, dtype: str) -> CompiledKernel:
    """Compile a recorded launch; the other arguments name it."""
    compile = _compile_cuda if kernel == "gradient_descent" else _compile_triton
    config, resources = compile(launch, target)
    return CompiledKernel(kernel, direction, dtype, config, target, **resources)


def _compile_triton(launch: Any, target: str) -> tuple[dict[str, Any], dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        signature[name] = _type(value)
        if isinstance(value, torch.Tensor):
            attributes[i,] = [["tt.divisibility", 16]]
        elif value is None:
            constants[name] = None
    signature |= dict.fromkeys(launch.constants, "constexpr")
    backend, capability, _ = TARGETS[target]
    options = launch.options(backend, capability if isinstance(capability, int) else 0)
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(*TARGETS[target]),
        options=options,
    )
    resources = _amd(compiled) if backend == "hip" else _nvidia(compiled.asm["cubin"])
    return launch.constants | options, resources | {"shared_bytes": compiled.metadata.shared}


def _compile_cuda(launch: Any, target: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from mixfeat.kernels import cuda

    _, capability, warp_size = TARGETS[target]
    resources = _nvidia(cuda.compile(launch.kernel, launch.constants, int(capability)))
    config = dict(launch.constants) | {"num_warps": launch.threads // warp_size}
    return config, resources | {"shared_bytes": launch.shared_bytes}


def compile_pool(jobs: int | None = None) -> ProcessPoolExecutor:
    """Start processes for :func:`compile_case`; they ignore this process's TRITON_INTERPRET."""
    return ProcessPoolExecutor(jobs or os.cpu_count(), get_context("spawn"), initializer=_no_interpreter)


def compile_report(
    targets: Iterable[str] = TARGETS, kernels: Iterable[str] = KERNELS, jobs: int | None = None
) -> Iterator[tuple[Case, CompiledKernel]]:
    """Compile the shipped cases of these kernels for each target, ``jobs`` at a time (default: one per core)."""
    cases = [(case, target) for target in targets for case in shipped(target) if case.kernel in kernels]
    with compile_pool(jobs) as pool:
        futures = [(case, pool.submit(compile_case, case, target)) for case, target in cases]
        for case, future in futures:
            yield case, future.result()


def _no_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def recorded_launch(case: Case, backend: str = "cuda") -> Any:
    """Return the launch of a case's kernel on GPUs of this backend."""
    matmul = torch.backends.cuda.matmul
    previous = matmul.fp32_precision
    matmul.fp32_precision = "ieee" if case.matmul_precision == "highest" else "tf32"
    try:
        with case.record(backend) as launches:
            case.call()
    finally:
        matmul.fp32_precision = previous
    return case.launch(launches)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.uint8: "u8",
}  # fmt: skip


def _type(value: Any) -> str:
    """Return Triton's name for the type of a kernel's argument."""
    if isinstance(value, torch.Tensor):
        return "*" + _DTYPES[value.dtype]
    return "constexpr" if value is None else "fp32" if isinstance(value, float) else "i32"


def _nvidia(binary: bytes) -> dict[str, Any]:
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary)
        usage, sass = (
            subprocess.run([tools / tool, *options, cubin], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "--no-dataflow"))
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
        "vector_accesses": {
            "load": _count(r"\bLDG\.E[.\w]*\.128", sass),
            "store": _count(r"\bSTG\.E[.\w]*\.128", sass),
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
        "vector_accesses": {
            kind: _count(rf"\b(?:global|buffer)_{kind}_dwordx4", assembly) for kind in ("load", "store")
        },
        "assembly": assembly,
    }


def _innermost_loops(sass: str) -> list[list[str]]:
    """List the opcodes of each loop without a loop inside, as nvdisasm prints them."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            opcodes.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:  # backward: its label came before
                loops.append((labels[target[0]], len(opcodes)))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [opcodes[begin:end] for begin, end in inner]


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
