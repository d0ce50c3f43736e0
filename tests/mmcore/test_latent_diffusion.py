"""The latent-diffusion recipe: published sizes, and variants that diffusers' pipeline supports."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny_diffusion
import torch

from mmcore.catalogue import RECIPES, names
from mmcore.errors import InputError
from mmcore.frozen.text import TextInputs
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.latent_diffusion import VARIANTS, LatentDiffusionRecipe
from mmcore.generators.vqvae import VARIANTS as VQVAE_VARIANTS
from mmcore.recipe import recipe_from_json, recipe_to_json

pytestmark = pytest.mark.usefixtures("one_thread")


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_report_s_network_is_built_as_published() -> None:
    recipe = VARIANTS["report"]
    with torch.device("meta"):
        model = recipe.build(DiffusionFacts(TextInputs(width=512), VQVAE_VARIANTS["report"].latent_shape))
    config = model.unet.config
    assert (config.in_channels, config.sample_size) == (4, 32)
    assert config.block_out_channels == (256, 384, 512, 768)
    assert config.down_block_types == 4 * ("CrossAttnDownBlock2D",)
    assert (config.cross_attention_dim, config.time_embedding_dim) == (512, 512)
    heads = {module.heads for name, module in model.unet.named_modules() if name.endswith(("attn1", "attn2"))}
    assert heads == {16}
    assert parameters(model.unet) == 297_739_012
    assert parameters(model.text) == 0, "CLIP's hidden states are handed on as they are"
    noise, train = recipe.noise, recipe.train
    assert (noise.beta_schedule, noise.beta_start, noise.beta_end) == ("scaled_linear", 0.00085, 0.012)
    assert (noise.prediction, noise.min_snr_gamma, noise.num_timesteps) == ("epsilon", None, 1000)
    assert (train.optimizer, train.lr, train.batch_size, train.num_epochs) == ("adam", 5e-6, 16, 100)
    assert (recipe.drop_text, recipe.captions_per_image, recipe.text.max_tokens) == (0.1, 5, 77)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_fits_the_vqvae_of_its_name(name: str) -> None:
    recipe, vqvae = VARIANTS[name], VQVAE_VARIANTS[name]
    inputs = TextInputs(vocabulary_size=3000, pad_id=0, bos_id=1, eos_id=2)
    with torch.device("meta"):
        text_inputs = inputs if recipe.text.is_scratch else TextInputs(width=512)
        model = recipe.build(DiffusionFacts(text_inputs, vqvae.latent_shape))
    assert recipe.dataset == vqvae.dataset
    # The number of tokens that diffusers' pipeline pads prompts to.
    assert recipe.text.max_tokens == 77
    if name != "report":
        assert parameters(model) < 25e6
    assert recipe_from_json(LatentDiffusionRecipe, recipe_to_json(recipe), "here") == recipe


def test_the_recipes_are_in_the_catalogue() -> None:
    assert RECIPES["ldm"].recipe_type is LatentDiffusionRecipe
    assert names("autoencoder") == ["vqvae", "infinity_tokenizer"]


@pytest.mark.parametrize("settings", [{"drop_text": 1.0}, {"captions_per_image": 0}, {"sample_steps": 0}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(settings)).replace('_', '-')}"):
        dataclasses.replace(VARIANTS["shapes"], **settings)  # type: ignore[arg-type]


GOLDEN_LOSSES = [
    1.5717296600341797,
    1.362053394317627,
    1.25895357131958,
    1.2191221714019775,
    1.1798559427261353,
    1.2380467653274536,
    1.095206379890442,
    1.1520024538040161,
    1.3514899015426636,
    0.9627693295478821,
]


def test_golden_losses(tmp_path: Path) -> None:
    """Ten steps with weights from a formula, on scaled latents and their mirrors: a refactoring changes no loss."""
    recipe = tiny_diffusion.latent_recipe(num_epochs=2, lr=1e-3)
    assert recipe.noise == VARIANTS["shapes"].noise
    recipe = dataclasses.replace(
        recipe, noise=dataclasses.replace(recipe.noise, timestep_shift=8.0, unshifted_share=0.5)
    )
    assert recipe.unet.pooled_text
    # On one thread with default, avx2 and avx512 kernels they differed by 3.1e-6 at most.
    losses = tiny_diffusion.golden_losses(recipe, tmp_path)
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=1e-5)
