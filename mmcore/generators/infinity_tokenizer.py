"""The training of Infinity's tokenizer: images -> bits of grids from coarse to fine -> images.

Encoder and decoder are those of `mmcore.generators.infinity_vae`, the bits those of `mmcore.generators.bsq` (Han et al.
2024, https://arxiv.org/abs/2412.04431, section 3.2). The official code trains with the same quantiser, but its entropy
loss is left out there.

Shapes: B images, P pixels a side, d bits of a position, h and w sides of the latent image.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mmcore.errors import InputError, check_at_least_one, check_not_negative
from mmcore.generators.autoencoder_training import (
    AutoencoderTraining,
    check_judges,
    flag,
    judges_without_effect,
)
from mmcore.generators.bsq import quantize
from mmcore.generators.bsq_training import BitQuantizer, bit_use
from mmcore.generators.infinity import MAX_GRIDS
from mmcore.generators.infinity_scales import Grid
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings, ResidualBlock
from mmcore.losses import Loss
from mmcore.recipe import TrainSettings


@dataclass(frozen=True)
class InfinityTokenizerRecipe:
    """Convolutional encoder, bits of several grids, convolutional decoder. The defaults are for photographs."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report_generation"
    """Column of the dataset that assigns rows to training and validation."""
    image_size: int = 128
    """Side in pixels that images are resized to."""
    flip: bool = True
    """Mirror images at random with probability 1/2."""
    num_bits: int = 32
    """Bits of a position, which are the channels of a latent."""
    width: int = 64
    """Channels at the full side."""
    factors: tuple[int, ...] = (1, 2, 4, 4, 4)
    """Channels of each level over `width`. Each level but the last halves the side."""
    num_blocks: int = 2
    """Residual blocks per level (the decoder has one more)."""
    norm_groups: int = 32
    """Groups of each GroupNorm. The official files have 32; other models cannot be exported to them."""
    encoder: Literal["convolutions", "patches"] = "convolutions"
    """patches encodes each patch of the image separately. Equal patches then have equal latents, which are easier to
    predict for a Transformer. Such a model cannot be exported."""
    patch_size: int = 1
    """Side in pixels of the patches that are moved into channels, which is cheaper. Above 1 the model cannot be
    exported."""
    grids: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """Sides of the grids, from coarse to fine. The last has the sides of the latents."""
    inverse_temperature: float = 10.0
    """Sharpness of the probabilities of bits in the entropy loss."""
    entropy_weight: float = 0.01
    """Weight of the entropy loss."""
    commitment_weight: float = 0.25
    """Weight of the commitment loss."""
    perceptual: str | None = None
    """Network of the perceptual loss: `lpips` (needs --vgg16 and --lpips-heads), or a convolutional vision model of
    Hugging Face by name or folder. None has no perceptual loss."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual loss."""
    vgg16: str | None = None
    """File of torchvision's VGG-16 weights, for `lpips`."""
    lpips_heads: str | None = None
    """File of the weights v0.1/vgg of the lpips package, for `lpips`."""
    discriminator_channels: tuple[int, ...] = (64, 128, 256)
    """Channels of the PatchGAN discriminator's layers."""
    discriminator_from_step: int | None = None
    """First step of the discriminator; None has no discriminator."""
    adversarial_weight: float = 0.5
    """Weight of the discriminator's loss and of the generator's adversarial loss."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=10,
            # The validation loss leaves the discriminator out, so its minimum does not show the best weights.
            keep="last",
            batch_size=8,
            lr=1e-3,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            schedule="cosine",
            warmup_steps=200,
            clip_grad_norm=1.0,
            num_samples=8,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "image_size", "num_bits", "width", "num_blocks", "norm_groups", "patch_size")
        check_not_negative(self, "entropy_weight", "commitment_weight")
        if self.inverse_temperature <= 0:
            raise InputError(
                f"inverse_temperature {self.inverse_temperature} must be above 0; change {flag('inverse_temperature')}"
            )
        if not self.factors or any(each < 1 or self.width * each % self.norm_groups for each in self.factors):
            raise InputError(
                f"factors {self.factors} times width {self.width} must be multiples of norm_groups {self.norm_groups}; "
                "change --factors, --width or --norm-groups"
            )
        check_judges(self)
        # The Transformer begins with one position, and has an embedding for each grid.
        if not 2 <= len(self.grids) <= MAX_GRIDS or self.grids[0] != 1 or sorted({*self.grids}) != list(self.grids):
            raise InputError(
                f"grids {self.grids} must be 2 to {MAX_GRIDS} sides that grow from 1 on; change --grids, such as "
                "--grids 1 2 4 8"
            )
        if self.image_size != self.grids[-1] * self.factor:
            raise InputError(
                f"image_size {self.image_size} must be {self.grids[-1] * self.factor}, the last of grids {self.grids} "
                f"times {self.factor} for {len(self.factors)} levels of factors and patch_size {self.patch_size}; "
                "change --image-size, --grids, --factors or --patch-size"
            )

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, each with the flag that would make it effective."""
        ignored = judges_without_effect(self)
        return ignored if self.entropy_weight else ignored | {"inverse_temperature": "--entropy-weight WEIGHT"}

    @property
    def factor(self) -> int:
        """Side of the image divided by the side of its latents."""
        return self.vae.stride

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(d, h, w) of one image's latents."""
        return self.num_bits, self.grids[-1], self.grids[-1]

    @property
    def grid_sides(self) -> tuple[Grid, ...]:
        """Height and width of each grid."""
        return tuple((side, side) for side in self.grids)

    @property
    def vae(self) -> InfinityVaeSettings:
        """Sizes of the encoder and the decoder."""
        return InfinityVaeSettings(
            self.num_bits, self.width, self.factors, self.num_blocks, self.norm_groups, self.encoder, self.patch_size
        )

    def build(self) -> InfinityVae:
        return InfinityVae(self.vae)

    def build_training(self) -> "InfinityTokenizerTraining":
        return InfinityTokenizerTraining(self)


class InfinityTokenizerTraining(AutoencoderTraining):
    """A tokenizer with its losses."""

    tokenizer: InfinityVae

    def __init__(self, recipe: InfinityTokenizerRecipe) -> None:
        """Raises InputError if the weights of the perceptual network cannot be found."""
        super().__init__(recipe, "tokenizer", recipe.build())
        self.recipe = recipe
        self.quantizer = BitQuantizer(recipe.num_bits, recipe.grid_sides, recipe.inverse_temperature)
        self.state_buffers = tuple(f"quantizer.{name}" for name in self.quantizer.state_buffers)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return [module for module in self.tokenizer.modules() if isinstance(module, ResidualBlock)]

    def _made(self, x_B3PP: Tensor) -> tuple[Tensor, dict[str, Loss], dict[str, Tensor]]:
        """As above. The statistics are those of the bits, in validation without `probabilities`."""
        recipe, num_images = self.recipe, len(x_B3PP)
        latents_Bdhw = self.tokenizer.encode(x_B3PP)
        with torch.autocast(x_B3PP.device.type, enabled=False):
            vectors_Bdhw, quantised = self.quantizer(latents_Bdhw)
        losses = {
            "commitment_loss": Loss(quantised["commitment_loss"].sum(), num_images, recipe.commitment_weight),
            "entropy_loss": Loss(quantised["entropy_loss"].sum(), num_images, recipe.entropy_weight),
        }
        names = ("ones", "positions", "probabilities") if self.training else ("ones", "positions")
        return self.tokenizer.decode(vectors_Bdhw), losses, {name: quantised[name] for name in names}

    def _reconstructed(self, x_B3PP: Tensor) -> Tensor:
        latents_Bdhw = self.tokenizer.encode(x_B3PP)
        return self.tokenizer.decode(quantize(latents_Bdhw, self.recipe.grid_sides).latents_BdHW)

    def after_step(self, statistics: dict[str, Tensor], step: int) -> None:
        self.quantizer.after_step(statistics)

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        return bit_use(statistics["ones"], statistics["positions"])


_BEST = InfinityTokenizerRecipe()
# As in the VQ-VAE of the autoregressive Transformer, plain background always has the same latents. All convolutions are
# at a quarter of the side or less. 120 steps of 16 images, 9 s of a CPU, gave 22.9 dB. Convolutions of 16 channels at
# the full side gave 18.2 dB in 250 steps of 8 images and 37 s. A schedule of 1,000 steps took 74 s and gave 28.9 dB.
# The oracle found 94.0 % of the attributes of 150 unseen scenes in the reconstructions, and 76 % of the shapes. After
# 3,000 steps it found 99.3 % of those of 300 scenes, and 96.7 % of the shapes.
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    image_size=64,
    flip=False,
    num_bits=16,
    width=64,
    factors=(1, 2),
    num_blocks=1,
    norm_groups=8,
    encoder="patches",
    patch_size=4,
    train=dataclasses.replace(_BEST.train, num_epochs=8, lr=3e-3, warmup_steps=100, max_steps=4000, batch_size=16),
)
_SMOKE = dataclasses.replace(
    _SHAPES,
    image_size=32,
    num_bits=8,
    width=8,
    factors=(1, 1, 2),
    norm_groups=4,
    encoder="convolutions",
    patch_size=2,
    grids=(1, 2, 4),
    discriminator_channels=(8, 16),
    discriminator_from_step=10,
    train=dataclasses.replace(_SHAPES.train, num_epochs=1, max_steps=20, warmup_steps=5, batch_size=8),
)
VARIANTS: dict[str, InfinityTokenizerRecipe] = {"best": _BEST, "shapes": _SHAPES, "smoke": _SMOKE}
