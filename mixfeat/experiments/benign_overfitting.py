"""Benign and harmful overfitting: the test error of networks that fit their training samples, over samples and signal.

Cao, Chen, Belkin, Gu: "Benign Overfitting in Two-layer Convolutional Neural Networks", NeurIPS 2022 (arXiv 2202.06526).
Networks descend on the logistic loss of :func:`mixfeat.data.signal_noise`. With n samples of signal-to-noise ratio
SNR = |mu| / (sigma_p sqrt(d)) the theorems separate two phases by n SNR^q. A run is a point of the grid and a seed.
"""

import itertools
import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mixfeat as mf
from mixfeat import _checks
from mixfeat.experiments.common import BaseSettings, Pace, _deterministic, _generator, _setting, identity
from mixfeat.experiments.engine import Record

__all__ = ["QUANTITIES", "Run", "Settings", "boundary", "grid_identity", "runs_of", "summarise"]

QUANTITIES = ("test_error", "train_loss", "signal_learning", "noise_memorization")
_THRESHOLD = 0.25  # the test error at the boundary: between chance and none


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Everything that determines the numbers of the experiment; ``"auto"`` is resolved on creation.

    Raises:
        TypeError, ValueError: an invalid setting; the message names it, the value and the requirement.
    """

    num_samples: tuple[int, ...] = _setting((10, 14, 20, 28, 40, 56, 80), "training samples (n), at least one number")
    signal: tuple[float, ...] = _setting((3, 4, 5, 6, 7, 8, 10, 12), "strengths of the signal (|mu|)")
    degree: int = _setting(3, "degree of the activation max(z, 0)^q (q), at least 3")
    filters_per_class: int = _setting(10, "filters, or neurons, per class (m)")
    patch_dim: int = _setting(400, "dimension of a patch (d)")
    noise_std: float = _setting(1.0, "standard deviation of the noise (sigma_p)")
    init_std: float = _setting(0.01, "standard deviation of the initial weights (sigma_0)")
    lr: float = _setting(0.1, "step size of gradient descent (eta)")
    steps: int = _setting(2000, "gradient steps")
    seeds: int = _setting(10, "number of seeds, each with its own data and initialisation")
    seed: int = _setting(0, "the first seed; the same seed repeats a run exactly")
    test_samples: int = _setting(1000, "test points of each run")
    device: str = _setting("auto", "torch device, or auto: a GPU if there is one")
    dtype: str = _setting("float32", "float32 or float64")

    def __post_init__(self) -> None:
        self._check_integers(
            {
                "degree": 3, "filters_per_class": 1, "patch_dim": 2, "steps": 1, "seeds": 1, "seed": 0,
                "test_samples": 1,
            }
        )  # fmt: skip
        self._check_positive("noise_std", "init_std", "lr")
        mf.PowerReLU(self.degree)  # refuses a degree that is too high
        self._set("num_samples", _values("num_samples", self.num_samples, lambda n, v: _checks.integer(n, v, 2)))
        self._set("signal", _values("signal", self.signal, _checks.positive))
        self._check_device()

    def snr(self, signal: float) -> float:
        """Return the signal-to-noise ratio |mu| / (sigma_p sqrt(d))."""
        return signal / (self.noise_std * math.sqrt(self.patch_dim))


def _values(name: str, values: Any, check: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{name} must be at least one number, got {values!r}")
    checked = tuple(check(name, value) for value in values)
    if len(set(checked)) < len(checked):
        raise ValueError(f"{name} must be different numbers, got {', '.join(map(str, checked))}")
    return tuple(sorted(checked))


def grid_identity(settings: Settings) -> dict[str, Any]:
    """Return the settings that all records depend on, without the grid's values and the seeds, which may grow."""
    return {name: v for name, v in identity(settings).items() if name not in ("num_samples", "signal", "seed", "seeds")}


@dataclass(frozen=True)
class Run:
    """One point of the grid and a seed, a task of :mod:`mixfeat.experiments.engine`.

    The state of its record holds ``weight`` (2,M,D). A finished record adds numbers (): ``test_error``, the share of
    wrong test points; ``train_loss``; ``signal_learning`` max_{y,m} <w[y,m], y mu> and ``noise_memorization``
    max_{i,m} <w[y_i,m], xi_i>.
    """

    settings: Settings
    num_samples: int
    signal: float
    seed: int

    @property
    def name(self) -> str:
        """Return the name of the run's record."""
        return f"n-{self.num_samples}-signal-{self.signal!r}-seed-{self.seed}"

    @property
    def label(self) -> str:
        """Return the run's name on the screen."""
        return f"n {self.num_samples}, signal {self.signal:g}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """Return the number of gradient steps."""
        return self.settings.steps

    @property
    def group(self) -> Hashable:
        """Return on a GPU the number of samples, which runs of a launch share, on a CPU None: a network has a core."""
        return self.num_samples if self.settings.device.startswith("cuda") else None

    @staticmethod
    def advance(runs: "Sequence[Run]", records: Sequence[Record | None], seconds: float) -> list[Record]:
        """Train for about ``seconds``, as :class:`mixfeat.experiments.engine.Run` requires."""
        with _deterministic(runs[0].settings.device):
            return _advance(runs, records, seconds)

    def draw(self) -> tuple[mf.data.SignalNoiseData, mf.data.SignalNoiseData, Tensor]:
        """Return the training samples, the test points and the initial weights (2,M,D)."""
        settings, key = self.settings, (self.seed, self.num_samples, self.signal)
        dtype, generator = getattr(torch, settings.dtype), _generator("signal and noise", *key)
        options: dict[str, Any] = {
            "signal": self.signal, "noise_std": settings.noise_std, "generator": generator, "device": settings.device,
            "dtype": dtype,
        }  # fmt: skip
        data = mf.data.signal_noise(self.num_samples, settings.patch_dim, **options)
        test = mf.data.signal_noise(settings.test_samples, settings.patch_dim, **options, features=data.features)
        size = (2, settings.filters_per_class, settings.patch_dim)
        weight = torch.randn(size, generator=_generator("weight", *key), dtype=torch.float64) * settings.init_std
        return data, test, weight.to(settings.device, dtype)


def runs_of(settings: Settings) -> list[Run]:
    """List the runs of the experiment, the longest first."""
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return [
        Run(settings, n, s, seed) for n in reversed(settings.num_samples) for s in settings.signal for seed in seeds
    ]


def _advance(runs: Sequence[Run], records: Sequence[Record | None], seconds: float) -> list[Record]:
    pace, settings = Pace(seconds), runs[0].settings
    # F_y = 1/m sum phi: the softmax cross-entropy of F_-1 and F_+1 is the logistic loss of y (F_+1 - F_-1)
    phi = mf.PowerReLU(settings.degree, scale=1 / settings.filters_per_class)
    drawn = [run.draw() for run in runs]
    input, target = (torch.stack([getattr(data, name) for data, _, _ in drawn]) for name in ("input", "target"))
    weight, step = torch.stack([start for _, _, start in drawn]), 0
    if records[0] is not None:
        weight = torch.stack([record.state["weight"] for record in records if record]).to(weight.device)
        step = records[0].step

    def train(weight: Tensor, count: int) -> Tensor:
        return mf.gradient_descent(input, weight, target, phi, lam=None, lr=settings.lr, steps=count)[0]

    weight, step = pace.descend(weight, step, settings.steps, train)
    finished = step == settings.steps
    finite = weight.flatten(1).isfinite().all(1).tolist()
    spent = pace.seconds() / len(runs)
    later = []
    for i, (data, test, _) in enumerate(drawn):
        record = records[i]
        after = spent + (record.seconds if record else 0.0)
        state = {"weight": weight[i].cpu()}
        if finished and finite[i]:
            state |= {name: value.double().cpu() for name, value in _evaluate(weight[i], data, test, phi).items()}
        done = finished or not finite[i]
        later.append(Record(done, step, after, state if finite[i] else {}))
    return later


def _evaluate(
    weight: Tensor, data: mf.data.SignalNoiseData, test: mf.data.SignalNoiseData, phi: mf.PowerReLU
) -> dict[str, Tensor]:
    logits, test_logits = (mf.patch_conv(points.input, weight, phi) for points in (data, test))
    return {
        "test_error": (test_logits.argmax(1) != test.target).double().mean(),
        "train_loss": F.cross_entropy(logits, data.target),
        "signal_learning": mf.features.alignment(weight, data.features).max(),
        "noise_memorization": mf.features.noise_memorization(weight, data.noise, data.target).max(),
    }


def summarise(settings: Settings, records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """Turn every point of the grid into numbers: lists over the seeds, with None for a run that diverged."""
    points: dict[tuple[int, float], list[Record]] = {}
    for run in runs_of(settings):
        points.setdefault((run.num_samples, run.signal), []).append(records[run.name])
    return [
        {
            "num_samples": n, "signal": signal, "n_snr_q": n * settings.snr(signal) ** settings.degree,
            **{name: [r.state[name].item() if r.state else None for r in found] for name in QUANTITIES},
            "seconds": sum(record.seconds for record in found),
        }
        for (n, signal), found in sorted(points.items())
    ]  # fmt: skip


def boundary(settings: Settings, cells: Sequence[Mapping[str, Any]]) -> dict[int, float | None]:
    """Return for each n the signal at which the mean test error is 1/4, by linear interpolation; None if there is none.

    The theorem predicts the same n SNR^q at all of them.
    """
    found: dict[int, float | None] = {}
    for n in settings.num_samples:
        errors = [(cell["signal"], mean_of(cell["test_error"])) for cell in cells if cell["num_samples"] == n]
        found[n] = None
        for (low, above), (high, below) in itertools.pairwise(errors):
            if above > _THRESHOLD >= below:
                found[n] = low + (high - low) * (above - _THRESHOLD) / (above - below)
                break
    return found


def mean_of(values: Sequence[float | None]) -> float:
    """Return the mean over the seeds, NaN if one of them diverged."""
    return statistics.mean(math.nan if value is None else value for value in values)
