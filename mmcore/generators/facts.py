"""What the runs of generators, and of the models that they build on, know beside their settings."""

from dataclasses import dataclass

from mmcore.frozen.text import TextInputs


@dataclass(frozen=True)
class DiffusionFacts:
    """What a run of a diffusion recipe knows beside its settings."""

    text_inputs: TextInputs
    """What the network is fed of the text."""
    x_0_shape: tuple[int, int, int]
    """(C, H, W) of a sample."""
    resolution: int = 0
    """Pixels a side of an image."""
    scaling_factor: float = 1.0
    """By which latents are multiplied, so that they have the deviation of noise; 1 for pixels."""
    vqvae_fingerprint: str | None = None
    """Of the VQ-VAE whose latents the samples are; None where they are pixels."""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the samples, and the mirrored ones where half are to be mirrored."""
    text_fingerprint: str = ""
    """Of the frozen text encoder, or of the tokenizer."""
    text: tuple[str, ...] = ()
    """Path under STORAGE of the hidden states, or of the tokenizer."""


@dataclass(frozen=True)
class AutoregressiveFacts:
    """What a run of a Transformer over codes knows beside its settings."""

    text_inputs: TextInputs
    """What the network is fed of the text."""
    code_shape: tuple[int, int]
    """Rows and columns of the codes of an image."""
    num_codes: int
    """Codes of the codebook."""
    resolution: int = 0
    """Pixels a side of an image."""
    autoencoder_fingerprint: str = ""
    """Of the frozen autoencoder whose codes they are."""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the codes, and those of the mirrored images where half are to be mirrored."""
    text_fingerprint: str = ""
    """Of the frozen text encoder, or of the tokenizer."""
    text: tuple[str, ...] = ()
    """Path under STORAGE of the hidden states, or of the tokenizer."""


@dataclass(frozen=True)
class VQVAEFacts:
    """What a run of a VQ-VAE knows beside its settings."""

    dataset_fingerprint: str = ""
    column: str = ""
    """Folder under STORAGE/features of the pixels."""
    perceptual_fingerprint: str | None = None
    """Of the frozen network of the perceptual loss."""
