"""The experiment: what it computes, held to plain PyTorch; and its store, killed and damaged in every way."""

import signal
import sqlite3
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import mixfeat as mf
from mixfeat.experiments import theory
from mixfeat.experiments.store import Record, Store, StoreError

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "num_classes": 3, "filters_per_class": 2, "num_patches": 4, "num_samples": 12, "steps": 600, "seeds": 2,
    "test_samples": 30, "evaluations": 6, "lr": 4.0, "device": "cpu",
}  # fmt: skip


def settings_of(**changes):
    return theory.Settings(**{**SMALL, **changes})


def run(path, settings, method, **options):
    with Store(path, "theory", theory.identity(settings), **options) as store:
        return theory.train(settings, method, store)


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
def test_steps_descend_on_the_methods_objective(method, tmp_path):
    settings = settings_of(steps=4, evaluations=2, init_scale=2.0, lr=8.0, dtype="float64")
    state = run(tmp_path / "s", settings, method).state
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


def test_nodes_suffice(tmp_path):
    """The default number of them, on a trained network."""
    settings = settings_of(dtype="float64")
    weight = run(tmp_path / "s", settings, "uniform").state["weight"]
    data = theory.make_problem(settings).data
    few, many = (theory.objective(settings_of(nodes=n), "uniform", data)(weight) for n in (settings.nodes, 64))
    torch.testing.assert_close(few, many, rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("method", theory.METHODS)
def test_captured_step_is_the_step(method):
    settings = settings_of(device="cuda")
    problem = theory.make_problem(settings)
    loss = theory.objective(settings, method, problem.data)
    weights = [problem.weight.clone().requires_grad_() for _ in range(2)]

    def descend(weight):
        (gradient,) = torch.autograd.grad(loss(weight).sum(), weight)
        weight.detach().sub_(gradient, alpha=settings.lr)

    with theory._deterministic("cuda"):
        captured = theory._captured(lambda: descend(weights[1]), problem.weight.device)
        weights[1].detach().copy_(problem.weight)
        for _ in range(10):
            descend(weights[0])
            captured()
    assert not torch.equal(weights[0], problem.weight)
    assert torch.equal(*weights)


def test_curves_and_summary(tmp_path):
    settings = settings_of()
    record = run(tmp_path / "s", settings, "erm")
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


def test_erm_leaves_features_that_midpoint_mixup_learns(tmp_path):
    """The separation itself, in seconds; its full size is that of ``mixfeat reproduce theory``."""
    settings = theory.Settings(seeds=4, steps=1000, evaluations=1, device="cpu")
    both = {}
    for method in ("erm", "midpoint"):
        both[method] = theory.summarise(settings, run(tmp_path / method, settings, method))["classes_with_both"]
    assert sum(both["midpoint"]) > sum(both["erm"])


def test_a_seed_repeats_exactly(tmp_path):
    first = run(tmp_path / "a", settings_of(seed=5), "uniform")
    assert_same(first, run(tmp_path / "b", settings_of(seed=5), "uniform"))
    assert not torch.equal(first.state["weight"], run(tmp_path / "c", settings_of(seed=9), "uniform").state["weight"])


def test_divergence_is_found(tmp_path, monkeypatch):
    problem = theory.make_problem(settings_of())
    problem.weight[1, 0, 0, 0] = torch.nan
    monkeypatch.setattr(theory, "make_problem", lambda settings: problem)
    with pytest.raises(
        theory.DivergedError, match=r"erm left the finite numbers before step 0: try a smaller lr than 4.0"
    ):
        run(tmp_path / "s", settings_of(), "erm")


# being stopped


def in_child(code):
    """Run code that is to kill its own process."""
    setup = """
import os, signal
from pathlib import Path
import torch
from mixfeat.experiments import store, theory
torch.set_num_threads(1)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
theory._CHECKPOINT_SECONDS = 0
"""
    process = subprocess.run([sys.executable, "-c", setup + code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_killed_run_goes_on_to_the_same_numbers(tmp_path):
    settings, path = settings_of(), tmp_path / "killed"
    in_child(f"""
settings = theory.Settings(**{SMALL})
with store.Store(Path({str(path)!r}), "theory", theory.identity(settings)) as opened:
    for method in theory.METHODS:
        saves = []
        if method == "midpoint":  # SQLite calls this before it runs a statement
            opened._db.set_trace_callback(lambda statement: saves.append(statement) or len(saves) < 4 or die())
        theory.train(settings, method, opened)
""")
    with Store(path, "theory", theory.identity(settings), resume=True) as store:
        assert store.get("erm").finished
        assert not store.get("midpoint").finished
        assert 0 < store.get("midpoint").step < settings.steps
        resumed = {method: theory.train(settings, method, store) for method in theory.METHODS}
    for method, record in resumed.items():
        assert_same(record, run(tmp_path / method, settings, method))


@pytest.mark.parametrize("method", theory.METHODS)
def test_interrupted_run_goes_on_to_the_same_numbers(method, tmp_path, monkeypatch):
    """At every checkpoint that there is: each attempt is stopped after one more of them."""
    monkeypatch.setattr(theory, "_CHECKPOINT_SECONDS", 0)
    settings = settings_of(steps=12)

    class Interrupted(Store):
        def save(self, name, record):
            super().save(name, record)
            if not record.finished:
                raise KeyboardInterrupt

    steps = []
    while True:
        with Interrupted(tmp_path / "s", "theory", theory.identity(settings), resume=True) as store:
            try:
                record = theory.train(settings, method, store)
                break
            except KeyboardInterrupt:
                steps.append(store.get(method).step)
    assert steps == list(range(1, 13))
    assert_same(record, run(tmp_path / "unbroken", settings, method))


@pytest.mark.parametrize(("change", "listed"), [("backend", "backend cpu there"), ("torch", "torch 2.0 there")])
def test_run_is_not_resumed_by_other_software(change, listed, tmp_path, monkeypatch):
    settings = settings_of(steps=6)
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0")
    run(tmp_path / "s", settings, "erm")
    monkeypatch.undo()
    other = mf.backend("reference") if change == "backend" else nullcontext()
    with other, pytest.raises(StoreError, match=f"holds a run with other settings \\({listed} and .* asked"):
        run(tmp_path / "s", settings, "erm", resume=True)


# the store


def record_of(step):
    return Record(False, step, 1.5, {"weight": torch.full((3,), float(step)), "learned": torch.tensor([True])})


def test_store_keeps_records(tmp_path):
    path = tmp_path / "store"
    with Store(path, "theory", {"lr": 1}) as store:
        assert store.get("erm") is None
        store.save("erm", record_of(1))
        store.save("erm", record_of(2))
        store.save("midpoint", record_of(3))
    with Store(path, "theory", {"lr": 1}, resume=True) as store:
        assert_same(store.get("erm"), record_of(2))
        assert_same(store.get("midpoint"), record_of(3))
        assert store.get("erm").seconds == 1.5


def test_store_survives_a_kill_inside_a_transaction(tmp_path):
    path = tmp_path / "store"
    in_child(f"""
opened = store.Store(Path({str(path)!r}), "theory", {{}})
opened.save("erm", store.Record(False, 1, 0.0, {{"weight": torch.ones(3)}}))
opened._db.execute("PRAGMA cache_size = 1")  # so that the transaction reaches the file before it ends
opened._db.execute("BEGIN")
opened.save("erm", store.Record(False, 2, 0.0, {{"weight": torch.ones(100_000)}}))
die()
""")
    assert path.with_name("store-journal").stat().st_size
    with Store(path, "theory", {}, resume=True) as store:
        assert store.get("erm").step == 1
        assert torch.equal(store.get("erm").state["weight"], torch.ones(3))


def test_store_of_a_run_that_was_killed_before_it_saved_anything_is_new(tmp_path):
    Store(tmp_path / "store", "theory", {"lr": 1}).close()
    with Store(tmp_path / "store", "theory", {"lr": 2}) as store:
        store.save("erm", record_of(1))
    with Store(tmp_path / "store", "theory", {"lr": 2}, resume=True) as store:
        assert store.get("erm").step == 1


def test_store_refuses_what_it_would_overwrite_or_mix(tmp_path):
    path = tmp_path / "store"
    with Store(path, "theory", {"lr": 1.0, "steps": 5, "signal": [1, 2]}) as store:
        store.save("erm", record_of(1))
    before = path.read_bytes()
    with pytest.raises(StoreError, match="already holds results: go on with --resume, or choose another folder"):
        Store(path, "theory", {"lr": 1.0, "steps": 5, "signal": [1, 2]})
    for resume in (False, True):
        with pytest.raises(
            StoreError, match=r"other settings \(lr 1.0 there and 2.0 asked, steps 5 there and 6 asked\)"
        ):
            Store(path, "theory", {"lr": 2.0, "steps": 6, "signal": [1, 2]}, resume=resume)
    with pytest.raises(StoreError, match="belongs to the experiment 'theory', not 'images'"):
        Store(path, "images", {}, resume=True)
    assert path.read_bytes() == before


def test_store_is_locked_while_open(tmp_path):
    path = tmp_path / "store"
    code = f"""
from pathlib import Path
from mixfeat.experiments.store import Store, StoreError
try:
    Store(Path({str(path)!r}), "theory", {{}}, resume=True)
except StoreError as error:
    print(error)
"""
    with Store(path, "theory", {}) as store:
        for _ in range(2):
            store.save("erm", record_of(1))
            process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
            assert "is in use by another process: wait for it, or choose another folder" in process.stdout, (
                process.stderr
            )
    with Store(path, "theory", {}, resume=True) as store:
        assert store.get("erm").step == 1


def test_store_refuses_foreign_and_damaged_files(tmp_path):
    good = tmp_path / "good"
    with Store(good, "theory", {}) as store:
        store.save("erm", Record(False, 1, 0.0, {"weight": torch.randn(10_000)}))
    content = good.read_bytes()
    database = tmp_path / "other"
    with sqlite3.connect(database) as other:
        other.execute("CREATE TABLE record (name)")
    other.close()
    middle = len(content) // 2
    files = {
        "text": (b"my notes\n" * 100, "is not a mixfeat store: move it away, or choose another folder"),
        "short": (b"x", "is not a mixfeat store"),
        "database": (database.read_bytes(), "is not a mixfeat store"),
        "version": (content[:60] + b"\0\0\0\3" + content[64:], "is of store version 3, this mixfeat needs 2"),
        "cut": (content[:middle], "is damaged"),
        "header": (content[:100], "is damaged"),
        "flipped": (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], "has a wrong checksum"),
        "zeroed": (content[:4096] + bytes(4096) + content[8192:], "is damaged"),
    }
    for name, (damaged, message) in files.items():
        path = tmp_path / name
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=message):
            Store(path, "theory", {}, resume=True)
        assert path.read_bytes() == damaged, name
    with pytest.raises(StoreError, match="cannot be read: Is a directory"):
        Store(tmp_path, "theory", {})
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "missing" / "store", "theory", {})
    (tmp_path / "empty").touch()
    Store(tmp_path / "empty", "theory", {}).close()
