"""A tower of a contrastive model: tokens of an image or a text to one vector.

Shapes: B rows, L tokens, E channels of a token, D width, H heads, K = D / H width of a head, F features.
"""

import torch
from torch import Tensor, nn

from mmcore.decoder import (
    DecoderLayers,
    LayerSettings,
    Packing,
    attention,
    dropout,
    mask_to_bias,
    merge_heads,
    split_heads,
)

# Width of a layer's feed-forward network, relative to its own (Vaswani et al. 2017).
_FFN_FACTOR = 4


class TokenTower(nn.Module):
    """A projection, Transformer layers in which all tokens see each other, attention pooling, and a projection.

    Attention pooling is that of a learned query over the tokens. The query begins at zero, so pooling begins as the
    mean. Training then learns which tokens count, such as an object in one corner of an image. A mean cannot.
    """

    def __init__(
        self,
        *,
        token_width: int,
        num_positions: int,
        width: int,
        num_layers: int,
        num_heads: int,
        feature_width: int,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        """`num_positions`: largest L. Without layers there are no position embeddings."""
        super().__init__()
        self.num_heads, self.input_dropout = num_heads, input_dropout
        self.projection = nn.Linear(token_width, width)
        # Added to the values of a single pooling, positions would say nothing about what is there.
        self.positions_LD = nn.Parameter(torch.zeros(num_positions, width)) if num_layers else None
        settings = LayerSettings(width, num_heads, _FFN_FACTOR * width, None, dropout, activation="gelu")
        self.layers = DecoderLayers(settings, num_layers)
        self.norm = nn.LayerNorm(width)
        self.query_D = nn.Parameter(torch.zeros(width))
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, feature_width)

    def forward(self, tokens_BLE: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """(B, L, E) -> (B, F). `mask_BL`: bool, the real tokens, the first ones of each row; None if all are real."""
        num_rows, num_tokens = tokens_BLE.shape[:2]
        x_BLD = self.projection(tokens_BLE)
        if mask_BL is None:
            packing = Packing.full(num_rows, num_tokens)
            bias = x_BLD.new_zeros(1, 1, 1, num_tokens)
        else:
            packing = Packing.from_lengths(mask_BL.sum(dim=1), num_tokens)
            bias = mask_to_bias(mask_BL)[:, None, None]
        if self.positions_LD is not None:
            x_BLD = x_BLD + self.positions_LD[:num_tokens]
        x_ND = packing.pack(dropout(x_BLD, self.input_dropout, self.training))
        x_ND = self.norm(self.layers(x_ND, packing, bias=bias))
        key_BLD, value_BLD = packing.pad(self.key_value(x_ND)).chunk(2, dim=-1)
        query_BHXK = split_heads(self.query_D.to(key_BLD.dtype).expand(num_rows, 1, -1), self.num_heads)
        key_BHLK, value_BHLK = split_heads(key_BLD, self.num_heads), split_heads(value_BLD, self.num_heads)
        # As in the layers, PyTorch's fused kernel is slow in the backward pass on a CPU.
        fused = x_BLD.device.type != "cpu"
        pooled_BHXK = attention(query_BHXK, key_BHLK, value_BHLK, bias, fused=fused)
        return self.output(merge_heads(pooled_BHXK)[:, 0])
