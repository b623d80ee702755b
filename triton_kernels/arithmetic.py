"""Products that mean the same on the GPU and under Triton's interpreter."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32; products of half types are exact there."""
    if _INTERPRETED:
        # the interpreter multiplies bfloat16 as if its bits were integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x) in float64, of x in float64 within float32's normal range.

    Newton's steps from float32: the division and root of float64 are calls with a stack frame.
    """
    y = tl.rsqrt(x.to(tl.float32)).to(tl.float64)
    y = y * (1.5 - 0.5 * x * y * y)
    return y * (1.5 - 0.5 * x * y * y)


@triton.jit
def inverse(x):
    """1 / x in float64, of x in float64 within float32's normal range."""
    y = (1.0 / x.to(tl.float32)).to(tl.float64)
    y = y * (2.0 - x * y)
    return y * (2.0 - x * y)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in dtype, rounded to the nearest even: the interpreter truncates to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
