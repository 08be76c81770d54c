"""tessera check: finds what does not fit, says where, and is silent about what does."""

from __future__ import annotations

import json
import textwrap

import pytest

HEAD = """
import math
import torch
import torch.nn.functional as F
from typing import Dict, List, Optional, Tuple, Union
import tessera as ts
from tessera import Tensor, Tile, bf16, f32, fp8, int8, int32, tile
"""


@pytest.fixture
def check(tmp_path, tessera):
    """Check a text as a file: (exit code, what is printed, with the path as FILE)."""
    def run(text: str, *options: str) -> tuple[int, str]:
        file = tmp_path / "model.py"
        file.write_text(HEAD + textwrap.dedent(text))
        code, out, err = tessera("check", file, *options)
        assert err == ""
        return code, out.replace(str(file), "FILE")

    return run


RIGHT = {
    "matmul": """
        @ts.function
        def f(x: Tensor["B", "S", "D"], w: Tensor["D", "F"]) -> Tensor["B", "S", "F"]:
            return x @ w
        """,
    "heads that divide a width": """
        @ts.function
        def f(x: Tensor["B", "S", "D"], num_heads: int) -> Tensor["B", "S", "D"]:
            B, S, D = x.shape
            return x.view(B, S, num_heads, D // num_heads).transpose(1, 2).transpose(1, 2).reshape(B, S, D)
        """,
    "grouped heads": """
        @ts.function
        def f(q: Tensor["B", "H_q", "S", "D"], k: Tensor["B", "H_kv", "S", "D"], causal: bool = True
              ) -> Tensor["B", "H_q", "S", "S"]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            scores = q @ k.transpose(-1, -2)
            return scores.tril() if causal else scores
        """,
    "indices without a dtype": """
        @ts.function
        def f(ids: Tensor["B", "S"], table: Tensor["V", "D"], weight: Optional[Tensor["B", "S"]] = None
              ) -> Tensor["B", "S", "D"]:
            out = F.embedding(ids, table)
            return out if weight is None else out * weight.unsqueeze(-1)
        """,
    "masks, indices and their heads": """
        @ts.function
        def f(ids: Tensor["B", "S"], table: Tensor["V", "D"], mask: Tensor["B", "S"], num_heads: int
              ) -> Tensor["B", "S", "D"]:
            x = F.embedding(ids, table).masked_fill(mask.unsqueeze(-1), 0.0)
            return x.unflatten(-1, (num_heads, -1)).flatten(-2)
        """,
    "kernels of indices": """
        @ts.kernel
        def k(ids: Tile["N"], table: Tile["V", "D"], out: Tile["N", "D"]):
            for i in tile.grid(ids.shape[0]):
                tile.store(out[i], tile.load(table[ids[i]]))
        """,
    "halves, sums and int arguments": """
        @ts.function
        def rotate(x: Tensor["B", "S", "H", "D"], cos: Tensor["B", "S", 1, "D/2"], sin: Tensor["B", "S", 1, "D/2"]
                   ) -> Tensor["B", "S", "H", "D"]:
            x_r, x_i = x.chunk(2, dim=-1)
            cos, sin = cos.expand(-1, -1, x.shape[2], -1), sin.expand(-1, -1, x.shape[2], -1)
            return torch.cat([x_r * cos - x_i * sin, x_r * sin + x_i * cos], -1)

        @ts.function
        def grow(x: Tensor["B", "S"], n: int, m: int = 3) -> Tensor["B", "2*S+n"]:
            return torch.cat([x, x, x.new_zeros(x.shape[0], n)], 1)

        @ts.function
        def tables(seq_len: int, dim: int, base: float = 1e4) -> Tuple[Tensor["seq_len", "dim"], Tensor["seq_len"]]:
            return torch.zeros(seq_len, dim), torch.arange(seq_len)
        """,
    "containers and unions": """
        @ts.function
        def f(batch: Dict[str, Tensor["B", "S"]], parts: List[Tensor["B", "D"]],
              x: Union[Tensor["B", "S", int32], Tensor["B", "S", "D", bf16]]) -> Tensor["B", "S"]:
            assert x.dtype is torch.int32 or x.dim() == 3
            return batch["ids"] + batch["mask"] + sum(p.sum(1, keepdim=True) for p in parts)
        """,
    "modules": """
        @ts.module
        class Linear:
            def __init__(self, in_features: int, out_features: int, bias: bool = True):
                self.weight = torch.nn.Parameter(torch.randn(out_features, in_features))

            @ts.function
            def forward(self, x: Tensor["B", "S", "D_in"]) -> Tensor["B", "S", "D_out"]:
                return x @ self.weight.T

        class Heads(torch.nn.Module):
            def __init__(self, dim: int, num_heads: int):
                super().__init__()
                self.num_heads, self.proj = num_heads, Linear(dim, dim)

            @ts.function
            def forward(self, x: Tensor["B", "S", "D"]) -> Tensor["B", "S", "D"]:
                B, S, D = x.shape
                return self.proj(x).view(B, S, self.num_heads, D // self.num_heads).reshape(B, S, D)
        """,
    "what an object holds": """
        class Attention(torch.nn.Module):
            def __init__(self, dim: int = 64, heads: int = 4):
                super().__init__()
                self.heads, self.qkv, self.out = heads, torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

            @ts.function
            def forward(self, x: Tensor["B", "S", "D"], mask: Tensor["S", "S"] | None = None) -> Tensor["B", "S", "D"]:
                B, S, D = x.shape
                q, k, v = self.qkv(x).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                return self.out(y.transpose(1, 2).reshape(B, S, D))
        """,
    "groups, counts and named ints": """
        @ts.function
        def quantize(x: Tensor["N", "K"], group: int = 32) -> Tuple[Tensor["N", "K", int8], Tensor["N", "K/32"]]:
            N, K = x.shape
            groups = x.view(N, K // group, group)
            scale = groups.abs().amax(-1) / 127
            return (groups / scale[..., None]).round().to(torch.int8).view(N, K), scale

        @ts.function
        def best(logits: Tensor["B", "V"], k: int) -> Tuple[Tensor["B", "k"], Tensor["B", "k"]]:
            return torch.topk(logits, k)

        @ts.function
        def patches(x: Tensor["B", "C", "H*P", "W*P"], H: int, W: int, P: int) -> Tensor["B", "H*W", "C*P*P"]:
            B, C, _, _ = x.shape
            return x.view(B, C, H, P, W, P).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W, C * P * P)
        """,
    "decorators": """
        @ts.checkpoint
        def chunks(x: Tensor["B", "S", "D"], gate: Tensor["D", "F"], down: Tensor["F", "D"], chunk: int = 8
                   ) -> Tensor["B", "S", "D"]:
            out = torch.zeros_like(x)
            for i in range(0, gate.shape[1], chunk):
                with ts.checkpoint_region():
                    out += F.silu(x @ gate[:, i:i + chunk]) @ down[i:i + chunk]
            return out

        @ts.jit
        def jitted(x: Tensor["B", "D"]) -> Tensor["B"]:
            return x.sum(-1)

        @ts.numerically_stable
        def stable(x: Tensor["B", "D"]) -> Tensor["B", 1]:
            with ts.precision(compute=f32, accumulate="f64"):
                return ts.stable.sqrt(ts.stable.mean_of_squares(x, keepdim=True))
        """,
    "kernels and launches": """
        @ts.kernel
        def twice(x: Tile["S", "D", f32], out: Tile["S", "D", f32], mask: Optional[Tile["S", "D"]] = None,
                  negate: bool = False):
            t = tile.load(x) * 2.0
            if mask is not None:
                t = t + tile.load(mask)
            if negate:
                t = -t
            tile.store(out, t)

        @ts.function
        def launch(x: Tensor["S", "D", f32]) -> Tensor["S", "D"]:
            out = torch.empty_like(x)
            twice(x, out)
            return out
        """,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_code_passes(check, name) -> None:
    code, out = check(RIGHT[name])
    assert code == 0 and out.endswith(": 0 errors\n") and out.count("\n") == 1, out


WRONG = {
    "inner dims": ("""
        @ts.function
        def f(x: Tensor["B", "S", "D"], up: Tensor["D", "F"], down: Tensor["F", "D"]) -> Tensor["B", "S", "D"]:
            h = torch.relu(x @ up)
            return h @ down.T
        """, """
FILE:12:12: error: a and b must have same reduction dim, but got [B*S, F] X [D, F].
    return h @ down.T
           ^^^^^^^^^^
    note: h is f32[B, S, F]
    note: down is f32[F, D]
"""),
    "result": ("""
        @ts.function
        def f(x: Tensor["B", "S", "D"]) -> Tensor["B", "D"]:
            return x.mean(-1)
        """, """
FILE:11:5: error: f: result has D=S (axis 1 of [B, S]) but x has D (axis 2 of [B, S, D])
    return x.mean(-1)
    ^^^^^^^^^^^^^^^^^
"""),
    "call of another function": ("""
        @ts.function
        def g(x: Tensor["B", "D"], w: Tensor["D", "F"]) -> Tensor["B", "F"]:
            return x @ w

        @ts.function
        def f(x: Tensor["B", "D"], w: Tensor["F", "D"]) -> Tensor["B", "F"]:
            y = x * 2
            return g(y, w=w)
        """, """
FILE:16:12: error: g: w has D=F (axis 0 of [F, D]) but x has D (axis 1 of [B, D])
    return g(y, w=w)
           ^^^^^^^^^
    note: y is f32[B, D]
    note: w is f32[F, D]
"""),
    "only with the optional argument": ("""
        @ts.function
        def f(x: Tensor["S", "D"], bias: Optional[Tensor["S"]] = None) -> Tensor["S", "D"]:
            if bias is not None:
                x = x + bias
            return x
        """, "FILE:12:13: error: "),
    "only with the flag": ("""
        @ts.function
        def f(x: Tensor["S", "D"], transpose: bool = False) -> Tensor["S", "D"]:
            if transpose:
                return x.T
            return x
        """, 'FILE:10:56: error: f: result has S=D (axis 0 of [D, S]) but x has S (axis 0 of [S, D])'),
    "name": ("""
        @ts.function
        def f(x: Tensor["S", "D"]) -> Tensor["S", "D"]:
            return helper(x)
        """, "FILE:11:12: error: NameError: name 'helper' is not defined"),
    "dtype": ("""
        @ts.function
        def f(x: Tensor["S", "D", bf16]) -> Tensor["S", "D", bf16]:
            return x.float()
        """, "FILE:11:5: error: f: result is torch.float32; expected torch.bfloat16"),
    "a sum and a product": ("""
        @ts.function
        def grow(x: Tensor["B", "T", "D"], new: Tensor["B", "S", "D"]) -> Tensor["B", "2*T", "D"]:
            return torch.cat([x, new], 1)
        """, "FILE:11:5: error: grow: result has 2*T=T+S (axis 1 of [B, T+S, D]) but x has T (axis 1 of [B, T, D])"),
    "beyond what the object holds": ("""
        class Layer(torch.nn.Module):
            def __init__(self, dim: int = 64):
                super().__init__()
                self.proj = torch.nn.Linear(dim, 3 * dim)

            @ts.function
            def forward(self, x: Tensor["B", "S", "D"]) -> Tensor["B", "S", "D"]:
                return self.proj(x).view(x.shape).relu()
        """, "FILE:16:16: error: shape '[B, S, D]' is invalid for input of size "),
    "a forgotten factor": ("""
        @ts.function
        def f(x: Tensor["B", "D"], w: Tensor["F"]) -> Tensor["B", "F"]:
            return torch.cat([x, x], -1) + w
        """, "FILE:11:12: error: "),
    "kernel": ("""
        @ts.kernel
        def k(x: Tile["S", "D", f32], y: Tile["D", "S", f32], out: Tile["S", "D", f32]):
            t = tile.load(x) + tile.load(y)
            tile.store(out, t)
        """, """
FILE:11:9: error: add: shapes x: f32[S, D] and y: f32[D, S] do not fit: S against D
    t = tile.load(x) + tile.load(y)
        ^^^^^^^^^^^^^^^^^^^^^^^^^^^
    note: x is f32[S, D], declared at line 10"""),
    "kernel with its optional argument": ("""
        @ts.kernel
        def k(x: Tile["S", "D", f32], out: Tile["S", "D", f32], bias: Optional[Tile["S", f32]] = None):
            t = tile.load(x)
            if bias is not None:
                t = t + tile.load(bias)
            tile.store(out, t)
        """, "FILE:13:"),
    "launch": ("""
        @ts.kernel
        def k(x: Tile["S", "D", f32], out: Tile["S", "D", f32]):
            tile.store(out, tile.load(x))

        @ts.function
        def f(x: Tensor["S", "D", f32]) -> Tensor["D", "S"]:
            out = x.new_empty(x.shape[1], x.shape[0])
            k(x, out)
            return out
        """, """
FILE:16:5: error: kernel k: x has S but out has S=D
    k(x, out)
    ^^^^^^^^^
    note: x is f32[S, D]
    note: out is f32[D, S]
"""),
    "method": ("""
        @ts.module
        class Linear:
            def __init__(self, d_in: int, d_out: int):
                self.weight = torch.nn.Parameter(torch.randn(d_out, d_in))

            def forward(self, x: Tensor["B", "D_in"]) -> Tensor["B", "D_out"]:
                return x @ self.weight
        """ + "\n" * 2 + """
        @ts.module
        class Twice:
            def __init__(self, dim: int):
                self.weight = torch.nn.Parameter(torch.randn(dim))

            def forward(self, x: Tensor["B", "D"]) -> Tensor["B", "D"]:
                return torch.cat([x, x], -1) * self.weight
        """, "FILE:25:16: error: "),
    "annotation": ("""
        @ts.function
        def f(x: Tensor["S", "D"],
              y: Tensor["S ** 2"]):
            return x
        """, """
FILE:11:7: error: function f: the annotation of 'y': dim: 'S ** 2' is not a size"""),
    "syntax": ("""
        @ts.function
        def f(x: Tensor["S", "D"]):
            return x +
        """, "FILE:11:15: error: SyntaxError: invalid syntax"),
    "import": ("""
        import tessera_has_no_such_module
        """, "FILE:9:1: error: does not import: ModuleNotFoundError: No module named 'tessera_has_no_such_module'"),
    "exit": ("""
        raise SystemExit(3)
        """, "FILE:9:1: error: does not import: SystemExit: 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_code_is_shown(check, name) -> None:
    text, expected = WRONG[name]
    code, out = check(text)
    assert code == 1
    assert expected.strip("\n") in out, out
    assert out.endswith(": 1 error\n"), out


def test_every_error_is_found_in_order(check) -> None:
    parts = [textwrap.dedent(WRONG[name][0]) for name in ("result", "kernel", "dtype", "inner dims")]
    renamed = [p.replace("def f", f"def f{i}").replace("def k", f"def k{i}") for i, p in enumerate(parts)]
    code, out = check("\n".join(renamed))
    lines = [int(line.split(":")[1]) for line in out.splitlines() if ": error: " in line]
    assert code == 1 and len(lines) == 4 and lines == sorted(lines)


def test_what_cannot_be_checked_is_a_note(check) -> None:
    code, out = check("""
        @ts.function
        def branch(x: Tensor["S"]) -> Tensor["S"]:
            return x if x.sum() > 0 else -x

        @ts.function
        def unknown(x: Tensor["S"], mesh) -> Tensor["S"]:
            return mesh(x)

        class Held(torch.nn.Module):
            def __init__(self, config):
                super().__init__()

            @ts.function
            def forward(self, x: Tensor["S"]) -> Tensor["S"]:
                return x * self.scale

            @ts.function
            def wrong(self, x: Tensor["S", "D"]) -> Tensor["S"]:
                return x.sum(0)
        """)
    assert code == 1  # the last one reads nothing of its object, and so is run
    assert ":9: error: Held.wrong: result has S=D" in out
    assert "FILE:11:17: note: branch: not checked from here: what follows depends on the numbers" in out
    assert "FILE:14:1: note: unknown: not checked: argument 'mesh' has no default" in out
    assert "note: Held.forward: not checked: argument 'config' has no default" in out
    assert out.endswith("checked 4 functions and 0 kernels: 1 error\n")


def test_json(check) -> None:
    code, out = check(WRONG["inner dims"][0], "--json")
    report = json.loads(out)
    assert code == 1 and (report["functions"], report["kernels"], report["notes"]) == (1, 0, [])
    error, = report["errors"]
    assert (error["file"], error["line"], error["column"], error["end_column"]) == ("FILE", 12, 12, 22)
    assert error["source"] == "    return h @ down.T" and error["notes"][0] == "h is f32[B, S, F]"


def test_what_the_code_prints_is_not_part_of_the_output(tmp_path, tessera) -> None:
    file = tmp_path / "prints.py"
    file.write_text("print('hello')\n")
    code, out, err = tessera("check", file, "--json")
    assert (code, err) == (0, "hello\n") and json.loads(out)["errors"] == []


def test_modules_packages_and_imported_names(tmp_path, tessera, monkeypatch) -> None:
    package = tmp_path / "checked_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "right.py").write_text(HEAD + textwrap.dedent(RIGHT["matmul"]))
    imported = "from checked_pkg.right import f as g\n"
    (package / "wrong.py").write_text(HEAD + imported + textwrap.dedent(WRONG["dtype"][0]))
    monkeypatch.syspath_prepend(tmp_path)
    assert tessera("check", "checked_pkg.right")[:2] == (0, "checked 1 function and 0 kernels: 0 errors\n")
    code, out, _ = tessera("check", "checked_pkg")
    assert code == 1 and out.endswith("checked 2 functions and 0 kernels: 1 error\n")
    assert tessera("check", package / "right.py", "checked_pkg.wrong")[0] == 1
    (package / "relative.py").write_text(HEAD + "from .right import f\n" + textwrap.dedent(RIGHT["modules"]))
    assert tessera("check", package / "relative.py")[:2] == (0, "checked 2 functions and 0 kernels: 0 errors\n")


@pytest.mark.parametrize("target", ["no_such_file.py", "no_such_module", "no.such.module", "."])
def test_a_target_that_is_not_there(tessera, target) -> None:
    code, _, err = tessera("check", target)
    assert code == 2 and f"target: {target!r} given" in err


def test_nothing_is_launched_and_nothing_stays_changed(check, monkeypatch) -> None:
    import os

    monkeypatch.delenv("TESSERA_BACKEND", raising=False)
    check(RIGHT["kernels and launches"])
    from tessera.kernel.specialise import is_observed

    assert "TESSERA_BACKEND" not in os.environ and not is_observed()
