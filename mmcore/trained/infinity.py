"""A trained Infinity: prompts and seeds -> images."""

from collections.abc import Callable, Sequence

from torch import Tensor

from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_recipe import InfinityGenerator, InfinityRecipe
from mmcore.run_files import TOKENIZER_OF_BITS_ASSET, RunFile
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedInfinityTokenizer, open_tokenizer
from mmcore.trained.generator_run import GeneratorRun


class TrainedInfinity(GeneratorRun):
    """A Transformer over the bits of a tokenizer. The default options are the recipe's `sample`."""

    model: InfinityGenerator
    tokenizer: TrainedInfinityTokenizer
    """Decodes latents to images."""

    def __init__(self, run: Storage, file: RunFile[InfinityRecipe, InfinityFacts], text_encoder: str | None) -> None:
        super().__init__(run, file, text_encoder)
        self.options: InfinityOptions = file.recipe.sample

    def check_options(self, options: InfinityOptions) -> None:
        options.check(self.recipe.transformer.num_layers, self.guides)

    def load_autoencoder(self, assets: Storage) -> None:
        uri, fingerprint = (assets / TOKENIZER_OF_BITS_ASSET).uri, self.file.facts.autoencoder_fingerprint
        self.tokenizer = open_tokenizer(uri, fingerprint=fingerprint).load(str(self.device))

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        options: InfinityOptions,
        on_step: Callable[[int, int], None] | None,
    ) -> Tensor:
        """See `GeneratorRun.draw`. `on_step` counts grids."""
        return self.tokenizer.decode(self.model.generate(self.text(prompts), seeds, options, on_step=on_step))
