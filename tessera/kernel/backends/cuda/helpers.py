"""Small Triton functions that generated kernels call; each kernel's file holds the ones that it uses.

They are text, not jitted functions of this module, so that a generated file stands on its own and runs under
Triton's interpreter as well.
"""

from __future__ import annotations

HELPERS: dict[str, str] = {
    "nan_max": """
@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, tl.PropagateNan.ALL)
""",
    "nan_min": """
@triton.jit
def nan_min(a, b):
    return tl.minimum(a, b, tl.PropagateNan.ALL)
""",
    "int_max": """
@triton.jit
def int_max(a, b):
    return tl.maximum(a, b)
""",
    # The first of the largest; NaN counts as largest.
    "first_argmax": """
@triton.jit
def first_argmax(a, i, b, j):
    same = (a == b) | ((a != a) & (b != b))
    left = (a > b) | ((a != a) & (b == b)) | (same & (i < j))
    return tl.where(left, a, b), tl.where(left, i, j)
""",
    "first_argmin": """
@triton.jit
def first_argmin(a, i, b, j):
    same = (a == b) | ((a != a) & (b != b))
    left = (a < b) | ((a != a) & (b == b)) | (same & (i < j))
    return tl.where(left, a, b), tl.where(left, i, j)
""",
    # Python's rounding: towards minus infinity; the remainder has the divisor's sign.
    "int_floordiv": """
@triton.jit
def int_floordiv(a, b):
    quotient = a // b
    return tl.where((a - quotient * b != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)
""",
    "int_mod": """
@triton.jit
def int_mod(a, b):
    remainder = a % b
    return tl.where((remainder != 0) & ((remainder < 0) != (b < 0)), remainder + b, remainder)
""",
    "float_mod": """
@triton.jit
def float_mod(a, b):
    remainder = libdevice.fmod(a, b)
    return tl.where((remainder != 0) & ((remainder < 0) != (b < 0)), remainder + b, remainder)
""",
    "float_floordiv": """
@triton.jit
def float_floordiv(a, b):
    quotient = tl.where(b == 0, a / b, tl.floor((a - float_mod(a, b)) / b + 0.5))
    crosses = (a != 0) & ((a < 0) != (b < 0))
    return tl.where((tl.abs(b) == float("inf")) & (tl.abs(a) != float("inf")), tl.where(crosses, -1.0, 0.0), quotient)
""",
    "int_pow": """
@triton.jit
def int_pow(a, b):
    result = a * 0 + b * 0 + 1
    factor = a + b * 0
    left = b + a * 0
    for _ in range(6):
        result = tl.where((left & 1) != 0, result * factor, result)
        factor = factor * factor
        left = left >> 1
    return result
""",
    # An f32 as a sum of bf16 numbers; what an infinity or NaN leaves is 0.
    "bf16_parts_2": """
@triton.jit
def bf16_parts_2(x):
    high = x.to(tl.bfloat16)
    low = tl.where(tl.abs(x) < 3.3e38, x - high.to(tl.float32), 0.0).to(tl.bfloat16)
    return high, low
""",
    "bf16_parts_3": """
@triton.jit
def bf16_parts_3(x):
    high = x.to(tl.bfloat16)
    rest = tl.where(tl.abs(x) < 3.3e38, x - high.to(tl.float32), 0.0)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low
""",
    # Float to int: towards zero, clamped to the type's range; NaN gives 0.
    "saturated": """
@triton.jit
def saturated(x, low: tl.constexpr, high: tl.constexpr, dtype: tl.constexpr):
    inside = tl.where((x > low) & (x < high), x, 0.0).to(dtype)
    return tl.where(x >= high, high, tl.where(x <= low, low, inside)).to(dtype)
""",
    # Order-preserving 32-bit integers as int64; NaN above all; flipped for a descending, still stable, sort.
    "float_key": """
@triton.jit
def float_key(x, descending: tl.constexpr):
    x = x.to(tl.float32)
    bits = tl.where(x != x, float("nan"), x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FFFFFFF, bits)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    return -1 - key if descending else key
""",
    "float_of_key": """
@triton.jit
def float_of_key(key, descending: tl.constexpr):
    high = key >> 32
    bits = (-1 - high if descending else high).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
""",
    "int_key": """
@triton.jit
def int_key(x, descending: tl.constexpr):
    key = x.to(tl.int64)
    return -1 - key if descending else key
""",
    "int_of_key": """
@triton.jit
def int_of_key(key, descending: tl.constexpr):
    high = key >> 32
    return -1 - high if descending else high
""",
    # The same of 64 bits, where no position fits beside the value.
    "wide_float_key": """
@triton.jit
def wide_float_key(x, descending: tl.constexpr):
    bits = (x + 0.0).to(tl.int64, bitcast=True)
    key = tl.where(x != x, 0x7FFFFFFFFFFFFFFF, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
    return -1 - key if descending else key
""",
    "wide_float_of_key": """
@triton.jit
def wide_float_of_key(key, descending: tl.constexpr):
    bits = -1 - key if descending else key
    return (bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)
""",
    "wide_int_key": """
@triton.jit
def wide_int_key(x, descending: tl.constexpr):
    return -1 - x if descending else x
""",
    "wide_int_of_key": """
@triton.jit
def wide_int_of_key(key, descending: tl.constexpr):
    return -1 - key if descending else key
""",
    "wide_order": """
@triton.jit
def wide_order(key, positions, axis: tl.constexpr):
    low = tl.sort((((key & 0xFFFFFFFF) - 0x80000000) << 32) | positions)
    order = (low & 0xFFFFFFFF).to(tl.int32)
    high = tl.sort((tl.gather(key >> 32, order, axis=axis) << 32) | positions)
    return tl.gather(order, (high & 0xFFFFFFFF).to(tl.int32), axis=axis)
""",
}


def text_of(names: set[str]) -> str:
    """The definitions, in a fixed order."""
    return "\n".join(text for name, text in HELPERS.items() if name in names)
