"""The pixel diffusion of the report ("our diffusion"): a conditional U-Net with a frozen or trained text encoder."""

import dataclasses
from dataclasses import dataclass, field

from mmcore.generators.denoiser import Denoiser, UNetSettings
from mmcore.generators.diffusion import NoiseSchedule
from mmcore.generators.diffusion_recipe import check_diffusion
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.text_context import TextSettings
from mmcore.recipe import TrainSettings


@dataclass(frozen=True)
class PixelDiffusionRecipe:
    """BERT (frozen), projection, U-Net on pixels. The defaults are the settings of the report."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report_generation"
    """Column of the dataset that selects the training rows."""
    captions_per_image: int = 1
    """Number of captions per image to train on, the first ones. Each epoch draws one of them at random."""
    image_size: int = 128
    """Side of an image in pixels."""
    flip: bool = True
    """Mirror images at random with probability 1/2."""
    drop_text: float = 0.0
    """Share of the captions that are replaced by the empty text, for classifier-free guidance."""
    sample_steps: int = 50
    """Sampling steps of the images at each validation."""
    sample_guidance: float = 1.0
    """Guidance scale of the images at each validation; 1 is no guidance."""
    unet: UNetSettings = field(default_factory=UNetSettings)
    """The network."""
    noise: NoiseSchedule = field(default_factory=NoiseSchedule)
    """The noise schedule."""
    text: TextSettings = field(
        default_factory=lambda: TextSettings(text_encoder="bert-base-uncased", max_tokens=24, projection_width=512)
    )
    """The text."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=5,
            # Samples improve long after the validation loss has stopped improving.
            keep="last",
            batch_size=32,
            optimizer="adamw",
            lr=1e-4,
            weight_decay=0.01,
            schedule="cosine",
            warmup_steps=500,
            clip_grad_norm=1.0,
            seed=42,
            num_samples=16,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        check_diffusion(self, "captions_per_image", "image_size", "sample_steps")

    def build(self, facts: DiffusionFacts) -> Denoiser:
        """The network."""
        return Denoiser(self.unet, self.noise, self.text, facts.text_inputs, facts.x_0_shape)


_REPORT = PixelDiffusionRecipe()
_BEST = dataclasses.replace(
    _REPORT,
    captions_per_image=5,
    image_size=64,
    drop_text=0.1,
    sample_guidance=3.0,
    # Attention only at levels with at most 16² positions.
    unet=UNetSettings(channels=(32, 96, 192, 256), layers_per_block=1, attention_levels=(2, 3), num_heads=4),
    # v-prediction: at the end of the cosine schedule hardly any signal is left, and noise prediction divides by it. No
    # min-SNR: it weights the noisiest steps least, and these decide the layout and the colours.
    noise=NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction="v_prediction"),
    text=TextSettings(max_tokens=40, text_width=192, text_layers=3, text_heads=4),
    train=TrainSettings(
        num_epochs=60,
        # Samples improve long after the validation loss has stopped improving.
        keep="last",
        batch_size=32,
        lr=3e-4,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        schedule="cosine",
        warmup_steps=500,
        ema_decay=0.999,
        seed=42,
        validate_every_epochs=5,
        num_samples=16,
    ),
)
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    image_size=32,
    # A mirrored image would contradict "left" and "right" in its caption.
    flip=False,
    sample_steps=25,
    # Patches of 2 x 2 pixels give as many positions as the latent diffusion has. Other sizes are the same as there.
    unet=UNetSettings(
        channels=(64, 96, 128, 128),
        layers_per_block=1,
        attention_levels=(1, 2, 3),
        num_heads=4,
        patch_size=2,
        pooled_text=True,
    ),
    noise=dataclasses.replace(_BEST.noise, timestep_shift=8.0, unshifted_share=0.5),
    text=TextSettings(max_tokens=32, text_width=128, text_layers=2, text_heads=4),
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
    text=TextSettings(max_tokens=16, text_width=32, text_layers=1, text_heads=2),
    train=dataclasses.replace(
        _SHAPES.train, num_epochs=1, max_steps=20, batch_size=8, warmup_steps=5, ema_decay=0.9, num_samples=4
    ),
)
VARIANTS: dict[str, PixelDiffusionRecipe] = {"report": _REPORT, "best": _BEST, "shapes": _SHAPES, "smoke": _SMOKE}
