"""All-pairs Mixup loss and its gradients, from pre-activations, in Triton.

    t[i,j,c,f] = a[i,c,f] + b[j,c,f]                       a = lam row / threshold, b = (1 - lam) column / threshold
    g[i,j,c]   = sum_f phi(t[i,j,c,f])                     f = (patch, filter)
    loss       = sum_{i,j} weight [lam CE(g[i,j], y_i) + (1 - lam) CE(g[i,j], y_j)]
    D[i,j,c]   = weight (softmax(g[i,j])_c - lam [c = y_i] - (1 - lam) [c = y_j])
    dloss/drow[i,c,f]    = lam sum_j D[i,j,c] phi'(t[i,j,c,f])
    dloss/dcolumn[j,c,f] = (1 - lam) sum_i D[i,j,c] phi'(t[i,j,c,f])

A program is one warp, and owns a tile of pairs at a time. Its threads lie along one side of the tile and hold all of
the other, so that sums over that other side need no exchange: rows along the threads for the logits and the rows'
gradient, columns for the columns'. So the activation's slope is evaluated twice, which costs less than to add across
threads. Of the pairs, only the logits of the tiles in work are stored, in a workspace that a program writes and reads
alone.

Samples that hold what is not finite, or a target out of range, are marked by a NaN that weighs all their pairs.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixfeat.activations import Polynomial

from . import launch
from .activation import add_phi_of_sum, mul_slope_of_sum, normal_form

__all__ = ["pairwise_mixup_loss"]

# Integers that must not give every size of problem a compilation of its own.
_SIZES = ["N", "columns", "C", "F", "runs", "first_task", "last_task", "num_tasks", "row_blocks", "column_blocks"]


@triton.jit
def _tile_of(task, row_blocks, column_blocks, SYMMETRIC: tl.constexpr):
    """Row block and column block of a task, and whether there are such. No two pairs of one round share a block.

    SYMMETRIC, where rows are the columns: each unordered pair once, first all blocks with themselves, then by the
    circle method, in which one block stays and the others go round.
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
def _label(c, y_i, y_j, lam):
    """Share of class c in the labels of a tile (j, i)."""
    return tl.where(y_i == c, lam, 0.0)[None, :] + tl.where(y_j == c, 1.0 - lam, 0.0)[:, None]


@triton.jit
def _add(pointers, values, ATOMIC: tl.constexpr):
    if ATOMIC:
        tl.atomic_add(pointers, values, sem="relaxed")
    else:
        tl.store(pointers, tl.load(pointers) + values)


@triton.jit(do_not_specialize=_SIZES)
def _kernel(
    a, b, row_target, column_target, row_mark, column_mark, row_grad, column_grad, workspace, loss,
    lam, weight, scale, N, columns, C, F, runs, first_task, last_task, num_tasks, row_blocks, column_blocks,
    DEGREE: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, SYMMETRIC: tl.constexpr, GRAD: tl.constexpr,
    ATOMIC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """Tasks first_task to last_task - 1 of each run, shared among all programs.

    a (R,C,F,rows), b (R,C,F,columns), the samples padded with zeros to whole blocks; row_grad and column_grad likewise,
    added to; row_target, row_mark (R,rows), mark 1 or NaN, and of the columns likewise; workspace
    (programs,2 (1 without GRAD),C,BLOCK,BLOCK); loss (R,num_tasks).
    """
    rows_padded, columns_padded = row_blocks * BLOCK, column_blocks * BLOCK
    row_class, column_class = F.to(tl.int64) * rows_padded, F.to(tl.int64) * columns_padded
    tile_size = C.to(tl.int64) * BLOCK * BLOCK
    logits = workspace + tl.program_id(0).to(tl.int64) * (2 if GRAD else 1) * tile_size  # (C, j, i); then D
    transposed = logits + tile_size  # D as (C, i, j)
    along = tl.arange(0, BLOCK)
    across = tl.arange(0, CHUNK)
    few = tl.arange(0, STRIP)
    tasks = last_task - first_task
    for item in range(tl.program_id(0).to(tl.int64), tasks.to(tl.int64) * runs, tl.num_programs(0)):
        run = item // tasks
        task = first_task + (item % tasks).to(tl.int32)
        row_block, column_block, exists = _tile_of(task, row_blocks, column_blocks, SYMMETRIC)
        if exists:
            i = row_block * BLOCK + along
            row_start, column_start = run * C * row_class, run * C * column_class
            for first in range(0, BLOCK, CHUNK):
                j = column_block * BLOCK + first + across
                here = logits + (first + across)[:, None] * BLOCK + along[None, :]
                for c in range(C):
                    a_c = a + row_start + c * row_class + i
                    b_c = b + column_start + c * column_class + j
                    g = tl.zeros((CHUNK, BLOCK), tl.float32)
                    for _ in range(F):
                        g = add_phi_of_sum(g, tl.load(a_c)[None, :], tl.load(b_c)[:, None], DEGREE, LOWER, UPPER)
                        a_c += rows_padded
                        b_c += columns_padded
                    tl.store(here + c * BLOCK * BLOCK, scale * g)
            tl.debug_barrier()

            y_i = tl.load(row_target + run * rows_padded + i)
            mark_i = tl.load(row_mark + run * rows_padded + i)
            tile_loss = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, BLOCK, STRIP):
                j_few = column_block * BLOCK + first + few
                y_j = tl.load(column_target + run * columns_padded + j_few)
                mark_j = tl.load(column_mark + run * columns_padded + j_few)
                here = logits + (first + few)[:, None] * BLOCK + along[None, :]
                there = transposed + along[None, :] * BLOCK + (first + few)[:, None]
                highest = tl.full((STRIP, BLOCK), float("-inf"), tl.float32)
                total = tl.zeros((STRIP, BLOCK), tl.float32)
                target = tl.zeros((STRIP, BLOCK), tl.float32)
                for c in range(C):
                    g = tl.load(here + c * BLOCK * BLOCK)
                    above = tl.maximum(highest, g)
                    total = total * tl.exp(highest - above) + tl.exp(g - above)
                    highest = above
                    target += _label(c, y_i, y_j, lam) * g
                log_total = highest + tl.log(total)
                inside = (i < N)[None, :] & (j_few < columns)[:, None]
                w = tl.full((STRIP, BLOCK), 0.0, tl.float32) + weight
                if SYMMETRIC:
                    inside = inside & (i[None, :] <= j_few[:, None])
                    w = tl.where(i[None, :] < j_few[:, None], 2.0 * w, w)
                w = tl.where(inside, w * (mark_i[None, :] * mark_j[:, None]), 0.0)
                tile_loss += tl.sum(w * (log_total - target), 0)
                if GRAD:
                    for c in range(C):
                        g = tl.load(here + c * BLOCK * BLOCK)
                        d = w * (tl.exp(g - log_total) - _label(c, y_i, y_j, lam))
                        tl.store(here + c * BLOCK * BLOCK, d)
                        tl.store(there + c * BLOCK * BLOCK, d)
            tl.store(loss + run * num_tasks + task, tl.sum(tile_loss, 0))

            if GRAD:
                tl.debug_barrier()
                for c in range(C):
                    for first in range(0, BLOCK, CHUNK):
                        j = column_block * BLOCK + first + across
                        d = tl.load(logits + c * BLOCK * BLOCK + (first + across)[:, None] * BLOCK + along[None, :])
                        a_c = a + row_start + c * row_class + i
                        b_c = b + column_start + c * column_class + j
                        grad_c = row_grad + row_start + c * row_class + i
                        for _ in range(F):
                            e = mul_slope_of_sum(d, tl.load(a_c)[None, :], tl.load(b_c)[:, None], DEGREE, LOWER, UPPER)
                            _add(grad_c, lam * tl.sum(e, 0), ATOMIC)
                            a_c += rows_padded
                            b_c += columns_padded
                            grad_c += rows_padded
                tl.debug_barrier()
                j_along = column_block * BLOCK + along
                for c in range(C):
                    for first in range(0, BLOCK, CHUNK):
                        i_across = row_block * BLOCK + first + across
                        d = tl.load(transposed + c * BLOCK * BLOCK + (first + across)[:, None] * BLOCK + along[None, :])
                        a_c = a + row_start + c * row_class + i_across
                        b_c = b + column_start + c * column_class + j_along
                        grad_c = column_grad + column_start + c * column_class + j_along
                        for _ in range(F):
                            e = mul_slope_of_sum(d, tl.load(b_c)[None, :], tl.load(a_c)[:, None], DEGREE, LOWER, UPPER)
                            _add(grad_c, (1.0 - lam) * tl.sum(e, 0), ATOMIC)
                            a_c += rows_padded
                            b_c += columns_padded
                            grad_c += columns_padded
            tl.debug_barrier()


class _Side(NamedTuple):
    """Samples as the kernel takes them, for one node lam."""

    t: Tensor  # (R,C,F,samples padded to whole blocks): weight * s / threshold
    target: Tensor  # (R,samples padded)
    mark: Tensor  # (R,samples padded): NaN for samples that have no loss, else 1


def _pack(s: Tensor, target: Tensor, factor: float, block: int) -> _Side:
    num_runs, num_samples, _, num_classes, _ = s.shape
    padding = (0, -num_samples % block)
    # what needs no padding keeps its strides
    t = torch.nn.functional.pad(s.permute(0, 3, 2, 4, 1).float() * factor, padding).flatten(2, 3).contiguous()
    target = torch.nn.functional.pad(target.expand(num_runs, num_samples), padding).contiguous()
    mark = (t * 0).sum(dim=(1, 2)) + 1
    return _Side(t, target, mark.where((target >= 0) & (target < num_classes), torch.nan))


def _rounds(row_blocks: int, column_blocks: int, symmetric: bool) -> list[tuple[int, int]]:
    """First and last + 1 task of each round, as _tile_of counts them."""
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
    """The loss (R,) of all pairs of a row and a column sample, and its gradients, float32.

    ``row`` (R,N,P,C,M) and ``column`` (R,N',P,C,M), pre-activations of any strides, ``column`` None for row itself;
    targets (N,) or (R,N). A sample with a target out of range, or with what is not finite, makes the loss NaN.
    """
    activation = normal_form(polynomial)
    num_runs, num_samples, num_patches, num_classes, filters = row.shape
    num_columns = num_samples if column is None else column.shape[1]
    loss = torch.zeros(num_runs, dtype=torch.float64, device=row.device)
    sizes = (num_classes, num_patches * filters)

    def zeros(samples: int) -> Tensor:
        return torch.zeros(num_runs, *sizes, samples if need_grad else 0, device=row.device)

    config = launch.pairwise_config(max(num_samples, num_columns), num_classes)
    row_blocks, column_blocks = (triton.cdiv(n, config.block) for n in (num_samples, num_columns))
    row_grad = zeros(row_blocks * config.block)
    # rows and columns of one problem have one gradient, if no two programs that run at once may write the same samples
    one_side = column is None and all(node == 0.5 for node in lam)
    column_grad = row_grad if one_side else zeros(column_blocks * config.block)
    rounds_alone = torch.are_deterministic_algorithms_enabled()
    for node, weight in zip(lam, lam_weight, strict=True) if num_runs * num_samples * num_columns else ():
        symmetric = column is None and node == 0.5
        rows = _pack(row, row_target, node / activation.threshold, config.block)
        columns = rows
        if not symmetric:
            other = (row, row_target) if column is None or column_target is None else (column, column_target)
            columns = _pack(*other, (1 - node) / activation.threshold, config.block)
        rounds = _rounds(row_blocks, column_blocks, symmetric)
        num_tasks = rounds[-1][1]
        parts = torch.zeros(num_runs, num_tasks, device=row.device)
        for first, last in rounds if rounds_alone else [(0, num_tasks)]:
            wanted = config.programs_per_multiprocessor * launch.multiprocessors(row)
            slot = (2 if need_grad else 1) * num_classes * config.block**2
            programs = max(1, min(num_runs * (last - first), wanted, config.workspace_bytes // (4 * slot)))
            workspace = torch.empty(programs * slot, device=row.device)
            arguments = (
                rows.t, columns.t, rows.target, columns.target, rows.mark, columns.mark, row_grad, column_grad,
                workspace, parts, node, weight, activation.scale / activation.degree, num_samples, num_columns, *sizes,
                num_runs, first, last, num_tasks, row_blocks, column_blocks,
            )  # fmt: skip
            constants = {
                "DEGREE": activation.degree,
                "LOWER": activation.lower,
                "UPPER": activation.upper,
                "SYMMETRIC": symmetric,
                "GRAD": need_grad,
                "ATOMIC": not rounds_alone and num_tasks > 1,
                "BLOCK": config.block,
                "CHUNK": config.chunk,
                "STRIP": config.strip,
            }
            launch.run(launch.Launch(_kernel, programs, arguments, constants, num_warps=1))
        loss += parts.sum(1, dtype=torch.float64)
    if not need_grad:
        return loss.float(), None, None
    if column is None and not one_side:
        row_grad += column_grad

    def unpack(grad: Tensor, samples: int) -> Tensor:
        grad = grad[..., :samples] * (activation.scale / activation.threshold)
        return grad.unflatten(2, (num_patches, filters)).permute(0, 4, 2, 1, 3)

    row_grad = unpack(row_grad, num_samples)
    return loss.float(), row_grad, None if column is None else unpack(column_grad, num_columns)
