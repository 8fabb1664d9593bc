"""``mixfeat check``: every operator on every backend that runs here, against the reference in float64.

An error is ||result - truth|| / ||truth||, of values and of gradients. float32 and float64 have fixed budgets; half
precision has twice what plain PyTorch errs in that dtype on the same inputs, formed by the reference.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixfeat import backends, functional, reference
from mixfeat.activations import Identity, PolyReLU, Power, PowerReLU

__all__ = ["DTYPES", "OPERATORS", "Operator", "Outcome", "check", "checks"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BUDGETS = {torch.float32: 1e-5, torch.float64: 1e-13}
_NUMBERS, _DRAWS = 64, 16  # the relative error of a few numbers, any of which may cancel, says little: then draw more

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Operator:
    """What is checked of one operator.

    Attributes:
        ours: the public function.
        formula: the reference, which takes the same arguments and is differentiated by autograd.
        draw: arguments for a shape, in float64 on the CPU, drawn by a generator.
        differentiated: the arguments to which gradients are checked. They and ``cast`` get the dtype under test.
        on_cpu: arguments that stay there.
        quick, full, interpreted: shapes; the last for Triton's interpreter, in which every operation takes long.
    """

    ours: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    draw: Callable[..., Arguments]
    differentiated: tuple[str, ...]
    quick: tuple[tuple[Any, ...], ...]
    full: tuple[tuple[Any, ...], ...]
    interpreted: tuple[tuple[Any, ...], ...]
    cast: tuple[str, ...] = ()
    on_cpu: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """One operator on one backend in one dtype: the worst of all shapes.

    Attributes:
        worst: of each output (value and gradients): error, what plain PyTorch errs there, budget, and the shape, where
            the error comes closest to its budget or passes it furthest.
        repeats: whether a second call gave the same bits.
        failures: what went wrong, one line each; empty if nothing did.
    """

    operator: str
    backend: str
    dtype: str
    cases: int
    worst: dict[str, dict[str, Any]]
    repeats: bool
    failures: list[str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every output of every case was within its budget, and repeated."""
        return not self.failures


def _normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _draw_network(
    generator: torch.Generator, samples: int, patches: int, features: int, classes: int, filters: int, activation: Any
) -> Arguments:
    """Pre-activations of the order of the threshold."""
    scale = getattr(activation, "rho", 0.5) / math.sqrt(max(1, features))
    return {
        "input": _normal(generator, samples, patches, features),
        "weight": _normal(generator, classes, filters, features) * scale,
        "activation": activation,
    }


def _draw_partners(generator: torch.Generator, samples: int) -> Arguments:
    index = torch.randint(max(1, samples), (samples,), generator=generator)
    return {"index": index, "lam": torch.rand(samples, generator=generator)}


def _draw_patch_conv(generator: torch.Generator, mixed: bool, *shape: Any) -> Arguments:
    return _draw_network(generator, *shape) | (_draw_partners(generator, shape[0]) if mixed else {})


def _draw_pairwise(generator: torch.Generator, num_nodes: int, samples: int, *shape: Any) -> Arguments:
    target = torch.randint(shape[2], (samples,), generator=generator)
    lam, lam_weight = functional.beta_quadrature(1.0, num_nodes)
    return _draw_network(generator, samples, *shape) | {"target": target, "lam": lam, "lam_weight": lam_weight}


def _pairwise_formula(lam: Tensor, lam_weight: Tensor, **arguments: Any) -> Tensor:
    return reference.pairwise_mixup_loss(**arguments, lam=lam.tolist(), lam_weight=lam_weight.tolist())


def _draw_mixup(generator: torch.Generator, *size: int) -> Arguments:
    return {"input": _normal(generator, *size)} | _draw_partners(generator, size[0])


def _draw_logits(
    generator: torch.Generator, samples: int, classes: int, label_smoothing: float, reduction: str
) -> Arguments:
    input = 3 * _normal(generator, samples, classes)
    return {"input": input, "label_smoothing": label_smoothing, "reduction": reduction}


def _draw_mixup_cross_entropy(generator: torch.Generator, samples: int, classes: int, *options: Any) -> Arguments:
    target_a, target_b = torch.randint(classes, (2, samples), generator=generator)
    target_b[::3], target_a[1::5] = target_a[::3], -100
    lam = torch.rand(samples, generator=generator)
    targets = {"target_a": target_a, "target_b": target_b, "lam": lam}
    return _draw_logits(generator, samples, classes, *options) | targets


def _draw_soft_target(generator: torch.Generator, samples: int, classes: int, *options: Any) -> Arguments:
    target = torch.rand(samples, classes, generator=generator, dtype=torch.float64)
    target /= target.sum(1, keepdim=True)
    return _draw_logits(generator, samples, classes, *options) | {"target": target}


_POLY = PolyReLU(8, 0.1)

OPERATORS = {
    "patch_conv": Operator(
        functional.patch_conv, reference.patch_conv, _draw_patch_conv, ("input", "weight"),
        quick=(
            (False, 33, 12, 20, 10, 10, _POLY), (True, 7, 3, 5, 3, 5, _POLY), (True, 1, 1, 1, 1, 1, _POLY),
            (True, 0, 2, 3, 4, 5, _POLY), (False, 5, 2, 3, 1, 150, PowerReLU(3)), (False, 17, 3, 12, 4, 5, Power(2)),
            (True, 40, 4, 33, 7, 3, PolyReLU(5, 0.2, clamp=False)), (False, 9, 2, 64, 3, 4, Identity()),
        ),
        full=((True, 300, 16, 64, 10, 16, _POLY), (False, 64, 49, 257, 10, 3, _POLY)),
        interpreted=((False, 9, 2, 20, 3, 4, _POLY), (True, 5, 3, 7, 2, 3, PowerReLU(3)), (True, 1, 1, 1, 1, 1, _POLY)),
    ),
    "pairwise_mixup_loss": Operator(
        functional.pairwise_mixup_loss, _pairwise_formula, _draw_pairwise, ("input", "weight"),
        quick=(
            (1, 17, 4, 6, 5, 3, _POLY), (3, 9, 3, 5, 3, 5, _POLY), (2, 12, 2, 7, 4, 1, PowerReLU(3)),
            (1, 33, 5, 20, 10, 4, PolyReLU(4, 0.1)), (1, 10, 1, 9, 40, 2, Power(2)),
            (1, 1, 1, 1, 2, 1, _POLY),
        ),
        full=((1, 67, 3, 8, 5, 4, _POLY), (4, 40, 4, 6, 10, 5, _POLY), (1, 12, 2, 10, 300, 1, _POLY)),
        interpreted=((1, 9, 2, 5, 3, 2, _POLY), (2, 6, 2, 3, 2, 1, _POLY)),
        on_cpu=("lam", "lam_weight"),
    ),
    "mixup": Operator(
        functional.mixup, reference.mixup, _draw_mixup, ("input",),
        quick=((33, 3, 8, 8), (7, 5), (128, 1), (3, 70001), (0, 4), (1, 3)),
        full=((256, 3, 32, 32), (9,), (2, 2**20 + 3)),
        interpreted=((9, 3, 4), (64, 1), (2, 1030)),
    ),
    "mixup_cross_entropy": Operator(
        functional.mixup_cross_entropy, reference.mixup_cross_entropy, _draw_mixup_cross_entropy, ("input",),
        quick=((64, 10, 0.0, "mean"), (33, 65, 0.1, "none"), (17, 1000, 0.0, "sum"), (5, 2, 0.0, "mean")),
        full=((1024, 1000, 0.1, "mean"), (3, 50257, 0.0, "none"), (2, 2**18, 0.0, "mean")),
        interpreted=((9, 10, 0.0, "mean"), (6, 33, 0.1, "none")),
    ),
    "soft_target_cross_entropy": Operator(
        functional.soft_target_cross_entropy, reference.soft_target_cross_entropy, _draw_soft_target, ("input",),
        quick=((64, 10, 0.0, "mean"), (33, 65, 0.1, "none"), (17, 1000, 0.0, "sum"), (5, 2, 0.0, "mean")),
        full=((1024, 1000, 0.1, "mean"), (3, 50257, 0.0, "none")),
        interpreted=((9, 10, 0.0, "mean"), (6, 33, 0.1, "none")),
        cast=("target",),
    ),
}  # fmt: skip


def checks(
    backend_names: Sequence[str], operators: Iterable[str] = OPERATORS, dtypes: Iterable[str] = DTYPES
) -> list[tuple[str, str, str]]:
    """(operator, backend, dtype) that :func:`check` can run."""
    return [
        (operator, backend, dtype)
        for operator in operators
        for backend in backend_names
        for dtype in dtypes
        if not (backend == "triton" and dtype == "float64")
    ]


def check(operator: str, backend: str, dtype: str, *, seed: int = 0, quick: bool = False) -> Outcome:
    """Run one operator on one backend in one dtype, over all its shapes.

    Args:
        operator: a key of ``OPERATORS``.
        backend: "cpu", "triton" (on the GPU, else in the interpreter) or "reference" (on the GPU if there is one).
        dtype: a key of ``DTYPES``.
        seed: of the inputs.
        quick: without the larger shapes.

    Raises:
        ValueError: the backend is not available here.
    """
    entry, data_type = OPERATORS[operator], DTYPES[dtype]
    gpu = torch.cuda.is_available() and backend != "cpu"
    interpreted = backend == "triton" and not gpu
    shapes = entry.interpreted if interpreted else entry.quick if quick else entry.quick + entry.full
    generator = torch.Generator().manual_seed(seed)
    worst: dict[str, dict[str, Any]] = {}
    failures: list[str] = []
    repeats, start = True, time.perf_counter()
    with backends.backend(backend), _deterministic():
        for shape in shapes:
            try:
                found, again = _errors(entry, shape, data_type, "cuda" if gpu else "cpu", generator)
            except Exception as trouble:  # a kernel that does not even run is a failure like any other
                reason = (str(trouble).strip() or "no message").splitlines()[0]
                failures.append(f"{shape}: {type(trouble).__name__}: {reason}")
                continue
            repeats = repeats and again
            for name, (error, plain) in found.items():
                budget = _BUDGETS.get(data_type, 2 * plain)
                excess = error / budget if budget else math.inf if error else 0.0
                if not error <= budget:
                    failures.append(f"{shape}: {name}: error {error:.2e} exceeds its budget {budget:.2e}")
                if name not in worst or not excess <= worst[name]["of budget"]:
                    worst[name] = {
                        "error": error, "plain": plain, "budget": budget, "of budget": excess, "shape": repr(shape)
                    }  # fmt: skip
        if not repeats:
            failures.append("a second call gave other bits")
    seconds = time.perf_counter() - start
    return Outcome(operator, backend, dtype, len(shapes), worst, repeats, failures, seconds)


def _errors(
    entry: Operator, shape: Sequence[Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[dict[str, tuple[float, float]], bool]:
    """By output ours, the worse of contiguous and strided inputs, and plain PyTorch's; and whether ours repeats."""
    truths: list[dict[str, Tensor]] = []
    ours, strided, plain, repeats = [], [], [], True
    draws = 1
    while len(truths) < draws:
        drawn = entry.draw(generator, *shape)
        arguments = {name: _placed(entry, name, value, dtype, device) for name, value in drawn.items()}
        exact = {name: _cast(value, torch.float64) for name, value in arguments.items()}
        upstream = _normal(generator, *entry.formula(**exact).shape).to(device, dtype)
        if upstream.numel() < _NUMBERS:
            draws = _DRAWS
        truths.append(_results(entry, entry.formula, exact, upstream))
        plain.append(_results(entry, entry.formula, arguments, upstream))
        ours.append(_results(entry, entry.ours, arguments, upstream))
        strided.append(_results(entry, entry.ours, {n: _strided(v) for n, v in arguments.items()}, _strided(upstream)))
        again = _results(entry, entry.ours, arguments, upstream)
        repeats = repeats and all(_same_bits(ours[-1][name], again[name]) for name in again)

    def error(results: list[dict[str, Tensor]], name: str) -> float:
        """In the 2-norm over all draws; infinite where anything is not finite."""
        pairs = [(result[name].double(), truth[name]) for result, truth in zip(results, truths, strict=True)]
        square = sum((a - b).square().sum().item() for a, b in pairs)
        scale = sum(b.square().sum().item() for _, b in pairs)
        return math.sqrt(square / max(scale, 1e-300)) if math.isfinite(square) else math.inf

    return {name: (max(error(ours, name), error(strided, name)), error(plain, name)) for name in truths[0]}, repeats


def _placed(entry: Operator, name: str, value: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, Tensor) and name not in entry.on_cpu:
        value = value.to(device)
    return _cast(value, dtype) if name in entry.differentiated + entry.cast else value


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _strided(value: Any) -> Any:
    """The same numbers, with gaps between them in memory."""
    return torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) else value


def _results(entry: Operator, f: Callable[..., Tensor], arguments: Arguments, upstream: Tensor) -> dict[str, Tensor]:
    leaves = {name: arguments[name].detach().requires_grad_() for name in entry.differentiated}
    value = f(**arguments | leaves)
    grads = torch.autograd.grad(value, list(leaves.values()), upstream.to(value.dtype))
    return {"value": value.detach()} | {f"{name} grad": grad for name, grad in zip(leaves, grads, strict=True)}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextmanager
def _deterministic() -> Iterator[None]:
    """Under PyTorch's deterministic algorithms, with which results repeat on a GPU too and new memory starts as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
