"""What a computation runs on."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
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


def compute_thread(num_threads: int) -> ThreadPoolExecutor:
    """The one thread of a process that loads a model and computes with it, on `num_threads` threads of the CPU.

    OpenMP keeps a team of threads for each thread that calls it, and where the teams together are more than the cores,
    theirs go to sleep after each kernel: on two cores a small U-Net was 1.7 times as slow while a second thread had a
    team, too. So nothing of PyTorch's is to be computed in any other.
    """
    # Who asks keeps its number by that: a thread that has not computed yet would take over what another one sets.
    torch.get_num_threads()
    # In the thread itself: the number is kept by thread.
    return ThreadPoolExecutor(1, "compute", torch.set_num_threads, (num_threads,))
