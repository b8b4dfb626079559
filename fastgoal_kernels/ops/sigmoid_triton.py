"""-log sigmoid(x) and its derivative to the last digits, from one exponential."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log1p_of_fraction(x):
    """log(1 + x) for x in [0, 1], to 1.5e-7 of itself.

    The device's logarithm of 1 + x is off by 1e-7, which is all of the loss of an easy pair. The
    polynomial goes through log(1 + x) / x at the ten Chebyshev nodes of [0, 1].
    """
    p = -0.0031760570127516985
    p = p * x + 0.019542526453733444
    p = p * x - 0.056373611092567444
    p = p * x + 0.10543623566627502
    p = p * x - 0.1526966691017151
    p = p * x + 0.1966327428817749
    p = p * x - 0.24951615929603577
    p = p * x + 0.33329710364341736
    p = p * x - 0.49999892711639404
    p = p * x + 1.0
    return p * x


@triton.jit
def sigmoid_loss_terms(yz):
    """(-log sigmoid(yz), sigmoid(-yz)), neither of which overflows."""
    small = tl.exp2(-tl.abs(yz) * _LOG2_E)
    loss = tl.where(yz < 0, -yz, 0.0) + _log1p_of_fraction(small)
    miss = tl.where(yz > 0, small, 1.0) / (1.0 + small)
    return loss, miss
