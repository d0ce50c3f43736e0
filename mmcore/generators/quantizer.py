"""Vector quantisation: the nearest code of a codebook, and how the codebook learns.

Two ways to learn it. By gradient, the codebook loss of van den Oord et al. 2017 (arXiv 1711.00937, equation 3). Or as
moving averages of the latents that chose each code (appendix A.1 there; Razavi et al. 2019, arXiv 1906.00446), with
revival: a code that hardly anything chooses is thrown away, and one whose latents scatter much is split in two, as in
Linde, Buzo & Gray 1980. (By scatter and not by use: half of all latents may be one even background, which one code
serves.) Sums of a whole batch are all that the averages and the revival see, so they are the same for any number of
workers.

Shapes: B images, D channels of a latent, H and W its sides, N = B·H·W latents, K codes.
"""

import torch
from torch import Tensor, nn

from mmcore.seeding import generator

# Distances that are held at once (fp32: 64 MB).
_MAX_DISTANCES = 2**24
# A split puts the two halves this many standard deviations of their latents from where the code was.
_SPLIT = 0.5
# Use that both halves begin with, as a multiple of the use below which a code is dead.
_PROBATION = 2.0


class Quantizer(nn.Module):
    """A codebook (K, D): a parameter that gradients move, or with `ema_decay` a buffer that `after_step` moves."""

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor
    ema_scatter: Tensor

    def __init__(self, num_codes: int, width: int, *, ema_decay: float | None, revive_below: float, seed: int) -> None:
        """`revive_below`: a code is dead below this share of the mean use; 0 revives none."""
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
        """The index (N,) of the code nearest to each latent, by the arithmetic of diffusers' VectorQuantizer."""
        codebook_KD = self.codebook.detach()
        rows = max(1, _MAX_DISTANCES // len(codebook_KD))
        return torch.cat([torch.cdist(part, codebook_KD).argmin(1) for part in latents_ND.split(rows)])

    def quantize(self, latents_BDHW: Tensor) -> Tensor:
        """Each latent replaced by its nearest code."""
        return self.vectors(self.numbers(latents_BDHW))

    def numbers(self, latents_BDHW: Tensor) -> Tensor:
        """The number of the code nearest to each latent, int64 (B, H, W)."""
        latents_BHWD = latents_BDHW.permute(0, 2, 3, 1)
        return self.nearest(latents_BHWD.flatten(0, 2)).view(latents_BHWD.shape[:3])

    def vectors(self, numbers_BHW: Tensor) -> Tensor:
        """The codes (B, D, H, W) of those numbers."""
        return self.codebook[numbers_BHW].permute(0, 3, 1, 2)

    def forward(self, latents_BDHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantised latents, whose gradient passes straight through to `latents`, and what training needs.

        Returns: (B, D, H, W), and a dict of `commitment_loss` (B,) and, for a codebook that gradients move,
            `codebook_loss` (B,): mean squared distances; the statistics `counts` (K,), how many latents chose each
            code, and, for a codebook of averages, `sums` (K, D) of them and `squares` (K,) of their lengths, all in
            float64.
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
        """Move a codebook of averages by the statistics of the whole batch of `step`; revive dead codes."""
        if self.ema_decay is None:
            return
        counts_K, sums_KD, squares_K = (statistics[name].to(self.ema_sums) for name in ("counts", "sums", "squares"))
        # Squared distances of a code's latents to their own mean, within one batch: over several the encoder moves on.
        scatter_K = (squares_K - sums_KD.square().sum(1) / counts_K.clamp_min(1)).clamp_min(0)
        weight = 1 - self.ema_decay
        self.ema_counts.lerp_(counts_K, weight)
        self.ema_sums.lerp_(sums_KD, weight)
        self.ema_scatter.lerp_(scatter_K, weight)
        # Sum and count of the others have shrunk alike, so that their means are where they were.
        chosen_K = counts_K > 0
        self.codebook[chosen_K] = (self.ema_sums[chosen_K] / self.ema_counts[chosen_K, None]).to(self.codebook)
        if self.revive_below > 0:
            self._revive(step)

    def _revive(self, step: int) -> None:
        """The i-th dead code becomes one half of the code of the i-th largest scatter, if that is above the mean."""
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
            # On probation: what chooses it now counts more than what chose its parent, and one that nothing chooses
            # is soon dead again.
            self.ema_counts[codes] = _PROBATION * threshold
            self.ema_sums[codes] = _PROBATION * threshold * halves_RD
            self.ema_scatter[codes] = 0


def codebook_use(counts_K: Tensor) -> dict[str, float]:
    """`perplexity`, the exponential of the entropy of how codes are chosen, and `codes_used`, the share chosen at all.

    Neither is a mean over batches: `counts_K` must be of the whole set that is spoken of.
    """
    shares_K = counts_K.double() / counts_K.sum()
    entropy = -torch.special.xlogy(shares_K, shares_K).sum()
    return {"perplexity": entropy.exp().item(), "codes_used": (counts_K > 0).double().mean().item()}
