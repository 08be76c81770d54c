"""Attention cut over four ranks: column-parallel q, k, v, local heads, row-parallel output, one all-reduce.

Run: python examples/tp_attention.py    (starts the ranks itself; or: tessera launch --nproc 4 with main's body)
"""

import torch

import tessera as ts

CONFIG = ts.GPTConfig(  # Mistral's proportions, small: 8 key/value heads, each shared by 4 query heads
    n_layers=2, n_heads=32, n_kv_heads=8, d_model=256, d_ffn=896, max_seq_len=128, vocab_size=1000, sliding_window=64)


def attention(model: ts.GPTModel, x: torch.Tensor) -> torch.Tensor:
    mask = ts.ops.make_mask(x.shape[1], x.shape[1])
    rope = ts.ops.rope_tables(torch.arange(x.shape[1])[None], CONFIG.rope_dim, CONFIG.rope_theta)
    with torch.no_grad():
        return model.blocks[0].attn(x, mask, rope)


def on_rank() -> tuple[torch.Tensor, int]:
    ts.init()
    model = ts.GPTModel(CONFIG, ts.dist.mesh(4)).eval()
    model.init_weights(seed=0)  # the same weights on any number of ranks; each keeps its part
    x = torch.randn(2, 40, CONFIG.d_model, generator=torch.Generator().manual_seed(1))
    return attention(model, x), model.blocks[0].attn.n_kv_heads


def main() -> None:
    whole = ts.GPTModel(CONFIG).eval()
    whole.init_weights(seed=0)
    x = torch.randn(2, 40, CONFIG.d_model, generator=torch.Generator().manual_seed(1))
    expected = attention(whole, x)
    for rank, (out, n_kv_heads) in enumerate(ts.dist.spawn(on_rank, 4)):
        error = float((out - expected).abs().max())
        print(f"rank {rank}: {n_kv_heads} key/value heads, equal to one device: {error < 1e-5}")


if __name__ == "__main__":
    main()
