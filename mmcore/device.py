"""The hardware of this process, and the thread that computes."""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch


def device_name(kind: str | None = None) -> str:
    """The model of the GPU, else the model of the CPU with its number of cores. `kind` "cpu" ignores a GPU."""
    if kind != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def compute_thread(num_threads: int) -> ThreadPoolExecutor:
    """A pool of one thread that loads a model and computes with it, on `num_threads` CPU threads.

    Call PyTorch from no other thread of the process. OpenMP keeps a team of threads for each calling thread. If the
    teams together have more threads than there are cores, they sleep after each kernel. On two cores, a second team
    made a small U-Net 1.7 times as slow.
    """
    # This call fixes the number for the calling thread. Otherwise it would inherit the number set below.
    torch.get_num_threads()
    # Set in the new thread, as the number is stored per thread.
    return ThreadPoolExecutor(1, "compute", torch.set_num_threads, (num_threads,))
