"""Pretrained models in the form of Hugging Face, by the hub's name or from a local folder: whole, frozen, quiet."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcore.errors import InputError

# What recipes say instead of a model's name. A folder of such a name is none of theirs.
_NO_MODELS = ("scratch", "words")


@contextmanager
def quiet_load() -> Iterator[None]:
    """transformers without its bar and its report on weights, which every process that loads one would print."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_frozen(name: str, choose: Callable[[Any], Any], *, flag: str, what: str) -> Any:
    """The model `name` in fp32, for inference, without gradients. `choose(config)` gives the class that loads it.

    Raises InputError, naming `flag`, where there is no such model (`what` says of which kind) or weights are missing.
    """
    from transformers import AutoConfig

    try:
        # Said wherever something is loaded: left out, transformers asks on a terminal whether to run code from outside.
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with quiet_load():
            model, loaded = choose(config).from_pretrained(
                name, use_safetensors=True, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{flag} {name!r}: no {what} in such a folder, and none by that name can be had ({reason})"
        ) from None
    # Weights that are left over (a classifier's head) are none of ours; missing ones would be random. A pooler comes
    # after the last hidden state, which is all that is used.
    missing = sorted(key for key in loaded["missing_keys"] if "pooler" not in key)
    if missing:
        raise InputError(f"{flag} {name!r}: {len(missing)} weights are missing there, such as {missing[0]}")
    return model.eval().requires_grad_(False)


def sha256_of(model: nn.Module, facts: Any) -> str:
    """SHA-256 over `facts` (JSON, whatever its order) and all weights and buffers of `model`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def absolute_folder(name: str) -> str:
    """A local folder's absolute path, since a worker's working directory is not the driver's; other names as is."""
    return str(Path(name).absolute()) if name not in _NO_MODELS and Path(name).is_dir() else name
