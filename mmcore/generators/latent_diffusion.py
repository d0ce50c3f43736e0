"""The report's latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752): a conditional U-Net on the
continuous latents of a frozen VQ-VAE, which quantises them when it decodes.

The report's own U-Net has a middle of (768, 512) channels; diffusers' stays at 768.
"""

import dataclasses
from dataclasses import dataclass, field

from mmcore.generators.denoiser import Denoiser, UNetSettings
from mmcore.generators.diffusion import NoiseSchedule
from mmcore.generators.diffusion_recipe import check_diffusion
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.text_context import TextSettings
from mmcore.recipe import TrainSettings


@dataclass(frozen=True)
class LatentDiffusionRecipe:
    """VQ-VAE and CLIP (frozen), U-Net on latents; the defaults are the report's settings."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report_generation"
    """Column of the dataset that says which rows train."""
    captions_per_image: int = 5
    """How many of an image's captions are trained on, the first ones; each time one of them is drawn at random."""
    vqvae: str | None = None
    """Finished run of jobs/train_vqvae.py (STORAGE/runs/vqvae/NAME, a folder or s3://...), which says the size of the
    images; None trains the VQ-VAE of the same variant and name first."""
    flip: bool = False
    """Mirror half of the images, drawn anew each epoch (the VQ-VAE then runs on both views)."""
    drop_text: float = 0.1
    """Share of the captions that are replaced by no text, for classifier-free guidance."""
    sample_steps: int = 50
    """Sampling steps of the images that are written at each validation."""
    sample_guidance: float = 3.0
    """Guidance scale of those images; 1 is none."""
    unet: UNetSettings = field(
        default_factory=lambda: UNetSettings(
            channels=(256, 384, 512, 768), attention_levels=(0, 1, 2, 3), num_heads=16, time_width=512
        )
    )
    """The network."""
    noise: NoiseSchedule = field(
        default_factory=lambda: NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    """The diffusion."""
    text: TextSettings = field(
        default_factory=lambda: TextSettings(text_encoder="openai/clip-vit-base-patch16", max_tokens=77)
    )
    """The text."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=100,
            # Not the best validation's: samples go on improving long after the loss does not.
            keep="last",
            batch_size=16,
            optimizer="adam",
            lr=5e-6,
            weight_decay=0.0,
            clip_grad_norm=None,
            seed=1111,
            num_samples=16,
        )
    )
    """How it is optimised."""

    def __post_init__(self) -> None:
        check_diffusion(self, "captions_per_image", "sample_steps")

    def build(self, facts: DiffusionFacts) -> Denoiser:
        """The network."""
        return Denoiser(self.unet, self.noise, self.text, facts.text_inputs, facts.x_0_shape)


_REPORT = LatentDiffusionRecipe()
# The 77 tokens stay in every variant: diffusers' pipeline of this kind pads to as many.
_BEST = dataclasses.replace(
    _REPORT,
    flip=True,
    unet=UNetSettings(channels=(128, 256), layers_per_block=1, attention_levels=(0, 1), num_heads=4),
    # Of the cosine schedule's last steps hardly any signal is left, which predictions of the noise divide by. No
    # min-SNR: what is where, and in which colour, is decided in the noisiest steps, which it weights least.
    noise=NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction="v_prediction"),
    text=TextSettings(max_tokens=77, text_width=192, text_layers=3, text_heads=4),
    train=TrainSettings(
        num_epochs=60,
        # Not the best validation's: samples go on improving long after the loss does not.
        keep="last",
        batch_size=64,
        lr=3e-4,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=500,
        ema_decay=0.999,
        seed=1111,
        validate_every_epochs=5,
        num_samples=16,
    ),
)
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    # A mirrored image would make "left" mean right.
    flip=False,
    sample_steps=25,
    # Down to 2 x 2 positions, each of which sees another border. Not compared alone.
    unet=UNetSettings(
        channels=(64, 96, 128, 128), layers_per_block=1, attention_levels=(1, 2, 3), num_heads=4, pooled_text=True
    ),
    # Few large shapes can be seen through much noise: only in the last 40 timesteps is the caption all that says where
    # they are. A sixth of the training is there. A shift of 8, with or without half of it at all timesteps alike, gave
    # fewer right places and shapes (docs/results.md).
    noise=dataclasses.replace(_BEST.noise, timestep_shift=5.0),
    text=TextSettings(max_tokens=77, text_width=128, text_layers=2, text_heads=4),
    train=dataclasses.replace(
        _BEST.train,
        num_epochs=7,
        batch_size=16,
        lr=1e-3,
        warmup_steps=100,
        ema_decay=0.995,
        validate_every_epochs=2,
    ),
)
_SMOKE = dataclasses.replace(
    _SHAPES,
    sample_steps=4,
    unet=UNetSettings(channels=(32, 32), layers_per_block=1, attention_levels=(1,), num_heads=2, pooled_text=True),
    text=TextSettings(max_tokens=77, text_width=32, text_layers=1, text_heads=2),
    train=dataclasses.replace(
        _SHAPES.train, num_epochs=1, max_steps=20, batch_size=8, warmup_steps=5, ema_decay=0.9, num_samples=4
    ),
)
VARIANTS: dict[str, LatentDiffusionRecipe] = {"report": _REPORT, "best": _BEST, "shapes": _SHAPES, "smoke": _SMOKE}
