"""What tile kernels become on an sm_90 GPU (H100, H200), without one: registers, spills, shared memory, instructions.

    python bench/cubins.py [--only NAME] [--dtype bf16|f32]

Each kernel is compiled as it is launched at the sizes below, and its machine code is taken apart by the cuobjdump that
comes with Triton. A line ends with what an engineer would look into: SPILL (registers in local memory), SHARED (more
than 227 KiB), F64 (double precision), NARROW (no load of 128 bits), THREADS (a product without tensor cores).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import import_module, util
from pathlib import Path
from typing import Any

from common import print_table

from tessera import Kernel, bf16, f16, f32, int8, int64
from tessera.kernel.backends import cuda
from tessera.types import DType

TOOL = "backends/nvidia/bin/cuobjdump"  # in Triton's package
LARGEST_SHARED = 227 << 10
SIZES = {"B": 4, "S": 1024, "T": 1024, "N": 4096, "M": 4096, "K": 4096, "D": 4096, "F": 8192, "H": 32, "H_kv": 8,
         "V": 131072, "C": 8192, "R": 64, "E": 0, "G": 4, "P": 64, "PAGES": 4096, "PAGE": 16, "ONE": 1, "K/32": 128,
         "2*R+E": 128, "D + 2": 130}
HEADER = ("kernel", "registers", "spills", "shared", "warps", "tensor cores", "async", "loads", "instructions", "")
_OPERATION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)")
_DOUBLE = ("DFMA", "DADD", "DMUL", "DSETP", "DMNMX")
Line = tuple[str, Kernel, Mapping[str, int], dict[str, Any]]


def kernels(d: DType) -> Iterator[Line]:
    """(label, kernel, sizes beside SIZES, dtypes and constants of its arguments)."""
    heads, one = {"D": 128}, {"M": 1}
    weight: dict[str, Any] = {"scale": f16, "x": d, "out": d}
    attention: dict[str, Any] = {"q": d, "k": d, "v": d, "out": d}
    grads: dict[str, Any] = {"grad": d, "q": d, "k": d, "v": d, "causal": True}
    loss: dict[str, Any] = {"logits": d, "targets": int64, "loss": f32}
    found: list[tuple[str, str, Mapping[str, int], dict[str, Any]]] = [
        ("gemm", "linear", {}, {"x": d, "weight": d, "out": d}),
        ("gemm", "linear", {"M": 64}, {"x": d, "weight": d, "out": d}),
        ("gemm", "linear", one, {"x": d, "weight": d, "out": d}),
        ("gemm", "gemm_transposed", {}, {"a": d, "b": d, "out": d}),
        ("quantized", "int8_linear", one, {**weight, "scale": f32}), ("quantized", "int8_linear", {}, weight),
        ("quantized", "int8_group_linear", one, weight), ("quantized", "int8_group_linear", {}, weight),
        ("quantized", "int4_linear", one, {**weight, "minimum": None}),
        ("quantized", "int4_linear", {}, {**weight, "minimum": None}),
        ("casted_linear", "casted_linear", {}, {"x": d, "weight": int8, "scale": f32, "out": d}),
        ("casted_linear", "int8_product", {}, {"out": d}),
        *(("flash_attention", "flash_attention", {"D": width}, {**attention, "lse": f32, "causal": True})
          for width in (64, 128)),
        *(("flash_attention_backward", "flash_attention_grad_q", {"D": width}, {**grads, "out": d, "grad_q": d})
          for width in (64, 128)),
        *(("flash_attention_backward", "flash_attention_grad_kv", {"D": width}, {**grads, "grad_k": d, "grad_v": d})
          for width in (64, 128)),
        ("decode_attention", "decode_attention", heads, attention),
        ("paged_attention", "paged_attention", heads, attention),
        ("rms_norm", "rms_norm", {}, {"x": d, "weight": d, "out": d}),
        ("rms_norm", "rms_norm_backward", {}, {"grad": d, "x": d, "weight": d, "upstream": None, "grad_x": d,
                                               "grad_weight": d}),
        ("layer_norm", "layer_norm", {}, {"x": d, "weight": d, "bias": d, "out": d}),
        ("softmax", "softmax", {}, {"x": d, "out": d}), ("softmax", "softmax_backward", {}, {"grad": d, "out": d,
                                                                                           "d_x": d}),
        ("cross_entropy", "cross_entropy", {}, loss), ("cross_entropy", "cross_entropy_both", {}, {**loss, "out": d}),
        ("activations", "gated", {}, {"gate": d, "up": d, "out": d}),
        ("activations", "gated_backward", {}, {"grad": d, "gate": d, "up": d, "grad_gate": d, "grad_up": d}),
        ("activations", "activation", {}, {"x": d, "out": d, "kind": "gelu"}),
        ("rope", "rope", {}, {"x": d, "cos": f32, "sin": f32, "out": d}),
        ("embedding", "casted_embedding", {}, {"ids": int64, "table": d, "out": d}),
        ("embedding", "embedding_backward", {}, {"grad": d, "ids": int64}),
        ("metric_losses", "contrastive", {"N": 1024}, {"similarity": d, "labels": int64}),
    ]
    for module, name, sizes, arguments in found:
        kernel = getattr(import_module(f"tessera.ops.kernels.{module}"), f"{name}_kernel")
        at = " ".join(f"{key}={size}" for key, size in sizes.items())
        yield f"{name} {d}{' ' + at if at else ''}", kernel, sizes, arguments


def facts(code: bytes, shared: int) -> dict[str, Any]:
    """Registers, spills and instructions of a cubin; `shared` is what a launch asks for."""
    tool = Path(import_module("triton").__file__ or "").parent / TOOL
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage, listing = (subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
                          for option in ("-res-usage", "-sass"))
    operations = _OPERATION.findall(listing)
    kinds = Counter(operation.partition(".")[0] for operation in operations)
    loads = Counter(_bits(operation) for operation in operations if operation.startswith(("LDG", "LDGSTS")))
    registers = re.search(r"REG:(\d+)", usage)
    return {
        "registers": int(registers[1]) if registers else 0, "spills": kinds["LDL"] + kinds["STL"], "shared": shared,
        "wgmma": kinds["HGMMA"] + kinds["IGMMA"] + kinds["QGMMA"], "mma": kinds["HMMA"] + kinds["IMMA"],
        "async": kinds["LDGSTS"] + kinds["UTMALDG"], "loads": dict(sorted(loads.items(), reverse=True)),
        "f64": sum(kinds[name] for name in _DOUBLE) + sum(".F64" in o for o in operations),
        "instructions": len(operations)}


def _bits(load: str) -> int:
    found = re.search(r"\.(128|64)\b|\.[SU]?(16|8)\b", load)
    return int(found[1] or found[2]) if found else 32


def concerns(f: dict[str, Any], has_products: bool) -> str:
    """What the docstring lists."""
    names = {"SPILL": f["spills"], "SHARED": f["shared"] > LARGEST_SHARED, "F64": f["f64"],
             "NARROW": 128 not in f["loads"], "THREADS": has_products and not f["wgmma"] + f["mma"]}
    return " ".join(name for name, seen in names.items() if seen)


def rows(line: Line) -> Iterator[list[str]]:
    """A line of the table for each launch of a kernel."""
    label, kernel, sizes, arguments = line
    function = kernel.trace_for("cuda", (), arguments)
    known = {name: {**SIZES, **sizes}.get(name, 1024) for name in function.sizes}
    for text, compiled in zip(cuda.build(function, known).kernels, cuda.compile_for(function, known)):
        f = facts(compiled.asm["cubin"], compiled.metadata.shared)
        loads = " ".join(f"{count}x{bits}" for bits, count in f["loads"].items())
        yield [label, str(f["registers"]), str(f["spills"]), f"{f['shared'] >> 10}K", str(text.warps),
               f"{f['wgmma']} wgmma" if f["wgmma"] else f"{f['mma']} mma" if f["mma"] else "-", str(f["async"]), loads,
               str(f["instructions"]), concerns(f, "tl.dot" in text.source)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose label has this text")
    parser.add_argument("--dtype", choices=("bf16", "f32"), default="bf16")
    arguments = parser.parse_args()
    if util.find_spec("triton") is None:
        print("Triton is not installed: nothing to compile with")
        return
    table = []
    for line in kernels({"bf16": bf16, "f32": f32}[arguments.dtype]):
        if arguments.only in line[0]:
            table += rows(line)
            print(*table[-1], flush=True)
    print()
    print_table(HEADER, table)


if __name__ == "__main__":
    main()
