"""The frozen image encoder of a finished run, which is read by name and not saved with the run."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmcore.captioners.facts import tokens_of
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder
from mmcore.run_files import RunFile
from mmcore.storage import Storage


def encoder_name(recipe: Any, given: str | None) -> str | None:
    """The encoder to load: `given`, or that of the recipe. None if the run trained its own.

    The path of a folder is absolute, as the encoder may be loaded in another working directory. Raises InputError for
    an encoder that is given where the run trained its own.
    """
    if recipe.encoder != SCRATCH:
        return absolute_folder(given or recipe.encoder)
    if given is not None:
        raise InputError(f"--encoder {given!r}: this run trained its own encoder; leave the flag out")
    return None


def load_encoder(name: str | None, run: Storage, file: RunFile[Any, Any], device: str) -> FrozenVisionEncoder | None:
    """The encoder `name`; None for None. Raises InputError if `run` was trained on another one."""
    if name is None:
        return None
    encoder = FrozenVisionEncoder(name, file.recipe.image_size, device, tokens=tokens_of(file.recipe))
    if encoder.fingerprint() != file.facts.encoder_fingerprint:
        raise InputError(f"--encoder {name!r}: {run} was trained on another encoder; name that one")
    return encoder


def image_inputs(pixels: np.ndarray, encoder: FrozenVisionEncoder | None, device: str | torch.device) -> Tensor:
    """What a model takes of images, uint8 (B, P, P, 3): the tokens of its frozen encoder (B, L, E), or the pixels."""
    return torch.from_numpy(pixels).to(device) if encoder is None else encoder(pixels)
