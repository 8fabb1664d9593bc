"""Launches of a call of each named shape on a GPU, recorded on meta tensors: needs no GPU."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import mixfeat as mf
from mixfeat import backends, report
from mixfeat.ops import registration

from .shapes import BATCHES, THEORY, Network, logits, networks

__all__ = ["MULTIPROCESSORS", "Call", "Recorded", "calls", "instructions", "row"]

#: Multiprocessors by GPU; each has four schedulers
MULTIPROCESSORS = {"H100": 132, "A100": 108}
#: What an H100 does in a microsecond, by unit of work, products in float32
MICROSECOND = {"bytes": 3e6, "evaluations": 4.2e6, "products": 6.7e7}
ACTIVATION = mf.PolyReLU(8, 0.1)
BOTH = ("forward", "forward + backward")


@dataclass(frozen=True)
class Call:
    """A call of an operator.

    Attributes:
        operator, case, direction, dtype: what names it, as in the benchmarks.
        run: calls it and returns all tensors that must be read or written.
        work: activations ("evaluations") or multiply-adds ("products") of the forward pass.
    """

    operator: str
    case: str
    direction: str
    dtype: torch.dtype
    run: Callable[[], Sequence[Tensor]]
    work: Mapping[str, float]

    @property
    def kernel(self) -> str:
        """Return the file that holds its kernels, as :data:`mixfeat.report.KERNELS` names it."""
        return max((name for name in report.KERNELS if self.operator.endswith(name)), key=len)


@dataclass(frozen=True)
class Recorded:
    """A launch: of a kernel of mixfeat's, or of a PyTorch operation, whose programs and warps are not known (0).

    ``work`` has the bytes of its tensors, and its share of the call's work if it is one of the main kernels.
    """

    kernel: str
    work: Mapping[str, float]
    programs: int = 0
    warps: int = 0
    launch: Any = None

    @property
    def has_work(self) -> bool:
        """Return whether there is a microsecond of work for all multiprocessors."""
        return any(amount >= MICROSECOND[unit] for unit, amount in self.work.items())


def calls() -> Iterator[Call]:
    """List the calls of every named shape, dtype and direction."""
    half, single = torch.bfloat16, torch.float32
    for name, shape in networks(gpu=True).items():
        for dtype in (single, half):
            for direction in (*BOTH, "mixed, all gradients"):
                run = functools.partial(_patch_conv, shape, dtype, direction)
                yield Call("patch_conv", f"{name} {tuple(shape)}", direction, dtype, run, {"products": shape.products})
    pairs = {name: (None, shape) for name, shape in networks(gpu=True).items() if name != "patches"}
    for name, (runs, shape) in (pairs | {"theory, R=8": (8, THEORY), "theory, R=128": (128, THEORY)}).items():
        for dtype, direction in [(single, one) for one in BOTH] + [(half, BOTH[1])]:
            run = functools.partial(_pairwise, shape, runs, dtype, direction)
            work = {"evaluations": (runs or 1) * shape.pair_evaluations}
            yield Call("pairwise_mixup_loss", f"{name} {tuple(shape)}", direction, dtype, run, work)
    for runs in (8, 128):
        run = functools.partial(_gradient_descent, THEORY, runs)
        work = {"evaluations": runs * 32 * THEORY.pair_evaluations}
        yield Call("gradient_descent", f"theory, R={runs} {tuple(THEORY)}", "32 steps", single, run, work)
    images = {name: batch for name, batch in BATCHES.items() if len(batch) == 4}
    for operator, batches in (("mixup", BATCHES), ("cutmix", images)):
        for (name, batch), dtype, direction in itertools.product(batches.items(), (single, half), BOTH):
            run = functools.partial(_mixing, operator, batch, dtype, direction)
            yield Call(operator, f"{name} {batch}", direction, dtype, run, {})
    for operator in ("mixup_cross_entropy", "soft_target_cross_entropy", "mixup_binary_cross_entropy"):
        for (name, size), dtype, direction in itertools.product(logits(gpu=True).items(), (single, half), BOTH):
            run = functools.partial(_loss, operator, size, dtype, direction)
            yield Call(operator, f"{name} {size}", direction, dtype, run, {})


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _differentiated(
    direction: str, call: Callable[..., Tensor], tensors: Sequence[Tensor], wrt: Sequence[int], **options: Any
) -> Sequence[Tensor]:
    if direction == "forward":
        return *tensors, call(*tensors, **options)
    for place in wrt:
        tensors[place].requires_grad_()
    output = call(*tensors, **options)
    grad = torch.empty_like(output)
    return *tensors, output, grad, *torch.autograd.grad(output, [tensors[place] for place in wrt], grad)


def _patch_conv(shape: Network, dtype: torch.dtype, direction: str) -> Sequence[Tensor]:
    samples, patches, patch_dim, classes, filters = shape
    tensors = [_meta(samples, patches, patch_dim, dtype=dtype), _meta(classes, filters, patch_dim, dtype=dtype)]
    mix = {}
    if direction.startswith("mixed"):
        mix = {"index": _meta(samples, dtype=torch.int64), "lam": _meta(samples)}
    return _differentiated(
        direction, functools.partial(mf.patch_conv, activation=ACTIVATION), tensors, [0, 1] if mix else [1], **mix
    )


def _pairwise(shape: Network, runs: int | None, dtype: torch.dtype, direction: str) -> Sequence[Tensor]:
    samples, patches, patch_dim, classes, filters = shape
    weight = _meta(*([runs] if runs else []), classes, filters, patch_dim, dtype=dtype)
    tensors = [_meta(samples, patches, patch_dim, dtype=dtype), weight, _meta(samples, dtype=torch.int64)]
    return _differentiated(direction, functools.partial(mf.pairwise_mixup_loss, activation=ACTIVATION), tensors, [1])


def _gradient_descent(shape: Network, runs: int) -> Sequence[Tensor]:
    from mixfeat.kernels.cuda.gradient_descent import gradient_descent

    samples, patches, patch_dim, classes, filters = shape
    x, w = _meta(1, samples, patches, patch_dim), _meta(runs, classes, filters, patch_dim)
    y = _meta(1, samples, dtype=torch.int64)
    weight, loss, _ = gradient_descent(x, w, y, ACTIVATION.polynomial, [0.5], [1.0], 0.1, 32, capability=90)
    return x, w, y, weight, loss


def _mixing(operator: str, batch: tuple[int, ...], dtype: torch.dtype, direction: str) -> Sequence[Tensor]:
    lam_or_box = _meta() if operator == "mixup" else _meta(4, dtype=torch.int64)
    tensors = [_meta(*batch, dtype=dtype), _meta(batch[0], dtype=torch.int64), lam_or_box]
    return _differentiated(direction, getattr(mf, operator), tensors, [0])


def _loss(operator: str, size: tuple[int, int], dtype: torch.dtype, direction: str) -> Sequence[Tensor]:
    samples = size[0]
    label = functools.partial(_meta, samples, dtype=torch.int64)
    dense = operator.startswith("soft")
    targets = [_meta(*size, dtype=dtype)] if dense else [label(), label(), _meta()]
    return _differentiated(direction, getattr(mf, operator), [_meta(*size, dtype=dtype), *targets], [0])


def _bytes(tensors: Sequence[Any]) -> int:
    """Add up the memory of distinct tensors; an expanded one takes no more than there is."""
    sizes = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_meta:
            storage = tensor.untyped_storage()
            key = StorageWeakRef(storage).cdata, tensor.storage_offset(), tensor.shape
            sizes[key] = min(tensor.numel() * tensor.itemsize, storage.nbytes())
    return sum(sizes.values())


class _Operations(TorchDispatchMode):
    """Lists PyTorch's operations on meta tensors that would launch something: neither views nor new memory alone."""

    def __init__(self, launches: list[Any]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        outputs = [one for one in (result if isinstance(result, tuple | list) else [result]) if isinstance(one, Tensor)]
        inputs = [one for arg in args for one in (arg if isinstance(arg, list) else [arg]) if isinstance(one, Tensor)]
        known = {StorageWeakRef(one.untyped_storage()) for one in inputs}
        is_view = not name.endswith("_") and all(StorageWeakRef(one.untyped_storage()) in known for one in outputs)
        if any(one.is_meta and one.numel() for one in outputs) and not is_view and "empty" not in name:
            self.launches.append(Recorded(name, {"bytes": _bytes([*inputs, *outputs])}))
        return result


def record(call: Call, multiprocessors: int) -> tuple[list[Recorded], int]:
    """Return what a call launches on an NVIDIA GPU, in no order, and the bytes that it must read or write at least."""
    from mixfeat.kernels import cuda
    from mixfeat.kernels.triton import launch

    operations: list[Recorded] = []
    with (
        mock.patch.object(backends, "serving", return_value="triton"),
        mock.patch.object(registration, "can_bypass_dispatcher", return_value=True),
        mock.patch.object(launch, "multiprocessors", return_value=multiprocessors),
        launch.record("cuda") as kernels, cuda.record() as descents, _Operations(operations),
    ):  # fmt: skip
        least = _bytes(call.run())
    programs: Counter[str] = Counter()
    for one in kernels:
        programs[one.kernel.__name__] += one.programs
    launches = [
        Recorded(
            one.kernel, {**call.work, "bytes": _bytes(one.arguments)}, one.blocks, one.blocks * one.threads // 32
        )
        for one in descents
    ]  # fmt: skip
    for one in kernels:
        name = one.kernel.__name__
        work = {"bytes": float(_bytes(one.arguments))}
        if name.removesuffix("_kernel").rpartition("_")[2] in ("forward", "input", "weight", "logits", "gradient"):
            work |= {unit: amount * one.programs / programs[name] for unit, amount in call.work.items()}
        launches.append(Recorded(name, work, one.programs, one.programs * one.num_warps, one))
    return launches + operations, least


def instructions(call: Call, target: str = "sm_90") -> tuple[float, float] | None:
    """Return the instructions of the main loops of the all-pairs loss, and the least: their arithmetic without padding.

    They are counted in the compiled kernels, for each thread. Other kernels have no such loop.
    """
    launches, _ = record(call, MULTIPROCESSORS["H100"])
    total = least = 0.0
    for one in launches:
        if "evaluations" in one.work and one.launch is not None:
            loop = _main_loop(one, target)
            per_evaluation, arithmetic = loop["instructions_per_evaluation"], loop["fraction_of_peak"]
            total += _evaluated(one.launch) * per_evaluation
            least += one.work["evaluations"] * per_evaluation * arithmetic
    return (total, least) if total else None


_LOOPS: dict[Any, dict[str, Any]] = {}


def _main_loop(recorded: Recorded, target: str) -> dict[str, Any]:
    one = recorded.launch
    types = tuple(value.dtype if isinstance(value, Tensor) else type(value) for value in one.arguments)
    key = recorded.kernel, types, tuple(one.constants.items()), one.num_warps, target
    if key not in _LOOPS:
        _LOOPS[key] = report.compile_launch(one, target, "pairwise_mixup_loss", recorded.kernel, "").row()
    return _LOOPS[key]


def _evaluated(launch: Any) -> int:
    """Count the activations that a launch of the all-pairs loss computes, with those that pad its tiles."""
    sizes = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    constants, filters, block = launch.constants, sizes["P"] * sizes["M"], launch.constants["BLOCK"]
    if "row_blocks" in sizes:
        rows, columns = sizes["row_blocks"], sizes["column_blocks"]
        layers = launch.programs // (rows * columns)
        tiles = rows * (rows + 1) // 2 + rows * (columns - rows) if constants["SYMMETRIC"] else rows * columns
        return int(layers * tiles * block**2 * filters)
    own, features, settings = constants["OWN"], constants["FEATURES"], constants["SETTINGS"]
    tiles, own_blocks = math.ceil(filters / features), math.ceil(sizes["owns"] / own)
    layers = launch.programs // (tiles * own_blocks * math.ceil(sizes["others"] / sizes["length"]))
    others = [
        (sizes["others"] - own * i if settings.owns_rows else min(sizes["others"], own * (i + 1)))
        if settings.symmetric else sizes["others"]
        for i in range(own_blocks)
    ]  # fmt: skip
    return int(layers * tiles * features * own * sum(others))


def row(call: Call) -> dict[str, Any]:
    """Return a call's launches and work, against the least possible, for a table or JSON.

    ``programs`` and ``warps_per_scheduler`` are, for each GPU, those of the launch with the fewest warps among the
    launches that have work for all multiprocessors, or of the one with the most bytes where none has.
    """
    found: dict[str, Any] = {
        "operator": call.operator, "case": call.case, "direction": call.direction,
        "dtype": str(call.dtype).removeprefix("torch."),
    }  # fmt: skip
    programs, warps, underfilled = {}, {}, []
    for gpu, multiprocessors in MULTIPROCESSORS.items():
        launches, least = record(call, multiprocessors)
        known = [one for one in launches if one.programs]
        main = min(known, key=lambda one: (not one.has_work, one.warps if one.has_work else -one.work["bytes"]))
        programs[gpu], warps[gpu] = main.programs, main.warps / (4 * multiprocessors)
        underfilled += [f"{gpu}: {one.kernel}" for one in known if one.has_work and one.programs < multiprocessors]
        if gpu == "H100":
            found |= {
                "launches": len(launches), "kernels": [one.kernel for one in launches],
                "bytes": int(sum(one.work["bytes"] for one in launches)), "least_bytes": least,
            }  # fmt: skip
    return found | {"programs": programs, "warps_per_scheduler": warps, "underfilled": underfilled}
