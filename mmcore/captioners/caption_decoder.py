"""The Transformer decoder of captions.

Shapes: B images, C captions (or beams) per image, R = B·C rows, T positions, N real tokens of the batch, L image
tokens, D width, V words.
"""

import math

import torch
from torch import Tensor, nn

from mmcore.decoder import DecoderLayers, DecodingState, LayerSettings, Packing, dropout


def sinusoidal_positions(num_positions: int, width: int) -> Tensor:
    """Sinusoidal position embeddings (Vaswani et al. 2017, section 3.5): (T, D)."""
    position_T1 = torch.arange(num_positions, dtype=torch.float64)[:, None]
    frequency_F = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width))
    codes_TD = torch.zeros(num_positions, width, dtype=torch.float64)
    codes_TD[:, 0::2] = torch.sin(position_T1 * frequency_F)
    codes_TD[:, 1::2] = torch.cos(position_T1 * frequency_F)
    return codes_TD.float()


class CaptionDecoder(nn.Module):
    """Previous words and image tokens -> logits of the next word."""

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        ffn_width: int,
        dropout: float,
        attention_dropout: float,
        max_length: int,
        norm_first: bool,
        tie_embeddings: bool,
    ) -> None:
        super().__init__()
        self.width, self.max_length, self.dropout = width, max_length, dropout
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions_TD: Tensor
        self.register_buffer("positions_TD", sinusoidal_positions(max_length, width), persistent=False)
        # ReLU, as in the report; GELU made no measurable difference here.
        settings = LayerSettings(width, num_heads, ffn_width, width, dropout, attention_dropout, norm_first)
        self.layers = DecoderLayers(settings, num_layers)
        # With pre-norm the last layer's output is not normalised; with post-norm it is.
        self.final_norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.output = nn.Linear(width, vocabulary_size)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if tie_embeddings:
            self.output.weight = self.embedding.weight

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        # sqrt(D) scales the embeddings (std 1/sqrt(D)) to the size of the position embeddings.
        x = self.embedding(input_ids) * math.sqrt(self.width) + positions
        return dropout(x, self.dropout, self.training)

    def forward(self, input_ids_RT: Tensor, packing: Packing, memory_BLD: Tensor) -> Tensor:
        """Logits of the next word at each real token.

        Args:
            input_ids_RT: int64 (B·C, T), beginning with ``<bos>``; the rows of one image are adjacent.
            packing: which of them are real tokens.
            memory_BLD: (B, L, D).
        Returns: (N, V).
        """
        positions_RTD = self.positions_TD[: input_ids_RT.shape[1]].expand(input_ids_RT.shape[0], -1, -1)
        x_ND = self._embed(packing.pack(input_ids_RT[..., None]).squeeze(-1), packing.pack(positions_RTD))
        return self.output(self.final_norm(self.layers(x_ND, packing, memory_BLD)))

    def start(self, memory_BLD: Tensor, rows_per_image: int, num_positions: int) -> DecodingState:
        """Empty caches for `rows_per_image` rows per image and at most `num_positions` words."""
        return self.layers.start(memory_BLD.shape[0] * rows_per_image, num_positions, memory_BLD)

    def step(self, input_ids_R: Tensor, state: DecodingState) -> Tensor:
        """Logits (R, V) of the word after `input_ids_R`, whose position is ``state.position``."""
        x_RD = self._embed(input_ids_R, self.positions_TD[state.position])
        return self.output(self.final_norm(self.layers.step(x_RD[:, None], state)[:, 0]))
