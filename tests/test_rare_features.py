"""Common and rare features: runs against a plain training loop; stopping, refusing, and what is learned."""

import json

import pytest
import torch
import torch.nn.functional as F

from mixfeat import cli
from mixfeat.experiments import engine, rare_features
from mixfeat.experiments.common import DivergedError
from mixfeat.experiments.rare_features import METHODS, Run, Settings

pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = {
    "num_samples": 12, "rare": 0.3, "patch_dim": 8, "filters_per_class": 2, "init_std": 0.3, "steps": 12,
    "mixup_steps": 5, "seeds": 2, "test_samples": 40, "evaluations": 3, "lr": 0.3, "device": "cpu",
}  # fmt: skip
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in FIXED.items()]


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command small, in the test's folder; gives (exit status, stdout, stderr)."""

    def run(*options):
        arguments = ["reproduce", "rare-features", *SMALL, "--jobs=1", "--out", str(tmp_path / "out")]
        try:
            status = cli.main([*arguments, *map(str, options)])
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize(("method", "label_lam"), [*((method, 0.6) for method in METHODS), ("early", 0.9)])
def test_a_run_is_gradient_descent_on_its_objective(method, label_lam):
    run = Run(Settings(**{**FIXED, "seeds": 1}, label_lam=label_lam, dtype="float64"), method)
    (record,) = engine.train([run]).values()
    data, tests, weight = run.draw()
    weight.requires_grad_()

    def logits(points):
        return torch.einsum("npd,cmd->npcm", points, weight).square().sum((1, 3))

    def error(points):
        return (logits(points.input).argmax(1) != points.target).double().mean().item()

    errors = []
    for step in range(13):
        if step % 4 == 0:
            errors.append([error(test) for test in tests])
        if step == 12:
            break
        if method == "mixup" or (method == "early" and step < 5):
            pairs = 0.6 * data.input[:, None] + 0.4 * data.input[None]
            g = logits(pairs.flatten(0, 1))
            first, second = data.target.repeat_interleave(12), data.target.repeat(12)
            loss = label_lam * F.cross_entropy(g, first) + (1 - label_lam) * F.cross_entropy(g, second)
        else:
            loss = F.cross_entropy(logits(data.input), data.target)
        (gradient,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.3 * gradient
    torch.testing.assert_close(record.state["weight"], weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(record.state["test_error"], torch.tensor(errors, dtype=torch.float64))
    assert record.state["train_accuracy"] == pytest.approx(1 - error(data))
    for c in range(2):
        for v in range(2):
            expected = max(abs(w @ data.features[c, v]) for w in weight[c].detach())
            torch.testing.assert_close(record.state["alignment"][c, v], expected)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_do_not_change_the_numbers(method):
    run = Run(Settings(**{**FIXED, "seeds": 1}), method)
    whole = engine.train([run])[run.name]
    record, chunks = None, 0
    while record is None or not record.finished:
        (record,) = Run.advance([run], [record], 0.0)
        chunks += 1
    assert chunks == 12
    assert all(torch.equal(record.state[name], value) for name, value in whole.state.items())


def test_the_command(run, tmp_path):
    status, out, err = run("--json", tmp_path / "a.json")
    assert status == 0, err
    assert (tmp_path / "out" / "rare-features.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "a.json").read_text())
    settings = Settings(**FIXED)
    for method in METHODS:
        runs = rare_features.runs_of(settings, [method])
        expected = rare_features.summarise(settings, rare_features.join(runs, engine.train(runs)))
        assert {**document["results"][method], "seconds": 0} == {**expected, "seconds": 0}
    assert "Mixup, then ERM" in out
    assert run("--resume", "--methods", "erm")[0] == 0
    assert run("--resume", "--lam", "0.7")[0] == 2


def test_a_run_that_diverges_is_named():
    settings = Settings(**{**FIXED, "lr": 1e30})
    runs = rare_features.runs_of(settings, ["erm"])
    with pytest.raises(DivergedError, match=r"erm left the finite numbers before step .*: try a smaller lr"):
        rare_features.join(runs, engine.train(runs))


def test_mixup_learns_the_rare_feature_and_erm_does_not():
    """At the default data, shorter: far apart for any seed."""
    settings = Settings(steps=700, mixup_steps=700, seeds=1, evaluations=1, test_samples=300, device="cpu")
    results = {}
    for method in ("erm", "mixup"):
        runs = rare_features.runs_of(settings, [method])
        results[method] = rare_features.summarise(settings, rare_features.join(runs, engine.train(runs)))
    assert results["erm"]["test_error_rare"][0] > 0.4
    assert results["mixup"]["test_error_rare"][0] < 0.3
    assert max(result["test_error_common"][0] for result in results.values()) < 0.05
    assert results["mixup"]["alignment_rare"][0] > 5 * results["erm"]["alignment_rare"][0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_patches": 1}, ValueError, "num_patches must be at least 2, got 1"),
        ({"patch_dim": 4}, ValueError, "patch_dim must be at least 5, got 4"),
        ({"rare": 1.5}, ValueError, r"rare must be in \[0, 1\], got 1.5"),
        ({"lam": -0.1}, ValueError, r"lam must be in \[0, 1\], got -0.1"),
        ({"mixup_steps": 1501}, ValueError, "mixup_steps must be at most steps = 1500, got 1501"),
        ({"steps": 20, "mixup_steps": 5}, ValueError, "steps must be at least evaluations = 30, got 20"),
        ({"noise_std": 0}, ValueError, "noise_std must be positive"),
        ({"feature_noise": -1}, ValueError, "feature_noise must be at least 0"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        Settings(**change)
