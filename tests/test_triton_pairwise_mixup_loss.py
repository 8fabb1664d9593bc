"""The Triton kernel of the all-pairs Mixup loss against the formulas in float64, called as the operator calls it.

See triton_checks.
"""

from functools import partial
from unittest import mock

import pytest
import torch
from triton_checks import DEVICE, HALF, NAN, ordered_accesses, poisoned, running, shuffled_programs

from mixfeat.activations import Identity, PolyReLU, Power, PowerReLU, ReLU


def run(row, column, row_target, column_target, lam, weight, activation, need_grad=True):
    """The loss and those gradients that there are, from the kernel."""
    from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss

    with poisoned():
        results = pairwise_mixup_loss(
            row, column, row_target, column_target, lam, weight, activation.polynomial, need_grad
        )
    shapes = [
        row.shape[:1],
        row.shape if need_grad else None,
        column.shape if need_grad and column is not None else None,
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


def errors_of(arguments, truth, deterministic):
    """Of what the kernels make of the arguments, with deterministic algorithms or without."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        return errors(run(*arguments), truth)
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


def check_repeats(shape, lam):
    """Rounds of tiles that share no samples: the same bits in any order of programs, and those of the loss alone."""
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
    """The threads of a warp exchange logits, lists of features and gradients through memory, in several chunks."""
    from mixfeat.kernels.triton import configs

    config = configs.PairwiseConfig(block=16, chunk=8, strip=4)
    torch.use_deterministic_algorithms(True)
    try:
        with ordered_accesses(), mock.patch.object(configs, "pairwise_config", return_value=config):
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


def alike(arguments):
    """The same problem, but of each sample a third of the features are 0, a third on the line: by target, so that
    blocks of one target's samples are alike.
    """
    row, column, row_target, column_target, *rest = arguments
    num_classes = row.shape[3]

    def shifted(s, target):
        place = torch.arange(s[0, 0].numel(), device=DEVICE).view(s.shape[2:])
        shift = torch.tensor([-4.0, 0.0, 4.0], device=DEVICE)[(place + target[:, None, None, None] % num_classes) % 3]
        return (s + shift).to(s.dtype)

    row, column = shifted(row, row_target), None if column is None else shifted(column, column_target)
    return row, column, row_target, column_target, *rest


def check_alike(shape, activation, lam, deterministic=False):
    """Features that are left out, or that are on the line, in whole tiles."""
    arguments = alike(problem(shape, activation, lam))
    found = errors_of(arguments, expected(*arguments), deterministic)
    assert max(found) <= 1e-5, found


def check_sorting(activation, features):
    """Each feature of a tile once, in the part of the list that its bounds say."""
    import triton
    import triton.language as tl

    from mixfeat.kernels.triton import activation as device
    from mixfeat.kernels.triton.pairwise_mixup_loss import _sort_features

    polynomial = device.normal_form(activation.polynomial)
    kind = torch.randint(4, (features,), device=DEVICE)  # zero, linear, and neither, from either side
    t_min = torch.tensor([-3.0, 1.5, -0.5, 0.5], device=DEVICE)[kind]
    t_max = torch.tensor([-1.0, 3.0, 0.5, 1.25], device=DEVICE)[kind]
    rows = torch.rand(2, features, device=DEVICE)
    columns = torch.stack([t_min, t_max]) - rows
    is_zero = (kind == 0) if polynomial.lower else torch.zeros_like(kind, dtype=torch.bool)
    if polynomial.degree == 1:
        is_linear = ((kind == 1) | (kind == 3)) if polynomial.lower else ~is_zero
    else:
        is_linear = (kind == 1) & polynomial.upper

    @triton.jit
    def kernel(places, counts, rows, columns, nan_or_zero, F, sort: tl.constexpr, ACTIVATION: tl.constexpr):
        num_active, num_linear = sort(places, rows, columns, nan_or_zero, F, ACTIVATION, 16, 32)
        tl.store(counts, num_active)
        tl.store(counts + 1, num_linear)

    constants = (_sort_features, device.kind(polynomial))
    for nan_or_zero in (0.0, NAN):
        places = torch.full((features,), -1, dtype=torch.int32, device=DEVICE)
        counts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        kernel[1,](places, counts, rows, columns, nan_or_zero, features, *constants)
        num_active, num_linear = counts.tolist()
        every = torch.arange(features, device=DEVICE)
        listed = [every[~(is_zero | is_linear)], every[is_linear]] if nan_or_zero == 0 else [every, every[:0]]
        found = [places[:num_active], places[features - num_linear :]]
        for one, truth in zip(found, listed, strict=True):
            assert one.sort().values.tolist() == (16 * truth).tolist()


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


def check_tiles(sizes, columns, lam):
    """Tiles of another size than so few samples get."""
    from mixfeat.kernels.triton import configs

    with mock.patch.object(configs, "pairwise_config", return_value=configs.PairwiseConfig(*sizes)):
        check_accuracy((1, 70, columns, 1, 2, 1), PolyReLU(8, 0.3), lam)
        check_accuracy((1, 50, columns, 1, 2, 1), PolyReLU(8, 0.3), lam, deterministic=True)


def check_rounds(row_blocks, column_blocks):
    """Each pair of blocks is visited once (those of one side with itself in one order), no block twice in a round."""
    import triton
    import triton.language as tl

    from mixfeat.kernels.triton.pairwise_mixup_loss import _rounds, _tile_of

    symmetric = column_blocks is None
    rounds = _rounds(row_blocks, column_blocks or row_blocks, symmetric)
    tasks = rounds[-1][1]
    size = triton.next_power_of_2(tasks)

    @triton.jit
    def kernel(tiles, row_blocks, column_blocks, SIZE: tl.constexpr, SYMMETRIC: tl.constexpr, tile_of: tl.constexpr):
        task = tl.arange(0, SIZE)
        row, column, exists = tile_of(task, row_blocks, column_blocks, SYMMETRIC)
        tl.store(tiles + task, row)
        tl.store(tiles + SIZE + task, column)
        tl.store(tiles + 2 * SIZE + task, exists.to(tl.int32))

    tiles = torch.zeros(3, size, dtype=torch.int32, device=DEVICE)
    kernel[1,](tiles, row_blocks, column_blocks or row_blocks, size, symmetric, _tile_of)
    tiles = [[(row, column) for row, column, exists in tiles.T[begin:end].tolist() if exists] for begin, end in rounds]
    for one in tiles:
        blocks = [sorted({row, column}) if symmetric else [("row", row), ("column", column)] for row, column in one]
        assert len({block for pair in blocks for block in pair}) == sum(map(len, blocks))
    other = range(column_blocks or row_blocks)
    pairs = [(i, j) for i in range(row_blocks) for j in other if not symmetric or i <= j]
    assert sorted(pair for one in tiles for pair in one) == pairs


def check_workspace(runs, classes):
    """However many networks and classes, the logits of the tiles in work take no more than the configuration allows."""
    from mixfeat.kernels.triton import configs, launch
    from mixfeat.kernels.triton.pairwise_mixup_loss import pairwise_mixup_loss

    row = torch.empty(runs, 4096, 1, classes, 1, device="meta")
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    multiprocessors = mock.patch.object(launch, "multiprocessors", return_value=132)
    with launch.record() as launches, multiprocessors:
        pairwise_mixup_loss(row, None, target, None, (0.5,), (1.0,), PolyReLU().polynomial, True)
    one = launches[1]  # after packing, before unpacking
    workspace = one.arguments[one.kernel.arg_names.index("workspace")]
    assert workspace.numel() * 4 <= configs.pairwise_config(4096, classes).workspace_bytes


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
    **{
        f"alike-{a}-{columns}-{lam}": partial(check_alike, (2, 70, columns, 2, 3, 3), a, lam, deterministic)
        for a, columns, lam, deterministic in (
            (PolyReLU(8, 0.3), None, (0.5,), False),
            (PolyReLU(8, 0.3), None, (0.5, 0.3), True),
            (PolyReLU(3, 0.3), 40, (0.5,), False),
            (PolyReLU(1, 0.3), None, (0.3,), False),
            (ReLU(), 33, (0.3,), True),
            (PowerReLU(2), None, (0.5,), False),
            (Identity(), None, (0.5,), False),
        )
    },
    **{
        f"sorting-{a}-{features}": partial(check_sorting, a, features)
        for a in (PolyReLU(8, 0.3), PolyReLU(8, 0.3, clamp=False), PowerReLU(3), ReLU(), Power(2), Identity())
        for features in (1, 32, 70)
    },
    **{f"whole-tiles-{columns}": partial(check_whole_tiles, columns) for columns in (None, 16)},
    **{
        f"tiles-{sizes}-{columns}": partial(check_tiles, sizes, columns, lam)
        for sizes, columns, lam in (((64, 32), None, (0.5, 0.3)), ((16, 8), 40, (0.3,)), ((16, 8), None, (0.5,)))
    },
    **{f"rounds-{n}-{m}": partial(check_rounds, n, m) for n in (1, 2, 3, 4, 7, 8) for m in (None, 1, 3, 8)},
    **{f"workspace-{r}-{c}": partial(check_workspace, r, c) for r in (1, 3, 128) for c in (10, 100, 4096)},
}  # fmt: skip


@pytest.fixture(scope="module")
def checks(request):
    with running(request) as checks:
        yield checks


@pytest.mark.triton
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(checks, name):
    checks(name)
