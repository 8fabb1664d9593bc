"""The paper's theorem, simulated: which features ERM, Uniform Mixup and Midpoint Mixup learn.

Chidambaram, Wang, Wu, Ge: "Provably Learning Diverse Features in Multi-View Data with Midpoint Mixup", ICML 2023
(arXiv 2210.13512), Theorems 4.6 and 4.7. Full-batch gradient descent on multi-view data; several seeds, each with its
own data and initialisation, are trained at once as the runs of one model.

Every method descends on its objective itself, not on a sample of it. ERM: the mean cross-entropy of the training
samples. Midpoint Mixup: that of all ordered pairs of samples, mixed at lam = 1/2, with the labels of both (the paper's
eq. 2.2, :func:`mixfeat.pairwise_mixup_loss`). Uniform Mixup: its mean over lam ~ U[0, 1], by Gauss-Legendre nodes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mixfeat as mf
from mixfeat import _checks
from mixfeat.experiments.common import (
    METHODS,
    BaseSettings,
    DivergedError,
    _deterministic,
    _generator,
    _setting,
    identity,
)  # fmt: skip
from mixfeat.experiments.store import Record, Store

__all__ = [
    "METHODS", "DivergedError", "Problem", "Settings", "evaluation_steps", "identity", "make_problem", "objective",
    "summarise", "train",
]  # fmt: skip

_CHECKPOINT_SECONDS = 2.0  # at most about this much work is lost to a kill


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Everything that determines the numbers of the experiment; ``None`` and ``"auto"`` are resolved on creation.

    Raises:
        TypeError, ValueError: naming the setting, what it got and what it needs.
    """

    num_classes: int = _setting(10, "number of classes (k in the paper)")
    filters_per_class: int = _setting(5, "filters, or neurons, per class (m)")
    num_patches: int = _setting(8, "patches per sample (P)")
    patch_dim: int = _setting(None, "dimension of a patch (d); default: 2 k, one per feature")
    num_samples: int = _setting(50, "training samples per seed (N)")
    degree: int = _setting(8, "degree of the activation's polynomial (alpha in the paper)")
    rho: float = _setting(None, "threshold above which the activation is linear (rho); default: 1/k")
    signal: tuple[float, float] = _setting((0.25, 0.5), "range of the signal coefficients (beta)")
    noise: tuple[float, float] = _setting((0.25, 0.75), "range of the feature noise coefficients (gamma), unscaled")
    noise_scale: float = _setting(0.02, "scale of the feature noise")
    init_scale: float = _setting(0.5, "standard deviation of the initial weights, in units of rho (sigma_0 / rho)")
    nodes: int = _setting(8, "values of lam by which Uniform Mixup's mean over lam is computed")
    lr: float = _setting(256.0, "step size of gradient descent (eta)")
    steps: int = _setting(12_000, "gradient steps (T)")
    seeds: int = _setting(5, "number of seeds, trained at once, each with its own data and initialisation")
    seed: int = _setting(0, "the first seed; the same seed repeats a run exactly")
    test_samples: int = _setting(1000, "test points per feature (view)")
    evaluations: int = _setting(200, "points of the curves over time")
    device: str = _setting("auto", "torch device, or auto: a GPU if there is one")
    dtype: str = _setting("float32", "float32 or float64")

    def __post_init__(self) -> None:
        self._check_integers(_LEAST)
        self._check_positive("noise_scale", "init_scale", "lr", or_zero="noise_scale")
        self._set("signal", _checks.interval("signal", self.signal))
        self._set("noise", _checks.interval("noise", self.noise))
        self._set("patch_dim", mf.data._patch_dim(self.patch_dim, self.num_classes, None))
        self._set("rho", 1 / self.num_classes if self.rho is None else self.rho)
        mf.PolyReLU(self.degree, self.rho)  # refuses a bad degree or rho
        for name, other in (("num_samples", "num_classes"), ("test_samples", "num_classes"), ("steps", "evaluations")):
            value, least = getattr(self, name), getattr(self, other)
            if value < least:
                raise ValueError(f"{name} must be at least {other} = {least}, got {value}")
        self._check_device()


_LEAST = {
    "num_classes": 2, "filters_per_class": 1, "num_patches": 2, "num_samples": 1, "degree": 1, "steps": 1, "seeds": 1,
    "seed": 0, "test_samples": 1, "evaluations": 1, "nodes": 1,
}  # fmt: skip


class Problem(NamedTuple):
    """What the seeds start from, stacked over R runs."""

    data: mf.data.MultiViewData  # input (R,N,P,D), target (R,N), features (R,C,2,D)
    tests: tuple[mf.data.MultiViewData, ...]  # the single-view test points of feature 0 and of feature 1
    weight: Tensor  # (R,C,M,D)


def make_problem(settings: Settings) -> Problem:
    """Data, test points and initial weights; a seed's depend neither on how many are trained nor on the device."""
    dtype = getattr(torch, settings.dtype)
    size = (settings.num_classes, settings.filters_per_class, settings.patch_dim)

    def draw(generator: torch.Generator, num_samples: int, **options: Any) -> mf.data.MultiViewData:
        return mf.data.multi_view(
            num_samples, settings.num_classes, settings.num_patches, settings.patch_dim,
            signal=settings.signal, noise=settings.noise, noise_scale=settings.noise_scale,
            generator=generator, device=settings.device, dtype=dtype, **options,
        )  # fmt: skip

    runs = []
    for seed in range(settings.seed, settings.seed + settings.seeds):
        generator = _generator("data", seed)
        data = draw(generator, settings.num_samples)
        tests = [draw(generator, settings.test_samples, views=view, features=data.features) for view in (0, 1)]
        weight = torch.randn(size, generator=_generator("weight", seed), dtype=torch.float64)
        runs.append((data, tests, (weight * settings.init_scale * settings.rho).to(settings.device, dtype)))
    all_data, all_tests, weights = zip(*runs, strict=True)
    tests_of_each_view = tuple(_stack(tests) for tests in zip(*all_tests, strict=True))
    return Problem(_stack(all_data), tests_of_each_view, torch.stack(weights))


def evaluation_steps(settings: Settings) -> list[int]:
    """The steps at which the curves have a point: 0, then evenly spaced up to the last."""
    return [settings.steps * i // settings.evaluations for i in range(settings.evaluations + 1)]


def objective(settings: Settings, method: str, data: mf.data.MultiViewData) -> Callable[[Tensor], Tensor]:
    """The method's loss, from weights (R,C,M,D) to (R,)."""
    activation = mf.PolyReLU(settings.degree, settings.rho)
    if method == "erm":
        return lambda weight: _cross_entropy(mf.patch_conv(data.input, weight, activation), data.target)
    lam, lam_weight = mf.beta_quadrature(1, 1 if method == "midpoint" else settings.nodes)  # one node: lam = 1/2
    return lambda weight: mf.pairwise_mixup_loss(
        data.input, weight, data.target, activation, lam=lam, lam_weight=lam_weight
    )


def train(
    settings: Settings, method: str, store: Store, progress: Callable[[int], Any] = lambda steps: None,
    name: str | None = None,
) -> Record:  # fmt: skip
    """Train all seeds by one method, going on from the store's record, and leave the finished record there.

    The state of a record holds, for R runs and E + 1 evaluations, ``weight`` (R,C,M,D); the curves ``alignment``
    (E+1,R,C,2) (:func:`mixfeat.features.alignment`), ``train_accuracy`` and ``cross_entropy`` (E+1,R), both on the
    training samples; and once finished ``learned`` (R,C,2) and ``loss`` (R,), the method's :func:`objective`.

    Args:
        settings: of the experiment.
        method: a key of ``METHODS``.
        store: where records are kept; a checkpoint is saved every few seconds.
        progress: called with the number of steps just done.
        name: of the record in the store; by default the method.

    Raises:
        DivergedError: when weights or logits are no longer finite.
        StoreError: when the store cannot be written.
    """
    name = method if name is None else name
    record = store.get(name)
    if record is not None and record.finished:
        return record
    with _deterministic(settings.device):
        return _train(settings, method, store, progress, name, record)


def _train(
    settings: Settings, method: str, store: Store, progress: Callable[[int], Any], name: str, record: Record | None
) -> Record:
    problem = make_problem(settings)
    loss = objective(settings, method, problem.data)
    weight = torch.zeros_like(problem.weight, requires_grad=True)

    def descend() -> None:
        (gradient,) = torch.autograd.grad(loss(weight).sum(), weight)  # the sum: no run influences another
        weight.detach().sub_(gradient, alpha=settings.lr)

    take_step = _captured(descend, weight.device)
    points = evaluation_steps(settings)
    if record is None:
        step, seconds = 0, 0.0
        curves = _empty_curves(settings, len(points))
        start = problem.weight
    else:
        step, seconds = record.step, record.seconds
        curves = dict(record.state)
        start = curves.pop("weight")
    weight.detach().copy_(start)
    started = saved = time.monotonic()

    def reached(**more: Tensor) -> Record:
        state = {"weight": weight.detach().cpu().clone(), **curves, **more}
        return Record(bool(more), step, seconds + time.monotonic() - started, state)

    for point, stop in enumerate(points):
        while step < stop:
            take_step()
            step += 1
            progress(1)
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                store.save(name, reached())
                saved = time.monotonic()
        if step == stop:
            _evaluate(weight, problem.data, curves, point, settings, method, step)

    with torch.no_grad():
        model = partial(mf.patch_conv, weight=weight, activation=mf.PolyReLU(settings.degree, settings.rho))
        more = {"learned": mf.features.learned(model, problem.tests).cpu(), "loss": loss(weight).cpu()}
    record = reached(**more)
    store.save(name, record)
    return record


def _captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step that only reads and writes tensors in place, as one launch: a CUDA graph. On a CPU the step itself.

    Capturing takes a few steps.
    """
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled and workspaces allocated before the capture
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
    return graph.replay


def _evaluate(
    weight: Tensor, data: mf.data.MultiViewData, curves: dict[str, Tensor],
    point: int, settings: Settings, method: str, step: int,
) -> None:  # fmt: skip
    with torch.no_grad():
        logits = mf.patch_conv(data.input, weight, mf.PolyReLU(settings.degree, settings.rho))
        curves["cross_entropy"][point] = _cross_entropy(logits, data.target)
    curves["alignment"][point] = mf.features.alignment(weight, data.features)
    curves["train_accuracy"][point] = (logits.argmax(-1) == data.target).double().mean(-1)
    if not curves["cross_entropy"][point].isfinite().all():
        raise DivergedError(f"{method} left the finite numbers before step {step}: try a smaller lr than {settings.lr}")


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(R,) means over the samples."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(-1)


def summarise(settings: Settings, record: Record) -> dict[str, Any]:
    """A finished record as numbers for a table or JSON: each a list over the seeds, the curves lists over time of such.

    ``alignment_ratio`` is the smaller alignment over the larger, each taken at least 0, averaged over the classes; the
    curves' ``larger`` and ``smaller`` are those alignments averaged over the classes.
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


def _empty_curves(settings: Settings, points: int) -> dict[str, Tensor]:
    shapes = {"alignment": (settings.num_classes, 2), "train_accuracy": (), "cross_entropy": ()}
    return {name: torch.zeros(points, settings.seeds, *shape, dtype=torch.float64) for name, shape in shapes.items()}


def _stack(runs: Any) -> mf.data.MultiViewData:
    return mf.data.MultiViewData(*(torch.stack(parts) for parts in zip(*runs, strict=True)))
