"""The sampling options of Infinity: flags of a job, columns of a manifest, PNG text chunks, fields of a request."""

import math
from dataclasses import dataclass, field

from mmcore.errors import OptionError

# A lower temperature is greedy, and the logits over it could overflow.
_MIN_TEMPERATURE = 0.01
# Far above useful values. With a much larger scale the logits could overflow fp32.
_MAX_GUIDANCE = 1000.0


@dataclass(frozen=True)
class InfinityOptions:
    """How bits are drawn. The defaults are the report's. The metadata ``api`` of a field is its name in a request."""

    guidance: float = field(default=3.0, metadata={"api": "guidance_scale"})
    """Classifier-free guidance scale; 1 is no guidance and takes half the time."""
    guidance_layer: int = 0
    """0 guides the logits. -n guides what leaves layer N - n of N layers, counted from 0: the official -5 of 32
    layers is layer 27."""
    guided_grids: int | None = None
    """Grids that are guided, the first ones. None guides all. Fewer are faster and change the image."""
    num_grids: int | None = None
    """Grids that are drawn, the first ones. None draws all. Fewer are faster and leave out the details."""
    temperature: float = 0.5
    """The logits are divided by it. 0 takes the more likely bit."""
    top_p: float = 0.97
    """The less likely of two bits is dropped where its probability is at most 1 - top_p. 1 keeps it."""

    def shortened(self) -> "InfinityOptions":
        """Options for a warm-up. They are unchanged, as each grid has other shapes."""
        return self

    def check(self, num_layers: int, guides: bool = True) -> None:
        """Raise OptionError for a value out of its range.

        Args:
            num_layers: layers of the Transformer.
            guides: whether guidance is possible, that is whether captions were dropped in training.
        """
        if not 1 <= self.guidance <= _MAX_GUIDANCE:
            raise OptionError(
                "guidance", f"{self.guidance:g}: must be at least 1 (no guidance) and at most {_MAX_GUIDANCE:g}"
            )
        if self.guidance != 1 and not guides:
            raise OptionError(
                "guidance",
                f"{self.guidance:g}: guidance is not possible, as this run was trained without dropped captions "
                "(drop_text 0); give 1",
            )
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature < math.inf:
            raise OptionError(
                "temperature",
                f"{self.temperature:g}: must be 0 (the more likely bit), or at least {_MIN_TEMPERATURE} and finite",
            )
        if not 0.5 < self.top_p <= 1:
            raise OptionError("top_p", f"{self.top_p:g}: must be above 0.5, and at most 1, which keeps both bits")
        if not -num_layers < self.guidance_layer <= 0:
            raise OptionError("guidance_layer", f"{self.guidance_layer}: must be from {1 - num_layers} to 0")
        if self.guided_grids is not None and self.guided_grids < 0:
            raise OptionError("guided_grids", f"{self.guided_grids}: must be at least 0")
        if self.num_grids is not None and self.num_grids < 1:
            raise OptionError("num_grids", f"{self.num_grids}: must be at least 1")

    def guidance_of(self, number: int) -> float:
        """The guidance scale of grid `number`."""
        return self.guidance if self.guided_grids is None or number < self.guided_grids else 1.0
