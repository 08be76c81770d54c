"""The tile language: `from tessera import tile`.

Every function here is called in the body of a function under `@ts.kernel`; outside one it raises. What
comes in are tiles (immutable arrays of a kernel's program), parameters (views of tensors), scalars and
sizes; what goes out are tiles. The frontend evaluates a kernel's expressions with these functions.
"""

from __future__ import annotations

from types import SimpleNamespace

from tessera.kernel.lang.elementwise import (
    abs,
    add,
    cast,
    ceil,
    clamp,
    cos,
    div,
    erf,
    exp,
    exp2,
    expm1,
    floor,
    floordiv,
    fma,
    gelu,
    isnan,
    log,
    log1p,
    log2,
    logical_and,
    logical_not,
    logical_or,
    maximum,
    minimum,
    mod,
    mul,
    neg,
    pow,
    relu,
    round,
    rsqrt,
    sigmoid,
    silu,
    sin,
    softplus,
    sqrt,
    sub,
    swish,
    tanh,
    where,
)
from tessera.kernel.lang.memory import (
    atomic_add,
    copy,
    fill,
    gather,
    load,
    load_async,
    load_broadcast,
    load_vector,
    scatter,
    store,
    store_vector,
    wait,
)
from tessera.kernel.lang.program import (
    cdiv,
    context,
    device_assert,
    dropout,
    element_index,
    grid,
    num_programs,
    print,
    program_id,
    rand,
    range,
    static_assert,
    static_range,
    thread_range,
)
from tessera.kernel.lang.reductions import (
    argmax,
    argmin,
    cummax,
    cumsum,
    dot,
    dp4a,
    mma,
    reduce_all,
    reduce_any,
    reduce_max,
    reduce_mean,
    reduce_min,
    reduce_sum,
    sort,
    topk,
)
from tessera.kernel.lang.shapes import (
    alloc_shared,
    arange,
    broadcast,
    concat,
    expand_dims,
    full,
    ones,
    reshape,
    split,
    transpose,
    zeros,
)

reduce_argmax, reduce_argmin = argmax, argmin
sum, mean, max, min, any, all = reduce_sum, reduce_mean, reduce_max, reduce_min, reduce_any, reduce_all

# Reductions as GPU programmers spell them; how lanes cooperate is the backend's business.
warp = SimpleNamespace(
    reduce_sum=reduce_sum, reduce_mean=reduce_mean, reduce_max=reduce_max, reduce_min=reduce_min,
    reduce_argmax=argmax, reduce_argmin=argmin, reduce_any=reduce_any, reduce_all=reduce_all,
)

# Written in the language itself, on the names above: imported last.
from tessera.kernel.lang.library import (  # noqa: E402
    apply_causal_mask,
    apply_rope,
    flash_attention,
    rms_norm,
    softmax,
)

__all__ = [
    "abs", "add", "all", "alloc_shared", "any", "apply_causal_mask", "apply_rope", "arange", "argmax", "argmin",
    "atomic_add", "broadcast", "cast", "cdiv", "ceil", "clamp", "concat", "context", "copy", "cos", "cummax",
    "cumsum", "device_assert", "div", "dot", "dp4a", "dropout", "element_index", "erf", "exp", "exp2",
    "expand_dims", "expm1", "fill", "flash_attention", "floor", "floordiv", "fma", "full", "gather", "gelu", "grid",
    "isnan", "load", "load_async", "load_broadcast", "load_vector", "log", "log1p", "log2", "logical_and",
    "logical_not", "logical_or", "max", "maximum", "mean", "min", "minimum", "mma", "mod", "mul", "neg",
    "num_programs", "ones", "pow", "print", "program_id", "rand", "range", "reduce_all", "reduce_any",
    "reduce_argmax", "reduce_argmin", "reduce_max", "reduce_mean", "reduce_min", "reduce_sum", "relu", "reshape",
    "rms_norm", "round", "rsqrt", "scatter", "sigmoid", "silu", "sin", "softmax", "softplus", "sort", "split",
    "sqrt", "static_assert", "static_range", "store", "store_vector", "sub", "sum", "swish", "tanh", "thread_range",
    "topk", "transpose", "wait", "warp", "where", "zeros",
]
