"""Binary cross-entropy of logits x with two labels a row, and its gradient, in one pass over memory, in Triton.

    q_nc    = (1 - eps) (lam_n [c = a_n] + (1 - lam_n) [c = b_n]) + eps / C, or whether that exceeds a threshold
    w_nc    = 1 + (pos_weight_c - 1) q_nc
    loss_nc = (1 - q_nc) x_nc + w_nc log(1 + exp(-x_nc));  grad_nc = scale (1 - q_nc - w_nc / (1 + exp(x_nc)))

All arithmetic is in float32. A target out of range makes its row NaN. A program owns some rows and goes through their
classes a block at a time.
"""

from contextlib import nullcontext

import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch

__all__ = ["binary_cross_entropy"]

_LOG2E = tl.constexpr(1.4426950408889634)
# Integers that must not cost a compilation per problem size. C and the strides of rows are in vectors.
_SIZES = ["N", "C", "stride_input", "stride_loss", "stride_grad", "stride_lam"]


@triton.jit(do_not_specialize=_SIZES)
def mixup_binary_cross_entropy_forward_kernel(
    input, target_a, target_b, lam, pos_weight, N, C, stride_input, stride_loss, stride_grad, stride_lam,
    one_minus_eps, eps_share, threshold, scale, loss, grad,
    VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the loss of each row (N,), or with ``stride_loss`` > 0 of each class (N,C), and the gradient (N,C), if any.

    input (N,C), targets (N,), lam (N,) or (), pos_weight (C,) or None, threshold a number or None.
    """
    C *= VECTOR
    n = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)  # the last row is written again
    a, b = tl.load(target_a + n)[:, None], tl.load(target_b + n)[:, None]
    lam_n = tl.load(lam + n * stride_lam.to(tl.int64))[:, None]
    exists = (a >= 0) & (a < C) & (b >= 0) & (b < C)
    lam_n = tl.where(exists, lam_n, float("nan"))
    rows = (input + n * (stride_input.to(tl.int64) * VECTOR))[:, None]
    losses = (loss + n * stride_loss.to(tl.int64))[:, None]
    accum = tl.zeros([BLOCK_N, 1], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        in_row = c < C
        x = tl.load(rows + c, mask=in_row, other=0.0).to(tl.float32)
        q = tl.where(c == a, lam_n, 0.0 * lam_n) + tl.where(c == b, 1.0 - lam_n, 0.0)
        q = q * one_minus_eps + eps_share
        if threshold is not None:
            q = tl.where(q > threshold, 1.0, tl.where(q == q, 0.0, q))
        w = 1.0
        if pos_weight is not None:
            w = 1.0 + (tl.load(pos_weight + c, mask=in_row, other=1.0) - 1.0) * q
        e = tl.exp2(-tl.abs(x) * _LOG2E)
        one_plus = 1.0 + e
        # e log(u) / (u - 1), u = 1 + e rounded, is log(1 + e) to full precision where the rounding has lost much of e
        log_one_plus = tl.where(one_plus == 1.0, e, tl.log(one_plus) * (e / (one_plus - 1.0)))
        value = (1.0 - q) * x + w * (tl.maximum(-x, 0.0) + log_one_plus)
        if stride_loss > 0:
            tl.store(losses + c, value, mask=in_row)
        else:
            accum += tl.sum(tl.where(in_row, value, 0.0), 1)[:, None]
        if grad is not None:
            slope = 1.0 - q - w * (tl.where(x < 0.0, 1.0, e) / one_plus)
            targets = (grad + n * (stride_grad.to(tl.int64) * VECTOR))[:, None]
            tl.store(targets + c, (scale * slope).to(grad.dtype.element_ty), mask=in_row)
    if stride_loss == 0:
        tl.store((loss + n)[:, None], accum)


def binary_cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    pos_weight: Tensor | None,
    label_smoothing: float,
    threshold: float | None,
    scale: float,
    loss: Tensor,
    grad: Tensor | None,
) -> None:
    """Compute the losses and, unless ``grad`` is None, ``scale`` times their derivatives.

    ``input`` and ``grad`` (N,C) with unit stride in C, targets (N,) int64, ``lam`` (N,) or () and ``pos_weight`` (C,)
    or None float32; ``loss`` float32, contiguous: (N,C), or (N,) for the sums over the classes.
    """
    num_samples, num_classes = input.shape
    if not input.numel():
        loss.zero_()  # there are no classes
        return
    input = launch.interpretable(input)
    with nullcontext() if grad is None else launch.rounded(grad) as result:
        strides = (input.stride(0), 0 if result is None else result.stride(0))
        vector = configs.vector_size(input.itemsize, num_classes, *strides)
        config = configs.BINARY_CROSS_ENTROPY_CONFIG
        block_n, block_c = config.tile(num_classes)
        sizes = (
            num_samples, num_classes // vector, strides[0] // vector, num_classes * (loss.dim() - 1),
            strides[1] // vector, lam.stride(0) if lam.dim() else 0,
        )  # fmt: skip
        numbers = (float(1 - label_smoothing), label_smoothing / num_classes, threshold, float(scale))
        launch.run(launch.Launch(
            mixup_binary_cross_entropy_forward_kernel, configs.cdiv(num_samples, block_n),
            (input, target_a, target_b, lam, pos_weight, *sizes, *numbers, loss, result),
            {"VECTOR": vector, "BLOCK_N": block_n, "BLOCK_C": block_c}, num_warps=config.num_warps(num_classes),
            max_registers=config.max_registers(num_classes),
        ))  # fmt: skip
