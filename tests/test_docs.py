"""Every Python block of README and docs/ runs; the blocks of a page follow each other, as a reader would type them."""

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, run_python):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    output = run_python("\n".join(blocks))
    if page.name == "README.md":
        assert output.startswith("tensor([")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not re.match(r"https?://", link):
            assert (page.parent / link.partition("#")[0]).exists(), link
