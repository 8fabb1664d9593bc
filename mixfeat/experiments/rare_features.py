"""Common and rare features: plain training learns only the common ones, Mixup both, early-stopped Mixup nearly both.

Zou, Cao, Li, Gu: "The Benefits of Mixup for Feature Learning", ICML 2023 (arXiv 2303.08433). Networks with activation
z^2 train by full-batch gradient descent on :func:`mixfeat.data.common_rare`. Mixup's objective takes all pairs of
samples at one lam. A run is a method and a seed.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mixfeat as mf
from mixfeat import _checks
from mixfeat.experiments import engine
from mixfeat.experiments.common import BaseSettings, Pace, _deterministic, _generator, _setting, evaluation_steps
from mixfeat.experiments.engine import Record

__all__ = ["METHODS", "Run", "Settings", "evaluation_steps", "join", "runs_of", "summarise"]

METHODS = {"erm": "ERM", "mixup": "Mixup", "early": "Mixup, then ERM"}
_LONGEST_FIRST = ("mixup", "early", "erm")


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Everything that determines the numbers of the experiment; ``"auto"`` is resolved on creation.

    Raises:
        TypeError, ValueError: an invalid setting; the message names it, the value and the requirement.
    """

    num_samples: int = _setting(400, "training samples per seed (n)")
    rare: float = _setting(0.05, "share of the samples that carry the rare feature (rho)")
    num_patches: int = _setting(4, "patches per sample (P)")
    patch_dim: int = _setting(200, "dimension of a patch (d)")
    signal: float = _setting(1.0, "length of the features")
    feature_noise: float = _setting(0.1, "strength of the feature noise (alpha)")
    num_feature_noise: int = _setting(1, "patches of feature noise (b)")
    noise_std: float = _setting(0.25, "standard deviation of the noise (sigma_p)")
    filters_per_class: int = _setting(5, "filters, or neurons, per class (m)")
    init_std: float = _setting(0.001, "standard deviation of the initial weights (sigma_0)")
    lam: float = _setting(0.6, "weight of a sample in its mix with another, in (1/2, 1) in the paper (lambda)")
    label_lam: float = _setting(None, "weight of its label in the mixed label; default: lam")
    lr: float = _setting(0.5, "step size of gradient descent (eta)")
    steps: int = _setting(1500, "gradient steps")
    mixup_steps: int = _setting(750, "steps with Mixup of the method early")
    seeds: int = _setting(5, "number of seeds, each with its own data and initialisation")
    seed: int = _setting(0, "the first seed; the same seed repeats a run exactly")
    test_samples: int = _setting(1000, "test points with the common feature, and as many with the rare one")
    evaluations: int = _setting(30, "points of the curves over time")
    device: str = _setting("auto", "torch device, or auto: a GPU if there is one")
    dtype: str = _setting("float32", "float32 or float64")

    def __post_init__(self) -> None:
        self._check_integers(
            {
                "num_samples": 2, "num_feature_noise": 0, "patch_dim": 5, "filters_per_class": 1, "steps": 1,
                "mixup_steps": 0, "seeds": 1, "seed": 0, "test_samples": 1, "evaluations": 1,
            }
        )  # fmt: skip
        self._set("num_patches", _checks.integer("num_patches", self.num_patches, 1 + self.num_feature_noise))
        self._check_positive("signal", "noise_std", "init_std", "lr")
        self._set("feature_noise", _checks.finite("feature_noise", self.feature_noise, 0))
        self._set("label_lam", self.lam if self.label_lam is None else self.label_lam)
        for name in ("rare", "lam", "label_lam"):
            self._set(name, _checks.fraction(name, getattr(self, name)))
        if self.steps < self.evaluations:
            raise ValueError(f"steps must be at least evaluations = {self.evaluations}, got {self.steps}")
        if self.mixup_steps > self.steps:
            raise ValueError(f"mixup_steps must be at most steps = {self.steps}, got {self.mixup_steps}")
        self._check_device()


@dataclass(frozen=True)
class Run:
    """One method on one seed, a task of :mod:`mixfeat.experiments.engine`.

    The state of its record holds ``weight`` (2,M,D) and the curve ``test_error`` (E+1,2) on test points with the common
    feature and with the rare one. A finished record adds ``train_accuracy`` () and ``alignment`` (2,2) of each class
    with either feature (:func:`mixfeat.features.alignment` of absolute products, because z^2 ignores the sign).
    """

    settings: Settings  # its seed is the first of them
    method: str

    @property
    def name(self) -> str:
        """Return the name of the run's record."""
        return f"{self.method}-seed-{self.settings.seed}"

    @property
    def label(self) -> str:
        """Return the run's name on the screen."""
        return f"{METHODS[self.method]}, seed {self.settings.seed}"

    @property
    def steps(self) -> int:
        """Return the number of gradient steps."""
        return self.settings.steps

    @property
    def group(self) -> Hashable:
        """Return on a GPU the method, whose runs share a launch, on a CPU None: each network has a core."""
        return self.method if self.settings.device.startswith("cuda") else None

    @staticmethod
    def advance(runs: "Sequence[Run]", records: Sequence[Record | None], seconds: float) -> list[Record]:
        """Train for about ``seconds``, as :class:`mixfeat.experiments.engine.Run` requires."""
        with _deterministic(runs[0].settings.device):
            return _advance(runs, records, seconds)

    def draw(self) -> tuple[mf.data.CommonRareData, list[mf.data.CommonRareData], Tensor]:
        """Return the training samples, the test points of either feature and the initial weights (2,M,D)."""
        settings = self.settings
        dtype, generator = getattr(torch, settings.dtype), _generator("common and rare", settings.seed)

        def draw(num_samples: int, rare: float, features: Tensor | None = None) -> mf.data.CommonRareData:
            return mf.data.common_rare(
                num_samples, settings.patch_dim, settings.num_patches, rare=rare, signal=settings.signal,
                feature_noise=settings.feature_noise, num_feature_noise=settings.num_feature_noise,
                noise_std=settings.noise_std, features=features, generator=generator, device=settings.device,
                dtype=dtype,
            )  # fmt: skip

        data = draw(settings.num_samples, settings.rare)
        tests = [draw(settings.test_samples, rare, data.features) for rare in (0, 1)]
        size = (2, settings.filters_per_class, settings.patch_dim)
        weight = torch.randn(size, generator=_generator("weight", settings.seed), dtype=torch.float64)
        return data, tests, (weight * settings.init_std).to(settings.device, dtype)


def runs_of(settings: Settings, methods: Iterable[str] = METHODS) -> list[Run]:
    """List the runs of the experiment, the longest first."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return [
        Run(replace(settings, seed=seed, seeds=1), method)
        for method in sorted(methods, key=_LONGEST_FIRST.index) for seed in seeds
    ]  # fmt: skip


_ACTIVATION = mf.Power(2)


def _advance(runs: Sequence[Run], records: Sequence[Record | None], seconds: float) -> list[Record]:
    pace = Pace(seconds)
    settings, method = runs[0].settings, runs[0].method
    drawn = [run.draw() for run in runs]
    input, target = (torch.stack([getattr(data, name) for data, _, _ in drawn]) for name in ("input", "target"))
    weight, step = torch.stack([start for _, _, start in drawn]), 0
    errors = torch.zeros(settings.evaluations + 1, len(runs), 2, dtype=torch.float64)
    if records[0] is not None:
        states = [record.state for record in records if record]
        weight = torch.stack([state["weight"] for state in states]).to(weight.device)
        errors = torch.stack([state["test_error"] for state in states], 1)
        step = records[0].step
    first, last_of_mixup = step, {"erm": 0, "mixup": settings.steps, "early": settings.mixup_steps}[method]

    label_lam = None if settings.label_lam == settings.lam else settings.label_lam  # None is faster

    def train(lam: float | None, weight: Tensor, count: int) -> Tensor:
        options: dict[str, Any] = {} if lam is None else {"label_lam": label_lam}
        return mf.gradient_descent(input, weight, target, _ACTIVATION, lam=lam, lr=settings.lr, steps=count, **options)[
            0
        ]

    for point, stop in enumerate(evaluation_steps(settings)):
        if stop < first:
            continue
        for until, lam in ((min(stop, last_of_mixup), settings.lam), (stop, None)):
            weight, step = pace.descend(weight, step, until, partial(train, lam))
        if step < stop:
            break
        for i, (_, tests, _) in enumerate(drawn):
            errors[point, i] = torch.tensor([1 - _accuracy(weight[i], test) for test in tests])

    finished = step == settings.steps
    finite = weight.flatten(1).isfinite().all(1).tolist()
    spent = pace.seconds() / len(runs)
    later = []
    for i, (data, _, _) in enumerate(drawn):
        record = records[i]
        after = spent + (record.seconds if record else 0.0)
        if not finite[i]:
            later.append(Record(True, step, after, {}))
            continue
        state = {"weight": weight[i].cpu(), "test_error": errors[:, i].clone()}
        if finished:
            products = (weight[i] @ data.features.mT).abs().amax(1)
            state |= {"train_accuracy": torch.tensor(_accuracy(weight[i], data)), "alignment": products.cpu()}
        later.append(Record(finished, step, after, state))
    return later


def _accuracy(weight: Tensor, data: mf.data.CommonRareData) -> float:
    return (mf.patch_conv(data.input, weight, _ACTIVATION).argmax(1) == data.target).double().mean().item()


def join(runs: Sequence[Run], records: Mapping[str, Record]) -> Record:
    """Stack the finished records of R runs: the curve (E+1,R,2), all else (R,...); the seconds are summed.

    Raises:
        DivergedError: one of the runs diverged.
    """
    return engine.stack(runs, records, ("test_error",))


def summarise(settings: Settings, record: Record) -> dict[str, Any]:
    """Turn a finished record of R seeds (:func:`join`) into numbers for a table or JSON: lists over the seeds.

    The alignments are means over the two classes; each of the ``curves`` is a list over time of lists over the seeds.
    """
    error, alignment = record.state["test_error"], record.state["alignment"].double().mean(1)
    kinds = enumerate(("common", "rare"))
    result: dict[str, Any] = {"train_accuracy": record.state["train_accuracy"].tolist()}
    curves: dict[str, Any] = {"step": evaluation_steps(settings)}
    for i, kind in kinds:
        curves[f"test_error_{kind}"] = error[..., i].tolist()
        result |= {f"test_error_{kind}": error[-1, :, i].tolist(), f"alignment_{kind}": alignment[:, i].tolist()}
    return {**result, "seconds": record.seconds, "curves": curves}
