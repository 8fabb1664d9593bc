"""The table of the public operators: the tests and ``mixfeat check`` run over it, benchmarks check results by it.

An entry names an operator's function and its definition, draws arguments for both, and lists the sizes and options at
which they are compared. A new operator is one more entry.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixfeat import functional, reference
from mixfeat.activations import Activation, Identity, LeakyReLU, PolyReLU, Power, PowerReLU, ReLU

__all__ = ["DTYPES", "OPERATORS", "Case", "Draw", "Operator", "deterministic", "relative_error", "same_bits"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}

Arguments = dict[str, Any]
Results = dict[str, Tensor]  # "value", and "<argument> grad" for each differentiated argument

# A few numbers may cancel, which makes their relative error large. So arguments are drawn until this many numbers or
# samples are compared.
_ENOUGH, _MOST_DRAWS = 64, 16


@dataclass(frozen=True)
class Case:
    """The sizes of a call's arguments, by the letters of their dimensions, and its options."""

    sizes: tuple[int, ...]
    dims: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = "x".join(f"{name}{size}" for name, size in itertools.zip_longest(self.dims, self.sizes, fillvalue=""))
        options = (repr(v) if isinstance(v, Activation) else f"{k}={v}" for k, v in self.options.items())
        return "-".join([sizes, *options])


@dataclass(frozen=True)
class Draw:
    """The arguments of one call, the upstream gradient of its value, and the definition's results."""

    operator: "Operator"
    arguments: Arguments
    upstream: Tensor

    @cached_property
    def truth(self) -> Results:
        """Return the results in float64."""
        exact = {name: _cast(value, torch.float64) for name, value in self.arguments.items()}
        return self.operator.results(self.operator.formula, exact, self.upstream)

    @cached_property
    def plain(self) -> Results:
        """Return the results of plain PyTorch in the arguments' own dtype."""
        return self.operator.results(self.operator.formula, self.arguments, self.upstream)


@dataclass(frozen=True)
class Operator:
    """A public operator.

    Attributes:
        function: the operator.
        formula: its definition, which takes the same arguments and is differentiated by autograd.
        draw: draws arguments on the CPU for a case's sizes and options, with a generator. Those in float64 are cast to
            the dtype under test, except those in ``on_cpu``.
        differentiated: the arguments that have gradients; none if the operator has no derivative.
        main: a small case of each code path, with at least 2 samples. The first has no options.
        variants: every option, at small sizes.
        degrees: every degree of every family of activations, at small sizes.
        wide: sizes beyond a kernel's block, dimension by dimension.
        large: enough work for several threads, and memory for many allocations.
        empty: sizes with one size 0.
        quick, full, interpreted: cases of ``mixfeat check``: small ones, larger ones, and those for Triton's
            interpreter, in which every operation is slow.
        on_cpu: arguments that stay on the CPU.
        accumulates: whether the value of half-precision arguments is float32.
        autocasts: whether autocast casts the differentiated arguments.
        composed: whether the Triton backend calls other operators of the table, whose tests are not repeated.
        linear: whether the value is linear in the differentiated arguments, and so has no second derivative.
        budgets: largest relative error by dtype. Half precision may have twice the error of plain PyTorch.
    """

    name: str
    function: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    draw: Callable[..., Arguments]
    differentiated: tuple[str, ...]
    main: tuple[Case, ...]
    quick: tuple[Case, ...]
    full: tuple[Case, ...]
    interpreted: tuple[Case, ...]
    variants: tuple[Case, ...] = ()
    degrees: tuple[Case, ...] = ()
    wide: tuple[Case, ...] = ()
    large: tuple[Case, ...] = ()
    empty: tuple[Case, ...] = ()
    on_cpu: tuple[str, ...] = ()
    accumulates: bool = False
    autocasts: bool = False
    composed: bool = False
    linear: bool = False
    budgets: Mapping[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 1e-5, torch.float64: 1e-13})

    def __str__(self) -> str:
        return self.name

    def problem(self, shape: tuple[int, int, int, int, int]) -> tuple[Case, ...]:
        """Make cases of a user's problem (N,P,D,C,M); none if the operator takes images."""
        n, p, d, c, _ = shape
        sizes = {"NPDCM": shape, "N": (n, p, d), "NC": (n, c)}.get(self.main[0].dims)
        return tuple(replace(case, sizes=sizes) for case in self.main) if sizes else ()

    @property
    def activates(self) -> bool:
        """Return whether the operator has an activation."""
        return self.main[0].dims == "NPDCM"

    def of_activation(self, cases: tuple[Case, ...], activation: Activation) -> tuple[Case, ...]:
        """Give the cases another activation, if the operator has one."""
        if not self.activates:
            return cases
        return tuple(replace(case, options={**case.options, "activation": activation}) for case in cases)

    @property
    def outputs(self) -> list[str]:
        """Return the names of the results."""
        return ["value", *(f"{name} grad" for name in self.differentiated)]

    def arguments(self, case: Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> Arguments:
        """Draw arguments for a case."""

        def placed(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or name in self.on_cpu:
                return value
            return value.to(device, dtype if value.dtype == torch.float64 else None)

        drawn = self.draw(generator, *case.sizes, **case.options)
        return {name: placed(name, value) for name, value in drawn.items()}

    def draws(
        self,
        case: Case,
        dtype: torch.dtype,
        device: str,
        generator: torch.Generator,
        lay_out: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Iterator[Draw]:
        """Draw arguments and upstream gradients until there are enough numbers for a meaningful error.

        ``lay_out`` places each argument in memory, except those of ``on_cpu``. It may change the numbers.
        """
        for count in itertools.count(1):
            arguments = self.arguments(case, dtype, device, generator)
            arguments = {
                name: lay_out(value) if isinstance(value, Tensor) and name not in self.on_cpu else value
                for name, value in arguments.items()
            }
            with torch.no_grad():
                shape = self.formula(**arguments).shape
            upstream = torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
            yield Draw(self, arguments, upstream)
            numbers = max(upstream.numel(), count * case.sizes[0])
            if count == _MOST_DRAWS or numbers >= _ENOUGH or upstream.numel() == 0:
                return

    def results(
        self,
        function: Callable[..., Tensor],
        arguments: Arguments,
        upstream: Tensor | None = None,
        wanted: tuple[str, ...] | None = None,
    ) -> Results:
        """Return a function's value and its gradients to the wanted arguments, by default all differentiated ones."""
        names = self.differentiated if wanted is None else wanted
        leaves = {name: arguments[name].detach().requires_grad_() for name in names}
        value = function(**arguments | leaves)
        if not leaves:
            return {"value": value}
        upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
        grads = torch.autograd.grad(value, list(leaves.values()), upstream)
        return {"value": value.detach()} | {f"{name} grad": grad for name, grad in zip(leaves, grads, strict=True)}

    def result_dtype(self, output: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of a result for arguments of this dtype."""
        return torch.promote_types(dtype, torch.float32) if output == "value" and self.accumulates else dtype

    def budget(self, dtype: torch.dtype, plain_error: float) -> float:
        """Return the largest relative error allowed, given that of plain PyTorch."""
        return self.budgets.get(dtype, 2 * plain_error)


def relative_error(results: list[Tensor], truths: list[Tensor]) -> float:
    """Return the relative error in the 2-norm, infinite if a number is finite in only one of them."""
    square = scale = 0.0
    for result, truth in zip(results, truths, strict=True):
        if result.shape != truth.shape or not torch.equal(result.isnan(), truth.isnan()):
            return math.inf
        truth = truth.nan_to_num(0.0, torch.inf, -torch.inf)
        square += (result.double().nan_to_num(0.0, torch.inf, -torch.inf) - truth).square().sum().item()
        scale += truth.square().sum().item()
    return math.sqrt(square / max(scale, 1e-300)) if math.isfinite(square) else math.inf


def same_bits(a: Results, b: Results) -> bool:
    """Return whether two results are equal bit for bit, with NaN in the same places."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key].isnan(), b[key].isnan()) and torch.equal(a[key].nan_to_num(), b[key].nan_to_num())
        for key in a
    )


@contextmanager
def deterministic() -> Iterator[None]:
    """Use PyTorch's deterministic algorithms, so that GPU results repeat and new memory starts as NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _draw_lam(generator: torch.Generator, sizes: tuple[int, ...], kind: str) -> float | Tensor:
    """Draw weights for samples or patches of ``sizes`` (N,P,...)."""
    if kind == "number":
        return 0.3
    dims = {"one for all": 0, "per sample": 1, "per patch": 2}[kind]
    return torch.rand(sizes[:dims], generator=generator, dtype=torch.float32)


def _one_tensor(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Join the results of a function into one tensor."""

    @functools.wraps(function)
    def joined(*args: Any, **kwargs: Any) -> Tensor:
        value = function(*args, **kwargs)
        return torch.cat([part.flatten() for part in value]) if isinstance(value, tuple) else value

    return joined


# networks

_POLY = PolyReLU(8, 0.1)
_ACTIVATIONS = (
    PolyReLU(1, 0.3), PolyReLU(5, 0.2, clamp=False), PolyReLU(16, 0.5), PowerReLU(3), Power(2), Power(7), ReLU(),
    Identity(), PolyReLU(4, 0.3, scale=0.25), PowerReLU(2, 0.5), LeakyReLU(0.1), PolyReLU(3, 0.2, negative_slope=0.3),
)  # fmt: skip


def _network(*sizes: int, **options: Any) -> Case:
    return Case(sizes, "NPDCM", options)


def _degrees(*sizes: int, **options: Any) -> tuple[Case, ...]:
    kinds: tuple[Callable[[int], Activation], ...] = (
        lambda q: PolyReLU(q, 0.2), lambda q: PolyReLU(q, 0.2, clamp=False), PowerReLU, Power
    )  # fmt: skip
    return tuple(_network(*sizes, activation=kind(degree), **options) for kind in kinds for degree in range(1, 17))


def _draw_network(
    generator: torch.Generator, sizes: tuple[int, ...], activation: Activation = _POLY, runs: str = "",
    readout: bool | str = False,
) -> Arguments:  # fmt: skip
    """Draw a network whose pre-activations are near the threshold; ``runs`` names the arguments that have R = 3.

    ``readout`` draws numbers, or +-1/M for "signs".
    """
    samples, patches, dim, classes, filters = sizes
    input = _normal(generator, *[3] * ("input" in runs), samples, patches, dim)
    weight = _normal(generator, *[3] * ("weight" in runs), classes, filters, dim)
    scale = getattr(activation, "rho", 0.5) / math.sqrt(max(1, dim))
    drawn = {"input": input, "weight": weight * scale, "activation": activation}
    if readout:
        second_layer = _normal(generator, *[3] * ("readout" in runs), classes, filters)
        drawn["readout"] = second_layer.sign() / filters if readout == "signs" else second_layer
    return drawn


def _draw_patch_conv(generator: torch.Generator, *sizes: int, lam: str | None = None, **options: Any) -> Arguments:
    network = _draw_network(generator, sizes, **options)
    if lam is None:
        return network
    index = torch.randint(max(1, sizes[0]), sizes[:1], generator=generator)
    return network | {"index": index, "lam": _draw_lam(generator, sizes, lam)}


def _draw_pairwise(
    generator: torch.Generator, *sizes: int, lam: float | None = None, nodes: int | str = 0, runs: str = "",
    partners: int = 0, label_lam: float | None = None, label_smoothing: float = 0.0, pairs: str = "all",
    **options: Any,
) -> Arguments:  # fmt: skip
    """Draw with ``lam`` a number, or ``nodes`` a number of quadrature nodes or "any"; without them lam is omitted."""
    drawn = _draw_network(generator, sizes, runs=runs, **options)
    given = {"label_lam": (label_lam, None), "label_smoothing": (label_smoothing, 0.0), "pairs": (pairs, "all")}
    drawn |= {name: value for name, (value, default) in given.items() if value != default}
    if partners:
        drawn["partner"] = _normal(generator, *drawn["input"].shape[:-3], partners, *sizes[1:3])
        drawn["partner_target"] = torch.randint(sizes[3], (partners,), generator=generator)
    drawn["target"] = torch.randint(sizes[3], (*[3] * ("target" in runs), sizes[0]), generator=generator)
    if lam is not None:
        drawn["lam"] = lam
    elif nodes == "any":
        drawn["lam"] = torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64)
        drawn["lam_weight"] = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    elif nodes:
        drawn["lam"], drawn["lam_weight"] = functional.beta_quadrature(1.0, int(nodes))
    return drawn


#: The number of mixed inputs and pre-activations that the reference of the all-pairs loss may hold in memory.
_MOST_IN_PAIRS = 2**24


def _draw_gradient_descent(
    generator: torch.Generator, *sizes: int, erm: bool = False, steps: int = 3, schedule: bool = False,
    momentum: float = 0.0, weight_decay: float = 0.0, **options: Any,
) -> Arguments:  # fmt: skip
    """Draw with ``erm`` for the mean cross-entropy, or ``schedule`` for a step size of each step."""
    drawn = _draw_pairwise(generator, *sizes, **options)
    lr = torch.rand(steps, generator=generator, dtype=torch.float32) / 10 if schedule else 0.05
    drawn |= {"lr": lr, "steps": steps, "momentum": momentum, "weight_decay": weight_decay}
    return drawn | {"lam": None} if erm else drawn


def _as_numbers(lam: float | Tensor | None, lam_weight: Tensor | None) -> dict[str, Any]:
    """Return nodes and their weights as the references take them."""
    return {
        "lam": lam.tolist() if isinstance(lam, Tensor) else lam,
        "lam_weight": None if lam_weight is None else lam_weight.tolist(),
    }


def _gradient_descent_formula(lam: float | Tensor | None = 0.5, lam_weight: Tensor | None = None, **rest: Any) -> Any:
    """Call the reference."""
    return reference.gradient_descent(**_as_numbers(lam, lam_weight), **rest)


def _pairwise_formula(lam: float | Tensor = 0.5, lam_weight: Tensor | None = None, **arguments: Any) -> Tensor:
    """Call the reference, with many samples in strips of rows."""
    loss = functools.partial(reference.pairwise_mixup_loss, **_as_numbers(lam, lam_weight))
    x, w, y = (arguments[name] for name in ("input", "weight", "target"))
    samples = x.shape[0]
    rows = max(1, _MOST_IN_PAIRS // max(1, x.numel() + samples * x.shape[-2] * math.prod(w.shape[:-1])))
    if rows >= samples or set(arguments) != {"input", "weight", "target", "activation"} or x.dim() > 3 or w.dim() > 3:
        return loss(**arguments)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for block, label in zip(x.split(rows), y.split(rows), strict=True):
        paired = functools.partial(loss, activation=arguments["activation"], partner=x, partner_target=y)
        total = total + checkpoint(paired, block, w, label, use_reentrant=False) * (len(block) / samples)
    return total


_RUNS = ("input", "weight", "input weight")

_PATCH_CONV = Operator(
    "patch_conv", functional.patch_conv, reference.patch_conv, _draw_patch_conv, ("input", "weight"),
    main=(_network(6, 4, 10, 3, 4), _network(6, 4, 10, 3, 4, lam="per sample")),
    variants=(
        _network(9, 3, 12, 10, 5, lam="number"),
        _network(9, 3, 12, 10, 5, lam="one for all"),
        *(_network(9, 3, 12, 10, 5, runs=runs, lam="per patch") for runs in ("", "input weight")),
        *(_network(9, 4, 10, 3, 5, runs=runs) for runs in _RUNS),
        *(_network(9, 4, 10, 3, 5, runs=runs, lam="per sample") for runs in _RUNS),
        *(_network(7, 3, 12, 10, 5, lam="per sample", activation=activation) for activation in _ACTIVATIONS),
        *(_network(9, 3, 10, 4, 3, readout=True, **options) for options in ({}, {"lam": "number"}, {"runs": "weight"})),
    ),
    degrees=_degrees(8, 2, 6, 8, 3),
    wide=tuple(
        _network(*sizes, **options)
        for sizes in (
            (8, 4, 16, 8, 4), (7, 3, 5, 11, 5), (1, 1, 1, 1, 1), (33, 12, 20, 10, 10), (2, 1, 70, 33, 1),
            (65, 2, 3, 1, 150), (3, 50, 9, 40, 1), (13, 3, 150, 5, 7),
        )
        for options in ({}, {"lam": "per sample"})
    ),
    large=tuple(
        _network(*sizes, **options)
        for sizes in ((64, 300, 33, 3, 17), (300, 2, 257, 2, 3), (200, 12, 20, 10, 10))
        for options in ({}, {"lam": "per sample"})
    ),
    empty=tuple(
        _network(*(0 if d == empty else size for d, size in enumerate((4, 3, 5, 2, 3))), **options)
        for empty in range(5)
        for options in ({}, {"lam": "per sample"})
    ),
    quick=(
        _network(33, 12, 20, 10, 10), _network(7, 3, 5, 3, 5, lam="per sample"),
        _network(1, 1, 1, 1, 1, lam="per sample"), _network(0, 2, 3, 4, 5, lam="per sample"),
        _network(5, 2, 3, 1, 150, activation=PowerReLU(3)), _network(17, 3, 12, 4, 5, activation=Power(2)),
        _network(40, 4, 33, 7, 3, lam="per sample", activation=PolyReLU(5, 0.2, clamp=False)),
        _network(9, 2, 64, 3, 4, activation=Identity()),
    ),
    full=(_network(300, 16, 64, 10, 16, lam="per sample"), _network(64, 49, 257, 10, 3)),
    interpreted=(
        _network(9, 2, 20, 3, 4), _network(5, 3, 7, 2, 3, lam="per sample", activation=PowerReLU(3)),
        _network(1, 1, 1, 1, 1, lam="per sample"),
    ),
    autocasts=True,
)  # fmt: skip

_PAIRWISE_MIXUP_LOSS = Operator(
    "pairwise_mixup_loss", functional.pairwise_mixup_loss, _pairwise_formula, _draw_pairwise, ("input", "weight"),
    main=(_network(6, 4, 10, 3, 4), _network(5, 2, 10, 3, 2, nodes="any")),
    variants=(
        *(_network(7, 3, 6, 3, 4, lam=lam) for lam in (0.0, 0.3, 1.0)),
        *(_network(7, 3, 6, 3, 4, nodes=nodes) for nodes in (1, 2, 3)),
        *(
            _network(7, 3, 6, 3, 4, runs=runs, **options)
            for runs in (*_RUNS, "input target", "weight target", "input weight target")
            for options in ({}, {"nodes": "any"})
        ),
        *(_network(7, 3, 12, 3, 5, activation=activation) for activation in _ACTIVATIONS),
        *(_network(7, 3, 12, 3, 5, lam=0.3, activation=activation) for activation in _ACTIVATIONS),
        *(
            _network(9, 3, 6, 4, 3, **options, **lam)
            for options in (
                {"readout": True}, {"readout": True, "runs": "weight readout"}, {"label_lam": 0.8},
                {"label_smoothing": 0.1}, {"pairs": "distinct"}, {"pairs": "different_class", "runs": "weight target"},
                {"partners": 5}, {"partners": 11, "label_lam": 1.0, "pairs": "different_class", "readout": True},
            )
            for lam in ({}, {"lam": 0.3}, {"nodes": "any"})
        ),
    ),
    degrees=_degrees(6, 3, 8, 3, 4),
    wide=tuple(
        _network(*sizes, **options)
        for sizes in (
            (8, 4, 16, 3, 4), (7, 3, 5, 3, 5), (1, 1, 1, 2, 1), (2, 1, 20, 2, 20), (35, 1, 4, 2, 3), (45, 3, 10, 10, 5),
            (5, 2, 6, 300, 1),
        )
        for options in ({}, {"nodes": "any"})
    ),
    large=tuple(
        _network(*sizes, **options)
        for sizes in ((56, 12, 20, 10, 10), (24, 1, 5, 4096, 1), (41, 40, 9, 3, 17))
        for options in ({}, {"nodes": "any"})
    ),
    empty=tuple(
        _network(*(0 if d == empty else size for d, size in enumerate((5, 2, 4, 3, 2))), **options)
        for empty in (0, 1, 2, 4)  # a cross-entropy needs classes
        for options in ({}, {"nodes": "any"}, {"runs": "weight"}, {"runs": "input weight"})
    ),
    quick=(
        _network(17, 4, 6, 5, 3, nodes=1), _network(9, 3, 5, 3, 5, nodes=3),
        _network(12, 2, 7, 4, 1, nodes=2, activation=PowerReLU(3)),
        _network(33, 5, 20, 10, 4, nodes=1, activation=PolyReLU(4, 0.1)),
        _network(10, 1, 9, 40, 2, nodes=1, activation=Power(2)), _network(1, 1, 1, 2, 1, nodes=1),
    ),
    full=(
        _network(67, 3, 8, 5, 4, nodes=1), _network(40, 4, 6, 10, 5, nodes=4), _network(12, 2, 10, 300, 1, nodes=1)
    ),
    interpreted=(_network(9, 2, 5, 3, 2, nodes=1), _network(6, 2, 3, 2, 1, nodes=2)),
    on_cpu=("lam", "lam_weight"),
    accumulates=True,
    autocasts=True,
)  # fmt: skip

_GRADIENT_DESCENT = Operator(
    "gradient_descent", _one_tensor(functional.gradient_descent), _one_tensor(_gradient_descent_formula),
    _draw_gradient_descent, (),
    main=(
        _network(6, 4, 10, 3, 4), _network(6, 4, 10, 3, 4, erm=True, momentum=0.5, weight_decay=0.01),
        _network(5, 2, 10, 3, 2, nodes="any", runs="weight"),
    ),
    variants=(
        *(_network(7, 3, 6, 3, 4, lam=lam, schedule=True) for lam in (0.0, 0.3, 1.0)),
        *(
            _network(7, 3, 6, 3, 4, runs=runs, **objective)
            for runs in (*_RUNS, "input target", "weight target", "input weight target")
            for objective in ({}, {"erm": True}, {"nodes": "any"})
        ),
        *(
            _network(7, 3, 12, 3, 5, activation=activation, **objective)
            for activation in _ACTIVATIONS
            for objective in ({}, {"erm": True})
        ),
        *(
            _network(9, 3, 6, 4, 3, **options)
            for options in (
                {"readout": True}, {"readout": True, "runs": "weight readout", "erm": True}, {"readout": "signs"},
                {"readout": "signs", "runs": "weight readout"}, {"readout": "signs", "erm": True},
                {"label_lam": 0.8, "lam": 0.3}, {"label_smoothing": 0.1}, {"label_smoothing": 0.1, "erm": True},
                {"pairs": "distinct"}, {"pairs": "different_class", "runs": "weight target"},
            )
        ),
        *(_network(7, 3, 6, 3, 4, steps=steps) for steps in (0, 1, 12)),
    ),
    degrees=_degrees(6, 3, 8, 3, 4, steps=1),  # with more, large powers leave the finite numbers
    wide=tuple(
        _network(*sizes, **objective)
        for sizes in (
            (8, 4, 16, 3, 4), (7, 3, 5, 3, 5), (1, 1, 1, 2, 1), (2, 1, 20, 2, 20), (35, 1, 4, 2, 3), (50, 2, 20, 10, 5),
            (18, 17, 3, 4, 2), (5, 2, 6, 300, 1),
        )
        for objective in ({}, {"erm": True})
    ),
    large=tuple(
        _network(*sizes, **objective)
        for sizes in ((56, 12, 20, 10, 10), (41, 40, 9, 3, 17))
        for objective in ({}, {"erm": True})
    ),
    empty=tuple(
        _network(*(0 if d == empty else size for d, size in enumerate((5, 2, 4, 3, 2))), **options)
        for empty in (0, 1, 2, 4)
        for options in ({}, {"runs": "weight"}, {"erm": True})
        if empty or "erm" not in options  # no samples have no mean; the operator makes it 0
    ),
    quick=(
        _network(17, 4, 6, 5, 3), _network(9, 3, 5, 3, 5, nodes=3, momentum=0.9), _network(12, 2, 7, 4, 1, erm=True),
        _network(33, 5, 20, 10, 4, activation=PolyReLU(4, 0.1), weight_decay=0.1), _network(1, 1, 1, 2, 1),
        _network(9, 3, 6, 4, 3, runs="weight"),
    ),
    full=(_network(40, 4, 6, 10, 5, nodes=4, steps=10), _network(67, 3, 8, 5, 4, runs="weight target")),
    interpreted=(_network(9, 2, 5, 3, 2), _network(6, 2, 3, 2, 1, erm=True)),
    on_cpu=("lam", "lam_weight", "lr"),
    accumulates=True,
    composed=True,
)  # fmt: skip


# batches


def _batch(*sizes: int, **options: Any) -> Case:
    return Case(sizes, "N", options)


def _draw_mixup(generator: torch.Generator, *sizes: int, lam: str = "per sample") -> Arguments:
    index = torch.randint(max(1, sizes[0]), sizes[:1], generator=generator)  # any map: some samples serve twice
    return {"input": _normal(generator, *sizes), "index": index, "lam": _draw_lam(generator, sizes, lam)}


_MIXUP = Operator(
    "mixup", functional.mixup, reference.mixup, _draw_mixup, ("input",),
    main=(_batch(6, 4, 5, 3), _batch(6, 5, lam="number"), _batch(6, 4, 5, 3, lam="per patch")),
    variants=tuple(_batch(8, 3, 6, 5, lam=lam) for lam in ("number", "one for all", "per sample")),
    wide=tuple(_batch(*sizes) for sizes in ((1, 7), (9,), (33, 1), (5, 65), (3, 2, 1, 1, 17), (2, 70000))),
    large=(_batch(16, 3, 100, 100), _batch(2**16, 4)),
    empty=tuple(_batch(*sizes) for sizes in ((0,), (0, 3), (4, 0), (4, 0, 3))),
    quick=tuple(_batch(*sizes) for sizes in ((33, 3, 8, 8), (7, 5), (128, 1), (3, 70001), (0, 4), (1, 3))),
    full=tuple(_batch(*sizes) for sizes in ((256, 3, 32, 32), (9,), (2, 2**20 + 3))),
    interpreted=tuple(_batch(*sizes) for sizes in ((9, 3, 4), (64, 1), (2, 1030))),
    linear=True,
    budgets={torch.float32: 1e-6, torch.float64: 1e-15},
)  # fmt: skip


def _images(*sizes: int, **options: Any) -> Case:
    return Case(sizes, "NCHW", options)


def _draw_cutmix(generator: torch.Generator, *sizes: int, boxes: str = "one") -> Arguments:
    shape = sizes[:1] if boxes == "each" else ()
    edges = [torch.randint(size + 1, (*shape, 2), generator=generator).sort().values for size in sizes[2:]]
    index = torch.randint(max(1, sizes[0]), sizes[:1], generator=generator)  # any map: some samples serve twice
    return {"input": _normal(generator, *sizes), "index": index, "box": torch.cat(edges, -1)}


_CUTMIX = Operator(
    "cutmix", functional.cutmix, reference.cutmix, _draw_cutmix, ("input",),
    main=(_images(6, 4, 5, 3), _images(6, 4, 5, 3, boxes="each")),
    variants=(_images(8, 3, 7, 16), _images(8, 3, 7, 16, boxes="each")),
    wide=tuple(_images(*sizes) for sizes in ((1, 1, 1, 1), (33, 1, 1, 5), (5, 3, 65, 1), (2, 2, 130, 300))),
    large=(_images(16, 3, 100, 100), _images(2**14, 1, 4, 4)),
    empty=tuple(_images(*(0 if d == empty else size for d, size in enumerate((4, 3, 5, 2)))) for empty in range(4)),
    quick=(
        _images(33, 3, 8, 8), _images(7, 5, 1, 9), _images(3, 2, 50, 701), _images(0, 3, 4, 4),
        _images(9, 3, 16, 12, boxes="each"),
    ),
    full=(_images(256, 3, 32, 32), _images(2, 3, 700, 500)),
    interpreted=(_images(9, 3, 4, 6), _images(2, 1, 30, 35), _images(5, 2, 4, 8, boxes="each")),
    linear=True,
    budgets={torch.float32: 1e-6, torch.float64: 1e-15},
)  # fmt: skip


# logits


def _logits(*sizes: int, **options: Any) -> Case:
    return Case(sizes, "NC", options)


def _draw_logits(generator: torch.Generator, samples: int, classes: int, **options: Any) -> Arguments:
    return {"input": 3 * _normal(generator, samples, classes), **options}


def _draw_mixup_cross_entropy(
    generator: torch.Generator, samples: int, classes: int, lam: str = "per sample", ignore_index: int = -100,
    **options: Any,
) -> Arguments:  # fmt: skip
    """Draw targets: some pairs are of one class, and some targets are ignored."""
    target_a, target_b = torch.randint(classes, (2, samples), generator=generator)
    target_b[::3], target_a[1::5] = target_a[::3], ignore_index
    drawn = _draw_logits(generator, samples, classes, ignore_index=ignore_index, **options)
    return drawn | {"target_a": target_a, "target_b": target_b, "lam": _draw_lam(generator, (samples,), lam)}


def _draw_soft_target(
    generator: torch.Generator, samples: int, classes: int, target_sum: float = 1.0,
    target_dtype: torch.dtype = torch.float64, **options: Any,
) -> Arguments:  # fmt: skip
    """Draw dense targets: some classes have no probability."""
    target = torch.rand(samples, classes, generator=generator, dtype=torch.float64).square()
    target[:, max(2, classes // 2) :] = 0
    target /= target.sum(1, keepdim=True) / target_sum
    return _draw_logits(generator, samples, classes, **options) | {"target": target.to(target_dtype)}


def _soft_target_formula(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Call the reference, which takes a target of input's dtype."""
    return reference.soft_target_cross_entropy(input, target.to(input.dtype), **options)


_REDUCTIONS = ("mean", "sum", "none")
_LOSS_OPTIONS = tuple(
    {"label_smoothing": smoothing, "reduction": reduction} for smoothing in (0.0, 0.1, 1.0) for reduction in _REDUCTIONS
)
_QUICK_LOGITS = (
    _logits(64, 10, label_smoothing=0.0, reduction="mean"), _logits(33, 65, label_smoothing=0.1, reduction="none"),
    _logits(17, 1000, label_smoothing=0.0, reduction="sum"), _logits(5, 2, label_smoothing=0.0, reduction="mean"),
)  # fmt: skip
_FULL_LOGITS = (
    _logits(1024, 1000, label_smoothing=0.1, reduction="mean"),
    _logits(3, 50257, label_smoothing=0.0, reduction="none"),
)
_INTERPRETED_LOGITS = (
    _logits(9, 10, label_smoothing=0.0, reduction="mean"), _logits(6, 33, label_smoothing=0.1, reduction="none")
)  # fmt: skip
_WIDE_LOGITS = tuple(_logits(*sizes) for sizes in ((7, 10), (1, 2), (3, 1), (33, 65), (5, 1000), (2, 50257), (64, 16)))


_MIXUP_CROSS_ENTROPY = Operator(
    "mixup_cross_entropy", _one_tensor(functional.mixup_cross_entropy), _one_tensor(reference.mixup_cross_entropy),
    _draw_mixup_cross_entropy, ("input",),
    main=(
        _logits(6, 9), _logits(6, 9, lam="number", label_smoothing=0.1, reduction="none"),
        _logits(6, 9, lse_square_scale=0.1, return_lse=True),
    ),
    variants=(
        *(_logits(20, 7, lse_square_scale=0.1, **options) for options in _LOSS_OPTIONS[:6]),
        *(_logits(20, 7, return_lse=True, lse_square_scale=scale, reduction="none") for scale in (0.0, 0.1)),
        *(_logits(20, 7, lam=lam, **options) for lam in ("number", "per sample") for options in _LOSS_OPTIONS),
        *(
            _logits(20, 7, lam="one for all", ignore_index=ignored, reduction=reduction)
            for ignored in (3, -1)
            for reduction in _REDUCTIONS
        ),
    ),
    wide=_WIDE_LOGITS,
    large=(_logits(300, 1000), _logits(2**16, 4)),
    empty=tuple(_logits(0, 9, reduction=reduction) for reduction in _REDUCTIONS),
    quick=_QUICK_LOGITS,
    full=(*_FULL_LOGITS, _logits(2, 2**18, label_smoothing=0.0, reduction="mean")),
    interpreted=_INTERPRETED_LOGITS,
    accumulates=True,
)  # fmt: skip

_SOFT_TARGET_CROSS_ENTROPY = Operator(
    "soft_target_cross_entropy", functional.soft_target_cross_entropy, _soft_target_formula, _draw_soft_target,
    ("input",),
    main=(_logits(6, 9), _logits(6, 9, label_smoothing=0.1, reduction="none")),
    variants=(
        *(_logits(20, 37, target_sum=total, **options) for total in (1.0, 0.25) for options in _LOSS_OPTIONS),
        *(_logits(20, 37, target_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
    ),
    wide=_WIDE_LOGITS,
    large=(_logits(300, 1000), _logits(2**16, 4, reduction="none")),
    empty=tuple(_logits(0, 9, reduction=reduction) for reduction in _REDUCTIONS),
    quick=_QUICK_LOGITS,
    full=_FULL_LOGITS,
    interpreted=_INTERPRETED_LOGITS,
    accumulates=True,
)  # fmt: skip


def _draw_binary(
    generator: torch.Generator, samples: int, classes: int, lam: str = "per sample", weighted: bool = False,
    **options: Any,
) -> Arguments:  # fmt: skip
    """Draw targets: some pairs are of one class."""
    target_a, target_b = torch.randint(classes, (2, samples), generator=generator)
    target_b[::3] = target_a[::3]
    drawn = _draw_logits(generator, samples, classes, **options)
    drawn |= {"target_a": target_a, "target_b": target_b, "lam": _draw_lam(generator, (samples,), lam)}
    if weighted:
        drawn["pos_weight"] = 3 * torch.rand(classes, generator=generator, dtype=torch.float32)
    return drawn


_MIXUP_BINARY_CROSS_ENTROPY = Operator(
    "mixup_binary_cross_entropy", functional.mixup_binary_cross_entropy, reference.mixup_binary_cross_entropy,
    _draw_binary, ("input",),
    main=(
        _logits(6, 9), _logits(6, 9, lam="number", label_smoothing=0.1, weighted=True, threshold=0.25, reduction="none")
    ),
    variants=(
        *(_logits(20, 7, lam=lam, **options) for lam in ("number", "per sample") for options in _LOSS_OPTIONS),
        *(_logits(20, 7, threshold=threshold, label_smoothing=0.1) for threshold in (0.0, 0.2, 1.0)),
        *(_logits(20, 7, weighted=True, **options) for options in _LOSS_OPTIONS),
    ),
    wide=_WIDE_LOGITS,
    large=(_logits(300, 1000), _logits(2**16, 4, reduction="none")),
    empty=tuple(_logits(0, 9, reduction=reduction) for reduction in _REDUCTIONS),
    quick=_QUICK_LOGITS,
    full=_FULL_LOGITS,
    interpreted=_INTERPRETED_LOGITS,
    accumulates=True,
)  # fmt: skip

OPERATORS = {
    operator.name: operator
    for operator in (
        _PATCH_CONV, _PAIRWISE_MIXUP_LOSS, _GRADIENT_DESCENT, _MIXUP, _CUTMIX, _MIXUP_CROSS_ENTROPY,
        _SOFT_TARGET_CROSS_ENTROPY, _MIXUP_BINARY_CROSS_ENTROPY,
    )
}  # fmt: skip
