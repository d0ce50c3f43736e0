"""A trained text-to-image generator, read back from its run folder: prompts and seeds in, images out."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmcore import checkpoint
from mmcore.catalogue import GENERATORS
from mmcore.data.pixels import to_pixels
from mmcore.errors import InputError
from mmcore.frozen.text import NO_TEXT, FrozenTextEncoder, PromptTokenizer, TextInputs
from mmcore.generators.diffusion import SamplerName
from mmcore.generators.vqvae import VQVAE
from mmcore.recipe import recipe_from_json
from mmcore.run_files import read_facts, read_weights
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE

# Folders under model/ of what a run needs beside its weights.
TOKENIZER_ASSET, VQVAE_ASSET = "tokenizer", "vqvae"


class TrainedGenerator:
    """The weights that a finished run keeps (these recipes' last, or by `keep` those of the best validation), with the
    frozen parts that it was trained on."""

    def __init__(
        self,
        run: Storage,
        *,
        device: str = "cpu",
        text_encoder: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`text_encoder`: where the frozen encoder lies on this machine, if not where the run had it. `dtype`: bfloat16
        computes under autocast, faster and with images that depend on the size of the batch.

        Raises InputError where `run` is no finished run of a generator, or the text encoder or the VQ-VAE is another
        one than it was trained on.
        """
        where, facts = f"{run}/model/recipe.json", read_facts(run)
        recipe_type = GENERATORS.get(facts["recipe"])
        if recipe_type is None:
            raise InputError(f"{where}: recipe {facts['recipe']!r} is no generator; known: {', '.join(GENERATORS)}")
        self.recipe = recipe_from_json(recipe_type, facts["settings"], where)
        self.device, self.dtype = torch.device(device), dtype
        self.resolution: int = facts["resolution"]
        self.scaling_factor: float = facts["scaling_factor"]
        self.model = self.recipe.build(TextInputs(**facts["text_inputs"]), tuple(facts["x_0_shape"]))
        checkpoint.load_trainable(self.model, read_weights(run, facts), str(run))
        self.model.eval().requires_grad_(False).to(self.device)
        assets = run / "model"
        self.vqvae: VQVAE | None = None  # without one, x_0 is the image itself
        if fingerprint := facts["vqvae_fingerprint"]:
            self.vqvae = TrainedVQVAE(assets / VQVAE_ASSET, device, fingerprint=fingerprint).model
        self.tokenizer: PromptTokenizer | None = None
        self.text_encoder: FrozenTextEncoder | None = None
        text = self.recipe.text
        if text.is_scratch:
            if text_encoder is not None:
                raise InputError(f"--text-encoder {text_encoder!r}: this run's was trained with it; leave the flag out")
            self.tokenizer = PromptTokenizer.read(assets / TOKENIZER_ASSET, text.max_tokens)
            return
        self.text_encoder = FrozenTextEncoder(text_encoder or text.text_encoder, text.max_tokens, device)
        if self.text_encoder.fingerprint() != facts["text_fingerprint"]:
            raise InputError(
                f"{where}: trained on another text encoder than {self.text_encoder.name!r}: its weights or its "
                "tokenizer differ; name the right one with --text-encoder"
            )

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts as the network takes them."""
        if self.text_encoder is not None:
            return {"encoder_hidden_states": self.text_encoder(prompts)}
        assert self.tokenizer is not None
        return {"input_ids": self.tokenizer(prompts)[0].to(self.device)}

    def images(self, x_0: Tensor) -> Tensor:
        """x_0 as the network makes it, (B, C, H, W) -> images in [-1, 1], (B, 3, P, P)."""
        return x_0 if self.vqvae is None else self.vqvae.decode(x_0 / self.scaling_factor)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        sampler: SamplerName = "ddim",
        negative_prompts: Sequence[str] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """An image for each prompt and seed: uint8 (B, H, W, 3).

        An image depends on its prompt, its seed and the other arguments, not on its batch-mates. `negative_prompts`
        are what guidance leads away from (nothing by default); `on_step(done, total)` is called after each step, and
        what it raises ends the work. Raises InputError for a number of steps that the sampler does not take, and for
        guidance without which the run was trained.
        """
        if not len(prompts) == len(seeds) == len(negative_prompts or prompts):
            raise ValueError(f"{len(prompts)} prompts, {len(seeds)} seeds: each image has one of both")
        if guidance_scale == 1 and negative_prompts is not None:
            raise InputError("negative prompts work by guidance, and a scale of 1 is none; give a larger one")
        if guidance_scale != 1 and self.recipe.drop_text == 0:
            raise InputError(
                f"guidance scale {guidance_scale:g}: this run never saw a prompt missing (drop_text 0), so it has "
                "nothing to be led away from; give a scale of 1"
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            x_0 = self.model.generate(
                self.encode(prompts),
                self.encode(negative_prompts or [NO_TEXT] * len(prompts)),
                seeds,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                sampler=sampler,
                clip=self.vqvae is None,
                on_step=on_step,
            )
            return to_pixels(self.images(x_0)).cpu().numpy()
