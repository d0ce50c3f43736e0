"""Diffusion without the network: noise schedule, targets, losses and sampling.

DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239), v-prediction (Salimans & Ho 2022,
https://arxiv.org/abs/2202.00512, section 4), min-SNR weights (Hang et al. 2023, https://arxiv.org/abs/2303.09556,
section 3.4), classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6), shifted timesteps
(Esser et al. 2024, https://arxiv.org/abs/2403.03206, eq. 23). The schedulers are diffusers'.

Shapes: B samples, C channels, H rows, W columns, T text tokens, D channels of a text token.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmcore.errors import InputError

SamplerName = Literal["ddpm", "ddim", "dpmsolver++"]
Denoise = Callable[[Tensor, int], Tensor]
"""Noisy samples (B, C, H, W) and their timestep -> prediction of the network, (B, C, H, W)."""


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule, the prediction target and the weights of the timesteps."""

    num_timesteps: int = 1000
    """Number of diffusion timesteps, T."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """Schedule of the variances. squaredcos_cap_v2 is the cosine schedule; it ignores `beta_start` and `beta_end`."""
    beta_start: float = 1e-4
    """First variance of linear and scaled_linear."""
    beta_end: float = 0.02
    """Last variance of linear and scaled_linear."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """Prediction target of the network: the noise, or v = alpha noise - sigma x_0."""
    min_snr_gamma: float | None = None
    """Gamma of min-SNR loss weights; None weights all timesteps equally."""
    timestep_shift: float = 1.0
    """Train more on noisy timesteps: t / T = s u / (1 + (s - 1) u) with u uniform and s this value. 1 is uniform. With
    3, half of the timesteps are in the last quarter."""
    unshifted_share: float = 0.0
    """Share of the training, 0 to 1, that draws timesteps uniformly in spite of `timestep_shift`."""

    def check(self) -> None:
        """Raise InputError for invalid settings. The recipe calls this: tyro would reformat an error of a nested
        field."""
        if self.num_timesteps < 1:
            raise InputError(f"num_timesteps {self.num_timesteps} must be at least 1; change --num-timesteps")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} must be rising values between 0 and 1; "
                "change --beta-start and --beta-end"
            )
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise InputError(f"min_snr_gamma {self.min_snr_gamma} must be above 0; change --min-snr-gamma")
        if not 0 < self.timestep_shift < float("inf"):
            raise InputError(f"timestep_shift {self.timestep_shift} must be above 0; change --timestep-shift")
        if not 0 <= self.unshifted_share <= 1:
            raise InputError(f"unshifted_share {self.unshifted_share} must be from 0 to 1; change --unshifted-share")

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, each with the flag that would make it effective."""
        fields: dict[str, str] = {}
        if self.beta_schedule == "squaredcos_cap_v2":
            fields |= dict.fromkeys(("beta_start", "beta_end"), "--beta-schedule linear or scaled_linear")
        if self.timestep_shift == 1:
            fields["unshifted_share"] = "--timestep-shift"
        return fields

    def timestep(self, drawn: int, coin: float) -> int:
        """The training timestep, 0 to T - 1, from a uniform timestep `drawn` and a uniform number `coin` in [0, 1)."""
        if coin < self.unshifted_share:
            return drawn
        u, shift = (drawn + 0.5) / self.num_timesteps, self.timestep_shift
        # For a very large shift the quotient rounds to 1.
        return min(self.num_timesteps - 1, int(self.num_timesteps * shift * u / (1 + (shift - 1) * u)))

    def scheduler_config(self) -> dict[str, Any]:
        """The arguments common to the schedulers of diffusers."""
        return {
            "num_train_timesteps": self.num_timesteps,
            "beta_schedule": self.beta_schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "prediction_type": self.prediction,
            # Sampling starts at the last timestep, which is nearly pure noise like the first sample (Lin et al. 2023).
            "timestep_spacing": "trailing",
        }

    def add_noise(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma noise (DDPM, eq. 4); all (B, C, H, W), `timesteps` int64 (B,)."""
        return _training_scheduler(self).add_noise(x_0, noise, timesteps)

    def targets(self, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The targets of the network's prediction, (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        return _training_scheduler(self).get_velocity(x_0, noise, timesteps)

    def signal_to_noise(self, timesteps: Tensor) -> Tensor:
        """alpha² / sigma² of each timestep, float64 (B,)."""
        alpha_bar = _training_scheduler(self).alphas_cumprod.to(timesteps.device)[timesteps].double()
        return alpha_bar / (1 - alpha_bar)

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """The weight of each sample's squared error, float64 (B,).

        Min-SNR weights the error of x_0 by min(SNR, gamma). The error of the noise is SNR times the error of x_0, so
        its weight is divided by SNR. For v the factor is SNR + 1.
        """
        if self.min_snr_gamma is None:
            return torch.ones(timesteps.shape, dtype=torch.float64, device=timesteps.device)
        snr = self.signal_to_noise(timesteps)
        return snr.clamp_max(self.min_snr_gamma) / (snr if self.prediction == "epsilon" else snr + 1)

    def losses(self, predicted: Tensor, x_0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The weighted mean squared error of each sample, (B,), in fp32 or above."""
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        errors = (predicted.to(dtype) - self.targets(x_0, noise, timesteps).to(dtype)).square().flatten(1).mean(1)
        return errors * self.loss_weights(timesteps).to(dtype)


@functools.cache
def _training_scheduler(schedule: NoiseSchedule) -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(**schedule.scheduler_config())


def make_sampler(name: SamplerName, schedule: NoiseSchedule, *, clip: bool = False) -> Any:
    """The scheduler of diffusers for sampling from a model trained with `schedule`.

    `clip` clips the estimate of x_0 to [-1, 1] in each step, for pixels. Raises InputError for an unknown name.
    """
    from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

    config = schedule.scheduler_config()
    if name == "dpmsolver++":
        # Dynamic thresholding with a maximum of 1 is the same as clipping.
        return DPMSolverMultistepScheduler(**config, thresholding=clip, sample_max_value=1.0)
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}.get(name)
    if kind is None:
        raise InputError(f"sampler {name!r}: choose one of ddpm, ddim, dpmsolver++")
    return kind(**config, clip_sample=clip)


def _takes(method: Callable[..., Any], argument: str) -> bool:
    """Whether `method` has this argument. diffusers' pipelines distinguish schedulers in the same way."""
    return argument in inspect.signature(method).parameters


def check_timesteps(name: SamplerName, num_timesteps: int, num_inference_steps: int) -> None:
    """Raise InputError if the sampler `name` does not support `num_inference_steps` of `num_timesteps`."""
    if not 1 <= num_inference_steps <= num_timesteps:
        raise InputError(
            f"{num_inference_steps} sampling steps: give 1 to {num_timesteps}, the timesteps of the training"
        )
    if name == "ddim" and num_timesteps % num_inference_steps:
        # A step of DDIM goes from t to t - T // steps. With another spacing some noise would remain.
        fitting = [steps for steps in range(1, num_timesteps + 1) if num_timesteps % steps == 0]
        below = max(steps for steps in fitting if steps < num_inference_steps)
        above = min(steps for steps in fitting if steps > num_inference_steps)
        raise InputError(
            f"{num_inference_steps} sampling steps: ddim takes a divisor of the {num_timesteps} timesteps, such as "
            f"{below} or {above}; dpmsolver++ takes any number"
        )


def set_timesteps(sampler: Any, num_inference_steps: int) -> None:
    """Set the timesteps of `sampler`. Raises InputError for an unsupported number of steps."""
    total = sampler.config.num_train_timesteps
    takes_any = _takes(sampler.set_timesteps, "timesteps")
    check_timesteps("dpmsolver++" if takes_any else "ddim", total, num_inference_steps)
    if not takes_any:
        sampler.set_timesteps(num_inference_steps)
        return
    # Computed here, as rounding in diffusers' own spacing can give a timestep of -1.
    timesteps = [round(total * k / num_inference_steps) - 1 for k in range(num_inference_steps, 0, -1)]
    sampler.set_timesteps(timesteps=timesteps)


def guided(predict: Callable[[Tensor, int, Tensor], Tensor], context: Tensor, null: Tensor, scale: float) -> Denoise:
    """A denoiser with classifier-free guidance: null + scale · (conditional - null).

    `predict(x, timestep, context)` is the network. `context` and `null` (B, T, D) are the prompts and the negative
    prompts. With a scale of 1 only the conditional prediction is computed.
    """
    if scale == 1:
        return lambda x, timestep: predict(x, timestep, context)
    both = torch.cat([null, context])

    def denoise(x: Tensor, timestep: int) -> Tensor:
        unconditional, conditional = predict(torch.cat([x, x]), timestep, both).to(x.dtype).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise


@torch.inference_mode()
def sample(
    denoise: Denoise,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    sampler: Any,
    num_inference_steps: int,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample x_0, fp32 (B, C, H, W) on `device`, with noise from one seed per sample. `shape`: (C, H, W).

    All noise of a sample comes from its own CPU generator. A sample therefore depends neither on the rest of its batch
    nor on the device's generator. `on_step(done, total)` is called after each step. An exception stops the sampling.
    """
    set_timesteps(sampler, num_inference_steps)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    options: dict[str, Any] = {"generator": generators}
    if _takes(sampler.step, "use_clipped_model_output"):
        # For DDIM only: compute the noise from the clipped x_0, as the other samplers always do.
        options["use_clipped_model_output"] = sampler.config.clip_sample
    for done, timestep in enumerate(sampler.timesteps, start=1):
        predicted = denoise(x, int(timestep)).to(x.dtype)
        x = sampler.step(predicted, timestep, x, **options).prev_sample
        if on_step is not None:
            on_step(done, len(sampler.timesteps))
    return x
