"""Infinity as a recipe: the text, the Transformer over grids of bits, its losses and its initial weights.

Han et al. 2024, https://arxiv.org/abs/2412.04431, section 3. `mmcore.generators.infinity` has the network,
`infinity_tokenizer` the frozen model that makes latents of images.

Shapes: B images, d bits of a position, h and w sides of a grid, H and W sides of the latent image, L positions of all
grids, T text tokens, C channels of a text token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.errors import InputError, OptionError, check_at_least_one, check_heads, check_share
from mmcore.generators.bsq import quantize
from mmcore.generators.code_sampling import uniforms
from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer, pool_heads
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_sampling import sample
from mmcore.generators.infinity_scales import Grid, num_positions
from mmcore.generators.text_context import TextContext, TextSettings
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings

# The published initial weights.
_HEAD_SCALE = 0.02
_GAIN_SCALE, _SHIFT_SCALE = 5e-6, 1e-3
_NO_TEXT_STD = 1.2
# The first half of a head's pairs of channels turns with the row, the second with the column.
_CHANNELS_PER_TURN = 4
# The width of the feed-forward layers is rounded to multiples of 256.
_MIN_WIDTH = 64


@dataclass(frozen=True)
class InfinitySizes:
    """Sizes of the Transformer. Those of the text and the bits come from elsewhere."""

    width: int = 256
    """Width of the layers."""
    num_layers: int = 6
    """Number of layers: self-attention, cross-attention to the text, feed-forward."""
    num_heads: int = 8
    """Attention heads."""

    def check(self) -> None:
        """Raise InputError for invalid settings. The recipe calls this: tyro would reformat an error of a nested
        field."""
        check_at_least_one(self, "num_layers", "num_heads")
        if self.width < _MIN_WIDTH:
            raise InputError(f"width {self.width} must be at least {_MIN_WIDTH}; change --width")
        check_heads(self)
        if self.width // self.num_heads % _CHANNELS_PER_TURN:
            raise InputError(
                f"num_heads {self.num_heads} gives {self.width // self.num_heads} of width {self.width} to a head, "
                f"which must be a multiple of {_CHANNELS_PER_TURN}; change --num-heads or --width"
            )


@dataclass(frozen=True)
class InfinityRecipe:
    """A Transformer over the bits of a frozen tokenizer. The defaults are the settings for Flickr8k."""

    dataset: str = "flickr8k"
    """Name of the prepared dataset under STORAGE/data/."""
    split: str = "split_report_generation"
    """Column of the dataset that selects the training rows."""
    captions_per_image: int = 5
    """Number of captions per image to train on, the first ones. Each epoch draws one of them at random."""
    image_tokenizer: str | None = None
    """Finished run of --stage tokenizer (STORAGE/runs/infinity_tokenizer/NAME, a folder or s3://...). It sets the size
    of the images. None first trains that of the variant, under this run's --name, or takes a finished one of it."""
    flip: bool = False
    """Mirror images at random with probability 1/2 (the tokenizer runs on both views)."""
    fresh_scenes: bool = False
    """Render new scenes in every epoch. Only for rendered data (shapes)."""
    exhaustive_captions: float = 0.0
    """Share of the training captions that describe every object, its place and all clear relations. Only for rendered
    data (shapes). With 1, those of captions_per_image are not trained on; their words are known all the same."""
    drop_text: float = 0.1
    """Share of the captions that are replaced by learned features of no text, for classifier-free guidance."""
    flip_strength: float = 0.3
    """Largest share of a grid's bits that are flipped before the next grids, which then learn to correct them. The
    share is drawn per image and grid."""
    sample: InfinityOptions = field(default_factory=InfinityOptions)
    """Sampling options of the images at each validation, and the defaults of the trained model."""
    transformer: InfinitySizes = field(default_factory=lambda: InfinitySizes(width=384, num_layers=8, num_heads=6))
    """The network."""
    text: TextSettings = field(
        default_factory=lambda: TextSettings(max_tokens=40, text_width=192, text_layers=3, text_heads=4)
    )
    """The text."""
    train: TrainSettings = field(
        default_factory=lambda: TrainSettings(
            num_epochs=60,
            batch_size=32,
            lr=6e-4,
            # The published ones.
            betas=(0.9, 0.97),
            weight_decay=0.005,
            schedule="linear_tail",
            warmup_steps=500,
            ema_decay=0.999,
            # The seed of the latent diffusion, so that both have sample grids of the same prompts and seeds.
            seed=1111,
            validate_every_epochs=5,
            num_samples=16,
        )
    )
    """Optimisation."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "captions_per_image")
        check_share(self, "drop_text", "flip_strength")
        if not 0 <= self.exhaustive_captions <= 1:
            raise InputError(
                f"exhaustive_captions {self.exhaustive_captions} must be from 0 to 1; change --exhaustive-captions"
            )
        self.transformer.check()
        self.text.check()
        if self.text.is_scratch:
            _check_pool(self.transformer, self.text.text_width, "--text-width")
        try:
            self.sample.check(self.transformer.num_layers, guides=self.drop_text > 0)
        except OptionError as error:
            # tyro shows only the first argument of the error, and that of an OptionError is not the message.
            raise InputError(str(error)) from None

    def build(self, facts: InfinityFacts) -> "InfinityGenerator":
        """The network."""
        return InfinityGenerator(self, facts)


def _check_pool(sizes: InfinitySizes, text_channels: int, flag: str) -> None:
    """Raise InputError, naming `flag`, where the heads that pool the text do not divide the width."""
    num_heads = pool_heads(text_channels)
    if sizes.width % num_heads:
        raise InputError(
            f"width {sizes.width} is not a multiple of {num_heads}, the heads that pool a text of {text_channels} "
            f"channels; change --width or {flag}"
        )


class InfinityGenerator(nn.Module):
    """Prompts and the grids so far -> bits of the next grid."""

    def __init__(self, recipe: InfinityRecipe, facts: InfinityFacts) -> None:
        """Raises InputError for a text that the Transformer's heads cannot pool."""
        super().__init__()
        self.grids, self.finest, self.num_bits = facts.grids, facts.grids[-1], facts.latent_shape[0]
        self.text = TextContext(recipe.text, facts.text_inputs)
        sizes = recipe.transformer
        _check_pool(sizes, self.text.width, "--projection-width")
        self.transformer = InfinityTransformer(
            InfinitySettings(
                num_layers=sizes.num_layers,
                width=sizes.width,
                num_heads=sizes.num_heads,
                text_channels=self.text.width,
                max_text_tokens=recipe.text.max_tokens,
                num_bits=self.num_bits,
            )
        )
        initialize(self.transformer)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return list(self.transformer.blocks)

    def _text(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Text embeddings (B, T, C) and the mask of their tokens, bool (B, T)."""
        text_BTC, mask_BT = self.text(batch), self.text.mask(batch)
        if mask_BT is None:
            mask_BT = torch.ones(text_BTC.shape[:2], dtype=torch.bool, device=text_BTC.device)
        return text_BTC, mask_BT

    def targets(self, latents_BdHW: Tensor, flips_BLd: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The right bits of all grids, bool (B, L, d), and for each grid but the first its input, (B, d, h, w).

        The bits and inputs of a grid are those after the flipped bits of the grids before it.
        """
        starts, change = _starts(self.grids), None
        if flips_BLd is not None:

            def change(number: int, bits_Bdhw: Tensor) -> Tensor:
                flips_BLd_ = flips_BLd[:, starts[number] : starts[number + 1]]
                return bits_Bdhw ^ flips_BLd_.transpose(1, 2).unflatten(2, self.grids[number])

        quantized = quantize(latents_BdHW, self.grids, change)
        return torch.cat([bits.flatten(2).transpose(1, 2) for bits in quantized.bits], dim=1), quantized.inputs

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The cross-entropy of every bit, given its prompt and the grids before it.

        A grid has a weight proportional to the root of its number of positions, as published.

        Args:
            batch: `latents` (B, d, H, W) before quantisation, and the text as in `TextContext`. In training also
                `flips`, bool (B, L, d), and `dropped`, bool (B,): the rows without text.
        Returns: `loss`, in nats per bit. The metrics `bit_accuracy` and, for each grid, `bit_accuracy_HxW`: the share
            of bits whose probability is above one half.
        """
        mask_BT = self.text.mask(batch)
        if mask_BT is not None:
            # Cut padding that is common to all rows: it only costs time.
            batch = {**batch, "input_ids": batch["input_ids"][:, : int(mask_BT.sum(1).max())]}
        text_BTC, mask_BT = self._text(batch)
        if "dropped" in batch:
            nothing_TC = self.transformer.no_text_TC[: text_BTC.shape[1]].to(text_BTC.dtype)
            text_BTC = torch.where(batch["dropped"][:, None, None], nothing_TC, text_BTC)
        latents_BdHW = batch["latents"]
        with torch.no_grad(), torch.autocast(latents_BdHW.device.type, enabled=False):
            bits_BLd, inputs = self.targets(latents_BdHW, batch.get("flips"))
        state = self.transformer.text_state(text_BTC, mask_BT)
        logits_BLd2 = self.transformer(state, inputs, self.grids, self.finest)
        # Two logits and a softmax: the loss is that of their difference.
        margins_BLd = logits_BLd2[..., 1] - logits_BLd2[..., 0]
        losses_BL = F.binary_cross_entropy_with_logits(
            margins_BLd, bits_BLd.to(margins_BLd.dtype), reduction="none"
        ).mean(-1)
        loss = (losses_BL * grid_weights(self.grids).to(losses_BL)).sum()
        right_BL = ((margins_BLd > 0) == bits_BLd).sum(-1)
        metrics = {"bit_accuracy": Mean(right_BL.sum(), bits_BLd.numel())}
        for (height, width), part in zip(self.grids, right_BL.split(_sizes(self.grids), dim=1), strict=True):
            metrics[f"bit_accuracy_{height}x{width}"] = Mean(part.sum(), part.numel() * self.num_bits)
        return Outputs({"loss": Loss(loss, len(latents_BdHW))}, metrics)

    @torch.inference_mode()
    def generate(
        self,
        prompts: dict[str, Tensor],
        seeds: Sequence[int],
        options: InfinityOptions,
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Sample latents (B, d, H, W), the sum of all grids. Those of an image depend on its prompt and its seed only.

        Args:
            prompts: the text of B images as in `TextContext`.
            on_step: called with the number of finished grids and the total. An exception stops the work.
        """
        text_BTC, mask_BT = self._text(prompts)
        numbers_BLd = uniforms(seeds, num_positions(self.grids), self.num_bits).to(text_BTC.device)
        total = len(self.grids[: options.num_grids])
        for step in sample(self.transformer, text_BTC, mask_BT, self.grids, self.finest, options, numbers_BLd):
            if on_step is not None:
                on_step(step.number + 1, total)
        return step.latents_BdHW


def _sizes(grids: Sequence[Grid]) -> list[int]:
    """Positions of each grid."""
    return [height * width for height, width in grids]


def _starts(grids: Sequence[Grid]) -> list[int]:
    """The first position of each grid, and the end of the last."""
    return [num_positions(tuple(grids[:number])) for number in range(len(grids) + 1)]


def grid_weights(grids: Sequence[Grid]) -> Tensor:
    """Weight of each position in the loss, (L,): one over the root of its grid's positions, of sum 1."""
    weights_L = torch.cat([torch.full((size,), size**-0.5) for size in _sizes(grids)])
    return weights_L / weights_L.sum()


@torch.no_grad()
def initialize(model: InfinityTransformer) -> None:
    """The published initial weights.

    All have a standard deviation of 1 / √(3·D), projections back to the residual stream less by the number of layers.
    The head and what modulates a layer begin near 0. All bits are then equally likely.
    """
    width, num_layers = model.settings.width, model.settings.num_layers
    std = (3 * width) ** -0.5
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.first_position_D, std=std)
    nn.init.trunc_normal_(model.text_pool.query_Hh, std=std)
    nn.init.trunc_normal_(model.no_text_TC, std=_NO_TEXT_STD)
    model.no_text_TC.div_(model.settings.text_channels**0.5)
    for block in model.layers():
        outputs: tuple[Any, ...] = (block.self_attention.out, block.cross_attention.out, block.ffn[-1])
        for linear in outputs:
            linear.weight.div_((2 * num_layers) ** 0.5)
        nn.init.normal_(block.modulation_6D, std=width**-0.5)
        block.modulation_6D[:2].mul_(_GAIN_SCALE)
        block.modulation_6D[2:].mul_(_SHIFT_SCALE)
    head_modulation: Any = model.head_modulation[-1]
    head_modulation.weight.mul_(_SHIFT_SCALE)
    model.head.weight.mul_(_HEAD_SCALE)


_BEST = InfinityRecipe()
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    fresh_scenes=True,
    exhaustive_captions=0.5,
    sample=InfinityOptions(guidance=2.0, temperature=0.5),
    transformer=InfinitySizes(),
    text=TextSettings(max_tokens=48, text_width=256, text_layers=2, text_heads=8),
    train=dataclasses.replace(
        _BEST.train,
        num_epochs=30,
        max_steps=3000,
        # No scene is seen twice, so the model does not overfit and the last weights are the best.
        keep="last",
        lr=1e-3,
        warmup_steps=150,
        ema_decay=0.998,
        validate_every_epochs=5,
    ),
)
_SMOKE = dataclasses.replace(
    _SHAPES,
    transformer=InfinitySizes(width=64, num_layers=1, num_heads=2),
    text=TextSettings(max_tokens=24, text_width=32, text_layers=1, text_heads=2),
    train=dataclasses.replace(
        _SHAPES.train, num_epochs=1, max_steps=20, batch_size=8, warmup_steps=5, ema_decay=0.9, num_samples=4
    ),
)
VARIANTS: dict[str, InfinityRecipe] = {"best": _BEST, "shapes": _SHAPES, "smoke": _SMOKE}
