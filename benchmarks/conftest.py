"""Order and isolate the benchmarks."""

from collections import Counter

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interleave the suites, each from its most telling case on, so that a run cut short has covered what matters."""
    seen: Counter[str] = Counter()
    positions = {}
    for item in items:
        suite = item.nodeid.split("::")[0]
        positions[item] = seen[suite]
        seen[suite] += 1
    items.sort(key=positions.__getitem__)


@pytest.fixture(autouse=True)
def _reset_compiler() -> None:
    """Forget earlier compilations, which would make torch.compile generalise shapes and finally give up."""
    torch.compiler.reset()
