"""Elementwise builtins: arithmetic, math functions, comparisons, selection, casts.

Operands are tiles, parameters (loaded when met), scalars and Python numbers; shapes broadcast from the
right, and a tile from `load_broadcast` finds its axes by name. Arithmetic on bf16, f16, fp8 gives f32,
on int8 and uint8 int32; a value is rounded only where the program casts or stores it.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import Any

from tessera.kernel.build import TypeRuleError
from tessera.kernel.dims import Dim
from tessera.kernel.ir import Value
from tessera.kernel.lang.core import Operand, builder, builtin, dtype_arg, is_number, tile_of, tiles_of

_FOLD: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "pow": operator.pow, "div": operator.truediv,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "max": max, "min": min, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "shl": operator.lshift, "shr": operator.rshift,
}
_FOLD_DIM: dict[str, Callable[[Dim, Dim], Dim]] = {
    "add": Dim.__add__, "sub": Dim.__sub__, "mul": Dim.__mul__, "floordiv": Dim.__floordiv__, "mod": Dim.__mod__,
    "max": Dim.maximum, "min": Dim.minimum,
}


def binary(name: str, x: Any, y: Any) -> Any:
    """The operation on two operands; numbers and sizes are folded.

    Raises:
        TypeRuleError: the operands do not fit, or a constant division by zero.
    """
    if is_number(x) and is_number(y):
        try:
            return _FOLD[name](x, y)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise TypeRuleError(f"{name}: {x!r} and {y!r}: {error}") from None
    if _is_size(x) and _is_size(y):
        folded = _fold_sizes(name, Dim.of(x), Dim.of(y))
        if folded is not None:
            return folded
    if name == "pow" and isinstance(y, int) and not isinstance(y, bool) and y >= 1:
        return _power(x, y)
    left, right = tiles_of(x, y, what=name)
    if name == "div" and left.type.dtype.is_int and right.type.dtype.is_int and left.type.rank == right.type.rank == 0:
        left, right = builder().cast(left, dtype_arg("f32", name)), builder().cast(right, dtype_arg("f32", name))
    return builder().binary(name, left, right)


def _is_size(x: Any) -> bool:
    return isinstance(x, Dim) or (isinstance(x, int) and not isinstance(x, bool))


def _fold_sizes(name: str, x: Dim, y: Dim) -> Any:
    if name in ("floordiv", "mod") and y.const == 0:
        raise TypeRuleError(f"{name}: {x} by zero")
    if name in _FOLD_DIM:
        return plain(_FOLD_DIM[name](x, y))
    gap = (x - y).const
    if name in ("lt", "le", "gt", "ge", "eq", "ne") and gap is not None:
        return _FOLD[name](gap, 0)
    if name == "pow" and y.const is not None and 0 <= y.const <= 8:
        result = Dim.of(1)
        for _ in range(y.const):
            result = result * x
        return plain(result)
    return None


def plain(x: Any) -> Any:
    """A size as an int where it is known."""
    return x.const if isinstance(x, Dim) and x.const is not None else x


def _power(x: Operand, exponent: int) -> Any:
    """x to a small positive int power by squaring; larger ones go to `pow`."""
    if exponent > 8:
        return builder().binary("pow", *tiles_of(x, float(exponent), what="pow"))
    result: Any = None
    base: Any = tile_of(x, what="pow")
    while exponent:
        if exponent & 1:
            result = base if result is None else builder().binary("mul", result, base)
        exponent >>= 1
        if exponent:
            base = builder().binary("mul", base, base)
    return result


def unary(name: str, x: Operand, fold: Callable[[float], float] | None = None) -> Any:
    """The operation on one operand; a Python number is folded where `fold` says how."""
    if is_number(x) and fold is not None:
        try:
            return fold(x)  # type: ignore[arg-type]
        except (ValueError, OverflowError) as error:
            raise TypeRuleError(f"{name}: {x!r}: {error}") from None
    if isinstance(x, Dim) and name not in ("neg", "abs"):
        return builder().unary(name, builder().cast(builder().size(x), dtype_arg("f32", name)))
    return builder().unary(name, tile_of(x, what=name))


@builtin
def add(x: Operand, y: Operand) -> Value:
    """x + y."""
    return binary("add", x, y)


@builtin
def sub(x: Operand, y: Operand) -> Value:
    """x - y."""
    return binary("sub", x, y)


@builtin
def mul(x: Operand, y: Operand) -> Value:
    """x * y."""
    return binary("mul", x, y)


@builtin
def div(x: Operand, y: Operand) -> Value:
    """x / y, correctly rounded; operands are floats."""
    return binary("div", x, y)


@builtin
def floordiv(x: Operand, y: Operand) -> Value:
    """x // y, rounded towards minus infinity as in Python; ints by 0 are an error on interp."""
    return binary("floordiv", x, y)


@builtin
def mod(x: Operand, y: Operand) -> Value:
    """x % y, with the sign of y as in Python; of floats exact where x / y is below 2^53."""
    return binary("mod", x, y)


@builtin
def pow(x: Operand, y: Operand) -> Value:
    """x ** y; a constant power of 2 to 8 is multiplied out."""
    return binary("pow", x, y)


@builtin
def maximum(x: Operand, y: Operand) -> Value:
    """The larger of x and y; NaN if either is."""
    return binary("max", x, y)


@builtin
def minimum(x: Operand, y: Operand) -> Value:
    """The smaller of x and y; NaN if either is."""
    return binary("min", x, y)


@builtin
def logical_and(x: Operand, y: Operand) -> Value:
    """x and y of bools; x & y of ints."""
    return binary("and", x, y)


@builtin
def logical_or(x: Operand, y: Operand) -> Value:
    """x or y of bools; x | y of ints."""
    return binary("or", x, y)


@builtin
def logical_not(x: Operand) -> Value | bool:
    """not x, elementwise on bools."""
    return (not x) if isinstance(x, bool) else unary("not", x)


@builtin
def fma(x: Operand, y: Operand, z: Operand) -> Value:
    """x * y + z, rounded once."""
    return builder().fma(*tiles_of(x, y, z, what="fma"))


@builtin
def where(condition: Operand, x: Operand, y: Operand) -> Value:
    """x where the bool condition holds, else y."""
    return builder().where(tile_of(condition, what="where"), *tiles_of(x, y, what="where"))


@builtin
def clamp(x: Operand, low: Operand | None = None, high: Operand | None = None) -> Value:
    """x held between low and high; None leaves a side open."""
    if low is not None:
        x = binary("max", x, low)
    return x if high is None else binary("min", x, high)  # type: ignore[return-value]


@builtin
def cast(x: Operand, dtype: Any) -> Value:
    """x in another dtype, rounded to nearest even; float to int truncates; to bool is x != 0."""
    return builder().cast(tile_of(x, what="cast"), dtype_arg(dtype, "cast"))


@builtin
def neg(x: Operand) -> Value | Dim:
    """-x."""
    return -x if isinstance(x, Dim) else unary("neg", x, operator.neg)


@builtin
def abs(x: Operand) -> Value:
    """|x|."""
    return unary("abs", x, math.fabs)


@builtin
def exp(x: Operand) -> Value:
    """e to the power of x."""
    return unary("exp", x, math.exp)


@builtin
def exp2(x: Operand) -> Value:
    """2 to the power of x."""
    return unary("exp2", x, lambda v: 2.0 ** v)


@builtin
def expm1(x: Operand) -> Value:
    """exp(x) - 1, exact near 0."""
    return unary("expm1", x, math.expm1)


@builtin
def log(x: Operand) -> Value:
    """Natural logarithm; log(0) = -inf, NaN below 0."""
    return unary("log", x, math.log)


@builtin
def log2(x: Operand) -> Value:
    """Logarithm to the base 2."""
    return unary("log2", x, math.log2)


@builtin
def log1p(x: Operand) -> Value:
    """log(1 + x), exact near 0."""
    return unary("log1p", x, math.log1p)


@builtin
def sqrt(x: Operand) -> Value:
    """Square root, correctly rounded."""
    return unary("sqrt", x, math.sqrt)


@builtin
def rsqrt(x: Operand) -> Value:
    """1 / sqrt(x)."""
    return unary("rsqrt", x, lambda v: 1.0 / math.sqrt(v))


@builtin
def sin(x: Operand) -> Value:
    """Sine of x in radians."""
    return unary("sin", x, math.sin)


@builtin
def cos(x: Operand) -> Value:
    """Cosine of x in radians."""
    return unary("cos", x, math.cos)


@builtin
def tanh(x: Operand) -> Value:
    """Hyperbolic tangent."""
    return unary("tanh", x, math.tanh)


@builtin
def erf(x: Operand) -> Value:
    """The error function."""
    return unary("erf", x, math.erf)


@builtin
def floor(x: Operand) -> Value:
    """x rounded down."""
    return unary("floor", x, lambda v: float(math.floor(v)))


@builtin
def ceil(x: Operand) -> Value:
    """x rounded up."""
    return unary("ceil", x, lambda v: float(math.ceil(v)))


@builtin
def round(x: Operand) -> Value:
    """x rounded to the nearest whole number, halves to even."""
    return unary("round", x, lambda v: float(builtins.round(v)))


@builtin
def sigmoid(x: Operand) -> Value:
    """1 / (1 + exp(-x))."""
    return unary("sigmoid", x)


@builtin
def softplus(x: Operand) -> Value:
    """log(1 + exp(x)) without overflow."""
    return unary("softplus", x)


@builtin
def relu(x: Operand) -> Value:
    """max(x, 0)."""
    return binary("max", x, 0)


@builtin
def swish(x: Operand, beta: Operand = 1.0) -> Value:
    """x * sigmoid(beta * x) (Ramachandran et al. 2017)."""
    gate = x if is_number(beta) and beta == 1 else binary("mul", x, beta)
    return binary("mul", x, unary("sigmoid", gate))


@builtin
def silu(x: Operand) -> Value:
    """x * sigmoid(x)."""
    return swish(x)


@builtin
def gelu(x: Operand, approximate: str = "none") -> Value:
    """x * Phi(x) by erf, or with approximate="tanh" by tanh (Hendrycks & Gimpel 2016)."""
    if approximate == "none":
        inner = unary("erf", binary("mul", x, math.sqrt(0.5)))
        return binary("mul", binary("mul", x, 0.5), binary("add", inner, 1.0))
    if approximate == "tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u), which keeps its digits where the sum would be 0
        cubic = binary("mul", binary("mul", binary("mul", x, x), x), 0.044715)
        return binary("mul", x, unary("sigmoid", binary("mul", binary("add", x, cubic), math.sqrt(8.0 / math.pi))))
    raise TypeRuleError(f'gelu: approximate={approximate!r} given; expected "none" or "tanh"')


@builtin
def isnan(x: Operand) -> Value:
    """Whether elements are NaN."""
    value = tile_of(x, what="isnan")
    return builder().binary("ne", value, value)
