"""The VQ-VAE of the report: images -> a grid of codes -> images (van den Oord et al. 2017).

The discriminator follows Esser et al. 2021 (arXiv 2012.09841). Encoder and decoder are those of diffusers' VQModel, so
a trained model can be exported to it. There are two differences from the report. The discriminator has GroupNorm
instead of BatchNorm. The decoder has one more residual block per level, as in VQModel.

Shapes: B images, P pixels a side, C channels and h, w sides of a latent grid, K codes.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.errors import InputError, check_at_least_one, check_not_negative, check_share
from mmcore.generators.autoencoder_training import (
    LPIPS_NAME,
    AutoencoderTraining,
    check_judges,
    check_widths,
    judges_without_effect,
)
from mmcore.generators.patch_encoder import patch_encoder
from mmcore.generators.quantizer import Quantizer, codebook_use
from mmcore.losses import Loss
from mmcore.recipe import TrainSettings

if TYPE_CHECKING:
    from diffusers import VQModel

# The output of the encoder's last convolution has a standard deviation of about 1/3.
_LATENT_GAIN = 3.0


@dataclass(frozen=True)
class VQVAERecipe:
    """Convolutional encoder, codebook, convolutional decoder. The defaults are the settings of the report."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report_generation"
    """Column of the dataset that assigns rows to training and validation."""
    image_size: int = 256
    """Side in pixels that images are resized to."""
    flip: bool = False
    """Mirror images at random with probability 1/2."""
    latent_channels: int = 4
    """Channels of a latent and of a code."""
    num_codes: int = 8192
    """Number of codes in the codebook."""
    encoder: Literal["convolutions", "patches"] = "convolutions"
    """patches encodes each patch of the image separately. Equal patches then have equal codes, which are easier to
    predict for a Transformer. Such a model cannot be exported to diffusers."""
    patch_size: int = 1
    """Side in pixels of the patches that are moved into channels; 2 is four times cheaper. Above 1 the model cannot be
    exported to diffusers."""
    channels: tuple[int, ...] = (64, 128, 256, 256)
    """Channels of each level. Each level halves the side of the previous one."""
    layers_per_block: int = 2
    """Residual blocks per level (the decoder has one more)."""
    num_heads: int = 4
    """Attention heads of the middle block; 0 has no attention. Above 1 the model cannot be exported to diffusers, whose
    VQModel has one head."""
    norm_groups: int = 32
    """Groups of each GroupNorm."""
    codebook_ema_decay: float | None = None
    """Decay of the moving averages that form the codebook. None trains the codebook by the codebook loss."""
    revive_below: float = 0.0
    """Revive codes used less than this share of the mean use, by splitting another code; 0 turns this off."""
    codebook_weight: float = 1.0
    """Weight of the codebook loss. Not used for a codebook of moving averages."""
    commitment_weight: float = 0.2
    """Weight of the commitment loss."""
    perceptual: str | None = LPIPS_NAME
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
    discriminator_from_step: int | None = 3750
    """First step of the discriminator; None has no discriminator. The report starts after 15,000 batches of 4; a step
    here has 16 images."""
    adversarial_weight: float = 0.5
    """Weight of the discriminator's loss and of the generator's adversarial loss."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=60,
            # The validation loss leaves the discriminator out, so its minimum does not show the best weights.
            keep="last",
            batch_size=16,
            gradient_accumulation=4,
            optimizer="adam",
            lr=1e-5,
            betas=(0.5, 0.999),
            weight_decay=0.0,
            clip_grad_norm=None,
            seed=1111,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "image_size", "patch_size", "latent_channels", "layers_per_block", "norm_groups")
        if self.num_codes < 2:
            raise InputError(f"num_codes {self.num_codes} must be at least 2; change --num-codes")
        check_not_negative(self, "commitment_weight", "codebook_weight")
        check_widths(self, "channels")
        check_judges(self)
        if self.image_size % self.factor:
            raise InputError(
                f"image_size {self.image_size} must be divisible by {self.factor} for {len(self.channels)} levels of "
                f"channels and patch_size {self.patch_size}; change --image-size, --channels or --patch-size"
            )
        if self.num_heads < 0 or (self.num_heads and self.channels[-1] % self.num_heads):
            raise InputError(
                f"num_heads {self.num_heads} does not divide the last of channels {self.channels}; change --num-heads"
            )
        if self.codebook_ema_decay is not None and not 0 < self.codebook_ema_decay < 1:
            raise InputError(
                f"codebook_ema_decay {self.codebook_ema_decay} must lie between 0 and 1; change --codebook-ema-decay"
            )
        check_share(self, "revive_below")
        if self.revive_below and self.codebook_ema_decay is None:
            raise InputError(
                "revive_below needs a codebook of moving averages; give --codebook-ema-decay, or --revive-below 0"
            )

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, each with the flag that would make it effective."""
        ignored = {}
        if self.codebook_ema_decay is not None:
            ignored["codebook_weight"] = "--codebook-ema-decay None"
        return ignored | judges_without_effect(self)

    @property
    def factor(self) -> int:
        """Side of the image divided by the side of its latents."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        side = self.image_size // self.factor
        return self.latent_channels, side, side

    def build(self) -> "VQVAE":
        return VQVAE(self)

    def build_training(self) -> "VQVAETraining":
        return VQVAETraining(self)


class VQVAE(nn.Module):
    """Encoder, codebook, decoder."""

    def __init__(self, recipe: VQVAERecipe) -> None:
        super().__init__()
        from diffusers.models.attention_processor import Attention
        from diffusers.models.autoencoders.vae import Decoder, Encoder

        self.recipe = recipe
        num_levels, width = len(recipe.channels), recipe.latent_channels
        common: dict[str, Any] = {
            "block_out_channels": recipe.channels,
            "layers_per_block": recipe.layers_per_block,
            "norm_num_groups": recipe.norm_groups,
            "mid_block_add_attention": recipe.num_heads > 0,
        }
        down, up = ("DownEncoderBlock2D",) * num_levels, ("UpDecoderBlock2D",) * num_levels
        patch_channels = 3 * recipe.patch_size**2
        self.encoder: nn.Module
        if recipe.encoder == "patches":
            self.encoder = patch_encoder(patch_channels, 2 ** (num_levels - 1), 2 * recipe.channels[-1], width)
        else:
            self.encoder = Encoder(patch_channels, width, down_block_types=down, double_z=False, **common)
        self.decoder = Decoder(width, patch_channels, up_block_types=up, **common)
        for attention in self.modules():
            if isinstance(attention, Attention):
                # diffusers fixes one head for autoencoders. More heads have the same weights.
                attention.heads = recipe.num_heads
                attention.scale = (attention.inner_dim // recipe.num_heads) ** -0.5
        self.quant_conv = nn.Conv2d(width, width, 1)
        self.post_quant_conv = nn.Conv2d(width, width, 1)
        # Initial latents have unit variance in all directions. With torch's initialisation they are small against the
        # decoder's biases. 100 steps on Shapes (32² pixels) gave 20.6 dB; with this initialisation they give 21.2 dB.
        for layer, gain in ((self.quant_conv, _LATENT_GAIN), (self.post_quant_conv, 1.0)):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.quantizer = Quantizer(
            recipe.num_codes,
            width,
            ema_decay=recipe.codebook_ema_decay,
            revive_below=recipe.revive_below,
            seed=recipe.train.seed,
        )
        self.state_buffers = tuple(f"quantizer.{name}" for name in self.quantizer.state_buffers)

    def encode(self, x_B3PP: Tensor) -> Tensor:
        """Images in [-1, 1] -> latents (B, C, h, w) before quantisation, in fp32 or above."""
        hidden = self.encoder(F.pixel_unshuffle(x_B3PP, self.recipe.patch_size))
        # In bf16 the rounding error of a latent would be a large part of the distance between codes.
        with torch.autocast(x_B3PP.device.type, enabled=False):
            return self.quant_conv(hidden.to(self.quant_conv.weight.dtype))

    def codes(self, x_B3PP: Tensor) -> Tensor:
        """Images in [-1, 1] -> index of the nearest code of each latent, int64 (B, h, w)."""
        latents_BChw = self.encode(x_B3PP)
        with torch.autocast(x_B3PP.device.type, enabled=False):
            return self.quantizer.numbers(latents_BChw)

    def decode_vectors(self, vectors_BChw: Tensor) -> Tensor:
        """Vectors of codes (B, C, h, w) -> images (B, 3, P, P), about in [-1, 1]."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(vectors_BChw)), self.recipe.patch_size)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Latents (B, C, h, w), which are quantised first -> images (B, 3, P, P), about in [-1, 1]."""
        with torch.autocast(latents_BChw.device.type, enabled=False):
            vectors_BChw = self.quantizer.quantize(latents_BChw.to(self.quantizer.codebook.dtype))
        return self.decode_vectors(vectors_BChw)

    def to_diffusers(self, scaling_factor: float = 1.0) -> "VQModel":
        """The model as diffusers' VQModel, in fp32. A pipeline divides its latents by `scaling_factor`.

        Raises InputError for several attention heads or patches, which VQModel does not have.
        """
        from diffusers import VQModel

        recipe = self.recipe
        if recipe.num_heads > 1:
            raise InputError(
                f"num_heads {recipe.num_heads}: this model cannot be exported, as diffusers' VQModel has one attention "
                "head; train one with --num-heads 1"
            )
        if recipe.encoder != "convolutions" or recipe.patch_size > 1:
            raise InputError(
                f"encoder {recipe.encoder}, patch_size {recipe.patch_size}: this model cannot be exported, as "
                "diffusers' VQModel has no patches; train one with --encoder convolutions --patch-size 1"
            )
        num_levels = len(recipe.channels)
        model: Any = VQModel(
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            block_out_channels=recipe.channels,
            layers_per_block=recipe.layers_per_block,
            latent_channels=recipe.latent_channels,
            sample_size=recipe.image_size,
            num_vq_embeddings=recipe.num_codes,
            norm_num_groups=recipe.norm_groups,
            scaling_factor=scaling_factor,
            mid_block_add_attention=recipe.num_heads > 0,
        )
        state = {name: value for name, value in self.state_dict().items() if not name.startswith("quantizer.")}
        model.load_state_dict({**state, "quantize.embedding.weight": self.quantizer.codebook.detach()})
        return model.to(self.quantizer.codebook.device).eval()


class VQVAETraining(AutoencoderTraining):
    """A VQ-VAE with its losses."""

    vqvae: VQVAE

    def __init__(self, recipe: VQVAERecipe) -> None:
        """Raises InputError if the weights of the perceptual network cannot be found."""
        super().__init__(recipe, "vqvae", recipe.build())
        self.recipe = recipe
        self.state_buffers = tuple(f"vqvae.{name}" for name in self.vqvae.state_buffers)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        from diffusers.models.resnet import ResnetBlock2D

        return [module for module in self.vqvae.modules() if isinstance(module, ResnetBlock2D)]

    def _made(self, x_B3PP: Tensor) -> tuple[Tensor, dict[str, Loss], dict[str, Tensor]]:
        """As above. The statistics are those of the codebook, in validation only `counts`."""
        latents_BChw, num_images = self.vqvae.encode(x_B3PP), len(x_B3PP)
        with torch.autocast(x_B3PP.device.type, enabled=False):
            vectors_BChw, quantised = self.vqvae.quantizer(latents_BChw)
        commitment = Loss(quantised["commitment_loss"].sum(), num_images, self.recipe.commitment_weight)
        losses = {"commitment_loss": commitment}
        if "codebook_loss" in quantised:
            losses["codebook_loss"] = Loss(quantised["codebook_loss"].sum(), num_images, self.recipe.codebook_weight)
        names = ("counts", "sums", "squares") if self.training else ("counts",)
        statistics = {name: quantised[name] for name in names if name in quantised}
        return self.vqvae.decode_vectors(vectors_BChw), losses, statistics

    def _reconstructed(self, x_B3PP: Tensor) -> Tensor:
        return self.vqvae.decode(self.vqvae.encode(x_B3PP))

    def after_step(self, statistics: dict[str, Tensor], step: int) -> None:
        self.vqvae.quantizer.after_step(statistics, step)

    def summarize(self, statistics: dict[str, Tensor]) -> dict[str, float]:
        return codebook_use(statistics["counts"])


_REPORT = VQVAERecipe()
_BEST = dataclasses.replace(
    _REPORT,
    image_size=128,
    flip=True,
    num_codes=4096,
    channels=(16, 32, 64, 128),
    layers_per_block=1,
    num_heads=0,
    norm_groups=8,
    codebook_ema_decay=0.99,
    revive_below=0.1,
    commitment_weight=0.25,
    perceptual=None,
    discriminator_from_step=None,
    train=TrainSettings(
        num_epochs=10,
        # As above; variants made from this one may have a discriminator.
        keep="last",
        batch_size=8,
        optimizer="adamw",
        lr=2e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        schedule="cosine",
        warmup_steps=200,
        clip_grad_norm=1.0,
        num_samples=8,
    ),
)
# A small batch gives more steps for the same compute. At 32² pixels, 2,400 images gave 20.7 dB in 150 steps of 16 and
# 22.0 dB in 300 steps of 8, both with lr 1e-3. With 3e-3 it was 22.5 dB.
# Latents are 4 times smaller than the image; in the report 8 times. One epoch of 16,000 images (2,000 steps) gives 35.1
# dB. The oracle finds 99.8 % of the attributes in reconstructions of unseen scenes. With noise of 0.3 standard
# deviations on the latents it finds 99.7 %. With a factor of 8 and twice the steps: 32.2 dB, 96.6 % of the attributes
# and 87 % of the shapes. The latent diffusion hardly learned shapes and places on those latents.
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    image_size=64,
    num_codes=1024,
    channels=(16, 32, 64),
    train=dataclasses.replace(_BEST.train, num_epochs=1, lr=3e-3, warmup_steps=100),
)
# Codes for the autoregressive Transformer: few per image, and plain background always has the same code (68 % of all
# codes). 64,000 images, 300 s on one thread, give 33.9 dB. The oracle finds 99.5 % of the attributes of unseen scenes.
# With 2,048 codes and batches of 8 it finds 98.1 %. Codes of convolutions are harder to predict. After 32,000 images a
# Transformer of 5.5 M had a loss of 4.7 nats per code on them (32² pixels), and of 1.1 on these.
_SHAPES_CODES = dataclasses.replace(
    _SHAPES,
    encoder="patches",
    patch_size=4,
    latent_channels=8,
    channels=(64, 128),
    train=dataclasses.replace(_SHAPES.train, num_epochs=8, max_steps=3000, batch_size=16),
)
_SMOKE = dataclasses.replace(
    _SHAPES,
    image_size=32,
    num_codes=64,
    channels=(8, 16, 16),
    norm_groups=4,
    codebook_ema_decay=0.9,
    discriminator_channels=(8, 16),
    discriminator_from_step=10,
    train=dataclasses.replace(_SHAPES.train, num_epochs=1, max_steps=20, warmup_steps=5),
)
VARIANTS: dict[str, VQVAERecipe] = {
    "report": _REPORT,
    "best": _BEST,
    "shapes": _SHAPES,
    "shapes-codes": _SHAPES_CODES,
    "smoke": _SMOKE,
}
