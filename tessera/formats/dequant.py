"""GGUF block formats to floats.

In: stored blocks and their GGML type. Out: the numbers they stand for. Called by formats.gguf.
Every format is a run of blocks of 32 or 256 values ("super-blocks") with their own scales; each
function below turns `[N, block bytes]` uint8 into `[N, block values]` numbers with the operations,
and so the roundings, of ggml's reference (ggml-quants.c, gguf/quants.py).

Shape suffixes: N blocks, G groups of a super-block, W values of a group, V values of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf.constants import GGMLQuantizationType

from tessera.errors import UnsupportedFileError

_Blocks = torch.Tensor
"""`[N, block bytes]` uint8, contiguous."""


def decoder(kind: GGMLQuantizationType) -> Callable[[_Blocks], torch.Tensor]:
    """The function that turns blocks of `kind` into numbers: `[N, block bytes]` -> `[N, block values]`.

    Raises:
        UnsupportedFileError: `kind` is not one that Tessera reads.
    """
    if kind not in _DECODERS:
        known = ", ".join(k.name for k in _DECODERS)
        raise UnsupportedFileError(f"storage type {kind.name} is not read; expected one of {known}")
    return _DECODERS[kind]


def _f16(blocks: _Blocks, start: int) -> torch.Tensor:
    """The float16 at byte `start` of each block, as float32 `[N, 1]`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(bytes_: torch.Tensor) -> torch.Tensor:
    """`[..., W]` bytes -> `[..., 2, W]`: low nibbles, then high nibbles."""
    return torch.stack((bytes_ & 0x0F, bytes_ >> 4), dim=-2)


def _bits(bytes_: torch.Tensor, width: int) -> torch.Tensor:
    """`[..., W]` bytes -> `[..., 8 // width, W]`: fields of `width` bits, lowest first."""
    mask = (1 << width) - 1
    return torch.stack([(bytes_ >> shift) & mask for shift in range(0, 8, width)], dim=-2)


def _decode_f32(blocks: _Blocks) -> torch.Tensor:
    return blocks.view(torch.float32)


def _decode_f16(blocks: _Blocks) -> torch.Tensor:
    return blocks.view(torch.float16)


def _decode_bf16(blocks: _Blocks) -> torch.Tensor:
    return blocks.view(torch.bfloat16)


def _decode_q8_0(blocks: _Blocks) -> torch.Tensor:
    """f16 d | 32 x int8: d * q."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_f16(blocks, 0))


def _decode_q4_0(blocks: _Blocks) -> torch.Tensor:
    """f16 d | 32 nibbles: d * (q - 8)."""
    q_NV = _nibbles(blocks[:, 2:]).flatten(1).float()
    return q_NV.sub_(8).mul_(_f16(blocks, 0))


def _decode_q4_1(blocks: _Blocks) -> torch.Tensor:
    """f16 d | f16 m | 32 nibbles: d * q + m."""
    q_NV = _nibbles(blocks[:, 4:]).flatten(1).float()
    return q_NV.mul_(_f16(blocks, 0)).add_(_f16(blocks, 2))


def _five_bits(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """4 bytes of fifth bits (value i is bit i) and 16 bytes of nibbles -> `[N, 32]` float32."""
    # Bits of byte b are values 8b to 8b+7, so the bit index runs fastest.
    fifth_NV = _bits(high, 1).transpose(1, 2).flatten(1)
    return (_nibbles(low).flatten(1) | (fifth_NV << 4)).float()


def _decode_q5_0(blocks: _Blocks) -> torch.Tensor:
    """f16 d | 32 fifth bits | 32 nibbles: d * (q - 16)."""
    return _five_bits(blocks[:, 2:6], blocks[:, 6:]).sub_(16).mul_(_f16(blocks, 0))


def _decode_q5_1(blocks: _Blocks) -> torch.Tensor:
    """f16 d | f16 m | 32 fifth bits | 32 nibbles: d * q + m."""
    q_NV = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    return q_NV.mul_(_f16(blocks, 0)).add_(_f16(blocks, 2))


def _k_scales(blocks: _Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums of Q4_K and Q5_K, `[N, 8, 1]` float32 each.

    Bytes 4 to 15 hold eight 6-bit scales and eight 6-bit minimums: groups 0-3 in the low six bits of
    bytes 0-3 (scales) and 4-7 (minimums), groups 4-7 as nibbles of bytes 8-11 with their top two bits
    in the top two bits of bytes 0-3 and 4-7.
    """
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale_NG = torch.cat((low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)), dim=1)
    minimum_NG = torch.cat((mid & 0x3F, (high >> 4) | ((mid >> 2) & 0x30)), dim=1)
    scale_NG, minimum_NG = scale_NG.float() * _f16(blocks, 0), minimum_NG.float() * _f16(blocks, 2)
    return scale_NG.unsqueeze(-1), minimum_NG.unsqueeze(-1)


def _decode_q4_k(blocks: _Blocks) -> torch.Tensor:
    """f16 d | f16 dmin | 12 bytes of scales | 256 nibbles: d * scale * q - dmin * minimum."""
    scale_NG1, minimum_NG1 = _k_scales(blocks)
    q_NGW = _nibbles(blocks[:, 16:].view(-1, 4, 32)).flatten(1, 2).float()
    return q_NGW.mul_(scale_NG1).sub_(minimum_NG1).flatten(1)


def _decode_q5_k(blocks: _Blocks) -> torch.Tensor:
    """As Q4_K, with 32 bytes of fifth bits (bit g of byte w belongs to group g) before the nibbles."""
    scale_NG1, minimum_NG1 = _k_scales(blocks)
    low_NGW = _nibbles(blocks[:, 48:].view(-1, 4, 32)).flatten(1, 2)
    q_NGW = (low_NGW | (_bits(blocks[:, 16:48], 1) << 4)).float()
    return q_NGW.mul_(scale_NG1).sub_(minimum_NG1).flatten(1)


def _decode_q6_k(blocks: _Blocks) -> torch.Tensor:
    """128 bytes of low nibbles | 64 of high bit pairs | 16 int8 scales | f16 d: d * scale * (q - 32)."""
    low_NGW = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 8, 32)
    high_NGW = _bits(blocks[:, 128:192].view(-1, 2, 32), 2).view(-1, 8, 32)
    scale_NG = blocks[:, 192:208].view(torch.int8).float().mul_(_f16(blocks, 208))
    q_NGW = (low_NGW | (high_NGW << 4)).view(-1, 16, 16).float().sub_(32)
    return q_NGW.mul_(scale_NG.unsqueeze(-1)).flatten(1)


_Type = GGMLQuantizationType
_DECODERS: dict[GGMLQuantizationType, Callable[[_Blocks], torch.Tensor]] = {
    _Type.F32: _decode_f32,
    _Type.F16: _decode_f16,
    _Type.BF16: _decode_bf16,
    _Type.Q8_0: _decode_q8_0,
    _Type.Q4_0: _decode_q4_0,
    _Type.Q4_1: _decode_q4_1,
    _Type.Q5_0: _decode_q5_0,
    _Type.Q5_1: _decode_q5_1,
    _Type.Q4_K: _decode_q4_k,
    _Type.Q5_K: _decode_q5_k,
    _Type.Q6_K: _decode_q6_k,
}
