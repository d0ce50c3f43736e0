"""Binary spherical quantisation in training: the gradient, the commitment and the entropy.

Each grid quantises what the grids before left, as in `mmcore.generators.bsq`. The gradient of the sum of all grids
passes straight through to the latents. The commitment loss holds the latents where the grids reach them. In the
official code the gradient passes through each rest, scaled to length 1. On Shapes, latents then grew to 17 times the
length of a grid's vectors in 250 steps. All grids had nearly the same bits.

The entropy loss has two terms (Zhao et al. 2024, https://arxiv.org/abs/2406.07548, section 3.3). The mean entropy of a
bit falls, so that bits are certain. The entropy of the mean bit rises, so that all bits are used. The second term is
that of a whole data set. It is approximated by its tangent at moving averages, which only the statistics of whole
batches change. A step is therefore the same for any number of workers and micro-batches.

Shapes: B images, S grids, d bits of a position, H and W sides of the latent image, h and w those of a grid.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.generators.bsq import bits_of, enlarge, shrink, vectors_of
from mmcore.generators.infinity_scales import Grid

# Share of the old value that a moving average keeps in a step.
_DECAY = 0.9
# A mean bit so far from 0 and 1 has a finite gradient of its entropy.
_MARGIN = 1e-3


def bit_entropy(share: Tensor) -> Tensor:
    """Entropy, from 0 to 1, of bits that are 1 with these probabilities."""
    return -(torch.special.xlogy(share, share) + torch.special.xlogy(1 - share, 1 - share)) / math.log(2)


def _entropy_of(logits: Tensor) -> Tensor:
    """`bit_entropy` of probabilities that may round to 0 or 1, by their log-odds, with a finite gradient."""
    away = logits.abs()
    return (F.softplus(-away) + away * torch.sigmoid(-away)) / math.log(2)


def _entropy_slope(share: Tensor) -> Tensor:
    """Derivative of `bit_entropy`."""
    return ((1 - share) / share).log() / math.log(2)


class BitQuantizer(nn.Module):
    """Latent images -> the sum of their grids, with losses. It has no weights."""

    mean_bits_Sd: Tensor

    def __init__(self, num_bits: int, grids: Sequence[Grid], inverse_temperature: float) -> None:
        """`inverse_temperature`: the larger, the nearer to 0 or 1 is the probability of a bit."""
        super().__init__()
        self.grids = tuple(grids)
        # The squared distances to the two values of a bit, of a vector of length 1, differ by 4 · latent / √d.
        self.sharpness = 4 * inverse_temperature / math.sqrt(num_bits)
        # Moving averages of the probability of each bit of each grid.
        self.register_buffer("mean_bits_Sd", torch.full((len(self.grids), num_bits), 0.5, dtype=torch.float64))
        self.state_buffers = ("mean_bits_Sd",)

    def forward(self, latents_BdHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantise latents, in fp32 or above.

        Args:
            latents_BdHW: continuous features of the encoder. Its sides are those of the last grid.
        Returns: the sum of the grids (B, d, H, W), and a dict:
            `commitment_loss` (B,): mean squared distance of the latents from all grids.
            `entropy_loss` (B,): mean entropy of a bit less the entropy of the mean bit, -1 at best.
            `ones` and `probabilities` float64 (S, d): sums over positions of bits and of their probabilities.
            `positions` float64 (S, 1): the number of positions.
        """
        total_BdHW = torch.zeros_like(latents_BdHW)
        entropies, ones, probabilities, positions = [], [], [], []
        means_Sd = self.mean_bits_Sd.clamp(_MARGIN, 1 - _MARGIN).to(latents_BdHW.dtype)
        for grid, mean_d in zip(self.grids, means_Sd, strict=True):
            scaled_Bdhw = F.normalize(shrink(latents_BdHW - total_BdHW, grid), dim=1)
            bits_Bdhw = bits_of(scaled_Bdhw)
            vectors_Bdhw = vectors_of(bits_Bdhw, latents_BdHW.dtype)
            logits_Bdhw = self.sharpness * scaled_Bdhw
            share_Bdhw = torch.sigmoid(logits_Bdhw)
            certain_B = _entropy_of(logits_Bdhw).mean((1, 2, 3))
            tangent_Bd = bit_entropy(mean_d) + _entropy_slope(mean_d) * (share_Bdhw.mean((2, 3)) - mean_d)
            entropies.append(certain_B - tangent_Bd.mean(1))
            ones.append(bits_Bdhw.sum((0, 2, 3), dtype=torch.float64))
            probabilities.append(share_Bdhw.detach().sum((0, 2, 3), dtype=torch.float64))
            positions.append(len(bits_Bdhw) * grid[0] * grid[1])
            total_BdHW = total_BdHW + enlarge(vectors_Bdhw, self.grids[-1])
        # The difference is 0: the value is exactly that of the grids, and the gradient that of the latents.
        return total_BdHW + (latents_BdHW - latents_BdHW.detach()), {
            "commitment_loss": (latents_BdHW - total_BdHW).square().mean((1, 2, 3)),
            "entropy_loss": torch.stack(entropies).mean(0),
            "ones": torch.stack(ones),
            "probabilities": torch.stack(probabilities),
            "positions": torch.tensor(positions, dtype=torch.float64, device=latents_BdHW.device)[:, None],
        }

    def after_step(self, statistics: dict[str, Tensor]) -> None:
        """Update the moving averages by the statistics of the whole batch."""
        batch_Sd = (statistics["probabilities"] / statistics["positions"]).to(self.mean_bits_Sd)
        self.mean_bits_Sd.lerp_(batch_Sd, 1 - _DECAY)


def bit_use(ones_Sd: Tensor, positions_S1: Tensor) -> dict[str, float]:
    """`bits_used`: the entropy of the mean bit, from 0 to 1, as a mean over bits and grids.

    It cannot be averaged over batches, so the counts must be of the whole set.
    """
    return {"bits_used": bit_entropy(ones_Sd / positions_S1).mean().item()}
