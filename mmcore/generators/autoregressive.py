"""A Transformer that writes the codes of an image one after the other, in reading order: DALL-E 1 (Ramesh et al. 2021,
https://arxiv.org/abs/2102.12092) and Parti (Yu et al. 2022, https://arxiv.org/abs/2206.10789) in small.

Every code sees those before it and, by cross-attention, the prompt. Where a discrete code is wrong, a whole edge is:
its cross-entropy pays for shapes what the squared error of a diffusion hardly does.

Shapes: B images, R rows of a batch (twice B under guidance), h and w sides of the grid of codes, L = h·w codes,
T text tokens, M width of a text token, D width, V codes of the codebook.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.decoder import DecoderLayers, LayerSettings, Packing, dropout, seen_only
from mmcore.errors import InputError, OptionError, check_at_least_one, check_share
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.code_sampling import draw_codes, guidance_at, uniforms
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.generators.text_context import TextContext, TextSettings
from mmcore.losses import Loss, Mean, Outputs
from mmcore.recipe import TrainSettings

# Of codes and places at the start: layers begin by adding hardly anything, so these alone tell positions apart.
_EMBEDDING_STD = 0.5


@dataclass(frozen=True)
class TransformerSettings:
    """Sizes of the Transformer."""

    width: int = 256
    """Width of the layers."""
    num_layers: int = 6
    """Layers, each of self-attention, cross-attention to the text, and feed-forward."""
    num_heads: int = 8
    """Heads of each attention."""
    ffn_width: int = 1024
    """Width of the feed-forward part."""
    dropout: float = 0.0
    """Dropout on embeddings, in the feed-forward part and on what each part of a layer adds."""

    def check(self) -> None:
        """Raise InputError for settings that cannot be. A recipe calls it: of a nested field the command line's reader
        would show the error in a form of its own."""
        check_at_least_one(self, "width", "num_layers", "num_heads", "ffn_width")
        if self.width % self.num_heads:
            raise InputError(
                f"num_heads {self.num_heads} does not divide width {self.width}; mend it with --num-heads or --width"
            )
        check_share(self, "dropout")


@dataclass(frozen=True)
class AutoregressiveRecipe:
    """A frozen autoencoder with discrete codes, a Transformer over them; the defaults are those for Flickr8k."""

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
    fresh_scenes: bool = False
    """Train each epoch on scenes that no epoch before had; for data that is rendered (shapes) alone."""
    exhaustive_captions: float = 0.0
    """Share of the training captions that name every object with its place and every clear relation; for data that is
    rendered (shapes) alone."""
    drop_text: float = 0.1
    """Share of the captions that are replaced by no text, for classifier-free guidance."""
    sample: AutoregressiveOptions = field(default_factory=AutoregressiveOptions)
    """How images are drawn: those that are written at each validation, and by default those of the trained model."""
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
            # As of the latent diffusion, so that the grids of both have the same prompts and seeds.
            seed=1111,
            validate_every_epochs=5,
            num_samples=16,
        )
    )
    """How it is optimised."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "captions_per_image")
        check_share(self, "drop_text")
        if not 0 <= self.exhaustive_captions <= 1:
            raise InputError(
                f"exhaustive_captions {self.exhaustive_captions} must be from 0 to 1; mend it with "
                "--exhaustive-captions"
            )
        self.transformer.check()
        self.text.check()
        try:
            self.sample.check(guides=self.drop_text > 0)
        except OptionError as error:
            # Of an error in a nested field the command line's reader shows the first argument: a line, not a name.
            raise InputError(str(error)) from None

    def build(self, facts: AutoregressiveFacts) -> "CodeTransformer":
        """The network."""
        return CodeTransformer(self.transformer, self.text, facts)


class CodeTransformer(nn.Module):
    """Prompts and the codes so far -> logits of the next code."""

    def __init__(self, settings: TransformerSettings, text: TextSettings, facts: AutoregressiveFacts) -> None:
        super().__init__()
        self.num_codes, self.code_shape, self.dropout = facts.num_codes, facts.code_shape, settings.dropout
        width, (num_rows, num_columns) = settings.width, facts.code_shape
        self.length = num_rows * num_columns
        self.text = TextContext(text, facts.text_inputs)
        # The last of the embeddings stands for the beginning.
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
        # All codes alike likely to begin with.
        nn.init.zeros_(self.output.weight)

    def blocks(self) -> list[nn.Module]:
        """What activation checkpointing computes again."""
        return list(self.layers)

    def _embed(self, codes: Tensor, places: Tensor) -> Tensor:
        """Codes (R, n), of which each stands before the one that is wanted, at `places` (n,) -> (R, n, D)."""
        num_columns = self.code_shape[1]
        positions_nD = self.rows_hD[places // num_columns] + self.columns_wD[places % num_columns]
        return dropout(self.embedding(codes) + positions_nD, self.dropout, self.training)

    def _read(self, text: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What stands for the text, (R, T, M), and the bias that hides its padding, (R, 1, 1, T)."""
        mask_RT = self.text.mask(text)
        return self.text(text), None if mask_RT is None else seen_only(mask_RT)[:, None, None]

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, L, V) of every code, each given those before it; `batch` as `forward` takes it."""
        codes_BL = batch["codes"]
        assert codes_BL.shape[1] == self.length, f"{codes_BL.shape[1]} codes an image, not {self.length}"
        mask_BT = self.text.mask(batch)
        if mask_BT is not None:
            # Columns of padding cost as much as words, and add nothing.
            batch = {**batch, "input_ids": batch["input_ids"][:, : int(mask_BT.sum(1).max())]}
        memory_BTM, memory_bias = self._read(batch)
        begin_B1 = codes_BL.new_full((len(codes_BL), 1), self.num_codes)
        before_BL = torch.cat([begin_B1, codes_BL[:, :-1]], dim=1)
        x_BLD = self._embed(before_BL, torch.arange(self.length, device=codes_BL.device))
        packing = Packing.full(*codes_BL.shape)
        x_ND = self.layers(packing.pack(x_BLD), packing, memory_BTM, memory_bias=memory_bias)
        return packing.pad(self.output(self.final_norm(x_ND)))

    def forward(self, batch: dict[str, Tensor]) -> Outputs:
        """The cross-entropy of the codes of the batch, each given those before it.

        Args:
            batch: `codes` int64 (B, L) in reading order, and the text as `TextContext` takes it.
        Returns: `loss`, of each image the mean of its codes in nats, and the metric `correct`, the share of the codes
            that were the likeliest.
        """
        codes_N, logits_NV = batch["codes"].flatten(), self.logits(batch).flatten(0, 1)
        # At least fp32: a sum over thousands of codes.
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
        """Codes int64 (B, h, w), each image's decided by its prompt and its seed alone.

        Args:
            prompts: the text of B images as `TextContext` takes it; `null`: as many of what the guidance leads away
                from, not needed without guidance.
            on_step: called with the codes of an image that are done and all; what it raises ends the work.
        """
        device, num_images = self.output.weight.device, len(seeds)
        text = prompts
        if options.guides:
            assert null is not None, "guidance leads away from something"
            text = {name: torch.cat([prompts[name], null[name]]) for name in prompts}
        memory_RTM, memory_bias = self._read(text)
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
                # Classifier-free guidance; where the scale is 1, the conditional logits to the bit.
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
    # Of 500 validation prompts 97.9 % of the attributes are right (whole scenes 90.8); guidance 2 and temperature 0.6
    # add objects (97.2 and 83.3 of 300), guidance 1 and temperature 1 lose some (94.9 and 78.7). Early in training,
    # after 48,000 images, guidance 2 was the better: 86.8 %, and 74.2 with 1.5.
    sample=AutoregressiveOptions(guidance=1.7, temperature=0.5),
    transformer=TransformerSettings(),
    text=TextSettings(max_tokens=48, text_width=256, text_layers=2, text_heads=8),
    train=dataclasses.replace(
        _BEST.train,
        num_epochs=30,
        max_steps=6200,
        # No scene is seen twice: the last weights are the best.
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
