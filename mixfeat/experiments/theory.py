"""The paper's theorem, simulated: which features ERM, Uniform Mixup and Midpoint Mixup learn.

Chidambaram, Wang, Wu, Ge: "Provably Learning Diverse Features in Multi-View Data with Midpoint Mixup", ICML 2023
(arXiv 2210.13512), Theorems 4.6 and 4.7. Full-batch gradient descent on multi-view data; several seeds, each with its
own data and initialisation, are trained at once as the runs of one model.

A Mixup step mixes every sample n with a fresh partner, drawn uniformly from all samples (n itself included): its
gradient is an unbiased estimate of that of the objective over all ordered pairs. Midpoint Mixup has lam = 1/2, Uniform
Mixup draws a fresh lam ~ U[0, 1] for every sample. A mixed point's loss is lam CE(y_n) + (1 - lam) CE(y_partner).
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mixfeat as mf
from mixfeat.experiments.store import Record, Store

__all__ = ["METHODS", "DivergedError", "Problem", "Settings", "evaluation_steps", "make_problem", "summarise", "train"]

METHODS = {"erm": "ERM", "uniform": "Uniform Mixup", "midpoint": "Midpoint Mixup"}

_BLOCK = 256  # steps whose partners are drawn together, from a generator of the block's own: so any step can be resumed
_CHECKPOINT_SECONDS = 2.0  # at most about this much work is lost to a kill
_PAIR_OFFSETS = 256  # the objective is evaluated over all pairs up to this many samples


class DivergedError(Exception):
    """Training left the finite numbers."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
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
    lr: float = _setting(64.0, "step size of gradient descent (eta)")
    steps: int = _setting(50_000, "gradient steps (T)")
    seeds: int = _setting(5, "number of seeds, trained at once, each with its own data and initialisation")
    seed: int = _setting(0, "the first seed; the same seed repeats a run exactly")
    test_samples: int = _setting(1000, "test points per feature (view)")
    evaluations: int = _setting(200, "points of the curves over time")
    device: str = _setting("auto", "torch device, or auto: a GPU if there is one")
    dtype: str = _setting("float32", "float32 or float64")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            self._set(name, mf.data._integer(name, getattr(self, name), least))
        for name in ("noise_scale", "init_scale", "lr"):
            value = mf.data._number(name, getattr(self, name))
            if value < 0 or (value == 0 and name != "noise_scale"):
                raise ValueError(f"{name} must be {'at least 0' if name == 'noise_scale' else 'positive'}, got {value}")
            if value > 1e30:
                raise ValueError(f"{name} must be at most 1e30, which float32 can hold, got {value}")
            self._set(name, value)
        self._set("signal", mf.data._range("signal", self.signal))
        self._set("noise", mf.data._range("noise", self.noise))
        self._set("patch_dim", mf.data._patch_dim(self.patch_dim, self.num_classes, None))
        self._set("rho", 1 / self.num_classes if self.rho is None else self.rho)
        mf.PolyReLU(self.degree, self.rho)  # refuses a bad degree or rho
        for name, other in (("num_samples", "num_classes"), ("test_samples", "num_classes"), ("steps", "evaluations")):
            value, least = getattr(self, name), getattr(self, other)
            if value < least:
                raise ValueError(f"{name} must be at least {other} = {least}, got {value}")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")
        if self.device == "auto":
            self._set("device", "cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device must be a torch device of this machine, got {self.device!r}: {reason}") from None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def hash(self) -> str:
        """A short name for these settings, the same on every machine and in every process."""
        return _digest(sorted(self.to_dict().items())).hex()[:12]


_LEAST = {
    "num_classes": 2, "filters_per_class": 1, "num_patches": 2, "num_samples": 1, "degree": 1, "steps": 1, "seeds": 1,
    "seed": 0, "test_samples": 1, "evaluations": 1,
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


def train(settings: Settings, method: str, store: Store, progress: Callable[[int], Any] = lambda steps: None) -> Record:
    """Train all seeds by one method, going on from the store's record, and leave the finished record there.

    The state of a record holds, for R runs and E + 1 evaluations, ``weight`` (R,C,M,D); the curves ``alignment``
    (E+1,R,C,2) (:func:`mixfeat.features.alignment`), ``train_accuracy`` and ``cross_entropy`` (E+1,R), both on the
    training samples; and once finished ``learned`` (R,C,2) and ``loss`` (R,), the method's objective over all pairs.

    Args:
        settings: of the experiment.
        method: a key of ``METHODS``.
        store: where records are kept; a checkpoint is saved every few seconds.
        progress: called with the number of steps just done.

    Raises:
        DivergedError: when weights or logits are no longer finite.
        StoreError: when the store cannot be written.
    """
    record = store.get(method)
    if record is not None and record.finished:
        return record
    with _deterministic(settings.device):
        return _train(settings, method, store, record, progress)


def _train(
    settings: Settings, method: str, store: Store, record: Record | None, progress: Callable[[int], Any]
) -> Record:
    problem = make_problem(settings)
    activation = mf.PolyReLU(settings.degree, settings.rho)
    num_runs, num_classes, filters, patch_dim = problem.weight.shape
    model = mf.TwoLayerPatchCNN(
        num_classes,
        filters,
        patch_dim,
        activation,
        num_runs=num_runs,
        device=settings.device,
        dtype=problem.weight.dtype,
    )
    weight = model.weight.detach()  # the same memory: updated in place, outside autograd
    points = evaluation_steps(settings)
    if record is None:
        step, seconds = 0, 0.0
        weight.copy_(problem.weight)
        curves = _empty_curves(settings, len(points))
    else:
        step, seconds = record.step, record.seconds
        curves = dict(record.state)
        weight.copy_(curves.pop("weight"))
    one_hot = F.one_hot(problem.data.target, settings.num_classes).to(weight.dtype)
    longest = max(1, 2**22 // one_hot.numel())  # steps whose mixed targets stay below 16 MiB

    started = saved = time.monotonic()

    def reached(**more: Tensor) -> Record:
        state = {"weight": weight.cpu().clone(), **curves, **more}
        return Record(bool(more), step, seconds + time.monotonic() - started, state)

    for point, stop in enumerate(points):
        while step < stop:
            end = min(stop, (step // _BLOCK + 1) * _BLOCK, step + longest)
            _descend(model, weight, problem.data.input, one_hot, settings, method, step, end)
            progress(end - step)
            step = end
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                store.save(method, reached())
                saved = time.monotonic()
        if step == stop:
            _evaluate(model, problem.data, curves, point, settings, method, step)

    learned = mf.features.learned(model, problem.tests)
    loss = _objective(model, problem.data.input, one_hot, method)
    record = reached(learned=learned.cpu(), loss=loss.cpu())
    store.save(method, record)
    return record


def _descend(
    model: mf.TwoLayerPatchCNN, weight: Tensor, input: Tensor, one_hot: Tensor,
    settings: Settings, method: str, begin: int, end: int,
) -> None:  # fmt: skip
    """Gradient steps begin to end - 1, all of one block.

    The cross-entropy enters by its gradient with respect to the logits, (softmax - target) / N, and the runs' losses
    are summed: no run influences another.
    """
    steps = end - begin
    indices: Any = [None] * steps
    lams: Any = [None] * steps
    targets: Any = [one_hot] * steps
    if method != "erm":
        generator = _generator(method, settings.seed, begin // _BLOCK)
        chosen = slice(begin % _BLOCK, begin % _BLOCK + steps)
        index = torch.randint(settings.num_samples, (_BLOCK, settings.num_samples), generator=generator)[chosen]
        lam = torch.full(index.shape, 0.5, dtype=weight.dtype)
        if method == "uniform":
            lam = torch.rand((_BLOCK, settings.num_samples), generator=generator, dtype=torch.float64)[chosen].to(lam)
        index, lam = index.to(weight.device), lam.to(weight.device)
        partner = one_hot[:, index]  # (R, steps, N, C)
        targets = torch.lerp(partner, one_hot.unsqueeze(1), lam.unsqueeze(-1)).unbind(1)
        indices = index.unbind()
        lams = lam.unbind() if method == "uniform" else [0.5] * steps
    size = settings.lr / settings.num_samples
    for index, lam, target in zip(indices, lams, targets, strict=True):
        logits = model(input, index, lam)
        error = _softmax(logits.detach()).sub_(target)
        (gradient,) = torch.autograd.grad(logits, model.weight, error)
        weight.sub_(gradient, alpha=size)


def _softmax(logits: Tensor) -> Tensor:
    """torch.softmax without threads: it and exp use them from 2000 numbers on, where waiting for them takes longer."""
    power = (logits - logits.amax(-1, keepdim=True)).mul_(math.log2(math.e)).exp2_()
    return power.div_(power.sum(-1, keepdim=True))


def _evaluate(
    model: mf.TwoLayerPatchCNN, data: mf.data.MultiViewData, curves: dict[str, Tensor],
    point: int, settings: Settings, method: str, step: int,
) -> None:  # fmt: skip
    with torch.no_grad():
        logits = model(data.input)
        loss = F.cross_entropy(logits.flatten(0, 1), data.target.flatten(), reduction="none").view_as(data.target)
    curves["alignment"][point] = mf.features.alignment(model.weight, data.features)
    curves["train_accuracy"][point] = (logits.argmax(-1) == data.target).double().mean(-1)
    curves["cross_entropy"][point] = loss.mean(-1)
    if not curves["cross_entropy"][point].isfinite().all():
        raise DivergedError(f"{method} left the finite numbers before step {step}: try a smaller lr than {settings.lr}")


def _objective(model: mf.TwoLayerPatchCNN, input: Tensor, one_hot: Tensor, method: str) -> Tensor:
    """(R,) the loss that the method descends on, over all ordered pairs: each offset pairs every n with n + offset.

    lam ~ U[0, 1] by Gauss-Legendre quadrature. Above ``_PAIR_OFFSETS`` samples that many offsets, evenly spaced.
    """
    num = input.shape[-3]
    if method == "erm":
        offsets, nodes = [0], [(1.0, 1.0)]
    else:
        count = min(num, _PAIR_OFFSETS)
        offsets = [num * i // count for i in range(count)]
        nodes = [(0.5, 1.0)]
        if method == "uniform":
            nodes = _gauss_legendre(8)
    total = torch.zeros(len(input), dtype=torch.float64, device=input.device)
    with torch.no_grad():
        for offset in offsets:
            index = torch.arange(offset, offset + num, device=input.device) % num
            for lam, share in nodes:
                logits = model(input, index, lam)
                target = lam * one_hot + (1 - lam) * one_hot[:, index]
                total += share * -(target * logits.log_softmax(-1)).sum(-1).double().mean(-1)
    return total / len(offsets)


def _gauss_legendre(count: int) -> list[tuple[float, float]]:
    """Nodes in [0, 1] and their weights, from the Jacobi matrix's eigenvectors (Golub and Welsch 1969)."""
    i = torch.arange(1, count, dtype=torch.float64)
    beside = (i / (4 * i**2 - 1).sqrt()).diag(1)
    x, vectors = torch.linalg.eigh(beside + beside.T)
    return list(zip(((x + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True))


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


def _generator(*key: Any) -> torch.Generator:
    """A CPU generator of its own for every key: draws are the same on every device and at whatever step one resumes."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(key)[:4], "big"))  # the CPU's uses 32 bits of a seed


def _digest(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Have a GPU repeat its results bit for bit, as the CPU does anyway."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(before or device != "cpu", warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
