"""What `mixfeat bench` makes of its results; the timing itself is not for tests."""

import copy
import functools
import json
import os
import re
import sys
import time

import pytest
import torch
from conftest import ROOT

import mixfeat as mf
from mixfeat import cli
from mixfeat.benchmarks import baselines, harness, pages, peers, predicted, results, shapes, timing


def row(seconds, contenders=("mixfeat", "eager"), peaks=(2**20, 3 * 2**20), also=True, **changes):
    """The rows of a case in pytest-benchmark's JSON: the second contender takes three times as long as the first."""
    params = {"suite": "mixup", "case": "paper (2, 3)", "direction": "forward", "dtype": "float32"}
    params |= {name: changes.pop(name) for name in params if name in changes}
    shared = {
        "work": {"bytes": 4e6}, "limit": {"name": "a copy", "seconds": 1e-3}, "figures": {"threads": 2},
        "cache": "warm", "graph": False, "missing": {}, **changes,
    }  # fmt: skip
    found = []
    for factor, name in zip((1, 3), contenders, strict=False):
        stats = {"q1": 0.9 * factor * seconds, "median": factor * seconds, "q3": 1.1 * factor * seconds}
        info = {"ratio": factor} | ({"peak_bytes": peaks[factor // 2]} if peaks else {})
        info |= shared | ({"also": {"cold cache": 3 * seconds}} if also else {}) if factor == 1 else {}
        group = " ".join(params.values())
        found.append({"group": group, "params": params | {"contender": name}, "extra_info": info, "stats": stats})
    return found


def document_of(*cases):
    machine = {"mixfeat": "1", "device": "this", "torch": "2", "triton": "3", "GPUs": []}
    benchmarks = [bench for case in cases for bench in case]
    date, commit = "2026-01-01T12:00:00+00:00", {"id": "abc", "dirty": False}
    return {"machine_info": machine, "commit_info": commit, "datetime": date, "benchmarks": benchmarks}


@pytest.fixture
def document():
    return document_of(row(2e-3), row(4e-3, direction="backward", dtype="bfloat16", limit=None, peaks=()))


def only(case):
    (found,) = results.rows({"benchmarks": case})
    return found


def test_row_in_words():
    text = results.describe(only(row(2e-3, missing={"timm": "No module named 'timm'"})))
    assert text.startswith("mixup paper (2, 3) forward float32:  2 ms  eager 3.00x  2 GB/s  50% of a copy")
    assert "  cold cache: 6 ms  " in text
    assert "peak mixfeat 1.0 MiB, eager 3.0 MiB" in text
    assert text.endswith("  without timm: No module named 'timm'")


def test_rates_of_all_kinds_of_work():
    text = results.describe(only(row(2e-3, work={"evaluations": 8e6, "FLOP": 6e7, "bytes": 1e6})))
    assert "  4e9 evaluations/s  30 GFLOP/s  0.5 GB/s  " in text


def test_tables(document):
    text = results.tables(document)
    assert (
        "| `mixup`                         | mixfeat, ms | over eager | of a copy | threads | memory, MiB | of" in text
    )
    assert (
        "| paper (2,3), forward            | 2           | 3.0x       | 50%       | 2       | 1.0         | 3.0" in text
    )
    assert (
        "| paper (2,3), backward, bfloat16 | 4           | 3.0x       |           | 2       |             |  " in text
    )
    assert "2026-01-01, mixfeat 1 at abc. Caches are warm." in text


def test_headline(monkeypatch):
    """A row for each case that the README shows, with gradients where both are timed, against its best baseline."""
    monkeypatch.setattr(results, "HEADLINE", (("mixup", "paper", "float32"), ("mixup", "absent", "float32")))
    both = row(2e-3, direction="forward + backward")
    lines = results.headline(document_of(row(3e-3), both, row(4e-3, case="other (2, 3)"))).splitlines()
    assert lines[0] == "this, PyTorch 2; 2026-01-01, mixfeat 1 at abc."
    assert len(lines) == 5  # nothing, the head, the rule, one case
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == ["`mixup`", "paper (2,3), forward + backward", "2", "eager", "3.0x", "50% of a copy"]


def test_table_of_figures_that_few_rows_have():
    """Rows with the same figures share it."""
    cases = [row(2e-3, case=case, figures={"of both": 0.123, "time, s": 2.0}) for case in ("one", "two")]
    text = results.tables(document_of(*cases, *(row(2e-3, case=f"other {n}", figures={}) for n in range(2))))
    head, _, *body = text.split("\n\n")[-1].splitlines()
    assert head.split() == ["|", "`mixup`", "|", "of", "both", "|", "time,", "s", "|"]
    assert [line.split() for line in body] == [
        ["|", f"{case},", "forward", "|", "12%", "|", "2", "|"] for case in ("one", "two")
    ]


def test_table_says_what_is_missing():
    text = results.tables(document_of(row(2e-3, missing={"timm": "No module named 'timm'", "eager": "not that one"})))
    assert text.endswith("|\n\n- without timm: No module named 'timm'")
    assert "not that one" not in text  # another case has it


def test_table_of_a_gpu():
    """Graphs are the rule there; growth is for the figure."""
    figures = {"exponent": 1.987, "N": [1, 2], "ms": [1.0, 4.0]}
    cases = [row(1e-3, case=case, cache="cold", graph=graph) for case, graph in (("one", True), ("two", False))]
    growth = row(1.0, ("N = 1", "N = 2"), direction="growth with N", cache="cold", limit=None, figures=figures)
    document = document_of(*cases, growth)
    document["machine_info"]["GPUs"] = ["a GPU"]
    text = results.tables(document)
    assert text.startswith("this, PyTorch 2, Triton 3; 2026-01-01")
    assert "Caches are cold." in text
    assert "| one, forward           |" in text
    assert "| two, forward, no graph |" in text
    assert "1.99" not in text


@pytest.mark.parametrize(("factor", "slower"), [(1.0, 0), (1.15, 0), (1.5, 1), (0.5, 0)])
def test_comparison_with_an_earlier_run(document, factor, slower):
    """Slower counts where it is beyond the spread of both runs."""
    now = copy.deepcopy(document)
    now["benchmarks"][:2] = row(factor * 2e-3)
    lines = results.compare(now, document)
    assert len(lines) == slower
    assert all("mixup paper (2, 3) forward float32: 2 ms -> 3 ms (1.50x)" in line for line in lines)
    with pytest.raises(ValueError, match="one device, got this and that"):
        results.compare(now, document | {"machine_info": {"device": "that"}})


def test_command_without_a_run(document, tmp_path, capsys):
    old, new, figure = (tmp_path / name for name in ("old.json", "new.json", "figure.png"))
    old.write_text(json.dumps(document))
    document["benchmarks"][:2] = row(4e-3)
    new.write_text(json.dumps(document))
    assert cli.main(["bench", "--results", str(new), "--compare", str(old), "--plot", str(figure)]) == 1
    assert "2 ms -> 4 ms (2.00x)" in capsys.readouterr().out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["bench", "--results", str(old), "--compare", str(old)]) == 0
    assert "nothing is slower" in capsys.readouterr().out


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run `mixfeat bench` as far as it goes; its exit status and document."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "--an-option-for-other-tests")

    def run(*arguments):
        out = tmp_path / "bench.json"
        status = cli.main(["bench", "--seconds", "0.01", "--out", str(out), *arguments])
        return status, results.load(out)

    return run


def test_command_runs_a_suite(bench):
    chosen = " or ".join(
        f"{suite}-N" for suite in ("patch_conv", "pairwise_mixup_loss", "mixup", "mixup_cross_entropy")
    )
    status, document = bench("--only", "scaling", "--filter", chosen)
    assert status == 0
    found = results.rows(document)
    assert len(found) == 4
    for row in found:
        assert len(row["timings"]) == len(row["figures"]["N"]) == 4
        assert -0.5 < row["figures"]["exponent"] < 2.5


def test_command_runs_chosen_cases(bench, monkeypatch, capsys):
    """Of each operator the smallest: all contenders agree, and a row has all that it should."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # that is PyTorch's to test, and takes a minute
    status, document = bench("--filter", "tiny and not one_call")
    assert status == 0
    rows = results.rows(document)
    found = [(row["suite"], row["direction"]) for row in rows]
    both = ("forward", "forward + backward")
    expected = [(suite, direction) for suite in ("patch_conv", "pairwise_mixup_loss") for direction in both]
    assert sorted(found) == sorted(
        [*expected, ("mixup", both[0]), ("cutmix", both[0]), ("mixup_cross_entropy", both[1])]
    )
    for row in rows:
        assert {"mixfeat", "torch.compile", "naive"} <= set(row["timings"])
        assert row["cache"] == ("cold" if torch.cuda.is_available() else "warm")
        assert isinstance(row["graph"], bool)
        assert all("mixfeat" in times for times in row["also"].values())
        assert {"bytes/s"} | ({"FLOP/s"} if row["suite"] != "cutmix" else set()) <= set(results.rates(row))
        assert row["limit"]["seconds"] > 0
        assert row["peak_bytes"]["mixfeat"] > 0
    assert cli.main(["bench", "--filter", "no_such_case"]) == 2
    assert "--filter 'no_such_case' chooses no benchmark" in capsys.readouterr().err


def test_command_runs_the_users_problem_and_contender(bench, tmp_path, monkeypatch, capfd):
    """A shape of theirs, in which images have no place; a contender that is wrong is not timed."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    code = "def mean_of_both(input, index, lam):\n    return (input + input[index]) / 2\n"
    (tmp_path / "theirs.py").write_text(
        code + "def lerp(input, index, lam):\n    return input[index].lerp(input, lam)\n"
    )
    problem = ("--shape", "6,3,5,4,2", "--only", "mixup", "--filter", "float32 and not backward")
    status, document = bench(*problem, "--against", "theirs:lerp")
    assert status == 0
    (row,) = results.rows(document)
    assert row["case"] == "yours (6, 3, 5)"
    assert {"mixfeat", "torch.compile", "theirs:lerp"} <= set(row["timings"])
    assert cli.main(["bench", *problem, "--against", "theirs:mean_of_both"]) == 1
    assert "theirs:mean_of_both is off by " in capfd.readouterr().out
    assert cli.main(["bench", "--shape", "6,3,5,4,2", "--only", "cutmix"]) == 2
    assert "--only 'cutmix' --shape '6,3,5,4,2' chooses no benchmark" in capfd.readouterr().err


def test_what_there_is_when_the_time_is_up(tmp_path, capfd):
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--only", "scaling", "--limit", "0.5", "--out", str(out)]) == 1
    output = capfd.readouterr()
    assert "stopped after 0.5 s" in output.out
    if out.exists():
        assert len(results.rows(results.load(out))) < 10  # of 20
    else:
        assert "no benchmark has come to its end" in output.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "none"], "--only must be of cross_entropy, .*limits, .*mixup_cross_entropy, .*, got none"),
        (["--against", "numpy:dot"], "--against needs --only with .*patch_conv, .*gradient_descent, got none"),
        (["--against", "numpy:dot", "--only", "limits"], "--against needs --only with .*, got limits"),
        (["--only", "mixup", "--against", "numpy"], "--against must be module:function, got 'numpy'"),
        (["--only", "mixup", "--against", "no.such:dot"], "no.such:dot cannot be imported: ModuleNotFoundError: "),
        (["--only", "mixup", "--against", "numpy:dut"], "cannot be imported: AttributeError: .*dut"),
        (["--only", "mixup", "--against", "numpy:pi"], "--against numpy:pi must be a function, got float"),
        (["--limit", "nan"], "--limit must be finite and positive, got nan"),
        (["--seconds", "0"], "--seconds must be finite and positive, got 0.0"),
        (["--results", "/no/such.json"], r"/no/such.json cannot be read: .*No such file"),
        (["--compare", str(ROOT / "pyproject.toml")], "pyproject.toml cannot be read: "),
        (["--results", str(ROOT / "constraints.txt")], "constraints.txt cannot be read: "),
    ],
)
def test_command_refuses(args, message, capsys):
    assert cli.main(["bench", *args]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_file_of_something_else(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text('{"version": 1}')
    assert cli.main(["bench", "--results", str(file)]) == 2
    assert "holds no results of `mixfeat bench`: it lacks machine_info, commit_info" in capsys.readouterr().err
    file.write_text(json.dumps(document_of() | {"machine_info": {"node": "another's"}}))
    assert cli.main(["bench", "--results", str(file)]) == 2
    assert "it lacks mixfeat's version" in capsys.readouterr().err


@pytest.fixture
def rows_of(benchmark):
    """Record contenders as a benchmark does; gives their rows in pytest-benchmark's JSON."""
    fixtures = iter((benchmark, copy.copy(benchmark)))

    def record(contenders, **options):
        bench = harness.Bench(next(fixtures))
        bench(harness.Case("mixup", "paper", "forward"), contenders, **options)
        return bench.rows

    return record


@pytest.mark.benchmark(timer=harness.CLOCK)
def test_every_contender_has_a_row(rows_of):
    """Of pytest-benchmark's own statistics, over turns that contenders took in turn."""
    calls = []
    contenders = {name: functools.partial(calls.append, name) for name in ("mixfeat", "eager", "naive")}
    ours, eager, naive = rows_of(contenders, share=0, figures=lambda medians: {"names": list(medians)})
    assert {row["group"] for row in (ours, eager, naive)} == {"mixup paper forward float32"}
    assert [row["name"] for row in (ours, eager, naive)] == list(contenders)
    assert len({row["fullname"] for row in (ours, eager, naive)}) == 3
    assert ours["extra_info"]["figures"] == {"names": list(contenders)}
    assert {"work", "limit", "figures"}.isdisjoint(eager["extra_info"])
    for row in (ours, eager, naive):
        assert row["stats"]["rounds"] == ours["stats"]["rounds"] >= 3
        assert 0 < row["stats"]["min"] <= row["stats"]["median"]
        assert row["extra_info"]["ratio"] == row["stats"]["median"] / ours["stats"]["median"]


@pytest.mark.benchmark(timer=harness.CLOCK)
def test_predictions(rows_of, monkeypatch):
    """Each is of a named shape, on its page, and beside what an H100 measures."""
    assert pages.with_predictions(pages.PREDICTED.read_text(), pages.committed()) == pages.PREDICTED.read_text()
    tables = {"test_mixup.py": shapes.BATCHES, "test_cross_entropy.py": shapes.logits(gpu=True)}
    for one in predicted.PREDICTIONS:
        file, function, case = re.fullmatch(r"(test_\w+\.py)::(\w+)(?:\[(.+)\])?", one.benchmark).groups()
        assert f"def {function}(" in (ROOT / "benchmarks" / file).read_text()
        if case and not case.startswith("theory"):
            name, dtype, _ = re.fullmatch(r"(.+)-(float32|bfloat16)-(.+)", case).groups()
            shape = tables.get(file, shapes.networks(gpu=True))[name]
            assert one.problem == f"{tuple(shape)} {dtype}".replace(", ", ",")
    first = predicted.PREDICTIONS[0]
    assert predicted.of(f"benchmarks/{first.benchmark}", "NVIDIA H100 80GB HBM3") is first
    assert predicted.of(first.benchmark, "NVIDIA A100-SXM4-80GB") is None
    assert [predicted.rank(one.benchmark) for one in predicted.PREDICTIONS] == [*range(len(predicted.PREDICTIONS))]
    monkeypatch.setattr(predicted, "of", lambda benchmark, device: first)
    ours, other = rows_of({"mixfeat": int, "eager": int}, share=0)
    assert ours["extra_info"]["predicted_us"] == list(first.mixfeat)
    assert "predicted_us" not in other["extra_info"]
    assert "predicted 0.072 to 0.072 ms" in results.describe(results.rows(document_of([ours, other]))[0])


@pytest.mark.benchmark(timer=harness.CLOCK)
def test_slowdown_is_seen(rows_of):
    """From the clock over the rows to the comparison: four times the work."""
    work = torch.randn(256, 256)

    def document(calls):
        return document_of(rows_of({"mixfeat": lambda: [work @ work for _ in range(calls)]}, share=0.1))

    old, new = document(2), document(8)
    (line,) = results.compare(new, old)
    assert line.startswith("mixup paper forward float32: ")
    assert results.compare(old, new) == []


def reversed_with(first, second):
    """Mix a batch with itself in reverse, by shares of both; its labels say the first one's share."""

    def mix(x, labels):
        one_hot = torch.nn.functional.one_hot(labels).float()
        return first * x + second * x.flip(0), first * one_hot + (1 - first) * one_hot.flip(0)

    return lambda classes: (mix, peers._read_dense)


def test_peers_that_mix_are_compared():
    """By what their labels say; where one is not there or does not fit, it is said."""

    def absent(classes):
        import no_such_package

        return no_such_package.Mixup(classes)

    makers = {"right": reversed_with(0.25, 0.75), "absent": absent}
    found, missing = peers.mixers(makers, torch.rand(4, 3, 5, 6))
    assert list(found) == ["right"]
    assert found["right"]().shape == (4, 3, 5, 6)
    assert missing == {"absent": "No module named 'no_such_package'"}
    assert list(peers.mixers(makers, torch.rand(4, 5))[1]) == ["right", "absent"]
    with pytest.raises(AssertionError, match="wrong mixes otherwise"):
        peers.mixers({"wrong": reversed_with(0.25, 0.7)}, torch.rand(4, 3, 5, 6))


@pytest.mark.parametrize("box", [(1, 4, 2, 6), (0, 5, 0, 6), (2, 2, 3, 3)], ids=str)
def test_peers_that_cut_are_compared(box):
    """The box is found from the pixels, and its area held to the labels."""
    y0, y1, x0, x1 = box
    share = 1 - (y1 - y0) * (x1 - x0) / 30

    def make(classes, share=share):
        def mix(x, labels):
            one_hot = torch.nn.functional.one_hot(labels).float()
            x[:, :, y0:y1, x0:x1] = x.flip(0)[:, :, y0:y1, x0:x1]
            return x, share * one_hot + (1 - share) * one_hot.flip(0)

        return mix, peers._read_dense

    assert list(peers.mixers({"right": make}, torch.rand(4, 3, 5, 6))[0]) == ["right"]
    with pytest.raises(AssertionError):
        peers.mixers({"wrong": functools.partial(make, share=0.9 * share + 0.05)}, torch.rand(4, 3, 5, 6))


@pytest.mark.parametrize("makers", [peers.PAIRS, peers.LOSSES, peers.BINARY_LOSSES, peers.SOFT_LOSSES, peers.HEADS])
def test_losses_of_others_are_there_or_say_why(makers):
    found, missing = peers.gather(makers)
    assert {*found, *missing} == {*makers}
    assert all(missing.values())


def test_baselines_of_the_losses_agree():
    """The formulas that the benchmarks time, in float64; values and gradients."""
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    labels = (*torch.randint(5, (2, 6)), torch.tensor(0.3, dtype=torch.float64))
    dense = torch.rand(6, 5, dtype=torch.float64)  # which need not sum to 1
    pairs = [
        (mf.mixup_cross_entropy, labels, baselines.two_cross_entropies),
        (mf.mixup_cross_entropy, labels, baselines.logsumexp_cross_entropy),
        (mf.mixup_cross_entropy, labels, baselines.dense_cross_entropy),
        (mf.soft_target_cross_entropy, (dense,), baselines.logsumexp_soft_cross_entropy),
        (mf.mixup_binary_cross_entropy, labels, baselines.dense_binary_cross_entropy),
    ]
    for ours, arguments, theirs in pairs:
        losses = [loss(logits, *arguments) for loss in (ours, theirs)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_baselines_of_mixing_agree():
    index, lam = torch.tensor([2, 0, 3, 1]), torch.tensor(0.3)
    images = torch.randint(256, (4, 3, 5, 6), dtype=torch.uint8)
    x = torch.rand(4, 3, 5, 6)
    torch.testing.assert_close(baselines.mixup_lerp(x, index, lam), mf.mixup(x, index, lam))
    torch.testing.assert_close(baselines.mixup_of_bytes(images, index, lam), mf.mixup(images, index, lam))
    found, missing = peers.gather({"OpenCV": peers.mixup_of_bytes})
    for mix in found.values():
        torch.testing.assert_close(mix(images, index, lam), mf.mixup(images, index, lam), rtol=1e-5, atol=1e-3)
    assert len(found) + len(missing) == 1


def test_baselines_of_pairs_agree():
    """The expansion of a power; all networks at once."""
    x, y = torch.randn(7, 3, 4, dtype=torch.float64), torch.arange(7) % 3
    w = (0.3 * torch.randn(2, 3, 2, 4, dtype=torch.float64)).requires_grad_()
    activation = mf.PolyReLU(4, 0.5)
    for degree in (1, 2, 3):
        expanded = baselines.pairwise_binomial(x, w[0], y, mf.Power(degree))
        torch.testing.assert_close(expanded, mf.pairwise_mixup_loss(x, w[0], y, mf.Power(degree)))
    losses = [
        mf.pairwise_mixup_loss(x, w, y, activation, lam=0.3).sum(),
        baselines.batched_loss(x, w, y, activation, 0.3),
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, w)[0] for loss in losses))
    erm = sum(torch.nn.functional.cross_entropy(mf.patch_conv(x, network, activation), y) for network in w)
    torch.testing.assert_close(baselines.batched_loss(x, w, y, activation, None), erm)


def test_baselines_alone():
    """Times of pairs are brought to one scale, that of the first contender."""
    calls = []
    names = ("mixfeat", "eager", "naive")
    timings = timing.compare_pairwise({name: functools.partial(calls.append, name) for name in names}, share=0)
    assert list(timings) == list(names)
    assert calls[: len(calls) // 2].count("naive") == 0


@pytest.mark.skipif(timing.CUDA, reason="of a CPU; a GPU's clock is its events")
def test_warm_calls():
    """The timed call follows another, unless that took long."""
    calls = []
    timing.warm(lambda: calls.append(0))
    assert len(calls) == 2
    assert timing.warm(lambda: (calls.append(0), time.sleep(0.11))) > 0.1
    assert len(calls) == 3


def test_cold_caches():
    """The walk before a cold call is not part of its time, and is over more than a cache holds."""
    assert timing._larger_than_caches().nbytes >= 2 << 20
    timings = {clock.__name__: min(clock(lambda: None) for _ in range(5)) for clock in (timing.cold, timing.warm)}
    assert timings["cold"] < 1e-3


def test_peak_of_memory():
    """What is let go counts no more; what was there before does not count."""

    def run():
        a = torch.empty(1 << 20, device=timing.DEVICE)  # 4 MiB
        del a
        return torch.empty(1 << 19, device=timing.DEVICE), torch.empty(1 << 19, device=timing.DEVICE)

    assert 4 << 20 <= harness.peak_bytes({"run": run})["run"] < 4.1 * 2**20


def test_limit_of_a_gpu(run_python):
    """Its loop compiles, without one: nothing spills, and few of its instructions are not the activation's own."""
    pytest.importorskip("triton")
    output = run_python(
        """
import triton
from mixfeat import report
from mixfeat.benchmarks.activation_rate import BLOCK, POLY_RELU_8, evaluate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

signature = {"output": "*fp32", "rounds": "i32"} | dict.fromkeys(("ACTIVATION", "BACKWARD", "BLOCK"), "constexpr")
for backward in (False, True):
    constants = {(2,): POLY_RELU_8, (3,): backward, (4,): BLOCK}
    source = ASTSource(evaluate, signature, constants, {(0,): [["tt.divisibility", 16]]})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    found = report._nvidia(compiled.asm["cubin"])
    loop = max(report._innermost_loops(found["assembly"]), key=len)
    print(found["stack_bytes"], len(loop) * 4 * 32 / BLOCK)
""",
        TRITON_INTERPRET=None,
    )
    stacks, instructions = zip(*(map(float, line.split()) for line in output.splitlines()), strict=True)
    assert stacks == (0, 0)
    assert all(6 <= count < 6.5 for count in instructions)  # of an activation 6, of a slope and its addition as well


def results_of(figure):
    """What a figure says which results it shows."""
    from PIL import Image

    from mixfeat.benchmarks.plots import MARK  # needs matplotlib, which not every machine with a GPU has

    with Image.open(figure) as image:
        return image.text[MARK]


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_pages_have_the_committed_results(page):
    """`python -m mixfeat.benchmarks.pages` writes them there, and draws them."""
    documents = pages.committed()
    assert documents
    assert pages.with_tables(page, page.read_text(), documents) == page.read_text()
    assert results_of(pages.FIGURE) == results.fingerprint(pages.longest(documents))


def test_pytest_benchmark_compares_the_committed_results(run_python):
    """Its own command reads them: a table per case, a line per contender."""
    (file, *_) = sorted((ROOT / "benchmarks/results").glob("*.json"))
    arguments = ["compare", "compare", str(file), "--group-by=group", "--columns=median,iqr,rounds"]
    output = run_python(f"import sys; sys.argv = {arguments}; from pytest_benchmark.cli import main; main()")
    cases = results.rows(results.load(file))
    assert output.count(" benchmark '") == len(cases)
    assert sum(line.startswith("mixfeat ") for line in output.splitlines()) == sum(
        "mixfeat" in case["timings"] for case in cases
    )


def test_figure_tells_its_results(tmp_path):
    """By more than its pixels, which differ between versions of matplotlib; of rows of every kind."""
    from mixfeat.benchmarks.plots import plot

    limits = {"copies, GB/s": 10.0, "float32 products, GFLOP/s": 50.0, "activations forward, GFLOP/s": 80.0}
    growth = {"exponent": 1.0, "N": [10, 100], "ms": [1.0, 10.0]}
    bare = {"work": {}, "limit": None, "peaks": (), "also": False}
    cases = [
        row(2e-3),
        row(4e-3, direction="backward", dtype="bfloat16", limit=None, peaks=()),
        row(1e-3, direction="both", work={"FLOP": 1e7, "bytes": 1e6}),
        row(1.0, ("a", "b"), suite="limits", figures=limits, **bare),
        row(1.0, ("N = 10", "N = 100"), direction="growth with N", figures=growth, **bare),
    ]
    for chosen in (cases, cases[3:], cases[:1], []):
        plot(document_of(*chosen), tmp_path / "figure.png")
        assert results_of(tmp_path / "figure.png") == results.fingerprint(document_of(*chosen))
    document = document_of(*cases)
    assert results.fingerprint(document) != results.fingerprint(document_of())
    assert results.fingerprint(json.loads(json.dumps(document, indent=3))) == results.fingerprint(document)
