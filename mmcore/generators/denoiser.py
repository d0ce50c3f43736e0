"""The network of all diffusion recipes: diffusers' conditional U-Net and the text embedding.

It denoises pixels or latents. The recipe defines x_0 and how x_0 becomes an image.

Shapes: B samples, C channels, H rows, W columns, T text tokens, D channels of a text token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.errors import InputError, check_at_least_one
from mmcore.frozen.text import TextInputs
from mmcore.generators.diffusion import NoiseSchedule, SamplerName, guided, make_sampler, sample
from mmcore.generators.text_context import TextContext, TextSettings
from mmcore.losses import Loss, Outputs

# Groups of every GroupNorm, diffusers' default.
_NORM_GROUPS = 32
# Up to this many positions, plain attention is used on a CPU. The backward pass of PyTorch's fused attention took 36 %
# of a step. With more positions the attention matrix does not fit into memory.
_PLAIN_ATTENTION_POSITIONS = 32 * 32


@dataclass(frozen=True)
class UNetSettings:
    """Sizes of diffusers' `UNet2DConditionModel`."""

    channels: tuple[int, ...] = (64, 128, 256, 256)
    """Channels of each level, the finest first. Each level halves the side of the previous one."""
    layers_per_block: int = 2
    """Residual blocks per level in the encoder (the decoder has one more)."""
    attention_levels: tuple[int, ...] = (0, 1)
    """Levels with self-attention and cross-attention to the text; 0 is the finest. The middle block always has both."""
    num_heads: int = 8
    """Attention heads."""
    time_width: int | None = None
    """Width of the timestep embedding; None is four times the channels of the first level."""
    patch_size: int = 1
    """Side of the patches that are moved into channels before the finest level; 2 is four times cheaper."""
    pooled_text: bool = False
    """Add attention-pooled text to the timestep embedding, which scales and shifts every block. Colours and sizes are
    then learned earlier than by cross-attention alone."""

    def check(self) -> None:
        """Raise InputError for invalid settings. The recipe calls this: tyro would reformat an error of a nested
        field."""
        if not self.channels or any(channels < 1 or channels % _NORM_GROUPS for channels in self.channels):
            raise InputError(f"channels {self.channels} must be multiples of {_NORM_GROUPS}; change --channels")
        check_at_least_one(self, "layers_per_block", "num_heads", "patch_size")
        if not set(self.attention_levels) <= set(range(len(self.channels))):
            raise InputError(
                f"attention_levels {self.attention_levels}: there are levels 0 to {len(self.channels) - 1}; change "
                "--attention-levels"
            )
        attending = [self.channels[level] for level in {*self.attention_levels, len(self.channels) - 1}]
        if any(channels % self.num_heads for channels in attending):
            raise InputError(
                f"num_heads {self.num_heads} does not divide the {attending} channels of the levels that attend; "
                "change --num-heads or --channels"
            )

    def build(self, x_0_shape: tuple[int, int, int], context_width: int) -> Any:
        """The U-Net for samples (C, H, W). Raises InputError for a side that cannot be halved for every level."""
        from diffusers import UNet2DConditionModel
        from diffusers.models.attention_processor import AttnProcessor

        num_channels, height, width = x_0_shape
        factor = self.patch_size * 2 ** (len(self.channels) - 1)
        if height % factor or width % factor:
            raise InputError(
                f"channels {self.channels}, patch_size {self.patch_size}: {len(self.channels)} levels need sides "
                f"divisible by {factor}, and samples are {height} x {width}; change --channels or --patch-size"
            )
        num_channels *= self.patch_size**2
        height, width = height // self.patch_size, width // self.patch_size
        if self.pooled_text and context_width % self.num_heads:
            raise InputError(
                f"num_heads {self.num_heads} does not divide the {context_width} channels of the text, as "
                "pooled_text needs; change --num-heads"
            )
        attends = [level in self.attention_levels for level in range(len(self.channels))]
        unet: Any = UNet2DConditionModel(
            sample_size=height,
            in_channels=num_channels,
            out_channels=num_channels,
            down_block_types=tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
            block_out_channels=self.channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=_NORM_GROUPS,
            cross_attention_dim=context_width,
            # diffusers uses this argument as the number of heads, in spite of its name.
            attention_head_dim=self.num_heads,
            time_embedding_dim=self.time_width,
            # The U-Net itself pools the hidden states, so pipelines of diffusers can call it without extra inputs.
            addition_embed_type="text" if self.pooled_text else None,
            addition_embed_type_num_heads=self.num_heads,
            resnet_time_scale_shift="scale_shift" if self.pooled_text else "default",
        )
        finest = min(self.attention_levels, default=len(self.channels) - 1)
        positions = (height >> finest) * (width >> finest)
        if not torch.cuda.is_available() and positions <= _PLAIN_ATTENTION_POSITIONS:
            unet.set_attn_processor(AttnProcessor())
        # Channels-last convolutions are several times as fast, on a CPU in bf16 and on a GPU.
        return unet.to(memory_format=torch.channels_last)


class Denoiser(nn.Module):
    """Predicts the noise or v of noisy samples, conditioned on prompts."""

    def __init__(
        self,
        unet: UNetSettings,
        noise: NoiseSchedule,
        text: TextSettings,
        inputs: TextInputs,
        x_0_shape: tuple[int, int, int],
    ) -> None:
        """`x_0_shape`: (C, H, W) of a sample."""
        super().__init__()
        self.noise, self.x_0_shape = noise, x_0_shape
        self.text = TextContext(text, inputs)
        self.patch_size = unet.patch_size
        self.unet = unet.build(x_0_shape, self.text.width)

    def predict(self, x: Tensor, timesteps: Tensor | int, context: Tensor) -> Tensor:
        """Noisy samples (B, C, H, W), timesteps (B,) or one for all, text (B, T, D) -> prediction (B, C, H, W)."""
        # Patches only permute the values, so noise, targets and losses do not change.
        x = F.pixel_unshuffle(x.to(next(self.parameters()).dtype), self.patch_size)
        prediction = self.unet(x.contiguous(memory_format=torch.channels_last), timesteps, context).sample
        return F.pixel_shuffle(prediction, self.patch_size)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        return [module for module in self.unet.modules() if isinstance(module, ResnetBlock2D | Transformer2DModel)]

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The loss of the samples of the batch.

        Args:
            batch: `x_0` and `noise` (B, C, H, W), `timesteps` int64 (B,), and the text as in `TextContext`.
        Returns: `loss`, the weighted mean squared error per sample.
        """
        x_0, noise, timesteps = batch["x_0"], batch["noise"], batch["timesteps"]
        x_t = self.noise.add_noise(x_0, noise, timesteps)
        losses = self.noise.losses(self.predict(x_t, timesteps, self.text(batch)), x_0, noise, timesteps)
        return Outputs({"loss": Loss(losses.sum(), len(x_0))})

    @torch.inference_mode()
    def generate(
        self,
        prompts: dict[str, Tensor],
        null: dict[str, Tensor] | None,
        seeds: Sequence[int],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        sampler: SamplerName = "ddim",
        clip: bool = False,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Sample x_0, fp32 (B, C, H, W). Each sample depends only on its prompt and its seed.

        `prompts` and `null` are B prompts and B negative prompts as in `forward`. `null` may be None for a guidance
        scale of 1. `clip` as in `make_sampler`.
        """
        context = null_context = self.text(prompts)
        if guidance_scale != 1:
            assert null is not None, "guidance needs a negative prompt"
            null_context = self.text(null)
        return sample(
            guided(self.predict, context, null_context, guidance_scale),
            self.x_0_shape,
            seeds,
            make_sampler(sampler, self.noise, clip=clip),
            num_inference_steps,
            device=next(self.parameters()).device,
            on_step=on_step,
        )
