"""Machines that a plan is made for: what a device computes, holds and reads, and how devices are joined.

In: data sheets, and efficiencies fitted in plan.published. Out: frozen descriptions that the memory and time models
read. Called by plan.search and the command line.

Peaks are dense (no sparsity). Bandwidths of links are per device and direction. `assumed` names the fields that are
neither from a data sheet nor fitted; everything else is.
"""

from __future__ import annotations

import dataclasses
import os
import time
from dataclasses import dataclass

import torch

from tessera.errors import InputError

GB = 1e9
GIB = 2**30

# Shares of the peak that real training reaches, fitted by plan.published.fit (its docstring says on which rows).
MATMUL_EFFICIENCY = 0.717
FP8_EFFICIENCY = 0.604
HBM2E_CLOCK = 0.586


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of device, and the network that joins many.

    Attributes:
        name: as the command line gives it.
        peak_f32, peak_bf16, peak_fp8: dense FLOP/s of one device; 16-bit floats share peak_bf16.
        memory_bytes, memory_bandwidth: of one device, in bytes and bytes/s.
        devices_per_node: devices joined by the fast links ("intra"); other pairs talk over the network ("inter").
        intra_bandwidth, inter_bandwidth: bytes/s per device and direction.
        intra_latency, inter_latency: seconds of one message.
        matmul_efficiency, fp8_efficiency: share of the peak that large matmuls reach, 16/32-bit and 8-bit.
        attention_efficiency: the same for blockwise (flash) attention, of peak_bf16.
        memory_efficiency, link_efficiency: share of the bandwidths that is reached.
        clock: share of the peaks that a power limit leaves.
        reserved_bytes: memory that the driver, the libraries and the collectives' buffers keep.
        assumed: names of the fields that are assumptions.

    Raises:
        InputError: a number that cannot be.
    """

    name: str
    peak_f32: float
    peak_bf16: float
    peak_fp8: float
    memory_bytes: float
    memory_bandwidth: float
    devices_per_node: int
    intra_bandwidth: float
    inter_bandwidth: float
    intra_latency: float = 5e-6
    inter_latency: float = 12e-6
    matmul_efficiency: float = MATMUL_EFFICIENCY
    fp8_efficiency: float = FP8_EFFICIENCY
    attention_efficiency: float = 0.5
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.75
    clock: float = 1.0
    reserved_bytes: float = 3 * GIB
    assumed: tuple[str, ...] = (
        "intra_latency", "inter_latency", "attention_efficiency", "memory_efficiency", "link_efficiency",
        "reserved_bytes")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "assumed"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise InputError(f"{field.name}: {value!r} given; expected a number of at least 0")
            if not value and field.name not in ("intra_latency", "inter_latency", "reserved_bytes", "peak_fp8"):
                raise InputError(f"{field.name}: 0 given; expected a number above 0")
            if ("efficiency" in field.name or field.name == "clock") and value > 1:
                raise InputError(f"{field.name}: {value} given; expected a share of at most 1")

    def matmul_flops(self, dtype: str) -> float:
        """FLOP/s that large matmuls reach: dtype "f32", "bf16", "f16" or "fp8".

        Raises:
            InputError: the machine does not multiply this type.
        """
        peaks = {"f32": self.peak_f32, "bf16": self.peak_bf16, "f16": self.peak_bf16, "fp8": self.peak_fp8}
        if not peaks.get(dtype):
            known = ", ".join(name for name, peak in peaks.items() if peak)
            raise InputError(f"matmul_dtype: {dtype!r} given; {self.name} multiplies {known}")
        efficiency = self.fp8_efficiency if dtype == "fp8" else self.matmul_efficiency
        return peaks[dtype] * efficiency * self.clock

    def attention_flops(self, *, flash: bool, dtype: str) -> float:
        """FLOP/s of the two products of attention, in `dtype` or bf16 where that is "fp8"."""
        dtype = "bf16" if dtype == "fp8" else dtype
        reached = self.matmul_flops(dtype)
        return reached * (self.attention_efficiency / self.matmul_efficiency if flash else 1.0)

    @property
    def memory_speed(self) -> float:
        """Bytes/s that streaming kernels reach."""
        return self.memory_bandwidth * self.memory_efficiency


A100 = Machine(
    name="a100", peak_f32=19.5e12, peak_bf16=312e12, peak_fp8=0, memory_bytes=80 * GB, memory_bandwidth=2.039e12,
    devices_per_node=8, intra_bandwidth=300 * GB, inter_bandwidth=25 * GB)
H100 = Machine(
    name="h100", peak_f32=67e12, peak_bf16=989e12, peak_fp8=1979e12, memory_bytes=80 * GB, memory_bandwidth=3.35e12,
    devices_per_node=8, intra_bandwidth=450 * GB, inter_bandwidth=50 * GB)
# torchtitan's H100s: 96 GB of HBM2e and 500 W, as its benchmark page says; the clock is fitted, and
# stands for whatever else that stack does not reach.
H100_500W = dataclasses.replace(
    H100, name="h100-500w", memory_bytes=96 * GB, memory_bandwidth=2.4e12, clock=HBM2E_CLOCK)
H200 = dataclasses.replace(H100, name="h200", memory_bytes=141 * GB, memory_bandwidth=4.8e12)
GB200_NVL72 = Machine(
    name="gb200-nvl72", peak_f32=80e12, peak_bf16=2500e12, peak_fp8=5000e12, memory_bytes=186 * GB,
    memory_bandwidth=8e12, devices_per_node=72, intra_bandwidth=900 * GB, inter_bandwidth=50 * GB)
GB300_NVL72 = dataclasses.replace(
    GB200_NVL72, name="gb300-nvl72", memory_bytes=279 * GB, inter_bandwidth=100 * GB)

MACHINES = {machine.name: machine for machine in (A100, H100, H100_500W, H200, GB200_NVL72, GB300_NVL72)}
ALIASES = {"nvl72": "gb200-nvl72", "gb200": "gb200-nvl72", "gb300": "gb300-nvl72"}


def machine_named(name: str) -> Machine:
    """A preset, or "cpu": this machine, measured.

    Raises:
        InputError: there is no such preset.
    """
    if name == "cpu":
        return this_cpu()
    name = ALIASES.get(name, name)
    if name not in MACHINES:
        raise InputError(f"machine: {name!r} given; expected one of {', '.join([*MACHINES, *ALIASES, 'cpu'])}")
    return MACHINES[name]


def this_cpu() -> Machine:
    """This computer as one device: matmul and memory speeds measured (about 0.3 s), the network assumed.

    The measured speeds are what torch reaches, so that the efficiencies are 1.
    """
    a = torch.ones(1024, 1024)
    half = a.bfloat16()[:256]
    stream = torch.ones(2**25)
    return Machine(
        name="cpu",
        peak_f32=2 * 1024**3 / _fastest(lambda: a @ a),
        peak_bf16=2 * 256 * 256 * 1024 / _fastest(lambda: half @ half.T),
        peak_fp8=0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_bandwidth=stream.nbytes / _fastest(lambda: stream.sum()),
        devices_per_node=1, intra_bandwidth=5 * GB, inter_bandwidth=1 * GB, inter_latency=50e-6,
        matmul_efficiency=1.0, memory_efficiency=1.0, attention_efficiency=0.7, reserved_bytes=GIB / 2,
        assumed=("peak_fp8", "intra_bandwidth", "inter_bandwidth", "intra_latency", "inter_latency",
                 "attention_efficiency", "link_efficiency", "reserved_bytes"))


def _fastest(work) -> float:
    """Seconds of the best of four runs, after one to warm up."""
    work()
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
