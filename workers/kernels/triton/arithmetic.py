"""What both stages compute with; inlined into the kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponential(score, PRECISE: tl.constexpr):
    """e^score of float32 scores of at most 0, whatever their shape.

    PRECISE: within two units in the last place. The device's own exponential multiplies by log2 e first,
    which costs |score| 2^-24. Here the multiple of ln 2 is subtracted in two parts (Cody and Waite, 1980) and
    the rest, within ln 2 / 2 of 0, goes through Taylor's polynomial of degree 7. The least result is then
    e^-86 and not 0: who must not count a masked score masks its result.
    """
    if PRECISE:
        bounded = tl.maximum(score, -86.0)
        power = tl.floor(bounded * 1.4426950408889634 + 0.5)
        rest = bounded - power * 0.693359375  # ln 2 in few bits, so that the product is exact,
        rest = rest + power * 2.12194440e-4  # and by how much that is too large
        result = rest * (1.0 / 5040) + 1.0 / 720
        result = result * rest + 1.0 / 120
        result = result * rest + 1.0 / 24
        result = result * rest + 1.0 / 6
        result = result * rest + 0.5
        result = result * rest + 1.0
        result = result * rest + 1.0
        result = result * ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^power
    else:
        result = tl.exp(score)
    return result


@triton.jit
def product(left, right, WIDEN: tl.constexpr):
    """left [n, k] times right [k, m], summed in float32; no TF32.

    WIDEN: through float32, which changes no product: the interpreter multiplies bfloat16 as integers.
    """
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")
