"""A transformer block cut over four ranks: replicated norms, attention and MLP with one all-reduce each.

Run: python examples/tp_transformer_block.py
"""

import torch

import tessera as ts

CONFIG = ts.GPTConfig(
    n_layers=2, n_heads=32, n_kv_heads=4, d_model=256, d_ffn=704, max_seq_len=128, vocab_size=1000)  # TinyLlama's


def block(model: ts.GPTModel, x: torch.Tensor) -> torch.Tensor:
    mask = ts.ops.make_mask(x.shape[1], x.shape[1])
    rope = ts.ops.rope_tables(torch.arange(x.shape[1])[None], CONFIG.rope_dim, CONFIG.rope_theta)
    with torch.no_grad():
        return model.blocks[0](x, mask, rope)


def build(mesh: ts.dist.Mesh | None) -> tuple[ts.GPTModel, torch.Tensor]:
    model = ts.GPTModel(CONFIG, mesh).eval()
    model.init_weights(seed=0)
    return model, torch.randn(2, 40, CONFIG.d_model, generator=torch.Generator().manual_seed(1))


def on_rank() -> tuple[torch.Tensor, torch.Tensor]:
    ts.init()
    model, x = build(ts.dist.mesh(4))
    with ts.dist.deterministic(reduce_tree="fixed"):
        exact = block(model, x)
    return block(model, x), exact


def main() -> None:
    model, x = build(None)
    expected = block(model, x)
    with ts.dist.deterministic(reduce_tree="fixed"):
        exact = block(model, x)
    for rank, (out, out_exact) in enumerate(ts.dist.spawn(on_rank, 4)):
        error = float((out - expected).abs().max())
        print(f"rank {rank}: equal to one device: {error < 1e-5}; to the bit with deterministic(): "
              f"{torch.equal(out_exact, exact)}")


if __name__ == "__main__":
    main()
