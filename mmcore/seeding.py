"""Randomness as a function of names, not of history.

Every random choice is drawn from a generator keyed by what it belongs to, such as (seed, epoch, image_id).
Nothing depends on which worker draws it, in what order, or after which restart, so there is no generator
state to save: it is rebuilt from its key.
"""

import hashlib
import random

import numpy as np
import torch

# Of an image: torch's generator on a CPU looks at 32 bits, and larger seeds that are equal there give equal noise.
MAX_IMAGE_SEED = 2**32 - 1


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from SHA-256 over (seed, keys); equal on every machine and Python version."""
    text = "\x1f".join(str(part) for part in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for the thing that `keys` name."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def uniform(seed: int, *keys: int | str) -> float:
    """A number in [0, 1) for the thing that `keys` name."""
    return derive_seed(seed, *keys) / 2**63


def permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in `epoch`: int64 of shape (num_rows,)."""
    return np.random.default_rng(derive_seed(seed, "permutation", epoch)).permutation(num_rows)


def seed_step(*key: int | str) -> None:
    """Set the generator of every library for one step."""
    seed = derive_seed(0, *key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
