"""The paper's second experiment: images with two features per class (arXiv 2210.13512, section 5).

ERM, Uniform Mixup (one lam ~ U[0, 1] per batch) and Midpoint Mixup (lam = 1/2) train with Adam on
:class:`mixfeat.data.TwoFeatureImages`. A sample's partner is drawn from the whole training set, with its own weight w.
After every epoch the test error is measured with the second half zero, which is the paper's test, and with the first
half zero, which tests the second feature.

A run is a method and a seed. Runs of one seed share the pairing of classes and images and the initial weights.
"""

import functools
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixfeat as mf
from mixfeat.experiments import datasets
from mixfeat.experiments.common import METHODS, BaseSettings, DivergedError, _deterministic, _generator, _setting
from mixfeat.experiments.datasets import DATASETS, Split
from mixfeat.experiments.engine import Record

__all__ = ["MODELS", "Problem", "Run", "Settings", "load", "make_model", "make_problem", "runs_of", "summarise"]

MODELS = ("patch", "resnet1d", "resnet18")


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Everything that determines the numbers of the experiment; ``None`` and ``"auto"`` are resolved on creation.

    Raises:
        TypeError, ValueError: an invalid setting, or model ``resnet18`` without torchvision; the message names the
            setting, the value and the requirement.
    """

    dataset: str = _setting("digits", f"one of {', '.join(DATASETS)}")
    model: str = _setting("patch", f"one of {', '.join(MODELS)}")
    weight: tuple[float, float] = _setting((0.0, 1.0), "range of the weight w of the first half; the paper has 0 to 1")
    patch_size: int = _setting(None, "patch: side of a patch; default: 8 for digits, 7 for fashion-mnist, else 8")
    filters_per_class: int = _setting(10, "patch: filters per class (m)")
    degree: int = _setting(8, "patch: degree of the activation's polynomial (alpha)")
    rho: float = _setting(1.0, "patch: threshold above which the activation is linear (rho)")
    init_scale: float = _setting(1.2, "patch: scale of the pre-activations of images at the start, in units of rho")
    lr: float = _setting(None, "step size of Adam; default: 0.003 for patch, else 0.001")
    epochs: int = _setting(100, "passes over the training images")
    batch_size: int = _setting(None, "images of a step; default: 100 for digits and mnist1d, else 750")
    seeds: int = _setting(5, "number of runs of each method, each with its own pairing and initialisation")
    seed: int = _setting(0, "the first seed; the same seed repeats a run exactly")
    device: str = _setting("auto", "torch device, or auto: a GPU if there is one")
    dtype: str = _setting("float32", "float32 or float64")

    def __post_init__(self) -> None:
        for name, known in (("dataset", tuple(DATASETS)), ("model", MODELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.patch_size is None:
            self._set("patch_size", 7 if self.dataset == "fashion-mnist" else 8)
        if self.batch_size is None:
            self._set("batch_size", 100 if self.dataset in ("digits", "mnist1d") else 750)
        if self.lr is None:
            self._set("lr", 3e-3 if self.model == "patch" else 1e-3)
        self._check_integers(_LEAST)
        self._check_positive("init_scale", "lr")
        self._set("weight", mf.data._weight(self.weight))
        mf.PolyReLU(self.degree, self.rho)  # refuses a bad degree or rho
        _, height, width = DATASETS[self.dataset].shape
        if self.model == "patch" and (height % self.patch_shape[0] or width % self.patch_size):
            raise ValueError(
                f"patch_size must divide the images' height and width, got {self.patch_size} for {height} x {width}"
            )
        if self.model == "resnet1d" and height > 1:
            raise ValueError(f"model resnet1d needs data of one row (mnist1d), got {self.dataset}, {height} x {width}")
        if self.model == "resnet18":
            _resnet18()
        self._check_device()

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Return the height and width of a patch; images of one row have patches of one row."""
        return 1 if DATASETS[self.dataset].shape[1] == 1 else self.patch_size, self.patch_size


_LEAST = {
    "patch_size": 1, "filters_per_class": 1, "degree": 1, "epochs": 1, "batch_size": 1, "seeds": 1, "seed": 0,
}  # fmt: skip


class Problem(NamedTuple):
    """The data that the runs of one seed share."""

    train: mf.data.TwoFeatureImages
    tests: tuple[mf.data.TwoFeatureImages, ...]  # of view 0 and of view 1
    generator: torch.Generator  # has drawn the pairing, and draws the batches next, on the device


def make_problem(settings: Settings, data: tuple[Split, Split], seed: int) -> Problem:
    """Pair the classes and give each image its second half, for training and, with the same pairs, for testing."""
    device, dtype = settings.device, getattr(torch, settings.dtype)
    (images, target), (test_images, test_target) = (Split(x.to(device, dtype), y.to(device)) for x, y in data)
    generator = _generator("images", seed, device=device)
    train = mf.data.TwoFeatureImages(images, target, weight=settings.weight, generator=generator)
    tests = tuple(
        mf.data.TwoFeatureImages(
            test_images, test_target, views=view, partner_class=train.partner_class,
            generator=_generator("test images", seed),
        )
        for view in (0, 1)
    )  # fmt: skip
    return Problem(train, tests, generator)


class _PatchModel(nn.Module):
    """A network on the patches of images; a patch holds both halves' channels, so filters can distinguish them."""

    def __init__(self, network: nn.Module, patch_shape: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.patch_shape = network, patch_shape

    def forward(self, input: Tensor) -> Tensor:
        return self.network(mf.data.images_to_patches(input, self.patch_shape))


class _Block(nn.Module):
    """A residual block of two convolutions of 3, along one dimension."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(out_channels)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm1d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv1d(channels, out_channels, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(input)).relu()
        return (self.bn2(self.conv2(hidden)) + self.shortcut(input)).relu()


class _ResNet1d(nn.Module):
    """A small 1-d ResNet on images of one row: one block each with 16, 32 and 64 channels."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        stem = nn.Conv1d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16), nn.ReLU()
        self.body = nn.Sequential(*stem, _Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, input: Tensor) -> Tensor:
        return self.fc(self.body(input.flatten(2)).mean(2))


def make_model(settings: Settings, seed: int, images: Tensor) -> nn.Module:
    """Return the network with its initial weights, from (B, 2 channels, H, W) to logits.

    ``patch`` is :class:`mixfeat.TwoLayerPatchCNN`; pre-activations of the patches of ``images`` start with a root mean
    square of ``init_scale`` rho. ``resnet1d`` has seven convolutions of width 3 along the row. ``resnet18`` is
    torchvision's with the authors' stem for small images: a 3 x 3 convolution of stride 1, with twice the channels, and
    no pooling.
    """
    dataset = DATASETS[settings.dataset]
    channels = 2 * images.shape[1]
    generator = _generator("model", seed)
    if settings.model == "patch":
        pixel = torch.linalg.vector_norm(images, dtype=torch.float64) / images.numel() ** 0.5  # root mean square
        patch = pixel * (math.prod(settings.patch_shape) * images.shape[1]) ** 0.5
        network = mf.TwoLayerPatchCNN(
            dataset.num_classes, settings.filters_per_class, channels * math.prod(settings.patch_shape),
            mf.PolyReLU(settings.degree, settings.rho), init_std=(settings.init_scale * settings.rho / patch).item(),
            generator=generator, dtype=getattr(torch, settings.dtype),
        )  # fmt: skip
        return _PatchModel(network, settings.patch_shape).to(settings.device)
    with _default_generator, torch.random.fork_rng(devices=[]):  # modules draw from torch's own generator
        torch.manual_seed(generator.initial_seed())
        model = (_ResNet1d if settings.model == "resnet1d" else _small_resnet18)(channels, dataset.num_classes)
    return model.to(settings.device, getattr(torch, settings.dtype))


def _small_resnet18(channels: int, num_classes: int) -> nn.Module:
    model = _resnet18()(num_classes=num_classes)
    model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # like its other convolutions
    model.maxpool = nn.Identity()
    return model


_default_generator = threading.Lock()  # a Dask worker may train several runs at a time, in threads


def _resnet18() -> Callable[..., Any]:
    try:
        from torchvision.models import resnet18
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ValueError(f"model resnet18 needs {package}: pip install 'mixfeat[images]'") from None
    except (ImportError, RuntimeError) as error:  # torchvision was built for another torch
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model resnet18 needs a torchvision that fits torch {torch.__version__}; importing it failed: {reason}"
        ) from None
    return resnet18


def objective(model: nn.Module, data: mf.data.TwoFeatureImages, index: Tensor, method: str, generator: Any) -> Tensor:
    """Return the method's loss on the samples ``index``, () of the logits' dtype."""
    input, target = data.batch(index)
    if method == "erm":
        return F.cross_entropy(model(input), target)
    partner = torch.randint(len(data), index.shape, generator=generator, device=index.device)
    other, other_target = data.batch(partner)
    if method == "midpoint":
        lam = input.new_full((), 0.5)
    else:
        lam = torch.rand((), generator=generator, device=input.device, dtype=input.dtype)
    return mf.mixup_cross_entropy(model(torch.lerp(other, input, lam)), target, other_target, lam)


@functools.lru_cache(maxsize=1)  # a worker reads the data once for all chunks
def load(dataset: str, folder: Path) -> tuple[Split, Split]:
    """Return training and test data of :func:`mixfeat.experiments.datasets.load`, read once in each process."""
    return datasets.load(dataset, folder)


@dataclass(frozen=True)
class Run:
    """One method on one seed, a task of :mod:`mixfeat.experiments.engine`.

    The state of its record holds curves over E epochs: ``test_error`` (E, 2), of view 0 and view 1 after each epoch,
    and ``loss`` (E,), the mean of the epoch's objective. An unfinished record adds the model, the optimizer and the
    generator, a finished one ``train_accuracy`` (), on the training images with both halves and new weights w.
    """

    settings: Settings
    method: str
    seed: int
    folder: Path  # of the data set
    steps: int

    group = None  # each run is trained alone

    @property
    def name(self) -> str:
        """Return the name of the run's record."""
        return f"{self.method}-seed-{self.seed}"

    @property
    def label(self) -> str:
        """Return the run's name on the screen."""
        return f"{METHODS[self.method]}, seed {self.seed}"

    @staticmethod
    def advance(runs: "Sequence[Run]", records: Sequence[Record | None], seconds: float) -> list[Record]:
        """Train for about ``seconds``, at least an epoch, as :class:`mixfeat.experiments.engine.Run` requires."""
        with _deterministic(runs[0].settings.device):
            return [_advance(run, record, seconds) for run, record in zip(runs, records, strict=True)]


def runs_of(settings: Settings, methods: Iterable[str], folder: Path) -> list[Run]:
    """List the runs of the experiment on the data in ``folder``.

    Raises:
        DatasetError: data that cannot be read.
    """
    steps = settings.epochs * steps_of_epoch(settings, load(settings.dataset, folder))
    seeds = range(settings.seed, settings.seed + settings.seeds)
    return [Run(settings, method, seed, folder, steps) for method in methods for seed in seeds]


def join(runs: Sequence[Run], records: Mapping[str, Record]) -> dict[int, Record]:
    """Return the finished records of one method's runs, by seed.

    Raises:
        DivergedError: one of the runs diverged.
    """
    for run in runs:
        if records[run.name].diverged:
            epoch = records[run.name].step // (run.steps // run.settings.epochs)
            raise DivergedError(
                f"{run.method}, seed {run.seed} left the finite numbers in epoch {epoch}: "
                f"try a smaller lr than {run.settings.lr}"
            )
    return {run.seed: records[run.name] for run in runs}


def _advance(run: Run, record: Record | None, seconds: float) -> Record:
    started = time.monotonic()
    settings, method, data = run.settings, run.method, load(run.settings.dataset, run.folder)
    problem, model = make_problem(settings, data, run.seed), make_model(settings, run.seed, data[0].images)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    steps = steps_of_epoch(settings, data)
    curves = {
        "test_error": torch.zeros(settings.epochs, 2, dtype=torch.float64),
        "loss": torch.zeros(settings.epochs, dtype=torch.float64),
    }
    first = 0
    if record is not None:
        first = record.step // steps
        curves = {name: record.state[name].clone() for name in curves}
        _restore(record.state, model, optimizer, problem.generator)

    def reached(epochs: int, state: dict[str, Tensor], *, finished: bool = False) -> Record:
        spent = (record.seconds if record else 0.0) + time.monotonic() - started
        return Record(finished, epochs * steps, spent, state)

    for epoch in range(first, settings.epochs):
        loss = _train_epoch(settings, method, problem, model, optimizer)
        if not loss.isfinite():
            return reached(epoch + 1, {}, finished=True)
        curves["loss"][epoch] = loss
        curves["test_error"][epoch] = torch.stack([1 - _accuracy(model, test, settings) for test in problem.tests])
        if epoch + 1 < settings.epochs and time.monotonic() - started >= seconds:
            return reached(epoch + 1, {**curves, **_state(model, optimizer, problem.generator)})
    accuracy = _accuracy(model, problem.train, settings).cpu()
    return reached(settings.epochs, {**curves, "train_accuracy": accuracy}, finished=True)


def steps_of_epoch(settings: Settings, data: tuple[Split, Split]) -> int:
    """Return the number of batches of an epoch, the last of which may be smaller."""
    return -(-len(data[0].target) // settings.batch_size)


def _train_epoch(
    settings: Settings, method: str, problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Tensor:  # fmt: skip
    """Train one epoch and return the mean of the objective over its samples, without waiting for the device."""
    model.train()
    num_samples = len(problem.train)
    total = torch.zeros((), dtype=torch.float64, device=settings.device)
    order = torch.randperm(num_samples, generator=problem.generator, device=settings.device)
    for index in order.split(settings.batch_size):
        loss = objective(model, problem.train, index, method, problem.generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(index)
    return total / num_samples


def _accuracy(model: nn.Module, data: mf.data.TwoFeatureImages, settings: Settings) -> Tensor:
    model.eval()
    correct = torch.zeros((), dtype=torch.float64, device=settings.device)
    with torch.no_grad():
        for index in torch.arange(len(data), device=settings.device).split(settings.batch_size):
            input, target = data.batch(index)
            correct += (model(input).argmax(1) == target).sum()
    return correct / len(data)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> dict[str, Tensor]:
    """Return everything that changes from epoch to epoch, on the CPU."""
    state = {f"model {name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"optimizer {name} {key}": value for key, value in optimizer.state[parameter].items()}
    return {name: value.cpu() for name, value in state.items()} | {"generator": generator.get_state()}


def _restore(
    state: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """Load a state that :func:`_state` returned."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    model.load_state_dict(part("model "))
    groups = optimizer.state_dict()["param_groups"]
    moments = {i: part(f"optimizer {name} ") for i, (name, _) in enumerate(model.named_parameters())}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    generator.set_state(state["generator"])


def summarise(records: Mapping[int, Record]) -> dict[str, Any]:
    """Turn a method's finished records, by seed, into numbers for a table or JSON.

    Each entry is a list over the seeds, and each of the ``curves`` a list over the epochs of such lists. Errors and
    accuracies are fractions; ``test_error_view_1`` tests the second feature.
    """
    errors, loss = (
        torch.stack([record.state[name] for record in records.values()], -1) for name in ("test_error", "loss")
    )  # (E, 2, R), (E, R)
    return {
        "train_accuracy": [record.state["train_accuracy"].item() for record in records.values()],
        "test_error_view_0": errors[-1, 0].tolist(),
        "test_error_view_1": errors[-1, 1].tolist(),
        "loss": loss[-1].tolist(),
        "seconds": [record.seconds for record in records.values()],
        "curves": {
            "epoch": list(range(1, len(errors) + 1)),
            "test_error_view_0": errors[:, 0].tolist(),
            "test_error_view_1": errors[:, 1].tolist(),
            "loss": loss.tolist(),
        },
    }
