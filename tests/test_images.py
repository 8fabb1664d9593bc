"""The image experiment: what it computes, held to a plain restatement of the formulas; stopped in every way."""

import json
import signal
import sys
from types import SimpleNamespace

import processes
import pytest
import torch
from torch import nn

import mixfeat as mf
from mixfeat import cli
from mixfeat.experiments import common, datasets, engine, images, plots
from mixfeat.experiments.datasets import Split

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"filters_per_class": 3, "epochs": 3, "batch_size": 16, "seeds": 2, "device": "cpu"}


def settings_of(**changes):
    return images.Settings(**{**SMALL, **changes})


def random_data(num=40, test=20, seed=0):
    """Images of the shape of digits: a noisy pattern for each class."""
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(10, 1, 8, 8, generator=generator)

    def split(n):
        target = torch.arange(n) % 10
        return Split((pattern[target] + 0.3 * torch.rand(n, 1, 8, 8, generator=generator)) / 2, target)

    return split(num), split(test)


@pytest.fixture(autouse=True)
def data(monkeypatch):
    """Random data in place of the data set; a test may replace ``data[0]``."""
    data = [random_data()]
    monkeypatch.setattr(images, "load", lambda dataset, folder: data[0])
    return data


def run(settings, method, seed=0):
    (run,) = (run for run in images.runs_of(settings, [method], None) if run.seed == seed)
    return images.join([run], engine.train([run]))[seed]


def assert_same(a, b):
    assert (a.finished, a.step) == (b.finished, b.step)
    assert a.state.keys() == b.state.keys()
    for name in a.state:
        assert torch.equal(a.state[name], b.state[name]), name


# settings


def test_settings_resolve_their_defaults():
    assert (settings_of(batch_size=None).patch_size, settings_of(batch_size=None).batch_size) == (8, 100)
    assert settings_of().lr == 0.003
    fashion = settings_of(dataset="fashion-mnist", batch_size=None)
    assert (fashion.patch_size, fashion.batch_size) == (7, 750)
    mnist1d = settings_of(dataset="mnist1d", model="resnet1d", batch_size=None)
    assert (mnist1d.patch_shape, mnist1d.batch_size, mnist1d.lr) == ((1, 8), 100, 0.001)
    assert settings_of().hash == settings_of(patch_size=8).hash != settings_of(patch_size=4).hash


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"dataset": "mnist"},
            ValueError,
            "dataset must be one of digits, mnist1d, fashion-mnist, cifar10, cifar100, got 'mnist'",
        ),
        ({"model": "vgg"}, ValueError, "model must be one of patch, resnet1d, resnet18, got 'vgg'"),
        ({"patch_size": 3}, ValueError, "patch_size must divide the images' height and width, got 3 for 8 x 8"),
        ({"patch_size": 3, "dataset": "mnist1d"}, ValueError, "got 3 for 1 x 40"),
        ({"model": "resnet1d"}, ValueError, r"resnet1d needs data of one row \(mnist1d\), got digits, 8 x 8"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"filters_per_class": 0}, ValueError, "filters_per_class must be at least 1, got 0"),
        ({"degree": 2.5}, TypeError, "degree must be an integer, got 2.5"),
        ({"rho": 0.0}, ValueError, "rho must be finite and positive, got 0.0"),
        ({"init_scale": 0}, ValueError, "init_scale must be positive, got 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"weight": (1, 0)}, ValueError, "weight must have low <= high"),
        ({"weight": (0, 2)}, ValueError, "weight must be within"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"seeds": 0}, ValueError, "seeds must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"device": "abacus"}, ValueError, "device must be a torch device of this machine, got 'abacus'"),
        ({"dtype": "int8"}, ValueError, "dtype must be float32 or float64, got 'int8'"),
    ],
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        settings_of(**changes)


# the problem and the objective


def test_runs_of_a_seed_share_their_problem():
    settings, data = settings_of(), random_data()
    one, same, other = (images.make_problem(settings, data, seed) for seed in (3, 3, 4))
    assert torch.equal(one.train.partner_class, same.train.partner_class)
    assert torch.equal(one.train.partner, same.train.partner)
    assert not torch.equal(one.train.partner, other.train.partner)
    for view, test in enumerate(one.tests):
        assert test.views == view
        assert torch.equal(test.partner_class, one.train.partner_class)
        assert torch.equal(test.images, data[1].images)
    assert torch.equal(one.tests[1].partner, same.tests[1].partner)
    weights = [next(images.make_model(settings, seed, data[0].images).parameters()) for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    patches = mf.data.images_to_patches(data[0].images, settings.patch_size)
    start = torch.einsum("npd,cmd->npcm", patches, weights[0][..., : patches.shape[2]])
    assert start.square().mean().sqrt().item() == pytest.approx(settings.init_scale * settings.rho, rel=0.3)


def restated(settings, data, method, seed):
    """The whole run, from its formulas: pairing, w, label, lam, mixing, loss, Adam, test. Only the draws are shared."""
    generator = common._generator("images", seed)
    (x, y), (test_x, test_y) = data
    x, test_x = x.double(), test_x.double()
    n = len(y)
    halves = torch.randperm(10, generator=generator).view(2, 5)
    mate = {int(a): int(b) for a, b in zip(*halves, strict=True)}
    mate |= {b: a for a, b in mate.items()}

    def paired(target, generator):
        """One image of the paired class for each, by a uniform number."""
        uniform = torch.rand(len(target), generator=generator, dtype=torch.float64)
        members = {c: [i for i in range(len(target)) if target[i] == c] for c in range(10)}
        pools = [members[mate[int(c)]] for c in target]
        return torch.tensor([pool[int(u * len(pool))] for u, pool in zip(uniform, pools, strict=True)])

    extra = paired(y, generator)

    def sample(index):
        low, high = settings.weight
        w = low + (high - low) * torch.rand(len(index), 1, 1, 1, generator=generator, dtype=torch.float64)
        return torch.cat([w * x[index], (1 - w) * x[extra[index]]], 1), y[index]

    weight = images.make_model(settings, seed, data[0].images).network.weight.detach().clone().requires_grad_()

    def logits(input):
        """One patch that is the whole image: filters of both halves' pixels."""
        t = (input.flatten(1) @ weight.flatten(0, 1).T).view(len(input), 10, -1) / settings.rho
        u = t.clamp(0, 1)
        return settings.rho * (u**settings.degree / settings.degree + (t - 1).clamp(min=0)).sum(-1)

    def cross_entropy(z, target):
        return -z.log_softmax(1)[torch.arange(len(z)), target].mean()

    first, second, steps = torch.zeros_like(weight), torch.zeros_like(weight), 0
    errors, losses = [], []
    for _ in range(settings.epochs):
        total = 0.0
        for index in torch.randperm(n, generator=generator).split(settings.batch_size):
            a, label = sample(index)
            if method == "erm":
                loss = cross_entropy(logits(a), label)
            else:
                b, other = sample(torch.randint(n, index.shape, generator=generator))
                lam = torch.rand((), generator=generator, dtype=torch.float64) if method == "uniform" else 0.5
                z = logits(lam * a + (1 - lam) * b)
                loss = lam * cross_entropy(z, label) + (1 - lam) * cross_entropy(z, other)
            (gradient,) = torch.autograd.grad(loss, weight)
            steps += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            step = (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
            weight = (weight - settings.lr * step).detach().requires_grad_()
            total += loss.item() * len(index) / n
        losses.append(total)
        test_extra = paired(test_y, common._generator("test images", seed))
        zero = torch.zeros_like(test_x)
        views = torch.cat([test_x, zero], 1), torch.cat([zero, test_x[test_extra]], 1)
        errors.append([(logits(view).argmax(1) != test_y).double().mean().item() for view in views])
    return losses, errors, weight


@pytest.mark.parametrize("weight", [(0, 1), (0.5, 0.75)])
@pytest.mark.parametrize("method", common.METHODS)
def test_a_run_is_its_formulas(method, weight):
    settings = settings_of(dtype="float64", degree=3, rho=0.3, lr=0.05, epochs=5, weight=weight, seeds=4)
    record = run(settings, method, seed=3)
    losses, errors, _ = restated(settings, random_data(), method, 3)
    assert losses[-1] < losses[0] - 0.05
    torch.testing.assert_close(record.state["loss"], torch.tensor(losses, dtype=torch.float64))
    torch.testing.assert_close(record.state["test_error"], torch.tensor(errors, dtype=torch.float64))


def test_patches_hold_both_halves():
    """With two patches a side, and against a filter in either half."""
    settings = settings_of(patch_size=4, degree=1, rho=1e-6, dtype="float64")
    model = images.make_model(settings, 0, random_data()[0].images)
    input = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    weight = model.network.weight.detach()
    expected = torch.zeros(2, 10, dtype=torch.float64)
    for i in (0, 4):
        for j in (0, 4):
            patch = input[:, :, i : i + 4, j : j + 4].flatten(1)
            expected += torch.einsum("nd,cmd->ncm", patch, weight).relu().sum(-1)
    torch.testing.assert_close(model(input), expected)


def test_patches_of_one_row():
    """Each a stretch of both halves."""
    settings = settings_of(dataset="mnist1d", patch_size=10, degree=1, rho=1e-6, dtype="float64")
    model = images.make_model(settings, 0, torch.ones(1, 1, 1, 40))
    input = torch.rand(2, 2, 1, 40, dtype=torch.float64)
    patches = input.view(2, 2, 4, 10).transpose(1, 2).flatten(2)  # (N, P, D)
    expected = torch.einsum("npd,cmd->npcm", patches, model.network.weight).relu().sum((1, 3))
    torch.testing.assert_close(model(input), expected)


def test_all_methods_learn_digits(data, tmp_path):
    pytest.importorskip("sklearn")
    settings = images.Settings(device="cpu", epochs=15)
    data[0] = datasets.load("digits", tmp_path)
    for method in common.METHODS:
        summary = images.summarise({0: run(settings, method)})
        assert summary["train_accuracy"][0] > 0.9
        assert summary["test_error_view_0"][0] < 0.15
        assert summary["test_error_view_1"][0] < 0.15


def test_midpoint_mixup_learns_more_of_a_weak_second_feature(data, tmp_path):
    """In seconds; the figures are those of ``mixfeat reproduce images --weight 0.75 1``."""
    pytest.importorskip("sklearn")
    settings = images.Settings(device="cpu", weight=(0.75, 1), epochs=30)
    data[0], errors = datasets.load("digits", tmp_path), {}
    for method in ("erm", "midpoint"):
        records = {seed: run(settings, method, seed) for seed in range(3)}
        errors[method] = sum(images.summarise(records)["test_error_view_1"]) / 3
    assert errors["midpoint"] < errors["erm"] - 0.01


def test_summary():
    settings = settings_of()
    records = {seed: run(settings, "erm", seed) for seed in (0, 1)}
    summary = images.summarise(records)
    for seed, record in records.items():
        assert record.state.keys() == {"test_error", "loss", "train_accuracy"}
        for view in (0, 1):
            assert summary[f"test_error_view_{view}"][seed] == record.state["test_error"][-1, view]
            curve = summary["curves"][f"test_error_view_{view}"]
            assert [point[seed] for point in curve] == record.state["test_error"][:, view].tolist()
        assert summary["train_accuracy"][seed] == record.state["train_accuracy"]
        assert summary["loss"][seed] == record.state["loss"][-1]
    assert summary["curves"]["epoch"] == [1, 2, 3]
    json.dumps(summary)


def test_figure_of_no_error(tmp_path):
    """Its axis is logarithmic."""
    curves = {"epoch": [1, 2], **{f"test_error_view_{view}": [[0.5, 0.0], [0.0, 0.0]] for view in (0, 1)}}
    plots.plot_images(settings_of(), {"erm": {"curves": curves}}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_divergence_is_found(monkeypatch):
    objective = images.objective
    monkeypatch.setattr(images, "objective", lambda *args: objective(*args) * torch.inf)
    message = r"erm, seed 0 left the finite numbers in epoch 1: try a smaller lr than 0.003"
    with pytest.raises(common.DivergedError, match=message):
        run(settings_of(), "erm")


def test_classes_that_cannot_be_paired(data):
    (x, y), test = data[0]
    data[0] = Split(x[y != 4], y[y != 4]), test
    with pytest.raises(ValueError, match="target must have images of every class, got none of class 4"):
        run(settings_of(), "erm")


def test_data_are_read_once_in_a_process(monkeypatch, tmp_path):
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(datasets, "load", lambda *args: calls.append(args) or random_data())
    images.load.cache_clear()
    assert images.load("digits", tmp_path) is images.load("digits", tmp_path)
    images.load.cache_clear()
    assert calls == [("digits", tmp_path)]


# other models


class StandIn(nn.Module):
    """What of torchvision's ResNet the experiment touches, and a batch norm, which has state that is not trained."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.maxpool = nn.MaxPool2d(3, stride=2)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, input):
        return self.fc(self.maxpool(self.bn1(self.conv1(input)).relu()).mean((2, 3)))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.models", SimpleNamespace(resnet18=StandIn))


@pytest.mark.usefixtures("stand_in")
def test_stem_for_small_images():
    settings = settings_of(model="resnet18", dataset="cifar10")
    before = torch.get_rng_state()
    model, same, other = (images.make_model(settings, seed, torch.zeros(1, 3, 32, 32)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert model.conv1.weight.shape == (4, 6, 3, 3)
    assert (model.conv1.stride, model.conv1.padding, model.conv1.bias) == ((1, 1), (1, 1), None)
    assert isinstance(model.maxpool, nn.Identity)
    assert model(torch.randn(5, 6, 32, 32)).shape == (5, 10)
    for a, b, c in zip(model.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) or a.unique().numel() == 1
    double = images.make_model(settings_of(model="resnet18", dtype="float64"), 0, torch.zeros(1, 3, 32, 32))
    assert next(double.parameters()).dtype == torch.float64


def test_resnet1d():
    settings = settings_of(dataset="mnist1d", model="resnet1d")
    before = torch.get_rng_state()
    model, same, other = (images.make_model(settings, seed, torch.zeros(1, 1, 1, 40)) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(model.fc.weight, same.fc.weight)
    assert not torch.equal(model.fc.weight, other.fc.weight)
    shapes = []
    model.body.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    input = torch.randn(3, 2, 1, 40)
    logits = model(input)
    assert (logits.shape, shapes) == ((3, 10), [(3, 64, 10)])
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    model.eval()
    assert not torch.allclose(model(input), model(input * torch.tensor([1.0, 0]).view(2, 1, 1)))  # both halves count


def test_resnet18():
    try:
        images._resnet18()
    except ValueError as error:
        pytest.skip(str(error))
    model = images.make_model(settings_of(model="resnet18", dataset="cifar100"), 0, torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == 11_173_962 + 3 * 64 * 9 + 90 * 513
    input = torch.randn(2, 6, 32, 32, requires_grad=True)
    shapes = []
    model.layer1.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    model(input).sum().backward()
    assert shapes == [(2, 64, 32, 32)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (None, "model resnet18 needs torchvision.*: pip install 'mixfeat.images.'"),
        (RuntimeError("operator torchvision::nms does not exist\nmore"), "fits torch .*::nms does not exist$"),
    ],
)
def test_torchvision_that_cannot_be_imported(broken, message, monkeypatch):
    for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    if broken is None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
    else:

        class Finder:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "torchvision":
                    raise broken

        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    with pytest.raises(ValueError, match=message):
        settings_of(model="resnet18")


# being stopped


@pytest.mark.parametrize("model", ["patch", "resnet1d", "resnet18"])
@pytest.mark.usefixtures("stand_in")
def test_chunks_change_no_number(model, monkeypatch, data):
    """Here a chunk is an epoch."""
    settings, steps = settings_of(model=model, epochs=4, dataset="mnist1d" if model == "resnet1d" else "digits"), []
    if model == "resnet1d":
        data[0] = tuple(Split(images.flatten(2)[:, :, None, :40], target) for images, target in data[0])
    whole = run(settings, "uniform", 1)
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0)
    (one,) = (run for run in images.runs_of(settings, ["uniform"], None) if run.seed == 1)
    records = engine.train([one], report=lambda run, before, after: steps.append(after.step))
    assert steps == [3, 6, 9, 12]
    assert_same(records[one.name], whole)


@pytest.mark.usefixtures("stand_in")
def test_checkpoint_holds_all_that_changes():
    settings, data = settings_of(model="resnet18"), random_data()
    kept = []
    for _ in range(2):
        problem, model = images.make_problem(settings, data, 0), images.make_model(settings, 0, data[0].images)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)
        if kept:
            images._restore(kept[0], model, optimizer, problem.generator)
        else:
            images._train_epoch(settings, "uniform", problem, model, optimizer)
        kept.append({name: value.clone() for name, value in images._state(model, optimizer, problem.generator).items()})
    names = {f"model {name}" for name in model.state_dict()} | {"generator"}
    names |= {f"optimizer {p} {key}" for p, _ in model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert kept[0].keys() == kept[1].keys() == names
    for name, value in kept[0].items():
        assert torch.equal(value, kept[1][name]), name


def test_killed_command_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    """SIGKILL in a real process, in the middle of the second run's second epoch."""
    pytest.importorskip("sklearn")
    code = """
import os, signal, sys, torch
from mixfeat import cli
from mixfeat.experiments import engine, images
torch.set_num_threads(1)
engine.CHUNK_SECONDS = 0
objective, calls = images.objective, []
def counted(*args):
    calls.append(args)
    if len(calls) == 3 * 8 + 8 + 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return objective(*args)
images.objective = counted
sys.exit(cli.main(command))
"""
    command = [
        "reproduce", "images", "--epochs=3", "--seeds=2", "--batch-size=200", "--device=cpu", "--jobs=1", "--methods",
        "uniform", "--out",
    ]  # fmt: skip
    out = str(tmp_path / "killed")
    (ended,) = processes.run(f"command = {[*command, out]}\n{code}")
    assert ended.status == -signal.SIGKILL, ended.stderr
    monkeypatch.undo()  # the child had the data set itself
    paths = tmp_path / "resumed.json", tmp_path / "unbroken.json"
    assert cli.main([*command, out, "--resume", "--json", str(paths[0])]) == 0
    assert cli.main([*command, str(tmp_path / "b"), "--json", str(paths[1])]) == 0
    resumed, unbroken = (json.loads(path.read_text())["results"]["uniform"] for path in paths)
    assert len(resumed.pop("seconds")) == len(unbroken.pop("seconds")) == 2
    assert resumed == unbroken


def test_fused_operators_are_what_computes(monkeypatch):
    called = []

    def watch(name):
        original = getattr(mf.functional, name)

        def watched(*args, **options):
            called.append(name)
            return original(*args, **options)

        for module in (mf, mf.functional):
            monkeypatch.setattr(module, name, watched)

    watch("patch_conv")
    watch("mixup_cross_entropy")
    settings = settings_of()
    problem, model = (
        images.make_problem(settings, random_data(), 0),
        images.make_model(settings, 0, random_data()[0].images),
    )
    images.objective(model, problem.train, torch.arange(5), "midpoint", problem.generator)
    assert called == ["patch_conv", "mixup_cross_entropy"]
