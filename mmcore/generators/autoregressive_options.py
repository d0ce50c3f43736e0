"""The sampling options of a Transformer over codes: flags of a job, columns of a manifest, text chunks and fields of a
request."""

import math
from dataclasses import dataclass, field

from mmcore.errors import OptionError

# Below it a draw is the likeliest code already, and a quotient of logits might leave fp32.
_MIN_TEMPERATURE = 0.01
# Far above what helps; a product of logits with much more might leave fp32, and then there is no code to draw.
_MAX_GUIDANCE = 1000.0


@dataclass(frozen=True)
class AutoregressiveOptions:
    """How codes are drawn. The metadata ``api`` of a field is its name in a request, where that is another."""

    guidance: float = field(default=2.0, metadata={"api": "guidance_scale"})
    """Classifier-free guidance scale of the first code; 1 leaves guidance out and takes half the time."""
    guidance_end: float | None = field(default=None, metadata={"api": "guidance_scale_end"})
    """Guidance scale of the last code, with a straight line between; None keeps that of the first."""
    temperature: float = 0.6
    """What the logits are divided by: below 1 prefers likely codes."""
    top_k: int = 0
    """How many of the likeliest codes may be drawn; 0 allows all."""
    top_p: float = 1.0
    """Share of the probability that the codes which may be drawn hold, the likeliest first; 1 allows all."""
    negative_prompt: str = ""
    """What the guidance leads away from; by default the empty text."""

    @property
    def guides(self) -> bool:
        """Whether any code is drawn under guidance."""
        return self.guidance != 1 or self.guidance_end not in (None, 1)

    def shortened(self) -> "AutoregressiveOptions":
        """The same: an image has all of its codes, and each is drawn by the same kernels."""
        return self

    def check(self, guides: bool) -> None:
        """Raise OptionError for what cannot be.

        Args:
            guides: whether the training saw prompts missing, without which there is no guidance.
        """
        for name, scale in (("guidance", self.guidance), ("guidance_end", self.guidance_end)):
            if scale is None:
                continue
            if not 1 <= scale <= _MAX_GUIDANCE:
                raise OptionError(
                    name, f"{scale:g}: must be at least 1, which leaves guidance out, and at most {_MAX_GUIDANCE:g}"
                )
            if scale != 1 and not guides:
                raise OptionError(
                    name,
                    f"{scale:g}: this run never saw a prompt missing (drop_text 0), so it has nothing to be led away "
                    "from; give 1",
                )
        if not _MIN_TEMPERATURE <= self.temperature < math.inf:
            raise OptionError(
                "temperature",
                f"{self.temperature:g}: must be at least {_MIN_TEMPERATURE}, which takes the likeliest, and finite",
            )
        if self.top_k < 0:
            raise OptionError("top_k", f"{self.top_k}: must be at least 1, or 0 for all codes")
        if not 0 < self.top_p <= 1:
            raise OptionError("top_p", f"{self.top_p:g}: must be above 0, and at most 1, which allows all codes")
        if self.negative_prompt and not self.guides:
            raise OptionError(
                "negative_prompt", "works by guidance, and a guidance of 1 is none; give a larger guidance"
            )
