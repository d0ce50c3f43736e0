"""The network of a finished run, with the weights that the run keeps."""

from typing import Any

import torch

from mmcore import checkpoint
from mmcore.errors import OptionError
from mmcore.run_files import RunFile, read_weights
from mmcore.storage import Storage


def load_network(run: Storage, file: RunFile[Any, Any], device: torch.device) -> Any:
    """What the recipe of `file` builds, frozen, on `device`.

    Raises InputError where the weights are others than `file` names, or not of that recipe.
    """
    model = file.recipe.build(file.facts)
    if hasattr(model, "load_frozen"):
        model.load_frozen()
    checkpoint.load_trainable(model, read_weights(run, file.weights_sha256), str(run))
    return model.eval().requires_grad_(False).to(device)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise OptionError for a precision in which the networks of runs do not compute."""
    if dtype not in (torch.float32, torch.bfloat16):
        raise OptionError("dtype", f"{str(dtype).removeprefix('torch.')}: a run computes in float32 or bfloat16")
