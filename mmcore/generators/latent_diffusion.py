"""The latent diffusion of the report (Rombach et al. 2022, https://arxiv.org/abs/2112.10752).

A conditional U-Net denoises the continuous latents of a frozen VQ-VAE. The VQ-VAE quantises them when it decodes. The
middle block of the report's U-Net has (768, 512) channels; the one of diffusers has 768.
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
    """VQ-VAE and CLIP (frozen), U-Net on latents. The defaults are the settings of the report."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report_generation"
    """Column of the dataset that selects the training rows."""
    captions_per_image: int = 5
    """Number of captions per image to train on, the first ones. Each epoch draws one of them at random."""
    vqvae: str | None = None
    """Finished run of jobs/train_vqvae.py (STORAGE/runs/vqvae/NAME, a folder or s3://...). It sets the size of the
    images. None first trains that of the variant, under this run's --name, or takes a finished one of it."""
    flip: bool = False
    """Mirror images at random with probability 1/2 (the VQ-VAE runs on both views)."""
    drop_text: float = 0.1
    """Share of the captions that are replaced by the empty text, for classifier-free guidance."""
    sample_steps: int = 50
    """Sampling steps of the images at each validation."""
    sample_guidance: float = 3.0
    """Guidance scale of the images at each validation; 1 is no guidance."""
    unet: UNetSettings = field(
        default_factory=lambda: UNetSettings(
            channels=(256, 384, 512, 768), attention_levels=(0, 1, 2, 3), num_heads=16, time_width=512
        )
    )
    """The network."""
    noise: NoiseSchedule = field(
        default_factory=lambda: NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    )
    """The noise schedule."""
    text: TextSettings = field(
        default_factory=lambda: TextSettings(text_encoder="openai/clip-vit-base-patch16", max_tokens=77)
    )
    """The text."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=100,
            # Samples improve long after the validation loss has stopped improving.
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
    """Optimisation."""

    def __post_init__(self) -> None:
        check_diffusion(self, "captions_per_image", "sample_steps")

    def build(self, facts: DiffusionFacts) -> Denoiser:
        """The network."""
        return Denoiser(self.unet, self.noise, self.text, facts.text_inputs, facts.x_0_shape)


_REPORT = LatentDiffusionRecipe()
# All variants have 77 tokens: the pipeline of diffusers pads prompts to 77.
_BEST = dataclasses.replace(
    _REPORT,
    flip=True,
    unet=UNetSettings(channels=(128, 256), layers_per_block=1, attention_levels=(0, 1), num_heads=4),
    # v-prediction: at the end of the cosine schedule hardly any signal is left, and noise prediction divides by it. No
    # min-SNR: it weights the noisiest steps least, and these decide the layout and the colours.
    noise=NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction="v_prediction"),
    text=TextSettings(max_tokens=77, text_width=192, text_layers=3, text_heads=4),
    train=TrainSettings(
        num_epochs=60,
        # Samples improve long after the validation loss has stopped improving.
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
    # A mirrored image would contradict "left" and "right" in its caption.
    flip=False,
    sample_steps=25,
    # Down to 2 x 2 positions, each with a different border of the image. Its effect alone was not measured.
    unet=UNetSettings(
        channels=(64, 96, 128, 128), layers_per_block=1, attention_levels=(1, 2, 3), num_heads=4, pooled_text=True
    ),
    # Large shapes are visible through much noise. Only in the last 40 timesteps the caption is needed to place them. A
    # shift of 5 spends a sixth of the training there. A shift of 8, with or without half of the timesteps uniform, gave
    # fewer correct places and shapes (docs/results.md).
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
