"""Results of the benchmarks: one JSON document per device, its tables in README and docs/, and what has become slower.

``python -m mixfeat.benchmarks.results`` writes the tables anew from the documents in results/, and their figure.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "FIGURE", "PAGES", "ROOT", "Timing", "committed", "compare", "describe", "fingerprint", "load", "markdown",
    "of_limit", "rates", "ratios", "tables", "with_tables",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
#: of the first document
FIGURE = ROOT / "docs/benchmarks.png"
#: that have the figure and the tables; whether only a selection of them
PAGES = {ROOT / "README.md": True, ROOT / "docs/benchmarks.md": False}
#: what a document must have beside its rows
KEYS = ("version", "commit", "device", "torch", "triton", "date", "rows")


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: quantiles over its turns."""

    p20: float
    p50: float
    p80: float


def load(path: Path) -> dict[str, Any]:
    """A document of results.

    Raises:
        ValueError: the file cannot be read, or is none; the message names it and says why.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    missing = [key for key in KEYS if key not in document] if isinstance(document, dict) else list(KEYS)
    if missing:
        raise ValueError(f"{path} holds no results of `mixfeat bench`: it lacks {', '.join(missing)}")
    return document


def fingerprint(document: Mapping[str, Any]) -> str:
    """What tells this document from all others."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """How many times as long as mixfeat each baseline takes, by medians."""
    times = row["timings"]
    return {name: time["p50"] / times["mixfeat"]["p50"] for name, time in times.items() if name != "mixfeat"}


def of_limit(row: Mapping[str, Any]) -> float | None:
    """The share of the limit's rate that mixfeat reaches; above 1 where the limit's own measure is slower."""
    return row["limit"]["seconds"] / row["timings"]["mixfeat"]["p50"] if row["limit"] else None


def rates(row: Mapping[str, Any]) -> dict[str, float]:
    """What mixfeat does of each kind of work in a second, by its median: "evaluations/s", "FLOP/s", "bytes/s"."""
    if not row["timings"]:
        return {}
    return {f"{unit}/s": amount / row["timings"]["mixfeat"]["p50"] for unit, amount in row["work"].items()}


def describe(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    parts = [f"{row['suite']} {row['case']} {row['direction']} {row['dtype']}:"]
    if row["timings"]:
        parts.append(f"{row['timings']['mixfeat']['p50'] * 1e3:.3g} ms")
        parts += [f"{name} {ratio:.2f}x" for name, ratio in ratios(row).items()]
        parts += [_rate(unit, value) for unit, value in rates(row).items()]
    share = of_limit(row)
    if share is not None:
        parts.append(f"{share:.0%} of {row['limit']['name']}")
    for mode, times in row.get("also", {}).items():
        parts.append(f"{mode}: {times['mixfeat'] * 1e3:.3g} ms")
    peaks = row["peak_bytes"]
    if peaks:
        parts.append("peak " + ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in peaks.items()))
    for name, value in row["figures"].items():
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return "  ".join(parts)


def _rate(unit: str, value: float) -> str:
    short = {"bytes/s": "GB/s", "FLOP/s": "GFLOP/s"}
    return f"{value / 1e9:.3g} {short[unit]}" if unit in short else f"{value / 1e9:.3g}e9 {unit}"


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("suite", "case", "direction", "dtype"))


def compare(new: Mapping[str, Any], old: Mapping[str, Any], least: float = 1.05) -> list[str]:
    """What has become slower beyond noise, one line each.

    That is what takes at least ``least`` times as long by its median, and of which a fast turn (the 20% quantile) takes
    longer now than a slow one (80%) took before.

    Raises:
        ValueError: the two are of different devices.
    """
    if new["device"] != old["device"]:
        raise ValueError(f"results compare only on one device: {new['device']} here, {old['device']} there")
    before = {_key(row): row["timings"].get("mixfeat") for row in old["rows"]}
    lines = []
    for row in new["rows"]:
        then, now = before.get(_key(row)), row["timings"].get("mixfeat")
        if then and now and now["p20"] > then["p80"] and now["p50"] > least * then["p50"]:
            ratio = now["p50"] / then["p50"]
            lines.append(
                f"{' '.join(_key(row))}: {then['p50'] * 1e3:.3g} ms -> {now['p50'] * 1e3:.3g} ms ({ratio:.2f}x)"
            )
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def tables(document: Mapping[str, Any], *, brief: bool = False) -> str:
    """A table per operator, one of exponents of growth, and the other figures as a list, in Markdown.

    ``brief`` leaves one row of each case that is timed: of float32, forward and backward, if there is such.
    """
    where = f"{document['device']}, PyTorch {document['torch']}"
    where += f", Triton {document['triton']}" if document["triton"] else ""
    parts = [f"{where}; {document['date']}, mixfeat {document['version']} at {document['commit'][:10]}."]
    everything = _selected(document["rows"]) if brief else document["rows"]
    parts[0] += "".join(f" Caches are {mode}." for mode in {row.get("cache") for row in everything} - {None})
    timed = [row for row in everything if len(row["timings"]) > 1]
    for suite in dict.fromkeys(row["suite"] for row in timed):
        rows = [row for row in timed if row["suite"] == suite]
        baselines = list(dict.fromkeys(name for row in rows for name in ratios(row)))
        limit = next((row["limit"]["name"] for row in rows if row["limit"]), None)
        head = [f"`{suite}`", "mixfeat", *(f"over {name}" for name in baselines)]
        head += [f"of {limit}"] if limit else []
        memory = any(row["peak_bytes"] for row in rows)
        head += ["memory, of the least other"] if memory else []
        body = []
        for row in rows:
            found, share = ratios(row), of_limit(row)
            cells = [_name(row), f"{row['timings']['mixfeat']['p50'] * 1e3:.3g} ms"]
            cells += [f"{found[name]:.1f}x" if name in found else "" for name in baselines]
            cells += [f"{share:.0%}" if share else ""] if limit else []
            cells += [_memory(row["peak_bytes"])] if memory else []
            body.append(cells)
        parts.append(markdown([head, *body]))
    growth = [row for row in everything if row["direction"].startswith(_GROWTH)]
    parts.append(_exponents(growth) if growth else "")
    others = [row for row in everything if row["figures"] and row not in growth]
    parts.append("\n".join(f"- {_figures(row)}" for row in others))
    return "\n\n".join(part for part in parts if part)


def _selected(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each case that is timed one row; and all that are not."""
    order = ["forward + backward", "training step", "forward"]
    timed = [row for row in rows if row["timings"] and row["direction"] in order]
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in sorted(timed, key=lambda row: (row["dtype"] != "float32", order.index(row["direction"]))):
        first.setdefault((row["suite"], row["case"]), row)
    return [row for row in rows if row not in timed or row in first.values()]


def _memory(peaks: Mapping[str, int]) -> str:
    others = [size for name, size in peaks.items() if name != "mixfeat"]
    return f"{peaks['mixfeat'] / 2**20:.1f} of {min(others) / 2**20:.1f} MiB" if others else ""


_GROWTH = "growth with "


def _exponents(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the growth of time, by operator and by what grows."""
    found = {(row["suite"], row["direction"].removeprefix(_GROWTH)): row["figures"]["exponent"] for row in rows}
    suites, names = (list(dict.fromkeys(key)) for key in zip(*found, strict=True))
    body = [
        [f"`{suite}`", *(f"{found[suite, n]:.2f}" if (suite, n) in found else "" for n in names)] for suite in suites
    ]
    return markdown([["time grows with the power", *names], *body])


def _name(row: Mapping[str, Any]) -> str:
    """Of a row in its operator's table: a device's plain launches are named, where graphs are the rule."""
    launches = "no graph" if row.get("cache") == "cold" and not row["graph"] else ""
    return ", ".join(filter(None, (row["case"], row["direction"], row["dtype"].replace("float32", ""), launches)))


def _figures(row: Mapping[str, Any]) -> str:
    texts = [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row["figures"].items()
    ]
    return f"`{row['suite']}`, {_name(row)}: {', '.join(texts)}"


def with_tables(page: Path, text: str, documents: Iterable[Mapping[str, Any]]) -> str:
    """The text of one of ``PAGES`` with the figure and the tables of these documents between its two markers."""
    begin, end = "<!-- benchmarks -->\n", "<!-- end of benchmarks -->"
    found = re.search(f"{begin}.*?{end}", text, re.DOTALL)
    assert found, f"{page} has no place for the tables"
    figure = FIGURE.relative_to(page.parent)
    alt = "Times, memory, shares of the limits, roofline and growth of all operators"
    body = "\n\n".join([f"![{alt}]({figure})", *(tables(document, brief=PAGES[page]) for document in documents)])
    return text[: found.start()] + f"{begin}\n{body}\n\n{end}" + text[found.end() :]


def committed() -> list[dict[str, Any]]:
    """The documents in results/; the figure is of the first."""
    return [load(path) for path in sorted((ROOT / "benchmarks/results").glob("bench-*.json"))]


def _main() -> None:
    from .plots import plot  # which needs matplotlib

    documents = committed()
    for page in PAGES:
        page.write_text(with_tables(page, page.read_text(), documents))
    plot(documents[0], FIGURE)


if __name__ == "__main__":
    _main()
