"""Mixup of a batch, forward and backward, in Triton: memory traffic and nothing else.

    mixed_n = lam_n x_n + (1 - lam_n) x_{index_n}
    dL/dx_i = lam_i dL/dmixed_i + sum_{n: index_n = i} (1 - lam_n) dL/dmixed_n

Both are computed in float32. A sample whose partner is out of range gets NaN, and passes no gradient to a partner.
No kernel uses atomic operations, so results repeat bit for bit.

A program owns a tile: some samples and some of their elements. Neighbouring programs own the same elements of other
samples. A partner's elements are then mostly in the L2 cache, as programs that run at the same time read them as a
sample's own, so memory is read once and not twice.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch

__all__ = ["mixup", "mixup_backward", "next_sample", "order_of", "pointers_to", "tile_of"]

# Integers that must not cost a compilation per batch size. K and the strides of samples are in vectors.
_SIZES = ["N", "K", "stride_lam", "stride_source", "stride_result"]


@triton.jit
def tile_of(N, K, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return this program's samples n, its first element, the elements k after that, and the mask of elements.

    Samples beyond the last are clamped to it: they write the same result again.
    """
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    n = tl.minimum(program % blocks * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    start = (program // blocks).to(tl.int64) * BLOCK_K
    k = tl.arange(0, BLOCK_K)
    return n, start, k[None, :], k[None, :] < K.to(tl.int64) * VECTOR - start


@triton.jit
def pointers_to(tensor, n, stride, VECTOR: tl.constexpr):
    """Return pointers (BLOCK_N, 1) to samples n of a tensor whose samples lie ``stride`` vectors apart."""
    return (tensor + n * (stride.to(tl.int64) * VECTOR))[:, None]


@triton.jit(do_not_specialize=[*_SIZES, "stride_index"])
def mixup_forward_kernel(
    input, index, lam, output, N, K, stride_source, stride_index, stride_lam, stride_result,
    VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``output_n = lam_n input_n + (1 - lam_n) input_{index_n}``

    input (N,K), index (N,), lam (N,) or (), output (N,K); VECTOR elements of output are up to 16 bytes.
    """
    n, start, k, mask = tile_of(N, K, VECTOR, BLOCK_N, BLOCK_K)
    input += start
    x = tl.load(pointers_to(input, n, stride_source, VECTOR) + k, mask=mask, other=0.0)
    partner = tl.load(index + n * stride_index.to(tl.int64))
    exists = (partner >= 0) & (partner < N)
    lam_n = tl.where(exists, tl.load(lam + n * stride_lam.to(tl.int64)), float("nan"))[:, None]
    other = tl.load(pointers_to(input, tl.where(exists, partner, 0), stride_source, VECTOR) + k, mask=mask, other=0.0)
    mixed = tl.fma(lam_n, x.to(tl.float32), (1.0 - lam_n) * other.to(tl.float32))
    tl.store(pointers_to(output + start, n, stride_result, VECTOR) + k, mixed.to(output.dtype.element_ty), mask=mask)


@triton.jit
def next_sample(found, m, n, CHUNK: tl.constexpr):
    """Return for each row the first m after n, (BLOCK_N,), that is ``found`` (BLOCK_N,CHUNK), or CHUNK."""
    return tl.min(tl.where(found & (m > n[:, None]), m, CHUNK), 1)


@triton.jit
def _add_share(accum, grad, lam, n, row, k, mask, stride, stride_lam, VECTOR: tl.constexpr):
    """Return ``accum + (1 - lam_n) grad[row,k]`` where ``mask``."""
    one_minus_lam = 1.0 - tl.load(lam + n * stride_lam)
    other = tl.load(pointers_to(grad, row, stride, VECTOR) + k, mask=mask, other=0.0)
    return tl.where(mask, tl.fma(one_minus_lam[:, None], other.to(tl.float32), accum), accum)


@triton.jit(do_not_specialize=[*_SIZES, "rows"])
def mixup_backward_kernel(
    grad, index, lam, order, first, input_grad, rows, N, K, stride_source, stride_lam, stride_result,
    VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``input_grad_i = lam_i grad_i + sum_{n: index_n = i} (1 - lam_n) grad_n``, in each run of N rows.

    grad (rows,K), index (N,), lam (N,) or (), input_grad (rows,K); order (N,) the samples by their partner and
    first (N + 1,) where in it those with partner i begin, or None: index is searched then, CHUNK samples at a time.
    """
    i, start, k, mask = tile_of(rows, K, VECTOR, BLOCK_N, BLOCK_K)
    sample = i % N
    run = i - sample
    grad += start
    stride_lam = stride_lam.to(tl.int64)
    own = tl.load(pointers_to(grad, i, stride_source, VECTOR) + k, mask=mask, other=0.0)
    partner = tl.load(index + sample)
    lam_i = tl.where((partner >= 0) & (partner < N), tl.load(lam + sample * stride_lam), float("nan"))
    accum = lam_i[:, None] * own.to(tl.float32)
    if order is None:
        m = tl.arange(0, CHUNK)[None, :]
        for begin in range(0, N, CHUNK):
            found = tl.load(index + begin + m, mask=begin + m < N, other=-1) == sample[:, None]
            n = next_sample(found, m, tl.full([BLOCK_N], -1, tl.int32), CHUNK)
            while tl.min(n, 0) < CHUNK:
                listed = n < CHUNK
                other = tl.where(listed, begin + n, 0)
                accum = _add_share(
                    accum, grad, lam, other, run + other, k, mask & listed[:, None], stride_source, stride_lam, VECTOR
                )
                n = next_sample(found, m, n, CHUNK)
    else:
        begin = tl.load(first + sample)
        count = (tl.load(first + sample + 1) - begin).to(tl.int32)
        for j in range(tl.max(count, 0)):
            listed = j < count
            other = tl.load(order + begin + j, mask=listed, other=0)
            accum = _add_share(
                accum, grad, lam, other, run + other, k, mask & listed[:, None], stride_source, stride_lam, VECTOR
            )
    tl.store(
        pointers_to(input_grad + start, i, stride_result, VECTOR) + k,
        accum.to(input_grad.dtype.element_ty),
        mask=mask,
    )


def mixup(input: Tensor, index: Tensor, lam: Tensor, output: Tensor) -> None:
    """Mix ``input`` (N,K), float or uint8, into ``output`` (N,K), float: both of unit stride in K.

    ``index`` (N,) int64 and ``lam`` (N,) or () float32, of any strides. A partner out of range gives NaN.
    """
    input = launch.interpretable(input)
    with launch.rounded(output) as result:
        _run(mixup_forward_kernel, (input, index, lam, result), input, result, index.stride(0), _stride(lam))


def mixup_backward(grad: Tensor, index: Tensor, lam: Tensor, input_grad: Tensor) -> None:
    """Write the gradient of :func:`mixup` to ``input_grad``, given ``grad`` = dL/dmixed: (N,K) with unit stride in K.

    The rows may be those of several runs, one after the other, which are all mixed by ``index`` (N,). A sample whose
    partner is out of range gets NaN.
    """
    grad, index = launch.interpretable(grad), index.contiguous()
    with launch.rounded(input_grad) as result:
        tensors = (grad, index, lam, *order_of(index), result)
        _run(mixup_backward_kernel, tensors, grad, result, _stride(lam), samples=len(index))


def order_of(index: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return the samples (N,) by their partner, and (N + 1,) where among them those with partner i begin.

    The samples of one partner come in ascending order, which fixes the order of each sum. Of few samples the kernels
    search ``index``, contiguous, instead: that takes no launch, where sorting takes five.
    """
    if len(index) <= configs.SEARCHED_SAMPLES:
        return None, None
    partners, order = index.sort(stable=True)
    return order, torch.searchsorted(partners, torch.arange(len(index) + 1, device=index.device))


def _stride(lam: Tensor) -> int:
    return lam.stride(0) if lam.dim() else 0


def _run(
    kernel: Any,
    tensors: tuple[Tensor | None, ...],
    source: Tensor,
    result: Tensor,
    *strides: int,
    samples: int | None = None,
) -> None:
    """Launch, with the strides of ``source``, then ``strides``, then those of ``result``; ``samples`` of a run."""
    rows, width = result.shape
    if not result.numel():
        return
    vector = configs.vector_size(result.itemsize, width, source.stride(0), result.stride(0))
    tile = configs.MIXUP_CONFIG.tile(rows, width, vector, search=samples is not None)
    programs = configs.cdiv(rows, tile[0]) * configs.cdiv(width, tile[1])
    sizes = (width // vector, source.stride(0) // vector, *strides, result.stride(0) // vector)
    sizes = (rows, *sizes) if samples is None else (rows, samples, *sizes)
    constants = {"VECTOR": vector, "BLOCK_N": tile[0], "BLOCK_K": tile[1]}
    if samples is not None:
        constants["CHUNK"] = configs.SEARCHED_AT_ONCE
    options = {"num_warps": configs.MIXUP_CONFIG.num_warps, "max_registers": configs.MIXUP_CONFIG.max_registers}
    launch.run(launch.Launch(kernel, programs, (*tensors, *sizes), constants, **options))
