"""The activations inside Triton kernels: device functions over the one family that holds them all.

Kernels take a :class:`~mixfeat.kernels.polynomial.Polynomial` in :func:`normal_form`, with
``inverse = 1 / threshold``; its ``scale`` they apply once, outside their inner loops.
"""

import triton
import triton.language as tl

from ..polynomial import Polynomial

__all__ = ["add_phi", "add_phi_of_sum", "mul_slope", "mul_slope_of_sum", "normal_form", "regions"]


def normal_form(activation: Polynomial) -> Polynomial:
    """The same function, its threshold 1 wherever none is needed: kernels multiply by its inverse only if ``upper``.

    At degree 1 both branches of ``upper`` are one line; without it, ``t^degree = z^degree / threshold^degree``.
    """
    if activation.upper and activation.degree > 1:
        return activation
    scale = activation.scale / activation.threshold**activation.degree
    return activation._replace(threshold=1.0, scale=scale, upper=False)


@triton.jit
def _power(u, EXPONENT: tl.constexpr):
    """``u^EXPONENT``, 1 <= EXPONENT <= 16, by squaring: ``result`` is u to the bits of EXPONENT seen so far."""
    result = u
    for bit in tl.static_range(3, -1, -1):
        if EXPONENT >> (bit + 1) > 0:
            result = result * result
            if (EXPONENT >> bit) % 2 == 1:
                result = result * u
    return result


@triton.jit
def _add_power(total, u, EXPONENT: tl.constexpr):
    """``total + u^EXPONENT``, the last multiplication and the addition being one instruction."""
    if EXPONENT == 1:
        total += u
    elif EXPONENT % 2 == 0:
        half = _power(u, EXPONENT // 2)
        total = tl.fma(half, half, total)
    else:
        total = tl.fma(_power(u, EXPONENT - 1), u, total)
    return total


@triton.jit
def _clip(z, inverse, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """u: z / threshold, at least 0 if LOWER, at most 1 if UPPER. Both make one instruction, and NaN 0."""
    if LOWER and UPPER:
        return tl.clamp(z * inverse, 0.0, 1.0)
    elif LOWER:
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif UPPER:
        return tl.minimum(z * inverse, 1.0)
    else:
        return z


@triton.jit
def add_phi(total, z, inverse, DEGREE: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """``total + degree / scale * phi(z)``, float32: 7 instructions for PolyReLU of degree 8.

    NaN in z comes through: what :func:`_clip` may lose, the maximum below keeps, in one instruction from sm_80 on.
    """
    u = _clip(z, inverse, LOWER, UPPER)
    total = _add_power(total, u, DEGREE)
    if UPPER:
        excess = tl.fma(z, DEGREE * inverse, -1.0 * DEGREE)  # degree * (t - 1)
        total += tl.maximum(excess, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return total


@triton.jit
def mul_slope(grad, z, inverse, DEGREE: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """``grad * threshold / scale * phi'(z)``, float32."""
    if DEGREE > 1:
        return grad * _power(_clip(z, inverse, LOWER, UPPER), DEGREE - 1)
    elif LOWER:
        return tl.where(z > 0, grad, 0.0)
    else:
        return grad


# Scales the part of t above the threshold into [0, 1], where clamping at 0 comes with an addition for free. A power of
# two, so nothing is rounded; a t beyond 2^100 is cut, one within 2^-26 of the threshold flushed.
_SHRINK = tl.constexpr(2.0**-100)


@triton.jit
def _clip_of_sum(a, b, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """u of t = a + b; addition and both bounds make one instruction, and NaN 0."""
    if LOWER and UPPER:
        return tl.clamp(a + b, 0.0, 1.0)
    elif LOWER:
        return tl.maximum(a + b, 0.0)
    elif UPPER:
        return tl.minimum(a + b, 1.0)
    else:
        return a + b


@triton.jit
def add_phi_of_sum(total, a, b, DEGREE: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """``total + degree / scale * phi(threshold * (a + b))``, float32: 6 instructions for PolyReLU of degree 8.

    ``a`` and ``b`` broadcast against each other; what is done to ``a`` alone costs little. NaN may become 0.
    """
    u = _clip_of_sum(a, b, LOWER, UPPER)
    total = _add_power(total, u, DEGREE)
    if UPPER:
        excess = tl.clamp(b * _SHRINK + (a - 1.0) * _SHRINK, 0.0, 1.0)
        total = excess * (DEGREE / _SHRINK) + total
    return total


@triton.jit
def mul_slope_of_sum(grad, a, b, DEGREE: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """``grad * threshold / scale * phi'(threshold * (a + b))``, float32: 5 instructions for PolyReLU of degree 8."""
    if DEGREE > 1:
        u = _clip_of_sum(a, b, LOWER, UPPER)
        if DEGREE == 2:
            return grad * u
        elif DEGREE % 2 == 0:
            return (grad * u) * _power(u, DEGREE - 2)
        else:
            return grad * _power(u, DEGREE - 1)
    elif LOWER:
        return tl.where(a + b > 0, grad, 0.0)
    else:
        return grad + 0.0 * (a + b)


@triton.jit
def regions(least, greatest, DEGREE: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """Whether phi is 0 for all t that lie between these, and whether, else, ``degree / scale * phi`` is a line for all.

    The line is ``degree * t - (degree - 1)``, its slope ``mul_slope(1)``; t being z / threshold. NaN is in no region.
    """
    ZERO_UNTIL: tl.constexpr = 0.0 if LOWER else float("-inf")
    LINE_FROM: tl.constexpr = ZERO_UNTIL if DEGREE == 1 else 1.0 if UPPER else float("inf")
    zero = greatest <= ZERO_UNTIL
    return zero, (least >= LINE_FROM) & ~zero
