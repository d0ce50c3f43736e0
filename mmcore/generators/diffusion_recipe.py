"""What every recipe of a diffusion is to its training and to what opens it."""

from typing import Protocol

from mmcore.errors import InputError, check_at_least_one, check_share
from mmcore.generators.denoiser import Denoiser, UNetSettings
from mmcore.generators.diffusion import NoiseSchedule
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.text_context import TextSettings
from mmcore.recipe import Recipe


class DiffusionRecipe(Recipe, Protocol):
    """Beside these fields, what x_0 is: pixels have an `image_size`, latents a `vqvae`."""

    @property
    def captions_per_image(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def drop_text(self) -> float:
        """Share of the captions that are replaced by no text, for classifier-free guidance."""

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
    """Raise InputError for settings of a diffusion recipe that cannot be, such as guidance of a network that never sees
    a prompt missing; `counts` are the fields that must be at least 1."""
    check_at_least_one(recipe, *counts)
    check_share(recipe, "drop_text")
    if recipe.sample_guidance != 1 and recipe.drop_text == 0:
        raise InputError(
            f"sample_guidance {recipe.sample_guidance} needs captions that are dropped in training, and drop_text is "
            "0; mend it with --drop-text 0.1 or --sample-guidance 1"
        )
    for part in (recipe.unet, recipe.noise, recipe.text):
        part.check()
