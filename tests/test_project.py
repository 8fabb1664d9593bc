"""What a repository has besides code: versions agree, workflows and hooks run the Makefile's commands."""

import re
import tomllib

import pytest
from conftest import ROOT

import mixfeat as mf

yaml = pytest.importorskip("yaml", reason="comes with pip install '.[test]'")
TARGETS = dict(re.findall(r"^([\w.-]+):(?!=)(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_version_is_the_newest_of_the_changes():
    release = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    citation = load("CITATION.cff")
    assert release == (citation["version"], citation["date-released"])
    assert citation["version"] == mf.__version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]


def test_workflow_runs_what_make_test_does():
    """And the documentation, the wheel, and the kernels on the oldest Triton."""
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    targets = set(job["strategy"]["matrix"]["target"])
    assert targets <= TARGETS.keys()
    recipe = (ROOT / "Makefile").read_text().partition("\ntest: ")[2].partition("\n\n")[0]
    wanted = set(re.findall(r"test-[\w-]+", recipe)) | {"lint", "docs", "wheel", "test-triton-3.6"}
    assert len(wanted) == 8
    assert wanted == targets


def test_hooks_are_tools_of_the_environment():
    """At the versions that `make lint` runs, so that both agree."""
    constraints = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: hook["entry"].split() for hook in repository["hooks"]}
    assert list(hooks) == ["ruff", "ruff-format", "codespell", "mypy"]
    for command, *arguments in hooks.values():
        if command == "make":
            assert arguments[0] in TARGETS
        else:
            assert command.removeprefix(".venv/bin/") in constraints


def test_bug_form_asks_for_the_facts():
    forms = {name: load(f".github/ISSUE_TEMPLATE/{name}.yml") for name in ("bug", "feature")}
    for form in forms.values():
        assert {"name", "description", "body"} <= form.keys()
    required = [f for f in forms["bug"]["body"] if f.get("validations", {}).get("required")]
    assert any("`mixfeat info`" in field["attributes"]["label"] for field in required)
