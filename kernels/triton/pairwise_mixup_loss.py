"""All-pairs Mixup loss and its gradients, from pre-activations, in Triton.

    t[i,j,c,p,m] = a[i,c,p,m] + b[j,c,p,m]                 a = lam row / threshold, b = (1 - lam) column / threshold
    h[i,j,c,m]   = sum_p phi(t[i,j,c,p,m])
    g[i,j,c]     = sum_m readout[c,m] h[i,j,c,m]           readout = 1 where there is none
    q[i,j,c]     = (1 - smoothing) (l [c = y_i] + (1 - l) [c = y_j]) + smoothing / C        l = label_lam
    loss         = sum_{i,j} weight [lse_c(g[i,j]) - sum_c q[i,j,c] g[i,j,c]]
    D[i,j,c]     = weight (softmax(g[i,j])_c - q[i,j,c])
    dloss/drow[i,c,p,m]    = lam readout[c,m] sum_j D[i,j,c] phi'(t[i,j,c,p,m])
    dloss/dcolumn[j,c,p,m] = (1 - lam) readout[c,m] sum_i D[i,j,c] phi'(t[i,j,c,p,m])
    dloss/dreadout[c,m]    = sum_{i,j} D[i,j,c] h[i,j,c,m]

One kernel forms the logits, the next replaces them by D, the last adds up the gradients. Logits and D go through
memory, for as many pairs at a time as a bounded workspace holds. Where rows are the columns and lam = 1/2, each
unordered pair is computed once.

A program of the logits owns a tile of pairs of one class, and its threads lie along samples. A program of the gradients
owns some samples and features of one class, and its threads lie along features. So it adds up its own samples' gradient
in registers, and each slope also serves the other samples, whose sums over its own samples are added by atomics. With
deterministic algorithms there are none: rows and columns are owned in turn, and slopes are computed twice.

A sample with a value that is not finite, or with a target out of range, has NaN as its ``nan_mask``, which is added to
the logits of all its pairs; other samples have 0.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..polynomial import Polynomial
from . import configs, launch
from .activation import Kind, add_phi_of_sum, kind, mul_slope_of_sum, normal_form
from .configs import cdiv

__all__ = ["pairwise_mixup_loss"]

# Integers that must not cost a compilation per problem size.
_SIZES = [
    "N", "rows", "columns", "owns", "others", "P", "C", "M", "blocks", "row_blocks", "column_blocks", "chunks",
    "length", "first_row", "target_run_stride", "target_stride", "readout_run_stride",
]  # fmt: skip


class Softmax(NamedTuple):
    """What the softmax kernel is compiled for: which pairs there are, which of them count, whether D is wanted."""

    symmetric: bool
    pairs: str
    grad: bool


class Gradient(NamedTuple):
    """What the gradient kernel is compiled for.

    Attributes:
        activation: the polynomial's kind.
        symmetric: whether rows are the first columns, so that only pairs of a row and a later column exist.
        owns_rows: whether a program owns rows, not columns.
        atomic: whether it adds to the other side's gradient too.
        readout: whether there is one.
    """

    activation: Kind
    symmetric: bool
    owns_rows: bool
    atomic: bool
    readout: bool


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_pack_kernel(
    s, target, t, label, nan_mask, factor, target_run_stride, target_stride, N, P, C, M, blocks, chunks,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pack a block of samples of a run, s (R,N,P,C,M), times factor, as the samples of a _Side.

    A program packs every ``chunks``-th chunk of WIDTH values. Copies of the last sample pad its block.
    """
    chunk = tl.program_id(0) % chunks
    block = tl.program_id(0) // chunks % blocks
    run = (tl.program_id(0) // chunks // blocks).to(tl.int64)
    along = tl.arange(0, BLOCK)
    sample = tl.minimum(block * BLOCK + along, N - 1)
    size = P * C * M
    nan_or_zero = tl.zeros((BLOCK,), tl.float32)
    for first in range(chunk * WIDTH, size, chunks * WIDTH):
        q = first + tl.arange(0, WIDTH)
        mask = (q < size)[None, :]
        p, c, m = q // (C * M), q // M % C, q % M
        z = tl.load(s + (run * N + sample)[:, None] * size + q[None, :], mask=mask, other=0.0).to(tl.float32) * factor
        place = (((run * C + c) * blocks + block) * M + m) * P + p
        tl.store(t + place[None, :] * BLOCK + along[:, None], z, mask=mask)
        nan_or_zero += tl.sum(tl.where(z * 0.0 == 0.0, 0.0, float("nan")), 1)
    place = run * blocks * BLOCK + block * BLOCK + along
    if chunk == 0:
        y = tl.load(target + run * target_run_stride + sample * target_stride)
        nan_or_zero = tl.where((y >= 0) & (y < C), nan_or_zero, float("nan"))
        tl.store(label + place, y.to(tl.int32))
    tl.store(nan_mask + (run * (chunks - 1) + chunk) * blocks * BLOCK + place, nan_or_zero)


@triton.jit
def _sum_phi(a, b, features, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of ``degree / scale * phi(a + b)`` over features, of each row and column of a tile."""
    accum = tl.zeros((BLOCK, BLOCK), tl.float32)
    for f in tl.range(0, features, loop_unroll_factor=4):
        a_f, b_f = tl.load(a + f * BLOCK), tl.load(b + f * BLOCK)
        accum = add_phi_of_sum(accum, b_f[None, :], a_f[:, None], ACTIVATION)
    return accum


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_logits_kernel(
    a, b, readout, row_nan_mask, column_nan_mask, logits, scale, readout_run_stride, rows, P, C, M, row_blocks,
    column_blocks, chunks,
    ACTIVATION: tl.constexpr, SYMMETRIC: tl.constexpr, READOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the logits (R,C,rows,padded columns) of a class, NaN in class 0 where a sample is.

    a, b and nan_masks are those of a _Side each. SYMMETRIC leaves out the tiles below the diagonal.
    """
    column_block = tl.program_id(0) % column_blocks
    row_block = tl.program_id(0) // column_blocks % row_blocks
    run_class = (tl.program_id(0) // column_blocks // row_blocks).to(tl.int64)
    along = tl.arange(0, BLOCK)
    if not SYMMETRIC or row_block <= column_block:
        a_tile = a + (run_class * row_blocks + row_block) * P * M * BLOCK + along
        b_tile = b + (run_class * column_blocks + column_block) * P * M * BLOCK + along
        if READOUT:
            second_layer = readout + run_class // C * readout_run_stride + run_class % C * M
            accum = tl.zeros((BLOCK, BLOCK), tl.float32)
            for m in range(M):
                h = _sum_phi(a_tile + m * P * BLOCK, b_tile + m * P * BLOCK, P, ACTIVATION, BLOCK)
                accum += tl.load(second_layer + m) * h
        else:
            accum = _sum_phi(a_tile, b_tile, P * M, ACTIVATION, BLOCK)
        if run_class % C == 0:
            row_place = (run_class // C * chunks * row_blocks + row_block) * BLOCK + along
            column_place = (run_class // C * chunks * column_blocks + column_block) * BLOCK + along
            for chunk in range(chunks):
                accum += tl.load(row_nan_mask + row_place + chunk * row_blocks * BLOCK)[:, None]
                accum += tl.load(column_nan_mask + column_place + chunk * column_blocks * BLOCK)[None, :]
        i = row_block * BLOCK + along
        tile = (
            logits + (run_class * rows + i)[:, None] * (column_blocks * BLOCK) + column_block * BLOCK + along[None, :]
        )
        tl.store(tile, scale * accum, mask=(i < rows)[:, None])


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_softmax_kernel(
    logits, row_label, column_label, loss, label_lam, label_smoothing, weight, factor, first_row, rows, columns, C,
    SETTINGS: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Store the loss of PAIRS pairs, and in place of their logits factor D, 0 for pairs that do not count.

    loss (R,programs of a run). Row i is the sample of column first_row + i, where rows and columns are of one side.
    """
    columns_padded = (columns + BLOCK - 1) // BLOCK * BLOCK
    class_stride = rows * columns_padded.to(tl.int64)
    parts = (class_stride + PAIRS - 1) // PAIRS
    run = tl.program_id(0) // parts
    first_place = tl.program_id(0) % parts * PAIRS
    if SETTINGS.symmetric:  # a row's pairs in blocks below the diagonal do not count, nor does any kernel read their D
        row, last = first_place // columns_padded, first_place + PAIRS - 1
        if (row == last // columns_padded) & (row // BLOCK > last % columns_padded // BLOCK):
            tl.store(loss + tl.program_id(0), 0.0)
            return
    place = first_place + tl.arange(0, PAIRS)
    in_layer = place < class_stride
    i, j = (place // columns_padded).to(tl.int32), (place % columns_padded).to(tl.int32)
    mask = in_layer & (j < columns)
    if SETTINGS.symmetric:
        mask &= i <= j
    y_i = tl.load(row_label + run * ((rows + BLOCK - 1) // BLOCK * BLOCK) + i, mask=mask, other=0)
    y_j = tl.load(column_label + run * columns_padded + j, mask=mask, other=0)
    counts = mask
    if SETTINGS.pairs == "distinct":
        counts &= i + first_row != j
    elif SETTINGS.pairs == "different_class":
        counts &= y_i != y_j
    w = tl.where(counts, weight, 0.0)
    if SETTINGS.symmetric:
        w = tl.where(i < j, 2.0 * w, w)
    own = (1.0 - label_smoothing) * label_lam
    other = (1.0 - label_smoothing) * (1.0 - label_lam)

    logits += run * C * class_stride + place
    row_max = tl.full((PAIRS,), float("-inf"), tl.float32)
    accum = tl.zeros((PAIRS,), tl.float32)
    target = tl.zeros((PAIRS,), tl.float32)
    for first in range(0, C, CLASSES):
        c = (first + tl.arange(0, CLASSES))[:, None]
        g = tl.load(logits[None, :] + c * class_stride, mask=(c < C) & mask[None, :], other=0.0)
        label = tl.where(y_i[None, :] == c, own, 0.0) + tl.where(y_j[None, :] == c, other, 0.0) + label_smoothing / C
        target += tl.sum(tl.where(c < C, label * g, 0.0), 0)  # no product is fused into an exchange
        g = tl.where(c < C, g, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(g, 0))
        accum = accum * tl.exp(row_max - new_max) + tl.sum(tl.exp(g - new_max[None, :]), 0)
        row_max = new_max
    lse = row_max + tl.log(accum)
    tl.store(loss + tl.program_id(0), tl.sum(tl.where(counts, w * (lse - target), 0.0), 0))
    if SETTINGS.grad:
        w *= factor
        for first in range(0, C, CLASSES):
            c = (first + tl.arange(0, CLASSES))[:, None]
            g = tl.load(logits[None, :] + c * class_stride, mask=(c < C) & mask[None, :], other=0.0)
            label = (
                tl.where(y_i[None, :] == c, own, 0.0) + tl.where(y_j[None, :] == c, other, 0.0) + label_smoothing / C
            )
            d = tl.where(counts[None, :], w[None, :] * (tl.exp(g - lse[None, :]) - label), 0.0)
            tl.store(logits[None, :] + c * class_stride, d, mask=(c < C) & in_layer[None, :])


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_gradient_kernel(
    own, other, d, readout, own_grad, other_grad, own_factor, other_factor, readout_run_stride, owns, others, P, C, M,
    column_blocks, length, SETTINGS: tl.constexpr, BLOCK: tl.constexpr, OWN: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Add the gradients of OWN samples of one side with ``length`` of the other, of FEATURES of a class.

    own (R,owns,P,C,M) and other (R,others,P,C,M) are pre-activations, own_grad and other_grad their gradients; d
    (R,C,rows,padded columns) has D times phi's scale, and own_factor and other_factor are their shares of t.
    """
    ACTIVATION: tl.constexpr = SETTINGS.activation
    parts = (others + length - 1) // length
    feature_tiles = (P * M + FEATURES - 1) // FEATURES
    own_blocks = (owns + OWN - 1) // OWN
    tile = tl.program_id(0) % feature_tiles
    part = tl.program_id(0) // feature_tiles % parts
    first_own = tl.program_id(0) // feature_tiles // parts % own_blocks * OWN
    run_class = (tl.program_id(0) // feature_tiles // parts // own_blocks).to(tl.int64)
    run, c = run_class // C, run_class % C
    begin = part * length
    end = tl.minimum(begin + length, others)
    if SETTINGS.symmetric:  # rows up to the last of own columns, columns from the first of own rows
        if SETTINGS.owns_rows:
            begin = tl.maximum(begin, first_own)
        else:
            end = tl.minimum(end, first_own + OWN)
    if begin < end:
        f = tile * FEATURES + tl.arange(0, FEATURES)
        mask = f < P * M
        f = tl.minimum(f, P * M - 1)
        m = f % M
        q = (f // M * C + c) * M + m
        n = first_own + tl.arange(0, OWN)
        sample = tl.minimum(n, owns - 1)
        size = P * C * M
        # One dimension, so that lanes go along features: with two, releases of Triton differ in what they choose.
        own_places = tl.reshape((run * owns + sample)[:, None] * size + q[None, :], [OWN * FEATURES])
        own_t = tl.reshape(tl.load(own + own_places).to(tl.float32) * own_factor, [OWN, FEATURES])
        own_factors = tl.zeros((FEATURES,), tl.float32) + own_factor
        other_factors = tl.zeros((FEATURES,), tl.float32) + other_factor
        if SETTINGS.readout:
            a = tl.load(readout + run * readout_run_stride + c * M + m)
            own_factors *= a
            other_factors *= a
        if SETTINGS.owns_rows:  # the last row again in place of those that are not there
            d_start = d + (run_class * owns + first_own) * (column_blocks * BLOCK) + begin
            d_places, d_stride = (sample - first_own) * (column_blocks * BLOCK), 1
        else:
            d_start = d + (run_class * others + begin) * (column_blocks * BLOCK) + first_own
            d_places, d_stride = tl.arange(0, OWN), column_blocks * BLOCK
        other_places = (run * others + begin) * size + q
        accum = tl.zeros((OWN, FEATURES), tl.float32)
        for _ in range(begin, end):
            other_t = tl.load(other + other_places).to(tl.float32) * other_factor
            e = mul_slope_of_sum(tl.load(d_start + d_places)[:, None], other_t[None, :], own_t, ACTIVATION)
            accum += e
            if SETTINGS.atomic:
                tl.atomic_add(other_grad + other_places, tl.sum(e, 0) * other_factors, mask=mask, sem="relaxed")
            other_places += size
            d_start += d_stride
        accum = tl.reshape(accum * own_factors[None, :], [OWN * FEATURES])
        own_mask = tl.reshape((n < owns)[:, None] & mask[None, :], [OWN * FEATURES])
        if SETTINGS.atomic:
            tl.atomic_add(own_grad + own_places, accum, mask=own_mask, sem="relaxed")
        else:
            tl.store(own_grad + own_places, tl.load(own_grad + own_places, mask=own_mask) + accum, mask=own_mask)


@triton.jit(do_not_specialize=_SIZES)
def pairwise_mixup_loss_readout_kernel(
    a, b, d, grad, rows, P, C, M, row_blocks, column_blocks,
    ACTIVATION: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a tile's part of degree dloss/dreadout of a class, grad (R,C,tiles,M); a, b and d as elsewhere."""
    column_block = tl.program_id(0) % column_blocks
    row_block = tl.program_id(0) // column_blocks % row_blocks
    run_class = (tl.program_id(0) // column_blocks // row_blocks).to(tl.int64)
    along = tl.arange(0, BLOCK)
    grad += tl.program_id(0).to(tl.int64) * M
    if not SYMMETRIC or row_block <= column_block:
        a_tile = a + (run_class * row_blocks + row_block) * P * M * BLOCK + along
        b_tile = b + (run_class * column_blocks + column_block) * P * M * BLOCK + along
        i = row_block * BLOCK + along
        tile = d + (run_class * rows + i)[:, None] * (column_blocks * BLOCK) + column_block * BLOCK + along[None, :]
        mask = (i < rows)[:, None]
        d_tile = tl.load(tile, mask=mask, other=0.0)
        for m in range(M):
            h = _sum_phi(a_tile + m * P * BLOCK, b_tile + m * P * BLOCK, P, ACTIVATION, BLOCK)
            tl.store(grad + m, tl.sum(tl.sum(tl.where(mask, d_tile * h, 0.0), 1), 0))
    else:
        for m in range(M):
            tl.store(grad + m, 0.0)


class _Samples(NamedTuple):
    """One side of the pairs."""

    s: Tensor  # (R,N,P,C,M), contiguous
    target: Tensor  # (R,N)
    grad: Tensor | None  # like s, float32, added to

    def part(self, runs: slice, samples: slice) -> "_Samples":
        """Return some samples of one run, or all samples of some."""
        if runs.start == samples.start == 0 and runs.stop >= self.s.shape[0] and samples.stop >= self.s.shape[1]:
            return self
        grad = None if self.grad is None else self.grad[runs, samples]
        return _Samples(self.s[runs, samples], self.target[runs, samples], grad)


class _Side(NamedTuple):
    """Samples packed for one node lam."""

    t: Tensor  # (R,C,blocks,M,P,block): lam s / threshold, or (1 - lam) s / threshold
    label: Tensor  # (R,padded samples), int32
    nan_mask: Tensor  # (R,chunks,padded samples): NaN for a sample whose loss is NaN, else 0


class _Band(NamedTuple):
    """Pairs that are in work at once: those of some rows and columns of some runs.

    If ``symmetric``, rows are the first columns, and only pairs of a row and a column that is not before it are meant.
    """

    runs: slice
    rows: slice
    columns: slice
    symmetric: bool


class _Objective(NamedTuple):
    """Weight and label of the pairs of one node lam, and which of them count."""

    node: float
    weight: float
    label_lam: float
    label_smoothing: float
    pairs: str


def _bands(num_runs: int, num_rows: int, num_columns: int, symmetric: bool, block: int, limit: int) -> Iterator[_Band]:
    """Divide all pairs, or the unordered ones, into bands of at most ``limit`` pairs, or of one tile."""
    padded = cdiv(num_columns, block) * block
    if num_rows * padded <= limit:
        step = limit // (num_rows * padded)
        for run in range(0, num_runs, step):
            yield _Band(slice(run, run + step), slice(0, num_rows), slice(0, num_columns), symmetric)
        return
    rows = max(limit // padded // block, 1) * block
    columns = max(limit // rows // block, 1) * block
    for run, row in itertools.product(range(num_runs), range(0, num_rows, rows)):
        diagonal = row if symmetric else 0
        for column in range(diagonal, num_columns, columns):
            sides = slice(row, row + rows), slice(column, column + columns)
            yield _Band(slice(run, run + 1), *sides, symmetric and column == diagonal)


def _pack(samples: _Samples, factor: float, block: int) -> _Side:
    s, target, _ = samples
    num_runs, num_samples, num_patches, num_classes, filters = s.shape
    blocks = cdiv(num_samples, block)
    config, size = configs.PAIRWISE_CONFIG, num_patches * num_classes * filters
    width = config.pack_width
    chunks = max(1, min(cdiv(size, width), config.pack_chunks), size // config.pack_values)
    new = functools.partial(torch.empty, dtype=torch.float32, device=s.device)
    side = _Side(
        new(num_runs, num_classes, blocks, filters, num_patches, block),
        new(num_runs, blocks * block, dtype=torch.int32),
        new(num_runs, chunks, blocks * block),
    )
    sizes = (num_samples, num_patches, num_classes, filters, blocks, chunks)
    arguments = (s, target, *side, factor, *target.stride(), *sizes)
    constants = {"WIDTH": width, "BLOCK": block}
    launch.run(launch.Launch(pairwise_mixup_loss_pack_kernel, num_runs * blocks * chunks, arguments, constants))
    return side


class _Problem(NamedTuple):
    """Rows and columns of a band, packed, and what its kernels share."""

    rows: _Samples
    columns: _Samples
    a: _Side
    b: _Side
    readout: Tensor | None
    objective: _Objective
    activation: Polynomial
    symmetric: bool
    first_row: int
    block: int

    @property
    def factors(self) -> tuple[float, float]:
        """What multiplies rows and columns: their shares of t."""
        node, threshold = self.objective.node, self.activation.threshold
        return node / threshold, (1 - node) / threshold

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks of rows and of columns."""
        return cdiv(self.rows.s.shape[1], self.block), cdiv(self.columns.s.shape[1], self.block)

    @property
    def second_layer(self) -> tuple[Tensor, int]:
        """The readout and the stride of its runs; any tensor where there is none."""
        return (self.rows.s, 0) if self.readout is None else (self.readout, self.readout.stride(0))

    def launch_tiles(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], **options: Any) -> None:
        """Launch a program for each tile of each class."""
        num_runs, _, _, num_classes, _ = self.rows.s.shape
        constants = {"ACTIVATION": kind(self.activation), "SYMMETRIC": self.symmetric, "BLOCK": self.block} | constants
        programs, num_warps = num_runs * num_classes * math.prod(self.blocks), configs.pairwise_warps(self.block)
        launch.run(launch.Launch(kernel, programs, arguments, constants, num_warps, **options))


def _logits(problem: _Problem) -> Tensor:
    """Return the logits (R,C,rows,padded columns)."""
    a, b, activation = problem.a, problem.b, problem.activation
    num_runs, num_rows, num_patches, num_classes, filters = problem.rows.s.shape
    row_blocks, column_blocks = problem.blocks
    logits = _empty(problem, num_runs, num_classes, num_rows, column_blocks * problem.block)
    second_layer, run_stride = problem.second_layer
    arguments = (
        a.t, b.t, second_layer, a.nan_mask, b.nan_mask, logits, activation.scale / activation.degree, run_stride,
        num_rows, num_patches, num_classes, filters, row_blocks, column_blocks, a.nan_mask.shape[1],
    )  # fmt: skip
    constants = {"READOUT": problem.readout is not None}
    registers = configs.PAIRWISE_CONFIG.logits_registers
    problem.launch_tiles(pairwise_mixup_loss_logits_kernel, arguments, constants, max_registers=registers)
    return logits


def _softmax(problem: _Problem, logits: Tensor, need_grad: bool) -> Tensor:
    """Return the loss in parts (R,parts), and replace the logits by D times phi's scale if gradients are wanted."""
    config, objective = configs.PAIRWISE_CONFIG, problem.objective
    num_runs, num_classes, num_rows, _ = logits.shape
    parts = cdiv(logits[0, 0].numel(), config.pairs)
    loss = _empty(problem, num_runs, parts)
    arguments = (
        logits, problem.a.label, problem.b.label, loss, *objective[2:4], objective.weight, problem.activation.scale,
        problem.first_row, num_rows, problem.columns.s.shape[1], num_classes,
    )  # fmt: skip
    settings = Softmax(problem.symmetric, objective.pairs, need_grad)
    constants = {"SETTINGS": settings, "BLOCK": problem.block, "CLASSES": config.classes, "PAIRS": config.pairs}
    launch.run(launch.Launch(pairwise_mixup_loss_softmax_kernel, num_runs * parts, arguments, constants))
    return loss


def _readout_grad(problem: _Problem, d: Tensor) -> Tensor:
    """Return the gradient to the readout (R,C,M)."""
    num_runs, num_rows, num_patches, num_classes, filters = problem.rows.s.shape
    grads = _empty(problem, num_runs, num_classes, math.prod(problem.blocks), filters)
    sizes = (num_rows, num_patches, num_classes, filters, *problem.blocks)
    problem.launch_tiles(pairwise_mixup_loss_readout_kernel, (problem.a.t, problem.b.t, d, grads, *sizes), {})
    return grads.sum(2) / problem.activation.degree


def _add_gradients(problem: _Problem, d: Tensor) -> None:
    """Add the gradients to rows and columns."""
    rows, columns, (row_factor, column_factor) = problem.rows, problem.columns, problem.factors
    num_runs, _, num_patches, num_classes, filters = rows.s.shape
    features = num_patches * filters
    width = configs.pairwise_features(features)
    own_block = min(configs.PAIRWISE_CONFIG.own, problem.block)  # d has whole tiles
    atomic = not torch.are_deterministic_algorithms_enabled()
    sides = [((columns, column_factor), (rows, row_factor))]
    if not atomic:
        sides.append(sides[0][::-1])
    second_layer, run_stride = problem.second_layer
    for owns_rows, ((own, own_factor), (other, other_factor)) in enumerate(sides):
        owns, others = own.s.shape[1], other.s.shape[1]
        tiles = num_runs * num_classes * cdiv(features, width) * cdiv(owns, own_block)
        length = configs.pairwise_length(others, tiles, launch.multiprocessors(rows.s)) if atomic else others
        arguments = (
            own.s, other.s, d, second_layer, own.grad, other.grad, own_factor, other_factor, run_stride, owns,
            others, num_patches, num_classes, filters, problem.blocks[1], length,
        )  # fmt: skip
        settings = Gradient(
            kind(problem.activation), problem.symmetric, bool(owns_rows), atomic, problem.readout is not None
        )
        constants = {"SETTINGS": settings, "BLOCK": problem.block, "OWN": own_block, "FEATURES": width}
        kernel, programs = pairwise_mixup_loss_gradient_kernel, tiles * cdiv(others, length)
        launch.run(launch.Launch(kernel, programs, arguments, constants, num_warps=width // 32))


def _empty(problem: _Problem, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=problem.rows.s.device)


def _add_band(
    rows: _Samples, columns: _Samples, readout: Tensor | None, readout_grad: Tensor | None, objective: _Objective,
    activation: Polynomial, symmetric: bool, first_row: int, block: int,
) -> Tensor:  # fmt: skip
    """Return the loss of all pairs of a row and a column in parts (R,parts), and add its gradients."""
    a = b = _pack(rows, objective.node / activation.threshold, block)
    if not symmetric or rows.s.shape[1] != columns.s.shape[1]:
        b = _pack(columns, (1 - objective.node) / activation.threshold, block)
    problem = _Problem(rows, columns, a, b, readout, objective, activation, symmetric, first_row, block)
    logits = _logits(problem)
    need_grad = rows.grad is not None
    loss = _softmax(problem, logits, need_grad or readout_grad is not None)
    if readout_grad is not None:
        readout_grad += _readout_grad(problem, logits)
    if need_grad and rows.s.numel():
        _add_gradients(problem, logits)
    return loss


def pairwise_mixup_loss(
    row: Tensor,
    column: Tensor | None,
    row_target: Tensor,
    column_target: Tensor | None,
    lam: Sequence[float],
    lam_weight: Sequence[float],
    polynomial: Polynomial,
    need_grad: bool,
    label_lam: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    pairs: str = "all",
    readout: Tensor | None = None,
    need_readout: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss (R,) of all pairs of a row and a column sample, and its gradients, float32.

    ``row`` (R,N,P,C,M) and ``column`` (R,N',P,C,M), pre-activations of any strides, ``column`` None for row itself;
    targets (N,) or (R,N); ``readout`` (R or 1,C,M). ``pairs`` is "all", "distinct" or "different_class". A target out
    of range, or a value that is not finite, makes the loss NaN. The gradients are to row, column and readout.
    """
    activation = normal_form(polynomial)
    num_runs, num_rows, _, num_classes, filters = row.shape

    def samples(s: Tensor, target: Tensor) -> _Samples:
        grad = torch.zeros(s.shape, dtype=torch.float32, device=s.device) if need_grad else None
        return _Samples(launch.interpretable(s.contiguous()), target.expand(s.shape[:2]), grad)

    rows = columns = samples(row, row_target)
    if column is not None and column_target is not None:
        columns = samples(column, column_target)
    num_columns = columns.s.shape[1]
    readout_grad = None
    if readout is not None:
        readout = readout.float().contiguous().expand(num_runs, -1, -1)
        readout_grad = readout.new_zeros(num_runs, num_classes, filters) if need_readout else None
    losses = []
    labels = lam if label_lam is None else label_lam
    for node, weight, share in zip(lam, lam_weight, labels, strict=True) if num_runs * num_rows * num_columns else ():
        symmetric = column is None and node == 0.5
        block = configs.pairwise_block(
            num_runs * num_classes, num_rows, num_columns, symmetric, launch.multiprocessors(row)
        )
        limit = configs.PAIRWISE_CONFIG.workspace_bytes // (4 * num_classes)
        for band in _bands(num_runs, num_rows, num_columns, symmetric, block, limit):
            both_orders = symmetric and not band.symmetric  # elsewhere kernels see to it
            objective = _Objective(
                node, 2 * weight if both_orders else weight, 0.5 if symmetric else share, label_smoothing, pairs
            )
            loss = _add_band(
                rows.part(band.runs, band.rows), columns.part(band.runs, band.columns),
                None if readout is None else readout[band.runs],
                None if readout_grad is None else readout_grad[band.runs],
                objective, activation, band.symmetric, band.rows.start - band.columns.start, block,
            )  # fmt: skip
            losses.append((band.runs, loss))
    if len(losses) == 1:
        total = losses[0][1].sum(1)
    else:
        total = torch.zeros(num_runs, dtype=torch.float64, device=row.device)
        for runs, loss in losses:
            total[runs] += loss.sum(1, dtype=torch.float64)
    return total.float(), rows.grad, None if column is None else columns.grad, readout_grad
