"""The experiment: its numbers are held to plain PyTorch, and do not depend on how the work is divided."""

import pytest
import torch
import torch.nn.functional as F

import mixfeat as mf
from mixfeat.experiments import engine, theory
from mixfeat.experiments.common import DivergedError
from mixfeat.experiments.optimizers import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "num_classes": 3, "filters_per_class": 2, "num_patches": 4, "num_samples": 12, "steps": 600, "seeds": 2,
    "test_samples": 30, "evaluations": 6, "lr": 4.0, "device": "cpu",
}  # fmt: skip


def settings_of(**changes):
    return theory.Settings(**{**SMALL, **changes})


def assert_same(a, b):
    assert (a.finished, a.step) == (b.finished, b.step)
    assert a.state.keys() == b.state.keys()
    for name in a.state:
        assert torch.equal(a.state[name], b.state[name]), name


# settings


def test_settings_resolve_their_defaults():
    settings = theory.Settings(num_classes=20, num_samples=60, device="cpu")
    assert (settings.patch_dim, settings.rho) == (40, 0.05)
    assert settings == theory.Settings(num_classes=20, num_samples=60, device="cpu", patch_dim=40, rho=0.05)
    assert theory.Settings().device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_hash_is_stable_and_tells_settings_apart():
    assert settings_of().hash == settings_of(signal=[0.25, 0.5], rho=1 / 3).hash
    assert len({settings_of(seed=seed, lr=lr).hash for seed in range(3) for lr in (1, 2)}) == 6


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
        ({"filters_per_class": 0}, ValueError, "filters_per_class must be at least 1, got 0"),
        ({"num_patches": 1}, ValueError, "num_patches must be at least 2, got 1"),
        ({"patch_dim": 5}, ValueError, r"patch_dim must be at least 2 \* num_classes = 6, got 5"),
        ({"num_samples": 2}, ValueError, "num_samples must be at least num_classes = 3, got 2"),
        ({"test_samples": 2}, ValueError, "test_samples must be at least num_classes = 3, got 2"),
        ({"degree": 17}, ValueError, "degree must be .*16, got 17"),
        ({"degree": 2.5}, TypeError, "degree must be an integer, got 2.5"),
        ({"rho": 0.0}, ValueError, "rho must be finite and positive, got 0.0"),
        ({"signal": (1, 0)}, ValueError, "signal must have low <= high"),
        ({"noise": (0, float("nan"))}, ValueError, r"noise\[1\] must be finite, got nan"),
        ({"noise_scale": -1}, ValueError, "noise_scale must be at least 0, got -1"),
        ({"init_scale": 0}, ValueError, "init_scale must be positive, got 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"lr": -1.0}, ValueError, "lr must be positive, got -1"),
        ({"lr": 1e40}, ValueError, r"lr must be at most 1e30, which float32 can hold, got 1e\+40"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 5}, ValueError, "steps must be at least evaluations = 6, got 5"),
        ({"seeds": 0}, ValueError, "seeds must be at least 1, got 0"),
        ({"nodes": 0}, ValueError, "nodes must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"data": "mnist"}, ValueError, "data must be one of multi_view, common_rare, signal_noise, got 'mnist'"),
        ({"data": "common_rare"}, ValueError, "num_classes must be 2 where data is common_rare, got 3"),
        ({"data": "signal_noise", "num_classes": 2, "patch_dim": 4}, ValueError, "patch_dim must be at least 5, got 4"),
        (
            {"data": "signal_noise", "num_classes": 2, "signal": (0, 0)},
            ValueError,
            "signal must end above 0 where data is signal_noise, got",
        ),
        ({"positions": "first"}, ValueError, "positions must be one of random, fixed, got 'first'"),
        ({"optimizer": "lion"}, ValueError, "optimizer must be one of gd, momentum, sgd, adam, sign, got 'lion'"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be at least 0, got -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"optimizer": "sgd", "batch_size": 13}, ValueError, "batch_size must be at most num_samples = 12, got 13"),
        ({"device": "abacus"}, ValueError, "device must be a torch device of this machine, got 'abacus'"),
        ({"dtype": "int8"}, ValueError, "dtype must be float32 or float64, got 'int8'"),
    ],
)
def test_bad_settings(changes, error, message):
    with pytest.raises(error, match=message):
        settings_of(**changes)


# training


def test_a_seed_does_not_depend_on_the_others():
    two, three = theory.make_problem(settings_of()), theory.make_problem(settings_of(seeds=3))
    later = theory.make_problem(settings_of(seed=1, seeds=1))
    assert torch.equal(two.weight, three.weight[:2])
    assert torch.equal(two.weight[1], later.weight[0])
    for a, b in zip((two.data, *two.tests), (three.data, *three.tests), strict=True):
        assert all(torch.equal(x, y[:2]) for x, y in zip(a, b, strict=True))
    assert not torch.equal(two.data.input[0], two.data.input[1])


def all_pairs(settings, data, weight, lam):
    """(R,) the loss of all ordered pairs, pair by pair and in plain PyTorch."""
    activation = mf.PolyReLU(settings.degree, settings.rho)
    target = F.one_hot(data.target, settings.num_classes).double()
    loss = torch.zeros(settings.seeds, dtype=torch.float64)
    for j in range(settings.num_samples):
        mixed = lam * data.input + (1 - lam) * data.input[:, j : j + 1]
        logits = activation(torch.einsum("rnpd,rcmd->rnpcm", mixed, weight)).sum((2, 4))
        wanted = lam * target + (1 - lam) * target[:, j : j + 1]
        loss = loss - (wanted * logits.log_softmax(-1)).sum(-1).mean(-1) / settings.num_samples
    return loss


def loss_of(settings, method, data, weight):
    if method == "uniform":
        nodes = zip(*mf.beta_quadrature(1, settings.nodes), strict=True)
        return sum(share * all_pairs(settings, data, weight, lam) for lam, share in nodes)
    return all_pairs(settings, data, weight, {"erm": 1.0, "midpoint": 0.5}[method])


@pytest.mark.parametrize("method", theory.METHODS)
def test_steps_descend_on_the_methods_objective(method):
    settings = settings_of(steps=4, evaluations=2, init_scale=2.0, lr=8.0, dtype="float64")
    state = theory.train(settings, method).state
    problem = theory.make_problem(settings)
    weight = problem.weight
    for _ in range(4):
        weight.requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(settings, method, problem.data, weight).sum(), weight)
        weight = (weight - settings.lr * gradient).detach()
    moved = (weight - problem.weight).norm()
    assert moved > 0.01 * problem.weight.norm()
    assert (state["weight"] - weight).norm() <= 1e-9 * moved
    torch.testing.assert_close(state["loss"], loss_of(settings, method, problem.data, state["weight"]))


def make_optimizer(settings, weight):
    """Return PyTorch's own optimizer of that name; sign descent, which it has not, is SGD on the sign."""
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adam":
        return torch.optim.Adam([weight], **options)
    momentum = settings.momentum if settings.optimizer == "momentum" else 0.0
    return torch.optim.SGD([weight], momentum=momentum, **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_are_those_of_pytorch(optimizer):
    """With the decay of weights, each on its own scale of lr; SGD's minibatch is all samples here."""
    settings = settings_of(
        steps=4, evaluations=2, init_scale=2.0, lr={"adam": 0.01, "sign": 0.01}.get(optimizer, 8.0), dtype="float64",
        optimizer=optimizer, weight_decay=0.01, momentum=0.5, batch_size=12,
    )  # fmt: skip
    state = theory.train(settings, "midpoint").state
    problem = theory.make_problem(settings)
    weight = problem.weight.clone().requires_grad_()
    reference = make_optimizer(settings, weight)
    for _ in range(4):
        (weight.grad,) = torch.autograd.grad(loss_of(settings, "midpoint", problem.data, weight).sum(), weight)
        if optimizer == "sign":
            weight.grad = (weight.grad + settings.weight_decay * weight.detach()).sign()
            weight.grad -= settings.weight_decay * weight.detach()  # which SGD adds again
        reference.step()
    moved = (weight - problem.weight).norm()
    assert moved > 0.01 * problem.weight.norm()
    assert (state["weight"] - weight).norm() <= 1e-9 * moved
    assert not {"velocity", "mean", "square"} & state.keys()


@pytest.mark.parametrize("method", ["erm", "midpoint", "uniform"])
def test_sgd_mixes_a_minibatch_with_all_samples(method):
    """In the mean over all minibatches the step is that of gradient descent."""
    settings = settings_of(optimizer="sgd", batch_size=4, dtype="float64", init_scale=2.0)
    problem = theory.make_problem(settings)
    batches = torch.randperm(settings.num_samples).view(3, 1, 4).expand(3, settings.seeds, 4)
    losses = [theory._loss_of_batch(settings, method, problem.data, batch, problem.weight) for batch in batches]
    torch.testing.assert_close(sum(losses) / 3, loss_of(settings, method, problem.data, problem.weight))


@pytest.mark.parametrize("data", theory.DATA)
@pytest.mark.parametrize("positions", ["random", "fixed"])
def test_test_points_carry_one_feature(data, positions):
    settings = settings_of(
        data=data, positions=positions, num_classes=3 if data == "multi_view" else 2, noise_scale=0.0
    )
    problem = theory.make_problem(settings)
    assert problem.data.features.shape == (2, settings.num_classes, 2, settings.patch_dim)
    for view, points in enumerate(problem.tests):
        for run in range(2):
            products = points.input[run] @ problem.data.features[run][points.target[run]].mT  # (N,P,2)
            of_view, of_other = products.sum(1)[:, view], products.sum(1)[:, 1 - view]
            assert (of_view > 0.1).all()
            assert ((of_other.abs() if data == "multi_view" else of_other) < 0.05).all()  # feature noise of common_rare
    first = problem.data.input[0].norm(dim=-1)[:, 0]
    assert bool((first > 0.2).all()) == (positions == "fixed")


def test_nodes_suffice():
    """The default number of them, on a trained network."""
    settings = settings_of(dtype="float64")
    weight = theory.train(settings, "uniform").state["weight"]
    data = theory.make_problem(settings).data
    few, many = (theory.objective(settings_of(nodes=n), "uniform", data)(weight) for n in (settings.nodes, 64))
    torch.testing.assert_close(few, many, rtol=1e-3, atol=0)


def test_curves_and_summary():
    settings = settings_of()
    record = theory.train(settings, "erm")
    problem = theory.make_problem(settings)
    state = record.state
    assert theory.evaluation_steps(settings) == [0, 100, 200, 300, 400, 500, 600]
    assert state["alignment"].shape == (7, 2, 3, 2)
    for i, weight in ((0, problem.weight), (-1, state["weight"])):
        expected = mf.features.alignment(weight, problem.data.features).double()
        torch.testing.assert_close(state["alignment"][i], expected)
    summary = theory.summarise(settings, record)
    counts = [summary[f"classes_with_{name}"] for name in ("both", "one", "none")]
    assert [sum(seed) for seed in zip(*counts, strict=True)] == [3, 3]
    assert summary["curves"]["step"][-1] == 600
    small, large = state["alignment"][-1].min(-1).values, state["alignment"][-1].max(-1).values
    expected = (small.clamp(min=0) / large).mean(-1)
    torch.testing.assert_close(torch.tensor(summary["alignment_ratio"], dtype=torch.float64), expected)
    assert summary["train_accuracy"] == state["train_accuracy"][-1].tolist()


def test_erm_leaves_features_that_midpoint_mixup_learns():
    """The separation itself, in seconds; its full size is that of ``mixfeat reproduce theory``."""
    settings = theory.Settings(seeds=4, steps=1000, evaluations=1, device="cpu")
    both = {}
    for method in ("erm", "midpoint"):
        both[method] = theory.summarise(settings, theory.train(settings, method))["classes_with_both"]
    assert sum(both["midpoint"]) > sum(both["erm"])


def test_a_seed_repeats_exactly():
    first = theory.train(settings_of(seed=5), "uniform")
    assert_same(first, theory.train(settings_of(seed=5), "uniform"))
    assert not torch.equal(first.state["weight"], theory.train(settings_of(seed=9), "uniform").state["weight"])


def test_divergence_is_found_and_disturbs_no_other_seed(monkeypatch):
    settings, draw = settings_of(seeds=3), theory._draw
    alone = theory.train(settings_of(), "erm")

    def poisoned(settings):
        data, tests, weight = draw(settings)
        if settings.seed == 2:
            weight[0, 0, 0] = torch.nan
        return data, tests, weight

    monkeypatch.setattr(theory, "_draw", poisoned)
    with pytest.raises(DivergedError, match=r"erm left the finite numbers before step 0: try a smaller lr than 4.0"):
        theory.train(settings, "erm")
    for together in (False, True):
        monkeypatch.setattr(theory.Run, "group", "one" if together else None)
        runs = theory.runs_of(settings, ["erm"])
        records = engine.train(runs)
        assert [records[run.name].diverged for run in runs] == [False, False, True]
        assert_same(theory.join(runs[:2], records), alone)


# division of the work


@pytest.mark.parametrize("method", theory.METHODS)
def test_chunks_and_batches_change_no_number(method, monkeypatch):
    """Chunks of one step, seeds alone and together, on the backend that serves by default."""
    settings = settings_of(steps=13, evaluations=4, init_scale=2.0)
    whole = theory.train(settings, method)
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0)
    for group in (None, "together"):
        monkeypatch.setattr(theory.Run, "group", group)
        assert_same(theory.train(settings, method), whole)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_chunks_change_no_number_of_any_optimizer(optimizer, monkeypatch):
    """A record holds all that a step needs: cut after every step, and with another seed in the call."""
    options = {"lr": 0.01} if optimizer in ("adam", "sign") else {}
    settings = settings_of(steps=7, evaluations=2, init_scale=2.0, optimizer=optimizer, batch_size=5, **options)
    whole = theory.train(settings, "midpoint")
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0)
    for group in (None, "together"):
        monkeypatch.setattr(theory.Run, "group", group)
        assert_same(theory.train(settings, "midpoint"), whole)


def test_runs_share_a_call_on_a_gpu_only(monkeypatch):
    """Seeds and initial scales do; methods and degrees do not."""
    monkeypatch.setattr(theory.Settings, "_check_device", lambda settings: None)
    groups = lambda **changes: [run.group for run in theory.runs_of(settings_of(**changes))]  # noqa: E731
    assert groups() == [None] * 6
    on_gpu = groups(device="cuda")
    assert len(set(on_gpu)) == 3
    assert on_gpu == groups(device="cuda", init_scale=3.0)
    assert not set(on_gpu) & set(groups(device="cuda", degree=4))


def test_longest_runs_come_first():
    methods = [run.method for run in theory.runs_of(settings_of(), ["erm", "midpoint", "uniform"])]
    assert methods == ["uniform"] * 2 + ["midpoint"] * 2 + ["erm"] * 2
