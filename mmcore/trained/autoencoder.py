"""A trained VQ-VAE, read back from its run folder."""

from mmcore import checkpoint
from mmcore.errors import InputError
from mmcore.frozen.pretrained import sha256_of
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.recipe import recipe_from_json
from mmcore.run_files import read_facts, read_weights
from mmcore.storage import Storage


class TrainedVQVAE:
    """The weights that a finished run keeps: these recipes' last, or by `keep` those of the best validation."""

    def __init__(self, run: Storage, device: str = "cpu", *, fingerprint: str | None = None) -> None:
        """`fingerprint`: the one that it must have, by those who hold latents of it.

        Raises InputError where `run` is no finished run of a VQ-VAE, or has another fingerprint.
        """
        where, facts = f"{run}/model/recipe.json", read_facts(run)
        if facts["recipe"] != "vqvae":
            raise InputError(f"{where}: recipe {facts['recipe']!r} is no VQ-VAE; name a run under STORAGE/runs/vqvae")
        self.recipe = recipe_from_json(VQVAERecipe, facts["settings"], where)
        self.model = self.recipe.build()
        weights = read_weights(run, facts)
        # The discriminator's weights are in the file too; a trained model has no use for them.
        own = {name.removeprefix("vqvae."): value for name, value in weights.items() if name.startswith("vqvae.")}
        checkpoint.load_trainable(self.model, own, str(run))
        self.model.eval().requires_grad_(False).to(device)
        # As they were written: a field that a later version adds must not change the fingerprint of what is there.
        self.settings = {name: value for name, value in facts["settings"].items() if name != "train"}
        if fingerprint is not None and self.fingerprint() != fingerprint:
            raise InputError(
                f"{run}/model: another VQ-VAE (fingerprint {self.fingerprint()[:12]}) than the latents are of "
                f"({fingerprint[:12]}), trained anew since or copied over it; put that one back, or train the latent "
                "diffusion anew"
            )

    def fingerprint(self) -> str:
        """SHA-256 over all that decides latents and images: the weights and the settings."""
        return sha256_of(self.model, self.settings)
