"""An autoregressive Transformer over the discrete codes of an image, row by row.

It is a small version of DALL-E 1 (Ramesh et al. 2021, https://arxiv.org/abs/2102.12092) and Parti (Yu et al. 2022,
https://arxiv.org/abs/2206.10789). Each code attends to the codes before it and, by cross-attention, to the prompt. A
wrong code changes a whole edge, so the cross-entropy penalises wrong shapes. The squared error of a diffusion hardly
does.

Shapes: B images, R rows of a batch (2·B with guidance), h and w sides of the grid of codes, L = h·w codes, T text
tokens, M width of a text token, D width, V codes of the codebook.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.decoder import DecoderLayers, LayerSettings, Packing, dropout, mask_to_bias
from mmcore.errors import InputError, OptionError, check_at_least_one, check_heads, check_share
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.code_sampling import draw_codes, guidance_at, uniforms
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.generators.text_context import TextContext, TextSettings
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings

# Initial standard deviation of code and position embeddings. The zero-initialised layers add hardly anything at first,
# so only these embeddings distinguish positions.
_EMBEDDING_STD = 0.5


@dataclass(frozen=True)
class TransformerSettings:
    """Sizes of the Transformer."""

    width: int = 256
    """Width of the layers."""
    num_layers: int = 6
    """Number of layers: self-attention, cross-attention to the text, feed-forward."""
    num_heads: int = 8
    """Attention heads."""
    ffn_width: int = 1024
    """Width of the feed-forward layers."""
    dropout: float = 0.0
    """Dropout of embeddings, feed-forward layers and residual branches."""

    def check(self) -> None:
        """Raise InputError for invalid settings. The recipe calls this: tyro would reformat an error of a nested
        field."""
        check_at_least_one(self, "width", "num_layers", "num_heads", "ffn_width")
        check_heads(self)
        check_share(self, "dropout")


@dataclass(frozen=True)
class AutoregressiveRecipe:
    """A Transformer over the codes of a frozen VQ-VAE. The defaults are the settings for Flickr8k."""

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
    fresh_scenes: bool = False
    """Render new scenes in every epoch. Only for rendered data (shapes)."""
    exhaustive_captions: float = 0.0
    """Share of the training captions that describe every object, its place and all clear relations. Only for rendered
    data (shapes). With 1, those of captions_per_image are not trained on; their words are known all the same."""
    drop_text: float = 0.1
    """Share of the captions that are replaced by the empty text, for classifier-free guidance."""
    # On Flickr8k, temperature 0.9 with top_p 0.95 gave areas of one texture; temperature 1 gave scenes (docs/log.md).
    sample: AutoregressiveOptions = field(default_factory=lambda: AutoregressiveOptions(temperature=1.0))
    """Sampling options of the images at each validation, and the defaults of the trained model."""
    transformer: TransformerSettings = field(
        default_factory=lambda: TransformerSettings(width=384, num_layers=8, num_heads=6, ffn_width=1536, dropout=0.1)
    )
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
            betas=(0.9, 0.98),
            weight_decay=0.01,
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
        check_share(self, "drop_text")
        if not 0 <= self.exhaustive_captions <= 1:
            raise InputError(
                f"exhaustive_captions {self.exhaustive_captions} must be from 0 to 1; change --exhaustive-captions"
            )
        self.transformer.check()
        self.text.check()
        try:
            self.sample.check(guides=self.drop_text > 0)
        except OptionError as error:
            # tyro shows only the first argument of the error, and that of an OptionError is not the message.
            raise InputError(str(error)) from None
        if self.sample.negative_prompt:
            raise InputError(
                f"negative_prompt {self.sample.negative_prompt!r}: a training draws its samples without one; give "
                "--negative-prompt to jobs/generate.py"
            )

    def build(self, facts: AutoregressiveFacts) -> "CodeTransformer":
        """The network."""
        return CodeTransformer(self.transformer, self.text, facts)


class CodeTransformer(nn.Module):
    """Prompts and previous codes -> logits of the next code."""

    def __init__(self, settings: TransformerSettings, text: TextSettings, facts: AutoregressiveFacts) -> None:
        super().__init__()
        self.num_codes, self.code_shape, self.dropout = facts.num_codes, facts.code_shape, settings.dropout
        width, (num_rows, num_columns) = settings.width, facts.code_shape
        self.length = num_rows * num_columns
        self.text = TextContext(text, facts.text_inputs)
        # The last embedding is the begin token.
        self.embedding = nn.Embedding(facts.num_codes + 1, width)
        self.rows_hD = nn.Parameter(torch.empty(num_rows, width))
        self.columns_wD = nn.Parameter(torch.empty(num_columns, width))
        self.layers = DecoderLayers(
            LayerSettings(
                width,
                settings.num_heads,
                settings.ffn_width,
                self.text.width,
                settings.dropout,
                activation="gelu",
                qk_norm=True,
                zero_outputs=True,
                fused_on_cpu=False,
            ),
            settings.num_layers,
        )
        self.final_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, facts.num_codes)
        for weight in (self.embedding.weight, self.rows_hD, self.columns_wD):
            nn.init.normal_(weight, std=_EMBEDDING_STD)
        # All codes are equally likely at first.
        nn.init.zeros_(self.output.weight)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return list(self.layers)

    def _embed(self, codes: Tensor, places: Tensor) -> Tensor:
        """Embed previous codes (R, n) for the codes to predict at `places` (n,) -> (R, n, D)."""
        num_columns = self.code_shape[1]
        positions_nD = self.rows_hD[places // num_columns] + self.columns_wD[places % num_columns]
        return dropout(self.embedding(codes) + positions_nD, self.dropout, self.training)

    def _text_memory(self, text: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Text embeddings (R, T, M) and the attention bias (R, 1, 1, T) that hides their padding."""
        mask_RT = self.text.mask(text)
        return self.text(text), None if mask_RT is None else mask_to_bias(mask_RT)[:, None, None]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, L, V) of every code given the codes before it; `batch` as in `forward`."""
        codes_BL = batch["codes"]
        assert codes_BL.shape[1] == self.length, f"{codes_BL.shape[1]} codes per image, not {self.length}"
        mask_BT = self.text.mask(batch)
        if mask_BT is not None:
            # Cut padding that is common to all rows: it only costs time.
            batch = {**batch, "input_ids": batch["input_ids"][:, : int(mask_BT.sum(1).max())]}
        memory_BTM, memory_bias = self._text_memory(batch)
        begin_B1 = codes_BL.new_full((len(codes_BL), 1), self.num_codes)
        before_BL = torch.cat([begin_B1, codes_BL[:, :-1]], dim=1)
        x_BLD = self._embed(before_BL, torch.arange(self.length, device=codes_BL.device))
        packing = Packing.full(*codes_BL.shape)
        x_ND = self.layers(packing.pack(x_BLD), packing, memory_BTM, memory_bias=memory_bias)
        return packing.pad(self.output(self.final_norm(x_ND)))

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The cross-entropy of every code given the codes before it.

        Args:
            batch: `codes` int64 (B, L) row by row, and the text as in `TextContext`.
        Returns: `loss`, in nats per code, and the metric `correct`: the share of codes with the highest probability.
        """
        codes_N, logits_NV = batch["codes"].flatten(), self.logits(batch).flatten(0, 1)
        # fp32 or above, as the loss is a sum over thousands of codes.
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        loss = F.cross_entropy(logits_NV, codes_N, reduction="sum") / self.length
        correct = (logits_NV.argmax(-1) == codes_N).sum()
        return Outputs({"loss": Loss(loss, len(batch["codes"]))}, {"correct": Mean(correct, codes_N.numel())})

    @torch.inference_mode()
    def generate(
        self,
        prompts: dict[str, Tensor],
        null: dict[str, Tensor] | None,
        seeds: Sequence[int],
        options: AutoregressiveOptions,
        *,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Sample codes, int64 (B, h, w). The codes of an image depend only on its prompt and its seed.

        Args:
            prompts: the text of B images as in `TextContext`.
            null: the negative prompt of each image, in the same form; may be None without guidance.
            on_step: called with the number of finished codes per image and the total. An exception stops the work.
        """
        device, num_images = self.output.weight.device, len(seeds)
        text = prompts
        if options.guides:
            assert null is not None, "guidance needs a negative prompt"
            text = {name: torch.cat([prompts[name], null[name]]) for name in prompts}
        memory_RTM, memory_bias = self._text_memory(text)
        num_rows = len(memory_RTM)
        state = self.layers.start(num_rows, self.length, memory_RTM, memory_bias)
        uniform_BL = uniforms(seeds, self.length).to(device)
        codes_BL = torch.empty(num_images, self.length, dtype=torch.long, device=device)
        last_R1 = torch.full((num_rows, 1), self.num_codes, device=device)
        places_L = torch.arange(self.length, device=device)
        for place in range(self.length):
            x_R1D = self.layers.step(self._embed(last_R1, places_L[place : place + 1]), state)
            logits_RV = self.output(self.final_norm(x_R1D[:, 0])).float()
            if options.guides:
                conditional_BV, null_BV = logits_RV.chunk(2)
                # Classifier-free guidance. For a scale of 1 lerp returns exactly the conditional logits.
                logits_RV = null_BV.lerp(conditional_BV, guidance_at(options, place, self.length))
            codes_BL[:, place] = draw_codes(logits_RV, uniform_BL[:, place], options)
            last_R1 = codes_BL[:, place].repeat(num_rows // num_images)[:, None]
            if on_step is not None:
                on_step(place + 1, self.length)
        return codes_BL.unflatten(1, self.code_shape)


_BEST = AutoregressiveRecipe()
_SHAPES = dataclasses.replace(
    _BEST,
    dataset="shapes",
    split="split",
    fresh_scenes=True,
    exhaustive_captions=0.5,
    # On 500 validation prompts 97.9 % of the attributes and 90.8 % of the whole scenes are correct. Guidance 2
    # with temperature 0.6 adds objects (97.2 % and 83.3 % on 300 prompts). Guidance 1 with temperature 1 loses objects
    # (94.9 % and 78.7 %). Earlier in training (48,000 images) guidance 2 gave 86.8 % and guidance 1.5 gave 74.2 %.
    sample=AutoregressiveOptions(guidance=1.7, temperature=0.5),
    transformer=TransformerSettings(),
    text=TextSettings(max_tokens=48, text_width=256, text_layers=2, text_heads=8),
    train=dataclasses.replace(
        _BEST.train,
        num_epochs=30,
        max_steps=5400,
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
    transformer=TransformerSettings(width=32, num_layers=1, num_heads=2, ffn_width=64),
    text=TextSettings(max_tokens=24, text_width=32, text_layers=1, text_heads=2),
    train=dataclasses.replace(
        _SHAPES.train, num_epochs=1, max_steps=20, batch_size=8, warmup_steps=5, ema_decay=0.9, num_samples=4
    ),
)
VARIANTS: dict[str, AutoregressiveRecipe] = {"best": _BEST, "shapes": _SHAPES, "smoke": _SMOKE}
