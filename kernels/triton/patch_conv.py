"""Patch convolution and activation, summed over patches and filters: forward and both gradients, in Triton.

    z[n,p] = lam_n x[n,p] + (1 - lam_n) x[index_n,p]      (x[n,p] without a mix)
    s[n,p,q] = <w[q], z[n,p]>                             q = (class, filter), Q = C M
    g[n,c] = sum_{p,m} phi(s[n,p,cm])
    E[n,p,q] = G[n,c] phi'(s[n,p,q])                      G = dL/dg
    dL/dw[q] = sum_{n,p} E[n,p,q] z[n,p]
    dL/dz[n,p] = sum_q E[n,p,q] w[q]
    dL/dx_i = lam_i dL/dz_i + sum_{n: index_n = i} (1 - lam_n) dL/dz_n

The pre-activations s exist on chip only: the gradients recompute them, and the mix z with them (_Problem says when z is
written to memory first). Of long patches forward keeps the slopes phi'(s), where configs.keeps_slopes says so.

The rows of a tile are patches: some of each of some samples, so that few samples make as many rows as many do. Where
there are still fewer programs than a GPU runs at once, each gets a slice of the patches, and partial sums are added up
by another kernel. None uses atomic operations, so results repeat bit for bit.

All kernels count their programs on one axis, as only a grid's first axis may be longer than 65535, and address memory
with 64 bits. They are compiled for a network: classes, filters and dimension are constants, the numbers of samples and
patches are not. The rows of the input lie a multiple of 16 bytes apart, and their strides are passed in units of 16
bytes, from which the compiler knows that it may load 16 bytes at once.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..polynomial import Polynomial
from . import configs, launch, mixup
from .activation import add_phi, kind, mul_slope, normal_form

__all__ = ["patch_conv", "patch_conv_backward"]

# Integers that must not cost a compilation per batch size.
_SIZES = ["N", "P", "stride_xb", "stride_xn", "stride_xp", "stride_lam", "slices", "sample_slices"]


class Network(NamedTuple):
    """Sizes that a kernel is compiled for.

    ``width`` is ``dim``, padded to a multiple of 16 bytes; ``shared`` tells that all networks have the same weight.
    """

    classes: int
    filters: int
    dim: int
    width: int
    shared: bool


class Tile(NamedTuple):
    """The tile of a program: ``patches`` of each of ``samples`` are its rows, ``filters`` or ``dim`` its columns.

    ``classes`` is how many classes a tile of filters may touch, or 0 without matrix units.
    """

    samples: int
    patches: int
    filters: int
    dim: int
    classes: int = 0


@triton.jit
def _wide(stride, VECTOR: tl.constexpr):
    """Convert a stride in vectors to elements, in 64 bits."""
    return stride.to(tl.int64) * VECTOR


@triton.jit
def _size(NETWORK: tl.constexpr):
    """Return how far apart the weights of two networks lie: 0 where all have the same."""
    SIZE: tl.constexpr = 0 if NETWORK.shared else NETWORK.classes * NETWORK.filters * NETWORK.width
    return tl.full([], SIZE, tl.int64)


@triton.jit
def _samples(input, index, lam, b, n, N, stride_xb, stride_xn, stride_lam):
    """Return pointers to samples ``n`` and to their partners, and lam_n, NaN where the partner is out of range."""
    first = input + b * stride_xb
    samples = first + n * stride_xn
    if index is None:
        return samples, samples, 1.0
    else:
        partner = tl.load(index + n, mask=n < N, other=0)
        exists = (partner >= 0) & (partner < N)
        weight = tl.load(lam + n * stride_lam, mask=n < N, other=0.0)
        partners = first + tl.where(exists, partner, 0) * stride_xn
        return samples, partners, tl.where(exists, weight, float("nan"))


@triton.jit
def _mix(x, partner, lam):
    """``lam x + (1 - lam) partner``, computed in float32."""
    return tl.fma(lam, x.to(tl.float32), (1.0 - lam) * partner.to(tl.float32)).to(x.dtype)


@triton.jit
def _operand(x, PRECISION: tl.constexpr):
    """Return x as an operand of tl.dot, which in TF32 is rounded to 10 bits of mantissa, to nearest.

    Matrix units would cut the other 13 bits off, which makes every product too small.
    """
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < float("inf"), rounded, x)  # the carry would turn some NaN into zeros
    return x


@triton.jit
def _halves(x):
    """Return x, cut off to the 10 bits of mantissa of TF32, and the rest."""
    large = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    return large, x - large


@triton.jit
def _dot(a, b, accum, PRECISION: tl.constexpr, TURN: tl.constexpr = False, INFINITE: tl.constexpr = False):
    """Return ``a b + accum``, summed in float32; ``accum`` may be None.

    "tf32x3" forms the product of the sums of two parts in TF32, without that of the small parts. An operand that does
    not change in a loop is split before it, which tl.dot's own "tf32x3" does not do. An infinite operand gives NaN
    unless ``INFINITE``.

    ``TURN`` computes ``(b^T a^T)^T``: the second operand of a product in TF32 is stored to shared memory transposed,
    which the layout of another product's result can do without bank conflicts, that of a load not.
    """
    if TURN:
        turned = None if accum is None else tl.trans(accum)
        return tl.trans(_dot(tl.trans(b), tl.trans(a), turned, PRECISION))
    elif PRECISION == "tf32x3":
        a_large, a_small = _halves(a)
        b_large, b_small = _halves(b)
        s = tl.dot(a_small, b_large, accum, input_precision="tf32", out_dtype=tl.float32)
        s = tl.dot(a_large, b_small, s, input_precision="tf32", out_dtype=tl.float32)
        if INFINITE:
            s = tl.where(s == s, s, 0.0)  # infinity times a small part of 0
        return tl.dot(a_large, b_large, s, input_precision="tf32", out_dtype=tl.float32)
    else:
        return tl.dot(a, b, accum, input_precision=PRECISION, out_dtype=tl.float32)


# Where no elements of a tile are known to be neighbours in memory, older releases of Triton put lanes along its first
# dimension, and other operands follow: 32 lanes then read one bank of shared memory.
_LANES_ALONG_ROWS = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9))


@triton.jit
def _gather(pointers, mask):
    """Load a tile, 0 where not ``mask``, of which a thread holds neighbours along the second dimension."""
    if _LANES_ALONG_ROWS:
        VECTORS: tl.constexpr = pointers.shape[0] * pointers.shape[1] // 8
        pointers_of, mask_of = tl.reshape(pointers, [VECTORS, 8]), tl.reshape(mask, [VECTORS, 8])
        tile = tl.reshape(tl.load(pointers_of, mask=mask_of, other=0.0), pointers.shape)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def _patches(samples, partners, lam, offset, mask, d, WIDTH: tl.constexpr, MIX: tl.constexpr, PRECISION: tl.constexpr):
    """Load the tile z[row,d] at ``offset`` from the rows' first patches; 0 where not ``mask`` and beyond WIDTH."""
    mask = mask[:, None] & (d < WIDTH)[None, :]
    z = tl.load((samples + offset)[:, None] + d[None, :], mask=mask, other=0.0)
    if MIX:
        z = _mix(z, tl.load((partners + offset)[:, None] + d[None, :], mask=mask, other=0.0), lam[:, None])
    return _operand(z, PRECISION)


@triton.jit
def _filters(weight, q, end, d, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Load the tile w[q,d]; 0 from filter ``end`` on and beyond WIDTH."""
    mask = (q < end)[:, None] & (d < WIDTH)[None, :]
    return _operand(tl.load(weight + (q.to(tl.int64) * WIDTH)[:, None] + d[None, :], mask=mask, other=0.0), PRECISION)


@triton.jit
def _filters_t(weight, q, end, d, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Load the same tile, transposed."""
    mask = (q < end)[None, :] & (d < WIDTH)[:, None]
    return _operand(tl.load(weight + (q.to(tl.int64) * WIDTH)[None, :] + d[:, None], mask=mask, other=0.0), PRECISION)


@triton.jit(do_not_specialize=[*_SIZES, "D", "WIDTH"])
def patch_conv_mix_kernel(
    input, index, lam, N, P, D, stride_xb, stride_xn, stride_xp, stride_xd, stride_lam, mixed, WIDTH,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``z[n,p] = lam_n x[n,p] + (1 - lam_n) x[index_n,p]``, or x[n,p] without an index; zeros from D to WIDTH.

    A program owns BLOCK_D of one patch of BLOCK_N samples. Strides are in elements here.

    input (B,N,P,D), index (N,), lam (N,) or (), mixed (B,N,P,WIDTH) contiguous
    """
    blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(WIDTH, BLOCK_D)
    program = tl.program_id(0)
    d = program % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    program = program // tiles
    p = program % P
    n = program // P % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = program // P // blocks
    samples, partners, lam_n = _samples(
        input, index, lam, b, n, N, _wide(stride_xb, 1), _wide(stride_xn, 1), _wide(stride_lam, 1)
    )
    mask = (n < N)[:, None] & (d < D)[None, :]
    offset = p * _wide(stride_xp, 1) + d.to(tl.int64) * stride_xd  # which may be the constant 1
    z = tl.load(samples[:, None] + offset[None, :], mask=mask, other=0.0)
    if index is not None:
        z = _mix(z, tl.load(partners[:, None] + offset[None, :], mask=mask, other=0.0), lam_n[:, None])
    mixed += (((b.to(tl.int64) * N + n) * P + p) * WIDTH)[:, None] + d[None, :]
    tl.store(mixed, z, mask=(n < N)[:, None] & (d < WIDTH)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def patch_conv_forward_kernel(
    input, weight, index, lam,
    N, P, stride_xb, stride_xn, stride_xp, stride_lam, inverse, scale, logits, slices, slope, slope_scale,
    NETWORK: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``g[n,c] = sum_{p,m} phi(<w[c,m], z[n,p]>)``, a partial sum per slice of the patches.

    A program owns a block of samples, as many whole classes as TILE.filters hold, at least one, and of each sample
    every slices-th block of patches. It sums phi in registers, per row and filter; the sum over the filters of a class
    and over a sample's rows comes last.

    input (B,N,P,D), weight (B,CM,D) or (1,CM,D) contiguous, index (N,), lam (N,) or (),
    logits (B,slices,N,C) contiguous, slope (B,N,P,CM) contiguous or None: phi'(s)
    """
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = TILE.samples * TILE.patches
    Q: tl.constexpr = NETWORK.classes * NETWORK.filters
    CLASSES: tl.constexpr = max(TILE.filters // NETWORK.filters, 1)
    TILES: tl.constexpr = (NETWORK.classes + CLASSES - 1) // CLASSES
    WHOLE: tl.constexpr = NETWORK.width <= TILE.dim
    stride_xb, stride_xn, stride_xp = _wide(stride_xb, VECTOR), _wide(stride_xn, VECTOR), _wide(stride_xp, VECTOR)
    blocks = tl.cdiv(N, TILE.samples)
    program = tl.program_id(0)
    first_class = program % TILES * CLASSES
    program = program // TILES
    first = program % slices * TILE.patches
    program = program // slices
    b = program // blocks
    n0 = program % blocks * TILE.samples
    row = tl.arange(0, ROWS)
    n, row_patch = n0 + row // TILE.patches, row % TILE.patches

    samples, partners, lam_n = _samples(input, index, lam, b, n, N, stride_xb, stride_xn, stride_lam)
    samples += row_patch * stride_xp
    partners += row_patch * stride_xp
    weight += b * _size(NETWORK) + first_class.to(tl.int64) * (NETWORK.filters * NETWORK.width)
    end = tl.minimum(CLASSES, NETWORK.classes - first_class) * NETWORK.filters
    d = tl.arange(0, TILE.dim)
    accum = tl.full([ROWS, TILE.filters], 0.0, tl.float32)
    for start in range(0, CLASSES * NETWORK.filters, TILE.filters):
        q = start + tl.arange(0, TILE.filters)
        if WHOLE:
            w = _filters_t(weight, q, end, d, NETWORK.width, PRECISION)
        for p in range(first, P, slices * TILE.patches):
            offset = p * stride_xp
            mask = (n < N) & (p + row_patch < P)
            if WHOLE:
                z = _patches(samples, partners, lam_n, offset, mask, d, NETWORK.width, index is not None, PRECISION)
                s = _dot(z, w, None, PRECISION, INFINITE=True)
            else:
                s = tl.full([ROWS, TILE.filters], 0.0, tl.float32)
                for k in range(0, NETWORK.width, TILE.dim):
                    z = _patches(
                        samples, partners, lam_n, offset, mask, k + d, NETWORK.width, index is not None, PRECISION
                    )
                    w = _filters_t(weight, q, end, k + d, NETWORK.width, PRECISION)
                    s = _dot(z, w, s, PRECISION)
            if TILE.patches > 1:
                s = tl.where((p + row_patch < P)[:, None], s, 0.0)  # infinite filters times 0
            accum = add_phi(accum, s, inverse, ACTIVATION)
            if slope is not None:
                e = mul_slope(tl.full([ROWS, TILE.filters], 1.0, tl.float32), s, inverse, ACTIVATION) * slope_scale
                at = (
                    slope
                    + (((b.to(tl.int64) * N + n) * P + p + row_patch) * Q + first_class * NETWORK.filters)[:, None]
                )
                tl.store(at + q[None, :], e.to(slope.dtype.element_ty), mask=mask[:, None] & (q < end)[None, :])

    if TILE.patches > 1:
        accum = tl.sum(tl.reshape(accum, (TILE.samples, TILE.patches, TILE.filters)), 1)
    n = n0 + tl.arange(0, TILE.samples)
    logits += ((b * slices + first // TILE.patches).to(tl.int64) * N + n) * NETWORK.classes + first_class
    owner = tl.arange(0, TILE.filters) // NETWORK.filters
    for c in range(tl.minimum(CLASSES, NETWORK.classes - first_class)):
        g = tl.sum(tl.where((owner == c)[None, :], accum, 0.0), axis=1)
        tl.store(logits + c, (g * scale).to(logits.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=_SIZES)
def patch_conv_backward_weight_kernel(
    input, weight, index, lam,
    N, P, stride_xb, stride_xn, stride_xp, stride_lam, inverse,
    scale, grad, weight_grad, slices, sample_slices,
    NETWORK: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dL/dw[q] = sum_{n,p} E[n,p,q] z[n,p]``, a partial sum per slice of the samples and patches.

    A program owns TILE.filters, TILE.dim of D, every sample_slices-th block of samples and of each sample every
    (slices / sample_slices)-th block of patches.

    grad (B,N,C) contiguous, input (B,N,P,D), weight (B,CM,D) or (1,CM,D) contiguous, index (N,), lam (N,) or (),
    weight_grad (B,slices,CM,D) contiguous
    """
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = TILE.samples * TILE.patches
    Q: tl.constexpr = NETWORK.classes * NETWORK.filters
    Q_TILES: tl.constexpr = (Q + TILE.filters - 1) // TILE.filters
    D_TILES: tl.constexpr = (NETWORK.width + TILE.dim - 1) // TILE.dim
    WHOLE: tl.constexpr = NETWORK.width <= TILE.dim
    stride_xb, stride_xn, stride_xp = _wide(stride_xb, VECTOR), _wide(stride_xn, VECTOR), _wide(stride_xp, VECTOR)
    program = tl.program_id(0)
    q = program % Q_TILES * TILE.filters + tl.arange(0, TILE.filters)
    program = program // Q_TILES
    d_own = program % D_TILES * TILE.dim + tl.arange(0, TILE.dim)
    program = program // D_TILES
    part = program % slices
    b = program // slices

    d = tl.arange(0, TILE.dim)
    row = tl.arange(0, ROWS)
    row_patch = row % TILE.patches
    first = part // sample_slices * TILE.patches
    step = slices // sample_slices * TILE.patches
    weight += b * _size(NETWORK)
    grad += b.to(tl.int64) * N * NETWORK.classes + q // NETWORK.filters
    if WHOLE:
        w = _filters_t(weight, q, Q, d, NETWORK.width, PRECISION)
    accum = tl.full([TILE.filters, TILE.dim], 0.0, tl.float32)
    for start in range(part % sample_slices * TILE.samples, N, sample_slices * TILE.samples):
        n = start + row // TILE.patches
        samples, partners, lam_n = _samples(input, index, lam, b, n, N, stride_xb, stride_xn, stride_lam)
        samples += row_patch * stride_xp
        partners += row_patch * stride_xp
        g = grad[None, :] + (n.to(tl.int64) * NETWORK.classes)[:, None]
        g = _gather(g, (q < Q)[None, :] & (n < N)[:, None]).to(tl.float32) * scale
        for p in range(first, P, step):
            offset = p * stride_xp
            mask = (n < N) & (p + row_patch < P)
            if WHOLE:
                z = _patches(samples, partners, lam_n, offset, mask, d, NETWORK.width, index is not None, PRECISION)
                s = _dot(z, w, None, PRECISION)
            else:
                s = tl.full([ROWS, TILE.filters], 0.0, tl.float32)
                for k in range(0, NETWORK.width, TILE.dim):
                    z = _patches(
                        samples, partners, lam_n, offset, mask, k + d, NETWORK.width, index is not None, PRECISION
                    )
                    w = _filters_t(weight, q, Q, k + d, NETWORK.width, PRECISION)
                    s = _dot(z, w, s, PRECISION)
                z = _patches(samples, partners, lam_n, offset, mask, d_own, NETWORK.width, index is not None, PRECISION)
            if TILE.patches > 1:
                s = tl.where((p + row_patch < P)[:, None], s, 0.0)  # infinite filters times 0
            e = _operand(mul_slope(g, s, inverse, ACTIVATION).to(z.dtype), PRECISION)
            accum = _dot(tl.trans(e), z, accum, PRECISION, TURN=True)

    weight_grad += ((b * slices + part).to(tl.int64) * Q + q)[:, None] * NETWORK.dim + d_own[None, :]
    mask = (q < Q)[:, None] & (d_own < NETWORK.dim)[None, :]
    tl.store(weight_grad, accum.to(weight_grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def patch_conv_backward_input_kernel(
    input, weight, index, lam,
    N, P, stride_xb, stride_xn, stride_xp, stride_lam, inverse, scale, grad, mixed_grad,
    NETWORK: tl.constexpr, TILE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dL/dz[n,p] = sum_q E[n,p,q] w[q]``

    A program owns some patches of a block of samples and TILE.dim of D, and loops over the filters. To spread G[n,c]
    over the filters of c by a product with the matrix of who owns whom takes matrix units a fraction of the time of
    loading it for each filter, in 16 bits.

    grad (B,N,C) contiguous, input (B,N,P,D), weight (B,CM,D) or (1,CM,D) contiguous, index (N,), lam (N,) or (),
    mixed_grad (B,N,P,D) contiguous
    """
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = TILE.samples * TILE.patches
    C: tl.constexpr = NETWORK.classes
    Q: tl.constexpr = NETWORK.classes * NETWORK.filters
    D_TILES: tl.constexpr = (NETWORK.width + TILE.dim - 1) // TILE.dim
    WHOLE: tl.constexpr = NETWORK.width <= TILE.dim
    TURN: tl.constexpr = VECTOR == 4 and TILE.dim >= 64  # as matrix units take 64 rows
    stride_xb, stride_xn, stride_xp = _wide(stride_xb, VECTOR), _wide(stride_xn, VECTOR), _wide(stride_xp, VECTOR)
    program = tl.program_id(0)
    d_own = program % D_TILES * TILE.dim + tl.arange(0, TILE.dim)
    program = program // D_TILES
    patch_blocks = tl.cdiv(P, TILE.patches)
    blocks = tl.cdiv(N, TILE.samples)
    row = tl.arange(0, ROWS)
    p = program % patch_blocks * TILE.patches + row % TILE.patches
    program = program // patch_blocks
    n = program % blocks * TILE.samples + row // TILE.patches
    b = program // blocks

    d = tl.arange(0, TILE.dim)
    samples, partners, lam_n = _samples(input, index, lam, b, n, N, stride_xb, stride_xn, stride_lam)
    mask = (n < N) & (p < P)
    offset = p * stride_xp
    weight += b * _size(NETWORK)
    grad += (b.to(tl.int64) * N + n) * C
    if WHOLE:
        z = _patches(samples, partners, lam_n, offset, mask, d, NETWORK.width, index is not None, PRECISION)
    accum = tl.full([ROWS, TILE.dim], 0.0, tl.float32)
    for start in range(0, Q, TILE.filters):
        q = start + tl.arange(0, TILE.filters)
        owner = q // NETWORK.filters
        if TILE.classes == 0:
            g = _gather(grad[:, None] + owner[None, :], mask[:, None] & (q < Q)[None, :])
        else:
            c = start // NETWORK.filters + tl.arange(0, TILE.classes)
            g = tl.load(grad[:, None] + c[None, :], mask=mask[:, None] & (c < C)[None, :], other=0.0)
            owned = (c[:, None] == owner[None, :]).to(g.dtype)
            g = tl.dot(g, owned, out_dtype=tl.float32)
        if WHOLE:
            w = _filters(weight, q, Q, d, NETWORK.width, PRECISION)
            s = _dot(z, tl.trans(w), None, PRECISION, TURN)
        else:
            s = tl.full([ROWS, TILE.filters], 0.0, tl.float32)
            for k in range(0, NETWORK.width, TILE.dim):
                z = _patches(samples, partners, lam_n, offset, mask, k + d, NETWORK.width, index is not None, PRECISION)
                w = _filters(weight, q, Q, k + d, NETWORK.width, PRECISION)
                s = _dot(z, tl.trans(w), s, PRECISION, TURN)
            w = _filters(weight, q, Q, d_own, NETWORK.width, PRECISION)
        e = _operand(mul_slope(g.to(tl.float32) * scale, s, inverse, ACTIVATION).to(w.dtype), PRECISION)
        accum = _dot(e, w, accum, PRECISION, TURN)

    mixed_grad += (((b.to(tl.int64) * N + n) * P + p) * NETWORK.dim)[:, None] + d_own[None, :]
    store = mask[:, None] & (d_own < NETWORK.dim)[None, :]
    tl.store(mixed_grad, accum.to(mixed_grad.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=_SIZES)
def patch_conv_kept_weight_kernel(
    input, slope, grad, weight_grad, N, P, stride_xb, stride_xn, stride_xp, slices, sample_slices,
    NETWORK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dL/dw[q] = sum_{n,p} G[n,c] slope[n,p,q] z[n,p]``, a partial sum per slice: as above, without computing s.

    input (B,N,P,D), slope (B,N,P,CM) contiguous, grad (B,N,C) contiguous, weight_grad (B,slices,CM,D) contiguous
    """
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    ROWS: tl.constexpr = TILE.samples * TILE.patches
    Q: tl.constexpr = NETWORK.classes * NETWORK.filters
    Q_TILES: tl.constexpr = (Q + TILE.filters - 1) // TILE.filters
    D_TILES: tl.constexpr = (NETWORK.width + TILE.dim - 1) // TILE.dim
    stride_xb, stride_xn, stride_xp = _wide(stride_xb, VECTOR), _wide(stride_xn, VECTOR), _wide(stride_xp, VECTOR)
    program = tl.program_id(0)
    q = program % Q_TILES * TILE.filters + tl.arange(0, TILE.filters)
    program = program // Q_TILES
    d = program % D_TILES * TILE.dim + tl.arange(0, TILE.dim)
    program = program // D_TILES
    part = program % slices
    b = (program // slices).to(tl.int64)

    row = tl.arange(0, ROWS)
    row_patch = row % TILE.patches
    first = part // sample_slices * TILE.patches
    step = slices // sample_slices * TILE.patches
    slope += b * N * P * Q + q[None, :]
    grad += b * N * NETWORK.classes + (q // NETWORK.filters)[None, :]
    input += b * stride_xb + d[None, :]
    accum = tl.full([TILE.filters, TILE.dim], 0.0, tl.float32)
    for start in range(part % sample_slices * TILE.samples, N, sample_slices * TILE.samples):
        n = start + (row // TILE.patches).to(tl.int64)
        in_filters = (n < N)[:, None] & (q < Q)[None, :]
        g = _gather(grad + (n * NETWORK.classes)[:, None], in_filters).to(tl.float32)
        slopes = slope + ((n * P + row_patch) * Q)[:, None]
        samples = input + (n * stride_xn + row_patch * stride_xp)[:, None]
        for p in range(first, P, step):
            in_patches = (p + row_patch < P)[:, None]
            e = tl.load(slopes + p * Q, mask=in_filters & in_patches, other=0.0)
            mask = (n < N)[:, None] & in_patches & (d < NETWORK.width)[None, :]
            z = _operand(tl.load(samples + p * stride_xp, mask=mask, other=0.0), PRECISION)
            e = _operand((e.to(tl.float32) * g).to(z.dtype), PRECISION)
            accum = _dot(tl.trans(e), z, accum, PRECISION, TURN=True)

    weight_grad += ((b * slices + part) * Q + q)[:, None] * NETWORK.dim + d[None, :]
    tl.store(weight_grad, accum.to(weight_grad.dtype.element_ty), mask=(q < Q)[:, None] & (d < NETWORK.dim)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def patch_conv_kept_input_kernel(
    weight, slope, grad, mixed_grad, N, P,
    NETWORK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dL/dz[n,p] = sum_q G[n,c] slope[n,p,q] w[q]``

    A program owns a block of rows (n, p), in order, and TILE.dim of D, and loops over the filters.

    weight (B,CM,D) or (1,CM,D) contiguous, slope (B,N,P,CM) contiguous, grad (B,N,C) contiguous,
    mixed_grad (B,N,P,D) contiguous
    """
    ROWS: tl.constexpr = TILE.samples * TILE.patches
    Q: tl.constexpr = NETWORK.classes * NETWORK.filters
    D_TILES: tl.constexpr = (NETWORK.width + TILE.dim - 1) // TILE.dim
    TURN: tl.constexpr = weight.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    d = program % D_TILES * TILE.dim + tl.arange(0, TILE.dim)
    program = program // D_TILES
    blocks = tl.cdiv(N * P, ROWS)
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    b = (program // blocks).to(tl.int64)
    in_rows = row < N * P
    grad += ((b * N + row // P) * NETWORK.classes)[:, None]
    rows = b * N * P + row
    weight += b * _size(NETWORK)
    accum = tl.full([ROWS, TILE.dim], 0.0, tl.float32)
    for start in range(0, Q, TILE.filters):
        q = start + tl.arange(0, TILE.filters)
        mask = in_rows[:, None] & (q < Q)[None, :]
        g = _gather(grad + (q // NETWORK.filters)[None, :], mask).to(tl.float32)
        e = tl.load(slope + (rows * Q)[:, None] + q[None, :], mask=mask, other=0.0)
        w = _filters(weight, q, Q, d, NETWORK.width, PRECISION)
        e = _operand((e.to(tl.float32) * g).to(w.dtype), PRECISION)
        accum = _dot(e, w, accum, PRECISION, TURN)
    store = in_rows[:, None] & (d < NETWORK.dim)[None, :]
    tl.store(mixed_grad + (rows * NETWORK.dim)[:, None] + d[None, :], accum.to(mixed_grad.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["slices", "size"])
def patch_conv_sum_kernel(partial, total, slices, size, BLOCK: tl.constexpr):
    """``total[b,i] = sum_slice partial[b,slice,i]``, in order; partial (B,slices,size) float32, total (B,size)"""
    blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partial += b * slices * size + i
    accum = tl.zeros([BLOCK], tl.float32)
    for _ in range(slices):
        accum += tl.load(partial, mask=i < size, other=0.0)
        partial += size
    tl.store(total + b * size + i, accum.to(total.dtype.element_ty), mask=i < size)


class _Problem:
    """The first arguments and the constants that all kernels share, and how to launch one.

    Kernels mix as they load, unless patches are too long for that, or their rows are not a multiple of 16 bytes apart,
    or ``mix_first``. Then z is written to memory first, once for all kernels, its rows padded with zeros to ``width``.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        index: Tensor | None,
        lam: Tensor | None,
        activation: Polynomial,
        mix_first: bool = False,
    ) -> None:
        self.runs, self.num_samples, self.num_patches, dim = input.shape
        self.empty = 0 in input.shape or 0 in weight.shape
        # A CPU tensor means Triton's interpreter, which gets bfloat16 products wrong: there float32 stands in.
        self.dtype = torch.float32 if input.dtype == torch.bfloat16 and input.is_cpu else input.dtype
        self.precision = launch.precision(self.dtype)
        self.activation = normal_form(activation)
        self.slope_scale = self.activation.scale / self.activation.threshold
        if self.empty:
            return
        vector = 16 // self.dtype.itemsize  # elements in 16 bytes
        width = configs.cdiv(dim, vector) * vector
        self.slots = launch.multiprocessors(input)
        self.most_programs = 3 if launch.reads_shared_operands(input) else 2
        shared = self.runs == 1 or weight.stride(0) == 0
        self.network = Network(weight.shape[1], weight.shape[2], dim, width, shared)
        input, weight = input.to(self.dtype), weight[: 1 if shared else None].to(self.dtype)
        if width > dim:
            weight = torch.nn.functional.pad(weight, (0, width - dim))
        weight = weight.contiguous()
        index = None if index is None else index.contiguous()
        stride_lam = 0 if lam is None or lam.dim() == 0 else lam.stride(0)
        self.tiles = configs.patch_conv_tiles(self.dtype, self.precision, width)
        if not _aligned(input, vector) or (index is not None and (mix_first or not self.tiles.mixes)):
            input, index, lam = self._mix(input, index, lam, stride_lam), None, None
        self.input, self.weight, self.index = input, weight, index
        self.strides = tuple(stride // vector for stride in input.stride()[:3])
        self.arguments = (
            input, weight, index, lam, self.num_samples, self.num_patches, *self.strides, stride_lam,
            1 / self.activation.threshold,
        )  # fmt: skip

    def _mix(self, input: Tensor, index: Tensor | None, lam: Tensor | None, stride_lam: int) -> Tensor:
        """Return z, or without a mix a copy of the input, (B,N,P,width)."""
        width = self.network.width
        mixed = torch.empty([*input.shape[:3], width], dtype=self.dtype, device=input.device)
        if index is not None and lam is not None and self.runs == 1 and width == input.shape[3] and _adjacent(input):
            mixup.mixup(input[0].flatten(1), index, lam, mixed[0].flatten(1))  # with 16-byte accesses
            return mixed
        blocks = {"BLOCK_N": 32, "BLOCK_D": 64}
        tiles = configs.cdiv(self.num_samples, blocks["BLOCK_N"]) * configs.cdiv(width, blocks["BLOCK_D"])
        arguments = (input, index, lam, *input.shape[1:], *input.stride(), stride_lam, mixed, width)
        launch.run(launch.Launch(patch_conv_mix_kernel, self.runs * self.num_patches * tiles, arguments, blocks))
        return mixed

    def config(self, direction: configs.Direction) -> configs.PatchConvConfig:
        return self.tiles.config(direction, self.network.classes, self.network.filters)

    def split(self, config: configs.PatchConvConfig, tiles: int, slice_samples: bool = False) -> configs.Split:
        """How programs, ``tiles`` for the same rows of one network, divide the rows."""
        return configs.split(
            self.num_samples, self.num_patches, config.block_rows, self.runs * tiles,
            self.slots * min(config.programs, self.most_programs), slice_samples,
        )  # fmt: skip

    def launch(
        self,
        kernel: Any,
        config: configs.PatchConvConfig,
        block_p: int,
        programs: int,
        arguments: tuple[Any, ...],
        **constants: Any,
    ) -> None:
        tile = Tile(config.block_rows // block_p, block_p, config.block_q, config.block_d, constants.pop("classes", 0))
        constants = {"NETWORK": self.network, "TILE": tile, "PRECISION": self.precision} | constants
        # Mixing takes registers for the partners' addresses and values, so there is no tighter cap then.
        max_registers = config.max_registers if self.index is None else 255
        options = (config.num_warps, config.num_stages, max_registers)
        launch.run(launch.Launch(kernel, programs, arguments, constants, *options))

    def partial(self, slices: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Memory for the sums of each slice, which are the result if there is one slice."""
        dtype = self.dtype if slices == 1 else torch.float32
        return torch.empty((self.runs, slices, *shape), dtype=dtype, device=device)

    def total(self, partial: Tensor) -> Tensor:
        """Return the sum over the slices."""
        if partial.shape[1] == 1:
            return partial.squeeze(1)
        total = torch.empty((self.runs, *partial.shape[2:]), dtype=self.dtype, device=partial.device)
        size = total.numel() // self.runs
        block = 64  # few, for enough programs
        programs = self.runs * configs.cdiv(size, block)
        arguments = (partial, total, partial.shape[1], size)
        launch.run(launch.Launch(patch_conv_sum_kernel, programs, arguments, {"BLOCK": block}, num_warps=1))
        return total


def _adjacent(input: Tensor) -> bool:
    """Return whether all elements of a sample lie side by side."""
    _, _, num_patches, dim = input.shape
    return input.stride(3) == 1 and (num_patches == 1 or input.stride(2) == dim)


def _aligned(rows: Tensor, vector: int) -> bool:
    """Whether rows are contiguous, and their length and their distances multiples of ``vector``."""
    return rows.stride(-1) == 1 and math.gcd(rows.shape[-1], *rows.stride()[:-1]) % vector == 0


def patch_conv(
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    lam: Tensor | None,
    activation: Polynomial,
    *,
    slope: Tensor | None = None,
) -> Tensor:
    """Return the logits (B,N,C) of B independent networks, whose samples ``index`` and ``lam`` mix unless None.

    ``input`` (B,N,P,D) and ``weight`` (B,C,M,D) of one dtype, also the result's; ``index`` (N,) int64; ``lam`` (N,) or
    () float32. A sample whose partner is out of range gets NaN. Unless None, ``slope`` (B,N,P,CM) gets phi'(s).
    """
    problem = _Problem(input, weight, index, lam, activation)
    if problem.empty:
        return input.new_zeros((*input.shape[:2], weight.shape[1]))
    config, network = problem.config("forward"), problem.network
    tiles = configs.cdiv(network.classes, max(config.block_q // network.filters, 1))
    split = problem.split(config, tiles)
    logits = problem.partial(split.slices, (problem.num_samples, network.classes), input.device)
    scale = problem.activation.scale / problem.activation.degree
    arguments = (*problem.arguments, scale, logits, split.slices, slope, problem.slope_scale)
    kernel = patch_conv_forward_kernel
    problem.launch(kernel, config, split.block_p, split.programs, arguments, ACTIVATION=kind(problem.activation))
    return problem.total(logits).to(input.dtype)


def patch_conv_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    index: Tensor | None,
    lam: Tensor | None,
    activation: Polynomial,
    *,
    input_grad: bool,
    weight_grad: bool,
    slope: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return those gradients of :func:`patch_conv` that are asked for, contiguous; ``grad`` (B,N,C).

    ``slope``, if :func:`patch_conv` has written it, saves computing the pre-activations again.
    """
    problem = _Problem(input, weight, index, lam, activation, mix_first=slope is not None and weight_grad)
    if problem.empty:
        input, weight = input.new_zeros(input.shape), weight.new_zeros(weight.shape)
        return input if input_grad else None, weight if weight_grad else None
    grad = grad.to(problem.dtype).contiguous()
    return (
        _input_grad(problem, grad, slope, index, lam).to(input.dtype) if input_grad else None,
        _weight_grad(problem, grad, slope).to(weight.dtype).view(weight.shape) if weight_grad else None,
    )


def _input_grad(
    problem: _Problem, grad: Tensor, slope: Tensor | None, index: Tensor | None, lam: Tensor | None
) -> Tensor:
    config, network = problem.config("backward_input" if slope is None else "kept_input"), problem.network
    samples, patches = problem.num_samples, problem.num_patches
    mixed_grad = torch.empty((problem.runs, samples, patches, network.dim), dtype=problem.dtype, device=grad.device)
    programs = problem.runs * configs.cdiv(network.width, config.block_d)
    if slope is None:
        block_p, blocks = configs.tile_rows(samples, patches, config.block_rows)
        # With one filter a class there is nothing to spread, and with more no tile meets more than 32 classes. With 64
        # ptxas 12.8 (of Triton 3.6) miscompiles for sm_90: a register of the next product's descriptor is not written.
        spreads = problem.dtype != torch.float32 and network.filters > 1
        whole = config.block_q % network.filters == 0  # classes do not go over a tile's edge
        classes = config.block_q // network.filters if whole else (config.block_q - 2) // network.filters + 2
        problem.launch(
            patch_conv_backward_input_kernel, config, block_p, programs * blocks,
            (*problem.arguments, problem.slope_scale, grad, mixed_grad), ACTIVATION=kind(problem.activation),
            classes=max(16, triton.next_power_of_2(classes)) if spreads else 0,
        )  # fmt: skip
    else:
        arguments = (problem.weight, slope, grad, mixed_grad, samples, patches)
        programs *= configs.cdiv(samples * patches, config.block_rows)
        problem.launch(patch_conv_kept_input_kernel, config, 1, programs, arguments)
    if index is None or lam is None:
        return mixed_grad
    input_grad = torch.empty_like(mixed_grad)
    mixup.mixup_backward(mixed_grad.flatten(0, 1).flatten(1), index, lam, input_grad.flatten(0, 1).flatten(1))
    return input_grad


def _weight_grad(problem: _Problem, grad: Tensor, slope: Tensor | None) -> Tensor:
    config, network = problem.config("backward_weight" if slope is None else "kept_weight"), problem.network
    filters = network.classes * network.filters
    tiles = configs.cdiv(filters, config.block_q) * configs.cdiv(network.width, config.block_d)
    split = problem.split(config, tiles, slice_samples=True)
    partial = problem.partial(split.slices, (filters, network.dim), grad.device)
    place = (config, split.block_p, split.programs)
    slices = (split.slices, split.sample_slices)
    if slope is None:
        arguments = (*problem.arguments, problem.slope_scale, grad, partial, *slices)
        problem.launch(patch_conv_backward_weight_kernel, *place, arguments, ACTIVATION=kind(problem.activation))
    else:
        sizes = (problem.num_samples, problem.num_patches, *problem.strides)
        arguments = (problem.input, slope, grad, partial, *sizes, *slices)
        problem.launch(patch_conv_kept_weight_kernel, *place, arguments)
    return problem.total(partial)
