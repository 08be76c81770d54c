"""Write a kernel over tiles, run it at a ragged size, and look at what it becomes."""

import torch

import tessera as ts
from tessera import Tile, f32, tile


@ts.kernel
def rms_norm(x: Tile["S", "D", f32], weight: Tile["D", f32], out: Tile["S", "D", f32], eps: float = 1e-5):
    row = tile.load(x)
    scale = tile.rsqrt(tile.reduce_mean(row * row, axis=-1) + eps)
    tile.store(out, row * tile.broadcast(scale, axis=-1) * tile.load(weight))


x, weight = torch.randn(37, 1003), torch.randn(1003)
out = torch.empty_like(x)
rms_norm(x, weight, out)
expected = torch.nn.functional.rms_norm(x, (1003,), weight, 1e-5)
print("largest error:", "below 1e-5" if torch.allclose(out, expected, atol=1e-5) else "too large")

print(rms_norm.ir(x, weight, out))

try:
    rms_norm(x, weight[:-1], out)
except ts.LaunchError as error:
    print(error)
