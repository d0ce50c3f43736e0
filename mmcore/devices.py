"""Accelerators with their published limits, for estimates and for the share of the peak that a run reached."""

from dataclasses import dataclass

from mmcore.errors import InputError


@dataclass(frozen=True)
class Device:
    """Limits that the maker publishes."""

    name: str
    peak_tflops: float
    """Dense bf16 or fp16 products with sums in fp32, in 10^12 operations per second, without sparsity."""
    bandwidth: float
    """Memory bandwidth in 10^9 bytes per second."""
    memory: float
    """Memory in 10^9 bytes."""
    source: str
    """Where the maker publishes it."""


_NVIDIA = "https://www.nvidia.com/en-us/"
DEVICES: dict[str, Device] = {
    "t4": Device("Tesla T4", 65.1, 320, 16, _NVIDIA + "data-center/tesla-t4/"),
    "v100": Device("Tesla V100 SXM2", 125, 900, 32, _NVIDIA + "data-center/v100/"),
    "rtx3090": Device("GeForce RTX 3090", 71, 936, 24, _NVIDIA + "geforce/graphics-cards/30-series/rtx-3090-3090ti/"),
    "rtx4090": Device("GeForce RTX 4090", 165.2, 1008, 24, _NVIDIA + "geforce/graphics-cards/40-series/rtx-4090/"),
    "a6000": Device("RTX A6000", 154.8, 768, 48, _NVIDIA + "design-visualization/rtx-a6000/"),
    "l4": Device("L4", 121, 300, 24, _NVIDIA + "data-center/l4/"),
    "l40s": Device("L40S", 362, 864, 48, _NVIDIA + "data-center/l40s/"),
    "a100": Device("A100 SXM 80GB", 312, 2039, 80, _NVIDIA + "data-center/a100/"),
    "h100": Device("H100 SXM", 989, 3350, 80, _NVIDIA + "data-center/h100/"),
    "h200": Device("H200 SXM", 989, 4800, 141, _NVIDIA + "data-center/h200/"),
    "b200": Device("B200 SXM", 2250, 8000, 180, _NVIDIA + "data-center/b200/"),
}
"""By the name that a command gives."""


# Forms of a device that are slower than the one in the table.
_OTHER_FORMS = {"pcie", "nvl", "laptop", "max"}


def device_of(name: str) -> Device:
    """The device of this name. Raises InputError for one that is not in the table."""
    if name.lower() not in DEVICES:
        raise InputError(f"device {name!r} is not known; choose one of {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def known_device(full_name: str) -> Device | None:
    """The device that a driver calls `full_name`, such as ``NVIDIA H200``, or None."""
    words = full_name.lower().replace("-", " ").split()
    if not _OTHER_FORMS.isdisjoint(words):
        return None
    for short, device in DEVICES.items():
        wanted = device.name.lower().split()
        model = [word for word in wanted if any(letter.isdigit() for letter in word)][:1]
        if short in words or (model and model[0] in words and ("rtx" in words) == ("rtx" in wanted)):
            return device
    return None
