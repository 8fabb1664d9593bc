"""CutMix of a batch, forward and backward, in Triton: memory traffic and nothing else.

    output_n = x_{index_n} inside the box, x_n outside
    dL/dx_i  = sum_{n: index_n = i} dL/doutput_n inside the box, dL/doutput_i outside

A sample whose partner is out of range gets NaN inside the box, or in bytes 0. Images come as samples of K elements:
planes of HEIGHT rows of ROW elements, a pixel being PIXEL elements side by side (1, or with channels last ch).

A program owns a tile, as in mixup.py. Elements are loaded a vector at a time from the sample and from its partner; a
vector that is not at the box's edge is needed from one of them, and its other load is masked as a whole.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch
from .mixup import next_sample, order_of, pointers_to, tile_of

__all__ = ["cutmix", "cutmix_backward"]

# Integers that must not cost a compilation per batch size. K and the strides of samples are in vectors.
_SIZES = ["N", "K", "stride_source", "stride_result"]


@triton.jit
def _in_box(
    box, start, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr, ROW: tl.constexpr, PIXEL: tl.constexpr,
):  # fmt: skip
    """Return (BLOCK_N, BLOCK_K) whether an element is in its sample's box, and whether any or all of its vector's are.

    ``box`` (BLOCK_N,) points to the samples' boxes.
    """
    SHAPE: tl.constexpr = [BLOCK_N, BLOCK_K // VECTOR, VECTOR]
    y0, y1 = tl.load(box)[:, None, None], tl.load(box + 1)[:, None, None]
    x0, x1 = tl.load(box + 2)[:, None, None] * PIXEL, tl.load(box + 3)[:, None, None] * PIXEL
    k = (start % (HEIGHT * ROW)).to(tl.int32)  # 32 bits divide without a call
    if ROW % VECTOR == 0:  # a vector lies in one row: two divisions for all of it
        k += (tl.arange(0, BLOCK_K // VECTOR) * VECTOR)[None, :, None]
        y, x = k // ROW % HEIGHT, k % ROW
        in_rows = (y >= y0) & (y < y1)
        any_inside, all_inside = in_rows & (x + VECTOR > x0) & (x < x1), in_rows & (x >= x0) & (x + VECTOR <= x1)
        x += tl.arange(0, VECTOR)[None, None, :]
        inside = in_rows & (x >= x0) & (x < x1)
    else:
        k += tl.reshape(tl.arange(0, BLOCK_K), [1, BLOCK_K // VECTOR, VECTOR])
        y, x = k // ROW % HEIGHT, k % ROW
        inside = (y >= y0) & (y < y1) & (x >= x0) & (x < x1)
        any_inside = tl.max(inside.to(tl.int32), 2)[:, :, None] != 0
        all_inside = tl.min(inside.to(tl.int32), 2)[:, :, None] != 0
    inside = tl.reshape(inside, [BLOCK_N, BLOCK_K])
    any_inside = tl.reshape(tl.broadcast_to(any_inside, SHAPE), inside.shape)
    all_inside = tl.reshape(tl.broadcast_to(all_inside, SHAPE), inside.shape)
    # said once more for older releases of Triton, which would load single elements under these masks
    return inside, tl.max_constancy(any_inside, [1, VECTOR]), tl.max_constancy(all_inside, [1, VECTOR])


@triton.jit(do_not_specialize=[*_SIZES, "stride_index", "stride_box"])
def cutmix_forward_kernel(
    input, index, box, output, N, K, stride_source, stride_result, stride_index, stride_box,
    VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HEIGHT: tl.constexpr, ROW: tl.constexpr, PIXEL: tl.constexpr,
):  # fmt: skip
    """``output_n = input_{index_n}`` inside the box, ``input_n`` outside

    input (N,K), index (N,), box (4,) or (N,4): y0, y1, x0, x1, output (N,K).
    """
    n, start, k, mask = tile_of(N, K, VECTOR, BLOCK_N, BLOCK_K)
    boxes = box + n * stride_box.to(tl.int64)
    inside, any_inside, all_inside = _in_box(boxes, start, VECTOR, BLOCK_N, BLOCK_K, HEIGHT, ROW, PIXEL)
    input += start
    partner = tl.load(index + n * stride_index.to(tl.int64))
    exists = (partner >= 0) & (partner < N)
    own = tl.load(pointers_to(input, n, stride_source, VECTOR) + k, mask=mask & ~all_inside, other=0)
    source = pointers_to(input, tl.where(exists, partner, 0), stride_source, VECTOR)
    other = tl.load(source + k, mask=mask & any_inside & exists[:, None], other=0)
    if input.dtype.element_ty.is_floating():
        other = tl.where(exists[:, None], other, float("nan")).to(input.dtype.element_ty)
    result = tl.where(inside, other, own)
    tl.store(pointers_to(output + start, n, stride_result, VECTOR) + k, result, mask=mask)


@triton.jit
def _add_pasted(accum, grad, n, k, inside, mask, stride, VECTOR: tl.constexpr):
    """Return ``accum + grad[n,k]`` where ``inside``; nothing is read where not ``mask``."""
    other = tl.load(pointers_to(grad, n, stride, VECTOR) + k, mask=mask, other=0.0)
    return accum + tl.where(inside, other.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=_SIZES)
def cutmix_backward_kernel(
    grad, index, order, first, box, input_grad, N, K, stride_source, stride_result,
    VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    HEIGHT: tl.constexpr, ROW: tl.constexpr, PIXEL: tl.constexpr,
):  # fmt: skip
    """``input_grad_i = sum_{n: index_n = i} grad_n`` inside the box, ``grad_i`` outside

    grad (N,K), index (N,), input_grad (N,K), box (4,); order and first as in mixup_backward_kernel, or None.
    """
    i, start, k, mask = tile_of(N, K, VECTOR, BLOCK_N, BLOCK_K)
    inside, any_inside, _ = _in_box(box + 0 * i, start, VECTOR, BLOCK_N, BLOCK_K, HEIGHT, ROW, PIXEL)
    grad += start
    accum = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    mask_inside = mask & any_inside
    if order is None:
        m = tl.arange(0, CHUNK)[None, :]
        for begin in range(0, N, CHUNK):
            found = tl.load(index + begin + m, mask=begin + m < N, other=-1) == i[:, None]
            n = next_sample(found, m, tl.full([BLOCK_N], -1, tl.int32), CHUNK)
            while tl.min(n, 0) < CHUNK:
                listed = (n < CHUNK)[:, None]
                other = tl.where(n < CHUNK, begin + n, 0)
                accum = _add_pasted(accum, grad, other, k, inside & listed, mask_inside & listed, stride_source, VECTOR)
                n = next_sample(found, m, n, CHUNK)
    else:
        begin = tl.load(first + i)
        count = (tl.load(first + i + 1) - begin).to(tl.int32)
        for j in range(tl.max(count, 0)):
            listed = (j < count)[:, None]
            other = tl.load(order + begin + j, mask=j < count, other=0)
            accum = _add_pasted(accum, grad, other, k, inside & listed, mask_inside & listed, stride_source, VECTOR)
    own = tl.load(pointers_to(grad, i, stride_source, VECTOR) + k, mask=mask, other=0.0)
    result = tl.where(inside, accum, own.to(tl.float32)).to(input_grad.dtype.element_ty)
    tl.store(pointers_to(input_grad + start, i, stride_result, VECTOR) + k, result, mask=mask)


def cutmix(input: Tensor, index: Tensor, box: Tensor, height: int, width: int, pixel: int, output: Tensor) -> None:
    """Copy ``input`` (N,K), float or uint8, with boxes of partners, into ``output`` (N,K): both of unit stride in K.

    ``index`` (N,) and ``box`` (4,) or (N,4), int64. A pixel is ``pixel`` elements side by side.
    """
    box, strides = box.contiguous(), (index.stride(0), 4 * (box.dim() - 1))
    _run(cutmix_forward_kernel, (input, index, box, output), height, width, pixel, *strides)


def cutmix_backward(
    grad: Tensor, index: Tensor, box: Tensor, height: int, width: int, pixel: int, input_grad: Tensor
) -> None:
    """Write the gradient of :func:`cutmix` to ``input_grad``, given ``grad`` = dL/doutput: (N,K), unit stride in K."""
    grad, index = launch.interpretable(grad), index.contiguous()
    with launch.rounded(input_grad) as result:
        tensors = (grad, index, *order_of(index), box.contiguous(), result)
        _run(cutmix_backward_kernel, tensors, height, width, pixel)


def _run(kernel: Any, tensors: tuple[Any, ...], height: int, width: int, pixel: int, *strides: int) -> None:
    """Launch, with the strides of the first tensor and of the last, the result, and then ``strides``."""
    source, result = tensors[0], tensors[-1]
    num_samples, size = result.shape
    if not result.numel():
        return
    vector = configs.vector_size(result.itemsize, size, source.stride(0), result.stride(0))
    backward = kernel is cutmix_backward_kernel
    tile = configs.CUTMIX_CONFIG.tile(num_samples, size, vector, search=backward)
    programs = configs.cdiv(num_samples, tile[0]) * configs.cdiv(size, tile[1])
    sizes = (num_samples, size // vector, source.stride(0) // vector, result.stride(0) // vector, *strides)
    constants = {"VECTOR": vector, "BLOCK_N": tile[0], "BLOCK_K": tile[1]}
    if backward:
        constants["CHUNK"] = configs.SEARCHED_AT_ONCE
    constants |= {"HEIGHT": height, "ROW": width * pixel, "PIXEL": pixel}
    launch.run(launch.Launch(kernel, programs, (*tensors, *sizes), constants, configs.CUTMIX_CONFIG.num_warps))
