"""What a model's replica has of its machine."""

import os

import ray

from serve.limits import Limits
from serve.ray_private import cpus


def device() -> str:
    """`cuda` if Ray assigned a GPU to this process.

    A visible GPU is not enough. Without a request (`gpus=0`) Ray leaves all GPUs visible, and the first one may belong
    to another process.
    """
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"


def num_threads(limits: Limits) -> int:
    """CPU threads of a model: by default as many as its affinity and the quota of its container allow.

    More than the quota would be throttled together whenever they have used it up.
    """
    return limits.model_threads or max(1, min(len(os.sched_getaffinity(0)), cpus()))
