"""The hardware of this process, and the thread that computes."""

import functools
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def free_memory(device: torch.device) -> int:
    """Bytes that a process can still take: of the GPU, else of the machine."""
    if device.type == "cuda":
        # What PyTorch holds for itself and does not use is free too.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    info = Path("/proc/meminfo")
    if info.exists():
        available = [line.split()[1] for line in info.read_text().splitlines() if line.startswith("MemAvailable:")]
        return int(available[0]) * 1024
    # Another system than Linux tells the pages of the machine only.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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


@functools.cache
def _onednn_stays_in_fp32() -> bool:
    """Whether oneDNN computes a product of fp32 in fp32 where it may round to bf16: with AVX-512, but without AMX."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_f")) and not any(can.get(name) for name in ("amx_tile", "amx_bf16", "avx10_2"))


@contextmanager
def fast_products() -> Iterator[None]:
    """Within the block, fp32 matrix products on a CPU are computed by oneDNN instead of MKL, where that stays in fp32.

    One thread of an AMD EPYC computed 784 x 576 times 576 x 1536 at 240 instead of 106 GFLOP/s (PyTorch 2.13). The
    relative error was 1.3e-6 instead of 6e-7. PyTorch has one switch for it, a precision that permits bf16. With AMX
    oneDNN does round to bf16, so nothing is changed there.
    """
    if not _onednn_stays_in_fp32():
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
