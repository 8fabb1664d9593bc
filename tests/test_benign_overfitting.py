"""The phase diagram of benign overfitting: its runs against a plain training loop; how it refuses and goes on."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from mixfeat import cli
from mixfeat.experiments import benign_overfitting, engine
from mixfeat.experiments.benign_overfitting import Run, Settings
from mixfeat.experiments.engine import Results

pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = {
    "filters_per_class": 2, "patch_dim": 20, "steps": 30, "seeds": 2, "test_samples": 40, "lr": 0.5, "init_std": 0.1,
    "device": "cpu",
}  # fmt: skip
SMALL = [f"--{name.replace('_', '-')}={value}" for name, value in FIXED.items()]
GRID = ["--num-samples", "4", "8", "--signal", "2", "5.5"]


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command small, in the test's folder; gives (exit status, stdout, stderr)."""

    def run(*options, grid=GRID):
        arguments = ["reproduce", "benign-overfitting", *grid, *SMALL, "--jobs=1", "--out", str(tmp_path / "out")]
        try:
            status = cli.main([*arguments, *map(str, options)])
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_a_run_is_gradient_descent_on_the_logistic_loss():
    settings = Settings(**FIXED, num_samples=(6,), signal=(3.0,), dtype="float64")
    run = Run(settings, 6, 3.0, 1)
    (record,) = engine.train([run]).values()
    data, test, weight = run.draw()
    assert torch.equal(test.features, data.features)
    weight.requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.5)

    def difference(points):  # F_+1 - F_-1
        outputs = F.relu(torch.einsum("npd,cmd->npcm", points.input, weight)).pow(3).sum(1).mean(-1)
        return outputs[:, 1] - outputs[:, 0]

    for _ in range(30):
        optimizer.zero_grad()
        loss = F.softplus(-(2 * data.target - 1) * difference(data)).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(record.state["weight"], weight.detach(), rtol=1e-9, atol=1e-12)
        wrong = ((difference(test) > 0).long() != test.target).double().mean()
        assert record.state["test_error"] == wrong
        loss = F.softplus(-(2 * data.target - 1) * difference(data)).mean()
        torch.testing.assert_close(record.state["train_loss"], loss, rtol=1e-9, atol=0)
        mu = data.features[1, 0]
        signal = torch.stack([weight[0] @ -mu, weight[1] @ mu]).max()
        noise = max((weight[y] @ xi[0]).max() for y, xi in zip(data.target, data.noise, strict=True))
    torch.testing.assert_close(record.state["signal_learning"], signal)
    torch.testing.assert_close(record.state["noise_memorization"], noise)


def test_the_command(run, tmp_path):
    status, out, err = run("--json", tmp_path / "a.json")
    assert status == 0, err
    assert (tmp_path / "out" / "benign-overfitting.png").read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "a.json").read_text())
    assert [(cell["num_samples"], cell["signal"]) for cell in document["cells"]] == [(4, 2), (4, 5.5), (8, 2), (8, 5.5)]
    settings = Settings(**FIXED, num_samples=(4, 8), signal=(2, 5.5))
    records = engine.train(benign_overfitting.runs_of(settings))
    for cell, expected in zip(document["cells"], benign_overfitting.summarise(settings, records), strict=True):
        assert {**cell, "seconds": 0} == {**expected, "seconds": 0}
        assert cell["n_snr_q"] == pytest.approx(cell["num_samples"] * (cell["signal"] / 20**0.5) ** 3)
    assert "test error in percent, mean over 2 seeds" in out
    assert "8 of 8: n 4, signal 5.5, seed 1: " in err


def test_the_grid_can_grow_and_goes_on(run, tmp_path, monkeypatch):
    assert run("--json", tmp_path / "a.json")[0] == 0
    status, _, err = run()
    assert status == 2
    assert "--resume" in err
    trained, advance = [], benign_overfitting._advance
    monkeypatch.setattr(
        benign_overfitting, "_advance", lambda runs, *rest: trained.append(runs[0].name) or advance(runs, *rest)
    )
    assert (
        run("--resume", "--json", tmp_path / "b.json", grid=["--num-samples", "8", "6", "--signal", "2", "5.5"])[0] == 0
    )
    assert set(trained) == {f"n-6-signal-{s}-seed-{seed}" for s in (2.0, 5.5) for seed in (0, 1)}
    first, second = (json.loads((tmp_path / f"{name}.json").read_text())["cells"] for name in "ab")
    assert second[2:] == first[2:]
    status, _, err = run("--resume", "--lr", "0.25")
    assert status == 2
    assert "lr" in err


def test_chunks_do_not_change_the_numbers():
    settings = Settings(**FIXED, num_samples=(6,), signal=(3.0,))
    whole = engine.train(benign_overfitting.runs_of(settings))
    for run in benign_overfitting.runs_of(settings):
        record, chunks = None, 0
        while record is None or not record.finished:
            (record,) = Run.advance([run], [record], 0.0)
            chunks += 1
        assert chunks == 30
        assert all(torch.equal(record.state[name], value) for name, value in whole[run.name].state.items())


def test_a_run_that_diverges_disturbs_no_other(tmp_path):
    settings = Settings(**{**FIXED, "lr": 1e30}, num_samples=(4,), signal=(5.0,))
    records = engine.train(benign_overfitting.runs_of(settings), Results(tmp_path / "runs", "test", {}))
    cells = benign_overfitting.summarise(settings, records)
    assert cells[0]["test_error"] == [None, None]
    assert benign_overfitting.boundary(settings, cells) == {4: None}
    assert math.isnan(benign_overfitting.mean_of([0.5, None]))


def test_the_boundary_is_interpolated():
    settings = Settings(**FIXED, num_samples=(4, 8), signal=(1.0, 2.0, 4.0))
    errors = {4: (0.5, 0.45, 0.05), 8: (0.5, 0.5, 0.26)}
    cells = [
        {"num_samples": n, "signal": s, "test_error": [e - 0.01, e + 0.01]}
        for n in (4, 8) for s, e in zip(settings.signal, errors[n], strict=True)
    ]  # fmt: skip
    assert benign_overfitting.boundary(settings, cells) == {4: pytest.approx(3.0), 8: None}


def test_signal_is_learned_above_the_boundary_and_noise_below():
    """Far on either side of it, where no seed is in doubt."""
    settings = Settings(
        num_samples=(20,), signal=(2.0, 14.0), patch_dim=200, steps=600, seeds=1, lr=0.3, test_samples=200, device="cpu"
    )
    low, high = benign_overfitting.summarise(settings, engine.train(benign_overfitting.runs_of(settings)))
    assert max(low["train_loss"] + high["train_loss"]) < 0.05
    assert low["test_error"][0] > 0.35
    assert high["test_error"][0] < 0.02
    assert low["noise_memorization"][0] > 5 * low["signal_learning"][0]
    assert high["signal_learning"][0] > high["noise_memorization"][0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"degree": 2}, ValueError, "degree must be at least 3, got 2"),
        ({"degree": 17}, ValueError, "degree must be"),
        ({"num_samples": ()}, ValueError, "num_samples must be at least one number"),
        ({"num_samples": (1,)}, ValueError, "num_samples must be at least 2, got 1"),
        ({"num_samples": (4, 4)}, ValueError, "num_samples must be different numbers, got 4, 4"),
        ({"signal": (1.0, -1.0)}, ValueError, "signal must be finite and positive, got -1.0"),
        ({"noise_std": 0.0}, ValueError, "noise_std must be positive"),
        ({"patch_dim": 1}, ValueError, "patch_dim must be at least 2"),
    ],
)
def test_bad_settings(change, error, message):
    with pytest.raises(error, match=message):
        Settings(**change)


def test_the_command_refuses_bad_settings(run):
    status, out, err = run("--degree", "2")
    assert (status, out) == (2, "")
    assert err == "mixfeat reproduce benign-overfitting: error: degree must be at least 3, got 2\n"
