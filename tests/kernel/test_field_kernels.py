"""Kernels as engineers of the field write them, on interp, cpu and Triton's interpreter, against float64 references."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import tessera as ts
from tessera import Tile, f32, int8, int32, int64, tile
from tessera.errors import UnsupportedError
from tests.kernel.backends import BACKENDS, launch

on_all = pytest.mark.parametrize("backend", BACKENDS)
in_both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(high, *shape, low=0, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int32)


def close(found, expected, tolerance=None):
    tolerance = tolerance or {torch.float32: 1e-4, torch.bfloat16: 2**-7}[found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@ts.kernel
def group_norm(x: Tile["N", "G*C", "L"], gamma: Tile["G*C", f32], groups: Tile["G", f32], y: Tile["N", "G*C", "L"]):
    ctx = tile.context()
    z = tile.reshape(x.to(f32), (ctx.N, ctx.G, -1))
    z = z - tile.mean(z, axis=-1, keepdim=True)
    z = z * tile.rsqrt(tile.mean(z * z, axis=-1, keepdim=True) + 1e-5)
    y[:] = tile.reshape(z, (ctx.N, ctx.GC, ctx.L)) * gamma[None, :, None]


@in_both
@on_all
def test_group_norm_whose_context_names_a_product(backend, dtype):
    x, gamma = rand(2, 6, 33).to(dtype), rand(6, seed=1)
    y = torch.empty_like(x)
    launch(group_norm, backend, x, gamma, torch.empty(3), y)
    close(y, F.group_norm(x.double(), 3, gamma.double(), eps=1e-5))


@ts.kernel
def geglu(h: Tile["...", "2*D"], y: Tile["...", "D"]):
    up, gate = tile.split(h.to(f32), 2, axis=-1)
    y[...] = up * tile.gelu(gate)


@on_all
def test_geglu_of_any_rank(backend):
    h = rand(2, 3, 14)
    y = torch.empty(2, 3, 7)
    launch(geglu, backend, h, y)
    close(y, h.double()[..., :7] * F.gelu(h.double()[..., 7:]))


@ts.kernel
def named_as_in_triton(x: Tile["tl", "program", f32], o: Tile["tl", "program", f32], tl: float, program: int):
    o_s0 = x * tl + float(program)
    o[:] = o_s0


@on_all
def test_sizes_and_scalars_of_one_name(backend):
    x, o = rand(3, 5), torch.empty(3, 5)
    launch(named_as_in_triton, backend, x, o, 2.0, 3)
    close(o, x * 2 + 3)


@ts.kernel
def rope_of_pairs(x: Tile["S", "H", "2*D"], cos: Tile["S", "D", f32], sin: Tile["S", "D", f32],
                  out: Tile["S", "H", "2*D"]):
    a, b = x[..., ::2], x[..., 1::2]
    c, s = cos[:, None, :], sin[:, None, :]
    pairs = tile.concat([(a * c - b * s)[..., None], (a * s + b * c)[..., None]], axis=-1)
    out[:] = tile.reshape(pairs, (x.shape[0], x.shape[1], 2 * cos.shape[1]))


@in_both
@on_all
def test_rope_of_interleaved_pairs(backend, dtype):
    x, cos, sin = rand(7, 2, 66).to(dtype), rand(7, 33, seed=1), rand(7, 33, seed=2)
    out = torch.empty_like(x)
    launch(rope_of_pairs, backend, x, cos, sin, out)
    turned = torch.view_as_complex(x.double().unflatten(-1, (33, 2)))
    turned = turned * torch.complex(cos.double(), sin.double())[:, None]
    close(out, torch.view_as_real(turned).flatten(-2))


@ts.kernel
def edits_every_other(x: Tile["S", "4*D", f32], o: Tile["S", "4*D", f32], last: Tile["S", "D", f32]):
    for s in tile.grid(x.shape[0]):
        row = tile.load(x[s])
        row[::2] = row[1::2] * 2.0
        row[1::4] += 1.0
        o[s] = row
        last[s] = row[3::4]


@on_all
def test_slices_with_steps_of_a_tile(backend):
    x = rand(3, 36)
    o, last = torch.empty_like(x), torch.empty(3, 9)
    launch(edits_every_other, backend, x, o, last)
    expected = x.clone()
    expected[:, ::2] = expected[:, 1::2] * 2
    expected[:, 1::4] += 1
    close(o, expected)
    close(last, expected[:, 3::4])


@ts.kernel
def trees(x: Tile["S", 16, f32], total: Tile["S", f32], prefix: Tile["S", 16, f32]):
    for s in tile.grid(x.shape[0]):
        row = tile.load(x[s])
        half = row.shape[0] // 2
        while half > 0:
            row = row[:half] + row[half:2 * half]
            half //= 2
        total[s] = row[0]
        run, offset = tile.load(x[s]), 1
        while offset < 16:
            run = tile.concat([run[:offset], run[offset:] + run[:16 - offset]], axis=0)
            offset = offset * 2
        prefix[s] = run


@on_all
def test_while_over_known_numbers_may_change_shapes(backend):
    x = rand(3, 16)
    total, prefix = torch.empty(3), torch.empty(3, 16)
    launch(trees, backend, x, total, prefix)
    close(total, x.double().sum(1))
    close(prefix, x.double().cumsum(1))


@ts.kernel
def lanes(x: Tile["S", "D"], total: Tile["S", f32], top: Tile["S", f32], W: ts.constexpr = 16):
    for s in tile.grid(x.shape[0]):
        sums, tops = tile.zeros((W,)), tile.full((W,), -math.inf)
        for start in tile.range(0, x.shape[1], W):
            sums[:] += x[s, start:start + W]
            tops[:] = tile.maximum(tops, x[s, start:start + W])
        total[s] = tile.sum(sums)
        top[s] = tile.max(tops)


@in_both
@on_all
def test_a_block_that_ends_early_leaves_the_rest_of_an_accumulator(backend, dtype):
    for width in (1, 16, 33):
        x = rand(2, width).to(dtype)
        total, top = torch.empty(2), torch.empty(2)
        launch(lanes, backend, x, total, top)
        close(total, x.double().sum(1))
        assert torch.equal(top, x.float().amax(1))


@ts.kernel
def first_over(x: Tile["S", 4, f32], found: Tile["S", int32], total: Tile["S", f32], limit: float):
    for s in tile.grid(x.shape[0]):
        at, so_far = -1, 0.0
        for j in tile.static_range(4):
            so_far += x[s, j]
            if so_far > limit:
                at = j
                break
        found[s] = at
        total[s] = so_far


@on_all
def test_break_out_of_an_unrolled_loop(backend):
    x = rand(33, 4)
    found, total = torch.empty(33, dtype=torch.int32), torch.empty(33)
    launch(first_over, backend, x, found, total, 0.5)
    sums = x.cumsum(1)
    over = (sums > 0.5).int()
    expected = torch.where(over.any(1), over.argmax(1), -1)
    assert torch.equal(found, expected.int())
    close(total, sums.gather(1, torch.where(expected < 0, 3, expected)[:, None])[:, 0])


@ts.kernel
def returns_to_go(rewards: Tile["S", "T"], out: Tile["S", "T", f32], gamma: float):
    for s in tile.grid(rewards.shape[0]):
        value = 0.0
        for t in range(rewards.shape[1] - 1, -1, -1):
            value = rewards[s, t].to(f32) + gamma * value
            out[s, t] = value


@in_both
@on_all
def test_loops_count_down(backend, dtype):
    for length in (0, 1, 9):
        rewards = rand(3, length).to(dtype)
        out = torch.empty(3, length)
        launch(returns_to_go, backend, rewards, out, 0.9)
        weights = torch.tensor([[0.9 ** (j - i) if j >= i else 0.0 for j in range(length)] for i in range(length)])
        close(out, rewards.double() @ weights.double().reshape(length, length).T)


@ts.kernel
def guarded(x: Tile["N", int32], y: Tile["N", int32], o: Tile["N", int32], every: int):
    for i in tile.grid(x.shape[0]):
        a, b = x[i], y[i]
        o[i] = a // b if b != 0 else 7
        if every == 0 or i % every == 0:
            o[i] += 100 if b != 0 and a % b == 0 else 200


@on_all
def test_divisions_by_zero_that_are_not_reached(backend):
    x, y = ints(10, 20, low=-9), ints(3, 20, low=-2, seed=1)
    for every in (0, 3):
        o = torch.empty_like(x)
        launch(guarded, backend, x, y, o, every)
        assert o.tolist() == [
            (a // b if b else 7) + ((100 if b and a % b == 0 else 200) if not every or i % every == 0 else 0)
            for i, (a, b) in enumerate(zip(x.tolist(), y.tolist()))]


def affine(x, scale, *, shift=0.0):
    return x * scale + shift


halved = functools.partial(affine, scale=0.5, shift=1.0)


@ts.kernel
def pythonic(x: Tile["A", 2, "C", f32], o: Tile["A", "C", f32]):
    first, *rest = x.shape
    weights = [0.5, 0.25] + [0.125] * len(rest)
    for i in tile.grid(first):
        total = tile.zeros((rest[1],))
        for j, (w, sign) in enumerate(zip(weights, (1, -1, 1))):
            total += w * sign * x[i, j % 2]
        o[i] = halved(total) + round(2.6) + abs(-2) + pow(2, 3)


@on_all
def test_names_with_a_star_partials_and_numbers_of_python(backend):
    x = rand(3, 2, 7)
    o = torch.empty(3, 7)
    launch(pythonic, backend, x, o)
    total = 0.5 * x[:, 0] - 0.25 * x[:, 1] + 0.125 * x[:, 0]
    close(o, total * 0.5 + 1 + 3 + 2 + 8)


@ts.kernel
def long_chain(x: Tile["S", "S", f32], o: Tile["S", "S", f32]):
    y = tile.load(x)
    for _ in tile.static_range(40):
        y = tile.where(y > 0.0, y - y * 0.01, y.T * 0.5)
    o[:] = y


@on_all
def test_a_long_chain_whose_values_are_used_twice(backend):
    x = rand(7, 7)
    o = torch.empty_like(x)
    launch(long_chain, backend, x, o)
    y = x.double()
    for _ in range(40):
        y = torch.where(y > 0, y - y * 0.01, y.T * 0.5)
    close(o, y)


@ts.kernel
def butterflies(x: Tile["S", "2*D", f32], o: Tile["S", "2*D", f32]):
    y = tile.load(x)
    for _ in tile.static_range(20):
        a, b = tile.split(y, 2, axis=-1)
        y = tile.concat([a + b, a - b], axis=-1) * 0.5
    o[:] = y


def test_a_text_that_would_grow_without_bound_is_refused():
    x, o = rand(3, 8), torch.empty(3, 8)
    launch(butterflies, "cpu", x, o)
    y = x.double()
    for _ in range(20):
        y = torch.cat([y[:, :4] + y[:, 4:], y[:, :4] - y[:, 4:]], 1) * 0.5
    close(o, y)
    with pytest.raises(UnsupportedError, match=r"more than 5000 operations: .* store to a parameter in between"):
        butterflies.source("cuda", x, o)


@ts.kernel
def selective_scan(u: Tile["B", "L", "D"], delta: Tile["B", "L", "D"], a: Tile["D", "N", f32], b: Tile["B", "L", "N"],
                   c: Tile["B", "L", "N"], y: Tile["B", "L", "D"], BD: ts.constexpr = 8):
    ctx = tile.context()
    for batch, block in tile.grid(ctx.B, tile.cdiv(ctx.D, BD)):
        lo, hi = block * BD, block * BD + BD
        state = tile.zeros((BD, ctx.N))
        for t in tile.range(ctx.L):
            dt = tile.softplus(tile.cast(delta[batch, t, lo:hi], f32))
            state = tile.exp(dt[:, None] * a[lo:hi]) * state + (dt * u[batch, t, lo:hi])[:, None] * b[batch, t][None, :]
            y[batch, t, lo:hi] = tile.sum(state * c[batch, t][None, :], axis=-1)


@in_both
@on_all
def test_selective_scan(backend, dtype):
    u, delta, b, c = (rand(1, 9, n, seed=i).to(dtype) for i, n in enumerate((11, 11, 4, 4)))
    a = -rand(11, 4, seed=5).abs()
    y = torch.empty_like(u)
    launch(selective_scan, backend, u, delta, a, b, c, y)
    state, rows = torch.zeros(1, 11, 4).double(), []
    for t in range(9):
        dt = F.softplus(delta[:, t].double())
        state = torch.exp(dt[..., None] * a) * state + (dt * u[:, t])[..., None] * b[:, t].double()[:, None]
        rows.append((state * c[:, t].double()[:, None]).sum(-1))
    close(y, torch.stack(rows, 1), 2e-2 if dtype is torch.bfloat16 else 1e-4)


@ts.kernel
def append_int8(k: Tile["T", "H", "D"], slot: Tile["T", int64], cache: Tile["P", "B", "H", "D", int8],
                scale: Tile["P", "B", "H", f32]):
    for t in tile.grid(k.shape[0]):
        where = slot[t]
        if where < 0:
            continue
        page, offset = where // cache.shape[1], where % cache.shape[1]
        values = k[t].to(f32)
        step = tile.maximum(tile.max(tile.abs(values), axis=-1), 1e-8) / 127.0
        cache[page, offset] = tile.cast(tile.clamp(tile.round(values / step[:, None]), -127.0, 127.0), int8)
        scale[page, offset] = step


@in_both
@on_all
def test_append_to_a_paged_cache_of_int8(backend, dtype):
    k = rand(7, 2, 33).to(dtype)
    slot = torch.randperm(12, generator=torch.Generator().manual_seed(1))[:7]
    slot[2] = -1
    cache, scale = torch.zeros(3, 4, 2, 33, dtype=torch.int8), torch.zeros(3, 4, 2)
    launch(append_int8, backend, k, slot, cache, scale)
    step = k.float().abs().amax(-1) / 127
    kept = slot >= 0
    expected = torch.zeros(12, 2, 33, dtype=torch.int8)
    expected[slot[kept]] = (k.float() / step[..., None]).round().to(torch.int8)[kept]
    assert torch.equal(cache.view(12, 2, 33), expected)
    close(scale.view(12, 2)[slot[kept]], step[kept])


@ts.kernel
def run_lengths(x: Tile["S", "N", int32], values: Tile["S", "N", int32], lengths: Tile["S", "N", int32],
                count: Tile["S", int32]):
    for s in tile.grid(x.shape[0]):
        i = n = 0
        while i < x.shape[1]:
            j = i + 1
            while j < x.shape[1] and x[s, j] == x[s, i]:
                j += 1
            values[s, n] = x[s, i]
            lengths[s, n] = j - i
            n += 1
            i = j
        count[s] = n


@on_all
def test_run_lengths(backend):
    x = ints(2, 3, 17)
    values, lengths, count = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(3, dtype=torch.int32)
    launch(run_lengths, backend, x, values, lengths, count)
    for s in range(3):
        expected, runs = torch.unique_consecutive(x[s], return_counts=True)
        assert count[s] == len(expected)
        assert torch.equal(values[s, :len(expected)], expected) and lengths[s, :len(expected)].tolist() == runs.tolist()
