"""LoRA adapters in the U-Net of Stable Diffusion XL (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

The loss is that of diffusers' example `train_text_to_image_lora_sdxl.py`: the squared error of the predicted noise. The
frozen VAE and both frozen text encoders run once, before the training.

Shapes: B images, h and w sides of the latents, T text tokens, C channels of a text token, P channels of the pooled
text.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmcore.errors import InputError, check_at_least_one, check_not_negative, check_share
from mmcore.generators.sdxl import FACTOR
from mmcore.losses import Loss, Outputs
from mmcore.recipe import TrainSettings

TINY_MODEL = "tiny"
"""Name of a model in place of a pretrained one: a tiny SDXL with random weights."""
ADAPTER = "default"
# Half of diffusers' limits of a logarithm of a variance.
_LOG_VARIANCE = (-30.0, 20.0)


@dataclass(frozen=True)
class SdxlLoraRecipe:
    """A LoRA of SDXL's U-Net. The defaults are the settings of the report, which are those of diffusers' example."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report_generation"
    """Column of the dataset that selects the training rows."""
    captions_per_image: int = 5
    """Number of captions per image to train on, the first ones. Each epoch draws one of them at random."""
    model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """SDXL pipeline of diffusers: a folder, or a name on the hub. `tiny` is one of random weights for trials."""
    revision: str | None = None
    """Commit, branch or tag of a model on the hub; by default its newest."""
    image_size: int = 512
    """Side in pixels. The shorter side of an image is resized to it, and the centre is cropped."""
    flip: bool = True
    """Mirror images at random with probability 1/2 (the VAE runs on both views)."""
    rank: int = 128
    """Rank of the adapters. The report's rank 4 gave broken bodies."""
    alpha: float | None = None
    """The adapters' products are multiplied by alpha / rank. None is the rank."""
    target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    """Linear layers with an adapter, by the end of their names."""
    lora_dropout: float = 0.0
    """Dropout of the adapters' inputs."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA, Liu et al. 2024, arXiv 2402.09353)."""
    min_snr_gamma: float | None = None
    """Min-SNR weights of the loss (Hang et al. 2023, arXiv 2303.09556), usually 5. None weights all steps equally."""
    noise_offset: float = 0.0
    """Standard deviation of noise that is equal in a whole channel, for darker and brighter images."""
    sample_steps: int = 25
    """Sampling steps of the images at each validation."""
    sample_guidance: float = 5.0
    """Guidance scale of the images at each validation; 1 is no guidance."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=100,
            max_steps=1000,
            # The loss of single timesteps hardly falls while the images change.
            keep="last",
            batch_size=16,
            lr=1e-4,
            weight_decay=1e-2,
            schedule="cosine",
            checkpoint_every_steps=100,
            seed=1337,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "captions_per_image", "image_size", "rank", "sample_steps")
        check_share(self, "lora_dropout")
        if self.image_size % (4 * FACTOR):
            raise InputError(
                f"image_size {self.image_size} must be a multiple of {4 * FACTOR}: the U-Net halves the latents twice; "
                "change --image-size"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"alpha {self.alpha} must be above 0; change --alpha")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise InputError(f"min_snr_gamma {self.min_snr_gamma} must be above 0; change --min-snr-gamma")
        check_not_negative(self, "noise_offset")
        if not self.target_modules:
            raise InputError("target_modules is empty; name layers with --target-modules, such as to_q to_v")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one image's latents."""
        side = self.image_size // FACTOR
        return 4, side, side

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha


class SdxlLora(nn.Module):
    """A frozen U-Net with trained adapters."""

    def __init__(
        self, unet: Any, recipe: SdxlLoraRecipe, alphas_cumprod: Tensor, prediction: str, scale: float
    ) -> None:
        """`unet`: diffusers' UNet2DConditionModel, which gets the adapters. `alphas_cumprod`: (T,) of the noise
        schedule. `prediction`: ``epsilon`` or ``v_prediction``. `scale`: scaling factor of the VAE.

        Raises InputError if no layer has one of the recipe's names.
        """
        super().__init__()
        from peft import LoraConfig

        self.recipe, self.prediction, self.scale = recipe, prediction, scale
        unet.requires_grad_(False)
        try:
            unet.add_adapter(
                LoraConfig(
                    r=recipe.rank,
                    lora_alpha=recipe.lora_alpha,  # type: ignore[arg-type]
                    lora_dropout=recipe.lora_dropout,
                    init_lora_weights="gaussian",
                    target_modules=list(recipe.target_modules),
                    use_dora=recipe.dora,
                ),
                adapter_name=ADAPTER,
            )
        except ValueError as error:
            raise InputError(f"--target-modules {' '.join(recipe.target_modules)}: {error}") from None
        for parameter in unet.parameters():
            if parameter.requires_grad:
                # The adapters are trained in fp32 beside a U-Net in half precision.
                parameter.data = parameter.data.float()
        self.unet = unet
        self.register_buffer("alphas_cumprod_T", alphas_cumprod.float(), persistent=False)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.resnet import ResnetBlock2D

        return [module for module in self.unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]

    def latents(self, moments_B8hw: Tensor, normal_B4hw: Tensor) -> Tensor:
        """Latents drawn from the VAE's mean and logarithm of variance, scaled: (B, 4, h, w)."""
        mean, log_variance = moments_B8hw.chunk(2, dim=1)
        return (mean + (0.5 * log_variance.clamp(*_LOG_VARIANCE)).exp() * normal_B4hw) * self.scale

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The squared error of the prediction.

        Args:
            batch: `moments` (B, 8, h, w), `latent_noise` and `noise` (B, 4, h, w), `channel_noise` (B, 4, 1, 1).
                Also `timesteps` (B,), `prompt_embeds` (B, T, C), `pooled` (B, P) and `time_ids` (B, 6). The last are
                height, width, top, left, target height and target width.
        """
        latents_B4hw = self.latents(batch["moments"], batch["latent_noise"])
        noise_B4hw = batch["noise"] + self.recipe.noise_offset * batch["channel_noise"]
        kept_B = self.alphas_cumprod_T[batch["timesteps"]].to(latents_B4hw.dtype)  # type: ignore[index]
        signal_B111, spread_B111 = (each[:, None, None, None] for each in (kept_B.sqrt(), (1 - kept_B).sqrt()))
        noisy_B4hw = signal_B111 * latents_B4hw + spread_B111 * noise_B4hw
        predicted_B4hw = self.unet(
            noisy_B4hw,
            batch["timesteps"],
            batch["prompt_embeds"],
            added_cond_kwargs={"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]},
            return_dict=False,
        )[0]
        target_B4hw = noise_B4hw
        if self.prediction == "v_prediction":
            target_B4hw = signal_B111 * noise_B4hw - spread_B111 * latents_B4hw
        error_B = (predicted_B4hw.to(target_B4hw.dtype) - target_B4hw).square().mean((1, 2, 3))
        return Outputs({"loss": Loss((self._weights(kept_B) * error_B).sum(), len(error_B))})

    def _weights(self, kept_B: Tensor) -> Tensor:
        """Min-SNR weights of the timesteps, or ones."""
        gamma = self.recipe.min_snr_gamma
        if gamma is None:
            return torch.ones_like(kept_B)
        snr_B = kept_B / (1 - kept_B)
        # A schedule may end without any signal.
        divisor_B = snr_B + 1 if self.prediction == "v_prediction" else snr_B.clamp_min(1e-8)
        return snr_B.clamp(max=gamma) / divisor_B


_REPORT = SdxlLoraRecipe()
_SMOKE = dataclasses.replace(
    _REPORT,
    dataset="shapes",
    split="split",
    model=TINY_MODEL,
    image_size=64,
    flip=False,
    rank=4,
    sample_steps=2,
    train=dataclasses.replace(
        _REPORT.train, num_epochs=1, max_steps=20, batch_size=8, checkpoint_every_steps=10, num_samples=2
    ),
)
VARIANTS: dict[str, SdxlLoraRecipe] = {"report": _REPORT, "smoke": _SMOKE}
