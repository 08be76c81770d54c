"""What the CPU backend may assume of the processor it generates code for.

In: the host as LLVM sees it, or the choice in TESSERA_CPU. Out: a `Target`, read by the lowering, the matmul
kernels and `jit.py`; its `key` goes into the names of cached objects.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm

from tessera import env
from tessera.errors import UnsupportedError

_AVX2 = frozenset({"avx", "avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_SERVER = _AVX512 | {"avx512bf16", "avx512vnni"}
_NAMED = {"x86-64": frozenset(), "x86-64-v3": _AVX2, "x86-64-v4": _AVX512, "znver4": _SERVER,
          "sapphirerapids": _SERVER}
_CHOICES = {"generic": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
_DEFAULT_CACHES = {1: 32 << 10, 2: 512 << 10, 3: 8 << 20}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A processor: LLVM's names for it, the vectors it has, and its caches.

    `vector_bits` is the natural vector width, `vector_registers` how many such registers there are; `l1`, `l2`
    (of one core) and `l3` are data cache sizes in bytes. With `emulates_dots`, plain arithmetic stands in for the
    dot instructions, so that tests can run the code around them anywhere.
    """

    triple: str
    cpu: str
    features: str
    vector_bits: int
    vector_registers: int
    has_fma: bool
    has_avx2: bool = False
    has_f16: bool = True
    has_avx512: bool = False
    has_avx512bf16: bool = False
    has_vnni: bool = False
    emulates_dots: bool = False
    l1: int = _DEFAULT_CACHES[1]
    l2: int = _DEFAULT_CACHES[2]
    l3: int = _DEFAULT_CACHES[3]

    @property
    def key(self) -> str:
        """Identifies the code that is generated for this target (block sizes follow the caches)."""
        emulated = f" {self.has_avx512bf16} {self.has_vnni}" if self.emulates_dots else ""
        return f"{self.triple} {self.cpu} {self.features} {self.l1} {self.l2} {self.l3}{emulated}"

    def lanes(self, bits: int) -> int:
        """How many elements of this width the natural vector holds."""
        return self.vector_bits // bits


@cache
def target(choice: str = "") -> Target:
    """The processor to generate for.

    Args:
        choice: host, avx512, avx2, generic (as TESSERA_CPU, which is read when this is empty), or the LLVM name
            of an x86 processor out of x86-64, x86-64-v3, x86-64-v4, znver4, sapphirerapids.

    Raises:
        UnsupportedError: an x86 target was asked for on another architecture.
    """
    if not choice:
        return target(env.get("TESSERA_CPU"))
    l1, l2, l3 = (_cache_bytes(level) for level in (1, 2, 3))
    triple = llvm.get_process_triple()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if choice == "host" or (choice == "generic" and not x86):
        names = _host_features()
        features = llvm.get_host_cpu_features().flatten() if choice == "host" else ""
        cpu = llvm.get_host_cpu_name() if choice == "host" else "generic"
    elif x86:
        cpu, features = _CHOICES.get(choice, choice), ""
        names = _NAMED[cpu]
    else:
        raise UnsupportedError(f"TESSERA_CPU={choice}: this machine is {platform.machine()}; use host or generic")
    wide = names >= _AVX512
    return Target(
        triple=triple, cpu=cpu, features=features, l1=l1, l2=l2, l3=l3,
        vector_bits=512 if wide else 256 if "avx2" in names else 128,
        vector_registers=16 if x86 and not wide else 32,
        has_fma="fma" in names or not x86, has_avx2="avx2" in names, has_f16="f16c" in names or not x86,
        has_avx512=wide, has_avx512bf16=wide and "avx512bf16" in names, has_vnni=wide and "avx512vnni" in names)


def runs_here(target: Target) -> bool:
    """Whether code for the target can be executed on this machine."""
    if target.features or not target.cpu.startswith(("x86-64", "znver4", "sapphirerapids")):
        return True  # read from this machine, or a baseline
    return _host_features() >= _NAMED[target.cpu]


@cache
def _host_features() -> frozenset[str]:
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def _cache_bytes(level: int) -> int:
    """The size of cpu0's data cache of a level; a common size where the system does not say."""
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if int((entry / "level").read_text()) == level and (entry / "type").read_text().strip() != "Instruction":
                return int((entry / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return _DEFAULT_CACHES[level]
