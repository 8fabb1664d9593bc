"""Cross-entropies of logits x and their gradient, in one pass over memory, in Triton.

Targets are two classes a row, each with a weight, or probabilities, "dense": one kernel serves both. With

    z_nc = x_nc - max_c x_nc,   s_n = sum_c exp z_nc        so that CE(x, y) = log s - z_y
    q_nc = eps / C, or dense: (1 - eps) t_nc + eps / C      the share of the label that is spread over all classes
    wa_n = lam_n A [a_n counts],   wb_n = (1 - lam_n) B [b_n counts],   W_n = wa_n + wb_n, or dense: weight

    loss_n  = W (log s sum_c q_c - sum_c q_c z_c) + (1 - eps) (wa (log s - z_a) + wb (log s - z_b)) + W scale L_n^2
    grad_nc = W (T exp(z_c) / s - q_c) - (1 - eps) (wa [c = a] + wb [c = b])
              + (2 W scale L_n + h_n) exp(z_c) / s,   T = 1, or dense: sum_c q_c

where dense targets have no a and b, L_n = max_c x_nc + log s is the logsumexp, and h_n the upstream gradient to it. A
and B are 1, or for the mean 1 over the number of targets that count.

A mean of few logits takes three launches, forward and backward. The first assumes that all targets count. The second
adds up the losses, and the targets that do. The third, in the backward pass, ends at once if all did and the upstream
gradient is 1; otherwise it forms the gradient anew. With many logits that would cost more than to count first.

All arithmetic is in float32. Infinities and NaN propagate as in F.cross_entropy: a dense target 0 on a logit -inf gives
NaN; a logit -inf of a class that is not the target changes nothing.

A program owns rows that fit into its registers, and reads them once. It reads a longer row twice, a block at a time:
first for the maximum and the sum, which is rescaled when the maximum changes; then backwards for the gradient, starting
with the block that was read last and is still in the L2 cache. Where rows of odd length do not begin with a whole
vector of 16 bytes, blocks begin at the first one; the columns before it and after the last are one more block, "edges".

A product is never the direct operand of a sum across lanes: the compiler would fuse it into the first exchange, after
which lanes that hold the same sum differ in its last bit. A select keeps the two apart.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch

__all__ = ["count", "counts_later", "cross_entropy", "mean", "scale_", "soft_target_cross_entropy"]

_LOG2E = tl.constexpr(1.4426950408889634)
# Integers that must not cost a compilation per problem size. C and the strides of rows are in vectors.
_SIZES = ["N", "C", "stride_input", "stride_target", "stride_grad", "stride_factor", "ignored"]


class Form(NamedTuple):
    """What the forward kernel is compiled for.

    Attributes:
        vector: logits that are loaded at once.
        edges: logits in a vector of rows that have edges, or 0.
        block_n: rows of a tile.
        block_c: logits of each row in a tile.
        whole: whether a tile holds whole rows.
        dense: whether targets are probabilities.
        smooth: whether labels are smoothed.
        sides: whether the losses of both sides of a mix are written one by one, (2,N).
        written: 1 if ``grad`` holds the gradient where all factors are 1, 2 if only where all targets count too; or 0.
        weights: 1 if each row has a weight of its own, 0 if all share one; likewise
        factors: for the upstream gradient to the loss,
        lse_grads: and that to the logsumexp.
    """

    vector: int
    edges: int
    block_n: int
    block_c: int
    whole: bool
    dense: bool
    smooth: bool
    sides: bool
    written: int
    weights: int
    factors: int
    lse_grads: int


@triton.jit
def _rows(N, BLOCK_N: tl.constexpr):
    """Return this program's rows. Rows beyond the last are clamped to it: they write the same result again."""
    return tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)


@triton.jit
def _pointers(tensor, n, stride, VECTOR: tl.constexpr):
    """Return pointers (BLOCK_N, 1) to rows n of a tensor whose rows lie ``stride`` vectors apart."""
    return (tensor + n * (stride.to(tl.int64) * VECTOR))[:, None]


@triton.jit
def _exp(z):
    return tl.exp2(z * _LOG2E)


@triton.jit(do_not_specialize=["N", "ignored"])
def mixup_cross_entropy_count_kernel(target, partner_target, N, ignored, counts, BLOCK: tl.constexpr):
    """Add to counts (2,) how many of target (N,) and of partner_target (N,) are not ignored."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counted = tl.load(target + n, mask=n < N, other=ignored) != ignored
    partner_counted = tl.load(partner_target + n, mask=n < N, other=ignored) != ignored
    tl.atomic_add(counts, tl.sum(counted.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(counts + 1, tl.sum(partner_counted.to(tl.int32), 0), sem="relaxed")


@triton.jit
def _class(rows, target, ignored, n, C):
    """Return target classes and their logits, (BLOCK_N, 1): class -2 for ignored, -1 for out of range."""
    y = tl.load(target + n)[:, None]
    y = tl.where(y == ignored, -2, tl.where((y >= 0) & (y < C), y, -1)).to(tl.int32)
    return y, tl.load(rows + y, mask=y >= 0, other=0.0).to(tl.float32)


@triton.jit
def _weigh(y, x, weight):
    """Return the targets' weights, NaN for one out of range, and their logits, 0 where the weight is 0."""
    w = tl.where(y == -2, 0.0, weight)
    w = tl.where((y == -1) & (w != 0.0), float("nan"), w)
    return w, tl.where(w == 0.0, 0.0, x)


@triton.jit
def _label(target, start, columns, C, one_minus_eps, eps_share, DENSE: tl.constexpr):
    """Return q of the columns from ``start`` on, and its sum over those in the row."""
    if DENSE:
        in_row = start + columns < C
        t = tl.load(target + start + columns, mask=in_row, other=0.0).to(tl.float32)
        q = tl.fma(t, one_minus_eps, eps_share)
        return q, tl.sum(tl.where(in_row, q, 0.0), 1)[:, None]
    else:
        return eps_share, eps_share * tl.maximum(tl.minimum(C - start, columns.shape[1]), 0).to(tl.float32)


@triton.jit
def _add_block(x, in_row, q, part, row_max, shift, accum, label_sum, dot, SPREAD: tl.constexpr):
    """Return the sums of a row with those of a block of its logits: from ``row_max`` on."""
    last_max, last_shift = row_max, shift
    row_max = tl.maximum(row_max, tl.max(x, 1)[:, None])
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)  # -inf - -inf is not a number
    z = x - shift
    accum = accum * _exp(last_max - shift) + tl.sum(_exp(z), 1)[:, None]
    if SPREAD:
        dot += label_sum * (last_shift - shift) + tl.sum(tl.where(in_row, q * z, 0.0), 1)[:, None]
        label_sum += part
    return row_max, shift, accum, label_sum, dot


@triton.jit
def _gradient(e, q, c, first, scale, row_weight, classes, SPREAD: tl.constexpr):
    """``scale e - W q - (1 - eps) (wa [c = a] + wb [c = b])``, or 0 in rows that do not count.

    Columns of a block begin with ``first``, so that only blocks that hold a or b look for them; None: it may hold them.
    """
    g = e * scale
    if SPREAD:
        g = tl.fma(q, -row_weight, g)
    if classes is not None:
        a, share_a, b, share_b, has_weight = classes
        if first is None:
            g -= tl.where(c == a, share_a, 0.0) + tl.where(c == b, share_b, 0.0)
        else:
            last = first + c.shape[1]
            holds = ((a >= first) & (a < last)) | ((b >= first) & (b < last))
            if tl.max(tl.max(holds.to(tl.int32), 1), 0) != 0:
                g -= tl.where(c == a, share_a, 0.0) + tl.where(c == b, share_b, 0.0)
        g = tl.where(has_weight, g, 0.0)
    return g


@triton.jit(do_not_specialize=_SIZES)
def cross_entropy_forward_kernel(
    input, target, partner_target, weight, counts, total_weight, ignored, factor, lse_grad, lse_square_scale,
    label_smoothing, N, C, stride_input, stride_target, stride_grad, loss, lse, grad, FORM: tl.constexpr,
):  # fmt: skip
    """Write the loss (N,) of each row, its logsumexp (N,) and the gradient (N,C), unless they are None.

    input (N,C). Classes: target and partner_target (N,) with lam, (N,) or (), as weight; those ``ignored`` do not
    count; for a mean, the targets of each side that count, by ``counts`` (2,), weigh ``total_weight`` together, and
    without ``counts`` all N do. The gradient is that of factor_n loss_n + lse_grad_n L_n; factor (N,) or () and
    lse_grad (N,) or () or None, for 1 and 0. Dense: target (N,C), weight a number, and None for the other arguments.
    """
    SPREAD: tl.constexpr = FORM.dense or FORM.smooth  # whether q is other than 0
    C *= FORM.vector
    one_minus_eps, eps_share = 1.0 - label_smoothing, label_smoothing / C
    n = _rows(N, FORM.block_n)
    rows = _pointers(input, n, stride_input, FORM.vector)
    columns = tl.arange(0, FORM.block_c)[None, :]
    if FORM.written:
        differs = tl.max((tl.load(factor + n * FORM.factors) != 1.0).to(tl.int32), 0) != 0
        if FORM.written == 2:
            differs |= (tl.load(counts) != N) | (tl.load(counts + 1) != N)
        if not differs:
            return
    if FORM.dense:
        labels = _pointers(target, n, stride_target, FORM.vector)
        row_weight = weight
    else:
        labels = None
        a, x_a = _class(rows, target, ignored, n, C)
        b, x_b = _class(rows, partner_target, ignored, n, C)

    if FORM.whole:
        in_row = columns < C
        x = tl.load(rows + columns, mask=in_row, other=float("-inf")).to(tl.float32)
        shift = tl.max(x, 1)[:, None]
        z = x - shift
        e = _exp(z)
        accum = tl.sum(e, 1)[:, None]
        q, label_sum = _label(labels, 0, columns, C, one_minus_eps, eps_share, FORM.dense)
        if SPREAD:
            dot = tl.sum(tl.where(in_row, q * z, 0.0), 1)[:, None]
    else:
        row_max = tl.full([FORM.block_n, 1], float("-inf"), tl.float32)
        shift = tl.full([FORM.block_n, 1], 0.0, tl.float32)
        accum, label_sum, dot = shift, shift, shift
        begin, end, middle = 0, C, rows  # of the columns in blocks
        if FORM.edges:
            offset = n[:, None] * stride_input.to(tl.int64)
            first = (offset + (FORM.edges - 1)) // FORM.edges * FORM.edges
            begin = (first - offset).to(tl.int32)
            end = (C - begin) // FORM.edges * FORM.edges
            middle = input + first
            edge = tl.arange(0, 2 * FORM.edges)[None, :]
            in_edge = (edge >= FORM.edges) | (edge < begin)
            edge = tl.where(edge < FORM.edges, edge, edge - FORM.edges + begin + end)
            in_edge &= edge < C
            x_edge = tl.load(rows + edge, mask=in_edge, other=float("-inf")).to(tl.float32)
            part = eps_share * (C - end).to(tl.float32)
            row_max, shift, accum, label_sum, dot = _add_block(
                x_edge, in_edge, eps_share, part, row_max, shift, accum, label_sum, dot, SPREAD
            )
        for start in range(0, C, FORM.block_c):
            c = start + columns
            in_row = c < end
            x = tl.load(middle + c, mask=in_row, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
            q, part = _label(labels, start, columns, end, one_minus_eps, eps_share, FORM.dense)
            row_max, shift, accum, label_sum, dot = _add_block(
                x, in_row, q, part, row_max, shift, accum, label_sum, dot, SPREAD
            )

    log_sum = tl.log(accum)
    if FORM.dense:
        value = row_weight * (label_sum * log_sum - dot)
        scale = row_weight * label_sum / accum
        classes = None
    else:
        lam = tl.load(weight + n * FORM.weights)[:, None]
        partner_lam = 1.0 - lam
        if counts is None:
            if total_weight is not None:
                lam *= total_weight / N.to(tl.float32)
                partner_lam *= total_weight / N.to(tl.float32)
        else:
            count, partner_count = tl.load(counts), tl.load(counts + 1)
            lam *= total_weight / count.to(tl.float32)
            partner_lam *= total_weight / partner_count.to(tl.float32)
        if factor is not None:
            f = tl.load(factor + n * FORM.factors)[:, None]
            lam *= f
            partner_lam *= f
        weight_a, x_a = _weigh(a, x_a, lam)
        weight_b, x_b = _weigh(b, x_b, partner_lam)
        row_weight = weight_a + weight_b
        share_a, share_b = one_minus_eps * weight_a, one_minus_eps * weight_b
        value = share_a * (log_sum - (x_a - shift))
        partner_value = share_b * (log_sum - (x_b - shift))
        row_lse = shift + log_sum
        share = row_weight  # of the softmax
        if FORM.smooth:
            value += weight_a * (label_sum * log_sum - dot)
            partner_value += weight_b * (label_sum * log_sum - dot)
        if lse_square_scale is not None:
            square = lse_square_scale * row_lse * row_lse
            value += weight_a * square
            partner_value += weight_b * square
            share += 2.0 * row_weight * lse_square_scale * row_lse
        value = tl.where(weight_a != 0.0, value, 0.0)
        partner_value = tl.where(weight_b != 0.0, partner_value, 0.0)
        if FORM.sides:
            tl.store((loss + N + n)[:, None], partner_value)
        else:
            value += partner_value
        has_weight = (weight_a != 0.0) | (weight_b != 0.0)
        if lse_grad is not None:
            h = tl.load(lse_grad + n * FORM.lse_grads)[:, None]
            share = tl.where(has_weight, share, 0.0) + h
            has_weight |= h != 0.0
        if counts is not None:  # the mean of no targets
            value = tl.where((count > 0) & (partner_count > 0), value, float("nan"))
        scale = share / accum
        classes = a, share_a, b, share_b, has_weight
        if lse is not None:
            tl.store((lse + n)[:, None], row_lse)
    if loss is not None:
        tl.store((loss + n)[:, None], value)

    if grad is not None:
        grad_rows = _pointers(grad, n, stride_grad, FORM.vector)
        if FORM.whole:
            g = _gradient(e, q, columns, None, scale, row_weight, classes, SPREAD)
            tl.store(grad_rows + columns, g.to(grad.dtype.element_ty), mask=in_row)
        else:
            grad_middle = grad_rows
            if FORM.edges:
                g_edge = _gradient(_exp(x_edge - shift), eps_share, edge, None, scale, row_weight, classes, SPREAD)
                tl.store(grad_rows + edge, g_edge.to(grad.dtype.element_ty), mask=in_edge)
                grad_middle = grad + first
            blocks = tl.cdiv(C, FORM.block_c)
            for block in range(blocks):
                start = (blocks - 1 - block) * FORM.block_c
                c = start + columns
                in_row = c < end
                x = tl.load(middle + c, mask=in_row, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
                q, _ = _label(labels, start, columns, end, one_minus_eps, eps_share, FORM.dense)
                g = _gradient(_exp(x - shift), q, begin + c, begin + start, scale, row_weight, classes, SPREAD)
                tl.store(grad_middle + c, g.to(grad.dtype.element_ty), mask=in_row, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["N", "ignored"])
def mixup_cross_entropy_mean_kernel(
    losses, partner_losses, target, partner_target, N, ignored, scale, loss, counts, BLOCK: tl.constexpr
):
    """Write to counts (2,) how many targets of each side are not ignored, and to loss () the mean over those::

        scale (sum_n losses_n / counts_0 + sum_n partner_losses_n / counts_1)

    One program; losses, partner_losses, target and partner_target (N,).
    """
    total, partner_total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    count, partner_count = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, N, BLOCK):
        n = start + tl.arange(0, BLOCK)
        in_rows = n < N
        total += tl.load(losses + n, mask=in_rows, other=0.0)
        partner_total += tl.load(partner_losses + n, mask=in_rows, other=0.0)
        count += (tl.load(target + n, mask=in_rows, other=ignored) != ignored).to(tl.int32)
        partner_count += (tl.load(partner_target + n, mask=in_rows, other=ignored) != ignored).to(tl.int32)
    number, partner_number = tl.sum(count, 0), tl.sum(partner_count, 0)
    mean = tl.sum(total, 0) / number.to(tl.float32) + tl.sum(partner_total, 0) / partner_number.to(tl.float32)
    tl.store(loss, tl.where((number > 0) & (partner_number > 0), scale * mean, float("nan")))
    tl.store(counts, number)
    tl.store(counts + 1, partner_number)


@triton.jit(do_not_specialize=_SIZES)
def cross_entropy_backward_kernel(
    grad, factor, N, C, stride_grad, stride_factor, VECTOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """``grad_n *= factor_n``; a program whose factors are all 1 ends at once. grad (N,C), factor (N,) or ()

    The kernel works in place, so rows beyond the last are masked: clamped ones would be multiplied several times.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = n < N
    f = tl.load(factor + n * stride_factor.to(tl.int64), mask=in_rows, other=1.0)
    if tl.max((f != 1.0).to(tl.int32), 0) != 0:
        C *= VECTOR
        rows = _pointers(grad, n, stride_grad, VECTOR)
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)[None, :]
            mask = in_rows[:, None] & (c < C)
            g = tl.load(rows + c, mask=mask, other=0.0).to(tl.float32)
            tl.store(rows + c, (g * f[:, None]).to(grad.dtype.element_ty), mask=mask)


def counts_later(num_samples: int, num_classes: int) -> bool:
    """Whether a mean assumes that all targets count: of few rows, and where a gradient formed anew costs little."""
    return num_samples <= configs.MEAN_ROWS and num_samples * num_classes <= configs.MEAN_LOGITS


def cross_entropy(
    input: Tensor,
    target_a: Tensor,
    target_b: Tensor,
    lam: Tensor,
    label_smoothing: float,
    lse_square_scale: float,
    ignore_index: int,
    total_weight: float | None,
    loss: Tensor | None,
    lse: Tensor | None,
    grad: Tensor | None,
    factor: Tensor | None = None,
    lse_grad: Tensor | None = None,
    counts: Tensor | None = None,
    written: int = 0,
) -> None:
    """Compute losses, logsumexps L and the gradient of ``factor_n loss_n + lse_grad_n L_n``, those that are not None::

        loss_n = lam_n A (CE(x_n, a_n) + lse_square_scale L_n^2) + (1 - lam_n) B (CE(x_n, b_n) + lse_square_scale L_n^2)

    A and B are 1, or ``total_weight`` over the number of a_n and of b_n that are not ``ignore_index``, which are
    ``counts`` (2,) int32; where either number is 0, every loss is NaN. A loss (2,N) gets both sides' terms one by one,
    where A and B are total_weight / N. ``written`` tells that grad holds the gradient already where all factors are 1
    and, if it is 2, all targets count.

    ``input`` (N,C) and, of its dtype, ``grad`` (N,C): unit stride in C; targets (N,) int64, ``lam`` and ``factor`` (N,)
    or (), ``loss``, ``lse`` and ``lse_grad`` (N,) float32. A target out of range reads nothing and gives NaN, unless it
    is ignored or its weight is 0; a row that has no weight gets 0 whatever its logits are.
    """
    targets = target_a.contiguous(), target_b.contiguous()
    (weight, weights), (factor, factors), (lse_grad, lse_grads) = (_by_row(value) for value in (lam, factor, lse_grad))
    options = counts, total_weight, ignore_index, factor, lse_grad, lse_square_scale or None
    form = {"written": written, "weights": weights, "factors": factors, "lse_grads": lse_grads}
    _run(input, (*targets, weight, *options), 0, label_smoothing, loss, lse, grad, **form)


def _by_row(value: Tensor | None) -> tuple[Tensor | None, int]:
    """Return a value for each row, contiguous, and 1; or one for all rows and 0."""
    if value is None or not value.dim() or value.stride(0) == 0:
        return value, 0
    return value.contiguous(), 1


def count(target_a: Tensor, target_b: Tensor, ignore_index: int) -> Tensor:
    """Return (2,) int32: how many of ``target_a`` and of ``target_b`` (N,) are not ``ignore_index``."""
    counts, block = torch.zeros(2, dtype=torch.int32, device=target_a.device), 2048
    if len(target_a):
        arguments = (target_a.contiguous(), target_b.contiguous(), len(target_a), ignore_index, counts)
        programs = configs.cdiv(len(target_a), block)
        launch.run(launch.Launch(mixup_cross_entropy_count_kernel, programs, arguments, {"BLOCK": block}))
    return counts


def mean(
    losses: Tensor, target_a: Tensor, target_b: Tensor, ignore_index: int, scale: float, loss: Tensor, counts: Tensor
) -> None:
    """Write :func:`count` to ``counts``, and to ``loss`` () ``scale`` times the sum of ``losses`` (2,N) over them."""
    arguments = (*losses.unbind(), target_a.contiguous(), target_b.contiguous(), len(target_a), ignore_index)
    constants = {"BLOCK": 1024}
    arguments = (*arguments, float(scale), loss, counts)
    launch.run(launch.Launch(mixup_cross_entropy_mean_kernel, 1, arguments, constants, num_warps=8))


def soft_target_cross_entropy(
    input: Tensor, target: Tensor, weight: float, label_smoothing: float, loss: Tensor, grad: Tensor | None
) -> None:
    """Compute ``loss_n = - weight sum_c ((1 - eps) t_nc + eps / C) log softmax(x_n)_c`` and its gradient.

    ``input``, ``target`` of any float dtype and, of input's, ``grad`` or None, (N,C) with unit stride in C; ``loss``
    (N,) float32.
    """
    target = launch.interpretable(target)
    targets = (target, None, float(weight), *[None] * 6)
    _run(input, targets, target.stride(0), label_smoothing, loss, None, grad)


def _run(
    input: Tensor,
    targets: tuple[Any, ...],
    stride_target: int,
    label_smoothing: float,
    loss: Tensor | None,
    lse: Tensor | None,
    grad: Tensor | None,
    written: int = 0,
    weights: int = 0,
    factors: int = 0,
    lse_grads: int = 0,
) -> None:
    """Launch on these ``targets`` and options."""
    if not input.numel():
        for result, value in ((loss, 0.0), (lse, -math.inf)):  # there are no classes
            if result is not None:
                result.fill_(value)
        return
    input, num_classes = launch.interpretable(input), input.shape[1]
    dense = targets[1] is None
    itemsize = max(input.itemsize, targets[0].itemsize) if dense else input.itemsize
    with nullcontext() if grad is None else launch.rounded(grad) as result:
        strides = (input.stride(0), stride_target, 0 if result is None else result.stride(0))
        vector = configs.vector_size(itemsize, num_classes, *strides)
        # Long rows that are not whole vectors have edges, if the gradient's rows begin as those of the logits do.
        edges = 0 if dense or (result is not None and strides[0] != strides[2]) else 16 // itemsize
        config = configs.cross_entropy_config(num_classes, itemsize, edges or vector, dense, edges > vector)
        if vector == edges or config.holds(num_classes):
            edges, config = 0, configs.cross_entropy_config(num_classes, itemsize, vector, dense)
        sides = loss is not None and loss.dim() == 2
        smooth = label_smoothing > 0
        whole = config.holds(num_classes)
        vector, tile = 1 if edges else vector, config.tile(num_classes)
        form = Form(
            vector, edges, *tile, whole, dense, smooth, sides, written, weights, factors, lse_grads
        )  # fmt: skip
        sizes = _in_vectors(input, vector, strides)
        arguments = (input, *targets, float(label_smoothing), *sizes, loss, lse, result)
        _launch(cross_entropy_forward_kernel, config, input, arguments, FORM=form)


def scale_(grad: Tensor, factor: Tensor) -> None:
    """Multiply ``grad`` (N,C), of unit stride in C, by ``factor`` (N,) or () float32; factors of 1 cost no traffic."""
    if not grad.numel():
        return
    with launch.rounded(grad) as result:
        vector = configs.vector_size(result.itemsize, grad.shape[1], result.stride(0))
        config = configs.cross_entropy_config(grad.shape[1], result.itemsize, vector, dense=False)
        stride_factor = factor.stride(0) if factor.dim() else 0
        arguments = (result, factor, *_in_vectors(result, vector, result.stride()[:1]), stride_factor)
        block_n, block_c = config.tile(grad.shape[1])
        constants = {"VECTOR": vector, "BLOCK_N": block_n, "BLOCK_C": block_c}
        _launch(cross_entropy_backward_kernel, config, result, arguments, **constants)


def _in_vectors(rows: Tensor, vector: int, strides: Sequence[int]) -> tuple[int, ...]:
    """Return N, then C and the strides in vectors."""
    num_samples, num_classes = rows.shape
    return num_samples, num_classes // vector, *(stride // vector for stride in strides)


def _launch(
    kernel: Any, config: configs.CrossEntropyConfig, rows: Tensor, arguments: tuple[Any, ...], **constants: Any
) -> None:
    """Launch one program per tile of rows."""
    programs = configs.cdiv(len(rows), config.tile(rows.shape[1])[0])
    options = {"num_warps": config.num_warps(rows.shape[1]), "max_registers": config.max_registers(rows.shape[1])}
    launch.run(launch.Launch(kernel, programs, arguments, constants, **options))
