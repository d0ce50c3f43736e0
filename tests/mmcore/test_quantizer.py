"""The codebook: nearest codes, both ways of training, revival of dead codes, and statistics of use."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import Tensor

from mmcore.generators import quantizer
from mmcore.generators.quantizer import Quantizer, codebook_use


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def averaged(num_codes: int, width: int = 2, decay: float = 0.5, revive_below: float = 0.0) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(num_codes, width, ema_decay=decay, revive_below=revive_below, seed=7).double()


def test_codes_losses_and_gradients_are_those_of_diffusers() -> None:
    torch.manual_seed(0)
    mine = Quantizer(64, 4, ema_decay=None, revive_below=0.0, seed=0)
    theirs = VectorQuantizer(64, 4, beta=0.2, legacy=False)
    theirs.embedding.weight.data.copy_(mine.codebook)
    z = latents(3, 4, 5, 5, dtype=torch.float32)
    z_mine, z_theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    codes, outputs = mine(z_mine)
    expected, loss, (_, _, indices) = theirs(z_theirs)
    assert torch.equal(codes, expected)
    assert torch.equal(outputs["counts"], torch.bincount(indices, minlength=64).double())
    mean = (outputs["codebook_loss"] + 0.2 * outputs["commitment_loss"]).mean()
    assert mean.item() == pytest.approx(loss.item(), rel=1e-6)
    weights = latents(3, 4, 5, 5, seed=1, dtype=torch.float32)
    (mean + (codes * weights).sum()).backward()
    (loss + (expected * weights).sum()).backward()
    torch.testing.assert_close(z_mine.grad, z_theirs.grad)
    torch.testing.assert_close(mine.codebook.grad, theirs.embedding.weight.grad)


def test_distances_in_parts_are_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = averaged(50, 4)
    z = latents(333, 4)
    whole = codes.nearest(z)
    monkeypatch.setattr(quantizer, "_MAX_DISTANCES", 50 * 32)
    assert torch.equal(codes.nearest(z), whole)
    by_hand = (z[:, None] - codes.codebook[None]).square().sum(-1).argmin(1)
    assert torch.equal(whole, by_hand)


def statistics_of(latents_by_code: list[Tensor]) -> dict[str, Tensor]:
    """The statistics of a batch in which these latents (N, D) chose codes 0, 1, ..."""
    return {
        "counts": torch.tensor([float(len(each)) for each in latents_by_code]).double(),
        "sums": torch.stack([each.sum(0) for each in latents_by_code]),
        "squares": torch.stack([each.square().sum() for each in latents_by_code]),
    }


def test_averages_follow_their_formula() -> None:
    """Razavi et al. 2019, equations 2 and 3: N = g·N + (1 - g)·n, m = g·m + (1 - g)·sum z, e = m / N."""
    codes = averaged(3, decay=0.75)
    start = codes.codebook.clone()
    counts, sums = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    for step in range(3):
        # Code 1 is not chosen at first, code 2 is never chosen.
        given = statistics_of([latents(4, 2, seed=step), latents(1 if step else 0, 2, seed=9), latents(0, 2)])
        codes.after_step(given, step)
        counts, sums = 0.75 * counts + 0.25 * given["counts"], 0.75 * sums + 0.25 * given["sums"]
        for code in range(3):
            expected = sums[code] / counts[code] if counts[code] else start[code]
            torch.testing.assert_close(codes.codebook[code], expected, rtol=1e-12, atol=0)
    assert torch.equal(codes.codebook[2], start[2])


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    codes = averaged(16, 4)
    z = latents(6, 4, 3, 3)
    _, whole = codes(z)
    parts = [codes(part)[1] for part in z.split(2)]
    for name in ("counts", "sums", "squares"):
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, whole[name], rtol=1e-12, atol=1e-12)
    assert whole["counts"].sum() == 6 * 9
    assert "codebook_loss" not in whole


def test_the_codes_of_most_scatter_are_split_over_the_dead_ones() -> None:
    """The most used code is not split if its latents are all equal."""
    codes = averaged(6, decay=0.5, revive_below=0.1)
    before = codes.codebook.clone()
    nothing = latents(0, 2)
    background = torch.tensor([[3.0, 3.0]]).double().expand(900, 2)
    wide, narrow = latents(60, 2) * 2 + 10, latents(60, 2, seed=1) * 0.1 - 10
    codes.after_step(statistics_of([background, nothing, wide, nothing, narrow, nothing]), 0)
    # With a mean use of 170, a use of 60 is not dead. Only one code has a scatter above the mean. It replaces the first
    # dead code.
    halves = codes.codebook[[2, 1]]
    torch.testing.assert_close(halves.mean(0), wide.mean(0))
    deviation = wide.var(0, correction=0).mean().sqrt()
    distance = (halves[0] - halves[1]).norm()
    torch.testing.assert_close(distance, deviation)  # half a deviation to each side
    torch.testing.assert_close(codes.codebook[0], background[0])
    torch.testing.assert_close(codes.codebook[4], narrow.mean(0))
    # Both halves start with twice the use of a dead code, and without scatter.
    probation = 2 * 0.1 * (450 + 30 + 30) / 6
    torch.testing.assert_close(codes.ema_counts, torch.tensor([450, probation, probation, 0, 30, 0]).double())
    torch.testing.assert_close(codes.ema_sums[1:3], codes.codebook[1:3] * probation)
    expected = [0, 0, 0, 0, (narrow - narrow.mean(0)).square().sum().item() / 2, 0]
    assert codes.ema_scatter.tolist() == pytest.approx(expected, abs=1e-9)
    torch.testing.assert_close(codes.codebook[[3, 5]], before[[3, 5]])


def test_no_code_is_revived_where_all_are_used() -> None:
    codes = averaged(4, revive_below=0.1)
    groups = [latents(5, 2, seed=seed) + 4 * seed for seed in range(4)]
    codes.after_step(statistics_of(groups), 0)
    torch.testing.assert_close(codes.codebook, torch.stack([group.mean(0) for group in groups]))


@pytest.mark.parametrize("revive_below", [0.0, 0.1])
def test_revival_keeps_the_codebook_in_use(revive_below: float) -> None:
    """Latents far from the initial codes, so that one code is nearest to all: the usual collapse."""
    torch.manual_seed(0)
    codes = Quantizer(64, 2, ema_decay=0.9, revive_below=revive_below, seed=0)
    for step in range(150):
        _, outputs = codes(latents(8, 2, 8, 8, seed=step, dtype=torch.float32) * 0.1 + 5)
        codes.after_step(outputs, step)
    _, outputs = codes(latents(64, 2, 8, 8, seed=1000, dtype=torch.float32) * 0.1 + 5)
    use = codebook_use(outputs["counts"])
    if revive_below:
        assert use["codes_used"] == 1.0
        assert use["perplexity"] > 50  # measured 56.5 of 64
        assert outputs["commitment_loss"].mean() < 0.002  # measured 0.0003 where the variance is 0.01
    else:
        assert use["codes_used"] < 0.1  # measured 1 code of 64


def test_one_used_code_is_enough_to_begin_with() -> None:
    codes = averaged(4, revive_below=0.1)
    z = torch.full((1, 2, 4, 4), 9.0).double() + latents(1, 2, 4, 4) * 0.1
    for step in range(4):
        codes.after_step(codes(z)[1], step)
    assert codebook_use(codes(z)[1]["counts"])["codes_used"] == 1.0


def test_revival_is_drawn_from_seed_and_step_alone() -> None:
    def revived(step: int) -> Tensor:
        codes = averaged(4, revive_below=0.1)
        torch.manual_seed(step + 100)  # must not matter
        codes.after_step(statistics_of([latents(9, 2), *[latents(0, 2)] * 3]), step)
        return codes.codebook

    assert torch.equal(revived(3), revived(3))
    assert not torch.equal(revived(3), revived(4))


def test_use_is_counted_over_the_whole() -> None:
    assert codebook_use(torch.tensor([5.0, 5, 5, 5])) == {"perplexity": pytest.approx(4), "codes_used": 1.0}
    assert codebook_use(torch.tensor([7.0, 0, 0, 0])) == {"perplexity": pytest.approx(1), "codes_used": 0.25}
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    use = codebook_use(torch.tensor([3.0, 0]) + torch.tensor([0.0, 1]))
    assert use == {"perplexity": pytest.approx(math.exp(entropy)), "codes_used": 1.0}
