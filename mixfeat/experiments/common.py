"""Parts that the experiments share: the methods, settings that determine every number, and randomness by key."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, field
from typing import Any

import torch
from torch import Tensor

import mixfeat as mf
from mixfeat import _checks

__all__ = ["METHODS", "BaseSettings", "DivergedError", "Pace", "evaluation_steps", "identity"]

METHODS = {"erm": "ERM", "uniform": "Uniform Mixup", "midpoint": "Midpoint Mixup"}


class DivergedError(Exception):
    """Training produced numbers that are not finite."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


class BaseSettings:
    """Base of the frozen dataclasses of settings, which check and resolve their fields on creation."""

    device: str
    dtype: str

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_integers(self, least: Mapping[str, int]) -> None:
        for name, bound in least.items():
            self._set(name, _checks.integer(name, getattr(self, name), bound))

    def _check_positive(self, *names: str, or_zero: str | None = None) -> None:
        for name in names:
            value = _checks.finite(name, getattr(self, name))
            if value < 0 or (value == 0 and name != or_zero):
                raise ValueError(f"{name} must be {'at least 0' if name == or_zero else 'positive'}, got {value}")
            if value > 1e30:
                raise ValueError(f"{name} must be at most 1e30, which float32 can hold, got {value}")
            self._set(name, value)

    def _check_device(self) -> None:
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")
        if self.device == "auto":
            self._set("device", "cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros((), device=self.device).item()  # raises on the meta device
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device must be a torch device of this machine, got {self.device!r}: {reason}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in a form for JSON."""
        values: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def hash(self) -> str:
        """Return a short name for these settings, the same on every machine and in every process."""
        return _digest(sorted(self.to_dict().items())).hex()[:12]


def identity(settings: BaseSettings) -> dict[str, Any]:
    """Return everything that records depend on, to the last bit: the settings and the software versions.

    Raises:
        ValueError: a chosen backend that does not serve the settings' device and dtype.
    """
    backend = mf.backends.serving(torch.device(settings.device).type, getattr(torch, settings.dtype))
    return {**settings.to_dict(), "backend": backend, "mixfeat": mf.__version__, "torch": torch.__version__}


def evaluation_steps(settings: Any) -> list[int]:
    """Return the steps at which the curves have a point, evenly spaced from 0 to the last."""
    return [settings.steps * i // settings.evaluations for i in range(settings.evaluations + 1)]


class Pace:
    """Divide a chunk of training into calls of at least one step, so that the chunk takes about the given time."""

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds = time.monotonic(), seconds
        self._stride, self._begun = 1, False

    def seconds(self) -> float:
        """Return the time since the start."""
        return time.monotonic() - self._started

    def descend(
        self, weight: Tensor, step: int, stop: int, train: Callable[[Tensor, int], Tensor]
    ) -> tuple[Tensor, int]:
        """Train from ``step`` to ``stop``, or as far as time allows; ``train(weight, count)`` takes ``count`` steps."""
        while step < stop and not (self._begun and self.seconds() >= self._seconds):
            now, count = time.monotonic(), min(self._stride, stop - step)
            weight = train(weight, count)
            step, self._begun = step + count, True
            if weight.is_cuda:
                torch.cuda.synchronize(weight.device)
            if time.monotonic() - now < self._seconds / 8:
                self._stride *= 2
        return weight, step


def _generator(*key: Any, device: str = "cpu") -> torch.Generator:
    """Return a generator seeded by the key; a CPU generator makes the draws independent of the device."""
    seed = int.from_bytes(_digest(key)[:4], "big")  # a CPU generator uses 32 bits of its seed
    return torch.Generator(device).manual_seed(seed)


def _digest(value: Any) -> bytes:
    return hashlib.sha256(repr(value).encode()).digest()


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """Make a GPU repeat its results bit for bit, as the CPU always does."""
    if device == "cpu":
        yield  # setting even the same value takes torch seconds
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
