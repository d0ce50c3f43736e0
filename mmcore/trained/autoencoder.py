"""Opens a trained autoencoder: images -> latents or codes -> images."""

from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from mmcore import checkpoint
from mmcore.catalogue import read_model_file
from mmcore.data.pixels import to_network
from mmcore.errors import InputError
from mmcore.frozen.pretrained import sha256_of
from mmcore.generators.bsq import quantize
from mmcore.generators.facts import InfinityTokenizerFacts, VQVAEFacts
from mmcore.generators.infinity_scales import Grid
from mmcore.generators.infinity_tokenizer import InfinityTokenizerRecipe
from mmcore.generators.infinity_vae import InfinityVae
from mmcore.generators.vqvae import VQVAE, VQVAERecipe
from mmcore.recipe import Identity
from mmcore.run_files import RunFile, read_weights
from mmcore.storage import Storage


def open_autoencoder(source: str, *, fingerprint: str | None = None) -> "TrainedAutoencoder":
    """The autoencoder of a finished run. Reads recipe.json and no weights.

    Args:
        source: the run, a local folder or s3://bucket/prefix.
        fingerprint: the fingerprint of the autoencoder that made the latents or codes; `load` checks it.
    Raises InputError if `source` is not a finished run of an autoencoder.
    """
    run = Storage(source)
    file = read_model_file(run, "autoencoder")
    return BY_FACTS[type(file.facts)](run, file, fingerprint)


def open_vqvae(source: str, *, fingerprint: str | None = None) -> "TrainedVQVAE":
    """As `open_autoencoder`, for a VQ-VAE alone. Raises InputError also for another autoencoder."""
    opened = open_autoencoder(source, fingerprint=fingerprint)
    if not isinstance(opened, TrainedVQVAE):
        raise _of_another_kind(opened, TrainedVQVAE, "vqvae")
    return opened


def open_tokenizer(source: str, *, fingerprint: str | None = None) -> "TrainedInfinityTokenizer":
    """As `open_autoencoder`, for a tokenizer of bits alone. Raises InputError also for another autoencoder."""
    opened = open_autoencoder(source, fingerprint=fingerprint)
    if not isinstance(opened, TrainedInfinityTokenizer):
        raise _of_another_kind(opened, TrainedInfinityTokenizer, "infinity_tokenizer")
    return opened


def _of_another_kind(opened: "TrainedAutoencoder", wanted: "type[TrainedAutoencoder]", recipe_name: str) -> InputError:
    mend = f"name a run of {recipe_name}"
    return InputError(f"{opened.run}: recipe {opened.file.recipe_name!r} is not of a {wanted.what}; {mend}")


class TrainedAutoencoder:
    """The saved weights of a finished run: the last ones, or the best by validation loss if `keep` is `best`."""

    # The saved names of the weights begin so. The file also has the weights of the discriminator.
    prefix: ClassVar[str]
    # What messages call it.
    what: ClassVar[str]
    model: nn.Module
    device: torch.device

    def __init__(self, run: Storage, file: RunFile[Any, Any], fingerprint: str | None) -> None:
        self.run, self.file, self._expected_fingerprint = run, file, fingerprint
        self.image_size: int = file.recipe.image_size
        self.latent_shape: tuple[int, int, int] = file.recipe.latent_shape

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def load(self, device: str = "cpu") -> Self:
        """Read the weights and return self. Raises InputError if their SHA-256 or the fingerprint differs."""
        self.device, self.model = torch.device(device), self.file.recipe.build()
        weights = read_weights(self.run, self.file.weights_sha256)
        own = {name.removeprefix(self.prefix): weights[name] for name in weights if name.startswith(self.prefix)}
        checkpoint.load_trainable(self.model, own, str(self.run))
        self.model.eval().requires_grad_(False).to(self.device)
        if self._expected_fingerprint is not None and self.fingerprint() != self._expected_fingerprint:
            raise InputError(
                f"{self.run}/model: this {self.what} (fingerprint {self.fingerprint()[:12]}) is not the one that made "
                f"the latents or codes ({self._expected_fingerprint[:12]}); restore that {self.what}, or train the "
                "generator again"
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines latents and images: the weights and the settings."""
        # The settings as written in the file, so that a field added by a later version does not change it.
        settings = {name: value for name, value in self.file.written["settings"].items() if name != "train"}
        return sha256_of(self.model, settings)

    def _network_input(self, pixels: np.ndarray) -> Tensor:
        return to_network(torch.from_numpy(pixels).to(self.device))

    def encode(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> latents (B, C, h, w) before quantisation."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, P, P), about in [-1, 1]."""
        raise NotImplementedError

    def reconstruct(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> what is left of them after quantisation: (B, 3, P, P), about in [-1, 1]."""
        return self.decode(self.encode(pixels))


class TrainedVQVAE(TrainedAutoencoder):
    """A VQ-VAE. `decode` quantises its latents first."""

    prefix, what = "vqvae.", "VQ-VAE"
    model: VQVAE

    def __init__(self, run: Storage, file: RunFile[VQVAERecipe, VQVAEFacts], fingerprint: str | None) -> None:
        super().__init__(run, file, fingerprint)
        self.recipe = file.recipe
        self.num_codes: int = self.recipe.num_codes
        self.code_shape: tuple[int, int] = self.latent_shape[1:]

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Tensor:
        return self.model.encode(self._network_input(pixels))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)

    @torch.inference_mode()
    def codes(self, pixels: np.ndarray) -> Tensor:
        """uint8 (B, P, P, 3) -> index of the nearest code of each latent, int64 (B, h, w)."""
        return self.model.codes(self._network_input(pixels))

    @torch.inference_mode()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Code indices, int64 (B, h, w) -> images (B, 3, P, P), about in [-1, 1]."""
        return self.model.decode_vectors(self.model.quantizer.vectors(codes))


class TrainedInfinityTokenizer(TrainedAutoencoder):
    """Infinity's tokenizer. `decode` takes the sum of the grids and does not quantise it again."""

    prefix, what = "tokenizer.", "tokenizer"
    model: InfinityVae

    def __init__(
        self, run: Storage, file: RunFile[InfinityTokenizerRecipe, InfinityTokenizerFacts], fingerprint: str | None
    ) -> None:
        super().__init__(run, file, fingerprint)
        self.recipe = file.recipe
        self.num_bits: int = self.recipe.num_bits
        self.grids: tuple[Grid, ...] = self.recipe.grid_sides

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Tensor:
        return self.model.encode(self._network_input(pixels))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)

    def reconstruct(self, pixels: np.ndarray) -> Tensor:
        return self.decode(quantize(self.encode(pixels), self.grids).latents_BdHW)


BY_FACTS: dict[type, type[TrainedAutoencoder]] = {
    VQVAEFacts: TrainedVQVAE,
    InfinityTokenizerFacts: TrainedInfinityTokenizer,
}
"""The class that opens a run, by the type of its facts."""
