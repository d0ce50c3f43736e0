"""Opens a trained autoencoder: images -> latents or codes -> images."""

from collections.abc import Callable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mmcore import checkpoint
from mmcore.catalogue import read_model_file
from mmcore.data.pixels import to_network
from mmcore.errors import InputError
from mmcore.frozen.pretrained import sha256_of
from mmcore.generators.facts import VQVAEFacts
from mmcore.generators.vqvae import VQVAE, VQVAERecipe
from mmcore.recipe import Identity
from mmcore.run_files import RunFile, read_weights
from mmcore.storage import Storage


def open_autoencoder(source: str, *, fingerprint: str | None = None) -> "TrainedVQVAE":
    """The VQ-VAE of a finished run. Reads recipe.json and no weights.

    Args:
        source: the run, a local folder or s3://bucket/prefix.
        fingerprint: the fingerprint of the VQ-VAE that made the latents or codes; `load` checks it.
    Raises InputError if `source` is not a finished run of a VQ-VAE.
    """
    run = Storage(source)
    file = read_model_file(run, "autoencoder")
    return BY_FACTS[type(file.facts)](run, file, fingerprint)


class TrainedVQVAE:
    """The saved weights of a finished run: the last ones, or the best by validation loss if `keep` is `best`."""

    model: VQVAE
    device: torch.device

    def __init__(self, run: Storage, file: RunFile[VQVAERecipe, VQVAEFacts], fingerprint: str | None) -> None:
        self.run, self.file, self._expected_fingerprint = run, file, fingerprint
        self.recipe = file.recipe
        self.image_size: int = self.recipe.image_size
        self.latent_shape: tuple[int, int, int] = self.recipe.latent_shape
        self.num_codes: int = self.recipe.num_codes
        self.code_shape: tuple[int, int] = self.latent_shape[1:]

    def identity(self) -> Identity:
        return {"run": self.run.uri, "weights_sha256": self.file.weights_sha256}

    def load(self, device: str = "cpu") -> Self:
        """Read the weights and return self. Raises InputError if their SHA-256 or the fingerprint differs."""
        self.device, self.model = torch.device(device), self.recipe.build()
        weights = read_weights(self.run, self.file.weights_sha256)
        # The file also has the discriminator's weights, which are not needed here.
        own = {name.removeprefix("vqvae."): value for name, value in weights.items() if name.startswith("vqvae.")}
        checkpoint.load_trainable(self.model, own, str(self.run))
        self.model.eval().requires_grad_(False).to(self.device)
        if self._expected_fingerprint is not None and self.fingerprint() != self._expected_fingerprint:
            raise InputError(
                f"{self.run}/model: this VQ-VAE (fingerprint {self.fingerprint()[:12]}) is not the one that made the "
                f"latents or codes ({self._expected_fingerprint[:12]}); restore that VQ-VAE, or train the generator "
                "again"
            )
        return self

    def fingerprint(self) -> str:
        """SHA-256 over everything that determines latents and images: the weights and the settings."""
        # The settings as written in the file, so that a field added by a later version does not change it.
        settings = {name: value for name, value in self.file.written["settings"].items() if name != "train"}
        return sha256_of(self.model, settings)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Tensor:
        return self.model.encode(to_network(torch.from_numpy(pixels).to(self.device)))

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)

    @torch.inference_mode()
    def codes(self, pixels: np.ndarray) -> Tensor:
        return self.model.codes(to_network(torch.from_numpy(pixels).to(self.device)))

    @torch.inference_mode()
    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.model.decode_vectors(self.model.quantizer.vectors(codes))


BY_FACTS: dict[type, Callable[[Storage, RunFile[Any, Any], str | None], TrainedVQVAE]] = {
    VQVAEFacts: TrainedVQVAE,
}
"""The class that opens a run, by the type of its facts."""
