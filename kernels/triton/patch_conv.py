"""Patch convolution and activation, summed over patches and filters: forward and both gradients, in Triton.

    z[n,p] = lam_n x[n,p] + (1 - lam_n) x[index_n,p]      (x[n,p] without a mix)
    s[n,p,q] = <w[q], z[n,p]>                             q = (class, filter), Q = C M
    g[n,c] = sum_{p,m} phi(s[n,p,cm])
    E[n,p,q] = G[n,c] phi'(s[n,p,q])                      G = dL/dg
    dL/dw[q] = sum_{n,p} E[n,p,q] z[n,p]
    dL/dz[n,p] = sum_q E[n,p,q] w[q]
    dL/dx_i = lam_i dL/dz_i + sum_{n: index_n = i} (1 - lam_n) dL/dz_n

The pre-activations s exist on chip only: the gradients recompute them, and the mix z with them (_Problem says when z is
written to memory first). No kernel uses atomic operations, so results repeat bit for bit; index_add_, which adds up the
partners' shares, follows torch.use_deterministic_algorithms.

All kernels count their programs on one axis, as only a grid's first axis may be longer than 65535, and address memory
with 64 bits. The rows of input and weight lie a multiple of 16 bytes apart, and their strides and D are passed in units
of 16 bytes, from which the compiler knows that it may load 16 bytes at once, whatever D is.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..polynomial import Polynomial
from . import configs, launch
from .activation import add_phi, kind, mul_slope, normal_form

__all__ = ["patch_conv", "patch_conv_backward"]

# Integers that must not cost a compilation per batch size.
_SIZES = ["N", "P", "C", "M", "D", "stride_xb", "stride_xn", "stride_xp", "stride_wb", "stride_wq", "stride_lam"]
_GRAD_STRIDES = ["stride_gb", "stride_gn", "stride_gc"]


@triton.jit
def _wide(stride, VECTOR: tl.constexpr):
    """Convert a stride in vectors to elements, in 64 bits."""
    return stride.to(tl.int64) * VECTOR


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
def _patch(samples, partners, lam, offset, in_samples, d, D, MIX: tl.constexpr, PRECISION: tl.constexpr):
    """Load the tile z[n,d] of the patch at ``offset`` in each sample; 0 beyond the last sample and beyond D."""
    mask = in_samples[:, None] & (d < D)[None, :]
    z = tl.load((samples + offset)[:, None] + d[None, :], mask=mask, other=0.0)
    if MIX:
        z = _mix(z, tl.load((partners + offset)[:, None] + d[None, :], mask=mask, other=0.0), lam[:, None])
    return _operand(z, PRECISION)


@triton.jit
def _filters(filters, in_filters, d, D, PRECISION: tl.constexpr):
    """Load the tile w[q,d]; 0 beyond the last filter and beyond D."""
    w = tl.load(filters[:, None] + d[None, :], mask=in_filters[:, None] & (d < D)[None, :], other=0.0)
    return _operand(w, PRECISION)


@triton.jit
def _filters_t(filters, in_filters, d, D, PRECISION: tl.constexpr):
    """Load the same tile, transposed."""
    w = tl.load(filters[None, :] + d[:, None], mask=in_filters[None, :] & (d < D)[:, None], other=0.0)
    return _operand(w, PRECISION)


@triton.jit(do_not_specialize=[*_SIZES, "stride_xd", "WIDTH"])
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
    samples, partners, ratio = _samples(
        input, index, lam, b, n, N, _wide(stride_xb, 1), _wide(stride_xn, 1), _wide(stride_lam, 1)
    )
    mask = (n < N)[:, None] & (d < D)[None, :]
    offset = p * _wide(stride_xp, 1) + d * _wide(stride_xd, 1)
    z = tl.load(samples[:, None] + offset[None, :], mask=mask, other=0.0)
    if index is not None:
        z = _mix(z, tl.load(partners[:, None] + offset[None, :], mask=mask, other=0.0), ratio[:, None])
    mixed += (((b.to(tl.int64) * N + n) * P + p) * WIDTH)[:, None] + d[None, :]
    tl.store(mixed, z, mask=(n < N)[:, None] & (d < WIDTH)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def patch_conv_forward_kernel(
    input, weight, index, lam,
    N, P, C, M, D, stride_xb, stride_xn, stride_xp, stride_wb, stride_wq, stride_lam, inverse,
    scale, logits,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``g[n,c] = sum_{p,m} phi(<w[c,m], z[n,p]>)``

    A program owns BLOCK_N samples and as many whole classes as BLOCK_Q filters hold, at least one. It loops over the
    patches and sums phi in registers, per sample and filter; the sum over the filters of a class comes last.

    input (B,N,P,D), weight (B,CM,D), index (N,), lam (N,) or (), logits (B,N,C) contiguous
    """
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    D *= VECTOR
    stride_xb, stride_xn, stride_xp = _wide(stride_xb, VECTOR), _wide(stride_xn, VECTOR), _wide(stride_xp, VECTOR)
    stride_wb, stride_wq = _wide(stride_wb, VECTOR), _wide(stride_wq, VECTOR)
    blocks = tl.cdiv(N, BLOCK_N)
    classes = tl.maximum(BLOCK_Q // M, 1)
    tiles = tl.cdiv(C, classes)
    program = tl.program_id(0)
    first_class = program % tiles * classes
    n = program // tiles % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = program // tiles // blocks

    samples, partners, ratio = _samples(input, index, lam, b, n, N, stride_xb, stride_xn, stride_lam)
    classes = tl.minimum(classes, C - first_class)
    d = tl.arange(0, BLOCK_D)
    accum = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for start in range(0, classes * M, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        filters = weight + b * stride_wb + (first_class * M + q) * stride_wq
        in_filters = q < classes * M
        if WHOLE_D:
            w = _filters_t(filters, in_filters, d, D, PRECISION)
        for p in range(P):
            offset = p * stride_xp
            if WHOLE_D:
                z = _patch(samples, partners, ratio, offset, n < N, d, D, index is not None, PRECISION)
                s = tl.dot(z, w, input_precision=PRECISION, out_dtype=tl.float32)
            else:
                s = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
                for k in range(0, D, BLOCK_D):
                    z = _patch(samples, partners, ratio, offset, n < N, k + d, D, index is not None, PRECISION)
                    w = _filters_t(filters, in_filters, k + d, D, PRECISION)
                    s = tl.dot(z, w, s, input_precision=PRECISION, out_dtype=tl.float32)
            accum = add_phi(accum, s, inverse, ACTIVATION)

    owner = tl.arange(0, BLOCK_Q) // M
    logits += (b.to(tl.int64) * N + n) * C + first_class
    for c in range(classes):
        g = tl.sum(tl.where((owner == c)[None, :], accum, 0.0), axis=1)
        tl.store(logits + c, (g * scale).to(logits.dtype.element_ty), mask=n < N)


@triton.jit(do_not_specialize=[*_SIZES, *_GRAD_STRIDES, "B", "sample_slices", "patch_slices"])
def patch_conv_backward_weight_kernel(
    input, weight, index, lam,
    N, P, C, M, D, stride_xb, stride_xn, stride_xp, stride_wb, stride_wq, stride_lam, inverse,
    scale, grad, stride_gb, stride_gn, stride_gc, weight_grad, B, sample_slices, patch_slices,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``dL/dw[q] = sum_{n,p} E[n,p,q] z[n,p]``, a partial sum per slice of the samples and patches.

    A program owns BLOCK_Q filters, BLOCK_D of D, and every sample_slices-th block of samples with every patch_slices-th
    patch. s and E are computed transposed: the product E^T z then takes E from the registers that hold it.

    grad (B,N,C), input (B,N,P,D), weight (B,CM,D), index (N,), lam (N,) or (),
    weight_grad (sample_slices * patch_slices,B,CM,D) contiguous
    """
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    D *= VECTOR
    stride_xb, stride_xn, stride_xp = _wide(stride_xb, VECTOR), _wide(stride_xn, VECTOR), _wide(stride_xp, VECTOR)
    stride_wb, stride_wq = _wide(stride_wb, VECTOR), _wide(stride_wq, VECTOR)
    stride_gb, stride_gn, stride_gc = _wide(stride_gb, 1), _wide(stride_gn, 1), _wide(stride_gc, 1)
    q_tiles = tl.cdiv(C * M, BLOCK_Q)
    d_tiles = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    q = program % q_tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    program = program // q_tiles
    d_own = program % d_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    program = program // d_tiles
    b = program % B
    part = program // B

    d = tl.arange(0, BLOCK_D)
    in_filters = q < C * M
    filters = weight + b * stride_wb + q * stride_wq
    grad += b * stride_gb + q // M * stride_gc
    if WHOLE_D:
        w = _filters(filters, in_filters, d, D, PRECISION)
    accum = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(part % sample_slices * BLOCK_N, N, sample_slices * BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        samples, partners, ratio = _samples(input, index, lam, b, n, N, stride_xb, stride_xn, stride_lam)
        g = grad[:, None] + (n * stride_gn)[None, :]
        g = tl.load(g, mask=in_filters[:, None] & (n < N)[None, :], other=0.0).to(tl.float32) * scale
        for p in range(part // sample_slices, P, patch_slices):
            offset = p * stride_xp
            if WHOLE_D:
                z = _patch(samples, partners, ratio, offset, n < N, d, D, index is not None, PRECISION)
                s = tl.dot(w, tl.trans(z), input_precision=PRECISION, out_dtype=tl.float32)
            else:
                s = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
                for k in range(0, D, BLOCK_D):
                    z = _patch(samples, partners, ratio, offset, n < N, k + d, D, index is not None, PRECISION)
                    w = _filters(filters, in_filters, k + d, D, PRECISION)
                    s = tl.dot(w, tl.trans(z), s, input_precision=PRECISION, out_dtype=tl.float32)
                z = _patch(samples, partners, ratio, offset, n < N, d_own, D, index is not None, PRECISION)
            e = _operand(mul_slope(g, s, inverse, ACTIVATION).to(z.dtype), PRECISION)
            accum = tl.dot(e, z, accum, input_precision=PRECISION, out_dtype=tl.float32)

    weight_grad += ((part.to(tl.int64) * B + b) * C * M + q)[:, None] * D + d_own[None, :]
    mask = in_filters[:, None] & (d_own < D)[None, :]
    tl.store(weight_grad, accum.to(weight_grad.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_SIZES, *_GRAD_STRIDES])
def patch_conv_backward_input_kernel(
    input, weight, index, lam,
    N, P, C, M, D, stride_xb, stride_xn, stride_xp, stride_wb, stride_wq, stride_lam, inverse,
    scale, grad, stride_gb, stride_gn, stride_gc, mixed_grad,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, WHOLE_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``dL/dz[n,p] = sum_q E[n,p,q] w[q]``

    A program owns one patch of BLOCK_N samples and BLOCK_D of D, and loops over the filters. To spread G[n,c] over the
    filters of c by a product with the matrix of who owns whom takes matrix units a fraction of the time of loading it
    for each filter; BLOCK_C is how many classes a tile of filters may touch, or 0 without matrix units.

    grad (B,N,C), input (B,N,P,D), weight (B,CM,D), index (N,), lam (N,) or (), mixed_grad (B,N,P,D) contiguous
    """
    VECTOR: tl.constexpr = 128 // input.dtype.element_ty.primitive_bitwidth
    D *= VECTOR
    stride_xb, stride_xn, stride_xp = _wide(stride_xb, VECTOR), _wide(stride_xn, VECTOR), _wide(stride_xp, VECTOR)
    stride_wb, stride_wq = _wide(stride_wb, VECTOR), _wide(stride_wq, VECTOR)
    stride_gb, stride_gn, stride_gc = _wide(stride_gb, 1), _wide(stride_gn, 1), _wide(stride_gc, 1)
    blocks = tl.cdiv(N, BLOCK_N)
    d_tiles = tl.cdiv(D, BLOCK_D)
    program = tl.program_id(0)
    d_own = program % d_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    program = program // d_tiles
    p = program % P
    n = program // P % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = program // P // blocks

    d = tl.arange(0, BLOCK_D)
    samples, partners, ratio = _samples(input, index, lam, b, n, N, stride_xb, stride_xn, stride_lam)
    offset = p * stride_xp
    weight += b * stride_wb
    grad += b * stride_gb + n * stride_gn
    if WHOLE_D:
        z = _patch(samples, partners, ratio, offset, n < N, d, D, index is not None, PRECISION)
    accum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, C * M, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        in_filters = q < C * M
        filters = weight + q * stride_wq
        owner = q // M
        if BLOCK_C == 0:
            g = grad[:, None] + (owner * stride_gc)[None, :]
            g = tl.load(g, mask=(n < N)[:, None] & in_filters[None, :], other=0.0)
        else:
            c = start // M + tl.arange(0, BLOCK_C)
            g = tl.load(grad[:, None] + (c * stride_gc)[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
            owned = (c[:, None] == owner[None, :]).to(g.dtype)
            g = tl.dot(_operand(g, PRECISION), owned, input_precision=PRECISION, out_dtype=tl.float32)
        if WHOLE_D:
            w = _filters(filters, in_filters, d, D, PRECISION)
            s = tl.dot(z, tl.trans(w), input_precision=PRECISION, out_dtype=tl.float32)
        else:
            s = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
            for k in range(0, D, BLOCK_D):
                z = _patch(samples, partners, ratio, offset, n < N, k + d, D, index is not None, PRECISION)
                w = _filters(filters, in_filters, k + d, D, PRECISION)
                s = tl.dot(z, tl.trans(w), s, input_precision=PRECISION, out_dtype=tl.float32)
            w = _filters(filters, in_filters, d_own, D, PRECISION)
        e = _operand(mul_slope(g.to(tl.float32) * scale, s, inverse, ACTIVATION).to(w.dtype), PRECISION)
        accum = tl.dot(e, w, accum, input_precision=PRECISION, out_dtype=tl.float32)

    mixed_grad += (((b.to(tl.int64) * N + n) * P + p) * D)[:, None] + d_own[None, :]
    mask = (n < N)[:, None] & (d_own < D)[None, :]
    tl.store(mixed_grad, accum.to(mixed_grad.dtype.element_ty), mask=mask)


class _Problem:
    """The first arguments and the constants that all kernels share, and how to launch one.

    Kernels mix as they load, unless patches are too long for that or their rows are not a multiple of 16 bytes apart.
    Then z is written to memory first, once for all kernels, its rows padded with zeros to ``width``.
    """

    def __init__(
        self, input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, activation: Polynomial
    ) -> None:
        self.runs, self.num_samples, self.num_patches, self.patch_dim = input.shape
        self.num_classes, self.filters_per_class = weight.shape[1:3]
        self.num_filters = self.num_classes * self.filters_per_class
        self.empty = 0 in input.shape or 0 in weight.shape
        # A CPU tensor means Triton's interpreter, which gets bfloat16 products wrong: there float32 stands in.
        self.dtype = torch.float32 if input.dtype == torch.bfloat16 and input.is_cpu else input.dtype
        self.precision = launch.precision(self.dtype)
        self.activation = normal_form(activation)
        self.slope_scale = self.activation.scale / self.activation.threshold
        if self.empty:
            return
        vector = 16 // self.dtype.itemsize  # elements in 16 bytes
        self.width = triton.cdiv(self.patch_dim, vector) * vector
        input, weight = input.to(self.dtype), weight.to(self.dtype).flatten(1, 2)
        if not _aligned(weight, vector):
            weight = torch.nn.functional.pad(weight, (0, self.width - self.patch_dim)).contiguous()
        index = None if index is None else index.contiguous()
        stride_lam = 0 if lam is None or lam.dim() == 0 else lam.stride(0)
        self.tiles = configs.patch_conv_tiles(self.dtype, self.precision, self.width)
        if not _aligned(input, vector) or (index is not None and not self.tiles.mixes):
            input, index, lam = self._mix(input, index, lam, stride_lam), None, None
        strides = (*input.stride()[:3], *weight.stride()[:2])
        self.arguments = (
            input, weight, index, lam,
            self.num_samples, self.num_patches, self.num_classes, self.filters_per_class, self.width // vector,
            *(stride // vector for stride in strides), stride_lam, 1 / self.activation.threshold,
        )  # fmt: skip

    def _mix(self, input: Tensor, index: Tensor | None, lam: Tensor | None, stride_lam: int) -> Tensor:
        """Return z, or without a mix a copy of the input, (B,N,P,width)."""
        mixed = torch.empty([*input.shape[:3], self.width], dtype=self.dtype, device=input.device)
        blocks = {"BLOCK_N": 32, "BLOCK_D": 64}
        tiles = triton.cdiv(self.num_samples, blocks["BLOCK_N"]) * triton.cdiv(self.width, blocks["BLOCK_D"])
        arguments = (input, index, lam, *input.shape[1:], *input.stride(), stride_lam, mixed, self.width)
        launch.run(launch.Launch(patch_conv_mix_kernel, self.runs * self.num_patches * tiles, arguments, blocks))
        return mixed

    def config(self, direction: configs.Direction) -> configs.PatchConvConfig:
        return self.tiles.config(direction, self.num_classes, self.filters_per_class)

    def launch(
        self, kernel: Any, config: configs.PatchConvConfig, programs: int, *arguments: Any, **constants: Any
    ) -> None:
        constants |= {
            "ACTIVATION": kind(self.activation),
            "PRECISION": self.precision,
            "WHOLE_D": config.holds(self.width),
            "BLOCK_N": config.block_n,
            "BLOCK_Q": config.block_q,
            "BLOCK_D": config.block_d,
        }
        # Mixing takes registers for the partners' addresses and values, so there is no tighter cap then.
        max_registers = config.max_registers if self.arguments[2] is None else 255
        options = (config.num_warps, config.num_stages, max_registers)
        launch.run(launch.Launch(kernel, programs, (*self.arguments, *arguments), constants, *options))


def _aligned(rows: Tensor, vector: int) -> bool:
    """Whether rows are contiguous, and their length and their distances multiples of ``vector``."""
    return rows.stride(-1) == 1 and math.gcd(rows.shape[-1], *rows.stride()[:-1]) % vector == 0


def patch_conv(
    input: Tensor, weight: Tensor, index: Tensor | None, lam: Tensor | None, activation: Polynomial
) -> Tensor:
    """Return the logits (B,N,C) of B independent networks, whose samples ``index`` and ``lam`` mix unless None.

    ``input`` (B,N,P,D) and ``weight`` (B,C,M,D) of one dtype, also the result's; ``index`` (N,) int64; ``lam`` (N,) or
    () float32. A sample whose partner is out of range gets NaN.
    """
    problem = _Problem(input, weight, index, lam, activation)
    shape = (problem.runs, problem.num_samples, problem.num_classes)
    if problem.empty:
        return input.new_zeros(shape)
    logits = torch.empty(shape, dtype=problem.dtype, device=input.device)
    config = problem.config("forward")
    tiles = triton.cdiv(problem.num_classes, max(config.block_q // problem.filters_per_class, 1))
    programs = problem.runs * triton.cdiv(problem.num_samples, config.block_n) * tiles
    scale = problem.activation.scale / problem.activation.degree
    problem.launch(patch_conv_forward_kernel, config, programs, scale, logits)
    return logits.to(input.dtype)


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
) -> tuple[Tensor | None, Tensor | None]:
    """Return those gradients of :func:`patch_conv` that are asked for, contiguous; ``grad`` (B,N,C)."""
    problem = _Problem(input, weight, index, lam, activation)
    if problem.empty:
        input, weight = input.new_zeros(input.shape), weight.new_zeros(weight.shape)
        return input if input_grad else None, weight if weight_grad else None
    grad = grad.to(problem.dtype)
    return (
        _input_grad(problem, grad, index, lam).to(input.dtype) if input_grad else None,
        _weight_grad(problem, grad).to(weight.dtype).view(weight.shape) if weight_grad else None,
    )


def _input_grad(problem: _Problem, grad: Tensor, index: Tensor | None, lam: Tensor | None) -> Tensor:
    config = problem.config("backward_input")
    dtype = problem.dtype if index is None else torch.float32
    shape = (problem.runs, problem.num_samples, problem.num_patches, problem.width)
    mixed_grad = torch.empty(shape, dtype=dtype, device=grad.device)
    tiles = problem.num_patches * triton.cdiv(problem.width, config.block_d)
    programs = problem.runs * triton.cdiv(problem.num_samples, config.block_n) * tiles
    matrix_units = problem.dtype != torch.float32 or problem.precision != "ieee"
    classes = (config.block_q + problem.filters_per_class - 2) // problem.filters_per_class + 1
    problem.launch(
        patch_conv_backward_input_kernel, config, programs, problem.slope_scale, grad, *grad.stride(), mixed_grad,
        BLOCK_C=max(16, triton.next_power_of_2(classes)) if matrix_units else 0,
    )  # fmt: skip
    mixed_grad = mixed_grad[..., : problem.patch_dim]
    if index is None or lam is None:
        return mixed_grad.contiguous()
    # A sample adds the partner's share to the partner. Where the partner is out of range, the sample itself gets NaN.
    exists = (index >= 0) & (index < problem.num_samples)
    lam = lam.where(exists, torch.nan)[:, None, None]
    partner_grad = ((1 - lam) * mixed_grad).where(exists[:, None, None], 0)
    return (lam * mixed_grad).index_add_(1, index.where(exists, 0), partner_grad)


def _weight_grad(problem: _Problem, grad: Tensor) -> Tensor:
    config = problem.config("backward_weight")
    blocks = triton.cdiv(problem.num_samples, config.block_n)
    tiles = triton.cdiv(problem.num_filters, config.block_q) * triton.cdiv(problem.width, config.block_d)
    # Slices of the samples, and of the patches where samples are few, give every multiprocessor some programs.
    slices = triton.cdiv(4 * launch.multiprocessors(grad), problem.runs * tiles)
    sample_slices = min(slices, blocks)
    patch_slices = min(slices // sample_slices, problem.num_patches)
    parts = sample_slices * patch_slices
    partial = torch.empty(
        [parts, problem.runs, problem.num_filters, problem.width],
        dtype=problem.dtype if parts == 1 else torch.float32,
        device=grad.device,
    )
    problem.launch(
        patch_conv_backward_weight_kernel, config, problem.runs * tiles * parts,
        problem.slope_scale, grad, *grad.stride(), partial, problem.runs, sample_slices, patch_slices,
    )  # fmt: skip
    partial = partial[..., : problem.patch_dim]
    return partial[0].contiguous() if parts == 1 else partial.sum(0)
