"""Vector quantisation with a codebook that is trained by gradient or by moving averages.

By gradient: the codebook loss of van den Oord et al. 2017 (arXiv 1711.00937, equation 3).

By moving averages: a code is the average of the latents assigned to it (appendix A.1 there; Razavi et al. 2019, arXiv
1906.00446). Rarely used codes are revived. A code whose latents have a large scatter is split in two, and a rarely used
code becomes one half (Linde, Buzo & Gray 1980). The split code is chosen by scatter, not by use. Half of all latents
may be one plain background, for which one code is enough. Averages and revival use sums over the whole batch only, so
they do not depend on the number of workers.

Shapes: B images, D channels of a latent, H and W its sides, N = B·H·W latents, K codes.
"""

import torch
from torch import Tensor, nn

from mmcore.seeding import generator

# Distances in memory at once (fp32: 64 MB).
_MAX_DISTANCES = 2**24
# Distance of both halves of a split from the old code, in standard deviations of its latents.
_SPLIT = 0.5
# Initial use of both halves, as a multiple of the use below which a code is dead.
_SPLIT_USE = 2.0


class Quantizer(nn.Module):
    """A codebook (K, D): a parameter trained by gradient, or with `ema_decay` a buffer updated by `after_step`."""

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    ema_scatter: Tensor

    def __init__(self, num_codes: int, width: int, *, ema_decay: float | None, revive_below: float, seed: int) -> None:
        """`revive_below`: codes used less than this share of the mean use are revived; 0 turns revival off."""
        super().__init__()
        self.ema_decay, self.revive_below, self.seed = ema_decay, revive_below, seed
        codebook_KD = torch.randn(num_codes, width)
        if ema_decay is None:
            self.codebook = nn.Parameter(codebook_KD)
            self.state_buffers: tuple[str, ...] = ()
        else:
            self.register_buffer("codebook", codebook_KD)
            self.register_buffer("ema_counts", torch.zeros(num_codes, dtype=torch.float64))
            self.register_buffer("ema_sums", torch.zeros(num_codes, width, dtype=torch.float64))
            self.register_buffer("ema_scatter", torch.zeros(num_codes, dtype=torch.float64))
            self.state_buffers = ("codebook", "ema_counts", "ema_sums", "ema_scatter")

    def nearest(self, latents_ND: Tensor) -> Tensor:
        """Index (N,) of the nearest code of each latent, computed like diffusers' VectorQuantizer."""
        codebook_KD = self.codebook.detach()
        rows = max(1, _MAX_DISTANCES // len(codebook_KD))
        return torch.cat([torch.cdist(part, codebook_KD).argmin(1) for part in latents_ND.split(rows)])

    def quantize(self, latents_BDHW: Tensor) -> Tensor:
        """Replace each latent by its nearest code: (B, D, H, W) -> (B, D, H, W)."""
        return self.vectors(self.numbers(latents_BDHW))

    def numbers(self, latents_BDHW: Tensor) -> Tensor:
        """Index of the nearest code of each latent: (B, D, H, W) -> int64 (B, H, W)."""
        latents_BHWD = latents_BDHW.permute(0, 2, 3, 1)
        return self.nearest(latents_BHWD.flatten(0, 2)).view(latents_BHWD.shape[:3])

    def vectors(self, numbers_BHW: Tensor) -> Tensor:
        """The codes (B, D, H, W) with those indices."""
        return self.codebook[numbers_BHW].permute(0, 3, 1, 2)

    def forward(self, latents_BDHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantise latents with a straight-through gradient.

        Returns: quantised latents (B, D, H, W), and a dict:
            `commitment_loss` (B,), and `codebook_loss` (B,) for a codebook trained by gradient: mean squared distances.
            `counts` float64 (K,): the number of latents of each code.
            `sums` float64 (K, D) and `squares` float64 (K,), for moving averages: per code, the sums of the latents and
            of their squared lengths.
        """
        latents_BHWD = latents_BDHW.permute(0, 2, 3, 1)
        latents_ND = latents_BHWD.detach().flatten(0, 2)
        indices_N = self.nearest(latents_ND)
        codes_BHWD = self.codebook[indices_N].view(latents_BHWD.shape)
        counts_K = torch.bincount(indices_N, minlength=len(self.codebook)).double()
        outputs = {
            "commitment_loss": (latents_BHWD - codes_BHWD.detach()).square().mean((1, 2, 3)),
            "counts": counts_K,
        }
        if self.ema_decay is None:
            outputs["codebook_loss"] = (codes_BHWD - latents_BHWD.detach()).square().mean((1, 2, 3))
        else:
            wide_ND = latents_ND.double()
            outputs["sums"] = torch.zeros_like(self.ema_sums).index_add_(0, indices_N, wide_ND)
            outputs["squares"] = torch.zeros_like(self.ema_scatter).index_add_(0, indices_N, wide_ND.square().sum(1))
        straight_BHWD = latents_BHWD + (codes_BHWD - latents_BHWD).detach()
        return straight_BHWD.permute(0, 3, 1, 2), outputs

    def after_step(self, statistics: dict[str, Tensor], step: int) -> None:
        """Update moving averages by the statistics of the whole batch, and revive dead codes."""
        if self.ema_decay is None:
            return
        counts_K, sums_KD, squares_K = (statistics[name].to(self.ema_sums) for name in ("counts", "sums", "squares"))
        # Scatter is measured within one batch, as the encoder changes between batches.
        scatter_K = (squares_K - sums_KD.square().sum(1) / counts_K.clamp_min(1)).clamp_min(0)
        weight = 1 - self.ema_decay
        self.ema_counts.lerp_(counts_K, weight)
        self.ema_sums.lerp_(sums_KD, weight)
        self.ema_scatter.lerp_(scatter_K, weight)
        # For unused codes, sum and count shrank by the same factor, so their means did not change.
        chosen_K = counts_K > 0
        self.codebook[chosen_K] = (self.ema_sums[chosen_K] / self.ema_counts[chosen_K, None]).to(self.codebook)
        if self.revive_below > 0:
            self._revive(step)

    def _revive(self, step: int) -> None:
        """The i-th dead code becomes one half of the code with the i-th largest scatter, if that is above the mean."""
        threshold = self.revive_below * self.ema_counts.mean()
        dead_K = self.ema_counts < threshold
        split_K = (self.ema_scatter > self.ema_scatter.mean()) & ~dead_K
        num = int(torch.minimum(split_K.sum(), dead_K.sum()))
        if num == 0:
            return
        dead = torch.where(dead_K, self.ema_counts, torch.inf).argsort(stable=True)[:num]
        split = torch.where(split_K, self.ema_scatter, -torch.inf).argsort(descending=True, stable=True)[:num]
        means_RD = self.ema_sums[split] / self.ema_counts[split, None]
        variance_R = self.ema_scatter[split] / self.ema_counts[split] / means_RD.shape[1]
        random = generator(self.seed, "revival", step)
        direction_RD = torch.randn(means_RD.shape, dtype=torch.float64, generator=random).to(means_RD)
        direction_RD /= direction_RD.norm(dim=1, keepdim=True)
        shift_RD = _SPLIT * variance_R.sqrt()[:, None] * direction_RD
        for codes, halves_RD in ((split, means_RD + shift_RD), (dead, means_RD - shift_RD)):
            self.codebook[codes] = halves_RD.to(self.codebook)
            # A low initial use: new latents soon outweigh the old ones, and an unused half soon counts as dead again.
            self.ema_counts[codes] = _SPLIT_USE * threshold
            self.ema_sums[codes] = _SPLIT_USE * threshold * halves_RD
            self.ema_scatter[codes] = 0


def codebook_use(counts_K: Tensor) -> dict[str, float]:
    """`perplexity`, the exponential of the entropy of code use, and `codes_used`, the share of codes in use.

    Neither can be averaged over batches, so `counts_K` must be of the whole set.
    """
    shares_K = counts_K.double() / counts_K.sum()
    entropy = -torch.special.xlogy(shares_K, shares_K).sum()
    return {"perplexity": entropy.exp().item(), "codes_used": (counts_K > 0).double().mean().item()}
