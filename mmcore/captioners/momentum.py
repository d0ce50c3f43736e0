"""Momentum distillation of a Q-Former: soft targets of a slow copy (ALBEF, Li et al. 2021, section 3.3).

https://arxiv.org/abs/2107.07651

A caption may fit other images of its batch, and another word may be as good. One-hot targets of ITC and ITG count both
as wrong. The copy's own predictions do not. They are a share of the targets. The share grows in the first epoch.

ALBEF compares with features of earlier batches too. Here the rows of one batch are compared, as in BLIP-2.

Shapes: B images of this worker, each with one text; L image tokens, E channels of an image token, T positions, N
predicted words, V words.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmcore.captioners.qformer import MatchingHeads, QFormer
from mmcore.captioners.qformer_losses import Similarities, similarities


class SoftTargets(NamedTuple):
    """Predictions of the copy for a batch, without gradients."""

    cosines: Similarities
    """Similarities of this worker's rows with the rows of all workers."""
    logits_NV: Tensor
    """Logits of the next word at the positions that have one, row by row."""


class MomentumCopy(nn.Module):
    """A copy of a Q-Former and its heads, whose weights follow theirs.

    The weights are buffers: no optimiser and no gradient reaches them. Dropout is always off.
    """

    epochs: Tensor

    def __init__(self, qformer: QFormer, heads: MatchingHeads) -> None:
        super().__init__()
        self.qformer, self.heads = copy.deepcopy(qformer), copy.deepcopy(heads)
        for module in self.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                module.register_buffer(name, weight.detach())
        self.register_buffer("epochs", torch.zeros((), dtype=torch.float64))
        self.eval()

    def train(self, mode: bool = True) -> "MomentumCopy":
        """Stay in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, qformer: QFormer, heads: MatchingHeads, momentum: float, epochs: Tensor) -> None:
        """Move each weight by the share 1 - `momentum` towards that of the model, after a step of `epochs` epochs."""
        leading = dict(qformer.named_parameters("qformer")) | dict(heads.named_parameters("heads"))
        torch._foreach_lerp_([self.get_buffer(name) for name in leading], list(leading.values()), 1 - momentum)
        self.epochs += epochs.to(self.epochs)

    @torch.no_grad()
    def targets(
        self,
        memory_BLE: Tensor,
        text_BT: Tensor,
        input_ids_BT: Tensor,
        mask_BT: Tensor,
        predicts_BT: Tensor,
        share: Callable[[Tensor], Tensor],
    ) -> SoftTargets:
        """The predictions for a batch.

        Args:
            memory_BLE: image features of the model, which has no copy of what makes them.
            text_BT, input_ids_BT: captions as ITC and as ITG reads them, int64.
            mask_BT: True for real tokens, at the beginning of a row.
            predicts_BT: True for positions with a next word.
            share: gathers the rows of all workers.
        """
        state = self.qformer.queries(memory_BLE.detach())
        images_BQF = self.heads.image_features(state.hidden_BQD)
        texts_BF = self.heads.text_features(self.qformer.text(text_BT, mask_BT))
        cosines = similarities(images_BQF, texts_BF, share(images_BQF), share(texts_BF))
        hidden_BTD = self.qformer.causal(input_ids_BT, mask_BT, state)
        return SoftTargets(cosines, self.qformer.logits(hidden_BTD[predicts_BT]))
