"""Check shapes from annotations, recompute activations, state a precision, and let `tessera check` find mistakes."""

import tempfile
from pathlib import Path

import torch

import tessera as ts
from tessera import Tensor
from tessera.cli import main


@ts.function
def mlp(x: Tensor["B", "S", "D"], up: Tensor["D", "F"], down: Tensor["F", "D"]) -> Tensor["B", "S", "D"]:
    return torch.relu(x @ up) @ down


x, up, down = torch.randn(2, 5, 8), torch.randn(8, 32), torch.randn(32, 8)
print("mlp:", list(mlp(x, up, down).shape))
try:
    mlp(x, up, down.T)
except ts.ShapeError as error:
    print(str(error).partition("; called at")[0])

# The same function, with its activations computed again in the backward pass, two rows of S at a time.
lean = ts.memory_efficient(rows="S", chunk=2)(mlp)
weight = up.clone().requires_grad_()
gradients = [torch.autograd.grad(f(x, weight, down).sum(), weight)[0] for f in (mlp, lean)]
print("same gradients:", torch.allclose(*gradients, atol=1e-4))

with ts.precision(compute=ts.bf16, accumulate=ts.f32):
    print("in bf16:", mlp(x, up, down).dtype)

# Without data, before anything runs: every ts.function and ts.kernel of a file.
WRONG = """
import tessera as ts
from tessera import Tensor

@ts.function
def scores(q: Tensor["B", "S", "D"], k: Tensor["B", "T", "D"]) -> Tensor["B", "S", "T"]:
    return q @ k
"""
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "wrong.py"
    file.write_text(WRONG)
    print("exit code", main(["check", str(file)]))
