"""The Triton kernels of the all-pairs Mixup loss against the formulas in float64, called as the operator calls it.

See triton_checks.
"""

from dataclasses import replace
from functools import partial
from unittest import mock

import pytest
import torch
from triton_checks import DEVICE, HALF, NAN, ordered_accesses, poisoned, running, shuffled_programs

from mixfeat.activations import Identity, PolyReLU, Power, PowerReLU, ReLU


def run(row, column, row_target, column_target, lam, weight, activation, need_grad=True, **options):
    """The loss and those gradients that there are, from the kernels."""
    from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss

    with poisoned():
        results = pairwise_mixup_loss(
            row, column, row_target, column_target, lam, weight, activation.polynomial, need_grad, **options
        )
    readout = options.get("readout")
    shapes = [
        row.shape[:1],
        row.shape if need_grad else None,
        column.shape if need_grad and column is not None else None,
        (len(row), *readout.shape[1:]) if options.get("need_readout") else None,
    ]
    assert [None if result is None else result.shape for result in results] == shapes
    results = [result for result in results if result is not None]
    assert all(result.dtype == torch.float32 for result in results)
    return results


def expected(row, column, row_target, column_target, lam, weight, activation, dtype=torch.float64):
    """The same from the formulas, by autograd."""
    row = row.detach().to(dtype).requires_grad_()
    leaves = [row] if column is None else [row, column.detach().to(dtype).requires_grad_()]
    column = leaves[-1]
    column_target = row_target if column_target is None else column_target
    loss = row.new_zeros(row.shape[0])
    for node, node_weight in zip(lam, weight, strict=True):
        t = node * row[:, :, None] + (1 - node) * column[:, None]
        log_p = activation(t).sum((3, 5)).log_softmax(-1)  # (R,N,N',C)
        own, other = log_p[..., row_target], log_p[..., column_target]  # (R,N,N',N) and (R,N,N',N')
        own, other = own.diagonal(dim1=1, dim2=3), other.diagonal(dim1=2, dim2=3)
        loss = loss - node_weight * (node * own.sum((1, 2)) + (1 - node) * other.sum((1, 2)))
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def errors(results, truth):
    """Relative errors in the 2-norm: of the loss and of each gradient."""
    return [((r.double() - t).norm() / t.norm()).item() for r, t in zip(results, truth, strict=True)]


def problem(shape, activation, lam=(0.5,), dtype=torch.float32):
    """Random arguments of shape (R,N,N',P,C,M), N' None for the rows as columns; all parts of phi are met."""
    runs, rows, columns, patches, classes, filters = shape
    row, column = (
        None if n is None else (torch.randn(runs, n, patches, classes, filters, device=DEVICE) * 0.2).to(dtype)
        for n in (rows, columns)
    )
    row_target, column_target = (
        None if n is None else torch.randint(classes, (n,), device=DEVICE) for n in (rows, columns)
    )
    weight = tuple((k + 1) / rows / (columns or rows) for k in range(len(lam)))
    return row, column, row_target, column_target, lam, weight, activation


def errors_of(arguments, truth, deterministic, **options):
    """Of what the kernels make of the arguments, with deterministic algorithms or without."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        return errors(run(*arguments, **options), truth)
    finally:
        torch.use_deterministic_algorithms(False)


def check_accuracy(shape, activation, lam=(0.5,), dtype=torch.float32, deterministic=False):
    arguments = problem(shape, activation, lam, dtype)
    truth = expected(*arguments)
    found = errors_of(arguments, truth, deterministic)
    if dtype == torch.float32:
        tolerances = [1e-5] * len(found)
    else:
        tolerances = [2 * error for error in errors(expected(*arguments, dtype=dtype), truth)]
    assert all(e <= t for e, t in zip(found, tolerances, strict=True)), f"errors {found} over {tolerances}"


def check_options(columns, lam, deterministic, runs, **options):
    """Labels of their own share, smoothed, pairs that do not count, and a second layer, of each run or of all."""
    from mixfeat.ops import fallback

    arguments = problem((2, 18, columns, 2, 3, 2), PolyReLU(8, 0.3), lam)
    readout = torch.randn(runs, 3, 2, device=DEVICE)
    doubles = (t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in arguments[:-1])
    truth = fallback.pairwise_mixup_block(*doubles, arguments[-1].polynomial, True, **options, readout=readout.double())
    found = errors_of(
        arguments, [t for t in truth if t is not None], deterministic, **options, readout=readout, need_readout=True
    )
    assert max(found) <= 1e-5, found


def check_repeats(shape, lam):
    """Without atomics: the same bits in any order of programs, and those of the loss alone."""
    arguments = problem(shape, PolyReLU(8, 0.3), lam)
    torch.use_deterministic_algorithms(True)
    try:
        first, (loss,) = run(*arguments), run(*arguments, need_grad=False)
        with shuffled_programs():
            second = run(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], loss)


def check_strides(dtype):
    """Results for tensors of any layout are those for their contiguous copies, to the bit."""
    row, column, *rest = problem((2, 5, 4, 2, 2, 1), PolyReLU(8, 0.3), (0.3,), dtype)
    layouts = [
        (
            row.permute(4, 2, 0, 3, 1).contiguous().permute(2, 4, 1, 3, 0),
            column.transpose(1, 3).contiguous().transpose(1, 3),
        ),
        (torch.cat([row, row], -1)[..., 1:], column[:, ::2].repeat_interleave(2, 1)),
        (row[:1, :1].expand_as(row), column[..., :1].expand_as(column)),
    ]
    for row, column in layouts:
        same = run(row.contiguous(), column.contiguous(), *rest)
        assert all(torch.equal(a, b) for a, b in zip(run(row, column, *rest), same, strict=True))


def check_target(target, columns):
    """A target out of range: NaN, and nothing read outside memory."""
    arguments = problem((2, 5, columns, 2, 3, 2), PolyReLU(8, 0.3), (0.3,))
    arguments[2 if columns is None else 3][1] = target
    loss, *grads = run(*arguments)
    assert loss.isnan().all()
    assert all(grad.isnan().any() for grad in grads)


def check_not_finite(value, activation):
    """Shows in the loss of its network, and not in that of another."""
    arguments = problem((2, 5, None, 2, 3, 2), activation)
    arguments[0][1, 2, 1, 0, 1] = value
    loss, grad = run(*arguments)
    assert loss[0].isfinite()
    assert grad[0].isfinite().all()
    assert not loss[1].isfinite()


def check_ordered_accesses(activation, columns, lam):
    """The softmax works in place, and gradients without atomics are added to those of other nodes."""
    torch.use_deterministic_algorithms(True)
    try:
        with ordered_accesses():
            run(*problem((2, 20, columns, 1, 2, 2), activation, lam))
    finally:
        torch.use_deterministic_algorithms(False)


def check_far_from_zero(dtype):
    """Pre-activations of thousands of thresholds, logits whose exponentials no float holds and whose last bit tells.

    That bit alone may put a single draw 2e-5 off, in PyTorch too, so errors are those of several.
    """
    for factor in (1e2, 1e4):
        found, truth = [], []
        for _ in range(8):
            row, *rest = problem((1, 9, None, 2, 3, 2), PolyReLU(8, 0.1), dtype=dtype)
            found.append(run(row * factor, *rest))
            truth.append(expected(row * factor, *rest))
        pooled = ([torch.stack(parts) for parts in zip(*outcomes, strict=True)] for outcomes in (found, truth))
        assert max(errors(*pooled)) <= 1e-5


def check_whole_tiles(columns):
    """Samples that need no padding, their pre-activations and targets in every layout."""
    for patches, filters in ((1, 1), (2, 1), (1, 2)):
        row, column, *_, activation = problem((2, 32, columns, patches, 2, filters), PolyReLU(8, 0.3))
        targets = torch.randint(2, (32, 2), device=DEVICE).T
        rest = (targets, None if column is None else targets[:, :columns], (0.3,), (1e-3,), activation)
        results = run(row, column, *rest)
        for r in range(2):
            one = [None if t is None else t[r : r + 1] for t in (row, column)]
            one_rest = [None if t is None else t[r] for t in rest[:2]]
            truth = expected(*one, *one_rest, *rest[2:])
            assert max(errors([result[r : r + 1] for result in results], truth)) <= 1e-5


def check_tiles(block, columns, lam):
    """Tiles of another size than so few samples get."""
    from mixfeat.kernels.triton import configs

    with mock.patch.object(configs, "pairwise_block", return_value=block):
        check_accuracy((1, 70, columns, 1, 2, 1), PolyReLU(8, 0.3), lam)
        check_accuracy((1, 50, columns, 1, 2, 1), PolyReLU(8, 0.3), lam, deterministic=True)


def check_bands(runs, rows, columns, limit):
    """Each pair is in one band, whose logits fit the workspace unless they are one tile's."""
    from mixfeat.kernels.triton.pairwise_mixup_loss import _bands

    for symmetric in (False, True) if rows == columns else (False,):
        counts = torch.zeros(runs, rows, columns, dtype=torch.int64)
        for band in _bands(runs, rows, columns, symmetric, 16, limit):
            part = counts[band.runs, band.rows, band.columns]
            part += torch.ones_like(part).triu() if band.symmetric else 1
            padded = -(-part.shape[2] // 16) * 16
            assert part.shape[0] * part.shape[1] * padded <= max(limit, 16**2)
        expected = torch.ones_like(counts)
        assert torch.equal(counts, expected.triu() if symmetric else expected)


def check_in_bands(columns, lam, limit, deterministic=False):
    """Results do not depend on how many pairs are in work at once."""
    from mixfeat.kernels.triton import configs

    packing = {"pack_width": 2, "pack_chunks": 1, "pack_values": 2}  # two programs for the values of a sample
    config = replace(configs.PAIRWISE_CONFIG, workspace_bytes=limit * 4 * 2, **packing)
    with (
        mock.patch.object(configs, "PAIRWISE_CONFIG", config),
        mock.patch.object(configs, "pairwise_block", return_value=16),
    ):
        check_accuracy((2, 40, columns, 1, 2, 2), PolyReLU(8, 0.3), lam, deterministic=deterministic)


def check_workspace(runs, classes):
    """However many networks and classes, the logits in work take no more than the configuration allows."""
    from mixfeat.kernels.triton import configs, launch
    from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss

    row = torch.empty(runs, 4096, 1, classes, 1, device="meta")
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    multiprocessors = mock.patch.object(launch, "multiprocessors", return_value=132)
    with launch.record() as launches, multiprocessors:
        pairwise_mixup_loss(row, None, target, None, (0.5,), (1.0,), PolyReLU().polynomial, True)
    kernels = [one for one in launches if "logits" in one.kernel.arg_names]
    for one in kernels:
        logits = one.arguments[one.kernel.arg_names.index("logits")]
        assert logits.numel() * 4 <= configs.PAIRWISE_CONFIG.workspace_bytes


ACTIVATIONS = [
    *(PolyReLU(degree, 0.3) for degree in (1, 2, 8, 15)),
    *(PolyReLU(degree, 0.3, clamp=False) for degree in (1, 8)),
    *(PowerReLU(degree) for degree in (1, 2, 7)),
    *(Power(degree) for degree in (1, 2)),
    ReLU(),
    Identity(),
]
SHAPES = [  # R, N, N', P, C, M
    (16, 1, None, 1, 2, 1),
    (3, 2, None, 3, 3, 1),
    (1, 33, None, 1, 17, 1),
    (1, 70, None, 1, 3, 2),
    (3, 1, 33, 2, 2, 1),
    (1, 70, 2, 1, 3, 5),
    (2, 40, 65, 1, 2, 1),
]
CHECKS = {
    **{f"activation-{a}": partial(check_accuracy, (1, 5, 4, 2, 3, 2), a, (0.3, 0.5)) for a in ACTIVATIONS},
    **{
        f"activation-{a}-{d}": partial(check_accuracy, (4, 12, None, 3, 3, 2), a, dtype=d)
        for a in (PolyReLU(2, 0.3), PolyReLU(8, 0.3, clamp=False), PowerReLU(3), Power(2))
        for d in HALF
    },
    **{
        f"shape-{shape}-{lam}": partial(check_accuracy, shape, PolyReLU(8, 0.3), lam)
        for shape in SHAPES
        for lam in ((0.5,), (0.3,))
    },
    **{
        f"half-{shape}-{d}": partial(check_accuracy, shape, PolyReLU(8, 0.3), (0.3,), d)
        for shape in ((1, 33, None, 2, 5, 2), (3, 20, 12, 5, 2, 3))
        for d in HALF
    },
    "nodes": partial(check_accuracy, (1, 34, None, 1, 2, 1), PolyReLU(8, 0.3), (0.5, 0.0, 0.9), deterministic=True),
    **{
        f"ordered-accesses-{a}-{columns}-{lam}": partial(check_ordered_accesses, a, columns, lam)
        for a in (PolyReLU(8, 0.3), Identity())
        for columns, lam in ((None, (0.5,)), (None, (0.3,)), (33, (0.3,)))
        if DEVICE == "cpu"
    },
    **{
        f"repeats-{columns}-{lam}": partial(check_repeats, (1, 70, columns, 1, 2, 1), lam)
        for columns, lam in ((None, (0.5,)), (None, (0.3,)), (33, (0.5,)))
    },
    **{f"strides-{d}": partial(check_strides, d) for d in (torch.float32, torch.float16)},
    **{f"target-{t}-{n}": partial(check_target, t, n) for t in (-1, 3, 2**40, -(2**40)) for n in (None, 4)},
    **{
        f"not-finite-{value}-{a}": partial(check_not_finite, value, a)
        for value in (NAN, float("inf"))
        for a in (PolyReLU(8, 0.3), PolyReLU(3, 0.3, clamp=False), Power(2))
    },
    **{f"far-from-zero-{d}": partial(check_far_from_zero, d) for d in (torch.float32, *HALF)},
    **{f"whole-tiles-{columns}": partial(check_whole_tiles, columns) for columns in (None, 16)},
    **{
        f"tiles-{block}-{columns}": partial(check_tiles, block, columns, lam)
        for block, columns, lam in ((64, None, (0.5, 0.3)), (32, 40, (0.3,)), (16, None, (0.5,)))
    },
    **{
        f"bands-{runs}-{rows}-{columns}-{limit}": partial(check_bands, runs, rows, columns, limit)
        for runs, rows, columns, limit in (
            (3, 50, 50, 2000), (2, 50, 50, 1200), (2, 40, 70, 1300), (1, 33, 33, 300), (1, 5, 70, 100), (9, 8, 8, 500),
        )
    },
    "in-bands-of-runs": partial(check_in_bands, None, (0.5,), 40 * 48),
    "in-bands-of-rows": partial(check_in_bands, None, (0.5, 0.3), 20 * 48),
    "in-bands-of-tiles": partial(check_in_bands, None, (0.5,), 16**2, deterministic=True),
    "in-bands-of-columns": partial(check_in_bands, 50, (0.3,), 16 * 32),
    **{
        f"options-{pairs}": partial(
            check_options, columns, lam, deterministic, runs, label_lam=label_lam, label_smoothing=smoothing,
            pairs=pairs,
        )
        for columns, lam, label_lam, smoothing, pairs, deterministic, runs in (
            (None, (0.5,), (0.3,), 0.1, "all", False, 2),
            (None, (0.5, 0.2), (0.5, 0.7), 0.0, "distinct", True, 1),
            (17, (0.3,), None, 0.2, "different_class", False, 1),
        )
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checks(request):
    with running(request) as checks:
        yield checks


@pytest.mark.triton
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(checks, name):
    checks(name)
