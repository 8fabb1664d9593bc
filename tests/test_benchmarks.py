"""What `mixfeat bench` makes of its results; the timing itself is not for tests."""

import copy
import functools
import json
import re
import time

import pytest
import torch
from conftest import ROOT

from mixfeat import cli
from mixfeat.benchmarks import harness, pages, results, timing


def row(seconds, **changes):
    timing = {"p20": 0.9 * seconds, "p50": seconds, "p80": 1.1 * seconds}
    slower = {name: 3 * value for name, value in timing.items()}
    return {
        "suite": "mixup", "case": "paper (2, 3)", "direction": "forward", "dtype": "float32",
        "timings": {"mixfeat": timing, "eager": slower}, "work": {"bytes": 4e6},
        "limit": {"name": "a copy", "seconds": 1e-3}, "peak_bytes": {"mixfeat": 2**20, "eager": 3 * 2**20},
        "figures": {"threads": 2}, "cache": "warm", "graph": False, "also": {"cold cache": {"mixfeat": 3 * seconds}},
        "rates": {"bytes/s": 4e6 / seconds}, **changes,
    }  # fmt: skip


@pytest.fixture
def document():
    facts = {"version": "1", "commit": "abc", "device": "this", "torch": "2", "triton": None, "date": "2026-01-01"}
    return {**facts, "rows": [row(2e-3), row(4e-3, direction="backward", dtype="bfloat16", limit=None, peak_bytes={})]}


def test_row_in_words(document):
    text = results.describe(document["rows"][0])
    assert text.startswith("mixup paper (2, 3) forward float32:  2 ms  eager 3.00x  2 GB/s  50% of a copy")
    assert "  cold cache: 6 ms  " in text
    assert "peak mixfeat 1.0 MiB, eager 3.0 MiB" in text


def test_rates_of_all_kinds_of_work():
    text = results.describe(row(2e-3, work={"evaluations": 8e6, "FLOP": 6e7, "bytes": 1e6}))
    assert "  4e9 evaluations/s  30 GFLOP/s  0.5 GB/s  " in text


def test_tables(document):
    text = results.tables(document)
    assert "| paper (2, 3), forward            | 2 ms    | 3.0x       | 50%       | 1.0 of 3.0 MiB" in text
    assert "| paper (2, 3), backward, bfloat16 | 4 ms    | 3.0x       |           |  " in text
    assert "- `mixup`, paper (2, 3), forward: threads 2" in text
    assert "2026-01-01, mixfeat 1 at abc. Caches are warm." in text


def test_brief_tables(document):
    """A row for each case: of float32 and of both directions, where there are such."""
    both = row(3e-3, direction="forward + backward")
    step, half = row(5e-3, case="net", direction="training step"), row(7e-3, case="half", dtype="bfloat16")
    single = row(9e-3, timings={}, limit=None, peak_bytes={}, figures={"ranks": 2})
    left_out = [row(2e-3), row(2e-3, direction="forward + backward", dtype="bfloat16")]
    document["rows"] = [*left_out, both, step, half, single]
    assert results.tables(document, brief=True) == results.tables(document | {"rows": [both, step, half, single]})


def test_table_of_a_gpu(document):
    """Graphs are the rule there; exponents have a table of their own."""
    changes = {
        "cache": "cold",
        "timings": {},
        "limit": None,
        "figures": {"exponent": 1.987, "N": [1, 2], "ms": [1.0, 4.0]},
    }
    document["rows"] = [row(1e-3, cache="cold", graph=graph) for graph in (True, False)]
    document["rows"].append(row(1.0, direction="growth with N", graph=None, **changes))
    text = results.tables(document)
    assert "Caches are cold." in text
    assert "| paper (2, 3), forward           |" in text
    assert "| paper (2, 3), forward, no graph |" in text
    assert "| time grows with the power | N    |" in text
    assert "| `mixup`                   | 1.99 |" in text


@pytest.mark.parametrize(("factor", "slower"), [(1.0, 0), (1.15, 0), (1.5, 1), (0.5, 0)])
def test_comparison_with_an_earlier_run(document, factor, slower):
    """Slower counts where it is beyond the spread of both runs."""
    now = copy.deepcopy(document)
    now["rows"][0]["timings"]["mixfeat"] = row(factor * 2e-3)["timings"]["mixfeat"]
    lines = results.compare(now, document)
    assert len(lines) == slower
    assert all("mixup paper (2, 3) forward float32: 2 ms -> 3 ms (1.50x)" in line for line in lines)
    with pytest.raises(ValueError, match="one device: this here, that there"):
        results.compare(now, document | {"device": "that"})


def test_command_without_a_run(document, tmp_path, capsys):
    old, new, figure = (tmp_path / name for name in ("old.json", "new.json", "figure.png"))
    old.write_text(json.dumps(document))
    document["rows"][0] = row(4e-3)
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
    status, document = bench("--suite", "scaling", "--filter", chosen)
    assert status == 0
    assert len(document["rows"]) == 4
    for found in document["rows"]:
        assert set(found) == set(row(1.0))
        assert -0.5 < found["figures"]["exponent"] < 2.5


def test_command_runs_chosen_cases(bench, monkeypatch, capsys):
    """Of each operator the smallest: all contenders agree, and a row has all that it should."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # that is PyTorch's to test, and takes a minute
    status, document = bench("--filter", "tiny and not one_call")
    assert status == 0
    found = [(row["suite"], row["direction"]) for row in document["rows"]]
    both = ("forward", "forward + backward")
    expected = [(suite, direction) for suite in ("patch_conv", "pairwise_mixup_loss") for direction in both]
    assert sorted(found) == sorted(
        [*expected, ("mixup", both[0]), ("cutmix", both[0]), ("mixup_cross_entropy", both[1])]
    )
    for row in document["rows"]:
        assert {"mixfeat", "torch.compile", "naive"} <= set(row["timings"])
        assert row["cache"] == ("cold" if torch.cuda.is_available() else "warm")
        assert isinstance(row["graph"], bool)
        assert all("mixfeat" in times for times in row["also"].values())
        assert row["rates"] == results.rates(row)
        assert {"bytes/s"} | ({"FLOP/s"} if row["suite"] != "cutmix" else set()) <= set(row["rates"])
        assert row["limit"]["seconds"] > 0
        assert row["peak_bytes"]["mixfeat"] > 0
    assert cli.main(["bench", "--filter", "no_such_case"]) == 2
    assert "--filter 'no_such_case' chooses no benchmark" in capsys.readouterr().err


def test_what_there_is_when_the_time_is_up(tmp_path, capfd):
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "--suite", "scaling", "--limit", "0.5", "--out", str(out)]) == 1
    assert "stopped after 0.5 s" in capfd.readouterr().out
    assert len(results.load(out)["rows"]) < 10  # of 20


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--suite", "none"], "--suite must be of cross_entropy, .*limits, .*, got none"),
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
    assert "holds no results of `mixfeat bench`: it lacks commit, device" in capsys.readouterr().err


def test_slowdown_is_seen(tmp_path, monkeypatch, capsys):
    """From the clock over the rows to the comparison: four times the work."""
    work = torch.randn(256, 256)

    def document(name, calls):
        file = tmp_path / name
        monkeypatch.setenv("MIXFEAT_BENCH_OUT", str(file))
        measured = timing.measure({"mixfeat": lambda: [work @ work for _ in range(calls)]}, share=0.1)
        harness.record(capsys, harness.Case("mixup", "paper", "forward"), measured=measured)
        return {"device": "this", "rows": [json.loads(file.read_text())]}

    old, new = document("old", 2), document("new", 8)
    (line,) = results.compare(new, old)
    assert line.startswith("mixup paper forward float32: ")
    assert results.compare(old, new) == []


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
    assert results_of(pages.FIGURE) == results.fingerprint(documents[0])


def test_figure_tells_its_results(document, tmp_path):
    """By more than its pixels, which differ between versions of matplotlib; of rows of every kind."""
    from mixfeat.benchmarks.plots import plot

    limits = {"bytes/s of copies": 1e10, "FLOP/s of float32 products": 5e10, "FLOP/s of activations forward": 8e10}
    growth = {"exponent": 1.0, "N": [10, 100], "ms": [1.0, 10.0]}
    bare = {"timings": {}, "work": {}, "limit": None, "peak_bytes": {}}
    document["rows"] += [
        row(1e-3, work={"FLOP": 1e7, "bytes": 1e6}),
        row(1.0, suite="limits", figures=limits, **bare),
        row(1.0, direction="growth with N", figures=growth, **bare),
    ]
    for rows in (document["rows"], document["rows"][3:], document["rows"][:1], []):
        plot(document | {"rows": rows}, tmp_path / "figure.png")
        assert results_of(tmp_path / "figure.png") == results.fingerprint(document | {"rows": rows})
    assert results.fingerprint(document) != results.fingerprint(document | {"rows": []})
    assert results.fingerprint(json.loads(json.dumps(document, indent=3))) == results.fingerprint(document)
