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

__all__ = ["inverse", "mixup", "mixup_backward", "pointers_to", "tile_of"]

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
    ratio = tl.where(exists, tl.load(lam + n * stride_lam.to(tl.int64)), float("nan"))[:, None]
    other = tl.load(pointers_to(input, tl.where(exists, partner, 0), stride_source, VECTOR) + k, mask=mask, other=0.0)
    mixed = tl.fma(ratio, x.to(tl.float32), (1.0 - ratio) * other.to(tl.float32))
    tl.store(pointers_to(output + start, n, stride_result, VECTOR) + k, mixed.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def mixup_backward_kernel(
    grad, index, lam, order, first, input_grad, N, K, stride_source, stride_lam, stride_result,
    VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``input_grad_i = lam_i grad_i + sum_{n: index_n = i} (1 - lam_n) grad_n``

    grad (N,K), index (N,), lam (N,) or (), input_grad (N,K); order (N,) the samples by their partner and
    first (N + 1,) where in it those with partner i begin.
    """
    i, start, k, mask = tile_of(N, K, VECTOR, BLOCK_N, BLOCK_K)
    grad += start
    stride_lam = stride_lam.to(tl.int64)
    own = tl.load(pointers_to(grad, i, stride_source, VECTOR) + k, mask=mask, other=0.0)
    partner = tl.load(index + i)
    ratio = tl.where((partner >= 0) & (partner < N), tl.load(lam + i * stride_lam), float("nan"))
    accum = ratio[:, None] * own.to(tl.float32)
    begin = tl.load(first + i)
    count = (tl.load(first + i + 1) - begin).to(tl.int32)
    for j in range(tl.max(count, 0)):
        n = tl.load(order + begin + j, mask=j < count, other=0)
        partner_ratio = 1.0 - tl.load(lam + n * stride_lam)
        in_list = mask & (j < count)[:, None]
        other = tl.load(pointers_to(grad, n, stride_source, VECTOR) + k, mask=in_list, other=0.0)
        accum = tl.where(in_list, tl.fma(partner_ratio[:, None], other.to(tl.float32), accum), accum)
    tl.store(
        pointers_to(input_grad + start, i, stride_result, VECTOR) + k,
        accum.to(input_grad.dtype.element_ty),
        mask=mask,
    )


@triton.jit(do_not_specialize=["N"])
def mixup_inverse_kernel(index, order, first, N, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sort samples by their partner, ties by their own number: each sample's place is the number of those before it.

    index (N,); order (N,) the samples so sorted, and first (N + 1,) where in it those with partner i begin.
    """
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(index + n, mask=n < N, other=0)[:, None]
    place, begin = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, CHUNK):
        m = start + tl.arange(0, CHUNK)[None, :]
        partner = tl.load(index + m, mask=m < N, other=0)
        before = (partner < own) | ((partner == own) & (m < n[:, None]))
        place += tl.sum((before & (m < N)).to(tl.int32), 1)
        begin += tl.sum(((partner < n[:, None]) & (m < N)).to(tl.int32), 1)
    tl.store(order + place, n.to(tl.int64), mask=n < N)
    tl.store(first + n, begin.to(tl.int64), mask=n <= N)


def mixup(input: Tensor, index: Tensor, lam: Tensor, output: Tensor) -> None:
    """Mix ``input`` (N,K), float or uint8, into ``output`` (N,K), float: both of unit stride in K.

    ``index`` (N,) int64 and ``lam`` (N,) or () float32, of any strides. A partner out of range gives NaN.
    """
    input = launch.interpretable(input)
    with launch.rounded(output) as result:
        _run(mixup_forward_kernel, (input, index, lam, result), input, result, index.stride(0), _stride(lam))


def mixup_backward(grad: Tensor, index: Tensor, lam: Tensor, input_grad: Tensor) -> None:
    """Write the gradient of :func:`mixup` to ``input_grad``, given ``grad`` = dL/dmixed: (N,K) with unit stride in K.

    A sample whose partner is out of range gets NaN.
    """
    grad, index = launch.interpretable(grad), index.contiguous()
    order, first = inverse(index)
    with launch.rounded(input_grad) as result:
        _run(mixup_backward_kernel, (grad, index, lam, order, first, result), grad, result, _stride(lam))


def inverse(index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the samples (N,) by their partner, and (N + 1,) where among them those with partner i begin.

    The samples of one partner come in ascending order, which fixes the order of each sum. ``index`` is contiguous.
    """
    num_samples, block = len(index), configs.INVERSE_BLOCK
    if 0 < num_samples <= configs.INVERSE_SAMPLES:  # in one launch
        order, first = index.new_empty(num_samples), index.new_empty(num_samples + 1)
        constants = {"BLOCK": block, "CHUNK": configs.INVERSE_CHUNK}
        programs = configs.cdiv(num_samples + 1, block)
        arguments = (index, order, first, num_samples)
        launch.run(launch.Launch(mixup_inverse_kernel, programs, arguments, constants, num_warps=8))
        return order, first
    partners, order = index.sort(stable=True)
    return order, torch.searchsorted(partners, torch.arange(len(index) + 1, device=index.device))


def _stride(lam: Tensor) -> int:
    return lam.stride(0) if lam.dim() else 0


def _run(kernel: Any, tensors: tuple[Tensor, ...], source: Tensor, result: Tensor, *strides: int) -> None:
    """Launch, with the strides of ``source``, then ``strides``, then those of ``result``."""
    num_samples, width = result.shape
    if not result.numel():
        return
    vector = configs.vector_size(result.itemsize, width, source.stride(0), result.stride(0))
    tile = configs.MIXUP_CONFIG.tile(num_samples, width, vector)
    programs = configs.cdiv(num_samples, tile[0]) * configs.cdiv(width, tile[1])
    sizes = (num_samples, width // vector, source.stride(0) // vector, *strides, result.stride(0) // vector)
    constants = {"VECTOR": vector, "BLOCK_N": tile[0], "BLOCK_K": tile[1]}
    launch.run(launch.Launch(kernel, programs, (*tensors, *sizes), constants, configs.MIXUP_CONFIG.num_warps))
