"""The captioner of the report as its code runs it: PyTorch's decoder, padded captions, no cache.

Shapes: B images, T positions, L image tokens, E channels of the encoder, D width, V words.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.captioners.caption_decoder import CaptionDecoder, sinusoidal_positions
from mmcore.captioners.cross_attention import CrossAttentionCaptionerRecipe
from mmcore.decoder import DecoderLayer
from mmcore.text import BOS_ID, PAD_ID, UNK_ID

MAX_LENGTH = 50
"""Padded length of captions in training, and number of decoding steps."""


class ReportCaptioner(nn.Module):
    """Linear image projection and `torch.nn.TransformerDecoder`, with the sizes of `recipe`."""

    def __init__(self, recipe: CrossAttentionCaptionerRecipe, num_vocabulary: int, encoder_width: int) -> None:
        super().__init__()
        width = recipe.width
        self.image_projection = nn.Linear(encoder_width, width)
        self.image_dropout, self.dropout = nn.Dropout(recipe.image_dropout), nn.Dropout(recipe.dropout)
        self.embedding = nn.Embedding(num_vocabulary, width)
        self.positions_TD: Tensor
        self.register_buffer("positions_TD", sinusoidal_positions(MAX_LENGTH, width), persistent=False)
        layer = nn.TransformerDecoderLayer(
            width, recipe.num_heads, recipe.ffn_width, recipe.dropout, batch_first=True, norm_first=recipe.norm_first
        )
        norm = nn.LayerNorm(width) if recipe.norm_first else None
        self.layers = nn.TransformerDecoder(layer, recipe.num_layers, norm)
        self.output = nn.Linear(width, num_vocabulary)
        if recipe.tie_embeddings:
            self.output.weight = self.embedding.weight

    def forward(self, input_ids_BT: Tensor, memory_BLD: Tensor) -> Tensor:
        """Logits (B, T, V) of the next word at each position. `memory_BLD` are projected image tokens."""
        num_positions, width = input_ids_BT.shape[1], self.embedding.embedding_dim
        x_BTD = self.dropout(self.embedding(input_ids_BT) * math.sqrt(width) + self.positions_TD[:num_positions])
        # Boolean like the padding mask. True hides a position.
        ones_TT = torch.ones(num_positions, num_positions, dtype=torch.bool, device=input_ids_BT.device)
        return self.output(
            self.layers(x_BTD, memory_BLD, tgt_mask=ones_TT.triu(1), tgt_key_padding_mask=input_ids_BT == PAD_ID)
        )

    def loss(self, tokens_BLE: Tensor, input_ids_BT: Tensor) -> Tensor:
        """Mean cross-entropy of all words but the first. `input_ids_BT` are padded to `MAX_LENGTH`."""
        logits_BTV = self(input_ids_BT[:, :-1], self.image_dropout(self.image_projection(tokens_BLE)))
        return F.cross_entropy(logits_BTV.flatten(0, 1), input_ids_BT[:, 1:].flatten(), ignore_index=PAD_ID)

    @torch.no_grad()
    def load_decoder(self, decoder: CaptionDecoder) -> None:
        """Copy the weights of our decoder, so that both give the same captions."""
        self.embedding.weight.copy_(decoder.embedding.weight)
        self.output.load_state_dict(decoder.output.state_dict())
        if self.layers.norm is not None:
            self.layers.norm.load_state_dict(decoder.final_norm.state_dict())
        for theirs, ours in zip(self.layers.layers, decoder.layers, strict=True):
            assert isinstance(ours, DecoderLayer)
            state: dict[str, Tensor] = {}
            for name in ("weight", "bias"):
                cross = [getattr(ours.cross_q, name), getattr(ours.cross_kv, name)]
                state |= {
                    f"self_attn.in_proj_{name}": getattr(ours.self_qkv, name),
                    f"self_attn.out_proj.{name}": getattr(ours.self_out, name),
                    f"multihead_attn.in_proj_{name}": torch.cat(cross),
                    f"multihead_attn.out_proj.{name}": getattr(ours.cross_out, name),
                    f"linear1.{name}": getattr(ours.ffn_in, name),
                    f"linear2.{name}": getattr(ours.ffn_out, name),
                    f"norm1.{name}": getattr(ours.self_norm, name),
                    f"norm2.{name}": getattr(ours.cross_norm, name),
                    f"norm3.{name}": getattr(ours.ffn_norm, name),
                }
            theirs.load_state_dict(state)

    @torch.inference_mode()
    def greedy(self, memory_BLD: Tensor, num_steps: int = MAX_LENGTH) -> Tensor:
        """Greedy decoding without a cache, always for `num_steps` words: ids (B, T).

        Each step runs on the whole prefix, as in the report's code. The caller drops the words after the first end
        token. Padding, begin and unknown tokens are never chosen, as in our decoding.
        """
        num_images, device = memory_BLD.shape[0], memory_BLD.device
        ids_BT = torch.full((num_images, 1), BOS_ID, device=device)
        for _ in range(num_steps):
            logits_BV = self(ids_BT, memory_BLD)[:, -1]
            logits_BV[:, [PAD_ID, BOS_ID, UNK_ID]] = -torch.inf
            ids_BT = torch.cat([ids_BT, logits_BV.argmax(dim=-1, keepdim=True)], dim=1)
        return ids_BT[:, 1:]
