"""A trained autoregressive generator: prompts and seeds -> images."""

from collections.abc import Callable, Sequence

from torch import Tensor

from mmcore.frozen.text import NO_TEXT
from mmcore.generators.autoregressive import AutoregressiveRecipe, CodeTransformer
from mmcore.generators.autoregressive_options import AutoregressiveOptions
from mmcore.generators.facts import AutoregressiveFacts
from mmcore.run_files import VQVAE_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_vqvae
from mmcore.trained.generator_run import GeneratorRun


class TrainedAutoregressive(GeneratorRun):
    """A Transformer over the codes of a VQ-VAE. The default options are the recipe's `sample`."""

    model: CodeTransformer
    vqvae: TrainedVQVAE
    """Decodes codes to images."""

    def __init__(
        self, run: Storage, file: RunFile[AutoregressiveRecipe, AutoregressiveFacts], text_encoder: str | None
    ) -> None:
        super().__init__(run, file, text_encoder)
        self.options: AutoregressiveOptions = file.recipe.sample

    def check_options(self, options: AutoregressiveOptions) -> None:
        options.check(self.guides)

    def load_autoencoder(self, assets: Storage) -> None:
        fingerprint = self.file.facts.autoencoder_fingerprint
        self.vqvae = open_vqvae((assets / VQVAE_ASSET).uri, fingerprint=fingerprint).load(str(self.device))

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: AutoregressiveOptions,
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
        """See `GeneratorRun.draw`. `on_step` counts codes."""
        null = self.text([options.negative_prompt or NO_TEXT] * len(prompts)) if options.guides else None
        return self.vqvae.decode_codes(self.model.generate(self.text(prompts), null, seeds, options, on_step=on_step))
