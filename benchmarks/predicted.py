"""Predicted times on one H100 SXM: docs/gpu.md shows them, and a run on an H100 writes them beside its own."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .results import markdown, rows

__all__ = ["PREDICTIONS", "Prediction", "of", "rank", "table"]


_Range = tuple[float, float]


class Prediction(NamedTuple):
    """The predicted times of a call in microseconds, each from least to most.

    Attributes:
        benchmark: the benchmark that measures it, as pytest names it.
        operator, problem: names for a reader.
        mixfeat, torch_compile: the contenders' times.
        limit: the hardware's limit.
    """

    benchmark: str
    operator: str
    problem: str
    mixfeat: _Range
    torch_compile: _Range
    limit: float


def _network(suite: str, case: str, problem: str, ours: _Range, theirs: _Range, limit: float) -> Prediction:
    benchmark = f"test_{suite}.py::test_operator[{case}-forward + backward]"
    return Prediction(benchmark, f"`{suite}`", problem, ours, theirs, limit)


def _loss(case: str, problem: str, ours: _Range, theirs: _Range, limit: float) -> Prediction:
    benchmark = f"test_cross_entropy.py::test_mixup_cross_entropy[{case}-bfloat16-forward + backward]"
    return Prediction(benchmark, "`mixup_cross_entropy`", f"{problem} bfloat16", ours, theirs, limit)


_PATCHES, _PAIRS = "patch_conv", "pairwise_mixup_loss"
#: The least certain first, as `make gpu` times them.
PREDICTIONS = (
    _network(_PATCHES, "image-bfloat16", "(256,196,768,10,16) bfloat16", (72, 72), (105, 105), 55),
    _network(_PATCHES, "image-float32", "(256,196,768,10,16) float32", (470, 530), (750, 750), 150),
    _network(_PAIRS, "paper-10-float32", "(256,12,20,10,10) float32", (38, 45), (400, 400), 16),
    _network(_PAIRS, "paper-10-medium-float32", "(1024,12,20,10,10) float32", (460, 550), (3800, 3800), 260),
    _network(
        _PAIRS, "paper-10-large-float32", "(4096,12,20,10,10) float32", (6900, 8100), (41000, 41000), 4100
    ),
    _network(_PATCHES, "patches-bfloat16", "(8192,16,64,10,16) bfloat16", (30, 31), (90, 90), 14),
    _network(_PATCHES, "patches-float32", "(8192,16,64,10,16) float32", (126, 126), (235, 235), 49),
    Prediction(
        f"test_{_PAIRS}.py::test_training_step", f"`{_PAIRS}`", "a step of 128 networks (50,12,20,10,5) float32",
        (130, 150), (400, 500), 55,
    ),
    Prediction(
        "test_gradient_descent.py::test_runs[theory-12-midpoint-128]", "`gradient_descent`",
        "32 steps of 128 networks (50,12,20,10,5) float32", (2600, 2600), (12800, 16000), 1760,
    ),
    _loss("vocabulary-256", "(256,50257)", (24, 25), (30, 34), 17),
    _loss("imagenet", "(1024,1000)", (8, 8), (10, 12), 1.4),
    _loss("vocabulary", "(4096,50257)", (300, 380), (420, 540), 275),
    Prediction(
        "test_mixup.py::test_operator[imagenet-bfloat16-forward]", "`mixup`, forward",
        "(256,3,224,224) bfloat16", (56, 56), (70, 77), 51,
    ),
)  # fmt: skip


def rank(benchmark: str) -> int:
    """Return a benchmark's place among the predicted ones, or one after them; ``benchmark`` may begin with a folder."""
    names = [prediction.benchmark for prediction in PREDICTIONS]
    name = benchmark.rpartition("/")[2]
    return names.index(name) if name in names else len(names)


def of(benchmark: str, device: str) -> Prediction | None:
    """Return the prediction for a benchmark on a device, if there is one."""
    place = rank(benchmark)
    return PREDICTIONS[place] if "H100" in device and place < len(PREDICTIONS) else None


def _microseconds(timing: Mapping[str, float] | None) -> str:
    if timing is None:
        return ""
    time = 1e6 * timing["median"]
    return f"{time:,.0f}" if time >= 100 else f"{time:.3g}"


def table(documents: Iterable[Mapping[str, Any]] = ()) -> str:
    """Format the predictions in Markdown, beside what the documents of an H100 have measured."""
    measured: dict[tuple[Any, ...], dict[str, Any]] = {}
    for document in documents:
        if "H100" in document["machine_info"]["device"]:
            measured |= {(row["suite"], *row["predicted_us"]): row for row in rows(document) if "predicted_us" in row}
    head = ["operator", "shape", "predicted, us", "measured, us", "torch.compile predicted", "measured", "limit, us"]
    lines = []
    for prediction in PREDICTIONS:
        row = measured.get((prediction.operator.split("`")[1], *prediction.mixfeat), {"timings": {}})
        ours, theirs = (
            f"{low:,}" if low == high else f"{low:,} to {high:,}"
            for low, high in (prediction.mixfeat, prediction.torch_compile)
        )
        compiled = [row["timings"].get(name) for name in ("batched, compiled", "torch.compile")]
        mine, other = map(_microseconds, (row["timings"].get("mixfeat"), next(filter(None, compiled), None)))
        lines.append([prediction.operator, prediction.problem, ours, mine, theirs, other, f"{prediction.limit:,}"])
    return markdown([head, *lines])
