"""README and docs/: every Python block runs, every command and link is right, and the site builds without a warning."""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT

import mixfeat as mf
from mixfeat import cli
from mixfeat.experiments import images, sweep, theory

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def having(language):
    pages = [page for page in PAGES if blocks(page, language)]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


@having("python")
def test_examples_run(page, run_python):
    """The blocks of a page follow each other, as a reader would type them."""
    code = "\n".join(blocks(page, "python"))
    if page.parent.name == "operators":  # their examples change nothing in this process
        exec(code, {})
        return
    output = run_python(code)
    if page.name == "README.md":
        assert output.startswith("tensor([")


def anchors(page):
    """Name a page's headings as GitHub and MyST do."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@having("console")
def test_commands_exist(page):
    """Every line after a prompt is one that mixfeat's parser, the Makefile or the package's extras know."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line[2:] for block in blocks(page, "console") for line in block.splitlines() if line.startswith("$ ")]
    assert lines
    for line in lines:
        words = shlex.split(re.sub(r"^(\w+=\S+ )+", "", line), comments=True)  # without variables set before it
        if "-m" in words:  # of python or torchrun
            words = words[words.index("-m") + 1 :]
        if words[0] == "mixfeat":
            cli._parser().parse_args(words[1:])  # exits, and so fails, where it refuses
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), line
        else:
            assert words[:2] in (["pip", "install"], ["pip", "wheel"]), line
            named = re.findall(r"\[([\w,]+)\]", line)
            assert {extra for group in named for extra in group.split(",")} <= set(extras), line


def test_every_setting_of_the_experiments_is_described(capsys):
    """By the help of its command, with its default; the page has those that the results depend on."""
    for command, kind in (("theory", theory.Settings), ("images", images.Settings)):
        with pytest.raises(SystemExit):
            cli.main(["reproduce", command, "--help"])
        options = capsys.readouterr().out.partition("\noptions:")[2].replace("\n                       ", "")
        for setting in kind.__dataclass_fields__.values():
            option = f"--{setting.name.replace('_', '-')}"
            (line,) = (line for line in options.splitlines() if line.split()[:1] == [option])
            default = str(setting.default).strip("()")
            assert f"(default: {default})" in line if setting.default is not None else "default: " in line, line
    text = (DOCS / "experiments.md").read_text()
    for name, value in sweep.DEFAULTS.items():
        assert f"{value} {name}" in text


def test_results_are_described():
    """Every field of the committed results, and every column of the reports, is on the page that explains them."""
    text = (DOCS / "check-and-bench.md").read_text()
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        document = json.loads(path.read_text())
        places = [row[name] for row in document["benchmarks"] for name in ("params", "extra_info")]
        for field in {*document, *document["benchmarks"][0], *(name for place in places for name in place)} - {"note"}:
            assert f"`{field}`" in text, field


def test_commands_of_the_reference_are_all_there():
    """Each command of mixfeat is shown on some page."""
    shown = " ".join(line for page in PAGES for block in blocks(page, "console") for line in block.splitlines())
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command in commands.choices:
        assert f"$ mixfeat {command}" in shown, command


def test_reference_lists_every_public_name():
    """In the first column of a table, there or on the page of the operators and activations."""
    lines = [line for page in ("api.md", "operators.md") for line in (DOCS / page).read_text().splitlines()]
    cells = [line.split("|")[1] for line in lines if line.startswith("|")]
    listed = {name.rpartition(".")[2] for cell in cells for name in re.findall(r"`([\w.]+)(?:\([\w, =]*\))?`", cell)}
    modules = {"backends", "data", "features", "functional", "nn"}
    results = {name for name in mf.data.__all__ if name.endswith("Data")}  # named beside what draws them
    public = {*mf.__all__, *mf.data.__all__, *mf.features.__all__} - results - {"__version__"}
    assert listed - modules == public - modules | {"Activation", "available", "describe", "serving"}


def test_site_builds(tmp_path):
    """Without a warning, so no broken link or reference inside, no formula that is no TeX; readable without network."""
    pytest.importorskip("myst_parser", reason="needs pip install --group docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "doctrees", DOCS, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "reference.html").read_text()
    for name in ("mixfeat.pairwise_mixup_loss", "mixfeat.TwoLayerPatchCNN", "mixfeat.data.multi_view"):
        assert f'id="{name}"' in reference
    pages = [tmp_path / "operators.html", *(tmp_path / "operators").glob("*.html")]
    assert sum(page.read_text().count("<math") for page in pages) > 100
    for page in tmp_path.rglob("*.html"):
        assert not re.search(r"""(src|<link[^>]+href)=["']?https?:""", page.read_text()), page.name
