"""How autoencoders on pixels are trained: what a VQ-VAE and a tokenizer of bits share.

A step has one phase or two. The generator has the losses of its quantiser, the reconstruction loss, a perceptual loss
and from a given step an adversarial loss. The discriminator follows Esser et al. 2021 (arXiv 2012.09841).

Shapes: B images, P pixels a side, H and W patches of the discriminator.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from mmcore.data.pixels import to_network, to_pixels
from mmcore.errors import InputError, check_not_negative
from mmcore.generators.discriminator import PatchDiscriminator, discriminator_loss, generator_loss
from mmcore.generators.perceptual import LPIPS, FeatureDistance, PerceptualDistance
from mmcore.generators.psnr import psnr
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings

LPIPS_NAME = "lpips"
GENERATOR, DISCRIMINATOR = "generator", "discriminator"


class AutoencoderRecipe(Protocol):
    """The settings that every autoencoder on pixels has."""

    @property
    def dataset(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def image_size(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def norm_groups(self) -> int: ...
    @property
    def perceptual(self) -> str | None: ...
    @property
    def perceptual_weight(self) -> float: ...
    @property
    def vgg16(self) -> str | None: ...
    @property
    def lpips_heads(self) -> str | None: ...
    @property
    def discriminator_channels(self) -> tuple[int, ...]: ...
    @property
    def discriminator_from_step(self) -> int | None: ...
    @property
    def adversarial_weight(self) -> float: ...
    @property
    def train(self) -> TrainSettings: ...
    @property
    def factor(self) -> int:
        """Side of the image divided by the side of its latents."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""

    def build_training(self) -> "AutoencoderTraining":
        """The model and its losses. Raises InputError if the weights of the perceptual network cannot be found."""


# -- settings ------------------------------------------------------------------------------------------------------


def flag(field: str) -> str:
    """The flag of a field of a recipe."""
    return "--" + field.replace("_", "-")


def check_widths(recipe: AutoencoderRecipe, name: str, *others: str) -> None:
    """Raise InputError, naming the flags, for widths that the groups of the normalisation do not divide.

    `others`: names of further fields that could be changed.
    """
    widths: tuple[int, ...] = getattr(recipe, name)
    if not widths or any(each < 1 or each % recipe.norm_groups for each in widths):
        flags = " or ".join(flag(each) for each in (name, *others, "norm_groups"))
        raise InputError(f"{name} {widths} must be multiples of norm_groups {recipe.norm_groups}; change {flags}")


def check_judges(recipe: AutoencoderRecipe) -> None:
    """Raise InputError, naming the flag, for settings of the discriminator or the perceptual loss that cannot be."""
    check_widths(recipe, "discriminator_channels")
    check_not_negative(recipe, "perceptual_weight", "adversarial_weight")
    if recipe.discriminator_from_step is not None:
        check_not_negative(recipe, "discriminator_from_step")
    if recipe.perceptual != LPIPS_NAME and (recipe.vgg16 or recipe.lpips_heads):
        raise InputError(f"--vgg16 and --lpips-heads are for --perceptual {LPIPS_NAME}, not {recipe.perceptual!r}")


def judges_without_effect(recipe: AutoencoderRecipe) -> dict[str, str]:
    """Fields of the judges that have no effect, each with the flag that would make it effective."""
    ignored = {}
    if recipe.perceptual is None:
        ignored["perceptual_weight"] = "--perceptual MODEL"
    if recipe.discriminator_from_step is None:
        ignored |= dict.fromkeys(("discriminator_channels", "adversarial_weight"), "--discriminator-from-step STEP")
    return ignored


def build_perceptual(recipe: AutoencoderRecipe) -> PerceptualDistance | None:
    """The frozen network of the perceptual loss, or None. Raises InputError if its weights cannot be found."""
    if recipe.perceptual is None:
        return None
    if recipe.perceptual != LPIPS_NAME:
        return FeatureDistance(recipe.perceptual, recipe.image_size)
    if not recipe.vgg16 or not recipe.lpips_heads:
        raise InputError(
            "perceptual 'lpips' needs --vgg16 FILE and --lpips-heads FILE; give them, or give --perceptual MODEL "
            "or --perceptual None"
        )
    return LPIPS(recipe.vgg16, recipe.lpips_heads)


# -- the model in training -----------------------------------------------------------------------------------------


class AutoencoderTraining(nn.Module):
    """An autoencoder with its frozen perceptual network and its discriminator, which is trained in a second phase."""

    def __init__(self, recipe: AutoencoderRecipe, name: str, autoencoder: nn.Module) -> None:
        """`name`: the attribute of `autoencoder`, with which the names of its saved weights begin.

        Raises InputError if the weights of the perceptual network cannot be found.
        """
        super().__init__()
        self.settings = recipe
        self.name = name
        self.add_module(name, autoencoder)
        self.perceptual = build_perceptual(recipe)
        self.discriminator: PatchDiscriminator | None = None
        self.phases: tuple[str, ...] = ()
        if recipe.discriminator_from_step is not None:
            self.discriminator = PatchDiscriminator(recipe.discriminator_channels, recipe.norm_groups)
            self.phases = (GENERATOR, DISCRIMINATOR)
        self.is_adversarial = False

    @property
    def autoencoder(self) -> nn.Module:
        """What is trained, without its judges."""
        return self.get_submodule(self.name)

    def phase_parameters(self, phase: str) -> list[nn.Parameter]:
        part = self.autoencoder if phase == GENERATOR else self.discriminator
        assert part is not None
        return list(part.parameters())

    def active_phases(self, step: int) -> tuple[str, ...]:
        """The phases of `step`. From `discriminator_from_step` on the generator also has the adversarial loss."""
        assert self.settings.discriminator_from_step is not None
        self.is_adversarial = step >= self.settings.discriminator_from_step
        return self.phases if self.is_adversarial else (GENERATOR,)

    def forward(self, batch: dict[str, Tensor], phase: str = GENERATOR) -> Outputs:
        """The losses of the images of the batch.

        Args:
            batch: `images`, uint8 (B, P, P, 3).
            phase: the phase whose losses are computed.
        Returns: losses per image.
            The generator also has the metric `psnr` (in dB, per image) and the statistics of its quantiser. Its
            validation leaves the adversarial loss out, as the discriminator changes.
            The discriminator also has the metric `accuracy`.
        """
        x_B3PP = to_network(batch["images"], self._dtype)
        return self._generator(x_B3PP) if phase == GENERATOR else self._discriminator(x_B3PP)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.autoencoder.parameters()).dtype

    def _made(self, x_B3PP: Tensor) -> tuple[Tensor, dict[str, Loss], dict[str, Tensor]]:
        """Images (B, 3, P, P) made of the images `x_B3PP`, the losses of the quantiser, and its statistics."""
        raise NotImplementedError

    def _reconstructed(self, x_B3PP: Tensor) -> Tensor:
        """What the trained model makes of images (B, 3, P, P)."""
        raise NotImplementedError

    def reconstruct(self, pixels_BPP3: Tensor) -> Tensor:
        """uint8 (B, P, P, 3) -> what the trained model makes of them, of the same form, on the CPU."""
        device = next(self.autoencoder.parameters()).device
        with torch.inference_mode():
            return to_pixels(self._reconstructed(to_network(pixels_BPP3.to(device), self._dtype))).cpu()

    def _generator(self, x_B3PP: Tensor) -> Outputs:
        recipe, num_images = self.settings, len(x_B3PP)
        made_B3PP, own, statistics = self._made(x_B3PP)
        made_B3PP = made_B3PP.to(x_B3PP.dtype)
        losses = {"reconstruction_loss": Loss((made_B3PP - x_B3PP).square().mean((1, 2, 3)).sum(), num_images), **own}
        if self.perceptual is not None:
            perceptual_B = self.perceptual(x_B3PP, made_B3PP)
            losses["perceptual_loss"] = Loss(perceptual_B.sum(), num_images, recipe.perceptual_weight)
        if self.discriminator is not None and self.training and self.is_adversarial:
            adversarial_B = generator_loss(self.discriminator(made_B3PP))
            losses["adversarial_loss"] = Loss(adversarial_B.sum(), num_images, recipe.adversarial_weight)
        return Outputs(losses, {"psnr": Mean(psnr(x_B3PP, made_B3PP.detach()).sum(), num_images)}, statistics)

    def _discriminator(self, x_B3PP: Tensor) -> Outputs:
        assert self.discriminator is not None
        num_images = len(x_B3PP)
        with torch.no_grad():
            made_B3PP = self._made(x_B3PP)[0].to(x_B3PP.dtype)
        real_BHW, fake_BHW = self.discriminator(x_B3PP), self.discriminator(made_B3PP)
        loss_B = discriminator_loss(real_BHW, fake_BHW)
        right_B = ((real_BHW > 0.5).double().mean((1, 2)) + (fake_BHW < 0.5).double().mean((1, 2))) / 2
        loss = Loss(loss_B.sum(), num_images, self.settings.adversarial_weight)
        return Outputs({"loss": loss}, {"accuracy": Mean(right_B.sum(), num_images)})
