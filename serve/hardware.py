"""What a model's replica has of its machine."""

import os

import ray

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
