"""What a model's replica has of its machine."""

import os
from concurrent.futures import ThreadPoolExecutor

import ray
import torch

from serve.limits import Limits


def device() -> str:
    """`cuda` where Ray gave this process a GPU.

    Not where one is visible: Ray leaves all of them so for a process that asked for none (`gpus=0`), and the first one
    may be another's.
    """
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"


def num_threads(limits: Limits) -> int:
    """CPU threads of a model."""
    return limits.model_threads or len(os.sched_getaffinity(0))


def model_thread(limits: Limits) -> ThreadPoolExecutor:
    """The one thread in which a model is loaded and works.

    OpenMP keeps a team of threads for each thread that calls it, and where the teams together are more than the cores,
    theirs go to sleep after each kernel: on two cores a small U-Net was 1.7 times as slow while the thread of the
    requests had one, too. So nothing of PyTorch's is computed in any other.
    """
    # In the thread itself: torch keeps the number by thread.
    return ThreadPoolExecutor(1, "model", torch.set_num_threads, (num_threads(limits),))
