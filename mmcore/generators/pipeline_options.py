"""The sampling options of a pipeline of diffusers: flags of a job, columns of a manifest, fields of a request."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from mmcore.errors import OptionError, check_negative_prompt

PipelineSampler = Literal["own", "dpmsolver++", "euler", "ddim"]
"""``own`` is the sampler that the pipeline's folder names."""


@dataclass(frozen=True)
class PipelineOptions:
    """How images are sampled. The metadata ``api`` of a field is its name in a request, if it differs."""

    steps: int = field(default=30, metadata={"api": "num_inference_steps"})
    """Number of sampling steps."""
    guidance: float = field(default=5.0, metadata={"api": "guidance_scale"})
    """Classifier-free guidance scale; 1 is no guidance and takes half the time."""
    guided_share: float = 1.0
    """Share of the steps that are guided, the first ones. Fewer are faster and change the image."""
    sampler: PipelineSampler = "dpmsolver++"
    """Sampler; own is the one of the model's folder. DPM-Solver++ needs the fewest steps."""
    negative_prompt: str = ""
    """Text that guidance steers away from; by default the empty text."""

    def shortened(self) -> "PipelineOptions":
        """Options for a warm-up: the fewest steps that run every kernel."""
        return dataclasses.replace(self, steps=min(2, self.steps))

    def check(self, num_timesteps: int) -> None:
        """Raise OptionError for an invalid value. `num_timesteps`: of the training."""
        if not 1 <= self.steps <= num_timesteps:
            raise OptionError("steps", f"{self.steps}: must be at least 1 and at most {num_timesteps}")
        if not 1 <= self.guidance < math.inf:
            raise OptionError("guidance", f"{self.guidance:g}: must be at least 1 (no guidance) and finite")
        if not 0 < self.guided_share <= 1:
            raise OptionError("guided_share", f"{self.guided_share:g}: must be above 0 and at most 1")
        check_negative_prompt(self.negative_prompt, self.guidance != 1)

    @property
    def guided_steps(self) -> int:
        """Steps with guidance, at least one."""
        return self.steps if self.guided_share == 1 else max(1, round(self.steps * self.guided_share))
