"""Tessera: a tile-first programming model for decoder-only transformers. Import as `import tessera as ts`.

The public names are listed below with the module that defines each; a module is imported when one
of its names is first used, so that `import tessera` stays quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_TYPES = (
    "f64 f32 f16 bf16 fp8_e4m3 fp8_e5m2 fp8 int64 int32 int8 uint8 int4 Tile Tensor DType"
).split()
# Names that mean what torch means by them.
_TORCH = (
    "cat cos cumsum exp log mean multinomial no_grad ones_like relu sin sort sqrt topk where zeros_like"
).split()

_PUBLIC: dict[str, str] = {
    **dict.fromkeys(_TYPES, "tessera.types"),
    **dict.fromkeys(("TesseraError", "InputError", "ShapeError", "CompileError", "LaunchError"), "tessera.errors"),
    "NumericalError": "tessera.errors",
    "GPTConfig": "tessera.models.config", "RopeScaling": "tessera.ops.rotary", "GPTModel": "tessera.models.gpt",
    "KVCache": "tessera.nn.kv_cache",
    **dict.fromkeys(("Kernel", "constexpr", "schedule"), "tessera.kernel"),
    "autotune": "tessera.kernel.tune",
    **dict.fromkeys(("jit", "fused"), "tessera.function.compiling"), "memory_efficient": "tessera.function.recompute",
    "checkpoint_region": "tessera.function.region", "precision": "tessera.function.precision",
    "numerically_stable": "tessera.function.stability", "module": "tessera.function.module",
    "quantized": "tessera.ops.quantized_function",
    **dict.fromkeys(("zeros", "ones", "full", "eye", "arange", "tensor", "rand", "randn", "cast", "gather"),
                    "tessera.ops.tensors"),
    **dict.fromkeys(("matmul", "gemm"), "tessera.ops.matmul"), "mul_fp8": "tessera.ops.quantized_linear",
    **dict.fromkeys(("quantize", "dequantize"), "tessera.ops.quantize"),
    **dict.fromkeys(_TORCH, "torch"), "Module": "torch.nn",
    "load_model": "tessera.models.load", "save_model": "tessera.models.save",
    **dict.fromkeys(("init", "all_gather", "mesh_reduce", "ring_exchange", "Mesh", "MeshTensor"), "tessera.dist"),
    "create_model_mesh": "tessera.models.gpt_plan", "NVL72Optimizer": "tessera.plan.nvl72",
    "load_tokenizer": "tessera.data.tokenizer", "GPTInference": "tessera.infer.engine",
    "SPMDGeneration": "tessera.infer.distributed",
}
_SUBMODULES = (
    "types", "errors", "env", "kernel", "function", "ops", "op", "nn", "dist", "models", "data", "checkpoint", "infer",
    "plan")
_ALIASES = {"tile": "tessera.kernel.lang", "tokenizer": "tessera.data.tokenizer", "hub": "tessera.models.hub",
            "distributed": "tessera.dist", "profile": "tessera.kernel.profile", "graph": "tessera.kernel.graph",
            "stable": "tessera.function.stable", "quantization": "tessera.ops.quantize"}

__all__ = sorted([*_PUBLIC, *_SUBMODULES, *_ALIASES])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
    elif name in _SUBMODULES or name in _ALIASES:
        value = importlib.import_module(_ALIASES.get(name, f"tessera.{name}"))
    else:
        raise AttributeError(f"module 'tessera' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
