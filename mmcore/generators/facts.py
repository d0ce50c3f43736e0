"""Facts of the runs of generators and autoencoders that are not settings. They are stored in recipe.json."""

from dataclasses import dataclass

from mmcore.frozen.text import TextInputs
from mmcore.generators.infinity_scales import Grid


@dataclass(frozen=True)
class DiffusionFacts:
    """Facts of a diffusion run."""

    text_inputs: TextInputs
    """The text inputs of the network."""
    x_0_shape: tuple[int, int, int]
    """(C, H, W) of a sample."""
    resolution: int = 0
    """Side of an image in pixels."""
    scaling_factor: float = 1.0
    """Factor that scales latents to a standard deviation of 1; 1 for pixels."""
    vqvae_fingerprint: str | None = None
    """Fingerprint of the VQ-VAE of the latents; None for pixels."""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the samples and, with `flip`, the mirrored samples."""
    text_fingerprint: str = ""
    """Fingerprint of the frozen text encoder, or of the tokenizer."""
    text: tuple[str, ...] = ()
    """Path under STORAGE of the hidden states, or of the tokenizer."""


@dataclass(frozen=True)
class AutoregressiveFacts:
    """Facts of a run of the autoregressive generator."""

    text_inputs: TextInputs
    """The text inputs of the network."""
    code_shape: tuple[int, int]
    """Rows and columns of the codes of an image."""
    num_codes: int
    """Number of codes in the codebook."""
    resolution: int = 0
    """Side of an image in pixels."""
    autoencoder_fingerprint: str = ""
    """Fingerprint of the frozen autoencoder of the codes."""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the codes and, with `flip`, the codes of the mirrored images."""
    text_fingerprint: str = ""
    """Fingerprint of the frozen text encoder, or of the tokenizer."""
    text: tuple[str, ...] = ()
    """Path under STORAGE of the hidden states, or of the tokenizer."""


@dataclass(frozen=True)
class InfinityFacts:
    """Facts of a run of Infinity's Transformer."""

    text_inputs: TextInputs
    """The text inputs of the network."""
    latent_shape: tuple[int, int, int]
    """(d, H, W) of the latents of an image: d bits of a position, on the last grid."""
    grid_sides: tuple[int, ...]
    """Sides of the square grids, from coarse to fine."""
    resolution: int = 0
    """Side of an image in pixels."""
    autoencoder_fingerprint: str = ""
    """Fingerprint of the frozen tokenizer of the latents."""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the latents and, with `flip`, those of the mirrored images."""
    text_fingerprint: str = ""
    """Fingerprint of the frozen text encoder, or of the tokenizer of words."""
    text: tuple[str, ...] = ()
    """Path under STORAGE of the hidden states, or of the tokenizer of words."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Height and width of each grid."""
        return tuple((side, side) for side in self.grid_sides)


@dataclass(frozen=True)
class AutoencoderFacts:
    """Facts of a run of an autoencoder."""

    dataset_fingerprint: str = ""
    column: str = ""
    """Folder under STORAGE/features of the pixels."""
    perceptual_fingerprint: str | None = None
    """Fingerprint of the frozen network of the perceptual loss."""


@dataclass(frozen=True)
class VQVAEFacts(AutoencoderFacts):
    """Facts of a VQ-VAE run."""


@dataclass(frozen=True)
class InfinityTokenizerFacts(AutoencoderFacts):
    """Facts of a run of Infinity's tokenizer."""


@dataclass(frozen=True)
class SdxlLoraFacts:
    """Facts of a run of an SDXL LoRA."""

    model_identity: str = ""
    """The pretrained model: its commit on the hub, or the SHA-256 of its files."""
    dataset_fingerprint: str = ""
    columns: tuple[str, ...] = ()
    """Folders under STORAGE/features: the images and, with `flip`, the mirrored images."""
    text: str = ""
    """Folder under STORAGE/features of the captions."""
