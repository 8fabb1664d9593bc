"""Results of the benchmarks: pytest-benchmark's JSON, cases in words and in tables, comparison of two documents."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "GROWTH", "about", "compare", "describe", "fingerprint", "headline", "load", "markdown", "of_limit", "rates",
    "ratios", "rows", "tables",
]  # fmt: skip

#: Keys of a document.
KEYS = ("machine_info", "commit_info", "datetime", "benchmarks")
#: What names a case.
CASE = ("suite", "case", "direction", "dtype")
#: A row with this direction, followed by the name of a dimension, has an exponent among its figures.
GROWTH = "growth with "
#: Cases of the README: suite, name of the shape, dtype; the best and the worst are among them.
HEADLINE = (
    ("pairwise_mixup_loss", "paper-10", "float32"),
    ("pairwise_mixup_loss", "paper-10-large", "float32"),
    ("patch_conv", "paper-10-large", "float32"),
    ("patch_conv", "image", "bfloat16"),
    ("mixup", "imagenet", "float32"),
    ("cutmix", "imagenet", "float32"),
    ("mixup_cross_entropy", "imagenet", "float32"),
    ("mixup", "tiny", "float32"),
)


def load(path: Path) -> dict[str, Any]:
    """Load a document of results.

    Raises:
        ValueError: the file cannot be read or holds something else; the message names it and says why.
    """
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    missing = [key for key in KEYS if key not in document] if isinstance(document, dict) else list(KEYS)
    if not missing and "mixfeat" not in document["machine_info"]:
        missing = ["mixfeat's version"]
    if missing:
        raise ValueError(f"{path} holds no results of `mixfeat bench`: it lacks {', '.join(missing)}")
    return document


def rows(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gather the contenders of each case into one row.

    A row has what names the case (``suite``, ``case``, ``direction``, ``dtype``); by contender its ``timings``
    (``q1``, ``median``, ``q3`` of its seconds), medians in other modes (``also``) and ``peak_bytes``; and what
    the first contender's ``extra_info`` says of all of them.
    """
    found: dict[str, dict[str, Any]] = {}
    empty: dict[str, Any]
    for bench in document["benchmarks"]:
        params, info = bench["params"], dict(bench["extra_info"])
        empty = {"timings": {}, "also": {}, "peak_bytes": {}, "work": {}, "limit": None, "figures": {}, "missing": {}}
        row = found.setdefault(bench["group"], {name: params[name] for name in CASE} | empty)
        name = params["contender"]
        row["timings"][name] = {quantile: bench["stats"][quantile] for quantile in ("q1", "median", "q3")}
        for mode, seconds in info.pop("also", {}).items():
            row["also"].setdefault(mode, {})[name] = seconds
        if "peak_bytes" in info:
            row["peak_bytes"][name] = info.pop("peak_bytes")
        del info["ratio"]
        row |= info
    return list(found.values())


def about(document: Mapping[str, Any]) -> str:
    """Name the device, date and version of the results."""
    machine = document["machine_info"]
    where = f"{machine['device']}, PyTorch {machine['torch']}"
    where += f", Triton {machine['triton']}" if machine["GPUs"] else ""
    return f"{where}; {document['datetime'][:10]}, mixfeat {machine['mixfeat']} at {document['commit_info']['id'][:10]}"


def fingerprint(document: Mapping[str, Any]) -> str:
    """Hash a document; equal documents have equal fingerprints."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def ratios(row: Mapping[str, Any]) -> dict[str, float]:
    """Divide the median time of each baseline by mixfeat's."""
    times = row["timings"]
    return {name: time["median"] / times["mixfeat"]["median"] for name, time in times.items() if name != "mixfeat"}


def of_limit(row: Mapping[str, Any]) -> float | None:
    """Divide the limit's time by mixfeat's median: the share of the limit's rate that mixfeat reaches.

    It exceeds 1 if mixfeat is faster than the measurement that defines the limit. None for a row without a limit.
    """
    return row["limit"]["seconds"] / row["timings"]["mixfeat"]["median"] if row["limit"] else None


def rates(row: Mapping[str, Any]) -> dict[str, float]:
    """Divide each amount of work by mixfeat's median time: "evaluations/s", "FLOP/s", "bytes/s"."""
    return {f"{unit}/s": amount / row["timings"]["mixfeat"]["median"] for unit, amount in row["work"].items()}


def describe(row: Mapping[str, Any]) -> str:
    """Write a row in one line."""
    parts = [f"{row['suite']} {row['case']} {row['direction']} {row['dtype']}:"]
    if "mixfeat" in row["timings"]:
        parts.append(f"{row['timings']['mixfeat']['median'] * 1e3:.3g} ms")
        parts += [f"{name} {ratio:.2f}x" for name, ratio in ratios(row).items()]
        parts += [_rate(unit, value) for unit, value in rates(row).items()]
    share = of_limit(row)
    if share is not None:
        parts.append(f"{share:.0%} of {row['limit']['name']}")
    for mode, times in row["also"].items():
        parts.append(f"{mode}: {times['mixfeat'] * 1e3:.3g} ms")
    peaks = row["peak_bytes"]
    if peaks:
        parts.append("peak " + ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in peaks.items()))
    if "predicted_us" in row:
        parts.append("predicted " + " to ".join(f"{time / 1e3:.3g}" for time in row["predicted_us"]) + " ms")
    for name, value in row["figures"].items():
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    parts += [f"without {name}: {reason}" for name, reason in row["missing"].items()]
    return "  ".join(parts)


def _rate(unit: str, value: float) -> str:
    short = {"bytes/s": "GB/s", "FLOP/s": "GFLOP/s"}
    return f"{value / 1e9:.3g} {short[unit]}" if unit in short else f"{value / 1e9:.3g}e9 {unit}"


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in CASE)


def compare(new: Mapping[str, Any], old: Mapping[str, Any], min_ratio: float = 1.05) -> list[str]:
    """List the rows that have become slower beyond noise, one line each.

    A row counts if mixfeat's median is more than ``min_ratio`` times the old one, and its first quartile lies above the
    old third one.

    Raises:
        ValueError: the documents come from different devices.
    """
    ours, theirs = (document["machine_info"]["device"] for document in (new, old))
    if ours != theirs:
        raise ValueError(f"results must be of one device, got {ours} and {theirs}")
    before = {_key(row): row["timings"].get("mixfeat") for row in rows(old)}
    lines = []
    for row in rows(new):
        then, now = before.get(_key(row)), row["timings"].get("mixfeat")
        if then and now and now["q1"] > then["q3"] and now["median"] > min_ratio * then["median"]:
            ms, before_ms = 1e3 * now["median"], 1e3 * then["median"]
            lines.append(f"{' '.join(_key(row))}: {before_ms:.3g} ms -> {ms:.3g} ms ({ms / before_ms:.2f}x)")
    return lines


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def headline(document: Mapping[str, Any]) -> str:
    """Format ``HEADLINE`` in Markdown: a row per case, with gradients if they are timed, against the best baseline."""
    head = ["operator", "problem", "time, ms", "best baseline", "speedup over it", "share of the limit"]
    order, body = ["forward + backward", "forward"], []
    for suite, name, dtype in HEADLINE:
        chosen = [
            row for row in rows(document)
            if (row["suite"], row["case"].split(" (")[0], row["dtype"]) == (suite, name, dtype)
            and row["direction"] in order and _contested(row)
        ]  # fmt: skip
        for row in sorted(chosen, key=lambda row: order.index(row["direction"]))[:1]:
            other, ratio = min(ratios(row).items(), key=lambda item: item[1])
            share = of_limit(row)
            time = f"{row['timings']['mixfeat']['median'] * 1e3:.3g}"
            of_it = f"{share:.0%} of" if share and share <= 1 else "faster than"  # a copy must find its memory first
            limit = f"{of_it} {row['limit']['name']}" if share else ""
            body.append([f"`{suite}`", _name(row), time, other, f"{ratio:.1f}x", limit])
    return f"{about(document)}.\n\n{markdown([head, *body])}"


def tables(document: Mapping[str, Any]) -> str:
    """Format a document in Markdown: a table per operator, and tables of other figures."""
    everything = rows(document)
    parts = [f"{about(document)}."]
    parts[0] += "".join(f" Caches are {mode}." for mode in {row.get("cache") for row in everything} - {None})
    timed = [row for row in everything if _contested(row)]
    shown = set()  # rows whose figures are columns
    for suite in dict.fromkeys(row["suite"] for row in timed):
        chosen = [row for row in timed if row["suite"] == suite]
        baselines = list(dict.fromkeys(name for row in chosen for name in ratios(row)))
        limit = next((row["limit"]["name"] for row in chosen if row["limit"]), None)
        figures = _shared_figures(chosen)
        shown |= {id(row) for row in chosen if {*row["figures"]} <= {*figures}}
        head = [f"`{suite}`", "mixfeat, ms", *(f"over {name}" for name in baselines)]
        head += [f"of {limit}"] if limit else []
        head += figures
        memory = any(row["peak_bytes"] for row in chosen)
        head += ["memory, MiB", "of the least other"] if memory else []
        body = []
        for row in chosen:
            found, share = ratios(row), of_limit(row)
            cells = [_name(row), f"{row['timings']['mixfeat']['median'] * 1e3:.3g}"]
            cells += [f"{found[name]:.1f}x" if name in found else "" for name in baselines]
            cells += [f"{share:.0%}" if share else ""] if limit else []
            cells += [_figure(name, row["figures"].get(name)) for name in figures]
            cells += _memory(row["peak_bytes"]) if memory else []
            body.append(cells)
        parts.append(markdown([head, *body]))
        absent = {name: reason for row in chosen for name, reason in row["missing"].items() if name not in baselines}
        parts.append("\n".join(f"- without {name}: {reason}" for name, reason in absent.items()))
    growth = [row for row in everything if row["direction"].startswith(GROWTH)]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in everything:
        if row["figures"] and row not in growth and id(row) not in shown:
            groups.setdefault((row["suite"], *row["figures"]), []).append(row)
    for (suite, *names), group in groups.items():
        body = [[_name(row), *(_figure(name, row["figures"][name]) for name in names)] for row in group]
        parts.append(markdown([[f"`{suite}`", *names], *body]))
    return "\n\n".join(part for part in parts if part)


def _contested(row: Mapping[str, Any]) -> bool:
    """Return whether mixfeat is timed against baselines, and not parts of it against each other."""
    return "mixfeat" in row["timings"] and len(row["timings"]) > 1


def _shared_figures(chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the figures that most rows of a table have."""
    names = dict.fromkeys(name for row in chosen for name in row["figures"])
    return [name for name in names if sum(name in row["figures"] for row in chosen) > len(chosen) / 2]


def _figure(name: str, value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0%}" if name.startswith("of ") else f"{value:.3g}"
    return "" if value is None else str(value)


def _memory(peaks: Mapping[str, int]) -> list[str]:
    """Format mixfeat's peak and the least of the others."""
    others = [size for name, size in peaks.items() if name != "mixfeat"]
    return [f"{size / 2**20:.1f}" for size in (peaks["mixfeat"], min(others))] if others else ["", ""]


def _name(row: Mapping[str, Any]) -> str:
    """Name a row within its operator's table; on a GPU, where graphs are the rule, mention plain launches."""
    case = re.sub(r"\([\d, ]+\)", lambda shape: shape[0].replace(" ", ""), row["case"])  # (2,3), as in all pages
    launches = "no graph" if row.get("cache") == "cold" and not row["graph"] else ""
    return ", ".join(filter(None, (case, row["direction"], row["dtype"].replace("float32", ""), launches)))
