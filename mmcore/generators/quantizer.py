"""Vector quantisation: the nearest code of a codebook, and how the codebook learns.

Two ways to learn it. By gradient, the codebook loss of van den Oord et al. 2017 (arXiv 1711.00937, equation 3). Or as
moving averages of the latents that chose each code (appendix A.1 there; Razavi et al. 2019, arXiv 1906.00446), with
revival: a code that hardly anything chooses is thrown away, and one that much chooses is split in two, as in
Linde, Buzo & Gray 1980. Sums of a whole batch are all that the averages and the revival see, so they are the same for
any number of workers.

Shapes: B images, D channels of a latent, H and W its sides, N = B·H·W latents, K codes.
"""

import torch
from torch import Tensor, nn

from mmcore.seeding import generator

# Distances that are held at once (fp32: 64 MB).
_MAX_DISTANCES = 2**24
# A split puts the two halves this far from where the code was, as a share of the codes' size (root mean square).
_SPLIT = 0.01


class Quantizer(nn.Module):
    """A codebook (K, D): a parameter that gradients move, or with `ema_decay` a buffer that `after_step` moves."""

    codebook: Tensor
    ema_counts: Tensor
    ema_sums: Tensor

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
            self.register_buffer("ema_counts", torch.zeros(num_codes))
            self.register_buffer("ema_sums", torch.zeros(num_codes, width))
            self.state_buffers = ("codebook", "ema_counts", "ema_sums")

    def nearest(self, latents_ND: Tensor) -> Tensor:
        """The index (N,) of the code nearest to each latent, by the arithmetic of diffusers' VectorQuantizer."""
        codebook_KD = self.codebook.detach()
        rows = max(1, _MAX_DISTANCES // len(codebook_KD))
        return torch.cat([torch.cdist(part, codebook_KD).argmin(1) for part in latents_ND.split(rows)])

    def quantize(self, latents_BDHW: Tensor) -> Tensor:
        """Each latent replaced by its nearest code."""
        latents_BHWD = latents_BDHW.permute(0, 2, 3, 1)
        indices_N = self.nearest(latents_BHWD.flatten(0, 2))
        return self.codebook[indices_N].view(latents_BHWD.shape).permute(0, 3, 1, 2)

    def forward(self, latents_BDHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantised latents, whose gradient passes straight through to `latents`, and what training needs.

        Returns: (B, D, H, W), and a dict of `commitment_loss` (B,) and, for a codebook that gradients move,
            `codebook_loss` (B,): mean squared distances; the statistics `counts` (K,), how many latents chose each
            code, and, for a codebook of averages, `sums` (K, D) of them, both in float64.
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
            sums_KD = torch.zeros(self.codebook.shape, dtype=torch.float64, device=latents_ND.device)
            outputs["sums"] = sums_KD.index_add_(0, indices_N, latents_ND.double())
        straight_BHWD = latents_BHWD + (codes_BHWD - latents_BHWD).detach()
        return straight_BHWD.permute(0, 3, 1, 2), outputs

    def after_step(self, statistics: dict[str, Tensor], step: int) -> None:
        """Move a codebook of averages by the `counts` and `sums` of the whole batch of `step`; revive dead codes."""
        if self.ema_decay is None:
            return
        counts_K, sums_KD = (statistics[name].to(self.codebook) for name in ("counts", "sums"))
        self.ema_counts.lerp_(counts_K, 1 - self.ema_decay)
        self.ema_sums.lerp_(sums_KD, 1 - self.ema_decay)
        # Where nothing chose a code, 0 / 0: it stays. (The 1e-12 is far below one latent in any run's memory.)
        chosen_K = self.ema_counts > 1e-12
        means_KD = self.ema_sums / self.ema_counts.clamp_min(1e-12)[:, None]
        self.codebook.copy_(torch.where(chosen_K[:, None], means_KD, self.codebook))
        if self.revive_below > 0:
            self._revive(step)

    def _revive(self, step: int) -> None:
        """The i-th dead code becomes one half of the i-th most used one, if that is used more than the mean."""
        mean = self.ema_counts.mean()
        order_K = self.ema_counts.argsort(descending=True, stable=True)
        num_busy = int((self.ema_counts > mean).sum())
        num_dead = int((self.ema_counts < self.revive_below * mean).sum())
        num = min(num_busy, num_dead)
        if num == 0:
            return
        busy, dead = order_K[:num], order_K.flip(0)[:num]
        parents_RD = self.codebook[busy]
        noise_RD = torch.randn(parents_RD.shape, dtype=torch.float64, generator=generator(self.seed, "revival", step))
        shift_RD = noise_RD.to(parents_RD) * (_SPLIT * parents_RD.square().mean().sqrt())
        counts_R = self.ema_counts[busy] / 2
        for codes, vectors_RD in ((busy, parents_RD + shift_RD), (dead, parents_RD - shift_RD)):
            self.codebook[codes] = vectors_RD
            self.ema_counts[codes] = counts_R
            self.ema_sums[codes] = vectors_RD * counts_R[:, None]


def codebook_use(counts_K: Tensor) -> dict[str, float]:
    """`perplexity`, the exponential of the entropy of how codes are chosen, and `codes_used`, the share chosen at all.

    Neither is a mean over batches: `counts_K` must be of the whole set that is spoken of.
    """
    shares_K = counts_K.double() / counts_K.sum()
    entropy = -torch.special.xlogy(shares_K, shares_K).sum()
    return {"perplexity": entropy.exp().item(), "codes_used": (counts_K > 0).double().mean().item()}
