"""What an image of SDXL costs: the operations of its parts for a size and a number of steps."""

import functools

import torch

from mmcore.cost import Cost, count_flops
from mmcore.generators.sdxl import FACTOR, FULL, NUM_TOKENS, SdxlSizes, build


@functools.cache
def _counted(sizes: SdxlSizes, height: int, width: int) -> tuple[dict[str, float], dict[str, int]]:
    """Operations and parameters of each part for one forward pass. It takes some seconds."""
    with torch.device("meta"):
        unet, vae, text, text_2 = build(sizes)
        latent_B4hw = torch.empty(1, 4, height // FACTOR, width // FACTOR)
        tokens_BT = torch.zeros(1, NUM_TOKENS, dtype=torch.long)
        hidden_BTD = torch.empty(1, NUM_TOKENS, sizes.text_width)
        added = {"text_embeds": torch.empty(1, sizes.text_2.projection or 0), "time_ids": torch.empty(1, 6)}
        flops = {
            "unet": count_flops(
                lambda: unet(latent_B4hw, torch.empty(1), hidden_BTD, added_cond_kwargs=added, return_dict=False)
            ),
            "vae": count_flops(lambda: vae.decode(latent_B4hw)),
            "text": count_flops(lambda: (text(tokens_BT), text_2(tokens_BT))),
        }
    numbers = {"unet": [unet], "vae": [vae.decoder, vae.post_quant_conv], "text": [text, text_2]}
    return flops, {
        name: sum(weight.numel() for part in parts for weight in part.parameters()) for name, parts in numbers.items()
    }


def image_cost(
    sizes: SdxlSizes = FULL,
    *,
    height: int = 1024,
    width: int = 1024,
    steps: int = 50,
    guided_steps: int | None = None,
) -> Cost:
    """The cost of one image: both text encoders, the U-Net's steps and the VAE's decoder.

    Args:
        height, width: of the image in pixels.
        steps: forward passes of the U-Net.
        guided_steps: steps with guidance, which compute the U-Net twice; None guides all.
    """
    flops, parameters = _counted(sizes, height, width)
    guided = steps if guided_steps is None else guided_steps
    texts = 2 if guided else 1
    return Cost(
        {"text": texts * flops["text"], "unet": (steps + guided) * flops["unet"], "vae": flops["vae"]},
        weights_read=parameters["text"] + steps * parameters["unet"] + parameters["vae"],
    )
