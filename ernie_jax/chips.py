"""What the vendors publish of each chip: memory, bandwidth, arithmetic, links.

TPUs: Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)". Editions of a page differ
in two figures: v5e's bandwidth is 819 GB/s or 800 GiB/s, v5p's 2,765 GB/s or 2,575 GiB/s; the first is taken. They give
a chip's links as the sum of both directions, 1,200 GB/s for v5p, here halved and divided among the ports. v4's page has
none: the 50 GB/s a port are those of "TPU v4: An Optically Reconfigurable Supercomputer" (ISCA 2023) as others quote
it. What a program can use of the memory is what libtpu's compiler states when one needs more.

GPUs: NVIDIA's data sheets as other pages quote them (the sheets themselves were not at hand); SXM boards where there
are several; arithmetic without sparsity; NVLink, or PCIe for the L4, again one of the two directions.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Describe one kind of chip; figures are of a whole chip unless they say "device", JAX's unit.

    Attributes:
      name: as in a topology's name.
      title: for people.
      platform: tpu or gpu.
      memory: bytes, as published.
      device_memory: bytes of it that a program can use on one device.
      bandwidth: of the memory, bytes/s.
      flops: dense bfloat16, 1/s.
      flops_8bit: dense int8 or fp8, whichever is faster, 1/s; None if not published.
      ports: links to neighbours; a GPU's go to a switch that joins them all, and count as one.
      port_bandwidth: of one port in one direction, bytes/s.
      devices: JAX devices on a chip, each with an equal share.
      host_chips: the most chips that one host has.
      most_chips: the largest slice, or the most GPUs of one host.
    """

    name: str
    title: str
    platform: str
    memory: float
    device_memory: float
    bandwidth: float
    flops: float
    flops_8bit: float | None
    ports: int
    port_bandwidth: float
    host_chips: int
    most_chips: int
    devices: int = 1

    @property
    def device_bandwidth(self) -> float:
        return self.bandwidth / self.devices

    @property
    def device_flops(self) -> float:
        return self.flops / self.devices


def _tpu(name, title, memory, usable, bandwidth, flops, flops_8bit, ports, port, host_chips, most_chips, devices=1):
    memory, usable = memory * GIB, usable * GIB
    return Chip(
        name, title, "tpu", memory, usable, bandwidth, flops, flops_8bit, ports, port, host_chips, most_chips, devices
    )


def _gpu(name, title, memory, bandwidth, flops, flops_8bit, link):
    # JAX takes the fraction of the memory that the command line sets, 0.95; a driver reports a little more than 80e9.
    return Chip(name, title, "gpu", memory, 0.95 * memory, bandwidth, flops, flops_8bit, 1, link, 8, 8)


CHIPS: Mapping[str, Chip] = types.MappingProxyType({
    chip.name: chip
    for chip in (
        # One device a chip, as Cloud TPUs run it (megacore).
        _tpu("v4", "TPU v4", 32, 30.75, 1.2e12, 275e12, 275e12, 6, 50e9, 4, 4096),
        _tpu("v5e", "TPU v5e", 16, 15.75, 819e9, 197e12, 393e12, 4, 50e9, 8, 256),
        _tpu("v5p", "TPU v5p", 95, 95.73, 2.765e12, 459e12, 459e12, 6, 100e9, 4, 6144),
        _tpu("v6e", "TPU v6e", 32, 31.24, 1.638e12, 918e12, 1836e12, 4, 100e9, 8, 256),
        _tpu("tpu7x", "TPU7x", 192, 94.74, 7.38e12, 2307e12, 4614e12, 6, 100e9, 4, 9216, devices=2),
        _gpu("l4", "NVIDIA L4", 24e9, 300e9, 121e12, 242e12, 32e9),
        _gpu("a100-40", "NVIDIA A100 40 GB", 40e9, 1.555e12, 312e12, 624e12, 300e9),
        _gpu("a100-80", "NVIDIA A100 80 GB", 80e9, 2.039e12, 312e12, 624e12, 300e9),
        _gpu("h100", "NVIDIA H100", 80e9, 3.35e12, 989e12, 1979e12, 450e9),
        _gpu("h200", "NVIDIA H200", 141e9, 4.8e12, 989e12, 1979e12, 450e9),
        _gpu("b200", "NVIDIA B200", 180e9, 8e12, 2250e12, 4500e12, 900e9),
    )
})  # fmt: skip


_TPU_KINDS = {
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v4": "v4",
    "TPU7x": "tpu7x",
}


def find(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls so, if it is a known one."""
    if device_kind in _TPU_KINDS:
        return CHIPS[_TPU_KINDS[device_kind]]
    if "A100" in device_kind:
        return CHIPS["a100-80" if "80" in device_kind else "a100-40"]
    return next((chip for chip in CHIPS.values() if chip.platform == "gpu" and chip.title in device_kind), None)
