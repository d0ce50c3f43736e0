"""The protocol of diffusion recipes and the check of their settings."""

from typing import Protocol

from mmcore.errors import InputError, check_at_least_one, check_share
from mmcore.generators.denoiser import Denoiser, UNetSettings
from mmcore.generators.diffusion import NoiseSchedule
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.text_context import TextSettings
from mmcore.recipe import Recipe


class DiffusionRecipe(Recipe, Protocol):
    """The common fields of diffusion recipes. A recipe for pixels also has `image_size`, one for latents `vqvae`."""

    @property
    def captions_per_image(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def drop_text(self) -> float:
        """Share of the captions that are replaced by the empty text, for classifier-free guidance."""

    @property
    def sample_steps(self) -> int: ...
    @property
    def sample_guidance(self) -> float: ...
    @property
    def unet(self) -> UNetSettings: ...
    @property
    def noise(self) -> NoiseSchedule: ...
    @property
    def text(self) -> TextSettings: ...

    def build(self, facts: DiffusionFacts) -> Denoiser: ...


def check_diffusion(recipe: DiffusionRecipe, *counts: str) -> None:
    """Raise InputError for invalid settings of a diffusion recipe. `counts` are the fields that must be at least 1."""
    check_at_least_one(recipe, *counts)
    check_share(recipe, "drop_text")
    if recipe.sample_guidance != 1 and recipe.drop_text == 0:
        raise InputError(
            f"sample_guidance {recipe.sample_guidance} needs captions that are dropped in training, but drop_text is "
            "0; give --drop-text 0.1 or --sample-guidance 1"
        )
    for part in (recipe.unet, recipe.noise, recipe.text):
        part.check()
