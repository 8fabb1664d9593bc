"""Writes the committed results into README and docs/: tables between two markers, and a figure.

``python -m mixfeat.benchmarks.pages`` regenerates them from the documents in results/. Needs matplotlib.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .results import headline, load, tables

__all__ = ["FIGURE", "PAGES", "committed", "with_tables"]

ROOT = Path(__file__).resolve().parents[1]
#: The figure, which shows the first document.
FIGURE = ROOT / "docs/benchmarks.png"
#: Pages, and what formats a document for them.
PAGES = {ROOT / "README.md": headline, ROOT / "docs/benchmarks.md": tables}


def committed() -> list[dict[str, Any]]:
    """Load the documents in results/."""
    return [load(path) for path in sorted((ROOT / "benchmarks/results").glob("bench-*.json"))]


def with_tables(page: Path, text: str, documents: Iterable[Mapping[str, Any]]) -> str:
    """Replace what stands between the markers in the text of one of ``PAGES`` by the documents' tables."""
    begin, end = "<!-- benchmarks -->\n", "<!-- end of benchmarks -->"
    found = re.search(f"{begin}.*?{end}", text, re.DOTALL)
    assert found, f"{page} has no markers for the tables"
    body = "\n\n".join(PAGES[page](document) for document in documents)
    return text[: found.start()] + f"{begin}\n{body}\n\n{end}" + text[found.end() :]


def _main() -> None:
    from .plots import plot  # imports matplotlib, which the tables do without

    documents = committed()
    for page in PAGES:
        page.write_text(with_tables(page, page.read_text(), documents))
    plot(documents[0], FIGURE)


if __name__ == "__main__":
    _main()
