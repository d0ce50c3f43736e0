"""What a model's replica has of its machine."""

import os

import ray

from serve.limits import Limits
from serve.ray_private import cpus


def device() -> str:
    """`cuda` where Ray gave this process a GPU.

    Not where one is visible: Ray leaves all of them so for a process that asked for none (`gpus=0`), and the first one
    may be another's.
    """
    return "cuda" if ray.is_initialized() and ray.get_gpu_ids() else "cpu"


def num_threads(limits: Limits) -> int:
    """CPU threads of a model: by default as many as its affinity and the quota of its container allow.

    More than the quota would be throttled together whenever they have used it up.
    """
    return limits.model_threads or max(1, min(len(os.sched_getaffinity(0)), cpus()))
