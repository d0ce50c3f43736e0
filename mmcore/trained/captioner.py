"""A trained captioner, read back from its run folder: encoded images in, captions out."""

from collections.abc import Sequence

import torch

from mmcore import checkpoint
from mmcore.catalogue import CAPTIONERS
from mmcore.errors import InputError
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder, pixels_from_bytes
from mmcore.recipe import recipe_from_json
from mmcore.run_files import read_facts, read_weights
from mmcore.storage import Storage
from mmcore.text import WordVocabulary


class TrainedCaptioner:
    """The weights that a finished run keeps (of the best validation, or by `keep` the last), with the frozen encoder
    that it was trained on."""

    def __init__(self, run: Storage, *, device: str = "cpu", encoder: str | None = None) -> None:
        """`encoder`: where the frozen encoder lies on this machine, if not where the run had it.

        Raises InputError where `run` is no finished run of a captioner.
        """
        where = f"{run}/model/recipe.json"
        facts = read_facts(run)
        recipe_type = CAPTIONERS.get(facts["recipe"])
        if recipe_type is None:
            raise InputError(f"{where}: recipe {facts['recipe']!r} is no captioner; known: {', '.join(CAPTIONERS)}")
        self.recipe = recipe_from_json(recipe_type, facts["settings"], where)
        self.device = torch.device(device)
        vocabulary = WordVocabulary.from_json(facts["vocabulary"])
        self.model = self.recipe.build(vocabulary, (facts["image_tokens"], facts["encoder_width"]))
        checkpoint.load_trainable(self.model, read_weights(run, facts), str(run))
        self.model.eval().to(self.device)
        name = encoder or self.recipe.encoder
        self.encoder = None
        if name != SCRATCH:
            self.encoder = FrozenVisionEncoder(name, self.recipe.image_size, device)
            if self.encoder.fingerprint() != facts["encoder_fingerprint"]:
                raise InputError(f"--encoder {name!r}: not the encoder that {run} was trained on; name that one")

    @torch.inference_mode()
    def __call__(
        self,
        images: Sequence[bytes],
        names: Sequence[str],
        *,
        num_beams: int = 1,
        max_length: int = 30,
        length_penalty: float = 1.0,
    ) -> list[str]:
        """Encoded images (PNG, JPEG, ...) -> captions. `names` are used in error messages."""
        pixels = pixels_from_bytes(images, self.recipe.image_size, names)
        inputs = torch.from_numpy(pixels).to(self.device) if self.encoder is None else self.encoder(pixels)
        return self.model.caption(inputs, num_beams=num_beams, max_length=max_length, length_penalty=length_penalty)
