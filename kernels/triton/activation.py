"""The activations inside Triton kernels: device functions over the one family that holds them all.

Kernels take a :class:`~mixfeat.kernels.polynomial.Polynomial` in :func:`normal_form`: its :func:`kind` as the constant
ACTIVATION, and ``inverse = 1 / threshold``. They apply its ``scale`` once, outside their inner loops.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..polynomial import Polynomial

__all__ = ["Kind", "add_phi", "add_phi_of_sum", "kind", "mul_slope", "mul_slope_of_sum", "normal_form"]


class Kind(NamedTuple):
    """The part of a polynomial that a kernel is compiled for; its threshold and scale are arguments at run time."""

    degree: int
    lower: bool
    upper: bool


def kind(activation: Polynomial) -> Kind:
    """Return the constant ACTIVATION of kernels that evaluate this polynomial."""
    return Kind(activation.degree, activation.lower, activation.upper)


def normal_form(activation: Polynomial) -> Polynomial:
    """Return the same function with threshold 1 wherever that is possible: kernels use its inverse only if ``upper``.

    At degree 1 both branches of ``upper`` are the same line; without ``upper``, the scale absorbs the threshold.
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
def _add_power(accum, u, EXPONENT: tl.constexpr):
    """``accum + u^EXPONENT``, the last multiplication and the addition being one instruction."""
    if EXPONENT == 1:
        accum += u
    elif EXPONENT % 2 == 0:
        half = _power(u, EXPONENT // 2)
        accum = tl.fma(half, half, accum)
    else:
        accum = tl.fma(_power(u, EXPONENT - 1), u, accum)
    return accum


@triton.jit
def _clip(z, inverse, ACTIVATION: tl.constexpr):
    """Return u: z / threshold, clamped to at least 0 if ``lower``, to at most 1 if ``upper``.

    Both clamps together are one instruction, which turns NaN into 0.
    """
    if ACTIVATION.lower and ACTIVATION.upper:
        return tl.clamp(z * inverse, 0.0, 1.0)
    elif ACTIVATION.lower:
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION.upper:
        return tl.minimum(z * inverse, 1.0)
    else:
        return z


@triton.jit
def add_phi(accum, z, inverse, ACTIVATION: tl.constexpr):
    """``accum + degree / scale * phi(z)``, float32: 7 instructions for PolyReLU of degree 8.

    NaN in z is kept: :func:`_clip` may lose it, the maximum below does not. It is one instruction from sm_80 on.
    """
    u = _clip(z, inverse, ACTIVATION)
    accum = _add_power(accum, u, ACTIVATION.degree)
    if ACTIVATION.upper:
        excess = tl.fma(z, ACTIVATION.degree * inverse, -1.0 * ACTIVATION.degree)  # degree * (t - 1)
        accum += tl.maximum(excess, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return accum


@triton.jit
def mul_slope(grad, z, inverse, ACTIVATION: tl.constexpr):
    """``grad * threshold / scale * phi'(z)``, float32."""
    if ACTIVATION.degree > 1:
        return grad * _power(_clip(z, inverse, ACTIVATION), ACTIVATION.degree - 1)
    elif ACTIVATION.lower:
        return tl.where(z > 0, grad, 0.0)
    else:
        return grad


# Scales the part of t above the threshold into [0, 1], where an addition clamps for free. As a power of two it rounds
# nothing, but a t beyond 2^100 is clamped, and one within 2^-26 of the threshold is flushed to it.
_SHRINK = tl.constexpr(2.0**-100)


@triton.jit
def _clip_of_sum(a, b, ACTIVATION: tl.constexpr):
    """Return u of t = a + b. Addition and both clamps are one instruction, which turns NaN into 0."""
    if ACTIVATION.lower and ACTIVATION.upper:
        return tl.clamp(a + b, 0.0, 1.0)
    elif ACTIVATION.lower:
        return tl.maximum(a + b, 0.0)
    elif ACTIVATION.upper:
        return tl.minimum(a + b, 1.0)
    else:
        return a + b


@triton.jit
def add_phi_of_sum(accum, a, b, ACTIVATION: tl.constexpr):
    """``accum + degree / scale * phi(threshold * (a + b))``, float32: 6 instructions for PolyReLU of degree 8.

    ``a`` and ``b`` broadcast against each other; operations on ``a`` alone cost little. NaN may become 0.
    """
    u = _clip_of_sum(a, b, ACTIVATION)
    accum = _add_power(accum, u, ACTIVATION.degree)
    if ACTIVATION.upper:
        excess = tl.clamp(b * _SHRINK + (a - 1.0) * _SHRINK, 0.0, 1.0)
        accum = excess * (ACTIVATION.degree / _SHRINK) + accum
    return accum


@triton.jit
def mul_slope_of_sum(grad, a, b, ACTIVATION: tl.constexpr):
    """``grad * threshold / scale * phi'(threshold * (a + b))``, float32: 5 instructions for PolyReLU of degree 8."""
    if ACTIVATION.degree > 1:
        u = _clip_of_sum(a, b, ACTIVATION)
        if ACTIVATION.degree == 2:
            return grad * u
        elif ACTIVATION.degree % 2 == 0:
            return (grad * u) * _power(u, ACTIVATION.degree - 2)
        else:
            return grad * _power(u, ACTIVATION.degree - 1)
    elif ACTIVATION.lower:
        return tl.where(a + b > 0, grad, 0.0)
    else:
        return grad + 0.0 * (a + b)
