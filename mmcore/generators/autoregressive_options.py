"""The sampling options of the autoregressive generator.

They become flags of a job, columns of a manifest, PNG text chunks and fields of a request.
"""

import math
from dataclasses import dataclass, field

from mmcore.errors import OptionError, check_negative_prompt

# Below it sampling is greedy anyway, and logits / temperature could overflow fp32.
_MIN_TEMPERATURE = 0.01
# Far above useful values. With a much larger scale the logits could overflow fp32.
_MAX_GUIDANCE = 1000.0


@dataclass(frozen=True)
class AutoregressiveOptions:
    """How codes are sampled. The metadata ``api`` of a field is its name in a request, if it differs."""

    guidance: float = field(default=2.0, metadata={"api": "guidance_scale"})
    """Classifier-free guidance scale of the first code. 1 for the first and the last code is no guidance and takes half
    the time."""
    guidance_end: float | None = field(default=None, metadata={"api": "guidance_scale_end"})
    """Guidance scale of the last code, linear in between; None uses `guidance` for all codes."""
    temperature: float = 0.6
    """Temperature of the logits; below 1 prefers likely codes."""
    top_k: int = 0
    """Sample from the k most likely codes; 0 allows all."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the most likely codes with this total probability; 1 allows all."""
    negative_prompt: str = ""
    """Text that guidance steers away from; by default the empty text."""

    @property
    def guides(self) -> bool:
        """Whether any code is sampled with guidance."""
        return self.guidance != 1 or self.guidance_end not in (None, 1)

    def shortened(self) -> "AutoregressiveOptions":
        """Options for a warm-up. They are unchanged, as every image has the same number of codes."""
        return self

    def check(self, guides: bool) -> None:
        """Raise OptionError for an invalid value.

        Args:
            guides: whether guidance is possible, that is whether captions were dropped in training.
        """
        for name, scale in (("guidance", self.guidance), ("guidance_end", self.guidance_end)):
            if scale is None:
                continue
            if not 1 <= scale <= _MAX_GUIDANCE:
                raise OptionError(name, f"{scale:g}: must be at least 1 (no guidance) and at most {_MAX_GUIDANCE:g}")
            if scale != 1 and not guides:
                raise OptionError(
                    name,
                    f"{scale:g}: guidance is not possible, as this run was trained without dropped captions "
                    "(drop_text 0); give 1",
                )
        if not _MIN_TEMPERATURE <= self.temperature < math.inf:
            raise OptionError(
                "temperature",
                f"{self.temperature:g}: must be at least {_MIN_TEMPERATURE} (greedy) and finite",
            )
        if self.top_k < 0:
            raise OptionError("top_k", f"{self.top_k}: must be at least 1, or 0 for all codes")
        if not 0 < self.top_p <= 1:
            raise OptionError("top_p", f"{self.top_p:g}: must be above 0, and at most 1, which allows all codes")
        check_negative_prompt(self.negative_prompt, self.guides)
