"""Command lines and files of any content: refused in one line that says what is wrong, and left as they were."""

import io
import random
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from mixfeat import cli
from mixfeat.cli import bench, check, info
from mixfeat.experiments import engine
from mixfeat.experiments.engine import Record, Results, ResultsError

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")


class Reached(Exception):  # noqa: N818
    """The command is about to do its work: its request was found good."""


@pytest.fixture(scope="module")
def _idle(tmp_path_factory):
    """Commands stop short of their work, in an empty folder."""

    def reached(*args, **kwargs):
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("fuzz"))
        patch.setenv("TRITON_INTERPRET", "0")  # `check` sets it
        for place, name in (
            (engine, "train"), (engine, "Cluster"), (check.validate, "check"), (check.report, "compile_report"),
            (bench, "_run_benchmarks"), (info, "environment"),
        ):  # fmt: skip
            patch.setattr(place, name, reached)
        yield


def run(arguments):
    """Exit status, stdout and stderr; status None if the command was about to work."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
        except Reached:
            status = None
    return status, out.getvalue(), err.getvalue()


def commands_of(parser):
    """Every command of the real parser: its words and its options."""
    for action in parser._actions:
        for name, child in action.choices.items() if isinstance(action.choices, dict) else ():
            for words, options in commands_of(child):
                yield [name, *words], options
    yield [], [action for action in parser._actions if action.option_strings and action.dest != "help"]


COMMANDS = list(commands_of(cli._parser()))
WORDS = [
    "",
    "-1", "0", "1", "2", "8", "17", "0.5", "nan", "inf", "-inf", "1e400", "1e-320", "9" * 30, "0x10", "1_000", "\u0661",
    " 3",
    "erm", "midpoint", "uniform", "cpu", "cuda:99", "meta", "float32", "float64", "int8", "digits", "mnist", "patch",
    "degree", "rho", "init_scale", "triton", "sm_90", "patch_conv", "a/b", "/dev/null/x", ".", "..", "--", "-", "é\n",
    "x" * 300,
    "sm_90,,", "1/2", "2/1", "out", "out.json", "\udcff", "%s", "{}", "'", "None", "True", "[1]",
]  # fmt: skip


@st.composite
def command_lines(draw):
    """A command with options of its own, mostly, and as many values as each takes, mostly."""
    words, options = draw(st.sampled_from(COMMANDS))
    line = list(words)
    word = st.sampled_from(WORDS) | st.text(st.characters(exclude_characters="\0"), max_size=8)
    good = st.sampled_from(["1", "2", "3", "10", "0.5", "0.1"])
    for _ in range(draw(st.integers(0, 4)) if options else 0):
        option = draw(st.sampled_from(options))
        line.append(draw(word) if draw(st.integers(0, 19)) == 0 else draw(st.sampled_from(option.option_strings)))
        count = {None: 1, "+": draw(st.integers(1, 3))}.get(option.nargs, option.nargs)
        count = draw(st.integers(0, 3)) if draw(st.integers(0, 19)) == 0 else count
        values = st.sampled_from(sorted(option.choices)) if option.choices else good
        line += draw(st.lists(draw(st.sampled_from([values, values, word])), min_size=count, max_size=count))
    return line


@pytest.mark.usefixtures("_idle")
@given(command_lines())
@example(["sweep", "--x", "num_classes", "1000000"])
@example(["reproduce", "theory", "--num-patches", "99999999999", "--out", "out"])
def test_command_lines(line):
    """Good ones come to their work or end well; all others are refused in one line, with nothing on stdout."""
    status, out, err = run(line)
    if status in (None, 0):
        return
    assert status == 2, (status, err)
    assert out == ""
    assert err.startswith("mixfeat")
    assert ": error: " in err
    assert err.count("\n") == 1 or "\n" in "".join(line), err
    assert "Traceback" not in err


# stored files


@st.composite
def damages(draw):
    """What may happen to the bytes of a file: a function from its content to another."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["bits", "bytes", "cut", "zeros", "moved", "longer", "random"]))

    def damaged(content):
        content = bytearray(content)
        place = generator.randrange(len(content) + 1)
        size = generator.choice([1, 2, 4, 16, 100, 512, 4096])
        if kind in ("bits", "bytes"):
            for _ in range(generator.choice([1, 1, 1, 5, 50])):
                at = generator.randrange(min(len(content), generator.choice([100, 4096, 10**9])))
                content[at] = (
                    content[at] ^ (1 << generator.randrange(8)) if kind == "bits" else generator.randrange(256)
                )
        elif kind == "cut":
            del content[place:]
        elif kind == "zeros":
            content[place : place + size] = bytes(len(content[place : place + size]))
        elif kind == "moved":
            content[place:place] = content[: size % (place + 1)]
        elif kind == "longer":
            content += generator.randbytes(size)
        else:
            content = generator.randbytes(generator.choice([0, 1, 100, 5000]))
        return bytes(content)

    return damaged


SETTINGS = {"lr": 0.5, "signal": [0.25, 0.5], "device": "cpu"}


class Stored:
    """The files of a results folder and their records; its text is short."""

    def __init__(self, files, records):
        self.files, self.records = files, records


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    records = {f"erm-seed-{i}": Record(i < 2, 10 * i + 1, i / 7, {"weight": torch.randn(9 * i)}) for i in range(4)}
    with Results(folder, "theory", SETTINGS) as results:
        for name, record in records.items():
            results.save(name, record)
    return Stored({path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}, records)


def same_record(a, b):
    return (
        a is not None
        and a[:3] == b[:3]
        and a.state.keys() == b.state.keys()
        and all(torch.equal(a.state[name], b.state[name]) for name in a.state)
    )


@given(damage=damages(), data=st.data())
def test_damaged_results(stored, damage, data, tmp_path):
    """Refused in one line that names the file, which is left as it was; or no record is lost or changed."""
    victim = data.draw(st.sampled_from(sorted(stored.files)))
    files = stored.files | {victim: damage(stored.files[victim])}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    message = None
    try:
        with Results(tmp_path, "theory", SETTINGS, resume=True) as results:
            found = {name: results.get(name) for name in stored.records}
    except ResultsError as error:
        message = str(error)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    if message is None:
        assert all(same_record(found[name], record) for name, record in stored.records.items())
    else:
        assert str(tmp_path) in message
        assert "\n" not in message
