"""The device and the CPU threads of a model's replica."""

import os

import ray

from serve.limits import Limits
from serve.ray_private import cpus


def device() -> str:
    """`cuda` if Ray assigned a GPU to this process.

    A visible GPU is not enough. Ray hides none from a process that asked for none (`gpus=0`), and the first one may
    belong to another process.
    """
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"


def num_threads(limits: Limits) -> int:
    """CPU threads of a model: by default as many as its affinity and the quota of its container allow.

    With more threads than the quota, all of them would be stopped whenever the quota is used up.
    """
    return limits.model_threads or max(1, min(len(os.sched_getaffinity(0)), cpus()))
