"""Writes the committed results, and predictions, into README and docs/: tables between two markers, and a figure.

``python -m mixfeat.benchmarks.pages`` regenerates them from the documents in results/. Needs matplotlib.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from . import predicted
from .results import headline, load, tables

__all__ = ["FIGURE", "PAGES", "PREDICTED", "committed", "longest", "with_predictions", "with_tables"]

ROOT = Path(__file__).resolve().parents[1]
#: The figure, which shows the document of the most cases.
FIGURE = ROOT / "docs/benchmarks.png"
#: Pages, and what formats a document for them.
PAGES = {ROOT / "README.md": headline, ROOT / "docs/benchmarks.md": tables}


def committed() -> list[dict[str, Any]]:
    """Load the documents in results/."""
    return [load(path) for path in sorted((ROOT / "benchmarks/results").glob("bench-*.json"))]


def longest(documents: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the document of the most benchmarks."""
    return max(documents, key=lambda document: len(document["benchmarks"]))


#: The page of the predictions.
PREDICTED = ROOT / "docs/gpu.md"


def with_tables(page: Path, text: str, documents: Iterable[Mapping[str, Any]]) -> str:
    """Replace what stands between the markers in the text of one of ``PAGES`` by the documents' tables."""
    return _between_markers("benchmarks", page, text, "\n\n".join(PAGES[page](document) for document in documents))


def with_predictions(text: str, documents: Iterable[Mapping[str, Any]]) -> str:
    """Replace what stands between the markers in the text of ``PREDICTED`` by the table of predictions."""
    return _between_markers("predictions", PREDICTED, text, predicted.table(documents))


def _between_markers(name: str, page: Path, text: str, body: str) -> str:
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    found = re.search(f"{begin}.*?{end}", text, re.DOTALL)
    assert found, f"{page} has no markers for {name}"
    return text[: found.start()] + f"{begin}\n{body}\n\n{end}" + text[found.end() :]


def _main() -> None:
    from .plots import plot  # imports matplotlib, which the tables do without

    documents = committed()
    for page in PAGES:
        page.write_text(with_tables(page, page.read_text(), documents))
    PREDICTED.write_text(with_predictions(PREDICTED.read_text(), documents))
    plot(longest(documents), FIGURE)


if __name__ == "__main__":
    _main()
