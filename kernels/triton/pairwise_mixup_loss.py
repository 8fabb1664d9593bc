"""All-pairs Mixup loss and its gradients, from pre-activations, in Triton.

    t[i,j,c,f] = a[i,c,f] + b[j,c,f]                       a = lam row / threshold, b = (1 - lam) column / threshold
    g[i,j,c]   = sum_f phi(t[i,j,c,f])                     f = (patch, filter)
    loss       = sum_{i,j} weight [lam CE(g[i,j], y_i) + (1 - lam) CE(g[i,j], y_j)]
    D[i,j,c]   = weight (softmax(g[i,j])_c - lam [c = y_i] - (1 - lam) [c = y_j])
    dloss/drow[i,c,f]    = lam sum_j D[i,j,c] phi'(t[i,j,c,f])
    dloss/dcolumn[j,c,f] = (1 - lam) sum_i D[i,j,c] phi'(t[i,j,c,f])

A program is one warp, and owns one tile of pairs at a time. Its threads lie along one side of the tile: rows for the
logits and the rows' gradient, columns for the columns' gradient. So the slope is evaluated twice, which costs less than
adding across threads. Only the logits of the tiles in work are stored, in a workspace of each program.

A feature is left out of a tile where phi is 0 for all its t. Where phi is linear for all of them, the rows' terms and
the columns' terms are added up separately. Packing finds the smallest and the largest a and b of each block of samples,
by which a program sorts the features, tile by tile and class by class. Samples are ordered by target, so that the
samples of a block are alike.

A sample with a value that is not finite, or a target out of range, has NaN as its nan_mask, which multiplies the weight
of all its pairs; other samples have 1.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..polynomial import Polynomial
from . import configs, launch
from .activation import add_phi_of_sum, kind, mul_slope_of_sum, normal_form, regions

__all__ = ["pairwise_mixup_loss"]

# Integers that must not cost a compilation per problem size.
_SIZES = [
    "N", "columns", "C", "F", "M", "runs", "first_task", "last_task", "num_tasks", "blocks", "row_blocks",
    "column_blocks", "run_stride", "sample_stride", "patch_stride", "class_stride", "target_run_stride",
    "target_stride", "order_run_stride",
]  # fmt: skip
_PACK_WIDTH = 32  # features that a program packs at once: enough loads in flight, few enough registers


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_pack_kernel(
    s, target, order, t, bounds, packed_target, nan_mask, factor, run_stride, sample_stride, patch_stride, class_stride,
    filter_stride, target_run_stride, target_stride, order_run_stride, N, C, F, M, blocks,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack a block of samples of a run: s (R,N,P,C,M) and target (R,N) as a _Side, in ``order`` (R,N).

    Copies of the last sample pad its block.
    """
    run = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    along = tl.arange(0, BLOCK)
    place = block * BLOCK + along
    sample = tl.load(order + run * order_run_stride + tl.minimum(place, N - 1))
    nan_or_zero = tl.zeros((BLOCK,), tl.float32)  # NaN for a sample with a value that is not finite
    for first in range(0, C * F, WIDTH):
        q = first + tl.arange(0, WIDTH)
        mask = q < C * F
        c, f = (q // F).to(tl.int64), q % F
        offset = run * run_stride + c * class_stride + (f // M).to(tl.int64) * patch_stride + f % M * filter_stride
        pointers = s + offset[:, None] + (sample * sample_stride)[None, :]
        z = tl.load(pointers, mask=mask[:, None], other=0.0).to(tl.float32) * factor
        nan_or_zero += tl.sum(z * 0.0, 0)
        tile = (run * C + c) * blocks + block
        tl.store(t + ((tile * F + f) * BLOCK)[:, None] + along[None, :], z, mask=mask[:, None])
        tl.store(bounds + tile * 2 * F + f, tl.min(z, 1), mask=mask)
        tl.store(bounds + (tile * 2 + 1) * F + f, tl.max(z, 1), mask=mask)
    y = tl.load(target + run * target_run_stride + sample * target_stride)
    tl.store(packed_target + run * blocks * BLOCK + place, y)
    tl.store(nan_mask + run * blocks * BLOCK + place, tl.where((y >= 0) & (y < C), 1.0 + nan_or_zero, float("nan")))


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_unpack_kernel(
    packed, order, grad, factor, order_run_stride, N, C, F, M, blocks, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Unpack a block of samples of a run: packed (R,C,blocks,F,BLOCK), times factor, to grad (R,N,P,C,M)."""
    run = tl.program_id(0).to(tl.int64) // blocks
    block = tl.program_id(0) % blocks
    along = tl.arange(0, BLOCK)
    place = block * BLOCK + along
    sample = tl.load(order + run * order_run_stride + tl.minimum(place, N - 1))
    for first in range(0, C * F, WIDTH):
        q = first + tl.arange(0, WIDTH)
        mask = (q < C * F)[:, None] & (place < N)[None, :]
        c, f = q // F, q % F
        tile = (run * C + c) * blocks + block
        g = tl.load(packed + ((tile * F + f) * BLOCK)[:, None] + along[None, :], mask=mask)
        offset = (f // M * C + c) * M + f % M
        tl.store(grad + ((run * N + sample) * C * F)[None, :] + offset[:, None], factor * g, mask=mask)


@triton.jit
def _tile_of(task, row_blocks, column_blocks, SYMMETRIC: tl.constexpr):
    """Return the row block and the column block of a task, and whether they exist. A round's tasks share no block.

    SYMMETRIC, where rows are the columns, visits each unordered pair once: first every block with itself, then the
    others by the circle method, in which one block stays and the others go round.
    """
    if SYMMETRIC:
        half = (row_blocks + 1) // 2
        circle = 2 * half - 1
        turn = (task - row_blocks) // half
        place = (task - row_blocks) % half
        one = tl.where(place == 0, circle, (turn + place) % circle)
        other = (turn - place + circle) % circle
        row = tl.where(task < row_blocks, task, tl.minimum(one, other))
        column = tl.where(task < row_blocks, task, tl.maximum(one, other))
    else:
        row = task % row_blocks
        column = (row + task // row_blocks) % tl.maximum(row_blocks, column_blocks)
    return row, column, column < column_blocks


@triton.jit
def _sort_features(
    places, row_bounds, column_bounds, nan_or_zero, F,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """List where in a tile a class's features begin: those to evaluate from the left, linear ones from the right.

    ``places`` (F,) is the list; ``row_bounds`` and ``column_bounds`` (2,F) are those of the tile's blocks and the
    class. ``nan_or_zero`` is NaN to have all features evaluated, else 0. Returns how many features are to be evaluated
    and how many are linear.
    """
    tl.debug_barrier()
    num_active = 0
    num_linear = 0
    for first in range(0, F, WIDTH):
        f = first + tl.arange(0, WIDTH)
        mask = f < F
        t_min = tl.load(row_bounds + f, mask=mask) + tl.load(column_bounds + f, mask=mask) + nan_or_zero
        t_max = tl.load(row_bounds + F + f, mask=mask) + tl.load(column_bounds + F + f, mask=mask) + nan_or_zero
        is_zero, is_linear = regions(t_min, t_max, ACTIVATION)
        is_active = (mask & ~(is_zero | is_linear)).to(tl.int32)
        is_linear = (mask & is_linear).to(tl.int32)
        tl.store(places + num_active + tl.cumsum(is_active, 0) - 1, f * BLOCK, mask=is_active > 0)
        tl.store(places + F - num_linear - tl.cumsum(is_linear, 0), f * BLOCK, mask=is_linear > 0)
        num_active += tl.sum(is_active, 0)
        num_linear += tl.sum(is_linear, 0)
    tl.debug_barrier()
    return num_active, num_linear


@triton.jit
def _label(c, y_i, y_j, lam):
    """Return the share of class c in the labels of a tile (j, i)."""
    return tl.where(y_i == c, lam, 0.0)[None, :] + tl.where(y_j == c, 1.0 - lam, 0.0)[:, None]


@triton.jit
def _add(pointers, values, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(pointers, values, sem="relaxed")
    else:
        tl.store(pointers, tl.load(pointers) + values)


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_forward_kernel(
    a, b, row_bounds, column_bounds, row_target, column_target, row_nan_mask, column_nan_mask, row_grad, column_grad,
    workspace, places, loss, lam, weight, scale, N, columns, C, F, runs, first_task, last_task, num_tasks,
    row_blocks, column_blocks,
    ACTIVATION: tl.constexpr, SYMMETRIC: tl.constexpr, GRAD: tl.constexpr,
    ATOMIC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Add up the loss, and with GRAD its gradients, over tasks first_task to last_task - 1 of each run.

    a, row_bounds, row_target and row_nan_mask are a _Side, b and those of the columns another; row_grad like a and
    column_grad like b are added to; workspace (programs,2 (1 without GRAD),C,BLOCK,BLOCK); places (programs,F) int32;
    loss (R,num_tasks). Lanes of the warp exchange data through memory, so a barrier separates stores from later loads.
    """
    tile_size = C.to(tl.int64) * BLOCK * BLOCK
    logits = workspace + tl.program_id(0).to(tl.int64) * (2 if GRAD else 1) * tile_size  # (C, j, i); then D
    transposed = logits + tile_size  # D as (C, i, j)
    places += tl.program_id(0).to(tl.int64) * F
    along = tl.arange(0, BLOCK)
    across = tl.arange(0, CHUNK)
    strip = tl.arange(0, STRIP)
    tasks = last_task - first_task
    for item in range(tl.program_id(0).to(tl.int64), tasks.to(tl.int64) * runs, tl.num_programs(0)):
        run = item // tasks
        task = first_task + (item % tasks).to(tl.int32)
        row_block, column_block, exists = _tile_of(task, row_blocks, column_blocks, SYMMETRIC)
        if exists:
            i = row_block * BLOCK + along
            rows_padded, columns_padded = row_blocks * BLOCK, column_blocks * BLOCK
            y_i = tl.load(row_target + run * rows_padded + i)
            nan_mask_i = tl.load(row_nan_mask + run * rows_padded + i)
            nan_masks_j = tl.load(column_nan_mask + run * columns_padded + column_block * BLOCK + along)
            nan_or_zero = 0.0 * tl.sum(nan_mask_i + nan_masks_j, 0)
            for c in range(C):
                row_tile = (run * C + c) * row_blocks + row_block
                column_tile = (run * C + c) * column_blocks + column_block
                num_active, num_linear = _sort_features(
                    places, row_bounds + row_tile * 2 * F, column_bounds + column_tile * 2 * F, nan_or_zero, F,
                    ACTIVATION, BLOCK, CHUNK,
                )  # fmt: skip
                for first in range(0, BLOCK, CHUNK):
                    a_c = a + row_tile * F * BLOCK + along
                    b_c = b + column_tile * F * BLOCK + first + across
                    g = tl.zeros((CHUNK, BLOCK), tl.float32)
                    for k in range(num_active):
                        place = tl.load(places + k)
                        a_f, b_f = tl.load(a_c + place), tl.load(b_c + place)
                        g = add_phi_of_sum(g, a_f[None, :], b_f[:, None], ACTIVATION)
                    row_linear = tl.zeros((BLOCK,), tl.float32)
                    column_linear = tl.zeros((CHUNK,), tl.float32)
                    for k in range(F - num_linear, F):
                        place = tl.load(places + k)
                        row_linear += tl.load(a_c + place)
                        column_linear += tl.load(b_c + place)
                    row_linear = ACTIVATION.degree * row_linear - (ACTIVATION.degree - 1) * num_linear
                    g += row_linear[None, :] + (ACTIVATION.degree * column_linear)[:, None]
                    tile = logits + c * BLOCK * BLOCK + (first + across)[:, None] * BLOCK + along[None, :]
                    tl.store(tile, scale * g)
            tl.debug_barrier()

            tile_loss = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, BLOCK, STRIP):
                j_strip = column_block * BLOCK + first + strip
                y_j = tl.load(column_target + run * columns_padded + j_strip)
                nan_mask_j = tl.load(column_nan_mask + run * columns_padded + j_strip)
                tile = logits + (first + strip)[:, None] * BLOCK + along[None, :]
                transposed_tile = transposed + along[None, :] * BLOCK + (first + strip)[:, None]
                row_max = tl.full((STRIP, BLOCK), float("-inf"), tl.float32)
                accum = tl.zeros((STRIP, BLOCK), tl.float32)
                target = tl.zeros((STRIP, BLOCK), tl.float32)
                for c in range(C):
                    g = tl.load(tile + c * BLOCK * BLOCK)
                    new_max = tl.maximum(row_max, g)
                    accum = accum * tl.exp(row_max - new_max) + tl.exp(g - new_max)
                    row_max = new_max
                    target += _label(c, y_i, y_j, lam) * g
                lse = row_max + tl.log(accum)
                mask = (i < N)[None, :] & (j_strip < columns)[:, None]
                w = tl.full((STRIP, BLOCK), 0.0, tl.float32) + weight
                if SYMMETRIC:
                    mask = mask & (i[None, :] <= j_strip[:, None])
                    w = tl.where(i[None, :] < j_strip[:, None], 2.0 * w, w)
                w = tl.where(mask, w * (nan_mask_i[None, :] * nan_mask_j[:, None]), 0.0)
                tile_loss += tl.sum(tl.where(mask, w * (lse - target), 0.0), 0)  # no product across lanes
                if GRAD:
                    for c in range(C):
                        g = tl.load(tile + c * BLOCK * BLOCK)
                        d = w * (tl.exp(g - lse) - _label(c, y_i, y_j, lam))
                        tl.store(tile + c * BLOCK * BLOCK, d)
                        tl.store(transposed_tile + c * BLOCK * BLOCK, d)
            tl.store(loss + run * num_tasks + task, tl.sum(tile_loss, 0))

            if GRAD:
                tl.debug_barrier()
                for c in range(C):
                    row_tile = (run * C + c) * row_blocks + row_block
                    column_tile = (run * C + c) * column_blocks + column_block
                    num_active, num_linear = _sort_features(
                        places, row_bounds + row_tile * 2 * F, column_bounds + column_tile * 2 * F, nan_or_zero, F,
                        ACTIVATION, BLOCK, CHUNK,
                    )  # fmt: skip
                    for first in range(0, BLOCK, CHUNK):
                        d = tl.load(logits + c * BLOCK * BLOCK + (first + across)[:, None] * BLOCK + along[None, :])
                        a_c = a + row_tile * F * BLOCK + along
                        b_c = b + column_tile * F * BLOCK + first + across
                        grad_c = row_grad + row_tile * F * BLOCK + along
                        for k in range(num_active):
                            place = tl.load(places + k)
                            a_f, b_f = tl.load(a_c + place), tl.load(b_c + place)
                            e = mul_slope_of_sum(d, a_f[None, :], b_f[:, None], ACTIVATION)
                            _add(grad_c + place, lam * tl.sum(e, 0), ATOMIC)
                        d_sum = lam * tl.sum(d, 0)
                        for k in range(F - num_linear, F):
                            _add(grad_c + tl.load(places + k), d_sum, ATOMIC)
                        tl.debug_barrier()
                    for first in range(0, BLOCK, CHUNK):
                        d = tl.load(transposed + c * BLOCK * BLOCK + (first + across)[:, None] * BLOCK + along[None, :])
                        a_c = a + row_tile * F * BLOCK + first + across
                        b_c = b + column_tile * F * BLOCK + along
                        grad_c = column_grad + column_tile * F * BLOCK + along
                        for k in range(num_active):
                            place = tl.load(places + k)
                            a_f, b_f = tl.load(a_c + place), tl.load(b_c + place)
                            e = mul_slope_of_sum(d, b_f[None, :], a_f[:, None], ACTIVATION)
                            _add(grad_c + place, (1.0 - lam) * tl.sum(e, 0), ATOMIC)
                        d_sum = (1.0 - lam) * tl.sum(d, 0)
                        for k in range(F - num_linear, F):
                            _add(grad_c + tl.load(places + k), d_sum, ATOMIC)
                        tl.debug_barrier()


class _Side(NamedTuple):
    """Packed samples of one side of the pairs, for one node lam."""

    t: Tensor  # (R,C,blocks,F,block): lam s / threshold, or (1 - lam) s / threshold; samples padded to whole blocks
    bounds: Tensor  # (R,C,blocks,2,F): smallest and largest t of each block of samples
    target: Tensor  # (R,padded samples)
    nan_mask: Tensor  # (R,padded samples): NaN for samples whose loss is NaN, else 1


def _order(target: Tensor, num_runs: int) -> Tensor:
    """Return each run's samples in the order of their targets, (R,N), so that those of a block are alike."""
    return torch.atleast_2d(target).argsort(stable=True).contiguous().expand(num_runs, -1)


def _pack(s: Tensor, target: Tensor, order: Tensor, factor: float, block: int) -> _Side:
    num_runs, num_samples, num_patches, num_classes, filters = s.shape
    blocks, features = triton.cdiv(num_samples, block), num_patches * filters
    side = _Side(
        torch.empty(num_runs, num_classes, blocks, features, block, dtype=torch.float32, device=s.device),
        torch.empty(num_runs, num_classes, blocks, 2, features, dtype=torch.float32, device=s.device),
        torch.empty(num_runs, blocks * block, dtype=target.dtype, device=s.device),
        torch.empty(num_runs, blocks * block, dtype=torch.float32, device=s.device),
    )
    s = launch.interpretable(s)
    run_stride, sample_stride, patch_stride, class_stride, filter_stride = s.stride()
    target = target.expand(num_runs, num_samples)
    arguments = (
        s, target, order, *side, factor, run_stride, sample_stride, patch_stride, class_stride, filter_stride,
        *target.stride(), order.stride(0), num_samples, num_classes, features, filters, blocks,
    )  # fmt: skip
    constants = {"WIDTH": _PACK_WIDTH, "BLOCK": block}
    launch.run(launch.Launch(pairwise_mixup_loss_pack_kernel, num_runs * blocks, arguments, constants))
    return side


def _unpack(packed: Tensor, shape: torch.Size, order: Tensor, factor: float, block: int) -> Tensor:
    """Return the gradient of this shape (R,N,P,C,M), times factor, from (R,C,blocks,F,block)."""
    num_runs, num_samples, num_patches, num_classes, filters = shape
    blocks, features = triton.cdiv(num_samples, block), num_patches * filters
    grad = torch.empty(shape, dtype=torch.float32, device=packed.device)
    if grad.numel():
        sizes = (order.stride(0), num_samples, num_classes, features, filters, blocks)
        arguments = (packed, order, grad, factor, *sizes)
        constants = {"WIDTH": _PACK_WIDTH, "BLOCK": block}
        launch.run(launch.Launch(pairwise_mixup_loss_unpack_kernel, num_runs * blocks, arguments, constants))
    return grad


def _rounds(row_blocks: int, column_blocks: int, symmetric: bool) -> list[tuple[int, int]]:
    """Return the first and the last + 1 task of each round, as _tile_of counts them."""
    if not symmetric:
        return [(k * row_blocks, (k + 1) * row_blocks) for k in range(max(row_blocks, column_blocks))]
    half = (row_blocks + 1) // 2
    starts = [row_blocks + k * half for k in range(2 * half)]
    return [(0, row_blocks), *itertools.pairwise(starts)]


def pairwise_mixup_loss(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Sequence[float],
    lam_weight: Sequence[float],
    polynomial: Polynomial,
    need_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss (R,) of all pairs of a row and a column sample, and its gradients, float32.

    ``row`` (R,N,P,C,M) and ``column`` (R,N',P,C,M), pre-activations of any strides, ``column`` None for row itself;
    targets (N,) or (R,N). A target out of range, or a value that is not finite, makes the loss NaN.
    """
    activation = normal_form(polynomial)
    num_runs, num_samples, num_patches, num_classes, filters = row.shape
    num_columns = num_samples if column is None else column.shape[1]
    loss = torch.zeros(num_runs, dtype=torch.float64, device=row.device)
    sizes = (num_classes, num_patches * filters)

    def zeros(blocks: int) -> Tensor:
        blocks = blocks if need_grad else 0
        return torch.zeros(
            num_runs, num_classes, blocks, sizes[1], config.block, dtype=torch.float32, device=row.device
        )

    config = configs.pairwise_config(max(num_samples, num_columns), num_classes)
    row_blocks, column_blocks = (triton.cdiv(n, config.block) for n in (num_samples, num_columns))
    row_grad = zeros(row_blocks)
    # One gradient serves rows and columns of one problem, if the tasks of a round share no block of samples.
    one_side = column is None and all(node == 0.5 for node in lam)
    column_grad = row_grad if one_side else zeros(column_blocks)
    row_side = row, row_target, _order(row_target, num_runs)
    column_side = row_side
    if column is not None and column_target is not None:
        column_side = column, column_target, _order(column_target, num_runs)
    rounds_alone = torch.are_deterministic_algorithms_enabled()
    for node, weight in zip(lam, lam_weight, strict=True) if num_runs * num_samples * num_columns else ():
        symmetric = column is None and node == 0.5
        rows = columns = _pack(*row_side, node / activation.threshold, config.block)
        if not symmetric:
            columns = _pack(*column_side, (1 - node) / activation.threshold, config.block)
        rounds = _rounds(row_blocks, column_blocks, symmetric)
        num_tasks = rounds[-1][1]
        parts = torch.zeros(num_runs, num_tasks, dtype=torch.float32, device=row.device)
        for first, last in rounds if rounds_alone else [(0, num_tasks)]:
            wanted = config.programs_per_multiprocessor * launch.multiprocessors(row)
            slot = (2 if need_grad else 1) * num_classes * config.block**2
            programs = max(1, min(num_runs * (last - first), wanted, config.workspace_bytes // (4 * slot)))
            workspace = torch.empty(programs * slot, dtype=torch.float32, device=row.device)
            places = torch.empty(programs * sizes[1], dtype=torch.int32, device=row.device)
            arguments = (
                rows.t, columns.t, rows.bounds, columns.bounds, rows.target, columns.target,
                rows.nan_mask, columns.nan_mask, row_grad, column_grad, workspace, places, parts,
                node, weight, activation.scale / activation.degree,
                num_samples, num_columns, *sizes, num_runs, first, last, num_tasks, row_blocks, column_blocks,
            )  # fmt: skip
            constants = {
                "ACTIVATION": kind(activation),
                "SYMMETRIC": symmetric,
                "GRAD": need_grad,
                "ATOMIC": not rounds_alone and num_tasks > 1,
                "BLOCK": config.block,
                "CHUNK": config.chunk,
                "STRIP": config.strip,
            }
            launch.run(launch.Launch(pairwise_mixup_loss_forward_kernel, programs, arguments, constants, num_warps=1))
        loss += parts.sum(1, dtype=torch.float64)
    if not need_grad:
        return loss.float(), None, None
    if column is None and not one_side:
        row_grad += column_grad

    factor = activation.scale / activation.threshold
    gradients = [
        _unpack(grad, side[0].shape, side[2], factor, config.block)
        for grad, side in ((row_grad, row_side), (column_grad, column_side))[: 1 if column is None else 2]
    ]
    return loss.float(), gradients[0], None if column is None else gradients[1]
