"""Random generators with keys instead of state.

Every random choice comes from a generator with a key, such as (seed, epoch, image_id). The result does not depend on
the worker, the order of draws, or restarts. No generator state is saved: a generator is rebuilt from its key.
"""

import hashlib
import random

import numpy as np
import torch

# torch's CPU generator uses the lower 32 bits of a seed. Two larger seeds could give equal noise.
MAX_IMAGE_SEED = 2**32 - 1


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from SHA-256 over (seed, keys); equal on every machine and Python version."""
    text = "\x1f".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for (seed, keys)."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def uniform(seed: int, *keys: int | str) -> float:
    """A uniform number in [0, 1) for (seed, keys)."""
    return derive_seed(seed, *keys) / 2**63


def permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in `epoch`: int64 of shape (num_rows,)."""
    return np.random.default_rng(derive_seed(seed, "permutation", epoch)).permutation(num_rows)


def seed_step(*key: int | str) -> None:
    """Seed the global generators of Python, NumPy and PyTorch for one step."""
    seed = derive_seed(0, *key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
