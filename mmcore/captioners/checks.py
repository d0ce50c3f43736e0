"""Checks that recipes of captioners and retrievers share."""

from typing import Any

from mmcore.errors import InputError
from mmcore.frozen.vision import SCRATCH


def check_max_length(settings: Any) -> None:
    """Raise InputError for a `max_length` of `settings` that has no room for begin and end."""
    if settings.max_length < 2:
        raise InputError(f"max_length {settings.max_length} must be at least 2 (begin, end); change --max-length")


def check_scratch_encoder(settings: Any) -> None:
    """Raise InputError for a `width` or an `image_size` of `settings` that the encoder `scratch` does not take."""
    if settings.encoder == SCRATCH and (settings.width % 32 or settings.image_size % 8):
        raise InputError(
            f"encoder {SCRATCH!r} takes a width divisible by 32 and an image_size divisible by 8, not width "
            f"{settings.width} and image_size {settings.image_size}; change --width and --image-size"
        )


def check_batch_of_pairs(settings: Any) -> None:
    """Raise InputError for a batch of `settings` in which a row has no other one."""
    if settings.train.batch_size < 2:
        raise InputError(
            f"batch_size {settings.train.batch_size} must be at least 2: a row is compared with the others of its "
            "batch; change --batch-size"
        )
