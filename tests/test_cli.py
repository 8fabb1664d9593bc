"""The command line: what it prints and writes, how it refuses, how it is stopped and goes on."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields

import processes
import pytest
import torch
from conftest import ROOT

import mixfeat as mf
from mixfeat import cli
from mixfeat.experiments import datasets, engine, images, theory
from mixfeat.kernels import cuda

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "--num-classes=3", "--filters-per-class=2", "--num-patches=4", "--num-samples=12", "--steps=300", "--seeds=2",
    "--test-samples=30", "--evaluations=5", "--lr=4", "--device=cpu", "--jobs=1",
]  # fmt: skip


@pytest.fixture
def reproduce(tmp_path, capsys):
    """Run ``reproduce theory`` small, in the test's folder; gives (exit status, stdout, stderr)."""

    def run(*options, out=tmp_path / "out", small=SMALL):
        try:
            status = cli.main(["reproduce", "theory", *small, "--out", str(out), *map(str, options)])
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return run


def assert_refused(result, message, command="reproduce theory"):
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith(f"mixfeat {command}: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_reproduce_theory(reproduce, tmp_path):
    target = tmp_path / "deep" / "result.json"
    status, out, err = reproduce("--json", target, "--seed", 4)
    assert status == 0, err
    lines = out.splitlines()
    columns = ("train accuracy", "both features", "one", "none", "alignment ratio", "loss")
    assert all(column in lines[2] for column in columns)
    for name in theory.METHODS.values():
        assert sum(line.startswith(name) and line.count(" ± ") == 6 for line in lines) == 1
        assert f" of 6: {name}, seed 5: " in err
    assert "mean ± standard deviation over 2 seeds" in out
    assert str(tmp_path / "out" / "theory.png") in out
    assert (tmp_path / "out" / "theory.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["runs", "theory.png"]

    document = json.loads(target.read_text())
    settings = document["settings"]
    assert settings["num_classes"] == 3
    assert settings["rho"] == pytest.approx(1 / 3)
    assert theory.Settings(**settings).hash == document["settings_hash"]
    assert document["environment"]["torch"] == torch.__version__
    assert list(document["results"]) == list(theory.METHODS)
    for result in document["results"].values():
        assert len(result["curves"]["step"]) == len(result["curves"]["larger"]) == 6
        for key in ("train_accuracy", "classes_with_both", "classes_with_one", "classes_with_none", "loss"):
            assert len(result[key]) == 2

    again, other = tmp_path / "again.json", tmp_path / "other.json"
    assert reproduce("--json", again, "--seed", 4, out=tmp_path / "again")[0] == 0
    assert reproduce("--json", other, "--seed", 6, out=tmp_path / "other")[0] == 0
    numbers = [json.loads(path.read_text())["results"] for path in (target, again, other)]
    for results in numbers:
        for result in results.values():
            del result["seconds"]
    assert numbers[0] == numbers[1] != numbers[2]

    runs = tmp_path / "out" / "runs"
    before = {path: path.read_bytes() for path in runs.iterdir()}
    assert_refused(reproduce("--seed", 4), f"{runs} already has results: pass --resume to continue, or choose another")
    assert_refused(reproduce("--seed", 5, "--resume"), "has results with other settings (seed 4 there and 5 asked)")
    assert {path: path.read_bytes() for path in runs.iterdir()} == before
    status, repeated, _ = reproduce("--seed", 4, "--resume")
    assert (status, repeated) == (0, out)


def test_one_seed_has_no_spread(reproduce):
    status, out, _ = reproduce("--methods", "erm", "--seeds", 1)
    assert status == 0
    assert "one seed" in out
    assert "±" not in out
    assert "Midpoint" not in out


def test_methods_can_follow_one_another(reproduce):
    assert reproduce("--methods", "midpoint")[0] == 0
    status, out, err = reproduce("--methods", "midpoint", "erm", "--resume")
    assert status == 0, err
    assert out.index("ERM") < out.index("Midpoint Mixup")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "nan"], "lr must be finite, got nan"),
        (["--rho", "0"], "rho must be finite and positive, got 0.0"),
        (["--degree", "-2"], "degree must be at least 1, got -2"),
        (["--num-classes", "1"], "num_classes must be at least 2, got 1"),
        (["--patch-dim", "5"], "patch_dim must be at least 2 * num_classes = 6, got 5"),
        (["--signal", "1", "0"], "signal must have low <= high, got (1.0, 0.0)"),
        (["--signal", "1"], "argument --signal: expected 2 arguments"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--methods", "magic"], "argument --methods: invalid choice: 'magic'"),
        (["--device", "abacus"], "device must be a torch device of this machine, got 'abacus'"),
        (["--device", "meta"], "device must be a torch device of this machine, got 'meta'"),
        (["--dtype", "int8"], "dtype must be float32 or float64, got 'int8'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--jobs", "all"], "argument --jobs: invalid int value: 'all'"),
    ],
)
def test_bad_settings(reproduce, options, message, tmp_path):
    assert_refused(reproduce(*options), message)
    assert not (tmp_path / "out").exists()


def test_unwritable_targets_are_found_before_training(reproduce, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    assert_refused(reproduce(out=tmp_path / "file"), "file cannot be written: File exists")
    assert_refused(reproduce(out=tmp_path / "file" / "out"), "out cannot be written: Not a directory")
    assert_refused(reproduce("--json", tmp_path), f"--json {tmp_path} cannot be written: it is a folder")
    assert_refused(reproduce("--json", tmp_path / "file" / "x.json"), "file cannot be written: File exists")
    if os.getuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert_refused(reproduce(out=tmp_path / "closed"), "closed cannot be written: Permission denied")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "runs").write_text("my notes")
    assert_refused(reproduce(out=tmp_path / "foreign"), "runs cannot be used: File exists")
    assert (tmp_path / "foreign" / "runs").read_text() == "my notes"


@pytest.mark.parametrize("package", ["matplotlib", "tqdm", "joblib"])
def test_missing_extras_are_found_before_training(reproduce, package, monkeypatch):
    monkeypatch.setattr(engine, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.delitem(sys.modules, "mixfeat.experiments.plots", raising=False)
    monkeypatch.delattr("mixfeat.experiments.plots", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert_refused(reproduce(), f"{package} is missing: pip install 'mixfeat[experiments]'")


def test_missing_dask_is_found_before_training(reproduce, monkeypatch):
    monkeypatch.setattr(engine, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert_refused(reproduce("--scheduler", "tcp://x:1"), "distributed is missing: pip install 'mixfeat[cluster]'")


def test_divergence_is_one_line(reproduce, monkeypatch):
    draw = theory._draw

    def poisoned(settings):
        data, tests, weight = draw(settings)
        return data, tests, weight * torch.nan

    monkeypatch.setattr(theory, "_draw", poisoned)
    status, out, err = reproduce("--methods", "erm")
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "1 of 2: ERM, seed 0: diverged", "2 of 2: ERM, seed 1: diverged",
        "mixfeat reproduce theory: error: erm left the finite numbers before step 0: try a smaller lr than 4.0",
    ]  # fmt: skip


def test_a_run_whose_workers_die_is_one_line(reproduce, monkeypatch):
    def die(*_):
        raise engine.WorkerDiedError("ERM, seed 0: every worker that tried it died: pass --resume to try again")

    monkeypatch.setattr(engine, "train", die)
    message = "ERM, seed 0: every worker that tried it died: pass --resume to try again"
    assert reproduce() == (1, "", f"mixfeat reproduce theory: error: {message}\n")


def test_workers_change_no_number(reproduce, tmp_path, monkeypatch):
    """Two processes resume what one began, in the middle of a run."""
    monkeypatch.setattr(engine, "CHUNK_SECONDS", 0)
    save = engine.Results.save

    def interrupted(*args):
        save(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.Results, "save", interrupted)
    assert reproduce("--methods", "erm", "midpoint")[0] == 130
    monkeypatch.undo()
    paths = tmp_path / "resumed.json", tmp_path / "unbroken.json"
    options = ["--methods", "erm", "midpoint", "--json"]
    assert reproduce(*options, paths[0], "--resume", "--jobs", 2)[0] == 0
    assert reproduce(*options, paths[1], out=tmp_path / "unbroken")[0] == 0
    resumed, unbroken = (json.loads(path.read_text())["results"] for path in paths)
    for results in (resumed, unbroken):
        for result in results.values():
            assert result.pop("seconds") > 0
    assert resumed == unbroken


def test_ctrl_c_and_resume(tmp_path):
    """A real interrupt in a real process; the command that it names ends as an unbroken run would."""
    code = """
import signal, sys, torch
from mixfeat import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
torch.set_num_threads(1)
from mixfeat.experiments import engine
engine.CHUNK_SECONDS = 0
save, saves = engine.Results.save, []
def interrupted(*args):
    save(*args)
    saves.append(args)
    if len(saves) == 3:
        signal.raise_signal(signal.SIGINT)
engine.Results.save = interrupted
sys.exit(cli.main(command))
"""
    command = ["reproduce", "theory", *SMALL, "--methods", "uniform", "--out", str(tmp_path / "a b")]
    (ended,) = processes.run(f"command = {command}\n{code}")
    assert ended.status == 130, ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        f"mixfeat reproduce theory: stopped; continue with: mixfeat {shlex.join(command)} --resume"
    )
    assert "Traceback" not in ended.stderr
    paths = tmp_path / "resumed.json", tmp_path / "unbroken.json"
    assert cli.main([*command, "--resume", "--json", str(paths[0])]) == 0
    assert cli.main([*command[:-1], str(tmp_path / "b"), "--json", str(paths[1])]) == 0
    resumed, unbroken = (json.loads(path.read_text())["results"]["uniform"] for path in paths)
    assert resumed.pop("seconds")
    assert unbroken.pop("seconds")
    assert resumed == unbroken


def test_progress_bar_on_a_terminal(reproduce, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, _, err = reproduce("--methods", "erm")
    assert status == 0
    assert "ERM, seed 1: 100%" in err
    assert "600/600" in err


# images

DIGITS = ["--epochs=2", "--seeds=2", "--batch-size=200", "--device=cpu", "--jobs=1"]


@pytest.fixture(autouse=True)
def _read_again():
    """Data that a test replaces are not another's."""
    images.load.cache_clear()
    yield
    images.load.cache_clear()


@pytest.fixture
def reproduce_images(tmp_path, capsys):
    """Run ``reproduce images`` small, in the test's folder; gives (exit status, stdout, stderr)."""

    def run(*options, out=tmp_path / "out"):
        try:
            status = cli.main(["reproduce", "images", *DIGITS, "--out", str(out), *map(str, options)])
        except SystemExit as stop:  # argparse
            status = stop.code
        return status, *capsys.readouterr()

    return run


def test_reproduce_images(reproduce_images, tmp_path):
    pytest.importorskip("sklearn")
    status, out, err = reproduce_images("--json", tmp_path / "r.json", "--lr", 0.003)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "digits, patch, after 2 epochs, in percent; mean ± standard deviation over 2 seeds"
    assert lines[2].split("  ")[-3:] == ["train accuracy", "test error, view 0", "test error, view 1"]
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["settings"]["lr"] == 0.003
    assert images.Settings(**document["settings"]).hash == document["settings_hash"]
    assert "scikit-learn" in document["environment"]
    assert list(document["results"]) == list(theory.METHODS)
    for method, result in document["results"].items():
        (line,) = (line for line in lines if line.startswith(theory.METHODS[method]))
        error = 100 * sum(result["test_error_view_1"]) / 2
        assert f"  {error:.2f} ± " in line
        assert len(result["curves"]["test_error_view_0"]) == 2
        for seed in (0, 1):
            assert f" of 6: {theory.METHODS[method]}, seed {seed}: " in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["images.png", "runs"]
    assert (tmp_path / "out" / "images.png").read_bytes().startswith(b"\x89PNG")
    runs = tmp_path / "out" / "runs"
    before = {path: path.read_bytes() for path in runs.iterdir()}
    assert_refused(
        reproduce_images("--lr", 0.003), "already has results: pass --resume to continue", command="reproduce images"
    )
    assert reproduce_images("--lr", 0.003, "--resume")[:2] == (0, out)
    assert {path: path.read_bytes() for path in runs.iterdir()} == before


def test_reproduce_images_from_files(reproduce_images, tmp_path, monkeypatch):
    command = ["--dataset", "fashion-mnist", "--data-dir", tmp_path, "--methods", "midpoint"]
    name = "train-images-idx3-ubyte.gz"
    (tmp_path / name).write_bytes(b"something else")
    assert_refused(reproduce_images(*command), f"{name} is not the official file", command="reproduce images")
    data = [(torch.randint(256, (num, 1, 28, 28)).byte(), torch.arange(num) % 10) for num in (60, 20)]
    tiny = datasets.DATASETS["fashion-mnist"]._replace(md5={}, read=lambda archives: data)
    monkeypatch.setitem(datasets.DATASETS, "fashion-mnist", tiny)
    status, out, err = reproduce_images(*command, "--json", tmp_path / "r.json")
    assert status == 0, err
    assert out.startswith("fashion-mnist, patch, after 2 epochs")
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert (settings["patch_size"], settings["batch_size"]) == (7, 200)


def test_data_that_cannot_be_trained_on_are_one_line(reproduce_images, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    train, test = datasets.load("digits", tmp_path)
    some = train.target != 3
    data = datasets.Split(train.images[some], train.target[some]), test
    monkeypatch.setattr(datasets, "load", lambda *_: data)
    assert_refused(reproduce_images(), "images of every class, got none of class 3", command="reproduce images")


def test_images_of_one_seed_and_progress(reproduce_images, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, out, err = reproduce_images("--seeds", 1, "--methods", "midpoint")
    assert status == 0
    assert out.startswith("digits, patch, after 2 epochs, in percent; one seed")
    assert "±" not in out
    assert "ERM" not in out
    assert "Midpoint Mixup, seed 0: 100%" in err
    assert "16.0/16.0" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", "nan"], "lr must be finite, got nan"),
        (
            ["--dataset", "mnist"],
            "dataset must be one of digits, mnist1d, fashion-mnist, cifar10, cifar100, got 'mnist'",
        ),
        (["--model", "vgg"], "model must be one of patch, resnet1d, resnet18, got 'vgg'"),
        (["--patch-size", "3"], "patch_size must divide the images' height and width, got 3 for 8 x 8"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--methods", "magic"], "argument --methods: invalid choice: 'magic'"),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "nowhere/cifar-10-python.tar.gz is missing: download http"),
    ],
)
def test_bad_image_settings(reproduce_images, options, message, tmp_path):
    assert_refused(reproduce_images(*options), message, command="reproduce images")
    assert not (tmp_path / "out").exists()


def test_images_find_what_is_missing_before_training(reproduce_images, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(engine, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    for result, message in (
        (reproduce_images(out=tmp_path / "file"), "file cannot be written: File exists"),
        (reproduce_images("--json", tmp_path), f"--json {tmp_path} cannot be written: it is a folder"),
    ):
        assert_refused(result, message, command="reproduce images")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert_refused(
        reproduce_images("--model", "resnet18"), "needs torchvision: pip install 'mixfeat[images]'",
        command="reproduce images",
    )  # fmt: skip


def test_diverged_images_are_one_line(reproduce_images, monkeypatch):
    pytest.importorskip("sklearn")

    objective = images.objective
    monkeypatch.setattr(images, "objective", lambda *args: objective(*args) * torch.inf)
    status, out, err = reproduce_images("--methods", "erm", "--seeds", 1)
    assert (status, out) == (1, "")
    assert err.splitlines() == [
        "1 of 1: ERM, seed 0: diverged",
        "mixfeat reproduce images: error: erm, seed 0 left the finite numbers in epoch 1: try a smaller lr than 0.003",
    ]


def test_help_of_images(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "images", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in ("--data-dir", *("--" + setting.name.replace("_", "-") for setting in fields(images.Settings))):
        assert name in out
    for name in (*datasets.DATASETS, *images.MODELS):
        assert name in out


def test_info(capsys, tmp_path):
    assert cli.main(["info", "--json", str(tmp_path / "info.json")]) == 0
    out = capsys.readouterr().out
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["mixfeat"] == mf.__version__
    for name in ("mixfeat", "python", "torch", "triton", "numpy", "platform", "CPU", "threads", "GPUs", "backends"):
        assert name in facts
        assert any(line.startswith(name) for line in out.splitlines())
    for name in mf.backends.NAMES:
        assert f"backends: {name} " in out
    assert facts["threads"] == torch.get_num_threads()


def test_info_of_a_shape(capsys, monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert cli.main(["info", "--shape", "50,12,20,10,5"]) == 0
    found = {tuple(line.split()) for line in capsys.readouterr().out.splitlines() if "gradient_descent" in line}
    words = {line[1:] for line in found}
    assert ("Midpoint,", "sm_90", "one", "launch") in words
    (reason,) = (" ".join(line) for line in words if line[:2] == ("Midpoint,", "sm_120"))
    assert re.search(
        r"a loop over the operators, in a CUDA graph: a network takes \d+ KiB of .* sm_120 has 99$", reason
    )
    monkeypatch.setattr(cuda, "unavailable", lambda: "cuda-bindings is missing")
    assert cli.main(["info", "--shape", "50,12,20,10,5"]) == 0
    assert "one launch" not in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["50", "1,2,3,4,x", "1,2,3,4,0", ""])
def test_info_refuses_a_shape(shape, capsys):
    with pytest.raises(SystemExit):
        cli.main(["info", "--shape", shape])
    error = capsys.readouterr().err
    assert error.startswith("mixfeat info: error: argument --shape: needs five ")
    assert error.endswith(f"got {shape!r}\n")


def test_info_refuses_an_unwritable_file(capsys, tmp_path):
    assert cli.main(["info", "--json", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"mixfeat info: error: --json {tmp_path} cannot be written: it is a folder\n"


@pytest.mark.parametrize("command", [[], ["magic"], ["reproduce"], ["reproduce", "magic"], ["info", "--magic"]])
def test_bad_commands(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("mixfeat")
    assert err.count("\n") == 1


def test_help_names_the_papers_symbols(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "theory", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    for text in ("(k in the paper)", "(alpha in the paper)", "rho", "sigma_0", "(eta)", "(T)", "(N)", "(P)", "(m)"):
        assert text in out


def test_module_and_imports(run_python):
    """``python -m mixfeat`` runs; importing the package brings in neither experiments nor what only they need."""
    code = """
import sys, torch
before = set(sys.modules)
import mixfeat
print({"mixfeat.experiments", "mixfeat.cli", "matplotlib", "tqdm", "joblib"} & (set(sys.modules) - before))
import runpy
sys.argv = ["mixfeat", "--version"]
runpy.run_module("mixfeat", run_name="__main__")
"""
    assert run_python(code, fresh=True).splitlines() == ["set()", f"mixfeat {mf.__version__}"]


@pytest.mark.parametrize(("chosen", "found"), [(None, "passive"), ("active", "active")])
def test_threads_that_wait_do_not_spin(chosen, found, tmp_path):
    """Unless the user says so; flags of the interpreter are kept."""
    command = ["check", "--quick", "--operator", "mixup", "--backend", "reference", "--dtype", "float64", "--json"]
    environment = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment |= {"OMP_WAIT_POLICY": chosen} if chosen else {}
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mixfeat", *command, str(tmp_path / "check.json")],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr.splitlines()[-1].startswith("import time:")
    variables = json.loads((tmp_path / "check.json").read_text())["environment"]["environment variables"]
    assert variables["OMP_WAIT_POLICY"] == found


def test_output_that_nobody_reads(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        process = subprocess.run(
            [sys.executable, "-m", "mixfeat", "info"], cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert process.returncode in (1, -signal.SIGPIPE)
    assert "Traceback" not in process.stderr


def run_small(tmp_path, *, stdout=subprocess.PIPE, limit=None, **environment):
    """Run ``reproduce theory`` in a process of its own, whose files may have ``limit`` bytes."""
    code = (
        "import resource, signal, sys\n"
        "from mixfeat import cli\n"
        f"limit = {limit}\n"
        "if limit: signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    options = [*SMALL, "--methods=erm", f"--out={tmp_path / 'out'}", f"--json={tmp_path / 'j.json'}"]
    # coverage's data would not fit either
    kept = {name: value for name, value in os.environ.items() if limit is None or not name.startswith("COVERAGE")}
    return subprocess.run(
        [sys.executable, "-c", code, "reproduce", "theory", *options],
        cwd=ROOT, env=kept | environment, stdout=stdout, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip


def test_surroundings_change_nothing(tmp_path):
    """An encoding without ±, a notebook's backend for figures, a matplotlibrc that asks for LaTeX."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    result = run_small(
        tmp_path, PYTHONIOENCODING="ascii", MPLBACKEND="module://matplotlib_inline.backend_inline",
        MATPLOTLIBRC=str(tmp_path / "matplotlibrc"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "ERM" in result.stdout
    assert (tmp_path / "out/theory.png").stat().st_size > 10_000
    assert (tmp_path / "j.json").exists()


def test_figure_that_cannot_be_written_is_one_line(tmp_path):
    """Nothing is left half-written, and the results are kept."""
    result = run_small(tmp_path, limit=30_000)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("mixfeat reproduce theory: error: ")
    assert "cannot be written: File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out/theory.png").exists()
    assert not list(tmp_path.rglob("*.part"))
    assert list((tmp_path / "out/runs").iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_output_that_cannot_be_printed_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        result = run_small(tmp_path, stdout=full)
    assert result.returncode == 1
    assert "error: output cannot be written: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out/theory.png").exists()
    assert (tmp_path / "j.json").exists()


def test_json_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text("before")
    monkeypatch.setattr(json, "dumps", lambda *a, **k: "\ud800")  # no encoding has a lone surrogate
    with pytest.raises(UnicodeEncodeError):
        cli.common.write_json(path, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "before"
