"""An encoder that sees each patch of an image separately. Equal patches have equal latents, wherever they are."""

from torch import nn


def patch_encoder(num_channels: int, patch_size: int, width: int, out_channels: int) -> nn.Module:
    """Three layers on each patch separately: (B, C, H, W) -> (B, D, H / patch_size, W / patch_size).

    There is no normalisation over positions, as one patch would then change the latents of the others.
    """
    return nn.Sequential(
        nn.Conv2d(num_channels, width, patch_size, stride=patch_size),
        nn.SiLU(),
        nn.Conv2d(width, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, out_channels, 1),
    )
