"""The scope on one screen: the name of a recipe -> its settings. A run folder's recipe.json holds that name."""

from typing import Any

from mmcore.captioners.cross_attention import CrossAttentionCaptionerRecipe
from mmcore.generators.latent_diffusion import LatentDiffusionRecipe
from mmcore.generators.pixel_diffusion import PixelDiffusionRecipe
from mmcore.generators.vqvae import VQVAERecipe

CAPTIONERS: dict[str, Any] = {
    "resnet_captioner": CrossAttentionCaptionerRecipe,
}
GENERATORS: dict[str, Any] = {
    "pixel_diffusion": PixelDiffusionRecipe,
    "ldm": LatentDiffusionRecipe,
}
AUTOENCODERS: dict[str, Any] = {
    "vqvae": VQVAERecipe,
}
