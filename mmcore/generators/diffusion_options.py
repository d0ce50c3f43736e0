"""The sampling options of a diffusion: flags of a job, columns of a manifest, text chunks and fields of a request."""

import dataclasses
import math
from dataclasses import dataclass, field

from mmcore.errors import InputError, OptionError
from mmcore.generators.diffusion import SamplerName, check_timesteps


@dataclass(frozen=True)
class DiffusionOptions:
    """How images are sampled. The metadata ``api`` of a field is its name in a request, where that is another."""

    steps: int = field(default=25, metadata={"api": "num_inference_steps"})
    """Steps of the sampler."""
    guidance: float = field(default=3.0, metadata={"api": "guidance_scale"})
    """Classifier-free guidance scale; 1 leaves it out and takes half the time."""
    sampler: SamplerName = "dpmsolver++"
    """Sampler of the diffusion; ddim and ddpm need more steps, and ddim a divisor of the 1,000 timesteps."""
    negative_prompt: str = ""
    """What the guidance leads away from; by default the empty text."""

    def shortened(self) -> "DiffusionOptions":
        """The same with as few steps as show every kernel, to warm up."""
        # Two steps show them all; one does of ddim, which may not take two where it takes the steps asked for.
        return dataclasses.replace(self, steps=1 if self.sampler == "ddim" else min(2, self.steps))

    def check(self, num_timesteps: int, guides: bool) -> None:
        """Raise OptionError for what cannot be.

        Args:
            num_timesteps: those of the training.
            guides: whether the training saw prompts missing, without which there is no guidance.
        """
        try:
            check_timesteps(self.sampler, num_timesteps, self.steps)
        except InputError as error:
            raise OptionError("steps", str(error)) from None
        if not 1 <= self.guidance < math.inf:
            raise OptionError(
                "guidance", f"{self.guidance:g}: must be at least 1, which leaves guidance out, and finite"
            )
        if self.guidance != 1 and not guides:
            raise OptionError(
                "guidance",
                f"{self.guidance:g}: this run never saw a prompt missing (drop_text 0), so it has nothing to be led "
                "away from; give 1",
            )
        if self.guidance == 1 and self.negative_prompt:
            raise OptionError(
                "negative_prompt", "works by guidance, and a guidance of 1 is none; give a larger guidance"
            )
