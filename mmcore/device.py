"""What a computation ran on, in words."""

import os
import platform
from pathlib import Path

import torch


def device_name(kind: str | None = None) -> str:
    """The model of the GPU, or of the CPU with its number of cores; `kind` "cpu" asks for the CPU in any case."""
    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"
