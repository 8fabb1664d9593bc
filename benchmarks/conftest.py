"""Order and isolation of the benchmarks."""

from collections import Counter

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Suites take turns, each from its most telling case on: so little is missing where the time runs out."""
    seen: Counter[str] = Counter()
    places = {}
    for item in items:
        suite = item.nodeid.split("::")[0]
        places[item] = seen[suite]
        seen[suite] += 1
    items.sort(key=places.__getitem__)


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """Else what torch.compile has seen before would make it give up on shapes, and in the end on compiling."""
    torch.compiler.reset()
