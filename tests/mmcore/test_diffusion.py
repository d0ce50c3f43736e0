"""The mathematics of diffusion, compared with its formulas and with diffusers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from mmcore.errors import InputError
from mmcore.generators.diffusion import NoiseSchedule, SamplerName, guided, make_sampler, sample, set_timesteps

SCHEDULES = [
    NoiseSchedule(),
    NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    NoiseSchedule(beta_schedule="squaredcos_cap_v2", prediction="v_prediction", min_snr_gamma=5.0),
    NoiseSchedule(prediction="v_prediction"),
]
SAMPLERS: list[SamplerName] = ["ddpm", "ddim", "dpmsolver++"]
SHAPE = (3, 4, 4)


def alpha_sigma(schedule: NoiseSchedule, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, from the variances as DDPM defines them."""
    betas = DDPMScheduler(**schedule.scheduler_config()).betas.double()
    alpha_bar = (1 - betas).cumprod(0)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def batch(num_samples: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(num_samples, *SHAPE, generator=random, dtype=torch.float64) for _ in range(2))
    return x_0, noise, torch.tensor([0, 10, 250, 500, 900, 999])[:num_samples]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noise_and_targets_follow_the_formulas(schedule: NoiseSchedule) -> None:
    x_0, noise, timesteps = batch()
    alpha, sigma = alpha_sigma(schedule, timesteps)
    # The schedulers hold their products in fp32.
    assert torch.allclose(schedule.add_noise(x_0, noise, timesteps), alpha * x_0 + sigma * noise, atol=1e-4)
    expected = noise if schedule.prediction == "epsilon" else alpha * noise - sigma * x_0
    assert torch.allclose(schedule.targets(x_0, noise, timesteps), expected, atol=1e-4)


def test_a_right_prediction_has_no_loss_and_each_sample_its_own() -> None:
    for schedule in SCHEDULES:
        x_0, noise, timesteps = batch()
        targets = schedule.targets(x_0, noise, timesteps)
        assert torch.equal(schedule.losses(targets, x_0, noise, timesteps), torch.zeros(6, dtype=torch.float64))
        wrong = targets.clone()
        wrong[2] += 2
        losses = schedule.losses(wrong, x_0, noise, timesteps)
        assert losses.nonzero().flatten().tolist() == [2]
        assert losses[2].item() == pytest.approx(4 * schedule.loss_weights(timesteps)[2].item())


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_the_error_of_x_0_alike_for_both_predictions(gamma: float) -> None:
    """Hang et al. 2023: min(SNR, gamma) |x_0 - x̂_0|², for any prediction type."""
    x_0, noise, timesteps = batch()
    estimate = x_0 + 0.1
    losses = []
    for prediction in ("epsilon", "v_prediction"):
        schedule = NoiseSchedule(prediction=prediction, min_snr_gamma=gamma)  # type: ignore[arg-type]
        alpha, sigma = alpha_sigma(schedule, timesteps)
        x_t = alpha * x_0 + sigma * noise
        noise_of_estimate = (x_t - alpha * estimate) / sigma
        predicted = noise_of_estimate if prediction == "epsilon" else alpha * noise_of_estimate - sigma * estimate
        losses.append(schedule.losses(predicted, x_0, noise, timesteps))
        snr = (alpha / sigma).square().flatten()
        assert torch.allclose(losses[-1], snr.clamp_max(gamma) * 0.01, rtol=1e-2)
    assert torch.allclose(*losses, rtol=1e-2)


def knows(schedule: NoiseSchedule, x_0: Tensor) -> Any:
    """A network whose prediction always leads to `x_0`."""

    def denoise(x: Tensor, timestep: int) -> Tensor:
        alpha, sigma = (each.float() for each in alpha_sigma(schedule, torch.tensor([timestep])))
        noise = (x - alpha * x_0) / sigma
        return noise if schedule.prediction == "epsilon" else alpha * noise - sigma * x_0

    return denoise


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("schedule", [SCHEDULES[0], SCHEDULES[1], SCHEDULES[2]])
def test_every_sampler_ends_at_what_the_network_knows(schedule: NoiseSchedule, name: SamplerName) -> None:
    x_0 = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for steps in (1, 2, 4, 20) if name == "ddim" else (1, 3, 7, 30):
        for clip in (False, True):
            sampler = make_sampler(name, schedule, clip=clip)
            made = sample(knows(schedule, x_0), SHAPE, [5, 6], sampler, steps)
            # From pure noise, the accuracy of x_0 in fp32 depends on the remaining signal; one step is the worst case.
            assert (made - x_0).abs().max() < 2e-2, (steps, clip)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_is_decided_by_its_seed_alone(name: SamplerName) -> None:
    schedule = SCHEDULES[0]
    denoise = lambda x, timestep: 0.9 * x + timestep / 1e4
    run = lambda seeds: sample(denoise, SHAPE, seeds, make_sampler(name, schedule), 10)
    together = run([7, 8, 9])
    assert torch.equal(together, run([7, 8, 9]))
    assert torch.equal(together.flip(0), run([9, 8, 7]))
    for number, seed in enumerate([7, 8, 9]):
        assert torch.equal(run([seed])[0], together[number])
    assert not torch.equal(together[0], together[1])
    torch.manual_seed(1)  # the global generator has no effect
    assert torch.equal(together, run([7, 8, 9]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_begins_at_the_noisiest_timestep(name: SamplerName) -> None:
    for steps in (1, 2, 8, 50, 100, 1000) if name == "ddim" else (1, 2, 3, 30, 666, 999, 1000):
        sampler = make_sampler(name, SCHEDULES[0])
        set_timesteps(sampler, steps)
        timesteps = sampler.timesteps.tolist()
        assert len(timesteps) == steps
        assert timesteps[0] == 999
        assert min(timesteps) >= 0
        assert sorted(set(timesteps), reverse=True) == timesteps


def test_steps_that_a_sampler_cannot_take_are_refused() -> None:
    for name in SAMPLERS:
        for steps in (0, -1, 1001):
            with pytest.raises(InputError, match="1 to 1000"):
                set_timesteps(make_sampler(name, SCHEDULES[0]), steps)
    with pytest.raises(InputError, match=r"30 sampling steps.* 25 or 40"):
        set_timesteps(make_sampler("ddim", SCHEDULES[0]), 30)
    with pytest.raises(InputError, match="ddpm, ddim"):
        make_sampler("euler", SCHEDULES[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SAMPLERS)
def test_clipping_keeps_x_0_among_pixels(name: SamplerName) -> None:
    too_bright = torch.full((1, *SHAPE), 3.0)
    made = {}
    for clip in (False, True):
        sampler = make_sampler(name, SCHEDULES[0], clip=clip)
        made[clip] = sample(knows(SCHEDULES[0], too_bright), SHAPE, [1], sampler, 10)
    assert made[False].min() > 2.9
    assert made[True].max() <= 1 + 1e-5
    assert made[True].min() > 0.9


def test_guidance_leads_away_from_no_prompt() -> None:
    sizes = []

    def predict(x: Tensor, timestep: int, context: Tensor) -> Tensor:
        sizes.append(len(x))
        return context.mean((1, 2)).view(-1, 1, 1, 1).expand_as(x)

    context, null = torch.full((2, 3, 4), 5.0), torch.full((2, 3, 4), 1.0)
    x = torch.zeros(2, *SHAPE)
    assert (guided(predict, context, null, 1.0)(x, 0) == 5).all()
    assert (guided(predict, context, null, 3.0)(x, 0) == 1 + 3 * (5 - 1)).all()
    assert sizes == [2, 4]


def test_each_step_is_told_and_may_end_the_sampling() -> None:
    told: list[tuple[int, int]] = []

    def on_step(done: int, total: int) -> None:
        told.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(lambda x, timestep: x, SHAPE, [1], make_sampler("ddim", SCHEDULES[0]), 10, on_step=on_step)
    assert told == [(1, 10), (2, 10), (3, 10)]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_timesteps": 0},
        {"beta_start": 0.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"min_snr_gamma": 0},
        {"timestep_shift": 0.0},
        {"unshifted_share": 1.5},
        {"unshifted_share": float("nan")},
    ],
)
def test_a_schedule_that_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(settings)).replace('_', '-')}"):
        NoiseSchedule(**settings).check()


def trained(schedule: NoiseSchedule, coins: Sequence[float]) -> torch.Tensor:
    """The training timesteps for all uniform timesteps, with each of the coins."""
    return torch.tensor([schedule.timestep(drawn, coin) for drawn in range(schedule.num_timesteps) for coin in coins])


@pytest.mark.parametrize(("shift", "median"), [(1.0, 499.5), (3.0, 749.5), (0.5, 333.0), (1e20, 999)])
def test_a_shift_moves_the_timesteps_that_are_trained(shift: float, median: float) -> None:
    timesteps = trained(NoiseSchedule(timestep_shift=shift), [0.0])
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    assert timesteps.double().median().item() == pytest.approx(median, abs=1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_training_is_not_shifted(share: float) -> None:
    timesteps = trained(NoiseSchedule(timestep_shift=8.0, unshifted_share=share), [0.0, 0.25, 0.5, 0.75])
    # Half of the uniform timesteps are below the middle, and a ninth of those with a shift of 8.
    expected = share / 2 + (1 - share) / 9
    assert (timesteps < 500).double().mean().item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_without_a_shift_the_draw_is_the_timestep(share: float) -> None:
    schedule = NoiseSchedule(num_timesteps=37, unshifted_share=share)
    assert trained(schedule, [0.7]).tolist() == list(range(37))
