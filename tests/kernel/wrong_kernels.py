"""Kernels that must not compile. The comment on a line says the error that is expected there:

    # error: a fragment of the message @ the text that the caret underlines [@ a fragment of a note]
"""
# ruff: noqa: E501, F841, B007, RUF059, UP045

import math
from typing import Optional

import numpy as np
import torch

import tessera as ts
from tessera import Tile, bf16, f32, int4, int8, int32, tile

Mat = Tile["S", "D", f32]
Vec = Tile["D", f32]


def helper(a, b):
    return tile.mma(a, b)  # error: mma: inner dims differ @ tile.mma(a, b) @ called from


def forever(a):
    return forever(a)  # error: recursion cannot be compiled @ forever(a)


def no_return(a):
    pass


def scaled(v, factor=2.0):
    return v * factor


calls_so_far = 0
TABLE = {"rows": 1}


# -- shapes and dtypes ------------------------------------------------------------------------------


@ts.kernel
def inner_dims(x: Mat, y: Mat, o: Mat):
    left = tile.load(x)
    o[:] = tile.mma(left, y)  # error: D against S @ tile.mma(left, y) @ left is f32[S, D], made at line


@ts.kernel
def inner_dims_of_parameters(x: Mat, y: Mat, o: Mat):
    tile.store(o, x @ y)  # error: mma: inner dims differ @ x @ y


@ts.kernel
def vector_mma(x: Mat, w: Vec, o: Mat):
    tile.store(o, tile.mma(x, w))  # error: expected at least two axes each @ tile.mma(x, w)


@ts.kernel
def int_meets_float(x: Mat, i: Tile["S", "D", int32], o: Mat):
    tile.store(o, x + tile.load(i))  # error: add: f32 and int32 do not mix @ x + tile.load(i)


@ts.kernel
def bool_meets_float(x: Mat, o: Mat):
    mask = x > 0
    tile.store(o, x * mask)  # error: f32 and bool do not mix @ x * mask @ mask is bool[S, D], made at line


@ts.kernel
def shapes_do_not_fit(x: Mat, y: Tile["S", "E", f32], o: Mat):
    tile.store(o, tile.add(x, y))  # error: do not fit: D against E @ tile.add(x, y)


@ts.kernel
def row_against_column(x: Mat, w: Tile["S", f32], o: Mat):
    tile.store(o, x * w)  # error: do not fit: D against S @ x * w @ w is f32[S], declared at line


@ts.kernel
def mma_of_int_and_float(x: Mat, w: Tile["D", "N", int8], o: Tile["S", "N", f32]):
    tile.store(o, tile.mma(x, w))  # error: mma: f32 x int8 do not mix @ tile.mma(x, w)


@ts.kernel
def wrong_accumulator(x: Mat, w: Tile["D", "N", f32], o: Tile["S", "N", f32]):
    acc = tile.zeros((4, 4))
    tile.store(o, tile.mma(x, w, acc))  # error: accumulator is acc: f32[4, 4] @ tile.mma(x, w, acc)


@ts.kernel
def store_of_another_shape(x: Mat, o: Tile["D", "S", f32]):
    tile.store(o, x)  # error: does not fit o: &f32[D, S] @ tile.store(o, x)


@ts.kernel
def store_of_floats_into_ints(x: Mat, o: Tile["S", "D", int32]):
    tile.store(o, x)  # error: cast it to int32 first @ tile.store(o, x)


@ts.kernel
def store_into_int4(x: Tile["S", "D", int4], o: Mat):
    tile.store(x, tile.zeros((x.shape[0], x.shape[1]), int32))  # error: read-only @ tile.store(x, tile.zeros((x.shape[0], x.shape[1]), int32))


@ts.kernel
def exp_of_ints(i: Tile["S", int32], o: Tile["S", f32]):
    tile.store(o, tile.exp(i))  # error: exp: int32 given; expected a float @ tile.exp(i)


@ts.kernel
def division_of_ints(i: Tile["S", int32], o: Tile["S", int32]):
    tile.store(o, i / tile.load(i))  # error: div: int32 given; expected floats @ i / tile.load(i)


@ts.kernel
def mean_of_ints(i: Tile["S", int32], o: Tile["S", int32]):
    o[:] = tile.mean(i)  # error: reduce_mean: int32 given @ tile.mean(i)


@ts.kernel
def reshape_loses_elements(x: Mat, o: Vec):
    tile.store(o, tile.reshape(x, (x.shape[1],)))  # error: the new shape [D] has D @ tile.reshape(x, (x.shape[1],))


@ts.kernel
def reshape_does_not_divide(x: Tile["S", f32], o: Mat):
    o[:] = tile.reshape(x, (-1, 3))  # error: which 3 does not divide @ tile.reshape(x, (-1, 3))


@ts.kernel
def split_does_not_divide(x: Mat, o: Mat):
    a, b, c = tile.split(x, 3)  # error: not known to divide into 3 parts @ tile.split(x, 3)
    tile.store(o, a)


@ts.kernel
def concat_of_other_dims(x: Mat, y: Tile["T", "E", f32], o: Mat):
    tile.store(o, tile.concat([x, y], axis=1))  # error: do not join along axis 1 @ tile.concat([x, y], axis=1)


@ts.kernel
def axis_out_of_range(x: Mat, o: Mat):
    o[:] = tile.sum(x, axis=2)  # error: axis 2 is outside @ tile.sum(x, axis=2)


@ts.kernel
def load_says_another_shape(x: Mat, o: Mat):
    ctx = tile.context()
    tile.store(o, tile.load(x, shape=(ctx.D, ctx.S)))  # error: shape= says [D, S] @ tile.load(x, shape=(ctx.D, ctx.S))


@ts.kernel
def transpose_of_a_vector(w: Vec, o: Vec):
    tile.store(o, w.T)  # error: fewer than two axes @ w.T


# -- names and scope --------------------------------------------------------------------------------


@ts.kernel
def unknown_name(x: Mat, o: Mat):
    tile.store(o, weigth)  # error: unknown name 'weigth' @ weigth


@ts.kernel
def unknown_builtin(x: Mat, o: Mat):
    tile.store(o, tile.sigmod(x))  # error: tile has no 'sigmod'; did you mean 'sigmoid'? @ tile.sigmod


@ts.kernel
def unknown_size(x: Mat, o: Mat):
    ctx = tile.context()
    n = ctx.T  # error: context: no size 'T' @ ctx.T
    tile.store(o, x)


@ts.kernel
def unknown_method(x: Mat, o: Mat):
    tile.store(o, x.reshap(-1))  # error: a tile has no 'reshap'; did you mean 'reshape'? @ x.reshap


@ts.kernel
def used_after_loop(x: Mat, o: Mat):
    for i in range(x.shape[0]):
        row = tile.load(x[i])
    tile.store(o[0], row)  # error: 'row' is assigned inside the loop @ row


@ts.kernel
def used_after_grid(x: Mat, o: Mat):
    for i in tile.grid(x.shape[0]):
        row = tile.load(x[i])
    tile.store(o[0], row)  # error: 'row' is assigned inside the parallel loop @ row


@ts.kernel
def assigned_in_one_branch(x: Mat, o: Mat, n: int):
    if n > 3:
        y = x * 2.0
    tile.store(o, y)  # error: 'y' is assigned in only one branch @ y


@ts.kernel
def differs_between_branches(x: Mat, o: Mat, n: int):
    if n > 3:
        y = tile.sum(x)
    else:
        y = tile.load(x)
    tile.store(o, y)  # error: the shapes differ @ y


@ts.kernel
def dtype_changes_in_loop(x: Mat, o: Mat):
    acc = tile.zeros((x.shape[0], x.shape[1]), bf16)
    for i in tile.range(4):  # error: the dtypes bf16 and f32 differ @ for i in tile.range(4):
        acc = acc + x
    tile.store(o, acc)


@ts.kernel
def shape_changes_in_loop(x: Mat, o: Mat):
    acc = tile.load(x)
    for i in tile.range(4):  # error: the shapes differ @ for i in tile.range(4):
        acc = tile.concat([acc, acc])
    tile.store(o, acc)


# -- parallel loops ---------------------------------------------------------------------------------


@ts.kernel
def shared_accumulator(x: Mat, o: Tile[1, f32]):
    total = 0.0
    for i in tile.grid(x.shape[0]):  # error: 'total' is changed in a parallel loop @ for i in tile.grid(x.shape[0]):
        total += tile.sum(x[i])
    o[0] = total


@ts.kernel
def race(x: Mat, o: Vec):
    for i in tile.grid(x.shape[0]):
        tile.store(o, tile.load(x[i]))  # error: write race: every program @ tile.store(o, tile.load(x[i])) @ o is f32[D]


@ts.kernel
def race_on_one_axis(x: Mat, o: Vec):
    for i, j in tile.grid(x.shape[0], x.shape[1]):
        o[j] = x[i, j]  # error: does not depend on 'i' @ o[j]


@ts.kernel
def break_in_grid(x: Mat, o: Mat):
    for i in tile.grid(x.shape[0]):  # error: break in a parallel loop @ for i in tile.grid(x.shape[0]):
        if i > 3:
            break
        o[i] = x[i]


@ts.kernel
def grid_of_floats(x: Mat, o: Mat):
    for i in tile.grid(2.5):  # error: grid: 2.5 given; expected an int @ tile.grid(2.5)
        tile.store(o[i], x[i])


# -- indices ----------------------------------------------------------------------------------------


@ts.kernel
def too_many_indices(x: Mat, o: Mat):
    tile.store(o, x[0, 0, 0])  # error: 3 indices given for x @ x[0, 0, 0]


@ts.kernel
def constant_out_of_range(x: Tile["S", 4, f32], o: Tile["S", f32]):
    tile.store(o, x[:, 4])  # error: index: 4 is outside axis 1 @ x[:, 4]


@ts.kernel
def float_index(x: Mat, o: Mat):
    tile.store(o[0], x[0.5])  # error: expected an int @ x[0.5]


@ts.kernel
def slice_with_step(x: Mat, o: Mat):
    tile.store(o, x[:, ::2])  # error: is not known to divide by the step 2; name it "2*N" @ x[:, ::2] @ x is f32[S, D]


@ts.kernel
def backwards_slice(x: Mat, o: Mat):
    tile.store(o, x[5:3])  # error: runs backwards @ x[5:3]


@ts.kernel
def run_time_index_of_a_tuple(x: Mat, o: Mat, n: int):
    n_rows = x.shape[n]  # error: expected an int known at compile time @ x.shape[n]
    tile.store(o, x)


@ts.kernel
def writes_a_constant(x: Mat, o: Mat):
    sizes = (1, 2)
    sizes[0] = 3  # error: cannot be written to @ sizes[0]
    tile.store(o, x)


@ts.kernel
def augments_a_parameter(x: Mat, o: Mat):
    o += x  # error: 'o' is a parameter @ o += x


# -- calls ------------------------------------------------------------------------------------------


@ts.kernel
def missing_argument(x: Mat, o: Mat):
    tile.store(o, tile.maximum(x))  # error: missing a required argument: 'y' @ tile.maximum(x)


@ts.kernel
def unknown_argument(x: Mat, o: Mat):
    tile.store(o, tile.sum(x, dim=1))  # error: unexpected keyword argument 'dim' @ tile.sum(x, dim=1)


@ts.kernel
def foreign_call(x: Mat, o: Mat):
    tile.store(o, torch.relu(x))  # error: a call of relu cannot be compiled @ torch.relu(x)


@ts.kernel
def numpy_call(x: Mat, o: Mat):
    tile.store(o, np.exp(x))  # error: cannot be compiled @ np.exp(x)


@ts.kernel
def error_in_helper(x: Mat, y: Mat, o: Mat):
    tile.store(o, helper(x, y))


@ts.kernel
def recursion(x: Mat, o: Mat):
    tile.store(o, forever(x))


@ts.kernel
def result_is_none(x: Mat, o: Mat):
    tile.store(o, no_return(x))  # error: store: None given @ tile.store(o, no_return(x))


@ts.kernel
def error_in_library(x: Mat, cos: Tile["S", "D", f32], o: Mat):
    y = tile.rms_norm(x, cos.T)  # error: do not fit: S against D @ tile.rms_norm(x, cos.T)
    tile.store(o, y)


@ts.kernel
def not_a_function(x: Mat, o: Mat):
    tile.store(o, x(1))  # error: is not a function @ x(1)


@ts.kernel
def math_domain(x: Mat, o: Mat):
    tile.store(o, x * math.sqrt(-1.0))  # error: math.sqrt: math domain error @ math.sqrt(-1.0)


@ts.kernel
def dropout_of_everything(x: Mat, o: Mat):
    tile.store(o, tile.dropout(x, 1.0))  # error: expected 0 <= p < 1 @ tile.dropout(x, 1.0)


@ts.kernel
def static_assertion(x: Tile["S", 4, f32], o: Tile["S", 4, f32]):
    tile.static_assert(x.shape[1] == 5, "five columns")  # error: static_assert: five columns @ tile.static_assert(x.shape[1] == 5, "five columns")
    tile.store(o, x)


# -- Python that is not of the language -------------------------------------------------------------


@ts.kernel
def comprehension(x: Mat, o: Mat):
    parts = [x[i] for i in range(2)]  # error: a list comprehension cannot be compiled @ [x[i] for i in range(2)]
    tile.store(o[0], parts[0])


@ts.kernel
def anonymous_function(x: Mat, o: Mat):
    f = lambda v: v + 1  # noqa: E731  # error: a lambda cannot be compiled @ lambda v: v + 1
    tile.store(o, f(x))


@ts.kernel
def try_statement(x: Mat, o: Mat):
    try:  # error: try cannot be compiled @ try:
        tile.store(o, x)
    finally:
        pass


@ts.kernel
def with_statement(x: Mat, o: Mat):
    with torch.no_grad():  # error: with cannot be compiled @ with torch.no_grad():
        tile.store(o, x)


@ts.kernel
def returns_a_tile(x: Mat, o: Mat):  # error: a kernel returns nothing @ def returns_a_tile(x: Mat, o: Mat):
    return tile.load(x)


@ts.kernel
def returns_in_a_loop(x: Mat, o: Mat):
    for i in tile.range(x.shape[0]):
        if x[i, 0] > 0:  # error: return inside a loop @ if x[i, 0] > 0:
            return
        o[i] = x[i]


@ts.kernel
def tile_as_condition(x: Mat, o: Mat):
    if x > 0:  # error: is a tile; reduce it with tile.any or tile.all @ x > 0
        tile.store(o, x)


@ts.kernel
def unrolls_too_much(x: Mat, o: Mat):
    for i in tile.static_range(100000):  # error: 100000 iterations to unroll @ tile.static_range(100000)
        tile.store(o, x)


@ts.kernel
def unpacks_a_tile(x: Mat, o: Mat):
    a, b = tile.load(x)  # error: cannot be unpacked; expected a tuple of 2 @ a, b
    tile.store(o, a)


@ts.kernel
def wrong_number_of_names(x: Mat, o: Mat):
    a, b, c = x.shape  # error: 2 values for 3 names @ a, b, c
    tile.store(o, x)


@ts.kernel
def compares_none(x: Mat, o: Mat, mask: Optional[Mat] = None):
    if mask > 0:  # error: gt: None and 0 cannot be compared @ mask > 0
        tile.store(o, x)


@ts.kernel
def zero_step(x: Mat, o: Mat):
    for i in tile.range(0, 8, 0):  # error: range: step 0 given; expected another int @ tile.range(0, 8, 0)
        o[i] = x[i]


@ts.kernel
def loops_over_a_tile(x: Mat, o: Mat):
    for row in tile.load(x):  # error: expected tile.grid, tile.range @ tile.load(x)
        tile.store(o[0], row)


# -- what a user of numpy, torch or plain Python writes first ----------------------------------------


@ts.kernel
def numpy_keyword(x: Mat, o: Mat):
    tile.store(o, x - tile.reduce_max(x, keepdims=True))  # error: expected tile.reduce_max(x, axis=-1, keepdim=False) @ tile.reduce_max(x, keepdims=True)


@ts.kernel
def keyword_of_a_helper(x: Mat, o: Mat):
    tile.store(o, scaled(x, factr=3.0))  # error: unexpected keyword argument 'factr'; expected scaled(v, factor=2.0) @ scaled(x, factr=3.0)


@ts.kernel
def keys_not_transposed(q: Mat, k: Tile["T", "D", f32], o: Tile["S", "T", f32]):
    tile.store(o, tile.mma(q, k))  # error: D against T @ tile.mma(q, k) @ k is f32[T, D], declared at line


@ts.kernel
def whole_into_a_row(x: Mat, o: Mat):
    for i in tile.grid(x.shape[0]):
        o[i] = x  # error: store: x: f32[S, D] does not fit &f32[D] @ o[i] @ x is f32[S, D], declared at line


@ts.kernel
def and_of_tiles(x: Mat, o: Mat):
    tile.store(o, tile.where(x > 0 and x < 1, x, 0.0))  # error: combine tiles element by element with &, | and ~ @ x > 0


@ts.kernel
def choice_by_a_tile(x: Mat, o: Mat):
    tile.store(o, x if x > 0 else 0.0)  # error: choose element by element with tile.where @ x > 0


@ts.kernel
def while_on_a_tile(x: Mat, o: Mat):
    y = tile.load(x)
    while y > 0:  # error: is a tile; reduce it with tile.any or tile.all @ y > 0
        y = y - 1.0
    tile.store(o, y)


@ts.kernel
def python_sum(x: Mat, o: Vec):
    tile.store(o, sum(x))  # error: a tile's sum is tile.reduce_sum @ sum(x) @ x is f32[S, D], declared at line


@ts.kernel
def python_max_of_one(x: Mat, o: Vec):
    tile.store(o, max(x))  # error: expected several, or tile.reduce_max @ max(x)


@ts.kernel
def loops_over_rows(x: Mat, o: Mat):
    for i, row in enumerate(x):  # error: a loop over rows is `for i in range(x.shape[0])` @ enumerate(x)
        o[i] = row


@ts.kernel
def grows_a_list(x: Mat, o: Mat):
    parts = []
    parts.append(x[0])  # error: nothing that Python holds can be changed in a kernel @ parts.append(x[0])
    o[0] = parts[0]


@ts.kernel
def dict_of_sizes(x: Mat, o: Mat):
    sizes = {"rows": x.shape[0]}  # error: a dict cannot be compiled @ {"rows": x.shape[0]}
    tile.store(o, x)


@ts.kernel
def key_that_is_not_there(x: Mat, o: Mat):
    tile.store(o, x * TABLE["columns"])  # error: index: no 'columns'; there are 'rows' @ TABLE["columns"]


@ts.kernel
def counts_its_calls(x: Mat, o: Mat):
    global calls_so_far  # error: a kernel writes to its parameters only @ global calls_so_far
    calls_so_far += 1
    tile.store(o, x)


@ts.kernel
def nested_function(x: Mat, o: Mat):
    def double(v):  # error: define it outside of the kernel @ def double(v):
        return v * 2.0
    tile.store(o, double(x))


@ts.kernel
def raises_an_error(x: Mat, o: Mat, n: int):
    if n > 3:
        raise ValueError(n)  # error: raise cannot be compiled; use assert or tile.static_assert @ raise ValueError(n)
    tile.store(o, x)


@ts.kernel
def prints_in_a_text(x: Mat, o: Mat):
    print(f"x is {x}")  # error: known only when the kernel runs; give print the tile itself @ f"x is {x}"
    tile.store(o, x)


@ts.kernel
def prints_fewer_than_it_says(x: Mat, o: Mat):
    print("{} of {}", x.shape[0])  # error: has 2 places for 1 values @ print("{} of {}", x.shape[0])
    tile.store(o, x)


@ts.kernel
def gives_an_output_another_value(x: Mat, o: Mat):  # error: writes nothing: give its result to tile.store @ def gives_an_output_another_value(x: Mat, o: Mat): @ gives the name 'o' another value: o = tile.exp(x)
    o = tile.exp(x)


@ts.kernel
def writes_nothing(x: Mat, o: Mat):  # error: kernel writes_nothing writes nothing @ def writes_nothing(x: Mat, o: Mat):
    y = tile.load(x) * 2.0


@ts.kernel
def swaps_source_and_destination(x: Mat, o: Mat):
    tile.store(x * 2.0, o)  # error: store: this has no name, so that nothing would be written @ x * 2.0


@ts.kernel
def writes_to_a_transpose(x: Mat, o: Mat):
    o.T[:] = x  # error: f32[D, S] has no name, so that nothing would be written @ o.T[:]


@ts.kernel
def method_of_torch(x: Mat, o: Mat):
    tile.store(o, x.relu())  # error: a tile has no 'relu'; write tile.relu(...) @ x.relu


@ts.kernel
def dtype_of_numpy(x: Mat, o: Mat):
    tile.store(o, tile.cast(x, np.float32))  # error: cast: <class 'numpy.float32'> given; expected a dtype @ tile.cast(x, np.float32)


@ts.kernel
def loops_forever(x: Mat, o: Mat):
    while True:  # error: the condition always holds and nothing breaks the loop @ True
        tile.store(o, x)


@ts.kernel
def stores_both_results(x: Mat, o: Tile["S", 3, f32]):
    tile.store(o, tile.topk(x, 3))  # error: (f32[S, 3], int32[S, 3]) given; expected a tile, a parameter or a number; take one @ tile.store(o, tile.topk(x, 3))


@ts.kernel
def seed_is_a_float(x: Mat, o: Mat, p: float):
    tile.store(o, tile.dropout(x, 0.5, seed=p))  # error: rand: seed is p: f32; expected an int scalar @ tile.dropout(x, 0.5, seed=p)


@ts.kernel
def joins_two_dtypes(x: Mat, o: Mat):
    tile.store(o, tile.concat([x, tile.cast(x, bf16)]))  # error: have different dtypes; cast one of them @ tile.concat([x, tile.cast(x, bf16)])


@ts.kernel
def attention_of_matrices(x: Mat, o: Mat):
    tile.store(o, tile.flash_attention(x, x, x))  # error: flash_attention: x: &f32[S, D] given; expected [B, S, H, D] @ tile.flash_attention(x, x, x)


@ts.kernel
def attention_of_fewer_heads(q: Tile["B", "S", "H", "D", f32], k: Tile["B", "S", "G", "D", f32], o: Tile["B", "S", "H", "D", f32]):
    tile.store(o, tile.flash_attention(q, k, k))  # error: differ in heads @ tile.flash_attention(q, k, k) @ k is f32[B, S, G, D], declared at line


@ts.kernel
def writes_where_a_mask_says(x: Mat, o: Mat):
    o[x > 0] = 1.0  # error: the mask bool[S, D] given; how many elements it picks is not known @ o[x > 0]


@ts.kernel
def reads_where_a_mask_says(x: Mat, o: Mat):
    y = tile.load(x)
    tile.store(o, y[y > 0])  # error: choose element by element with tile.where @ y[y > 0]


@ts.kernel
def writes_columns_of_rows(x: Mat, i: Tile["N", int32], o: Mat):
    o[tile.load(i), 0] = 1.0  # error: expected the rows' index alone @ o[tile.load(i), 0]


@ts.kernel
def number_of_many_digits(i: Tile["S", int32], o: Tile["S", int32]):
    tile.store(o, i + 99999999999999999999)  # error: 99999999999999999999 given; it does not fit int64 @ i + 99999999999999999999


@ts.kernel
def static_assertion_of_a_size(x: Mat, o: Mat):
    tile.static_assert(x.shape[0] % 16 == 0)  # error: is not known at compile time, as sizes are not; use assert @ tile.static_assert(x.shape[0] % 16 == 0)
    tile.store(o, x)


@ts.kernel
def unknown_reduction_of_a_warp(x: Mat, o: Vec):
    tile.store(o, tile.warp.reduce_prod(x, axis=0))  # error: tile.warp has no 'reduce_prod'; did you mean 'reduce_sum'? @ tile.warp.reduce_prod


@ts.kernel
def choice_of_two_kinds(x: Mat, o: Mat):
    tile.store(o, x if x.shape[0] > 3 else "small")  # error: conditional expression: 'small' given @ x if x.shape[0] > 3 else "small"


@ts.kernel
def stores_the_module(x: Mat, o: Mat):
    tile.store(o, tile)  # error: store: the module tile given @ tile.store(o, tile)


@ts.kernel
def program_without_a_grid(x: Mat, o: Mat):
    i = tile.program_id(0)  # error: no tile.grid loop around this; write `for i in tile.grid(n):` @ tile.program_id(0)
    o[i] = x[i]


@ts.kernel
def scatters_ints_to_floats(x: Tile["N", "D", int32], i: Tile["N", int32], o: Mat):
    tile.scatter(o, i, x)  # error: scatter: x: int32[N, D] into o: &f32[S, D]: cast it to f32 first @ tile.scatter(o, i, x)


@ts.kernel
def half_a_size(x: Mat, o: Mat):
    n = x.shape[1] / 2
    o[:, 0:n] = x[:, 0:n]  # error: index: n: f32 given; expected a size @ x[:, 0:n] @ n is f32, made at line


@ts.kernel
def attribute_of_a_tile(x: Mat, o: Mat):
    x.scale = 2.0  # error: an attribute cannot be assigned to @ x.scale
    tile.store(o, x)


@ts.kernel
def no_annotation(x: Mat, o: Mat, sizes=(1, 2)):  # error: parameter 'sizes' has no annotation @ sizes
    tile.store(o, x)


# -- what engineers of the field write -----------------------------------------------------------------


negated = lambda v: -v  # noqa: E731
bank = torch.zeros(3)


@ts.kernel
def writes_with_a_step(x: Tile["S", "2*D", f32], o: Tile["S", "2*D", f32]):
    o[:, ::2] = x[:, 1::2]  # error: a slice with a step of the parameter o: &f32[S, 2*D] cannot be written to; join the parts @ o[:, ::2]


@ts.kernel
def step_of_the_run_time(x: Mat, o: Mat, n: int):
    tile.store(o, x[:, ::n])  # error: a slice has the step n: int64; expected a positive int known at compile time @ ::n


@ts.kernel
def step_to_a_stop(x: Tile["S", "2*D", f32], o: Mat):
    o[:] = x[:, 0:4:2]  # error: expected one from a start below 2 to the end @ x[:, 0:4:2]


@ts.kernel
def calls_a_lambda(x: Mat, o: Mat):
    tile.store(o, negated(x))  # error: a lambda cannot be compiled; write it as a def @ negated(x)


@ts.kernel
def tensor_of_the_module(x: Tile["S", 3, f32], o: Tile["S", 3, f32]):
    tile.store(o, x * bank)  # error: mul: a torch tensor of shape [3] given; expected a tile, a parameter or a number; make it a parameter @ x * bank


@ts.kernel
def adds_a_ragged_block(x: Tile["N", f32], o: Tile[1, f32]):
    acc = tile.zeros((16,))
    for start in tile.range(0, x.shape[0], 16):  # error: how many elements count, min(-start+N, 16), is not known outside the block that defines it; write to acc[...] @ for start in tile.range(0, x.shape[0], 16): @ acc is f32[16<min(-start+N, 16)], made at line
        acc += x[start:start + 16]
    o[0] = tile.sum(acc)


@ts.kernel
def shape_of_a_loop_variable(x: Tile[16, f32], o: Tile[16, f32], n: int):
    row = tile.load(x)
    while n > 0:
        row = tile.reshape(row, (16 // n, n))[0]  # error: the new shape [(16)//(n), n] has n*(16)//(n) @ tile.reshape(row, (16 // n, n))
        n -= 1
    o[:] = row


@ts.kernel
def more_names_than_a_star_takes(x: Mat, o: Mat):
    a, b, c, *rest = x.shape  # error: 2 values for 4 names @ a, b, c, *rest
    tile.store(o, x)


@ts.kernel
def mask_times_scores(x: Mat, keep: Tile["S", "D", torch.bool], o: Mat):
    tile.store(o, x * keep)  # error: mul: f32 and bool do not mix; cast one of them @ x * keep @ keep is bool[S, D], declared at line


@ts.kernel
def adds_a_position_to_a_float(x: Mat, o: Mat):
    tile.store(o, x + tile.arange(x.shape[1]))  # error: add: f32 and int32 do not mix; cast one of them @ x + tile.arange(x.shape[1])


@ts.kernel
def weights_by_rows(x: Mat, w: Tile["S", f32], o: Vec):
    tile.store(o, tile.sum(x, axis=0) / tile.sum(w, axis=1))  # error: axis 1 is outside @ tile.sum(w, axis=1)


@ts.kernel
def heads_not_divided(x: Tile["S", "H*D", f32], o: Tile["S", "H", "D", f32]):
    tile.store(o, x)  # error: does not fit o: &f32[S, H, D] @ tile.store(o, x)


@ts.kernel
def random_seed_of_a_tile(x: Mat, seeds: Tile["S", int32], o: Mat):
    tile.store(o, tile.dropout(x, 0.5, seed=seeds))  # error: rand: seed is seeds: int32[S]; expected an int scalar @ tile.dropout(x, 0.5, seed=seeds)


@ts.kernel
def counts_in_a_grid(ids: Tile["S", int32], counts: Tile["V", int32]):
    for i in tile.grid(ids.shape[0]):
        counts[0] += 1  # error: write race: every program of the grid writes the same place of 'counts' @ counts[0]


@ts.kernel
def scores_by_bits(x: Mat, o: Mat):
    tile.store(o, x & 3)  # error: and: f32 and f32 given; expected ints or bools @ x & 3
