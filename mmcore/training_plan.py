"""Values derived from the settings of a training: precision, number of steps, and the check of its settings."""

import math

import torch

from mmcore.errors import InputError
from mmcore.recipe import TrainSettings


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def resolve_precision(settings: TrainSettings, device: torch.device) -> str:
    if settings.precision == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return settings.precision


def num_steps(settings: TrainSettings, num_rows: int) -> tuple[int, int]:
    """Steps per epoch and steps of the run. Rows that do not fill a last batch are left out of the epoch."""
    if num_rows < settings.batch_size:
        raise InputError(f"batch_size {settings.batch_size} is above the {num_rows} training rows; lower --batch-size")
    steps_per_epoch = num_rows // settings.batch_size
    total = steps_per_epoch * settings.num_epochs
    return steps_per_epoch, total if settings.max_steps is None else min(total, settings.max_steps)


def check_batch(settings: TrainSettings, num_workers: int) -> None:
    """Raise InputError for an invalid setting, or a batch that is not divisible by workers x micro-batches."""
    for name in (
        "num_epochs",
        "max_steps",
        "batch_size",
        "gradient_accumulation",
        "validate_every_epochs",
        "checkpoint_every_steps",
        "log_every_steps",
    ):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1; change --{name.replace('_', '-')}")
    if settings.clip_grad_norm is not None and not settings.clip_grad_norm > 0:
        raise InputError(f"clip_grad_norm {settings.clip_grad_norm} must be above 0; change --clip-grad-norm")
    for name in ("lr", "weight_decay", "warmup_steps", "step_epoch", "num_samples"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise InputError(f"{name} {getattr(settings, name)} must be 0 or above; change --{name.replace('_', '-')}")
    for name, value in (("betas", settings.betas[0]), ("betas", settings.betas[1]), ("ema_decay", settings.ema_decay)):
        if value is not None and not 0 <= value < 1:
            raise InputError(f"{name} {value} must be from 0 to below 1; change --{name.replace('_', '-')}")
    if num_workers < 1:
        raise InputError(f"num_workers {num_workers} must be at least 1; change --num-workers")
    parts = num_workers * settings.gradient_accumulation
    if settings.batch_size % parts:
        raise InputError(
            f"batch_size {settings.batch_size} is not divisible by {num_workers} workers x "
            f"{settings.gradient_accumulation} micro-batches; choose a multiple of {parts} with --batch-size"
        )
