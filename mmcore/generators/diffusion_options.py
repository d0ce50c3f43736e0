"""The sampling options of a diffusion: flags of a job, columns of a manifest, PNG text chunks, fields of a request."""

import dataclasses
import math
from dataclasses import dataclass, field

from mmcore.errors import InputError, OptionError, check_negative_prompt
from mmcore.generators.diffusion import SamplerName, check_timesteps


@dataclass(frozen=True)
class DiffusionOptions:
    """How images are sampled. The metadata ``api`` of a field is its name in a request, if it differs."""

    steps: int = field(default=25, metadata={"api": "num_inference_steps"})
    """Number of sampling steps."""
    guidance: float = field(default=3.0, metadata={"api": "guidance_scale"})
    """Classifier-free guidance scale; 1 is no guidance and takes half the time."""
    sampler: SamplerName = "dpmsolver++"
    """Sampler. ddim and ddpm need more steps. The steps of ddim must divide the 1,000 timesteps."""
    negative_prompt: str = ""
    """Text that guidance steers away from; by default the empty text."""

    def shortened(self) -> "DiffusionOptions":
        """Options for a warm-up: the fewest steps that run every kernel."""
        # Two steps run every kernel. ddim needs only one, and two may not divide its number of timesteps.
        return dataclasses.replace(self, steps=1 if self.sampler == "ddim" else min(2, self.steps))

    def check(self, num_timesteps: int, guides: bool) -> None:
        """Raise OptionError for an invalid value.

        Args:
            num_timesteps: number of timesteps of the training.
            guides: whether guidance is possible, that is whether captions were dropped in training.
        """
        try:
            check_timesteps(self.sampler, num_timesteps, self.steps)
        except InputError as error:
            raise OptionError("steps", str(error)) from None
        if not 1 <= self.guidance < math.inf:
            raise OptionError("guidance", f"{self.guidance:g}: must be at least 1 (no guidance) and finite")
        if self.guidance != 1 and not guides:
            raise OptionError(
                "guidance",
                f"{self.guidance:g}: guidance is not possible, as this run was trained without dropped captions "
                "(drop_text 0); give 1",
            )
        check_negative_prompt(self.negative_prompt, self.guidance != 1)
