"""A trained tokenizer as an official file of Infinity."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmcore.data.pixels import to_network
from mmcore.errors import InputError
from mmcore.generators.bsq import quantize
from mmcore.generators.infinity_vae import InfinityVaeSettings
from mmcore.generators.infinity_weights import load_vae
from mmcore.trained.autoencoder import TrainedInfinityTokenizer

FILE_NAME = "vae.safetensors"
_NUM_IMAGES = 2


def save_official(trained: TrainedInfinityTokenizer, folder: str) -> None:
    """Write FILE_NAME into `folder`: the weights under their official names, in fp32.

    Raises InputError for a tokenizer with other kinds of layers than the official one. Widths may differ: the official
    code itself builds a width of 128 alone.
    """
    recipe, official = trained.recipe, InfinityVaeSettings()
    for name in ("norm_groups", "encoder", "patch_size"):
        has, needed = getattr(recipe, name), getattr(official, name)
        if has != needed:
            flag = "--" + name.replace("_", "-")
            raise InputError(
                f"{name} {has}: this tokenizer cannot be exported, as official files have {needed}; train one with "
                f"{flag} {needed}"
            )
    state = {name: value.float().contiguous() for name, value in trained.model.state_dict().items()}
    # A constant that the official code looks for: the value of each bit in an index.
    state["quantizer.lfq.mask"] = 2 ** torch.arange(recipe.num_bits - 1, -1, -1)
    save_file(state, Path(folder) / FILE_NAME)


def tokenizer_difference(trained: TrainedInfinityTokenizer, folder: str) -> float:
    """Largest difference of the images that the file makes of random ones, for values from 0 to 1."""
    random = torch.Generator().manual_seed(0)
    size = trained.image_size
    pixels = torch.randint(256, (_NUM_IMAGES, size, size, 3), generator=random).to(torch.uint8)
    theirs = load_vae(str(Path(folder) / FILE_NAME), "--out").eval()
    with torch.inference_mode():
        total: Tensor = quantize(theirs.encode(to_network(pixels)), trained.grids).latents_BdHW
        made = theirs.decode(total)
    return ((made - trained.reconstruct(pixels.numpy())).abs().max() / 2).item()
