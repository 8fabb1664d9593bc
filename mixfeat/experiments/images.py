"""The paper's second experiment: image data made to have two features per class (arXiv 2210.13512, section 5).

ERM, Uniform Mixup (one lam ~ U[0, 1] per batch) and Midpoint Mixup (lam = 1/2) train by Adam on
:class:`mixfeat.data.TwoFeatureImages`; a sample's partner is drawn from the whole training set, with a weight w of its
own. After every epoch the test error is taken on test images with the second half zero, which is the paper's test, and
with the first half zero: whether the second feature has been learned.

A run is a method and a seed. Runs of one seed share the classes' pairing, the images paired and the initial weights.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mixfeat as mf
from mixfeat.experiments.common import BaseSettings, DivergedError, _deterministic, _generator, _setting
from mixfeat.experiments.datasets import DATASETS, Split
from mixfeat.experiments.store import Record, Store

__all__ = ["MODELS", "Problem", "Settings", "make_model", "make_problem", "name_of", "summarise", "train"]

MODELS = ("patch", "resnet18")


@dataclass(frozen=True)
class Settings(BaseSettings):
    """Everything that determines the numbers of the experiment; ``None`` and ``"auto"`` are resolved on creation.

    Raises:
        TypeError, ValueError: naming the setting, what it got and what it needs. Among them a model ``resnet18`` where
            torchvision cannot be imported.
    """

    dataset: str = _setting("digits", f"one of {', '.join(DATASETS)}")
    model: str = _setting("patch", f"one of {', '.join(MODELS)}")
    weight: tuple[float, float] = _setting((0.0, 1.0), "range of the weight w of the first half; the paper has 0 to 1")
    patch_size: int = _setting(None, "patch: side of a patch; default: 8 for digits, 7 for fashion-mnist, else 8")
    filters_per_class: int = _setting(10, "patch: filters per class (m)")
    degree: int = _setting(8, "patch: degree of the activation's polynomial (alpha)")
    rho: float = _setting(1.0, "patch: threshold above which the activation is linear (rho)")
    init_scale: float = _setting(1.2, "patch: scale of the pre-activations of images at the start, in units of rho")
    lr: float = _setting(None, "step size of Adam; default: 0.003 for patch, 0.001 for resnet18")
    epochs: int = _setting(100, "passes over the training images")
    batch_size: int = _setting(None, "images of a step; default: 100 for digits, else 750")
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
            self._set("batch_size", 100 if self.dataset == "digits" else 750)
        if self.lr is None:
            self._set("lr", 3e-3 if self.model == "patch" else 1e-3)
        self._check_integers(_LEAST)
        self._check_positive("init_scale", "lr")
        self._set("weight", mf.data._weight(self.weight))
        mf.PolyReLU(self.degree, self.rho)  # refuses a bad degree or rho
        _, height, width = DATASETS[self.dataset].shape
        if self.model == "patch" and (height % self.patch_size or width % self.patch_size):
            raise ValueError(
                f"patch_size must divide the images' height and width, got {self.patch_size} for {height} x {width}"
            )
        if self.model == "resnet18":
            _resnet18()
        self._check_device()


_LEAST = {
    "patch_size": 1, "filters_per_class": 1, "degree": 1, "epochs": 1, "batch_size": 1, "seeds": 1, "seed": 0,
}  # fmt: skip


class Problem(NamedTuple):
    """What the runs of one seed have in common."""

    train: mf.data.TwoFeatureImages
    tests: tuple[mf.data.TwoFeatureImages, ...]  # of view 0 and of view 1
    generator: torch.Generator  # has drawn the pairing; batches are drawn from it next, on the device


def make_problem(settings: Settings, data: tuple[Split, Split], seed: int) -> Problem:
    """Pair the classes and give each image its second half, for training and, with the same classes, for testing."""
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
    """A network on the patches of images; a patch holds both halves' channels, or no filter could tell them apart."""

    def __init__(self, network: nn.Module, patch_size: int) -> None:
        super().__init__()
        self.network, self.patch_size = network, patch_size

    def forward(self, input: Tensor) -> Tensor:
        return self.network(mf.data.images_to_patches(input, self.patch_size))


def make_model(settings: Settings, seed: int, images: Tensor) -> nn.Module:
    """The network with its initial weights, from (B, 2 channels, H, W) to logits.

    ``patch`` is :class:`mixfeat.TwoLayerPatchCNN`; pre-activations of the patches of ``images`` start with a root mean
    square of ``init_scale`` rho. ``resnet18`` is torchvision's, with the stem for small images that the authors' has
    too: a 3 x 3 convolution of stride 1, with twice the channels, and no pooling.
    """
    dataset = DATASETS[settings.dataset]
    channels = 2 * images.shape[1]
    generator = _generator("model", seed)
    if settings.model == "patch":
        pixel = torch.linalg.vector_norm(images, dtype=torch.float64) / images.numel() ** 0.5  # root mean square
        patch = pixel * settings.patch_size * images.shape[1] ** 0.5
        network = mf.TwoLayerPatchCNN(
            dataset.num_classes, settings.filters_per_class, channels * settings.patch_size**2,
            mf.PolyReLU(settings.degree, settings.rho), init_std=(settings.init_scale * settings.rho / patch).item(),
            generator=generator, dtype=getattr(torch, settings.dtype),
        )  # fmt: skip
        return _PatchModel(network, settings.patch_size).to(settings.device)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own generator
        torch.manual_seed(generator.initial_seed())
        model = _resnet18()(num_classes=dataset.num_classes)
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as its other convolutions
    model.maxpool = nn.Identity()
    return model.to(settings.device, getattr(torch, settings.dtype))


def _resnet18() -> Callable[..., Any]:
    try:
        from torchvision.models import resnet18
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ValueError(f"model resnet18 needs {package}: pip install 'mixfeat[images]'") from None
    except (ImportError, RuntimeError) as error:  # one that was built for another torch
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model resnet18 needs a torchvision that fits torch {torch.__version__}; importing it failed: {reason}"
        ) from None
    return resnet18


def objective(model: nn.Module, data: mf.data.TwoFeatureImages, index: Tensor, method: str, generator: Any) -> Tensor:
    """The method's loss on the samples ``index``, () of the logits' dtype."""
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


def name_of(method: str, seed: int) -> str:
    """The name of a run's record."""
    return f"{method}, seed {seed}"


def train(
    settings: Settings, method: str, seed: int, data: tuple[Split, Split], store: Store,
    progress: Callable[[int], Any] = lambda steps: None,
) -> Record:  # fmt: skip
    """Train one run, going on from the store's record, and leave the finished record there.

    The state of a record holds, for E epochs, the curves ``test_error`` (E, 2), of view 0 and view 1 after each epoch,
    and ``loss`` (E,), the mean of the epoch's objective. An unfinished one has in addition what it takes to go on; a
    finished one ``train_accuracy`` (), on the training images with both halves and new weights w.

    Args:
        settings: of the experiment.
        method: a key of ``METHODS``.
        seed: of the run.
        data: training and test data, as :func:`mixfeat.experiments.datasets.load` gives them.
        store: where records are kept; a checkpoint is saved after every epoch.
        progress: called with the number of steps just done.

    Raises:
        ValueError: data that cannot be paired, such as a class without images.
        DivergedError: when the loss is no longer finite.
        StoreError: when the store cannot be written.
    """
    record = store.get(name_of(method, seed))
    if record is not None and record.finished:
        return record
    with _deterministic(settings.device):
        return _train(settings, method, seed, data, store, progress, record)


def _train(
    settings: Settings, method: str, seed: int, data: tuple[Split, Split], store: Store,
    progress: Callable[[int], Any], record: Record | None,
) -> Record:  # fmt: skip
    problem, model = make_problem(settings, data, seed), make_model(settings, seed, data[0].images)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
    steps = steps_of_epoch(settings, data)
    first, seconds = 0, 0.0
    curves = {
        "test_error": torch.zeros(settings.epochs, 2, dtype=torch.float64),
        "loss": torch.zeros(settings.epochs, dtype=torch.float64),
    }
    if record is not None:
        first, seconds = record.step // steps, record.seconds
        curves = {name: record.state[name] for name in curves}
        _restore(record.state, model, optimizer, problem.generator)
    started = time.monotonic()

    def reached(epochs: int, **more: Tensor) -> Record:
        spent = seconds + time.monotonic() - started
        return Record(epochs == settings.epochs, epochs * steps, spent, {**curves, **more})

    for epoch in range(first, settings.epochs):
        loss = _train_epoch(settings, method, problem, model, optimizer, progress)
        if not loss.isfinite():
            raise DivergedError(
                f"{name_of(method, seed)} left the finite numbers in epoch {epoch + 1}: "
                f"try a smaller lr than {settings.lr}"
            )
        curves["loss"][epoch] = loss
        curves["test_error"][epoch] = torch.stack([1 - _accuracy(model, test, settings) for test in problem.tests])
        if epoch + 1 < settings.epochs:
            store.save(name_of(method, seed), reached(epoch + 1, **_state(model, optimizer, problem.generator)))

    record = reached(settings.epochs, train_accuracy=_accuracy(model, problem.train, settings).cpu())
    store.save(name_of(method, seed), record)
    return record


def steps_of_epoch(settings: Settings, data: tuple[Split, Split]) -> int:
    """The batches of an epoch, the last one perhaps smaller."""
    return -(-len(data[0].target) // settings.batch_size)


def _train_epoch(
    settings: Settings, method: str, problem: Problem, model: nn.Module,
    optimizer: torch.optim.Optimizer, progress: Callable[[int], Any],
) -> Tensor:  # fmt: skip
    """The mean over the epoch's samples of the objective, still on the device: nothing waits for it before the end."""
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
        progress(1)
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
    """Everything that changes from epoch to epoch, on the CPU."""
    state = {f"model {name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"optimizer {name} {key}": value for key, value in optimizer.state[parameter].items()}
    return {name: value.cpu() for name, value in state.items()} | {"generator": generator.get_state()}


def _restore(
    state: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    """The inverse of :func:`_state`."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    model.load_state_dict(part("model "))
    groups = optimizer.state_dict()["param_groups"]
    moments = {i: part(f"optimizer {name} ") for i, (name, _) in enumerate(model.named_parameters())}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    generator.set_state(state["generator"])


def summarise(records: Mapping[int, Record]) -> dict[str, Any]:
    """A method's finished records, by seed, as numbers for a table or JSON: lists over seeds, the curves over epochs.

    Errors and accuracies are fractions; ``test_error_view_1`` is that of the second feature.
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
