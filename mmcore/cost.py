"""What an image costs, counted on the true architecture, and the time that a device needs for it.

The operations are counted by PyTorch's FlopCounterMode on the meta device, which holds no weights. A product and a sum
are two operations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmcore.devices import Device

REACHED = (0.37, 0.54)
"""Shares of the peak that published measurements of SDXL reach on an A100: eager at 50 steps, and compiled."""


@dataclass(frozen=True)
class Cost:
    """The cost of one image, and of the weights that a batch reads."""

    flops: Mapping[str, float]
    """Operations of each part for one image."""
    weights_read: float
    """Parameters that are read for a batch, once in each forward pass of their part."""

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


@dataclass(frozen=True)
class Estimate:
    """Seconds an image."""

    bound_s: float
    """No run is faster: the peak is reached, or all weights are read at the full bandwidth."""
    predicted_s: float
    """At the stated share of the peak, or the bound where that is longer."""
    limit: str
    """``compute`` or ``memory``: which bound is the longer one."""


def count_flops(forward: Callable[[], object]) -> float:
    """Operations of matrix products, convolutions and attention in `forward`, which computes on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return float(counter.get_total_flops())


def estimate(cost: Cost, device: Device, *, batch_size: int, bytes_per_weight: int, mfu: float) -> Estimate:
    """The time for an image on one device.

    Args:
        bytes_per_weight: 2 for bf16 and fp16.
        mfu: share of the device's peak that is reached, above 0 and at most 1.
    """
    peak = device.peak_tflops * 1e12
    compute_s = cost.total_flops / peak
    memory_s = cost.weights_read * bytes_per_weight / batch_size / (device.bandwidth * 1e9)
    bound_s = max(compute_s, memory_s)
    return Estimate(bound_s, max(bound_s, compute_s / mfu), "compute" if compute_s >= memory_s else "memory")


def share_of_peak(cost: Cost, device: Device, seconds: float) -> float:
    """The share of the device's peak (MFU) that an image in `seconds` needs."""
    return cost.total_flops / seconds / (device.peak_tflops * 1e12)
