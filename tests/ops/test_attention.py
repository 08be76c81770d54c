"""attention and its masks against float64 softmax, one query at a time."""

import pytest
import torch

from tessera import ops


def reference(q_BSHD, k_BKTD, v_BKTD, *, scale, window=None, valid=None, softcap=None):
    """Each query over the list of keys that it may see, in float64; NaN rows where a query stands on padding."""
    B, S, H, D = q_BSHD.shape
    K, T = k_BKTD.shape[1:3]
    out = torch.full((B, S, H, D), torch.nan, dtype=torch.float64)
    for b in range(B):
        tokens = [t for t in range(T) if valid is None or valid[b, t]]
        for s in range(S):
            if T - S + s not in tokens:
                continue
            seen = [t for t in tokens if t <= T - S + s][-(window or T):]
            for h in range(H):
                group = h // (H // K)
                scores = k_BKTD[b, group, seen].double() @ q_BSHD[b, s, h].double() * scale
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                out[b, s, h] = scores.softmax(0) @ v_BKTD[b, group, seen].double()
    return out


@pytest.mark.parametrize("padding", ["none", "left", "right", "gap"])
@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("S, T", [(13, 13), (1, 13), (5, 17)])
@pytest.mark.parametrize("H, K", [(6, 2), (4, 4), (3, 1)])
def test_attention(H, K, S, T, window, padding):
    generator = torch.Generator().manual_seed(H * 100 + T + S)
    q = torch.randn(3, S, H, 8, generator=generator) * 2
    k, v = (torch.randn(3, K, T, 8, generator=generator) for _ in range(2))
    valid = None
    if padding != "none":
        place, cut = torch.arange(T), torch.tensor([[0], [3], [T - 1]])
        valid = {"left": place >= cut, "right": place < T - cut, "gap": (place < 2) | (place >= 2 + cut)}[padding]
    mask = ops.make_mask(S, T, window=window, valid_BT=valid)
    for flash, softcap in ((True, None), (False, None), (True, 2.0)):
        expected = reference(q, k, v, scale=0.4, window=window, valid=valid, softcap=softcap)
        actual = ops.attention(q.transpose(1, 2), k, v, mask, scale=0.4, softcap=softcap, flash=flash).transpose(1, 2)
        assert actual.isfinite().all()
        known = ~expected.isnan()
        torch.testing.assert_close(actual.double()[known], expected[known], rtol=1e-5, atol=1e-5)


def test_bf16_sums_are_in_f32():
    """2000 equal keys: the mean of the values is exact only if it is not accumulated in bf16."""
    q = torch.zeros(1, 1, 2, 16, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 2000, 16, dtype=torch.bfloat16)
    v = torch.rand(1, 1, 2000, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    for flash in (True, False):
        out = ops.attention(q.transpose(1, 2), k, v, ops.Mask(), scale=1.0, flash=flash)
        torch.testing.assert_close(out[0, 0, 0].double(), v[0, 0].double().mean(0), rtol=2**-7, atol=0)
