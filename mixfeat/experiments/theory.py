"""The paper's theorem, simulated: which features ERM, Uniform Mixup and Midpoint Mixup learn.

Chidambaram, Wang, Wu, Ge: "Provably Learning Diverse Features in Multi-View Data with Midpoint Mixup", ICML 2023
(arXiv 2210.13512), Theorems 4.6 and 4.7. The default is full-batch gradient descent on multi-view data
(:func:`mixfeat.gradient_descent`). Other data also have two features per class; other optimizers take one step at a
time. A run is a method and a seed, and each seed has its own data and initialisation.

Every method descends on its exact objective. ERM takes the mean cross-entropy of the training samples. Midpoint Mixup
takes that of all ordered pairs of samples, mixed at lam = 1/2, with both labels (the paper's eq. 2.2,
:func:`mixfeat.pairwise_mixup_loss`). Uniform Mixup averages it over lam ~ U[0, 1] with Gauss-Legendre nodes. Only SGD
samples: it draws a minibatch, and Mixup pairs each of its samples with all samples.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mixfeat as mf
from mixfeat import _checks
from mixfeat.experiments import engine
from mixfeat.experiments.common import (
    METHODS,
    BaseSettings,
    Pace,
    _deterministic,
    _generator,
    _setting,
    evaluation_steps,
)
from mixfeat.experiments.engine import Record, Results, Workers
from mixfeat.experiments.optimizers import OPTIMIZERS, Loop
from mixfeat.ops.gradient_descent import gradient_descent

__all__ = [
    "DATA", "LONGEST_FIRST", "METHODS", "Problem", "Run", "Settings", "evaluation_steps", "join", "make_problem",
    "objective", "runs_of", "summarise", "train",
]  # fmt: skip

LONGEST_FIRST = ("uniform", "midpoint", "erm")  # the methods, by the time of a step
DATA = ("multi_view", "common_rare", "signal_noise")  # of mf.data; signal_noise with XOR, where a class has two signals
_LR = {"gd": 256.0, "momentum": 25.6, "sgd": 256.0, "adam": 0.001, "sign": 0.0001}


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Everything that determines the numbers of the experiment; ``None`` and ``"auto"`` are resolved on creation.

    Raises:
        TypeError, ValueError: an invalid setting; the message names it, the value and the requirement.
    """

    data: str = _setting(
        "multi_view", "distribution: multi_view, or with 2 classes common_rare or signal_noise (its XOR variant)"
    )
    positions: str = _setting("random", "positions of the signal patches: random in each sample, or fixed")
    num_classes: int = _setting(10, "number of classes (k in the paper)")
    filters_per_class: int = _setting(5, "filters, or neurons, per class (m)")
    num_patches: int = _setting(8, "patches per sample (P)")
    patch_dim: int = _setting(None, "dimension of a patch (d); default: 2 k, one per feature; other data: 50")
    num_samples: int = _setting(50, "training samples per seed (N)")
    degree: int = _setting(8, "degree of the activation's polynomial (alpha in the paper)")
    rho: float = _setting(None, "threshold above which the activation is linear (rho); default: 1/k")
    signal: tuple[float, float] = _setting(
        (0.25, 0.5), "range of the signal coefficients (beta); other data: the upper end is the length of the signals"
    )
    noise: tuple[float, float] = _setting(
        (0.25, 0.75), "multi_view: range of the feature noise coefficients (gamma), unscaled"
    )
    noise_scale: float = _setting(0.02, "scale of the feature noise; other data: standard deviation of the noise")
    init_scale: float = _setting(0.5, "standard deviation of the initial weights, in units of rho (sigma_0 / rho)")
    nodes: int = _setting(8, "values of lam by which Uniform Mixup's mean over lam is computed")
    optimizer: str = _setting("gd", f"one of {', '.join(OPTIMIZERS)}: full-batch but for sgd, which has minibatches")
    lr: float = _setting(None, "step size (eta); default: 256.0, momentum 25.6, adam 0.001, sign 0.0001")
    momentum: float = _setting(0.9, "momentum of the optimizer of that name")
    batch_size: int = _setting(10, "sgd: samples per step, each mixed with all others")
    weight_decay: float = _setting(0.0, "weight decay, which every optimizer adds to the gradient")
    steps: int = _setting(12_000, "gradient steps (T)")
    seeds: int = _setting(5, "number of seeds, each with its own data and initialisation")
    seed: int = _setting(0, "the first seed; the same seed repeats a run exactly")
    test_samples: int = _setting(1000, "test points per feature (view)")
    evaluations: int = _setting(200, "points of the curves over time")
    device: str = _setting("auto", "torch device, or auto: a GPU if there is one")
    dtype: str = _setting("float32", "float32 or float64")

    def __post_init__(self) -> None:
        for name, known in (("data", DATA), ("positions", ("random", "fixed")), ("optimizer", tuple(OPTIMIZERS))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self._check_integers(_LEAST)
        self._set("lr", _LR[self.optimizer] if self.lr is None else self.lr)
        self._check_positive("noise_scale", "init_scale", "lr", or_zero="noise_scale")
        self._set("momentum", _checks.momentum(self.momentum))
        self._set("weight_decay", _checks.finite("weight_decay", self.weight_decay, 0))
        self._set("signal", _checks.interval("signal", self.signal))
        self._set("noise", _checks.interval("noise", self.noise))
        if self.data == "multi_view":
            self._set("patch_dim", mf.data._patch_dim(self.patch_dim, self.num_classes, None))
        else:
            if self.num_classes != 2:
                raise ValueError(f"num_classes must be 2 where data is {self.data}, got {self.num_classes}")
            patch_dim = 50 if self.patch_dim is None else self.patch_dim
            self._set("patch_dim", _checks.integer("patch_dim", patch_dim, 5))  # the features, and one of noise
            if self.signal[1] <= 0:
                raise ValueError(f"signal must end above 0 where data is {self.data}, got {self.signal}")
        self._set("rho", 1 / self.num_classes if self.rho is None else self.rho)
        mf.PolyReLU(self.degree, self.rho)  # refuses a bad degree or rho
        for name, other in (("num_samples", "num_classes"), ("test_samples", "num_classes"), ("steps", "evaluations")):
            value, least = getattr(self, name), getattr(self, other)
            if value < least:
                raise ValueError(f"{name} must be at least {other} = {least}, got {value}")
        if self.optimizer == "sgd" and self.batch_size > self.num_samples:
            raise ValueError(f"batch_size must be at most num_samples = {self.num_samples}, got {self.batch_size}")
        self._check_device()


_LEAST = {
    "num_classes": 2, "filters_per_class": 1, "num_patches": 2, "num_samples": 1, "degree": 1, "steps": 1, "seeds": 1,
    "seed": 0, "test_samples": 1, "evaluations": 1, "nodes": 1, "batch_size": 1,
}  # fmt: skip


class Problem(NamedTuple):
    """The start of R runs: their data, test points and initial weights."""

    data: mf.data.MultiViewData  # input (R,N,P,D), target (R,N), features (R,C,2,D)
    tests: tuple[mf.data.MultiViewData, ...]  # the single-view test points of feature 0 and of feature 1
    weight: Tensor  # (R,C,M,D)


def make_problem(settings: Settings) -> Problem:
    """Draw data, test points and initial weights; each seed's are independent of other seeds and of the device."""
    return _problem([replace(settings, seed=seed, seeds=1) for seed in _seeds(settings)])


def _seeds(settings: Settings) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


def _problem(of_each_run: Iterable[Settings]) -> Problem:
    """Stack the problems of the settings' first seeds."""
    data, tests, weight = zip(*map(_draw, of_each_run), strict=True)
    return Problem(_stack(data), tuple(map(_stack, zip(*tests, strict=True))), torch.stack(weight))


def _draw(settings: Settings) -> tuple[mf.data.MultiViewData, list[mf.data.MultiViewData], Tensor]:
    """Draw data, test points and initial weights of the first seed."""
    dtype, generator = getattr(torch, settings.dtype), _generator("data", settings.seed)

    common: dict[str, Any] = {
        "positions": settings.positions, "generator": generator, "device": settings.device, "dtype": dtype,
    }  # fmt: skip

    def draw(num_samples: int, view: int | None = None, features: Tensor | None = None) -> mf.data.MultiViewData:
        """Draw training samples, or test points that carry only the feature ``view`` of each class."""
        if settings.data == "multi_view":
            return mf.data.multi_view(
                num_samples, settings.num_classes, settings.num_patches, settings.patch_dim, signal=settings.signal,
                noise=settings.noise, noise_scale=settings.noise_scale, views="both" if view is None else view,
                features=features, **common,
            )  # fmt: skip
        sizes = num_samples, settings.patch_dim, settings.num_patches
        options = {"signal": settings.signal[1], "noise_std": settings.noise_scale, **common}
        if settings.data == "common_rare":
            rare = 0.1 if view is None else float(view)
            return mf.data.MultiViewData(*mf.data.common_rare(*sizes, rare=rare, features=features, **options)[:3])
        found = mf.data.signal_noise(*sizes, xor=True, features=features, **options)
        input = found.input
        if view is not None:  # the signals of a class are opposite, and the noise is symmetric
            signal = found.features[found.target, view]
            input = torch.einsum("npd,nd->n", input, signal).sign()[:, None, None] * input
        return mf.data.MultiViewData(input, found.target, found.features)

    data = draw(settings.num_samples)
    tests = [draw(settings.test_samples, view, data.features) for view in (0, 1)]
    size = (settings.num_classes, settings.filters_per_class, settings.patch_dim)
    weight = torch.randn(size, generator=_generator("weight", settings.seed), dtype=torch.float64)
    return data, tests, (weight * settings.init_scale * settings.rho).to(settings.device, dtype)


def _stack(parts: Iterable[mf.data.MultiViewData]) -> mf.data.MultiViewData:
    return mf.data.MultiViewData(*map(torch.stack, zip(*parts, strict=True)))


def objective(settings: Settings, method: str, data: mf.data.MultiViewData) -> Callable[[Tensor], Tensor]:
    """Return the method's loss, a function from weights (R,C,M,D) to (R,)."""
    activation = _activation(settings)
    lam, lam_weight = _nodes(settings, method)
    if lam is None:
        return lambda weight: _cross_entropy(mf.patch_conv(data.input, weight, activation), data.target)
    return lambda weight: mf.pairwise_mixup_loss(
        data.input, weight, data.target, activation, lam=lam, lam_weight=lam_weight
    )


def _activation(settings: Settings) -> mf.PolyReLU:
    return mf.PolyReLU(settings.degree, settings.rho)


def _nodes(settings: Settings, method: str) -> tuple[Tensor | None, Tensor | None]:
    """Return lam and lam_weight of the method's objective."""
    if method == "erm":
        return None, None
    return mf.beta_quadrature(1, 1 if method == "midpoint" else settings.nodes)  # one node: lam = 1/2


@dataclass(frozen=True)
class Run:
    """One method on one seed, a task of :mod:`mixfeat.experiments.engine`.

    The state of its record holds ``weight`` (C,M,D) and curves over E + 1 evaluations: ``alignment`` (E+1,C,2)
    (:func:`mixfeat.features.alignment`), and ``train_accuracy`` and ``cross_entropy`` (E+1,) on the training samples.
    An unfinished record adds the optimizer's tensors (:data:`mixfeat.experiments.optimizers.OPTIMIZERS`), a finished
    one ``learned`` (C,2) and ``loss`` (), the method's :func:`objective`.
    """

    settings: Settings  # its seed is the first of them
    method: str
    name: str
    label: str

    @property
    def steps(self) -> int:
        """Return the number of gradient steps."""
        return self.settings.steps

    @property
    def group(self) -> Hashable:
        """Return on a GPU the settings that runs of one launch share, on a CPU None: each network has a core."""
        if not self.settings.device.startswith("cuda"):
            return None
        return self.method, replace(
            self.settings, seed=0, seeds=1, init_scale=1.0, noise_scale=0.0, signal=(0, 1), noise=(0, 1)
        )

    @staticmethod
    def advance(runs: "Sequence[Run]", records: Sequence[Record | None], seconds: float) -> list[Record]:
        """Train for about ``seconds``, as :class:`mixfeat.experiments.engine.Run` requires."""
        with _deterministic(runs[0].settings.device):
            return _advance(runs, records, seconds)


def runs_of(settings: Settings, methods: Iterable[str] = METHODS) -> list[Run]:
    """List the runs of the experiment, the longest first."""
    return [
        Run(replace(settings, seed=seed, seeds=1), method, f"{method}-seed-{seed}", f"{METHODS[method]}, seed {seed}")
        for method in sorted(methods, key=LONGEST_FIRST.index) for seed in _seeds(settings)
    ]  # fmt: skip


def train(
    settings: Settings, method: str, results: Results | None = None, workers: Workers | None = None
) -> Record:  # fmt: skip
    """Train all seeds by one method and return their records as one (:func:`join`).

    Args:
        settings: settings of the experiment.
        method: a key of ``METHODS``.
        results, workers: as :func:`mixfeat.experiments.engine.train` takes them.

    Raises:
        DivergedError: weights or logits that are not finite.
        EngineError: results or workers that cannot be used.
    """
    runs = runs_of(settings, [method])
    records = engine.train(runs, results, workers)
    return join(runs, records)


def join(runs: Sequence[Run], records: Mapping[str, Record]) -> Record:
    """Stack the finished records of R runs: curves (E+1,R,...), all else (R,...); the seconds are summed.

    Raises:
        DivergedError: one of the runs diverged.
    """
    return engine.stack(runs, records, _CURVES)


_CURVES = ("alignment", "train_accuracy", "cross_entropy")


def _advance(runs: Sequence[Run], records: Sequence[Record | None], seconds: float) -> list[Record]:
    pace = Pace(seconds)
    settings, method = runs[0].settings, runs[0].method
    problem, points = _problem(run.settings for run in runs), evaluation_steps(settings)
    step, weight, curves, state = _restored(settings, problem, records)
    train = _trainer(runs, problem, step, state)
    diverged: dict[int, int] = {}  # by the run's index, the step at which it was found to have diverged

    def reached(**more: Tensor) -> list[Record]:
        spent = pace.seconds() / len(runs)
        state = {"weight": weight.cpu(), **(more or {name: value.cpu() for name, value in train.state.items()})}
        later = []
        for i, record in enumerate(records):
            after = spent + (record.seconds if record else 0.0)
            if i in diverged:
                later.append(Record(True, diverged[i], after, {}))
                continue
            of_run = {name: value[i].clone() for name, value in state.items()}
            of_run |= {name: value[:, i].clone() for name, value in curves.items()}
            later.append(Record(bool(more), step, after, of_run))
        return later

    first = step
    for point, stop in enumerate(points):
        if stop < first:
            continue
        weight, step = pace.descend(weight, step, stop, train)
        if step < stop:
            return reached()
        for i in _evaluate(weight, problem.data, curves, point, settings):
            diverged.setdefault(i, step)
        if len(diverged) == len(runs):
            return reached()
    model = partial(mf.patch_conv, weight=weight, activation=_activation(settings))
    with torch.no_grad():
        loss = objective(settings, method, problem.data)(weight)
        return reached(learned=mf.features.learned(model, problem.tests).cpu(), loss=loss.cpu())


def _restored(
    settings: Settings, problem: Problem, records: Sequence[Record | None]
) -> tuple[int, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return the step, weights, curves (E+1,R,...) and optimizer's state of runs that continue or start."""
    names = OPTIMIZERS[settings.optimizer]
    states = [record.state for record in records if record is not None]
    if records[0] is not None:
        weight, *kept = (
            torch.stack([state[name] for state in states]).to(problem.weight.device) for name in ("weight", *names)
        )
        curves = {name: torch.stack([state[name] for state in states], 1) for name in _CURVES}
        return records[0].step, weight, curves, dict(zip(names, kept, strict=True))
    shapes = {"alignment": (settings.num_classes, 2), "train_accuracy": (), "cross_entropy": ()}
    size = (settings.evaluations + 1, len(records))
    curves = {name: torch.zeros(*size, *shapes[name], dtype=torch.float64) for name in _CURVES}
    return 0, problem.weight, curves, {name: torch.zeros_like(problem.weight) for name in names}


class _Descent:
    """Full-batch gradient descent in one call of the operator, whose momentum a record can hold."""

    def __init__(self, settings: Settings, method: str, problem: Problem, state: dict[str, Tensor]) -> None:
        self._settings, self._data, self._nodes = settings, problem.data, _nodes(settings, method)
        self._lr = _checks.lr(settings.lr, (), 1)
        self.state = state

    def __call__(self, weight: Tensor, count: int) -> Tensor:
        settings, data = self._settings, self._data
        weight, _, velocity = gradient_descent(
            data.input, weight, data.target, *self._nodes, _activation(settings).polynomial, self._lr, count,
            settings.momentum if self.state else 0.0, settings.weight_decay, self.state.get("velocity"),
        )  # fmt: skip
        self.state = dict.fromkeys(self.state, velocity)
        return weight


def _trainer(runs: Sequence[Run], problem: Problem, step: int, state: dict[str, Tensor]) -> _Descent | Loop:
    """Return a callable ``train(weight, count)`` that takes steps and holds the optimizer's ``state``."""
    settings, method = runs[0].settings, runs[0].method
    if settings.optimizer in ("gd", "momentum"):
        return _Descent(settings, method, problem, state)
    loss = objective(settings, method, problem.data)

    def of_step(weight: Tensor, step: int) -> Tensor:
        if settings.optimizer != "sgd":
            return loss(weight)
        orders = [
            torch.randperm(settings.num_samples, generator=_generator("batch", run.settings.seed, step)) for run in runs
        ]
        batch = torch.stack(orders)[:, : settings.batch_size].to(problem.data.target.device)
        return _loss_of_batch(settings, method, problem.data, batch, weight)

    return Loop(settings.optimizer, of_step, settings.lr, settings.weight_decay, step, state)


def _loss_of_batch(
    settings: Settings, method: str, data: mf.data.MultiViewData, batch: Tensor, weight: Tensor
) -> Tensor:
    """Return the losses (R,) of the samples ``batch`` (R,B); Mixup pairs each of them with all samples."""
    run = torch.arange(len(batch), device=batch.device)[:, None]
    input, target = data.input[run, batch], data.target[run, batch]
    lam, lam_weight = _nodes(settings, method)
    if lam is None:
        return _cross_entropy(mf.patch_conv(input, weight, _activation(settings)), target)
    return mf.pairwise_mixup_loss(
        input, weight, target, _activation(settings), lam=lam, lam_weight=lam_weight, partner=data.input,
        partner_target=data.target,
    )  # fmt: skip


def _evaluate(
    weight: Tensor, data: mf.data.MultiViewData, curves: dict[str, Tensor], point: int, settings: Settings
) -> list[int]:
    """Set one point of all curves, and return the indices of runs that diverged."""
    with torch.no_grad():
        logits = mf.patch_conv(data.input, weight, _activation(settings))
        curves["cross_entropy"][point] = _cross_entropy(logits, data.target)
    curves["alignment"][point] = mf.features.alignment(weight, data.features)
    curves["train_accuracy"][point] = (logits.argmax(-1) == data.target).double().mean(-1)
    return [i for i, finite in enumerate(curves["cross_entropy"][point].isfinite().tolist()) if not finite]


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over the samples, (R,)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(-1)


def summarise(settings: Settings, record: Record) -> dict[str, Any]:
    """Turn a finished record of R seeds (:func:`join`) into numbers for a table or JSON.

    Each entry is a list over the seeds, and each of the ``curves`` a list over time of such lists. ``alignment_ratio``
    is the smaller alignment over the larger, both clamped at 0 from below, averaged over the classes. The curves
    ``larger`` and ``smaller`` are those alignments averaged over the classes.
    """
    state = record.state
    known = state["learned"].sum(-1)
    small, large = state["alignment"].double().sort(-1).values.unbind(-1)
    ratio = (small.clamp(min=0) / large.clamp(min=torch.finfo(torch.float64).tiny)).mean(-1)
    return {
        "train_accuracy": state["train_accuracy"][-1].tolist(),
        "classes_with_both": (known == 2).sum(-1).tolist(),
        "classes_with_one": (known == 1).sum(-1).tolist(),
        "classes_with_none": (known == 0).sum(-1).tolist(),
        "alignment_ratio": ratio[-1].tolist(),
        "loss": state["loss"].tolist(),
        "seconds": record.seconds,
        "curves": {
            "step": evaluation_steps(settings),
            "larger": large.mean(-1).tolist(),
            "smaller": small.mean(-1).tolist(),
            "alignment_ratio": ratio.tolist(),
            "train_accuracy": state["train_accuracy"].tolist(),
            "cross_entropy": state["cross_entropy"].tolist(),
        },
    }
